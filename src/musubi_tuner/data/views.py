"""Versions of a picture: mirrored, cropped elsewhere, with other colours. Torch-free but for numpy arrays.

A view is drawn by (cache.seed, item, number); number 0 is the picture as it is, which validation uses. Colours change in half of the
others: a shift of the hue by up to 8 of 180 degrees, or a gamma between 0.95 and 1.05.
"""

from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from musubi_tuner.config.views import ViewSettings
from musubi_tuner.data.buckets import Placement
from musubi_tuner.randomness import keyed_random

if TYPE_CHECKING:
    import numpy as np

LARGEST_SHIFT = 8 / 180
GAMMAS = (0.95, 1.05)


@dataclass(frozen=True)
class View:
    """One version of a picture.

    Attributes:
        crop: left and top in the resized picture. flip: mirrored left to right. hue: shift as a share of the circle. gamma: exponent.
    """

    crop: tuple[int, int]
    flip: bool = False
    hue: float = 0.0
    gamma: float = 1.0

    def place(self, placement: Placement) -> Placement:
        """How the picture becomes its bucket in this view."""
        return replace(placement, crop=self.crop)

    def mirror(self, array: "np.ndarray") -> "np.ndarray":
        """A picture or mask [H, W, ...], mirrored where the view is."""
        return array[:, ::-1] if self.flip else array

    def colour(self, array: "np.ndarray") -> "np.ndarray":
        """A picture uint8 [H, W, 3] with the colours of the view."""
        import numpy as np
        from PIL import Image

        if self.hue:
            hsv = np.array(Image.fromarray(array).convert("HSV"))
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + round(self.hue * 256)) % 256
            array = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
        if self.gamma != 1:
            table = (255 * (np.arange(256) / 255) ** self.gamma).round().astype(np.uint8)
            array = table[array]
        return array


def views(item: str, placement: Placement, settings: ViewSettings) -> tuple[View, ...]:
    """The views of a picture; one for a picture that is trained as it is.

    Args:
        item: key of the draws.
    """
    made = [View(placement.crop)]
    if settings.drawn:
        sources = [keyed_random(settings.seed, "view", item, number) for number in range(1, settings.latent_variants)]
        made += [draw(placement, settings, source) for source in sources]
    return tuple([*made, *(replace(view, flip=True) for view in made)] if settings.flip_aug else made)


def draw(placement: Placement, settings: ViewSettings, source: Random) -> View:
    """A view with everything drawn but the mirroring."""
    crop = placement.crop
    if settings.random_crop:
        left, top = (
            source.randint(0, max(0, old - new)) for old, new in zip(placement.resized, placement.bucket, strict=True)
        )
        crop = (left, top)
    if not settings.color_aug or source.random() >= 0.5:
        return View(crop)
    if source.random() < 0.5:
        return View(crop, hue=source.uniform(-LARGEST_SHIFT, LARGEST_SHIFT))
    return View(crop, gamma=source.uniform(*GAMMAS))
