"""A list of captions: picture, tab, caption."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.sources import scan
from musubi_tuner.errors import DataError

Make = Callable[..., Path]
Entry = Callable[..., DatasetConfig]


@pytest.fixture
def listed(tmp_path: Path, picture: Make, dataset: Entry) -> Callable[..., DatasetConfig]:
    """Images a, b and c, and a list with some lines."""
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png", caption=None)

    def make(*lines: str, **changes: object) -> DatasetConfig:
        path = tmp_path / "captions.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        return replace(dataset(**changes), captions_file=path)

    return make


def test_the_first_tab_divides_and_other_lines_are_skipped(listed: Callable[..., DatasetConfig]) -> None:
    found = scan(
        [listed("# a list", "a.png\ta cat\twith a tab", "", "b.png\t a dog ", "c.png\tc", "gone.png\tx")], "tf"
    )
    assert {item.id: item.caption for item in found.items} == {"a": "a cat\twith a tab", "b": "a dog", "c": "c"}
    assert any("1 pictures of" in note and "gone.png" in note for note in found.notes)


def test_what_is_wrong_is_counted_and_named(listed: Callable[..., DatasetConfig]) -> None:
    with pytest.raises(DataError) as caught:
        scan([listed("a.png a cat", "b.png\tb", "b.png\tagain")], "tf")
    text = str(caught.value)
    assert "1 lines have no tab between picture and caption (line 1)" in text
    assert "1 pictures have two captions (b.png)" in text
    assert "2 of 3 images" in text and "a.png, c.png" in text


def test_missing_ones_follow_the_setting(listed: Callable[..., DatasetConfig]) -> None:
    found = scan([listed("a.png\ta", missing_caption="stem")], "tf")
    assert {item.id: item.caption for item in found.items} == {"a": "a", "b": "b", "c": "c"}
