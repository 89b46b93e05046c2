"""Reading pictures: size, orientation, colour, resizing. Torch-free."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageFile, UnidentifiedImageError

from musubi_tuner.data.buckets import Placement, Size
from musubi_tuner.errors import DataError

if TYPE_CHECKING:
    import numpy as np

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)


_BROKEN = (
    UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    MemoryError, struct.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow's readers raise for damaged files."""
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: ImageFile.ImageFile, path: Path) -> int:
    """EXIF orientation, 1 to 8. Pillow would decode a PNG to look behind its pixels; its chunks are walked instead."""
    exif = image.getexif() if image.format != "PNG" or "exif" in image.info else _png_exif(path)
    return int(exif.get(_ORIENTATION, 1))


def _png_exif(path: Path) -> Image.Exif:
    """The eXIf chunk of a PNG, wherever it lies; empty if there is none or the file is cut short."""
    exif = Image.Exif()
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                exif.load(file.read(length))
                break
            file.seek(length + 4, 1)
    return exif


def image_size(path: Path) -> Size:
    """Width and height as a viewer shows the picture, from the header alone.

    Raises:
        DataError: if it is not a readable image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = _orientation(image, path) in _TURNED
    except _BROKEN as error:
        raise DataError(f"{path}: not a readable image ({_reason(error)})") from error
    return (height, width) if turned else (width, height)


def has_alpha(path: Path) -> bool:
    """Whether a picture has an alpha channel or a transparent colour, from the header alone.

    Raises:
        DataError: if it is not a readable image.
    """
    try:
        with Image.open(path) as image:
            return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    except _BROKEN as error:
        raise DataError(f"{path}: not a readable image ({_reason(error)})") from error


def open_image(path: Path) -> Image.Image:
    """Decode a picture upright, as RGB; an alpha channel is dropped.

    Raises:
        DataError: if it is broken or cut short.
    """
    return _open(path, lambda image: _opaque(image).convert("RGB"))


def open_upright(path: Path) -> Image.Image:
    """Decode a picture upright, grey (mode L) if it is stored grey, else as RGB; an alpha channel is dropped.

    Raises:
        DataError: if it is broken or cut short.
    """

    def convert(image: Image.Image) -> Image.Image:
        grey = image.mode in ("1", "L", "LA", "La", "I") or image.mode.startswith("I;16")
        return _opaque(image).convert("L" if grey else "RGB")

    return _open(path, convert)


def open_alpha(path: Path) -> Image.Image:
    """The alpha channel of a picture, upright; white where it has none.

    Raises:
        DataError: if it is broken or cut short.
    """
    return _open(path, lambda image: image.convert("RGBA").getchannel("A"))


def _opaque(image: Image.Image) -> Image.Image:
    """The same picture in a mode that Pillow converts without loss."""
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode.startswith("I;16") or image.mode == "I":
        return image.point(lambda value: value / 257).convert("L")
    return image


def _open(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Decode, convert and turn upright."""
    try:
        with Image.open(path) as file:
            turn = _TRANSPOSE.get(_orientation(file, path))
            image = convert(file)
            return image if turn is None else image.transpose(turn)
    except _BROKEN as error:
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
