"""Reading pictures: size, orientation, transparency, colour, resizing. Torch-free.

Of a file with several pictures (an animation, pages) the first counts. Transparent pixels are laid over one colour, as a
viewer shows them: what is stored below alpha is what a drawing program left there.

Pillow's guards against hostile files would refuse what people have: drawings with their whole workflow in a text chunk,
scans of 200 megapixels. They are replaced by wider ones here, for the whole process.
"""

import importlib
import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

from PIL import Image, ImageCms, ImageFile, PngImagePlugin, UnidentifiedImageError

from musubi_tuner.config.datasets import KEPT, WHITE
from musubi_tuner.data.buckets import Placement, Size
from musubi_tuner.errors import DataError

if TYPE_CHECKING:
    import numpy as np

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
"""Endings of the pictures that Pillow reads by itself."""
PLUGINS = {
    ".heic": ("pillow_heif", "pillow-heif"),
    ".heif": ("pillow_heif", "pillow-heif"),
    ".hif": ("pillow_heif", "pillow-heif"),
    ".jxl": ("pillow_jxl", "pillow-jxl-plugin"),
}
"""Endings that Pillow reads with a plug-in: its module, and the package that holds it."""
MAX_PIXELS = 1_000_000_000
"""Of one picture; while it is decoded it takes 4 bytes of each, several times over."""
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = 256 << 20
PngImagePlugin.MAX_TEXT_MEMORY = 512 << 20


class Memory(io.BytesIO):
    """The bytes of a picture where a path is expected.

    Args:
        name: for messages.
    """

    suffix = ""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name

    def __str__(self) -> str:
        return self.name

    def open(self, mode: str = "rb") -> io.BytesIO:
        """A reader of its own."""
        return io.BytesIO(self.getvalue())


Picture = Path | Memory
"""Where a picture is."""
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)


_BROKEN = (
    UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    MemoryError, struct.error,
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


def can_read(extension: str) -> bool:
    """Whether pictures of an ending (lower case, with its dot) can be read here."""
    return extension in EXTENSIONS or (extension in PLUGINS and _registered(PLUGINS[extension][0]))


@cache
def _registered(module: str) -> bool:
    """Whether a plug-in is installed; Pillow knows its formats from now on."""
    try:
        plugin = importlib.import_module(module)
    except (ImportError, OSError):
        return False
    if hasattr(plugin, "register_heif_opener"):  # the other one registers itself when it is imported
        plugin.register_heif_opener()
    return True


def _open_file(path: Picture) -> ImageFile.ImageFile:
    """Read the header of a picture.

    Raises:
        ValueError: if it has too many pixels, or such as have no black and white. And what is in `_BROKEN`.
    """
    can_read(path.suffix.lower())  # registers a plug-in
    image = Image.open(path)
    wrong, (width, height) = "", image.size
    if width * height > MAX_PIXELS:
        wrong = f"{width}x{height} is more than {MAX_PIXELS:,} pixels"
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        wrong = "its channels have 32 bits, of which nobody knows black and white; save it with 8 or 16 bits"
    if wrong:
        image.close()
        raise ValueError(wrong)
    return image


def _orientation(image: ImageFile.ImageFile, path: Picture) -> int:
    """EXIF orientation, 1 to 8; 1 where EXIF data is broken or says something else, as viewers do."""
    if image.format == "TIFF":  # Pillow turns these by itself
        return 1
    try:
        # Pillow would decode a PNG to look behind its pixels; its chunks are walked instead.
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else _png_exif(image, path)
        found = exif.get(_ORIENTATION)
    except (*_BROKEN, Warning):
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _png_exif(image: ImageFile.ImageFile, path: Picture) -> Image.Exif:
    """The eXIf chunk of a PNG, wherever it lies; empty if there is none or the file is cut short."""
    exif, file = Image.Exif(), image.fp
    if file is None:  # Pillow has read and closed it
        with path.open("rb") as again:
            _walk_chunks(again, exif)
        return exif
    before = file.tell()
    try:
        _walk_chunks(file, exif)
    finally:
        file.seek(before)  # from where Pillow decodes
    return exif


def _walk_chunks(file: IO[bytes], exif: Image.Exif) -> None:
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            exif.load(file.read(length))
            break
        file.seek(length + 4, 1)


@dataclass(frozen=True)
class Header:
    """What a picture is before its pixels are decoded.

    Attributes:
        size: (width, height) as a viewer shows it.
        alpha: whether it has an alpha channel or a transparent colour.
        remarks: what is made of it where that does not go without saying; each begins with a verb for several files.
    """

    size: Size
    alpha: bool
    remarks: tuple[str, ...] = ()


_SEVERAL = ("GIF", "PNG", "WEBP", "AVIF", "TIFF", "HEIF")
"""Formats of animations and pages; a second picture in a phone's JPEG is a preview or a depth map."""


def read_picture_header(path: Picture) -> Header:
    """What the header of a picture says.

    Raises:
        DataError: if it is not a readable image.
    """
    try:
        with _open_file(path) as image:
            width, height = image.size
            alpha = image.has_transparency_data
            turned = _orientation(image, path) in _TURNED
            remarks = tuple(_remarks(image))
    except _BROKEN as error:
        raise DataError(f"{path}: not a readable image ({_reason(error, path)})") from error
    return Header((height, width) if turned else (width, height), alpha, remarks)


def _remarks(image: ImageFile.ImageFile) -> Iterator[str]:
    if image.format in _SEVERAL and getattr(image, "is_animated", False):
        yield "hold several pictures, of which the first is taken"
    if image.mode.startswith("I"):
        yield "are grey with 16 bits, of which 65535 is white"
    if image.mode == "CMYK":
        yield "are CMYK, converted without a colour profile"
    elif image.mode in ("RGB", "RGBA") and not _is_srgb(image.info.get("icc_profile")):
        yield "have another colour profile than sRGB, which is not applied"


@lru_cache(maxsize=64)
def _is_srgb(profile: bytes | None) -> bool:
    """Whether a colour profile is sRGB by its name; no profile and one that cannot be read count as sRGB."""
    if not profile:
        return True
    try:
        return "srgb" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).lower()
    except (*_BROKEN, ImportError, ImageCms.PyCMSError):
        return True


def image_size(path: Picture) -> Size:
    """Width and height as a viewer shows the picture, from the header alone.

    Raises:
        DataError: if it is not a readable image.
    """
    return read_picture_header(path).size


def open_image(path: Picture, background: str = WHITE) -> Image.Image:
    """Decode a picture upright, as RGB.

    Args:
        background: colour that transparent pixels are laid over, by name or "#rrggbb"; `KEPT` drops the alpha channel.

    Raises:
        DataError: if it is broken or cut short.
    """

    def convert(image: Image.Image) -> Image.Image:
        if not image.has_transparency_data:
            return _eight_bits(image).convert("RGB")
        picture = _with_alpha(image)
        if background != KEPT:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
        return picture.convert("RGB")

    return _open(path, convert)


def open_upright(path: Picture) -> Image.Image:
    """Decode a picture upright, grey (mode L) if it is stored grey, else as RGB; an alpha channel is dropped.

    Raises:
        DataError: if it is broken or cut short.
    """

    def convert(image: Image.Image) -> Image.Image:
        grey = image.mode in ("1", "L", "LA", "La", "I") or image.mode.startswith("I;16")
        picture = _with_alpha(image) if image.has_transparency_data else _eight_bits(image)
        return picture.convert("L" if grey else "RGB")

    return _open(path, convert)


def open_alpha(path: Picture) -> Image.Image:
    """The alpha channel of a picture, upright; white where it has none.

    Raises:
        DataError: if it is broken or cut short.
    """
    return _open(path, lambda image: _with_alpha(image).getchannel("A"))


def _with_alpha(image: Image.Image) -> Image.Image:
    """The picture as RGBA, colours below alpha as they are stored."""
    if image.mode.startswith("I;16") and "transparency" in image.info:  # Pillow knows no such conversion
        import numpy as np

        grey = _eight_bits(image)
        visible = np.asarray(image) != image.info["transparency"]
        return Image.merge("RGBA", (grey, grey, grey, Image.fromarray(visible.astype(np.uint8) * np.uint8(255))))
    picture = image.convert("LA") if image.mode == "La" else _eight_bits(image)
    return picture if picture.mode == "RGBA" else picture.convert("RGBA")  # a copy of a large scan takes a GiB


def _eight_bits(image: Image.Image) -> Image.Image:
    """The same picture in a mode that Pillow converts without loss."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return image.point(lambda value: value / 257).convert("L")
    return image


def _open(path: Picture, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Decode, convert and turn upright."""
    try:
        with _open_file(path) as file:
            turn = _TRANSPOSE.get(_orientation(file, path))
            image = convert(file)
            return image if turn is None else image.transpose(turn)
    except _BROKEN as error:
        raise DataError(f"{path}: broken image ({_reason(error, path)}); replace or remove it") from error


def _reason(error: Exception, path: Picture) -> str:
    if isinstance(error, UnidentifiedImageError):
        package = PLUGINS.get(path.suffix.lower(), ("", ""))[1]
        return f"unknown format; convert it, or pip install {package}" if package else "unknown format"
    return str(error) or type(error).__name__


def resize_crop(image: Image.Image, placement: Placement) -> Image.Image:
    """Resize with the filter of a placement, and crop to the bucket."""
    if placement.filter == "none":
        return image
    method = Image.Resampling["BOX" if placement.filter == "area" else placement.filter.upper()]
    left, top = placement.crop
    width, height = placement.bucket
    return image.resize(placement.resized, method).crop((left, top, left + width, top + height))


def to_array(image: Image.Image) -> "np.ndarray":
    """uint8 array [height, width, 3]."""
    import numpy as np

    return np.asarray(image, dtype=np.uint8)
