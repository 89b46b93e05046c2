"""Which images are held out: by their own draw, so that a data set may grow, reorder and repeat."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from musubi_tuner.config.schema import ValidationSection
from musubi_tuner.data.buckets import place
from musubi_tuner.data.sources import Item
from musubi_tuner.data.split import hold_out
from musubi_tuner.errors import ConfigError


def make(names: Sequence[str], dataset: int = 0, repeats: int = 1) -> list[Item]:
    placement = place((64, 64), (64, 64))
    return [
        Item(name, f"{dataset}:{name}", Path(f"{name}.png"), "text", Path("cache"), (64, 64), placement, repeats, 2)
        for name in names
    ]


def names(count: int) -> list[str]:
    return [f"image {number}" for number in range(count)]


def split(items: list[Item], share: float = 0.2, seed: int = 42) -> tuple[list[str], list[str]]:
    kept, held = hold_out(items, ValidationSection(split=share, seed=seed))
    return [item.id for item in kept], [item.id for item in held]


def test_without_a_share_everything_is_trained() -> None:
    assert split(make(names(5)), share=0.0) == (names(5), [])


def test_every_image_is_on_one_side_and_the_trained_ones_keep_their_order() -> None:
    kept, held = split(make(names(200)))
    assert sorted(kept + held) == sorted(names(200))
    assert kept == [name for name in names(200) if name not in held]
    assert 25 <= len(held) <= 55  # 40 expected, standard deviation 5.7


def test_a_data_set_that_grows_keeps_its_members_on_their_side() -> None:
    _, before = split(make(names(100)))
    _, after = split(make(names(300)))
    assert set(after) & set(names(100)) == set(before)
    assert set(after) > set(before)


def test_the_choice_depends_neither_on_order_nor_on_repeats() -> None:
    _, held = split(make(names(50)))
    assert split(make(names(50)[::-1]))[1] == held
    assert split(make(names(50), repeats=7))[1] == held


def test_another_seed_holds_out_other_images() -> None:
    assert set(split(make(names(100)))[1]) != set(split(make(names(100)), seed=1)[1])


def test_an_image_that_is_trained_at_two_resolutions_is_held_out_at_both() -> None:
    items = make(names(30)) + make(names(30), dataset=1)
    kept, held = split(items)
    assert not set(kept) & set(held)
    assert len(held) == 2 * len(set(held))


@pytest.mark.parametrize("share", [0.001, 0.5])
@pytest.mark.parametrize("seed", range(8))
def test_each_side_has_an_image_however_few_there_are(share: float, seed: int) -> None:
    for count in (2, 3):
        kept, held = split(make(names(count)), share, seed)
        assert kept and held and len(kept) + len(held) == count


def test_the_first_images_held_out_stay_the_first_when_the_share_grows() -> None:
    few, many = (split(make(names(100)), share)[1] for share in (0.1, 0.3))
    assert many[: len(few)] == few


def test_one_image_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match=r"validation\.split: is 0\.2, but there are only 1 images; set it to 0"):
        split(make(["alone"]))
