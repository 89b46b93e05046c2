"""A run file of several steps: each is planned, cached and trained in turn, in a folder of its own.

    <output_dir>/steps.json      name, folder, status (waiting, running, finished, stopped, failed) and last update of every step
    <output_dir>/NN-<name>/      the run of a step

The same command continues: finished steps are checked for changed settings and skipped, the first unfinished one goes on.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from musubi_tuner.config import RunConfig
from musubi_tuner.errors import EXIT_OK, Interrupted
from musubi_tuner.files import fault_point, read_json, write_json
from musubi_tuner.run_record import FAILED, FINISHED, STOPPED, recorder, was_stopped

FILE = "steps.json"
WAITING, RUNNING = "waiting", "running"

RunStep = Callable[[RunConfig, dict[str, Any], bool], int]
"""Runs one step: its config, the options of the command with the name of the step, and whether its folder can be written to."""


def root_of(steps: list[RunConfig]) -> Path:
    """The folder that holds those of all steps."""
    return steps[0].output_dir.parent


def trained_steps(folder: Path) -> list[tuple[str, Path]]:
    """Name and folder of the steps below a folder; empty for an ordinary run."""
    try:
        return [(entry["name"], folder / entry["folder"]) for entry in read_json(folder / FILE)["steps"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def run_steps(
    steps: list[RunConfig], options: argparse.Namespace, overrides: dict[str, Any], run_step: RunStep, can_write: bool
) -> int:
    """Go through the steps; returns the exit code of the first that fails or is stopped, else 0.

    Raises:
        ConfigError: if a finished step has another config, naming step and key.
    """
    table = StepTable(steps) if can_write else None
    for config in steps:
        step = config.step
        assert step is not None
        print(f"step {step.number} of {step.of}: {step.name}", flush=True)
        if (
            (options.plan or options.cache_only)
            and config.model.path is not None
            and config.waits_for(Path(config.model.path))
        ):
            assert step.previous is not None
            print(f"  starts from the end of {step.previous.folder}; planned once that exists", flush=True)
            continue
        current = recorder()
        if current is not None:
            current.values["part"] = f"{step.number}/{step.of} {step.name}"
        if table is not None:
            table.note(step.name, RUNNING)
        status = FAILED
        try:
            code = run_step(config, {**overrides, "step": step.name}, can_write)
            stopped = code > 128 or (current is not None and was_stopped(current.folder))
            status = STOPPED if stopped else FAILED if code else FINISHED
        except (Interrupted, KeyboardInterrupt):
            status = STOPPED
            raise
        finally:
            if table is not None:
                table.note(step.name, status)
        if status != FINISHED:
            return code
        fault_point("step.finished")
    return EXIT_OK


class StepTable:
    """Writes steps.json."""

    def __init__(self, steps: list[RunConfig]) -> None:
        self.path = root_of(steps) / FILE
        self.folders = {config.step.name: config.step.folder for config in steps if config.step}
        before = {}
        with suppress(OSError, ValueError, KeyError, TypeError):
            before = {entry["name"]: entry for entry in read_json(self.path)["steps"]}
        self.entries: dict[str, dict[str, Any]] = {
            name: before.get(name) or {"name": name, "folder": folder, "status": WAITING, "step": None}
            for name, folder in self.folders.items()
        }

    def note(self, name: str, status: str) -> None:
        """Write the status of a step."""
        entry = self.entries[name]
        entry["status"] = status
        with suppress(OSError, ValueError, KeyError):
            listed = read_json(self.path.parent / entry["folder"] / "checkpoints.json")["checkpoints"]
            entry["step"] = max((each["step"] for each in listed.values()), default=None)
        write_json(self.path, {"steps": list(self.entries.values())})
