"""A run file of several steps: each is planned, cached and trained in turn, in a folder of its own.

    <output_dir>/steps.json      name, folder, status (waiting, running, finished, stopped, failed) and last update of every step,
                                 and the update of the step before that it began from
    <output_dir>/NN-<name>/      the run of a step

The same command continues: finished steps are checked for changed settings and skipped, and the first unfinished one continues.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from musubi_tuner.config import RunConfig
from musubi_tuner.config.pipeline import CHECKPOINTS, final_update
from musubi_tuner.errors import EXIT_OK, ConfigError, Interrupted
from musubi_tuner.files import fault_point, read_json, write_json
from musubi_tuner.run_record import FAILED, FINISHED, STOPPED, recorder, was_stopped
from musubi_tuner.stopping import is_stop

FILE = "steps.json"
WAITING, RUNNING = "waiting", "running"

RunStep = Callable[[RunConfig, dict[str, Any], bool], int]
"""Runs one step: its config, the options of the command with the name of the step, and whether its folder can be written to."""


def root_of(config: RunConfig) -> Path:
    """The folder that holds those of all steps of a file."""
    return config.output_dir.parent


def trained_steps(folder: Path) -> list[tuple[str, Path]]:
    """Name and folder of the steps below a folder; empty for an ordinary run."""
    try:
        return [(entry["name"], folder / entry["folder"]) for entry in read_json(folder / FILE)["steps"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def run_steps(
    steps: list[RunConfig], options: argparse.Namespace, overrides: dict[str, Any], run_step: RunStep, can_write: bool
) -> int:
    """Run steps in turn; returns the exit code of the first that fails or is stopped, else 0.

    Raises:
        ConfigError: if a step cannot start, or the steps that have begun are no longer those of the file; or if a finished step has
            another config, naming step and key.
    """
    only_look = options.plan or options.cache_only
    for config in steps:
        step = config.step
        assert step is not None
        print(f"step {step.number} of {step.of}: {step.name}", flush=True)
        table = StepTable(config)
        table.check()
        if not only_look:
            refuse_unfinished(config)
        current = recorder()
        if current is not None and current.folder != config.output_dir:
            current.values["part"] = f"{step.number}/{step.of} {step.name}"
        if can_write:
            table.note(RUNNING)
        status = FAILED
        try:
            code = run_step(config, {**overrides, "step": step.name}, can_write)
            stopped = is_stop(code) or (current is not None and was_stopped(current.folder))
            status = STOPPED if stopped else FAILED if code else FINISHED
        except (Interrupted, KeyboardInterrupt):
            status = STOPPED
            raise
        finally:
            if can_write:
                table.note(status)
        if status != FINISHED:
            return code
        fault_point("step.finished")
    return EXIT_OK


def refuse_unfinished(config: RunConfig) -> None:
    """Refuse a step that cannot start yet.

    Raises:
        ConfigError: naming the step that comes first.
    """
    first = config.waits_for
    if first is not None and config.step is not None:
        raise ConfigError(
            f"{config.path}: step {config.step.name} starts from step {first.name}, which is not finished; run that first: --step {first.name}"
        )


class StepTable:
    """What steps.json says of a step: name, folder, status, last update, and the update of the step before that it began from."""

    def __init__(self, config: RunConfig) -> None:
        assert config.step is not None
        self.step, self.steps, self.root = config.step, config.steps, root_of(config)

    def _read(self) -> list[dict[str, Any]]:
        try:
            return [{**_NEW, **entry} for entry in read_json(self.root / FILE)["steps"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def check(self) -> None:
        """Compare the steps that have begun with those of the file.

        Raises:
            ConfigError: if one of them is elsewhere now, or if the step before has been trained on since this one began from it.
        """
        began = [entry for entry in self._read() if (self.root / entry["folder"] / CHECKPOINTS).exists()]
        folders = [step.folder for step in self.steps]
        for entry in began:
            if entry["folder"] not in folders:
                raise ConfigError(
                    f"{self.root / FILE}: step {entry['folder']} has begun, and the file no longer has it there (its steps: "
                    f"{', '.join(folders)}). Add steps after those that have begun, or use --fresh to start all of them over"
                )
        own = next((entry for entry in began if entry["folder"] == self.step.folder), _NEW)
        before, now = own["from"], self._end_before()
        if before is not None and now is not None and before != now:
            assert self.step.previous is not None
            raise ConfigError(
                f"{self.root / self.step.folder}: began from update {before} of step {self.step.previous.name}, which now ends at {now}. "
                "Remove the folder to train this step again from there, or use --fresh to start all steps over"
            )

    def _end_before(self) -> int | None:
        """Last update of the step before, if this one starts from it."""
        if self.step.start == "file" or self.step.previous is None:
            return None
        return final_update(self.root / self.step.previous.folder)

    def note(self, status: str) -> None:
        """Write the status of the step."""
        before = {entry["folder"]: entry for entry in self._read()}
        entries = [
            {**_NEW, **before.get(step.folder, {}), "name": step.name, "folder": step.folder} for step in self.steps
        ]
        entry = entries[self.step.number - 1]
        if not (self.root / self.step.folder / CHECKPOINTS).exists():
            entry["from"] = self._end_before()
        entry["status"] = status
        with suppress(OSError, ValueError, KeyError):
            listed = read_json(self.root / self.step.folder / CHECKPOINTS)["checkpoints"]
            entry["step"] = max((each["step"] for each in listed.values()), default=None)
        write_json(self.root / FILE, {"steps": entries})


_NEW: dict[str, Any] = {"name": "", "folder": "", "status": WAITING, "step": None, "from": None}
"""Entry of a step that has not begun."""
