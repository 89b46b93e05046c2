"""Loss masks: how each source makes one, how it reaches the latent grid, and what is said about those that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.buckets import place
from musubi_tuner.data.images import read_picture_header
from musubi_tuner.data.masks import (
    Mask,
    belonging,
    product_mask,
    read_mask,
    smpl_mask,
    to_latent,
)
from musubi_tuner.data.remarks import black_lines, mask_lines
from musubi_tuner.data.sources import scan
from musubi_tuner.errors import DataError

Make = Callable[..., Path]
Entry = Callable[..., DatasetConfig]


def grey(path: Path, values: Any, dtype: type = np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=dtype)).save(path)
    return path


# Sources


def test_product_is_what_is_further_than_30_from_the_colour_of_the_corners() -> None:
    pixels = np.full((400, 300, 3), 100, dtype=np.uint8)
    pixels[200, 150] = (130, 100, 100)  # exactly 30 away
    pixels[201, 150] = (131, 100, 100)
    pixels[202, 150] = (118, 118, 118)  # 31.2 away, though no channel is 30 away
    expected = np.zeros((400, 300), dtype=bool)
    expected[201, 150] = expected[202, 150] = True
    assert np.array_equal(product_mask(Image.fromarray(pixels)), expected)


def test_background_is_the_median_of_four_squares_of_100_pixels_and_of_nothing_between_them() -> None:
    pixels = np.full((300, 400, 3), 255, dtype=np.uint8)
    for rows in (slice(None, 100), slice(-100, None)):
        for columns in (slice(None, 100), slice(-100, None)):
            pixels[rows, columns] = 10
    pixels[:100, :100] = 200  # one corner of four is another colour
    mask = product_mask(Image.fromarray(pixels))
    assert not mask[-1, -1]
    assert mask[0, 0]
    assert mask[150, 200]


def test_median_between_two_colours_is_cut_to_a_whole_number() -> None:
    pixels = np.zeros((200, 200, 3), dtype=np.uint8)
    pixels[:100], pixels[100:] = (0, 0, 1), (0, 0, 62)  # the median is 31.5: cut to 31, the halves are 30 and 31 away
    mask = product_mask(Image.fromarray(pixels))
    assert not mask[:100].any()
    assert mask[100:].all()


def test_grey_body_rendering_is_foreground_above_20() -> None:
    assert smpl_mask(Image.fromarray(np.array([[0, 20, 21, 255]], dtype=np.uint8))).tolist() == [
        [False, False, True, True]
    ]


def test_coloured_body_rendering_is_background_where_green_leads_both_by_more_than_20() -> None:
    row = [(0, 255, 0), (10, 30, 9), (10, 31, 10), (10, 31, 11), (240, 255, 240), (0, 0, 0)]
    mask = smpl_mask(Image.fromarray(np.array([row], dtype=np.uint8)))
    assert mask.tolist() == [[False, True, False, True, True, True]]


def test_file_is_grey_or_the_red_channel(tmp_path: Path) -> None:
    values = np.array([[0, 100], [200, 255]])
    path = grey(tmp_path / "grey.png", values)
    assert np.array_equal(np.asarray(read_mask(Mask("file", path), tmp_path / "none.png")), values)
    coloured = np.stack((values, 255 - values, values * 0), axis=-1)
    path = grey(tmp_path / "coloured.png", coloured)
    assert np.array_equal(np.asarray(read_mask(Mask("file", path), tmp_path / "none.png")), values)


@pytest.mark.parametrize("source", ["file", "smpl"])
def test_transparent_parts_of_a_mask_file_are_background(tmp_path: Path, masked: Entry, source: Any) -> None:
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[..., 0], pixels[:32, :, 3], pixels[32:48, :, 3] = 255, 255, 128
    path = grey(tmp_path / "masks" / "a.png", pixels)
    mask = sources(masked(mask_source=source))["a"]
    assert mask == Mask(source, path, alpha=True)
    assert np.asarray(read_mask(mask, path))[::16, 0].tolist() == [255, 255, 128, 0]


def test_grey_and_coloured_body_renderings_are_told_apart_by_their_files(tmp_path: Path) -> None:
    dark = grey(tmp_path / "grey.png", [[10]])
    same = grey(tmp_path / "coloured.png", [[[10, 10, 10]]])
    found = [np.asarray(read_mask(Mask("smpl", path), path)).tolist() for path in (dark, same)]
    assert found == [[[0]], [[255]]]


def test_alpha_is_turned_upright_with_its_image(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 4), dtype=np.uint8)
    pixels[..., 3] = [[0, 50, 100], [150, 200, 250]]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    mask = np.asarray(read_mask(Mask("alpha"), tmp_path / "a.png"))
    assert np.array_equal(mask, np.rot90(pixels[..., 3], -1))


@pytest.mark.parametrize(("mode", "expected"), [("RGBA", True), ("LA", True), ("RGB", False), ("L", False)])
def test_alpha_is_seen_in_the_header(tmp_path: Path, mode: str, expected: bool) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "a.png")
    assert read_picture_header(tmp_path / "a.png").alpha == expected


def test_transparent_colour_counts_as_alpha(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    assert read_picture_header(tmp_path / "a.png").alpha
    assert np.asarray(read_mask(Mask("alpha"), tmp_path / "a.png")).tolist() == [[255, 0]]


# Latent grid


def test_latent_mask_is_the_mean_of_the_pixels_of_a_cell() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48), dtype=np.uint8)
    found = to_latent(Image.fromarray(pixels), place((48, 32), (48, 32)), 8)
    assert found.dtype == np.float32
    expected = [[pixels[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean() / 255 for x in range(6)] for y in range(4)]
    assert np.abs(found - expected).max() <= 1e-6


def test_mask_takes_the_resize_and_crop_of_its_image() -> None:
    # 96 x 32 into 32 x 32: the middle third remains.
    pixels = np.zeros((32, 96), dtype=np.uint8)
    pixels[:, 32:48] = 255
    found = to_latent(Image.fromarray(pixels), place((96, 32), (32, 32)), 8)
    assert found.tolist() == [[1, 1, 0, 0]] * 4
    # Half the size: one latent cell is 16 pixels, half of them white.
    pixels = np.zeros((64, 64), dtype=np.uint8)
    pixels[:, 8:16] = 255
    assert to_latent(Image.fromarray(pixels), place((64, 64), (32, 32)), 8)[0].tolist() == [0.5, 0, 0, 0]


# Datasets


@pytest.fixture
def masked(tmp_path: Path, picture: Make, dataset: Entry) -> Entry:
    """Pictures a, b, c of 64 x 64, and a mask folder that a test fills."""
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png")
    (tmp_path / "masks").mkdir()

    def make(**changes: Any) -> DatasetConfig:
        return dataset(**({"mask_source": "file", "mask_directory": tmp_path / "masks"} | changes))

    return make


def sources(*datasets: DatasetConfig) -> dict[str, Mask | None]:
    return {item.id: item.mask for item in scan(datasets, "tf").items}


def test_mask_of_an_image_has_its_stem_and_any_extension(tmp_path: Path, masked: Entry) -> None:
    a = grey(tmp_path / "masks" / "a.png", np.zeros((64, 64)))
    b = grey(tmp_path / "masks" / "b.webp", np.zeros((64, 64)))
    assert sources(masked()) == {"a": Mask("file", a), "b": Mask("file", b), "c": None}


def test_masks_of_sub_folders_mirror_the_images(tmp_path: Path, picture: Make, masked: Entry) -> None:
    picture(tmp_path / "images" / "sub" / "a.png")
    path = grey(tmp_path / "masks" / "sub" / "a.png", np.zeros((64, 64)))
    assert sources(masked(recursive=True))["sub/a"] == Mask("file", path)
    assert sources(masked(recursive=True))["a"] is None


def test_mask_folder_below_the_images_holds_no_images(tmp_path: Path, masked: Entry) -> None:
    path = grey(tmp_path / "images" / "masks" / "a.png", np.zeros((64, 64)))
    found = sources(masked(recursive=True, mask_directory=tmp_path / "images" / "masks"))
    assert found == {"a": Mask("file", path), "b": None, "c": None}


def test_masks_without_an_image_are_counted(tmp_path: Path, masked: Entry) -> None:
    for name in ("a", "d"):
        grey(tmp_path / "masks" / f"{name}.png", np.zeros((64, 64)))
    assert scan([masked()], "tf").notes == [f"datasets[0]: 1 files in {tmp_path / 'masks'} belong to no image (d.png)"]


@pytest.mark.parametrize("name", ["d/a_mask", "a-mask", "a.Mask", "mask_a", "a_matte", "a_segmentation"])
def test_a_mask_whose_name_says_more_than_the_image_gets_a_hint(name: str) -> None:
    plain = "d/a" if "/" in name else "a"
    assert belonging(["other", name], ["a", "d/a"]) == f"{name} would be {plain}"
    assert belonging([name], ["b", "d/b"]) == belonging(["other"], ["other"]) == ""


def test_masks_that_belong_to_no_image_say_which_name_they_need(tmp_path: Path, masked: Entry) -> None:
    grey(tmp_path / "masks" / "b_mask.png", np.zeros((64, 64)))
    (note,) = scan([masked()], "tf").notes
    assert "b_mask would be b" in note
    (tmp_path / "masks" / "a.psd").touch()
    assert any("masks: 1 image is left out" in note and ".psd" in note for note in scan([masked()], "tf").notes)


def test_mask_of_another_size_and_two_masks_of_one_image_are_refused(tmp_path: Path, masked: Entry) -> None:
    small = grey(tmp_path / "masks" / "a.png", np.zeros((32, 64)))
    first, second = (grey(tmp_path / "masks" / f"b.{end}", np.zeros((64, 64))) for end in ("bmp", "png"))
    with pytest.raises(DataError) as caught:
        scan([masked()], "tf")
    image = tmp_path / "images" / "a.png"
    assert str(caught.value).splitlines()[1:] == [
        f"  {first} and {second} are masks of the same image; keep one",
        f"  {small}: is 64x32, its image {image} is 64x64; save the mask at the size of the image",
    ]


def test_images_without_alpha_have_no_mask(tmp_path: Path, dataset: Entry, picture: Make) -> None:
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "images" / "b.png")
    Image.new("RGBA", (64, 64)).save(tmp_path / "images" / "b.png")
    assert sources(dataset(mask_source="alpha")) == {"a": None, "b": Mask("alpha")}


def test_product_masks_need_no_files(masked: Entry) -> None:
    assert set(sources(masked(mask_source="product", mask_directory=None)).values()) == {Mask("product")}


def listing(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_lines_name_their_mask(tmp_path: Path, masked: Entry) -> None:
    path = grey(tmp_path / "masks" / "x.png", np.zeros((64, 64)))
    rows = listing(
        tmp_path,
        {"image_path": "images/a.png", "caption": "a", "mask_path": "masks/x.png"},
        {"image_path": "images/b.png", "caption": "b"},
        {"image_path": "images/c.png", "caption": "c", "mask_path": None},
    )
    found = sources(masked(image_jsonl_file=rows, image_directory=None, mask_directory=None))
    assert found == {"a": Mask("file", path), "b": None, "c": None}


def test_wrong_masks_of_lines_are_reported_together(tmp_path: Path, masked: Entry) -> None:
    rows = listing(
        tmp_path,
        {"image_path": "images/a.png", "caption": "a", "mask_path": "masks/no.png"},
        {"image_path": "images/b.png", "caption": "b", "mask_path": 3},
    )
    with pytest.raises(DataError) as caught:
        scan([masked(image_jsonl_file=rows, image_directory=None, mask_directory=None)], "tf")
    assert str(caught.value).splitlines()[1:] == [
        f"  {rows} line 1: mask masks/no.png: no such file",
        f"  {rows} line 2: mask_path is 3, expected a text",
    ]


def test_mask_of_a_line_that_is_not_read_is_refused(tmp_path: Path, masked: Entry) -> None:
    grey(tmp_path / "masks" / "x.png", np.zeros((64, 64)))
    rows = listing(tmp_path, {"image_path": "images/a.png", "caption": "a", "mask_path": "masks/x.png"})
    entry = masked(image_jsonl_file=rows, image_directory=None, mask_directory=None, mask_source="product")
    with pytest.raises(DataError, match='has a mask_path, but mask_source is "product", which reads no mask files'):
        scan([entry], "tf")


# The plan


@pytest.mark.parametrize(
    ("masked_loss", "masks", "expected"),
    [
        (False, 0, []),
        (True, 0, ["warning: train.masked_loss is on, 0 of 3 images have a mask; give mask_directory, mask_path or "
                   "alpha_mask, or turn it off"]),
        (False, 2, ["warning: 2 of 3 images have a mask, which is not used because train.masked_loss is false"]),
        (True, 2, ["  masks    2 of 3 images, weights 0.5 to 2, divided by their mean; the others have weight 1"]),
    ],
)  # fmt: skip
def test_plan_says_when_masks_and_the_loss_do_not_agree(masked_loss: bool, masks: int, expected: list[str]) -> None:
    train = SimpleNamespace(masked_loss=masked_loss, mask_foreground=2.0, mask_background=0.5, mask_normalize=True)
    items: Any = [SimpleNamespace(mask=Mask("product") if index < masks else None) for index in range(3)]
    config: Any = SimpleNamespace(train=train)
    assert mask_lines(config, items) == expected


def test_black_masks_are_named_with_what_follows() -> None:
    def lines(background: float, *masks: Mask) -> str:
        config: Any = SimpleNamespace(train=SimpleNamespace(mask_background=background))
        items: Any = [SimpleNamespace(mask=mask, path=Path(f"{n}.png")) for n, mask in enumerate(masks)]
        return "".join(black_lines(config, items))

    assert lines(0.0) == ""
    assert "masks of 2 images are black all over (0.png, 1.png): nothing" in lines(0.0, Mask("product"), Mask("alpha"))
    assert "0.5 everywhere" in lines(0.5, Mask("product"))
    assert "paint must be white" in lines(0.0, Mask("file", Path("m.png"), alpha=True))
