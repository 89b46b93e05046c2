"""Checkpoints and resumable states of a run folder.

    <name>.safetensors  <name>_ema.safetensors                 weights for other programs, in save.dtype
    <name>-step00001000.safetensors  <name>-000004.safetensors the same on the way
    best.safetensors  best_ema.safetensors                     those of the lowest validation loss
    <name>-step00001000-state/  <name>-state/                  everything needed to continue, float32:
        model  ema  optimizer .safetensors, state.json, manifest.json (sha256 of the others)
    checkpoints.json                                           names (final, best, step_1000, epoch_4) -> files; the final
                                                               checkpoint has the names of those due at its step too
    config.json  options.json                                  geometry of the model, options of training

A state is written beside, flushed and renamed; reading verifies the manifest. Only files listed in checkpoints.json
are ever removed.
"""

import glob
import json
import logging
import math
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from musubi_tuner.config import RunConfig
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.files import (
    TEMPORARY_PREFIX,
    fault_point,
    link_file,
    read_json,
    remove_leftovers,
    replace_file,
    sync_path,
    temporary_path,
    write_json,
)
from musubi_tuner.stamps import hash_file
from musubi_tuner.tensors import save_tensors

logger = logging.getLogger(__name__)
STATE_FORMAT = 1
LIST_FILE = "checkpoints.json"
EPOCH_METRIC = "epoch/loss"
"""Mean training loss of an epoch: what the best checkpoint has lowest where nothing is held out."""
EARLIER_METRICS = {"loss/epoch": EPOCH_METRIC}
"""Name of a metric in states of earlier versions -> its name."""


@dataclass
class Entry:
    """One checkpoint: file names relative to the run folder, absent parts empty.

    Attributes:
        metric, value: of the best checkpoint: by what it is the best.
        ended: of the final one: why the run ended before its budget.
    """

    step: int
    epoch: int
    kind: str
    model: str = ""
    ema: str = ""
    state: str = ""
    metric: str = ""
    value: float | None = None
    ended: str = ""


@dataclass
class Best:
    """The lowest value of a metric so far; none is below infinity."""

    metric: str
    value: float = math.inf

    def improve(self, value: float) -> bool:
        """Take over a value if it is lower; NaN never is."""
        if not value < self.value:
            return False
        self.value = value
        return True

    def state(self) -> dict[str, Any]:
        """Plain data for a state."""
        value = None if self.value == math.inf else self.value
        return {"metric": self.metric, "value": value}

    def load_state(self, stored: dict[str, Any] | None) -> None:
        """Continue from a state, if it followed the same metric."""
        if stored and EARLIER_METRICS.get(stored["metric"], stored["metric"]) == self.metric:
            self.value = math.inf if stored["value"] is None else stored["value"]


@dataclass
class CheckpointList:
    """The checkpoints of a run folder, oldest first."""

    folder: Path
    run: str
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, run: str) -> "CheckpointList":
        """Read the list; an absent file is an empty list.

        Raises:
            ConfigError: if the folder belongs to a run of another name.
            CheckpointError: if the list cannot be read.
        """
        path = folder / LIST_FILE
        try:
            stored = read_json(path)
            entries = {name: Entry(**values) for name, values in stored["checkpoints"].items()}
            owner = stored["run"]
        except FileNotFoundError:
            return cls(folder, run)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); move it away, or use --fresh") from error
        if owner != run:
            raise ConfigError(
                f"run.output_dir {folder}: holds the run '{owner}', this run is called '{run}'; choose another folder"
            )
        return cls(folder, run, entries)

    def write(self) -> None:
        """Replace the file."""
        entries = {name: vars(entry) for name, entry in self.entries.items()}
        write_json(self.folder / LIST_FILE, {"run": self.run, "checkpoints": entries})

    def add(self, name: str, entry: Entry, others: Mapping[str, str] | None = None) -> None:
        """Append a checkpoint and write the list.

        Args:
            others: further names of it, with their kinds; they come before ``name``. Names that meant its files before they
                were written again are dropped.
        """
        files = {entry.model, entry.ema, entry.state} - {""}
        own = {**{other: replace(entry, kind=kind) for other, kind in (others or {}).items()}, name: entry}
        kept = {
            other: old
            for other, old in self.entries.items()
            if other not in own and (old.step == entry.step or not files & {old.model, old.ema, old.state})
        }
        self.entries = {**kept, **own}
        self.write()

    def keep_former_end(self, step: int) -> list[str]:
        """Give the final checkpoint a name among those on the way, where a run goes on from it: the next one takes its files' names.

        Weights get a second name, the state moves. One that was not due on the way is kept as that of its step. After a crash in
        here, the next call does what is left.

        Args:
            step: updates done.

        Returns:
            The new names of its weights.
        """
        final = self.entries.get("final")
        if final is None or final.step != step:
            return []
        on_the_way = {
            name: entry
            for name, entry in self.entries.items()
            if entry.kind in ("step", "epoch") and entry.step == step
        }
        due = on_the_way or {f"step_{step}": replace(final, kind="step")}
        state, names = "", []
        for entry in due.values():
            stem = stem_on_the_way(self.run, entry.kind, entry.step, entry.epoch)
            state = state or (f"{stem}-state" if entry.state else "")
            for part, ending in (("model", ".safetensors"), ("ema", "_ema.safetensors")):
                source = self.folder / getattr(entry, part)
                if source.is_file() and source.name != stem + ending:
                    _second_name(source, self.folder / (stem + ending))
                    setattr(entry, part, stem + ending)
                    names += [entry.model] if part == "model" else []
            entry.state = state
        if final.state and (self.folder / final.state).is_dir() and not (self.folder / state).exists():
            (self.folder / final.state).replace(self.folder / state)
        final.state = ""
        others = {name: entry for name, entry in self.entries.items() if name != "final"}
        self.entries = {**others, **due, "final": final}
        self.write()
        return names

    def adopt(self) -> None:
        """List checkpoints on the way that a killed start wrote and did not list, or unlisted and did not remove.

        Their files are complete, since they were renamed into place; listed, they are pruned like all others.
        """
        pattern = re.compile(
            rf"{re.escape(self.run)}-(?:step(\d{{8}})|(\d{{6}}))(_ema\.safetensors|\.safetensors|-state)"
        )
        parts = {".safetensors": "model", "_ema.safetensors": "ema", "-state": "state"}
        listed = {getattr(entry, part) for entry in self.entries.values() for part in parts.values()}
        found: dict[str, Entry] = {}
        for path in sorted(self.folder.iterdir()):
            match = pattern.fullmatch(path.name)
            if match and path.name not in listed:
                step, epoch = int(match[1] or 0), int(match[2] or 0)
                name, kind = (f"step_{step}", "step") if match[1] else (f"epoch_{epoch}", "epoch")
                entry = found.setdefault(name, self.entries.get(name) or Entry(step, epoch, kind))
                setattr(entry, parts[match[3]], path.name)
        if found:
            self.entries = {**found, **self.entries}
            self.write()

    def prune(self, kind: str, keep: int | None, fresh: str = "") -> None:
        """Remove all but the newest ``keep`` checkpoints of a kind; None or 0 keeps all.

        Args:
            fresh: one that was just written; it stays even where a start that went on behind a broken state finds later ones.
        """
        names = [name for name, entry in self.entries.items() if entry.kind == kind]
        surplus = sorted(names, key=lambda name: self.entries[name].step)[: -keep if keep else 0] if keep else []
        surplus = [name for name in surplus if name != fresh]
        if not surplus:
            return
        removed = [self.entries.pop(name) for name in surplus]
        self.write()
        used = {getattr(e, part) for e in self.entries.values() for part in ("model", "ema", "state")}
        for entry in removed:
            for part in (entry.model, entry.ema, entry.state):
                if part and part not in used:
                    _remove(self.folder / part)

    def prune_states(self, keep: int | None, fresh: str = "") -> None:
        """Remove the states of all but the newest ``keep`` steps that have some, and leave their weights; None or 0 keeps all.

        Args:
            fresh: see `prune`.
        """
        steps = sorted({entry.step for entry in self.entries.values() if entry.state})
        old = set(steps[:-keep] if keep else []) - {entry.step for name, entry in self.entries.items() if name == fresh}
        surplus = {entry.state for entry in self.entries.values() if entry.state and entry.step in old}
        if not surplus:
            return
        for entry in self.entries.values():
            if entry.state in surplus:
                entry.state = ""
        # A state that was imported had no weights beside it.
        self.entries = {name: entry for name, entry in self.entries.items() if entry.model or entry.state}
        self.write()
        for name in surplus:
            _remove(self.folder / name)


def stem_on_the_way(run: str, kind: str, step: int, epoch: int) -> str:
    """Start of the file names of a checkpoint on the way."""
    return f"{run}-step{step:08d}" if kind == "step" else f"{run}-{epoch:06d}"


def _second_name(source: Path, target: Path) -> None:
    """Let a file have another name too; a copy where the file system has no such links."""
    if not link_file(source, target):
        replace_file(target, partial(shutil.copyfile, source))


def peek_state(config: RunConfig) -> dict[str, Any] | None:
    """Plain data of the state that a start would go on from, without verifying it; None where there is none."""
    begin = config.resume.from_
    if begin == "none":
        return None
    if begin == "auto":
        found = find_states(config.output_dir, config.run.name)
        folder = found[0][1] if found else None
    else:
        folder = config.locate(begin)
    try:
        values = read_json(folder / "state.json") if folder else None
    except (OSError, ValueError):
        return None  # said by name where it is read
    return values if isinstance(values, dict) and {"step", "ema_updates", "config"} <= set(values) else None


def refuse_second_branch(config: RunConfig) -> None:
    """Two branches of a run in one folder would overwrite and prune each other's checkpoints.

    Raises:
        ConfigError: if `resume.from` names a beginning before what the run's folder holds, or if a finished run has no state to
            go on from.
    """
    begin, step = config.resume.from_, 0
    if begin == "auto":
        if not find_states(config.output_dir, config.run.name):
            refuse_new_start(config)
        return
    if begin != "none":
        state = peek_state(config)
        if state is None:
            return
        step = int(state["step"])
    entries = CheckpointList.read(config.output_dir, config.run.name).entries
    later = [name for name, entry in entries.items() if entry.step > step]
    if later:
        raise ConfigError(
            f'resume.from: "{begin}" begins at step {step}, and {config.output_dir} holds later checkpoints ({", ".join(later)}), '
            'which would be mixed up with the new ones. Write "auto" to continue from the newest, choose another run.output_dir '
            "(--fresh does) to branch off, or move them away"
        )


def refuse_new_start(config: RunConfig) -> None:
    """A run that has no state to continue from starts over, but never overwrites its own end.

    Raises:
        ConfigError: if the folder holds the final weights of the run.
    """
    final = CheckpointList.read(config.output_dir, config.run.name).entries.get("final")
    if final and (config.output_dir / final.model).exists():
        raise ConfigError(
            f"run.output_dir {config.output_dir}: holds the finished run '{config.run.name}' ({final.model}, step {final.step}) "
            "without a good state to continue from (save.state), and a new start would overwrite it. Use --fresh to start over in a new "
            "folder, or move it away"
        )


def tidy(
    folder: Path,
    run: str,
    keep_steps: int | None = None,
    keep_epochs: int | None = None,
    keep_states: int | None = None,
) -> None:
    """Bring a run folder into order after a killed start; call it only while holding the folder's lock.

    Temporary files go, complete checkpoints that are not listed are listed, and all are pruned as the run would.
    """
    for place in (folder, folder / "release", folder / "sample"):
        remove_leftovers(place)
    checkpoints = CheckpointList.read(folder, run)
    checkpoints.adopt()
    checkpoints.prune("step", keep_steps)
    checkpoints.prune("epoch", keep_epochs)
    checkpoints.prune_states(keep_states)


def _remove(path: Path) -> None:
    if path.is_dir():
        # Renamed first, so that a state that is being removed never looks like a good one.
        grave = temporary_path(path.with_name(f"{path.name}.old"))
        path.replace(grave)
        shutil.rmtree(grave)
    else:
        path.unlink(missing_ok=True)


def save_weights(
    path: Path, tensors: dict[str, Tensor], dtype: str, metadata: dict[str, str], exact: Collection[str] = ()
) -> None:
    """Write a weight file; floating tensors of at least one axis are cast to ``dtype``, but for those named in ``exact``."""
    wanted = getattr(torch, dtype)

    def cast_of(key: str, tensor: Tensor) -> Tensor:
        is_cast = tensor.is_floating_point() and tensor.ndim and key not in exact
        return (tensor.detach().to("cpu", wanted) if is_cast else tensor.detach().cpu()).contiguous()

    cast = {key: cast_of(key, tensor) for key, tensor in tensors.items()}
    replace_file(path, partial(save_tensors, separate(cast), metadata=metadata))


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them; one of two names is copied."""
    seen: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        found[key] = plain.clone() if place in seen else plain
        seen.add(place)
    return found


@dataclass
class TrainingState:
    """Everything that must survive a restart, on the CPU.

    Attributes:
        model, ema, optimizer: tensors by name. values: plain data (step, epoch, position, counters, config, environment).
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    values: dict[str, Any]


def write_state(folder: Path, state: TrainingState) -> None:
    """Write a state folder completely or not at all; an older one of the same name is replaced."""
    beside = temporary_path(folder)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        parts = {"model": state.model, "ema": state.ema, "optimizer": state.optimizer}
        for name, tensors in parts.items():
            if tensors:
                save_tensors(separate(tensors), beside / f"{name}.safetensors")
                fault_point(f"state.{name}")
        (beside / "state.json").write_text(json.dumps({"format": STATE_FORMAT, **state.values}), encoding="utf-8")
        hashes = {path.name: hash_file(path) for path in sorted(beside.iterdir())}
        (beside / "manifest.json").write_text(json.dumps(hashes, indent=2), encoding="utf-8")
        for path in beside.iterdir():
            sync_path(path)
        sync_path(beside)
        fault_point("state.written")
        # An older state of this name steps aside under a name that is still found, so that one is always there.
        older = folder.with_name(f"{folder.name.removesuffix('-state')}-old-state")
        if folder.exists():
            if older.exists():
                _remove(older)
            folder.replace(older)
            fault_point("state.aside")
        beside.replace(folder)
        sync_path(folder.parent)
        fault_point("state.renamed")
        if older.exists():
            _remove(older)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read_values(folder: Path) -> dict[str, Any]:
    """Verify a state folder and read its plain data.

    Raises:
        CheckpointError: if a file is missing, changed or of another format.
    """
    try:
        hashes = read_json(folder / "manifest.json")
        for name, expected in hashes.items():
            if hash_file(folder / name) != expected:
                raise CheckpointError(f"{folder}: {name} does not match its manifest")
        unnamed = {path.name for path in folder.iterdir()} - {"manifest.json", *hashes}
        if unnamed:
            raise CheckpointError(f"{folder}: its manifest does not name {', '.join(sorted(unnamed))}")
        values = read_json(folder / "state.json")
        if values["format"] != STATE_FORMAT:
            raise CheckpointError(f"{folder}: is of format {values['format']}, this version reads {STATE_FORMAT}")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder}: is not a complete state ({type(error).__name__}: {error})") from error
    return values


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one part of a state, in memory of their own; an absent part is empty."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        return {}
    with safe_open(str(path), "pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a mapping)


def find_states(folder: Path, run: str) -> list[tuple[int, Path]]:
    """Complete-looking states of a run, newest first, as (step, folder)."""
    found = []
    for path in folder.glob(f"{_glob_escape(run)}*-state"):
        if path.name.startswith(TEMPORARY_PREFIX) or not path.is_dir():
            continue
        try:
            found.append((int(read_json(path / "state.json")["step"]), path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is not a readable state (%s); it is left alone", path, error)
    return sorted(found, key=lambda pair: (-pair[0], pair[1].name))


def _glob_escape(text: str) -> str:
    return glob.escape(text)


def newest_good_state(folder: Path, run: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest state whose manifest holds; broken ones are skipped with a warning."""
    for _, path in find_states(folder, run):
        try:
            return path, read_values(path)
        except CheckpointError as error:
            logger.warning("%s; trying an older state", error)
    return None


def former_end(config: RunConfig, state: Mapping[str, Any]) -> int | None:
    """Update at which the schedule ended that a state was made with; None if an earlier version did not record it.

    Args:
        state: plain data of the state.
    """
    known = state.get("schedule_end") or state["config"].get("scheduler.total_steps")
    if known is None:
        final = CheckpointList.read(config.output_dir, config.run.name).entries.get("final")
        known = final.step if final and final.step == state["step"] else None
    return known
