"""Ctrl-C and SIGTERM to the whole process group: the update is finished, a state is saved, and nothing calls it an error."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from project import (
    Place,
    Result,
    all_lines,
    differing,
    final_files,
    stop_group,
)

MOMENTS = ("training", "drawing", "saving")
ENDLESS = {"prompts": ["a cat", "a cup"], "every_steps": 3, "steps": 1000, "width": 128, "height": 128}
"""Drawing that takes longer than any test waits."""


def stop_at(
    moment: str, place: Place, number: signal.Signals, repetition: int = 0, **settings: Any
) -> tuple[Result, Path]:
    """Stop a run at some moment; returns its outcome and its run file.

    Args:
        settings: loader_workers, grad_accum_steps, num_processes.
    """
    name = "-".join([moment, number.name, str(repetition), *(f"{key}{value}" for key, value in settings.items())])
    processes = settings.pop("num_processes", 1)
    tables: dict[str, Any] = {
        "train": {"max_steps": 2000, "mixed_precision": "no", **settings},
        "save": {"every_steps": 1 if moment == "saving" else 1000, "every_epochs": 0},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    if moment == "drawing":
        tables["sample"] = ENDLESS
    if processes > 1:
        tables["distributed"] = {"num_processes": processes}
    config = place.write(name, **tables)
    out = config.parent / "out"
    lines = out / "metrics.jsonl"

    def ready() -> bool:
        if not lines.exists() or lines.read_bytes().count(b"\n") < 3:
            return False
        if moment == "drawing":
            time.sleep(0.3)
        return moment != "saving" or any(out.glob(".tmp-*-state"))

    result = stop_group(config, place.server, number, ready)
    return result, config


def assert_saved(result: Result, config: Path, number: signal.Signals) -> None:
    """The run ended as a wanted stop, with a state of its last update."""
    result.expect(128 + number)
    assert "error" not in result.err.lower() and "warning" not in result.err.lower(), result.err
    assert result.out.count("stopping when this update is done") == 1
    step = all_lines(config.parent / "out")[-1]["step"]
    assert result.err.count(f"stopped after step {step};") == 1
    assert (config.parent / "out" / f"photos-step{step:08d}-state" / "manifest.json").is_file()
    end = json.loads((config.parent / "out" / "exit.json").read_text(encoding="utf-8"))
    assert [end[key] for key in ("code", "reason", "signal", "step")] == [128 + number, "stopped", number, step]
    assert not list((config.parent / "out").glob(".tmp-*"))


@pytest.mark.parametrize(
    ("moment", "number", "settings"),
    [
        ("training", signal.SIGINT, {"loader_workers": 2}),
        ("drawing", signal.SIGTERM, {"loader_workers": 2}),
        ("saving", signal.SIGINT, {"grad_accum_steps": 6}),
        ("training", signal.SIGTERM, {"loader_workers": 2, "num_processes": 2}),
        ("drawing", signal.SIGINT, {"num_processes": 2}),
        ("saving", signal.SIGTERM, {"num_processes": 2}),
    ],
)
def test_a_signal_to_the_group_saves_a_state(
    moment: str, number: signal.Signals, settings: dict[str, Any], place: Place
) -> None:
    result, config = stop_at(moment, place, number, **settings)
    assert_saved(result, config, number)


def test_samples_that_a_signal_cut_off_are_drawn_when_the_run_continues(place: Place) -> None:
    """Those on the way and those of the last update; the run ends in the files and pictures of one that nothing disturbed."""
    train = {"max_steps": 6, "mixed_precision": "no", "loader_workers": 1}
    sample = {**ENDLESS, "steps": 60}
    cut, undisturbed = (
        place.write(name, train=train, sample=sample, save={"every_steps": 0}) for name in ("cut off", "undisturbed")
    )
    ends = [config.parent / "out" for config in (cut, undisturbed)]
    lines = ends[0] / "metrics.jsonl"
    for step in (3, 6):

        def begun(step: int = step) -> bool:
            return lines.exists() and lines.read_bytes().count(b"\n") >= step

        stopped = stop_group(cut, place.server, signal.SIGINT, begun).expect(130)
        assert f"step {step}: samples are drawn when the run continues" in stopped.out
        assert f"stopped after step {step};" in stopped.err
        assert not list(ends[0].glob(f"sample/*_{step:08d}_*.png"))
    for config in (cut, undisturbed):
        place.server.run("train", [config], config.parent).expect(0)
    pictures = [{path.name: path.read_bytes() for path in (end / "sample").iterdir()} for end in ends]
    assert pictures[0] == pictures[1] and pictures[0]
    assert differing(*map(final_files, ends)) == []
