"""What the plan says of pictures that are trained otherwise than they look."""

from pathlib import Path
from typing import Any

from musubi_tuner.data.buckets import place, squash
from musubi_tuner.data.item import Item
from musubi_tuner.data.masks import Mask
from musubi_tuner.data.remarks import picture_lines


def item(size: tuple[int, int], bucket: tuple[int, int] = (256, 256), put: Any = place, **more: Any) -> Item:
    name = f"{size[0]}x{size[1]}"
    return Item(name, f"0:{name}", Path(f"{name}.png"), "", Path("cache"), size, put(size, bucket), 1, 1, **more)


def test_usual_pictures_need_no_word() -> None:
    # Half of the area and twice the sides are still usual.
    assert picture_lines([item((256, 256)), item((512, 256)), item((128, 128)), item((9000, 9000))], 2) == []


def test_crops_of_more_than_half_are_counted_and_the_worst_come_first() -> None:
    items = [item((256, 256)), item((520, 256)), item((100, 1200), (128, 512)), item((2560, 256)), item((256, 1280))]
    (line,) = picture_lines(items, 2)
    assert line.startswith("warning: 4 of 5 images lose more than half")
    assert "(2560x256.png keeps 10%, 256x1280.png keeps 20%, 100x1200.png keeps 33%, ...)" in line
    assert 'resize = "squash"' in line
    assert picture_lines([item((2560, 256), put=squash)], 2) == []


def test_enlargements_of_more_than_twice_are_counted() -> None:
    (line,) = picture_lines([item((256, 256)), item((16, 16)), item((100, 100))], 2)
    assert line.startswith("warning: 2 of 3 images are enlarged more than 2 times (16x16.png 16.0x, 100x100.png 2.6x)")
    (line,) = picture_lines([item((16, 256), put=squash)], 2)
    assert "16.0x" in line


def test_transparency_is_counted_by_colour() -> None:
    items = [item((256, 256), background=colour) for colour in ("#ffffff", "#ffffff", "#000000", "kept")]
    lines = picture_lines(items, 2)
    assert [line.split("; ")[1] for line in lines] == [
        "transparent pixels become #000000 (alpha_background)", "transparent pixels become #ffffff (alpha_background)",
    ]  # fmt: skip
    assert "1 of 4 images" in lines[0] and "2 of 4 images" in lines[1]


def test_alpha_that_is_the_mask_is_said_to_leave_colours_alone() -> None:
    (line,) = picture_lines([item((256, 256), mask=Mask("alpha")), item((256, 256))], 2)
    assert "1 of 2 images" in line and "keep the colours" in line


def test_memory_of_very_large_pictures_is_told() -> None:
    (line,) = picture_lines([item((15000, 13000), (256, 224)), item((256, 256))], 2)
    assert "15000x13000.png 195 MP" in line and "2.2 GiB" in line
