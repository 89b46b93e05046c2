"""A run that goes on keeps its split, whatever the rule has become, and says where a new one would differ."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.data.buckets import place
from musubi_tuner.data.item import Item
from musubi_tuner.data.split import hold_out, hold_out_by_id
from musubi_tuner.training.held_out import split_note, split_of_run

Load = Callable[..., RunConfig]
SHARE = 0.3


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def make(is_reg: bool = False, **resume: Any) -> RunConfig:
        folders = [tmp_path / name for name in ("a", "b")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        tables = {
            "schema_version": 1,
            "run": {"name": "r", "output_dir": str(tmp_path / "out"), "device": "cpu"},
            "model": {"arch": "tf", "init": "scratch"},
            "experts": {"enable_lune": False, "enable_sol": False},
            "cache": {"run": "never"},
            "train": {"max_steps": 10, "mixed_precision": "no"},
            "scheduler": {"warmup_steps": 0},
            "validation": {"split": SHARE},
            "resume": resume,
            "datasets": [
                {"image_directory": str(folder), "is_reg": is_reg and folder.name == "b"} for folder in folders
            ],
        }
        path = tmp_path / "run.toml"
        path.write_text(tomli_w.dumps(tables), encoding="utf-8")
        return load_config(path)

    return make


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """20 images, and a second data set of copies of them under other names."""
    size = (64, 64)
    found = []
    for dataset, prefix in ((0, "a"), (1, "b")):
        for number in range(20):
            name = f"{prefix}{number:02d}"
            (tmp_path / f"{name}.png").write_text(f"picture {number}")
            path = tmp_path / f"{name}.png"
            found.append(Item(name, f"{dataset}:{name}", path, "x", tmp_path, size, place(size, size), 1, 1))
    return found


def state(folder: Path, step: int = 5, **values: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(
        json.dumps({"step": step, "ema_updates": 0, "config": {}, **values}), encoding="utf-8"
    )
    return folder


def keys(split: tuple[list[Item], list[Item]]) -> tuple[list[str], list[str]]:
    return [item.key for item in split[0]], [item.key for item in split[1]]


def test_a_run_that_begins_splits_by_picture_and_has_nothing_to_say(load: Load, items: list[Item]) -> None:
    config = load()
    assert split_of_run(config, items) == hold_out(items, config.validation)
    assert split_note(config, items) is None


def test_regularisation_images_are_trained_and_not_measured(load: Load, items: list[Item], tmp_path: Path) -> None:
    for item in items[20:]:
        item.path.write_text(f"another {item.id}")
    config, plain = load(is_reg=True), load()
    kept, held = keys(split_of_run(config, items))
    assert held == keys(hold_out(items[:20], config.validation))[1]
    assert kept == [item.key for item in items if item.key not in held] and not any(key[0] == "1" for key in held)
    assert any(key[0] == "1" for key in keys(split_of_run(plain, items))[1]), "proves nothing"
    copy = next(item for item in items[20:])
    copy.path.write_bytes(next(item for item in items if item.key == held[0]).path.read_bytes())
    assert copy.key not in keys(split_of_run(config, items))[0]  # a held-out picture is never trained
    copy.path.write_text("itself again")
    state(tmp_path / "out" / "r-step00000005-state", held_out=held)
    assert split_note(config, items) is None and split_note(plain, items) is not None


def test_a_state_without_a_list_was_split_by_id_and_stays_so(load: Load, items: list[Item], tmp_path: Path) -> None:
    config = load()
    state(tmp_path / "out" / "r-step00000005-state")
    kept, held = hold_out_by_id(items, config.validation)
    assert split_of_run(config, items) == (kept, held) != hold_out(items, config.validation)
    note = split_note(config, items)
    assert (
        note is not None
        and note.startswith("warning: ")
        and "the validation split of its state" in note
        and "--fresh" in note
    )
    both = [item for item in kept if item.path.read_text() in {one.path.read_text() for one in held}]
    assert (
        both
        and f"{len(both)} of the trained files are copies of held-out pictures" in note
        and "loss/val is too low" in note
    )
    assert str(both[0].path) in note


def test_a_list_holds_even_if_files_have_changed(load: Load, items: list[Item], tmp_path: Path) -> None:
    config = load()
    begun = keys(split_of_run(config, items))
    state(tmp_path / "out" / "r-step00000005-state", held_out=begun[1])
    assert split_note(config, items) is None
    for item in items:
        item.path.write_text(item.path.read_text() + " mended")
    assert keys(split_of_run(config, items)) == begun
    note = split_note(config, items)
    assert note is not None and note.startswith("note: ") and "loss/val" not in note and "--fresh" in note


def test_the_state_that_is_continued_from_decides(load: Load, items: list[Item], tmp_path: Path) -> None:
    state(tmp_path / "out" / "r-step00000004-state", step=4)
    state(tmp_path / "out" / "r-step00000005-state", held_out=["0:a07", "1:b07"])
    other = state(tmp_path / "other-state", held_out=["0:a03", "1:b03"])
    assert keys(split_of_run(load(), items))[1] == ["0:a07", "1:b07"]
    assert keys(split_of_run(load(**{"from": str(other)}), items))[1] == ["0:a03", "1:b03"]
    fresh = hold_out(items, load().validation)
    assert split_of_run(load(**{"from": "none"}), items) == fresh
    # A state of other images, which is refused where it is loaded, and one that cannot be read.
    (other / "state.json").write_text(json.dumps({"step": 1, "ema_updates": 0, "config": {}, "held_out": ["0:gone"]}))
    assert split_of_run(load(**{"from": str(other)}), items) == fresh
    (other / "state.json").write_text("{")
    assert split_of_run(load(**{"from": str(other)}), items) == fresh
    removed_later = load(**{"from": str(other)})
    shutil.rmtree(other)
    assert split_of_run(removed_later, items) == fresh


def test_without_validation_no_state_is_read(load: Load, items: list[Item], tmp_path: Path) -> None:
    config = load()
    state(tmp_path / "out" / "r-step00000005-state", held_out=["0:a07"])
    config = config.model_copy(update={"validation": config.validation.model_copy(update={"split": 0.0})})
    assert split_of_run(config, items) == (items, []) and split_note(config, items) is None
