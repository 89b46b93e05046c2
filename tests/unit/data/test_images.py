"""What is read from a picture file: its upright size and its RGB pixels."""

import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from musubi_tuner.config.datasets import KEPT
from musubi_tuner.data.buckets import filtered, place
from musubi_tuner.data.images import (
    EXTENSIONS,
    image_size,
    open_image,
    read_picture_header,
    resize_crop,
    to_array,
)
from musubi_tuner.errors import DataError

ORIENTATION = 0x0112
# What a viewer does to the stored pixels for each orientation of the EXIF standard.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_turns_size_and_pixels(tmp_path: Path, orientation: int) -> None:
    stored = noise(20, 30, 3)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "photo.png"
    Image.fromarray(stored).save(path, exif=exif)
    upright = UPRIGHT[orientation](stored)
    assert image_size(path) == (upright.shape[1], upright.shape[0])
    assert np.array_equal(to_array(open_image(path)), upright)


def test_exif_orientation_of_a_jpeg(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (48, 32), (255, 0, 0)).save(path, exif=exif)
    assert image_size(path) == (32, 48)
    assert open_image(path).size == (32, 48)


def test_an_unknown_orientation_is_taken_as_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 99
    path = tmp_path / "photo.png"
    Image.new("RGB", (48, 32)).save(path, exif=exif)
    assert image_size(path) == open_image(path).size == (48, 32)


def test_grey_is_repeated_in_all_channels(tmp_path: Path) -> None:
    grey = noise(8, 12)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    pixels = to_array(open_image(tmp_path / "grey.png"))
    assert pixels.shape == (8, 12, 3)
    assert pixels.dtype == np.uint8
    assert all(np.array_equal(pixels[..., channel], grey) for channel in range(3))


def test_black_and_white_becomes_0_and_255(tmp_path: Path) -> None:
    bits = noise(8, 8) > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert np.array_equal(to_array(open_image(tmp_path / "bits.png"))[..., 0], bits * np.uint8(255))


def over(colour: tuple[int, int, int], stored: np.ndarray) -> np.ndarray:
    """What a viewer shows of [H, W, 2 or 4] pixels on one colour."""
    share = stored[..., -1:] / 255
    return np.broadcast_to(stored[..., :-1], (*stored.shape[:2], 3)) * share + np.array(colour) * (1 - share)


@pytest.mark.parametrize("extension", ["png", "webp", "tiff"])
@pytest.mark.parametrize("channels", [4, 2], ids=["RGBA", "LA"])
def test_transparent_pixels_are_laid_over_a_colour(tmp_path: Path, channels: int, extension: str) -> None:
    stored = noise(8, 12, channels)
    stored[:4, :, -1], stored[4:6, :, -1] = 0, 255
    path = tmp_path / f"alpha.{extension}"
    Image.fromarray(stored).save(path, **({"lossless": True, "exact": True} if extension == "webp" else {}))
    for name, colour in (("#ffffff", (255, 255, 255)), ("#204060", (32, 64, 96)), ("black", (0, 0, 0))):
        pixels = to_array(open_image(path, name)).astype(int)
        assert np.abs(pixels - over(colour, stored)).max() <= 1  # rounding
        assert np.array_equal(pixels[4:6], over(colour, stored)[4:6])
    assert np.array_equal(to_array(open_image(path)), to_array(open_image(path, "white")))
    assert np.array_equal(to_array(open_image(path, KEPT)), np.broadcast_to(stored[..., :-1], (8, 12, 3)))
    assert read_picture_header(path).alpha


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (7, 8, 9)), ("1", 0), ("I;16", 7)])
def test_the_transparent_colour_of_a_png_is_laid_over_a_colour(tmp_path: Path, mode: str, colour: Any) -> None:
    image = Image.new(mode, (4, 2), colour)
    image.paste(0xFFFF if mode == "I;16" else 255 if mode != "RGB" else (1, 255, 3), (0, 0, 2, 2))
    image.save(tmp_path / "keyed.png", transparency=colour)
    with Image.open(tmp_path / "keyed.png") as stored:
        assert (stored.mode, "transparency" in stored.info) == (mode, True)
    pixels = to_array(open_image(tmp_path / "keyed.png", "#0a0b0c"))
    assert pixels[0, 3].tolist() == [10, 11, 12]
    assert pixels[0, 0].tolist() == ([1, 255, 3] if mode == "RGB" else [255] * 3)


def test_premultiplied_alpha_is_divided_out(tmp_path: Path) -> None:
    """TIFF files may store colours times alpha."""
    stored = Image.new("RGBA", (2, 2), (200, 100, 50, 128))
    stored.save(tmp_path / "a.tif")
    straight, times_alpha = (struct.pack("<HHLHH", 338, 3, 1, kind, 0) for kind in (2, 1))
    whole = (tmp_path / "a.tif").read_bytes()
    assert straight in whole
    (tmp_path / "a.tif").write_bytes(whole.replace(straight, times_alpha))
    assert read_picture_header(tmp_path / "a.tif").alpha
    # The stored numbers are the colour times alpha already: 200 + 255 * (1 - 128 / 255) = 327, cut to 255.
    assert np.abs(to_array(open_image(tmp_path / "a.tif")).astype(int) - (255, 227, 177)).max() <= 2


def palette_image() -> Image.Image:
    image = Image.fromarray(noise(6, 6) % 3).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])], ids=["opaque", "one", "per colour"])
def test_palette_colours_are_looked_up(tmp_path: Path, transparency: int | bytes | None) -> None:
    image = palette_image()
    indices = np.asarray(image)
    extra = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "palette.png", **extra)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
    assert np.array_equal(to_array(open_image(tmp_path / "palette.png", KEPT)), colours[indices])
    visible = [255] * 3 if transparency is None else [255, 0, 255] if transparency == 1 else list(transparency)
    expected = over((255, 255, 255), np.concatenate([colours, np.array(visible)[:, None]], axis=1)[indices])
    assert np.abs(to_array(open_image(tmp_path / "palette.png")) - expected).max() <= 1


def test_sixteen_bits_of_grey_keep_their_high_byte_within_rounding(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 257 * 5, dtype=np.uint16).reshape(4, -1)
    Image.fromarray(values).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as stored:
        assert stored.mode.startswith("I")
    pixels = to_array(open_image(tmp_path / "deep.png"))
    # 65535 / 257 = 255: the full range is kept; one unit for rounding or cutting the fraction.
    assert np.abs(pixels[..., 0].astype(int) - values // 257).max() <= 1
    assert pixels.max() >= 250


def test_an_exif_orientation_of_sixteen_bit_grey_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(np.zeros((20, 30), dtype=np.uint16)).save(tmp_path / "deep.png", exif=exif)
    assert image_size(tmp_path / "deep.png") == open_image(tmp_path / "deep.png").size == (20, 30)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_32_bits_are_refused_because_their_range_is_unknown(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match=r"32 bits.*save it with 8 or 16"):
        image_size(tmp_path / "deep.tif")


def test_the_first_picture_of_several_is_taken(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for extension in ("gif", "png", "webp", "tif"):
        path = tmp_path / f"moving.{extension}"
        red.save(path, save_all=True, append_images=[blue], **({"lossless": True} if extension == "webp" else {}))
        (remark,) = read_picture_header(path).remarks
        assert "the first is taken" in remark
        assert to_array(open_image(path)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64
        red.save(path)
        assert read_picture_header(path).remarks == ()


def test_pixels_that_are_no_plain_rgb_are_remarked(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.jpg")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("plain", srgb), ("wide", srgb.replace("sRGB".encode("utf-16-be"), "DCP3".encode("utf-16-be"))),
                          ("rubbish", b"no profile")):  # fmt: skip
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png", icc_profile=profile)
    remarks = {path.stem: read_picture_header(path).remarks for path in tmp_path.iterdir()}
    assert "65535" in remarks["deep"][0] and "CMYK" in remarks["print"][0] and "profile" in remarks["wide"][0]
    assert remarks["plain"] == remarks["rubbish"] == ()


def test_a_tiff_is_turned_once(tmp_path: Path) -> None:
    stored, exif = noise(20, 30, 3), Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(stored).save(tmp_path / "scan.tif", exif=exif)
    assert image_size(tmp_path / "scan.tif") == (20, 30)
    assert np.array_equal(to_array(open_image(tmp_path / "scan.tif")), UPRIGHT[6](stored))


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_listed_extension_can_be_read(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"picture{extension}"
    Image.new("RGB", (40, 24), (10, 200, 90)).save(path)
    assert image_size(path) == (40, 24)
    # 8 of 255: flat colours survive lossy formats about that well.
    assert np.abs(to_array(open_image(path)).astype(int) - (10, 200, 90)).max() <= 8


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("hello")
    with pytest.raises(DataError) as caught:
        image_size(path)
    assert str(caught.value) == f"{path}: not a readable image (unknown format)"
    with pytest.raises(DataError) as caught:
        open_image(path)
    assert str(caught.value) == f"{path}: broken image (unknown format); replace or remove it"


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(DataError, match=r"empty\.png: not a readable image \(unknown format\)"):
        image_size(path)


@pytest.mark.parametrize("extension", [".png", ".jpg", ".bmp"])
def test_a_picture_that_is_cut_short_is_named_when_it_is_decoded(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"cut{extension}"
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"broken image \(.*truncated.*\); replace or remove it") as caught:
        open_image(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("extension", [".png", ".jpg", ".bmp"])
def test_the_size_is_read_from_the_header_alone(tmp_path: Path, extension: str) -> None:
    """Measuring a large folder must not decode its pixels: a file without most of them still has a size."""
    path = tmp_path / f"cut{extension}"
    Image.fromarray(noise(64, 48, 3)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert image_size(path) == (48, 64)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_an_exif_orientation_behind_the_pixels_of_a_png_is_seen(tmp_path: Path) -> None:
    """The PNG standard allows the eXIf chunk there; size and pixels must agree on it."""
    path = tmp_path / "photo.png"
    Image.new("RGB", (48, 32)).save(path)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    whole, end = path.read_bytes(), png_chunk(b"IEND", b"")
    assert whole.endswith(end)
    path.write_bytes(whole.removesuffix(end) + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + end)
    assert image_size(path) == open_image(path).size == (32, 48)


HEAD = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"


@pytest.mark.parametrize(
    "exif",
    [
        HEAD + b"\0\x02\0\0\0\x02" + b"6\0\0\0" + b"\0" * 4,
        HEAD + b"\0\x03\0\0\0\x02" + b"\0\x01\0\x01" + b"\0" * 4,
        HEAD + b"\0\x03\0\0\0\x01" + b"\0\x09\0\0" + b"\0" * 4,
        HEAD[:12] + b"\x05\0",
        b"Exif\0\0rubbish that is no tiff header",
    ],
    ids=["text", "two values", "nine", "cut short", "rubbish"],
)
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_exif_data_does_not_stop_a_picture(tmp_path: Path, exif: bytes, extension: str) -> None:
    path = tmp_path / f"photo.{extension}"
    Image.new("RGB", (48, 32)).save(path, exif=exif)
    assert image_size(path) == open_image(path).size == (48, 32)


def test_long_texts_in_a_png_do_not_stop_it(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", '{"node":1},' * 300_000, zip=True)
    info.add_text("prompt", "x" * 2_000_000)
    Image.new("RGB", (48, 32)).save(tmp_path / "graph.png", pnginfo=info)
    assert image_size(tmp_path / "graph.png") == open_image(tmp_path / "graph.png").size == (48, 32)


def test_a_scan_of_200_megapixels_opens_without_a_warning(tmp_path: Path) -> None:
    """Warnings are errors in tests; one bit per pixel keeps it quick, and the header is what is judged."""
    Image.new("1", (16_000, 12_500)).save(tmp_path / "scan.tif", compression="group4")
    assert image_size(tmp_path / "scan.tif") == (16_000, 12_500)


def test_a_format_that_a_plug_in_reads_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "photo.jxl").write_bytes(b"\xff\x0a" + b"\0" * 20)
    with pytest.raises(DataError, match="unknown format; convert it, or pip install pillow-jxl-plugin"):
        image_size(tmp_path / "photo.jxl")


def test_a_picture_of_unreasonable_size_is_refused_with_its_name(tmp_path: Path) -> None:
    """A header that claims more pixels than Pillow opens must not end in a traceback."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match=r"bomb\.png: not a readable image"):
        image_size(path)
    with pytest.raises(DataError, match=r"bomb\.png: broken image"):
        open_image(path)


@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp", ".bmp"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_give_a_picture_or_a_data_error(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"picture{extension}"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(noise(24, 24, 3)).save(path, **({} if extension == ".bmp" else {"exif": exif}))
    whole = path.read_bytes()
    rng = random.Random(extension)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        # Most damage goes into the headers at the beginning, where decoders branch.
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(len(whole), 120)) if rng.random() < 0.7 else rng.randrange(len(whole))] = (
                rng.randrange(256)
            )
        path.write_bytes(damaged)
        for read in (image_size, open_image):
            try:
                read(path)
            except DataError as error:
                assert str(error).startswith(f"{path}: ")
                refused += 1
    assert refused > 20


def test_resizing_covers_the_bucket_and_keeps_the_centre(tmp_path: Path) -> None:
    stored = np.zeros((100, 400, 3), dtype=np.uint8)
    stored[:, 150:250] = 255
    placement = place((400, 100), (64, 64))
    pixels = to_array(resize_crop(Image.fromarray(stored), placement))
    assert placement.resized == (256, 64)
    assert pixels.shape == (64, 64, 3)
    # The white centre of 100 of 400 columns becomes 64 of 256: exactly the crop.
    assert pixels.min() == 255


def test_a_picture_of_the_bucket_size_is_not_resampled(tmp_path: Path) -> None:
    stored = noise(32, 48, 3)
    assert np.array_equal(to_array(resize_crop(Image.fromarray(stored), place((48, 32), (48, 32)))), stored)


@pytest.mark.parametrize("name", ["area", "lanczos", "bicubic", "bilinear", "nearest"])
def test_a_filter_that_is_asked_for_is_the_one_of_pillow(name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image, bucket = Image.fromarray(noise), (32, 32)
    placement = filtered(place(image.size, bucket), name)
    method = Image.Resampling["BOX" if name == "area" else name.upper()]
    left, top = placement.crop
    expected = image.resize(placement.resized, method).crop((left, top, left + 32, top + 32))
    assert np.array_equal(np.asarray(resize_crop(image, placement)), np.asarray(expected))
    assert filtered(place(bucket, bucket), name).filter == "none"
