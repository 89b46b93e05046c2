"""Loss masks: which part of a picture the loss looks at. Torch-free.

Sources, each a grey picture of the size of its image, white = foreground:

    file      a grey picture; of a coloured one the red channel
    alpha     the alpha channel of the image; an image without one has no mask
    product   the image itself: foreground where the RGB distance to the median colour of the four corners is above 30
    smpl      a body rendering: foreground where a grey one is above 20, and where a coloured one is not green,
              that is not (g > r + 20 and g > b + 20)
    imported  what was imported with the latents; no image can make it

What is transparent in a mask file is background. A mask takes the resize and crop of its image and is then averaged over
the pixels of a latent cell, so that it keeps soft values. An image without a mask weighs 1 everywhere.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageChops

from musubi_tuner.config.datasets import KEPT, WHITE
from musubi_tuner.config.schema.items import MaskSource
from musubi_tuner.data.buckets import Placement
from musubi_tuner.data.images import open_alpha, open_image, open_upright, resize_crop
from musubi_tuner.errors import DataError

if TYPE_CHECKING:
    import numpy as np


CORNER = 100
"""Side of the corner squares whose median is a product picture's background, in pixels."""
PRODUCT_DISTANCE = 30
SMPL_MARGIN = 20


@dataclass(frozen=True)
class Mask:
    """Where the mask of an image comes from.

    Attributes:
        path: the file of the sources file and smpl; the others look at the image.
        alpha: whether the file has transparent pixels.
    """

    source: MaskSource
    path: Path | None = None
    alpha: bool = False


def product_mask(image: Image.Image) -> "np.ndarray":
    """Foreground of a product picture [height, width] by its distance from the colour of the corners."""
    import numpy as np

    pixels = np.asarray(image.convert("RGB"))
    first, last = slice(None, CORNER), slice(-CORNER, None)
    corners = [pixels[rows, columns].reshape(-1, 3) for rows in (first, last) for columns in (first, last)]
    background = np.median(np.concatenate(corners), axis=0).astype(np.uint8)
    distance = np.linalg.norm(pixels.astype(np.float32) - background.astype(np.float32), axis=-1)
    return distance > PRODUCT_DISTANCE


def smpl_mask(image: Image.Image) -> "np.ndarray":
    """Foreground of a body rendering [height, width]: bright in a grey one, not green in a coloured one."""
    import numpy as np

    if image.mode == "L":
        return np.asarray(image) > SMPL_MARGIN
    red, green, blue = np.asarray(image.convert("RGB")).astype(np.float32).transpose(2, 0, 1)
    return ~((green > red + SMPL_MARGIN) & (green > blue + SMPL_MARGIN))


def belonging(names: Sequence[str], images: Collection[str]) -> str:
    """The first of some mask names that an image would have without what was added to it, in words; empty if none is so."""
    for name in names:
        plain = re.sub(
            r"[-_. ]*(mask|matte|alpha|seg(mentation)?)$|(?<![^/])mask[-_. ]+", "", name, flags=re.IGNORECASE
        )
        if plain != name and plain in images:
            return f"{name} would be {plain}"
    return ""


def read_mask(mask: Mask, image_path: Path, background: str = WHITE) -> Image.Image:
    """The mask of an image at the image's size, grey.

    Args:
        background: what the transparent pixels of the image are laid over.

    Raises:
        DataError: if a file is broken, or the mask can only be imported.
    """
    import numpy as np

    match mask.source:
        case "imported":
            raise DataError(
                f'{image_path}: mask_source is "imported", so its latents can only be imported: python -m musubi_tuner.caching '
                "import"
            )
        case "file":
            assert mask.path is not None
            return _visible(open_image(mask.path, KEPT).getchannel("R"), mask)
        case "alpha":
            return open_alpha(image_path)
        case "product":
            found = product_mask(open_image(image_path, background))
        case "smpl":
            assert mask.path is not None
            found = smpl_mask(open_upright(mask.path))
        case _:
            raise ValueError(f"mask source {mask.source!r} has no mask")
    return _visible(Image.fromarray(found.astype(np.uint8) * np.uint8(255)), mask)


def _visible(picture: Image.Image, mask: Mask) -> Image.Image:
    """A grey picture, darkened where the file of the mask is transparent."""
    return ImageChops.multiply(picture, open_alpha(mask.path)) if mask.alpha and mask.path is not None else picture


def to_latent(mask: Image.Image, placement: Placement, factor: int) -> "np.ndarray":
    """Put a grey mask into its image's bucket and average it over latent cells.

    Args:
        factor: pixels per latent cell.

    Returns:
        float32 [height / factor, width / factor] in [0, 1].
    """
    import numpy as np

    if all(new <= old for new, old in zip(placement.resized, mask.size, strict=True)):
        placement = replace(placement, filter="area")  # LANCZOS would ring at the edges of a mask
    pixels = np.asarray(resize_crop(mask, placement), dtype=np.float32) / 255
    height, width = pixels.shape
    return pixels.reshape(height // factor, factor, width // factor, factor).mean((1, 3))
