"""Aspect-ratio buckets: which size an image is resized and cropped to. Torch-free.

With A the area of the resolution, q = int(sqrt(A)) and s the step: widths w run from floor(q / 2) in steps of s while
w < q + s, each with h = floor(A / w); both (w, h) and (h, w) are buckets (floor means down to a multiple of s). An image
takes the bucket whose ratio w / h differs least from its own; the first in ascending order wins ties.

Source: musubi-tuner's rules, in specs of this project; files made there have the same sizes.
"""

from dataclasses import dataclass, replace

from musubi_tuner.errors import ConfigError, DataError
from musubi_tuner.models.registry import MODELS

Size = tuple[int, int]


def floor_to(value: int, step: int) -> int:
    """The largest multiple of ``step`` not above ``value``."""
    return value - value % step


def default_step(architecture: str) -> int:
    """Pixel step of an architecture code.

    Raises:
        ConfigError: for an unknown code.
    """
    if architecture in MODELS:
        return MODELS[architecture].pixel_step
    raise ConfigError(f"unknown architecture code '{architecture}'; known: {', '.join(MODELS)}")


@dataclass(frozen=True)
class Placement:
    """How an image becomes its bucket.

    Attributes:
        bucket: final (width, height).
        resized: (width, height) before the crop.
        crop: left and top of the centre crop.
        filter: ``none``, ``lanczos`` (enlarging), ``area`` (reducing), or the one that was asked for.
    """

    bucket: Size
    resized: Size
    crop: tuple[int, int]
    filter: str


def place(image: Size, bucket: Size) -> Placement:
    """Resize so that the image covers the bucket, then crop its centre."""
    if image == bucket:
        return Placement(bucket, image, (0, 0), "none")
    (width, height), (bucket_width, bucket_height) = image, bucket
    factor = max(bucket_width / width, bucket_height / height)
    resized = (int(width * factor + 0.5), int(height * factor + 0.5))
    crop = ((resized[0] - bucket_width) // 2, (resized[1] - bucket_height) // 2)
    return Placement(bucket, resized, crop, "lanczos" if factor > 1 else "area")


def filtered(placement: Placement, interpolation: str | None) -> Placement:
    """A placement with the filter that was asked for, if one was, and anything is resized."""
    if interpolation is None or placement.filter == "none":
        return placement
    return replace(placement, filter=interpolation)


def squash(image: Size, bucket: Size) -> Placement:
    """Resize to the bucket without a crop, whatever that does to the proportions; LANCZOS both ways, as published."""
    return Placement(bucket, bucket, (0, 0), "none" if image == bucket else "lanczos")


class BucketSelector:
    """The bucket list of a resolution, and the choice for an image.

    Args:
        resolution: (width, height); their product is the area of all buckets.
        architecture: code that decides the step.
        enable_bucket: false = a single bucket, the resolution itself.
        no_upscale: an image of no more than the area keeps its size, floored to the step.
        step: pixel step, if not the architecture's.
        min_side, max_side: leave out buckets with a shorter or longer side.

    Raises:
        ConfigError: if the smallest side would be 0, or the filters leave nothing.
    """

    def __init__(
        self,
        resolution: Size,
        architecture: str,
        enable_bucket: bool = True,
        no_upscale: bool = False,
        *,
        step: int | None = None,
        min_side: int | None = None,
        max_side: int | None = None,
    ) -> None:
        width, height = resolution
        self.step = step or default_step(architecture)
        self.area = width * height
        self.no_upscale = no_upscale and enable_bucket
        if not enable_bucket:
            self.bucket_resolutions: list[Size] = [(width, height)]
            return
        side = int(self.area**0.5)
        smallest = floor_to(side // 2, self.step)
        if smallest < 1:
            raise ConfigError(
                f"resolution {width}x{height} is too small for buckets of step {self.step}: the smallest side would be 0. "
                f"Use at least {2 * self.step}x{2 * self.step}, or enable_bucket = false"
            )
        found: set[Size] = set()
        for bucket_width in range(smallest, side + self.step, self.step):
            bucket_height = floor_to(self.area // bucket_width, self.step)
            found |= {(bucket_width, bucket_height), (bucket_height, bucket_width)}
        kept = [b for b in found if (min_side or 0) <= min(b) and max(b) <= (max_side or max(b))]
        if not kept:
            raise ConfigError(f"no bucket of {width}x{height} has all sides between {min_side} and {max_side}")
        self.bucket_resolutions = sorted(kept)

    def select(self, image: Size) -> Size:
        """The bucket of an image (width, height).

        Raises:
            DataError: if the image is smaller than one step and must not be enlarged.
        """
        width, height = image
        if self.no_upscale and width * height <= self.area:
            bucket = (floor_to(width, self.step), floor_to(height, self.step))
            if min(bucket) < 1:
                raise DataError(
                    f"image of {width}x{height} is smaller than the step of {self.step} pixels; "
                    "remove it, or set bucket_no_upscale = false"
                )
            return bucket
        ratio = width / height
        return min(self.bucket_resolutions, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))
