"""Captions: several of one image, files with one line per image, and transforms."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.config.captions import CaptionSettings
from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.captions import imagenet_caption, make_transform
from musubi_tuner.data.sources import scan
from musubi_tuner.errors import DataError

Make = Callable[..., Path]
Entry = Callable[..., DatasetConfig]


def captions(*datasets: DatasetConfig) -> dict[str, tuple[str, ...]]:
    return {item.id: item.captions for item in scan(datasets, "tf").items}


def problems(*datasets: DatasetConfig) -> list[str]:
    with pytest.raises(DataError) as caught:
        scan(datasets, "tf")
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.fixture
def listing(tmp_path: Path, picture: Make, dataset: Entry) -> Callable[..., DatasetConfig]:
    """A dataset of JSONL lines; each line gets a picture a, b, c, ... of its own."""

    def make(*rows: dict[str, Any], **changes: Any) -> DatasetConfig:
        lines = []
        for name, row in zip("abcdefghij", rows, strict=False):
            picture(tmp_path / "images" / f"{name}.png", caption=None)
            lines.append(json.dumps({"image_path": f"images/{name}.png", **row}))
        path = tmp_path / "list.jsonl"
        path.write_text("\n".join(lines))
        return dataset(**({"image_jsonl_file": path} | changes))

    return make


# Several captions of one image


COLUMNS = {"caption_columns": ("florence", "llava", "blip")}


def test_columns_give_the_captions_in_their_order_without_empty_ones(listing: Entry) -> None:
    entry = listing(
        {"florence": " one ", "llava": "two", "blip": "three"},
        {"blip": "last", "florence": "  ", "llava": None},
        {"llava": "middle", "caption": "not asked for"},
        **COLUMNS,
    )
    assert captions(entry) == {"a": ("one", "two", "three"), "b": ("last",), "c": ("middle",)}


def test_a_line_whose_columns_are_all_empty_has_no_caption(listing: Entry) -> None:
    rows: list[dict[str, Any]] = [{"florence": "", "llava": None}, {"florence": "x"}]
    (problem,) = problems(listing(*rows, **COLUMNS))
    assert problem.endswith(
        'line 1: florence and llava and blip is missing; write it, or set missing_caption = "skip", "empty" or "stem"'
    )
    assert captions(listing(*rows, **COLUMNS, missing_caption="empty")) == {"a": ("",), "b": ("x",)}
    assert captions(listing(*rows, **COLUMNS, missing_caption="skip")) == {"b": ("x",)}


def test_a_column_of_another_type_is_named(listing: Entry) -> None:
    (problem,) = problems(listing({"florence": "x", "llava": 3}, **COLUMNS))
    assert problem.endswith("line 1: llava is 3, expected a text")


# Files with one line per image


def lines(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "images" / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("end", "words", "said"),
    [("", "", "empty captions"), ("\n", "", "empty captions"), ("", "cat", "class_tokens, 'cat'")],
)
def test_lines_are_captions_of_the_images_sorted_by_name_and_blank_ones_stay(
    tmp_path: Path, picture: Make, dataset: Entry, end: str, words: str, said: str
) -> None:
    """Empty, or the words for images without a caption."""
    for name in "bca":
        picture(tmp_path / "images" / f"{name}.png", caption=None)
    path = lines(tmp_path, f"first\n\n third {end}")
    entry = dataset(text=CaptionSettings(class_tokens=words))
    assert captions(entry) == {"a": ("first",), "b": (words,), "c": ("third",)}
    assert scan([entry], "tf").notes == [f"datasets[0]: captions are the lines of {path}; 1 of them are blank: {said}"]


@pytest.mark.parametrize(("text", "count"), [("one\ntwo", 2), ("one\ntwo\nthree\n\n", 4), ("", 0)])
def test_another_number_of_lines_is_refused(
    tmp_path: Path, picture: Make, dataset: Entry, text: str, count: int
) -> None:
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png", caption=None)
    path = lines(tmp_path, text)
    assert problems(dataset()) == [
        f"{path}: has {count} lines for 3 images; write one line per image, sorted by name (a blank line is an empty "
        "caption), or rename the file"
    ]


def test_lines_of_a_folder_do_not_list_its_sub_folders(tmp_path: Path, picture: Make, dataset: Entry) -> None:
    picture(tmp_path / "images" / "a.png", caption=None)
    path = lines(tmp_path, "one")
    assert problems(dataset(recursive=True)) == [
        f"{path}: lists the captions of one folder, but recursive is true; rename the file, or set recursive = false"
    ]


@pytest.mark.parametrize("text", ["one\ntwo\nthree", "one"], ids=["as many lines as images", "another number"])
@pytest.mark.parametrize("own", [("a.txt", "b.txt", "c.txt"), ("b.txt",), ("b.TXT",), ("b.caption",)], ids=str)
def test_lines_beside_captions_of_their_own_are_refused(
    tmp_path: Path, picture: Make, dataset: Entry, text: str, own: tuple[str, ...]
) -> None:
    """Such a file is more often a list of prompts for drawing; taking either side would train other captions unseen."""
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png", caption=None)
    for name in own:
        (tmp_path / "images" / name).write_text("its own")
    path = lines(tmp_path, text)
    for recursive in (False, True):
        (problem,) = problems(dataset(recursive=recursive, missing_caption="skip"))
        assert (
            problem.startswith(f"{path}: ")
            and f"{len(own)} of 3 images have a caption file of their own ({own[0]}" in problem
        )
        assert "keep one: rename" in problem and "rename prompts.txt" in problem


def test_other_files_beside_images_do_not_stand_against_lines(tmp_path: Path, picture: Make, dataset: Entry) -> None:
    picture(tmp_path / "images" / "a.png", caption=None)
    (tmp_path / "images" / "a.json").write_text("{}")
    (tmp_path / "images" / "a.safetensors").write_bytes(bytes(64))
    (tmp_path / "images" / "notes.md").write_text("of all")
    lines(tmp_path, "one")
    assert captions(dataset()) == {"a": ("one",)}


def test_a_picture_called_prompts_keeps_its_caption(tmp_path: Path, picture: Make, dataset: Entry) -> None:
    picture(tmp_path / "images" / "a.png", caption="first")
    picture(tmp_path / "images" / "prompts.png", caption="one\ntwo\nthree")
    assert captions(dataset()) == {"a": ("first",), "prompts": ("one\ntwo\nthree",)}


# Object relations


def test_prefixes_come_from_one_generator_over_the_order_of_the_lines(listing: Entry) -> None:
    names = "abcdefghij"
    entry = listing(*({"caption": f"c{name}"} for name in names), caption_transform="object_relations")
    draws = random.Random(42)
    expected = {name: (("subject, object, " if draws.random() < 0.5 else "subject, ") + f"c{name}",) for name in names}
    assert captions(entry) == expected
    assert captions(entry) == expected
    assert len({text.replace(f"c{name}", "") for name, (text,) in expected.items()}) == 2


def test_all_captions_of_an_image_get_the_same_prefix_and_a_skipped_line_keeps_its_draw(listing: Entry) -> None:
    rows: list[dict[str, Any]] = [{"florence": "x", "llava": "y"} for _ in range(8)]
    plain = captions(listing(*rows, **COLUMNS, caption_transform="object_relations"))
    assert all(first.removesuffix("x") == second.removesuffix("y") for first, second in plain.values())
    rows[0] = {"florence": ""}
    skipped = captions(listing(*rows, **COLUMNS, caption_transform="object_relations", missing_caption="skip"))
    assert skipped == {name: both for name, both in plain.items() if name != "a"}


# ImageNet

ROW = {
    "semantic_class": "animal",
    "semantic_subclass": "dog",
    "label": "golden_retriever",
    "synset_id": "n02099601",
    "pred_confidence": 0.9,
    "top1_correct": False,
    "top5_correct": True,
}
FULL = "subject, animal, dog, golden retriever, a photo, n02099601, imagenet"
WITHOUT_LABEL = "subject, animal, dog, a photo, n02099601, imagenet"


@pytest.mark.parametrize(
    ("confidence", "top1", "top5", "expected"),
    [
        (0.9, True, True, FULL),
        (0.9, False, True, FULL),
        (0.9, True, False, FULL),
        (0.9, False, False, WITHOUT_LABEL),
        (0.5, False, False, WITHOUT_LABEL),
        (0.49, False, False, FULL),
        (1, False, False, WITHOUT_LABEL),
    ],
)
def test_the_label_is_left_out_where_the_prediction_is_confident_and_wrong(
    confidence: float, top1: bool, top5: bool, expected: str
) -> None:
    row = {**ROW, "pred_confidence": confidence, "top1_correct": top1, "top5_correct": top5}
    assert imagenet_caption("a photo", row) == expected


def test_missing_columns_are_empty_and_the_class_is_then_object() -> None:
    assert imagenet_caption("", {}) == "subject, object, imagenet"
    assert imagenet_caption("a photo", {"label": "cat", "synset_id": None}) == "subject, object, cat, a photo, imagenet"
    assert imagenet_caption("", {"label": "cat", "pred_confidence": 0.5}) == "subject, object, imagenet"


def test_lines_of_imagenet_need_no_caption(listing: Entry) -> None:
    entry = listing({**ROW, "caption": "a photo"}, {"label": "sea_lion"}, caption_transform="imagenet")
    assert captions(entry) == {"a": (FULL,), "b": ("subject, object, sea lion, imagenet",)}


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [("label", 3, "a text"), ("pred_confidence", "0.9", "a number"), ("pred_confidence", True, "a number"),
     ("top1_correct", 1, "true or false")],
)  # fmt: skip
def test_a_column_of_imagenet_of_another_type_is_named(listing: Entry, column: str, value: Any, words: str) -> None:
    (problem,) = problems(listing({**ROW, column: value}, caption_transform="imagenet"))
    assert problem.endswith(f"line 1: {column} is {value!r}, expected {words}")


# A person's function


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_captions.py").write_text(
        "def tagged(caption, columns):\n    return caption + ' by ' + columns['artist']\n"
        "def number(caption, columns):\n    return 3\n"
        "def nothing(caption, columns):\n    return ''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("module")
def test_a_function_sees_each_caption_and_the_columns_of_its_line(listing: Entry) -> None:
    entry = listing(
        {"florence": "x", "llava": "y", "artist": "Ann"}, **COLUMNS, caption_transform="own_captions:tagged"
    )
    assert captions(entry) == {"a": ("x by Ann", "y by Ann")}
    assert captions(listing({"caption": "x"}, caption_transform="own_captions:nothing")) == {"a": ("",)}


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tagged", "failed (KeyError: 'artist')"),
        ("number", "returned 3, expected a text"),
    ],
)
def test_a_function_that_fails_is_named_with_its_line(listing: Entry, name: str, message: str) -> None:
    (problem,) = problems(listing({"caption": "x"}, caption_transform=f"own_captions:{name}"))
    assert problem.endswith(f"line 1: caption_transform: own_captions:{name} {message}")


def test_a_module_beside_the_run_file_is_found_and_may_import_another(listing: Entry, tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / f"project{number}"
        folder.mkdir()
        (folder / "helper_of_mine.py").write_text("def loud(text): return text.upper()\n")
        (folder / "mine.py").write_text(
            f"from helper_of_mine import loud\ndef f(caption, columns): return loud(caption) + '{number}'\n"
        )
        entry = replace(listing({"caption": "x"}, caption_transform="mine:f"), beside=folder)
        assert captions(entry) == {"a": (f"X{number}",)}


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such_function"])
def test_a_function_that_is_not_there_is_reported_once(listing: Entry, name: str) -> None:
    (problem,) = problems(listing({"caption": "x"}, {"caption": "y"}, caption_transform=name))
    assert problem.startswith(f"datasets[0].caption_transform: {name} cannot be imported (")


def test_without_a_transform_captions_stay(listing: Entry) -> None:
    assert make_transform(None)(["x"], {}) == ["x"]
