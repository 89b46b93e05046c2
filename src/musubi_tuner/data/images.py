"""Reading pictures: size, orientation, colour, resizing. Torch-free."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps, UnidentifiedImageError

from musubi_tuner.data.buckets import Placement, Size
from musubi_tuner.errors import DataError

if TYPE_CHECKING:
    import numpy as np

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)


def image_size(path: Path) -> Size:
    """Width and height as a viewer shows the picture, from the header alone.

    Raises:
        DataError: if it is not a readable image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _TURNED
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: not a readable image ({_reason(error)})") from error
    return (height, width) if turned else (width, height)


def open_image(path: Path) -> Image.Image:
    """Decode a picture upright, as RGB; an alpha channel is dropped.

    Raises:
        DataError: if it is broken or cut short.
    """
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            elif image.mode.startswith("I;16") or image.mode == "I":
                image = image.point(lambda value: value / 257).convert("L")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: broken image ({_reason(error)}); replace or remove it") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"
    return str(error) or type(error).__name__


def resize_crop(image: Image.Image, placement: Placement) -> Image.Image:
    """Resize and centre-crop to the bucket: LANCZOS when enlarging, area averaging when reducing."""
    if placement.filter == "none":
        return image
    method = Image.Resampling.LANCZOS if placement.filter == "lanczos" else Image.Resampling.BOX
    left, top = placement.crop
    width, height = placement.bucket
    return image.resize(placement.resized, method).crop((left, top, left + width, top + height))


def to_array(image: Image.Image) -> "np.ndarray":
    """uint8 array [height, width, 3]."""
    import numpy as np

    return np.asarray(image, dtype=np.uint8)
