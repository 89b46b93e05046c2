"""steps.json: what it says of each step, and what no longer belongs to it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from musubi_tuner.config.pipeline import Step
from musubi_tuner.errors import ConfigError
from musubi_tuner.runner.steps import FINISHED, RUNNING, StepTable


def tables(root: Path, *names: str) -> list[StepTable]:
    """A table per step of a file with these steps, each of which starts from the one before."""
    steps: list[Step] = []
    for number, name in enumerate(names, start=1):
        before = steps[-1] if steps else None
        steps.append(Step(number, len(names), name, "previous" if before else "file", before, (), None, {}))
    configs: list[Any] = [SimpleNamespace(step=step, steps=steps, output_dir=root / step.folder) for step in steps]
    return [StepTable(config) for config in configs]


def end_step(root: Path, folder: str, update: int) -> None:
    (root / folder).mkdir(exist_ok=True)
    text = json.dumps({"checkpoints": {"final": {"step": update}}})
    (root / folder / "checkpoints.json").write_text(text, encoding="utf-8")


def test_every_step_is_listed_as_it_is(tmp_path: Path) -> None:
    first, second = tables(tmp_path, "a", "b")
    first.note(RUNNING)
    end_step(tmp_path, "01-a", 5)
    first.note(FINISHED)
    second.note(RUNNING)
    assert json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))["steps"] == [
        {"name": "a", "folder": "01-a", "status": "finished", "step": 5, "from": None},
        {"name": "b", "folder": "02-b", "status": "running", "step": None, "from": 5},
    ]


def test_a_step_is_not_continued_from_weights_that_have_changed_since(tmp_path: Path) -> None:
    _, second = tables(tmp_path, "a", "b")
    end_step(tmp_path, "01-a", 5)
    second.note(RUNNING)
    end_step(tmp_path, "02-b", 3)
    second.check()
    end_step(tmp_path, "01-a", 9)
    with pytest.raises(ConfigError, match="02-b: began from update 5 of step a, which now ends at 9"):
        second.check()
    second.note(RUNNING)  # a step that has checkpoints keeps what it began from
    with pytest.raises(ConfigError, match="Remove the folder"):
        second.check()
    (tmp_path / "02-b" / "checkpoints.json").unlink()
    second.check()
    second.note(RUNNING)
    assert json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))["steps"][1]["from"] == 9


def test_steps_are_added_behind_those_that_have_begun(tmp_path: Path) -> None:
    first, _, _ = tables(tmp_path, "a", "b", "c")
    first.note(FINISHED)
    tables(tmp_path, "x", "a")[0].check()  # a step without a checkpoint can still be moved
    end_step(tmp_path, "01-a", 5)
    for names in (("a", "b", "x", "c"), ("a",), ("a", "z")):
        for table in tables(tmp_path, *names):
            table.check()
    for names in (("x", "a"), ("b",)):
        with pytest.raises(ConfigError, match="step 01-a has begun, and the file no longer has it there"):
            tables(tmp_path, *names)[0].check()
    tables(tmp_path, "a", "z")[0].note(FINISHED)
    folders = [entry["folder"] for entry in json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))["steps"]]
    assert folders == ["01-a", "02-z"]
