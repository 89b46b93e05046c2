"""Which images are held out: a picture by its own draw, so that a data set may grow, reorder, repeat and hold copies."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from musubi_tuner.config.schema.validation import ValidationSection
from musubi_tuner.data.buckets import place
from musubi_tuner.data.item import Item
from musubi_tuner.data.split import PART_BYTES, PARTS, content_key, hold_out, hold_out_by_id
from musubi_tuner.errors import ConfigError, DataError

Make = Callable[..., list[Item]]


def item(path: Path, dataset: int = 0, repeats: int = 1, name: str | None = None) -> Item:
    own = name or path.stem
    placement = place((64, 64), (64, 64))
    return Item(own, f"{dataset}:{own}", path, "text", Path("cache"), (64, 64), placement, repeats, 2)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Items of files that hold their names."""

    def write(names: Sequence[str], dataset: int = 0, repeats: int = 1) -> list[Item]:
        for name in names:
            (tmp_path / f"{name}.png").write_text(name)
        return [item(tmp_path / f"{name}.png", dataset, repeats) for name in names]

    return write


def names(count: int) -> list[str]:
    return [f"image {number}" for number in range(count)]


def split(items: list[Item], share: float = 0.2, seed: int = 42) -> tuple[list[str], list[str]]:
    kept, held = hold_out(items, ValidationSection(split=share, seed=seed))
    return [item.id for item in kept], [item.id for item in held]


def test_without_a_share_everything_is_trained_and_no_file_is_read() -> None:
    assert split([item(Path("nowhere.png"))], share=0.0) == (["nowhere"], [])


def test_every_image_is_on_one_side_and_the_trained_ones_keep_their_order(make: Make) -> None:
    kept, held = split(make(names(200)))
    assert sorted(kept + held) == sorted(names(200))
    assert kept == [name for name in names(200) if name not in held]
    assert 25 <= len(held) <= 55  # 40 expected, standard deviation 5.7


def test_a_data_set_that_grows_keeps_its_members_on_their_side(make: Make) -> None:
    _, before = split(make(names(100)))
    _, after = split(make(names(300)))
    assert set(after) & set(names(100)) == set(before)
    assert set(after) > set(before)


def test_the_choice_depends_neither_on_order_nor_on_repeats_nor_on_names(make: Make, tmp_path: Path) -> None:
    items = make(names(50))
    _, held = split(items)
    assert split(make(names(50)[::-1]))[1] == held
    assert split(make(names(50), repeats=7))[1] == held
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    renamed = [item(shutil.copy(old.path, moved / f"{number:03d}.png")) for number, old in enumerate(items[::-1])]
    assert split(renamed)[1] == [f"{49 - names(50).index(name):03d}" for name in held]


def test_another_seed_holds_out_other_images(make: Make) -> None:
    items = make(names(100))
    assert set(split(items)[1]) != set(split(items, seed=1)[1])


@pytest.mark.parametrize("copied", ["the same path", "copy", "symbolic link", "hard link"])
def test_a_picture_is_on_one_side_in_all_data_sets(make: Make, tmp_path: Path, copied: str) -> None:
    """Under other names and in another order; copies that come later move nothing."""
    items = make(names(60))
    _, before = split(items)
    (tmp_path / "more").mkdir()
    again = []
    for number, first in enumerate(items[::-1]):
        path = tmp_path / "more" / f"z{number}.png"
        match copied:
            case "the same path":
                path = first.path
            case "copy":
                shutil.copy(first.path, path)
            case "symbolic link":
                path.symlink_to(first.path)
            case "hard link":
                os.link(first.path, path)
        again.append(item(path, dataset=1, name=f"z{number}"))
    kept, held = hold_out([*again, *items], ValidationSection(split=0.2))
    assert {one.path.read_text() for one in held} == set(before)
    assert not {one.path.read_text() for one in held} & {one.path.read_text() for one in kept}
    assert len(held) == 2 * len(before) and len(kept) + len(held) == 120
    assert [one.id for one in held if one.dataset == 0] == before
    by_id = hold_out_by_id([*again, *items], ValidationSection(split=0.2))
    assert {one.path.read_text() for one in by_id[0]} & {one.path.read_text() for one in by_id[1]}, "proves nothing"


def test_copies_of_a_picture_count_once(make: Make, tmp_path: Path) -> None:
    """Many copies of one picture make neither side larger than its share of pictures."""
    items = make(["a", "b", "c", "d"])
    copies = [item(shutil.copy(items[0].path, tmp_path / f"copy {number}.png")) for number in range(50)]
    kept, held = hold_out([*items, *copies], ValidationSection(split=0.5))
    sides = [{one.path.read_text() for one in side} for side in (kept, held)]
    assert sides[0] | sides[1] == set("abcd") and not sides[0] & sides[1]


@pytest.mark.parametrize("size", [0, 2, PART_BYTES, PARTS * PART_BYTES - 1, 10 * PARTS * PART_BYTES])
def test_the_key_of_a_file_is_that_of_its_copies_only(tmp_path: Path, size: int) -> None:
    content = bytes(number % 251 for number in range(size))
    paths = [tmp_path / name for name in ("a", "copy of it", "longer", "first", "last")]
    changed = [content, content, content + b"\0"]
    if size:
        changed += [bytes([content[0] ^ 1]) + content[1:], content[:-1] + bytes([content[-1] ^ 1])]
    for path, text in zip(paths, changed, strict=False):
        path.write_bytes(text)
    first, copy, *others = [content_key(path) for path in paths[: len(changed)]]
    assert first == copy
    assert len({first, *others}) == 1 + len(others)


def test_small_files_are_compared_whole(tmp_path: Path) -> None:
    size = PARTS * PART_BYTES
    for number in range(0, size, size // 64):
        content = bytearray(size)
        content[number] = 1
        (tmp_path / str(number)).write_bytes(content)
    assert len({content_key(path) for path in tmp_path.iterdir()}) == 64


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: cannot be read \(No such file"):
        split([item(tmp_path / "gone.png")])


@pytest.mark.parametrize("share", [0.001, 0.5])
@pytest.mark.parametrize("seed", range(8))
def test_each_side_has_an_image_however_few_there_are(make: Make, share: float, seed: int) -> None:
    for count in (2, 3):
        kept, held = split(make(names(count)), share, seed)
        assert kept and held and len(kept) + len(held) == count


def test_the_first_images_held_out_stay_the_first_when_the_share_grows(make: Make) -> None:
    items = make(names(100))
    few, many = (split(items, share)[1] for share in (0.1, 0.3))
    assert many[: len(few)] == few


def test_one_image_cannot_be_split(make: Make, tmp_path: Path) -> None:
    alone = make(["alone"])
    with pytest.raises(ConfigError, match=r"validation\.split: is 0\.2, but there are only 1 images; set it to 0"):
        split(alone)
    with pytest.raises(ConfigError, match=r"only 1 images \(2 files of equal content\); set it to 0"):
        split([*alone, item(shutil.copy(alone[0].path, tmp_path / "again.png"))])
