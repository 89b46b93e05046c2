"""Items of caches without pictures: what is kept of a folder is what its files say, as long as nothing in it changes."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musubi_tuner.caching.index import open_items
from musubi_tuner.config.datasets import resolve_datasets
from musubi_tuner.data import item_table
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import ItemTable, items_of_caches, tally
from musubi_tuner.data.plan import PlanGroups, PlanItem, plan_epoch
from musubi_tuner.data.sources import scan
from musubi_tuner.errors import DataError
from musubi_tuner.training.identity import data_digest
from opened_files import opened_below

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))

from large_set import safetensors, write_caches

LATENTS = {"latents_1x2x2_float32": ("F32", [16, 2, 2], bytes(256))}
TEXT = {"t5_vec_bfloat16": ("BF16", [4, 16], bytes(128))}


@pytest.fixture
def keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is kept of small folders too."""
    monkeypatch.setattr(item_table, "LEAST_KEPT", 1)


def write(
    folder: Path, name: str, *, bucket: tuple[int, int] = (16, 16), captions: list[str] | None = None, **more: Any
) -> None:
    """The caches of an item; its id is that of the folder and the name."""
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, object] = {"item": more.pop("item", name), "bucket": list(bucket), "resized": list(bucket), "crop": [0, 0],
                               "image": {"sha256": f"hash of {name}"}, **more}  # fmt: skip
    said: dict[str, object] = {"item": name, "caption": (captions or [name])[0], "captions": captions}
    (folder / f"{name}_0016x0016_tf.safetensors").write_bytes(safetensors(LATENTS, made))
    (folder / f"{name}_tf_te.safetensors").write_bytes(safetensors(TEXT, said))


@pytest.fixture
def caches(tmp_path: Path) -> Path:
    """Items of all sorts, in two folders."""
    root = tmp_path / "caches"
    write(root, "b", captions=["one", "", "three"])
    write(root, "a", bucket=(32, 16), mask="alpha", mask_alpha=True, background="#808080")
    write(root / "sub", "c", item="sub/c", views=[[0, 0, True, 0.0, 1.0], [1, 0, False, 0.1, 0.95]])
    write(root / "sub", "dé", item="else", squashed=True, interpolation="nearest", provenance="imported")
    (root / "sub" / "c_tf_experts.safetensors").write_bytes(safetensors(TEXT, {"precision": "float32"}))
    (root / "spare_tf_te.safetensors").write_bytes(safetensors(TEXT, {}))
    return root


def kept(root: Path) -> Path:
    return root / ".table" / "tf.npz"


def load(root: Path) -> ItemTable:
    problems: list[str] = []
    table = items_of_caches(root, "tf", problems, keeps=True).of(3, 2, 4)
    assert problems == []
    return table


def test_what_is_kept_is_what_the_files_say(caches: Path, keeps_all: None) -> None:
    first, second = load(caches), load(caches)
    assert (
        kept(caches).is_file()
        and list(second) == list(first)
        and second.spare == first.spare == ["./spare_tf_te.safetensors"]
    )
    a, b, other, c = second
    assert [item.id for item in (a, b, other, c)] == ["a", "b", "else", "sub/c"]
    assert (a.bucket, a.mask and (a.mask.source, a.mask.alpha), a.background) == ((32, 16), ("alpha", True), "#808080")
    assert b.captions == ("one", "", "three") and (b.key, b.num_repeats, b.batch_size) == ("3:b", 2, 4)
    assert (c.stem, c.cache_directory, len(c.views), c.content) == ("c", caches / "sub", 2, "hash of c")
    assert (other.stem, other.squashed, other.interpolation) == ("dé", True, "nearest")
    for table in (first, second):
        assert table.files["text"].precisions == {"auto": 4} and table.files["latents"].imported.tolist() == [
            False,
            False,
            True,
            False,
        ]
        assert table.files["experts"].layout.tolist() == [-1, -1, -1, 0]
        files = open_items(table, [caches] * 4, [["latents", "text"]], "tf")
        assert [each["text"].tensors["t5_vec"].shape for each in files] == [(4, 16)] * 4
        with files[0]["latents"].path.open("rb") as file:
            assert files[0]["latents"].is_still(file)
    as_list: list[Item] = list(second)
    assert data_digest(second, True) == data_digest(as_list, True)
    assert sum(count for _, count in tally(second)) == 4 and second[1:3] == [b, other]


@pytest.mark.parametrize("change", ["new", "gone", "renamed", "damaged", "older"])
def test_a_folder_that_changed_is_read_again(change: str, caches: Path, keeps_all: None) -> None:
    load(caches)
    before, latents = kept(caches).stat().st_ino, caches / "sub" / "c_0016x0016_tf.safetensors"
    if change == "new":
        write(caches / "sub", "new")
    elif change == "gone":
        latents.unlink()
    elif change == "renamed":
        write(caches.parent, "c", item="sub/c", bucket=(48, 16))
        (caches.parent / latents.name).replace(latents)
    elif change == "damaged":
        kept(caches).write_bytes(kept(caches).read_bytes()[:1000])
    else:
        item_table.VERSION, version = 0, item_table.VERSION
        kept(caches).unlink()
        load(caches)
        item_table.VERSION = version
    ids = [item.id for item in load(caches)]
    assert ids == sorted(
        {"new": ["new"]}.get(change, [])
        + [each for each in ("a", "b", "else", "sub/c") if change != "gone" or each != "sub/c"]
    )
    assert kept(caches).stat().st_ino != before
    if change == "renamed":
        assert load(caches)[3].bucket == (48, 16)


def test_a_file_that_was_written_over_is_found_when_it_is_read(caches: Path, keeps_all: None) -> None:
    load(caches)
    path = caches / "a_0016x0016_tf.safetensors"
    with path.open("r+b") as file:
        file.write(safetensors(LATENTS, {"item": "a", "bucket": [16, 16]}))
        file.truncate()
    files = open_items(load(caches), [caches] * 4, [["latents"]], "tf")[0]["latents"]
    with path.open("rb") as file:
        assert not files.is_still(file)
    item_table.forget(caches, "tf")
    assert load(caches)[0].bucket == (16, 16)


def test_nothing_is_kept_of_a_small_folder_or_one_that_cannot_be_written(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(caches)
    assert not (caches / ".table").exists()
    monkeypatch.setattr(item_table, "LEAST_KEPT", 1)
    (caches / ".table").write_text("a file in its place")
    assert len(load(caches)) == 4


@pytest.mark.parametrize("caption", ["\x01", "smile \ud83d", "a\nb", ""])
def test_captions_of_all_kinds_stay_with_their_items(caption: str, tmp_path: Path, keeps_all: None) -> None:
    root = tmp_path / "caches"
    write(root, "a", captions=["one", caption])
    write(root, "b", captions=[caption, "two"])
    write(root / ".hidden", "c", item=".hidden/c")
    for _ in range(2):
        assert {item.id: item.captions for item in load(root)} == {
            "a": ("one", caption), "b": (caption, "two"), ".hidden/c": ("c",)
        }  # fmt: skip
    assert kept(root).is_file()


def test_what_is_kept_is_not_believed_where_items_are_listed(caches: Path, keeps_all: None) -> None:
    load(caches)
    (caches / "b_tf_te.safetensors").write_bytes(safetensors(TEXT, {"item": "b", "caption": "another"}))
    assert load(caches)[1].caption == "one"  # until it is read
    assert items_of_caches(caches, "tf", [])[1].caption == "another"


def test_two_latents_of_one_picture_are_named(caches: Path) -> None:
    (caches / "a_0032x0016_tf.safetensors").write_bytes(safetensors(LATENTS, {"item": "a", "bucket": [16, 16]}))
    problems: list[str] = []
    items_of_caches(caches, "tf", problems)
    assert len(problems) == 1
    assert "a_0032x0016_tf.safetensors and a_0016x0016_tf.safetensors are caches of the same picture" in problems[0]


def test_what_is_wrong_is_said_and_not_kept(caches: Path, keeps_all: None) -> None:
    write(caches, "again", item="b")
    (caches / "sub" / "dé_tf_te.safetensors").unlink()
    (dataset,), _ = resolve_datasets(
        {"datasets": [{"precached": True, "cache_directory": str(caches)}]},
        {"resolution": 64, "enable_bucket": True, "bucket_no_upscale": False, "caption_extension": ".txt", "batch_size": 2,
         "num_repeats": 1, "missing_caption": "error", "recursive": False}, 16, Path,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"again and .*b are caches of the same item; remove one") as caught:
        scan([dataset], "tf")
    assert "dé_tf_te.safetensors: no such file; the caches are not complete" in str(caught.value)
    assert not kept(caches).exists()


def test_groups_are_planned_as_their_items() -> None:
    alike = [
        PlanItem("", (16, 16), 2, 3),
        PlanItem("", (32, 16), 1, 2),
        PlanItem("", (64, 64), 1, 1),
        PlanItem("", (16, 16), 1, 3),
    ]
    numbers = [*np.random.default_rng(0).integers(0, 2, 50).tolist(), 3, 3]
    items = [PlanItem(f"{n:03d}", alike[number].bucket, alike[number].num_repeats, alike[number].micro_batch)
             for n, number in enumerate(numbers)]  # fmt: skip
    for epoch in range(3):
        assert plan_epoch(PlanGroups(alike, numbers), 7, epoch) == plan_epoch(items, 7, epoch)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_second_start_opens_no_file_of_an_item(count: int, tmp_path: Path) -> None:
    """Nor does it list folders. benchmarks/large_set.py measures such a start."""
    root = tmp_path / "caches"
    write_caches(root, count)
    first = load(root)
    with opened_below(root) as opened:
        table = load(root)
        open_items(table, [root] * 4, [["latents", "text"]], "tf")
        assert sum(number for _, number in tally(table)) == len(table) == len(first) == count
        plan_epoch(PlanGroups([PlanItem("", kind.bucket, 1, 8) for kind in table.kinds], table.kind.tolist()), 1, 0)
    assert dict(opened) == {"tf.npz": 1}
    assert table[count - 1].caption == f"picture number {count - 1}"
    assert json.dumps(table.places) == '["."]'
