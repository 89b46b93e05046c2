"""States are whole or not there, broken ones are named and passed over, and only listed files are ever removed."""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.training.checkpoint import (
    CheckpointList,
    Entry,
    TrainingState,
    find_states,
    newest_good_state,
    read_tensors,
    read_values,
    save_weights,
    tidy,
    write_state,
)

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def state_of(step: int) -> TrainingState:
    """A small state in which every kind of content occurs."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 4, generator=generator)
    return TrainingState(
        model={"weight": weight, "gate": torch.tensor(0.25), "counter": torch.tensor([step])},
        ema={"weight": weight * 0.5},
        optimizer={"weight/exp_avg": weight.bfloat16(), "weight/step": torch.tensor(float(step))},
        values={"step": step, "lr": 0.1 + 0.2, "name": "Bär", "scaler": None},
    )


def write(folder: Path, step: int, name: str | None = None) -> Path:
    path = folder / (name or f"run-step{step:08d}-state")
    write_state(path, state_of(step))
    return path


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def assert_is_state(path: Path, step: int) -> None:
    expected = state_of(step)
    assert read_values(path) == {"format": 1, **expected.values}
    for name in ("model", "ema", "optimizer"):
        assert_same(read_tensors(path, name), getattr(expected, name))


# Writing and reading a state


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    assert_is_state(write(tmp_path, 5), 5)


def test_state_folder_holds_just_its_files_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    assert {file.name for file in path.iterdir()} == set(FILES)
    assert list(tmp_path.iterdir()) == [path]


def test_manifest_lists_every_other_file(tmp_path: Path) -> None:
    manifest = json.loads((write(tmp_path, 5) / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest) == set(FILES) - {"manifest.json"}
    assert all(len(digest) == 64 for digest in manifest.values())


def test_absent_part_comes_back_empty(tmp_path: Path) -> None:
    path = tmp_path / "run-state"
    write_state(path, TrainingState({"weight": torch.ones(2)}, {}, {}, {"step": 1}))
    assert read_tensors(path, "ema") == {}
    assert read_values(path)["step"] == 1


def test_state_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, 5, "run-state")
    write(tmp_path, 9, "run-state")
    assert_is_state(path, 9)
    assert list(tmp_path.iterdir()) == [path]


def test_state_that_cannot_be_written_leaves_the_older_one_and_nothing_beside(tmp_path: Path) -> None:
    path = write(tmp_path, 5, "run-state")
    broken = state_of(9)
    broken.values["position"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_state(path, broken)
    assert_is_state(path, 5)
    assert list(tmp_path.iterdir()) == [path]


def test_older_state_that_cannot_be_removed_does_not_cost_the_new_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 5, "run-state")

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr("shutil.rmtree", busy)
    with contextlib.suppress(OSError):
        write(tmp_path, 9, "run-state")
    found = newest_good_state(tmp_path, "run")
    assert found is not None
    assert_is_state(found[0], found[1]["step"])


def test_tensors_that_are_views_of_one_storage_are_written(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    parts = {"row": base[0], "column": base[:, 1], "turned": base.t()}
    path = tmp_path / "run-state"
    write_state(path, TrainingState(parts, {}, {}, {"step": 1}))
    assert_same(read_tensors(path, "model"), parts)


def test_one_tensor_under_two_names_is_written_under_both(tmp_path: Path) -> None:
    table = torch.linspace(-1, 1, 7)
    path = tmp_path / "run-state"
    write_state(path, TrainingState({}, {}, {"a/qmap1": table, "b/qmap1": table}, {"step": 1}))
    assert_same(read_tensors(path, "optimizer"), {"a/qmap1": table, "b/qmap1": table})


def test_read_tensors_do_not_need_their_file_any_more(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    tensors = read_tensors(path, "model")
    file = path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert_same(tensors, state_of(5).model)


def test_state_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run-state"
    write_state(path, TrainingState({}, {}, {}, {"step": 1, "format": 99}))
    with pytest.raises(CheckpointError) as caught:
        read_values(path)
    assert str(caught.value) == f"{path}: is of format 99, this version reads 1"


# Broken states


def flip(where: float) -> Callable[[Path], None]:
    """Change one byte at a share of the file's length."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        position = min(int(where * len(content)), len(content) - 1)
        content[position] ^= 0x01
        file.write_bytes(content)

    return damage


def not_text(file: Path) -> None:
    """Put a byte in the middle that occurs in no UTF-8 text."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] = 0xFF
    file.write_bytes(content)


def zeros(file: Path) -> None:
    """What a crashed file system leaves: the right length, no content."""
    file.write_bytes(bytes(file.stat().st_size))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "first byte": flip(0.0),
    "byte in the middle": flip(0.5),
    "last byte": flip(1.0),
    "byte that is no text": not_text,
    "zeros": zeros,
    "one byte short": lambda file: file.write_bytes(file.read_bytes()[:-1]) and None,
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) and None,
    "empty": lambda file: file.write_bytes(b"") and None,
    "one byte more": lambda file: file.write_bytes(file.read_bytes() + b"x") and None,
    "missing": lambda file: file.unlink(),
    "another kind of json": lambda file: file.write_text("[]", encoding="utf-8") and None,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_state_is_named_and_an_older_one_taken(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    DAMAGE[damage](newer / name)
    with caplog.at_level(logging.WARNING):
        found = newest_good_state(tmp_path, "run")
    assert found is not None
    assert found[0] == older
    assert found[1]["step"] == 5
    assert_is_state(older, 5)
    assert len(caplog.messages) == 1
    assert str(newer) in caplog.messages[0]
    assert newer.exists()  # it is left for a person to look at


def test_manifest_that_does_not_name_a_file_does_not_vouch_for_it(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    (newer / "manifest.json").write_text("{}", encoding="utf-8")
    flip(0.9)(newer / "model.safetensors")
    found = newest_good_state(tmp_path, "run")
    assert found is not None
    assert found[0] == older


def test_changed_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    flip(0.9)(path / "optimizer.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_values(path)
    assert str(caught.value) == f"{path}: optimizer.safetensors does not match its manifest"


def test_missing_manifest_is_an_incomplete_state(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        read_values(path)
    assert str(caught.value).startswith(f"{path}: is not a complete state (FileNotFoundError: ")
    assert "manifest.json" in str(caught.value)


def test_missing_part_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    (path / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is not a complete state \(FileNotFoundError: .*ema\.safetensors"):
        read_values(path)


def test_warning_says_that_an_older_state_is_tried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 5)
    newer = write(tmp_path, 10)
    flip(0.9)(newer / "model.safetensors")
    newest_good_state(tmp_path, "run")
    assert caplog.messages == [f"{newer}: model.safetensors does not match its manifest; trying an older state"]


def test_no_good_state_is_a_new_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_good_state(tmp_path, "run") is None
    assert caplog.messages == []
    (write(tmp_path, 5) / "manifest.json").unlink()
    assert newest_good_state(tmp_path, "run") is None
    assert len(caplog.messages) == 1


def test_newest_state_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for step, name in ((20, "run-state"), (3, "run-000001-state"), (100, "run-step00000100-state")):
        write(tmp_path, step, name)
    assert [step for step, _ in find_states(tmp_path, "run")] == [100, 20, 3]
    found = newest_good_state(tmp_path, "run")
    assert found is not None
    assert found[0].name == "run-step00000100-state"


def test_half_written_states_and_files_are_not_states(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 50, ".tmp-1-2-run-state")
    (tmp_path / "run-note-state").write_text("a file", encoding="utf-8")
    assert [step for step, _ in find_states(tmp_path, "run")] == [5]


def test_name_of_a_run_is_no_pattern(tmp_path: Path) -> None:
    write(tmp_path, 5, "run [a]-state")
    write(tmp_path, 6, "run a-state")
    assert [step for step, _ in find_states(tmp_path, "run [a]")] == [5]


# The list


def listed(folder: Path, entries: dict[str, Entry]) -> CheckpointList:
    """A list and the files and folders that it names."""
    checkpoints = CheckpointList(folder, "run")
    for name, entry in entries.items():
        for part in (entry.model, entry.ema):
            if part:
                (folder / part).write_bytes(b"weights")
        if entry.state:
            (folder / entry.state).mkdir(exist_ok=True)
            (folder / entry.state / "state.json").write_text("{}", encoding="utf-8")
        checkpoints.add(name, entry)
    return checkpoints


def step_entry(step: int) -> Entry:
    stem = f"run-step{step:08d}"
    return Entry(step, 1, "step", f"{stem}.safetensors", f"{stem}_ema.safetensors", f"{stem}-state")


def content(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_list_comes_back_in_order(tmp_path: Path) -> None:
    entries = {"step_2": step_entry(2), "step_1": step_entry(1), "final": Entry(3, 1, "final", "run.safetensors")}
    listed(tmp_path, entries)
    found = CheckpointList.read(tmp_path, "run")
    assert found.entries == entries
    assert list(found.entries) == list(entries)


def test_absent_list_is_empty(tmp_path: Path) -> None:
    assert CheckpointList.read(tmp_path, "run").entries == {}


def test_entry_written_again_is_the_last(tmp_path: Path) -> None:
    checkpoints = listed(tmp_path, {"final": Entry(3, 1, "final"), "step_4": step_entry(4)})
    checkpoints.add("final", Entry(9, 2, "final"))
    found = CheckpointList.read(tmp_path, "run").entries
    assert list(found) == ["step_4", "final"]
    assert found["final"].step == 9


def test_list_of_another_run_is_refused(tmp_path: Path) -> None:
    listed(tmp_path, {"step_1": step_entry(1)})
    with pytest.raises(ConfigError) as caught:
        CheckpointList.read(tmp_path, "dog")
    for part in (f"run.output_dir {tmp_path}", "'run'", "'dog'", "choose another folder"):
        assert part in str(caught.value)


BROKEN_LISTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"run": "run", "checkpoi',
    "another kind of json": b"[1, 2]",
    "no run": b'{"checkpoints": {}}',
    "no checkpoints": b'{"run": "run"}',
    "checkpoints of another kind": b'{"run": "run", "checkpoints": []}',
    "entry of another kind": b'{"run": "run", "checkpoints": {"final": 3}}',
    "unknown entry field": b'{"run": "run", "checkpoints": {"final": {"step": 1, "epoch": 1, "kind": "a", "b": 1}}}',
    "incomplete entry": b'{"run": "run", "checkpoints": {"final": {"step": 1}}}',
    "no text": b'{"run": "\xff", "checkpoints": {}}',
}


@pytest.mark.parametrize("kind", BROKEN_LISTS)
def test_broken_list_is_named_with_the_way_out(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints.json"
    path.write_bytes(BROKEN_LISTS[kind])
    with pytest.raises(CheckpointError) as caught:
        CheckpointList.read(tmp_path, "run")
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be read (")
    assert message.endswith("); move it away, or use --fresh")


# Pruning


def names_of(*steps: int) -> set[str]:
    return {part for step in steps for part in (step_entry(step).model, step_entry(step).ema, step_entry(step).state)}


@pytest.mark.parametrize(("keep", "left"), [(1, (3,)), (2, (2, 3)), (3, (1, 2, 3)), (9, (1, 2, 3))])
def test_pruning_keeps_the_newest(keep: int, left: tuple[int, ...], tmp_path: Path) -> None:
    checkpoints = listed(tmp_path, {f"step_{step}": step_entry(step) for step in (1, 2, 3)})
    checkpoints.prune("step", keep)
    assert content(tmp_path) == {"checkpoints.json"} | names_of(*left)
    assert set(CheckpointList.read(tmp_path, "run").entries) == {f"step_{step}" for step in left}


@pytest.mark.parametrize("keep", [None, 0])
def test_pruning_is_off_without_a_number(keep: int | None, tmp_path: Path) -> None:
    checkpoints = listed(tmp_path, {f"step_{step}": step_entry(step) for step in (1, 2, 3)})
    checkpoints.prune("step", keep)
    assert content(tmp_path) == {"checkpoints.json"} | names_of(1, 2, 3)


def test_newest_is_that_of_the_highest_step_and_not_the_last_written(tmp_path: Path) -> None:
    checkpoints = listed(tmp_path, {f"step_{step}": step_entry(step) for step in (30, 10, 20)})
    checkpoints.prune("step", 1)
    assert set(checkpoints.entries) == {"step_30"}


def test_what_was_just_written_stays_though_later_steps_are_listed(tmp_path: Path) -> None:
    """A start that went on behind a broken state of step 30."""
    checkpoints = listed(tmp_path, {f"step_{step}": step_entry(step) for step in (10, 30, 20)})
    checkpoints.prune("step", 1, "step_20")
    assert set(checkpoints.entries) == {"step_30", "step_20"}
    checkpoints.prune_states(1, "step_20")
    assert {name: bool(entry.state) for name, entry in checkpoints.entries.items()} == {
        "step_30": True,
        "step_20": True,
    }
    assert (tmp_path / step_entry(20).state).is_dir()


def test_tidying_a_finished_run_prunes_as_its_next_save_would(tmp_path: Path) -> None:
    listed(tmp_path, {f"step_{step}": step_entry(step) for step in (1, 2, 3)})
    tidy(tmp_path, "run")
    assert content(tmp_path) == {"checkpoints.json"} | names_of(1, 2, 3)
    tidy(tmp_path, "run", keep_steps=2, keep_states=1)
    assert content(tmp_path) == {"checkpoints.json"} | names_of(2, 3) - {step_entry(2).state}


def test_pruning_one_kind_leaves_the_others(tmp_path: Path) -> None:
    entries = {
        "step_1": step_entry(1),
        "epoch_1": Entry(1, 1, "epoch", "run-000001.safetensors"),
        "final": Entry(1, 1, "final", "run.safetensors"),
        "step_2": step_entry(2),
    }
    checkpoints = listed(tmp_path, entries)
    checkpoints.prune("step", 1)
    assert set(checkpoints.entries) == {"epoch_1", "final", "step_2"}
    assert content(tmp_path) >= {"run-000001.safetensors", "run.safetensors"}


def test_pruning_never_touches_files_that_are_not_listed(tmp_path: Path) -> None:
    foreign = {"run-step00000000.safetensors", "run-step00000000-state", "notes.txt"}
    (tmp_path / "run-step00000000.safetensors").write_bytes(b"mine")
    (tmp_path / "run-step00000000-state").mkdir()
    (tmp_path / "notes.txt").write_text("keep", encoding="utf-8")
    checkpoints = listed(tmp_path, {f"step_{step}": step_entry(step) for step in (1, 2, 3)})
    checkpoints.prune("step", 1)
    assert content(tmp_path) == {"checkpoints.json"} | names_of(3) | foreign


def test_files_shared_with_a_kept_checkpoint_stay(tmp_path: Path) -> None:
    shared = step_entry(1)
    entries = {
        "step_1": shared,
        "epoch_1": Entry(1, 1, "epoch", shared.model, "", shared.state),
        "step_2": step_entry(2),
    }
    checkpoints = listed(tmp_path, entries)
    checkpoints.prune("step", 1)
    assert content(tmp_path) == {"checkpoints.json", shared.model, shared.state} | names_of(2)


@pytest.mark.parametrize(("keep", "left"), [(1, {4}), (2, {3, 4}), (9, {1, 3, 4}), (0, {1, 3, 4}), (None, {1, 3, 4})])
def test_states_are_pruned_by_step_apart_from_their_weights(keep: int | None, left: set[int], tmp_path: Path) -> None:
    entries = {
        "step_4": step_entry(4),
        "step_1": Entry(1, 1, "step", state="run-step00000001-state"),  # imported
        "best": Entry(2, 1, "best", "best.safetensors"),
        "step_3": step_entry(3),
        "epoch_1": Entry(3, 1, "epoch", "run-000001.safetensors", "", "run-000001-state"),
        "final": step_entry(4),
    }
    checkpoints = listed(tmp_path, {name: replace(entry) for name, entry in entries.items()})
    before = content(tmp_path)
    checkpoints.prune_states(keep)
    assert before - content(tmp_path) == {entry.state for entry in entries.values() if entry.step not in left} - {""}
    found = CheckpointList.read(tmp_path, "run").entries
    assert {entry.state for entry in found.values()} - {""} == {e.state for e in entries.values() if e.step in left}
    # What has neither weights nor a state is no checkpoint.
    assert [entry.model for entry in found.values()] == [
        entry.model for entry in entries.values() if entry.model or 1 in left
    ]


@pytest.mark.parametrize("links", [True, False])
def test_the_end_of_a_run_that_goes_on_has_the_names_that_were_due(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError("no links here")))
    final = Entry(9, 3, "final", "run.safetensors", "run_ema.safetensors", "run-state")
    checkpoints = listed(tmp_path, {"final": final})
    checkpoints.add("final", final, {"step_9": "step", "epoch_3": "epoch"})
    assert CheckpointList.read(tmp_path, "run").keep_former_end(9) == [
        "run-step00000009.safetensors",
        "run-000003.safetensors",
    ]
    found = CheckpointList.read(tmp_path, "run").entries
    assert found["epoch_3"].ema == "run-000003_ema.safetensors" and found["final"].model == "run.safetensors"
    assert [found[name].state for name in ("step_9", "epoch_3", "final")] == ["run-step00000009-state"] * 2 + [""]
    assert content(tmp_path) == names_of(9) | {
        "checkpoints.json", "run.safetensors", "run_ema.safetensors", "run-000003.safetensors", "run-000003_ema.safetensors",
    }  # fmt: skip
    # The next end is written over the old names, and nothing of the former one is lost.
    CheckpointList.read(tmp_path, "run").add("final", Entry(15, 5, "final", "run.safetensors", "run_ema.safetensors"))
    assert list(CheckpointList.read(tmp_path, "run").entries) == ["step_9", "epoch_3", "final"]


def test_an_end_that_was_not_due_on_the_way_is_kept_as_its_step(tmp_path: Path) -> None:
    checkpoints = listed(tmp_path, {"final": Entry(7, 3, "final", "run.safetensors")})
    assert checkpoints.keep_former_end(6) == []  # not where the run goes on
    assert checkpoints.keep_former_end(7) == ["run-step00000007.safetensors"]
    assert checkpoints.entries["step_7"] == Entry(7, 3, "step", "run-step00000007.safetensors")
    assert checkpoints.keep_former_end(7) == []  # kept already


def test_keeping_the_former_end_goes_on_after_a_crash(tmp_path: Path) -> None:
    final = Entry(9, 3, "final", "run.safetensors", "run_ema.safetensors", "run-state")
    checkpoints = listed(tmp_path, {"final": final})
    checkpoints.add("final", final, {"epoch_3": "epoch"})
    before = (tmp_path / "checkpoints.json").read_bytes()
    checkpoints.keep_former_end(9)
    (tmp_path / "checkpoints.json").write_bytes(before)  # killed before the list was written
    tidy(tmp_path, "run")
    CheckpointList.read(tmp_path, "run").keep_former_end(9)
    found = CheckpointList.read(tmp_path, "run").entries
    expected = ("run-000003.safetensors", "run-000003_ema.safetensors", "run-000003-state")
    assert (found["epoch_3"].model, found["epoch_3"].ema, found["epoch_3"].state) == expected
    assert found["final"].state == "" and set(found) == {"epoch_3", "final"}
    assert all((tmp_path / name).exists() for name in expected)


def test_pruning_bears_files_that_are_gone_already(tmp_path: Path) -> None:
    checkpoints = listed(tmp_path, {f"step_{step}": step_entry(step) for step in (1, 2)})
    (tmp_path / step_entry(1).model).unlink()
    (tmp_path / step_entry(1).state / "state.json").unlink()
    (tmp_path / step_entry(1).state).rmdir()
    checkpoints.prune("step", 1)
    assert content(tmp_path) == {"checkpoints.json"} | names_of(2)


# Weight files


def saved(folder: Path, tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    path = folder / "weights.safetensors"
    save_weights(path, tensors, dtype, {"step": "7"})
    with safe_open(str(path), "pt") as file:
        assert file.metadata() == {"step": "7"}
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_only_floating_tensors_with_an_axis_are_cast(dtype: str, tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.tensor([[1.2345678, -2.0]]),
        "vector": torch.tensor([0.1, 0.2, 0.3]),
        "gate": torch.tensor(0.123456789),
        "counter": torch.tensor([1, 2, 2**40]),
        "scalar_counter": torch.tensor(3),
        "mask": torch.tensor([True, False]),
    }
    found = saved(tmp_path, tensors, dtype)
    wanted = getattr(torch, dtype)
    expected: dict[str, Any] = {
        key: value.to(wanted) if key in ("matrix", "vector") else value for key, value in tensors.items()
    }
    assert_same(found, expected)


def test_weights_of_a_training_model_are_saved_without_their_graph(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    found = saved(tmp_path, {"turned": parameter.t()}, "float32")
    assert found["turned"].tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_weight_file_is_replaced_and_leaves_nothing_beside(tmp_path: Path) -> None:
    saved(tmp_path, {"a": torch.zeros(2)}, "float32")
    assert saved(tmp_path, {"b": torch.ones(2)}, "float32")["b"].tolist() == [1.0, 1.0]
    assert content(tmp_path) == {"weights.safetensors"}


def test_checkpoints_that_a_killed_start_left_unlisted_are_adopted_and_then_pruned(tmp_path: Path) -> None:
    for step in (5, 10):
        (tmp_path / f"run-step{step:08d}.safetensors").touch()
        (tmp_path / f"run-step{step:08d}_ema.safetensors").touch()
    (tmp_path / "run-step5.safetensors").touch()
    (tmp_path / "other-step00000005.safetensors").touch()
    (tmp_path / "run-step00000015.safetensors").touch()
    listed = CheckpointList(tmp_path, "run", {"step_15": Entry(15, 1, "step", "run-step00000015.safetensors")})
    listed.adopt()
    assert list(listed.entries) == ["step_5", "step_10", "step_15"]
    listed.prune("step", 1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "run-step00000015.safetensors",
        "run-step5.safetensors",
        "other-step00000005.safetensors",
        "checkpoints.json",
    }
