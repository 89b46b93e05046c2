"""What the plan says of pictures that are trained otherwise than they look in a viewer. Torch-free."""

from collections import Counter
from collections.abc import Callable, Sequence

from musubi_tuner.config.datasets import KEPT
from musubi_tuner.data.sources import Item

LEAST_KEPT = 0.5
"""Share of the area of a picture that a crop should leave."""
MOST_ENLARGED = 2.0
"""Factor by which a side may grow."""
LARGE = 100_000_000
"""Pixels of a picture whose decoding takes memory worth a line."""


def kept_share(item: Item) -> float:
    """Share of the area that the crop leaves."""
    (width, height), (resized_width, resized_height) = item.bucket, item.placement.resized
    return width * height / (resized_width * resized_height)


def enlargement(item: Item) -> float:
    """Factor by which the side grows that grows most."""
    return max(new / old for new, old in zip(item.placement.resized, item.size, strict=True))


def picture_lines(items: Sequence[Item], readers: int) -> list[str]:
    """Lines on transparency and on very large pictures, and warnings of crops and enlargements.

    Args:
        readers: pictures that a cache job reads at a time.
    """
    lines = []
    for colour, count in sorted(Counter(item.background for item in items if item.background != KEPT).items()):
        lines.append(
            f"  alpha    {count} of {len(items)} images have an alpha channel; transparent pixels become {colour} (alpha_background)"
        )
    kept = sum(item.background == KEPT and item.mask is not None and item.mask.source == "alpha" for item in items)
    if kept:
        lines.append(
            f"  alpha    {kept} of {len(items)} images have their mask in the alpha channel and keep the colours below it; "
            "alpha_background lays them over one"
        )
    large = sorted((item for item in items if _pixels(item) > LARGE), key=_pixels, reverse=True)
    if large:
        lines.append(
            f"  large    {len(large)} of {len(items)} images have more than {LARGE // 10**6} megapixels "
            f"({_named(large, lambda item: f'{_pixels(item) / 1e6:.0f} MP')}); decoding one takes up to "
            f"{12 * _pixels(large[0]) / 2**30:.1f} GiB, and cache.workers reads {readers} at a time"
        )
    cut = sorted((item for item in items if kept_share(item) < LEAST_KEPT), key=kept_share)
    if cut:
        lines.append(
            f"warning: {len(cut)} of {len(items)} images lose more than half of their area to the crop "
            f"({_named(cut, lambda item: f'keeps {kept_share(item):.0%}')}); crop them yourself, turn enable_bucket on, or set "
            'resize = "squash"'
        )
    enlarged = sorted((item for item in items if enlargement(item) > MOST_ENLARGED), key=enlargement, reverse=True)
    if enlarged:
        lines.append(
            f"warning: {len(enlarged)} of {len(items)} images are enlarged more than {MOST_ENLARGED:g} times "
            f"({_named(enlarged, lambda item: f'{enlargement(item):.1f}x')}); remove them, lower the resolution, or set "
            "bucket_no_upscale = true"
        )
    return lines


def _pixels(item: Item) -> int:
    return item.size[0] * item.size[1]


def _named(items: Sequence[Item], say: Callable[[Item], str]) -> str:
    """The first three by name."""
    return ", ".join(f"{item.path.name} {say(item)}" for item in items[:3]) + (", ..." if len(items) > 3 else "")
