"""Runs of this machine, from what they leave in their folders; also those of a terminal. Torch-free.

The folders are the truth: pointers in the user's state folder say where they are, and nothing is kept here that a restart would lose.
"""

import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from musubi_tuner.errors import ConfigError
from musubi_tuner.run_record import CONSOLE, CONTROL, EXIT_FILE, REQUESTS, RUN_FILE, read_values, user_state_folder
from musubi_tuner.runner.steps import FILE as STEPS_FILE
from musubi_tuner.stopping import REPEAT_SECONDS
from musubi_tuner.ui.answers import Checkpoint, Log, NotThere, Run, RunDetail, Sample, StepState

CHECKPOINTS = "checkpoints.json"
RUNNING, LOST = "running", "lost"
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TEMP", "TMP", "USER", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SYSTEMROOT", "XDG_STATE_HOME",
             "XDG_CACHE_HOME", "MUSUBI_STATE_HOME", "PYTHONPATH")  # fmt: skip
"""Variables that a started run gets, beside those of CUDA, the hub and W&B."""
PREFIXES = ("CUDA_", "HF_", "WANDB_", "NVIDIA_", "TORCH_", "OMP_", "MKL_")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
PICTURES = ("sample", "drawn", "plots")
"""Folders of a run whose pictures are shown."""
SHEET = re.compile(r"samples_step_(\d+)\.\w+")
SINGLE = re.compile(r".*_(\d{8})_(\d{2})(?:_.*)?\.\w+")


@dataclass(frozen=True)
class Place:
    """A run. id: of its record. folder: of the run. config: its run file. directory: from which its relative paths are meant."""

    id: str
    folder: Path
    config: Path
    directory: Path


def places() -> list[Place]:
    """All runs whose folders are there, newest first."""
    found: list[tuple[float, Place]] = []
    for pointer in (user_state_folder() / "runs").glob("*.json"):
        values = read_values(pointer)
        folder = Path(str(values.get("folder", "")))
        if values and (folder / RUN_FILE).is_file():
            config = Path(str(values.get("config", "")))
            directory = read_values(folder / RUN_FILE).get("directory")
            place = Place(pointer.stem, folder, config, Path(str(directory)) if directory else project_of(config))
            started = values.get("started")
            found.append((float(started) if isinstance(started, int | float) else 0.0, place))
    return [place for _, place in sorted(found, key=lambda each: -each[0])]


def project_of(config: Path) -> Path:
    """Where a run file's relative paths are meant, if nobody knows: its folder, or the one that holds its folder toml."""
    return config.parent.parent if config.parent.name == "toml" else config.parent


def place_of(identity: str) -> Place:
    """A run by its id.

    Raises:
        ConfigError: if there is none.
    """
    found = next((place for place in places() if place.id == identity), None)
    if found is None:
        raise NotThere(f"{identity}: no such run")
    return found


def is_alive(pid: Any, started: Any) -> bool:
    """Whether a process is the one that began a run then: its number may have been given to another one since."""
    if not isinstance(pid, int) or pid <= 0 or not isinstance(started, int | float):
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = next(
            float(line.split()[1])
            for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines()
            if line.startswith("btime")
        )
        began = boot + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, StopIteration, IndexError, ValueError):
        return True  # a system without /proc
    return began <= started + 2 and fields[0] != "Z"


def summary(place: Place) -> Run:
    """How a run is: state, progress, times; see `run_record`."""
    run, ended = read_values(place.folder / RUN_FILE), read_values(place.folder / EXIT_FILE)
    state = ended.get("reason") or (RUNNING if is_alive(run.get("pid"), run.get("started")) else LOST)
    waiting = state == RUNNING and (place.folder / CONTROL / "stop").exists()
    keys = (
        "pid",
        "phase",
        "done",
        "total",
        "step",
        "steps",
        "loss",
        "seconds_left",
        "message",
        "started",
        "updated",
        "host",
        "part",
    )
    found = {key: run.get(key) for key in keys}
    return {
        "id": place.id,
        "name": run.get("name") if isinstance(run.get("name"), str) else place.folder.name,
        "folder": str(place.folder),
        "config": str(place.config),
        "state": "stopping" if waiting else state,
        "exit": {key: ended.get(key) for key in ("code", "signal", "message", "ended")} if ended else None,  # type: ignore[typeddict-item]
        **found,  # type: ignore[typeddict-item]
    }


def parts(place: Place) -> list[tuple[str, Path]]:
    """Name and folder of the steps of a run; one without a name where it has none."""
    steps = read_values(place.folder / STEPS_FILE).get("steps")
    if not isinstance(steps, list):
        return [("", place.folder)]
    return [
        (str(step.get("name", "")), place.folder / str(step.get("folder", "")))
        for step in steps
        if isinstance(step, dict)
    ]


def detail(place: Place) -> RunDetail:
    """A run with its steps, checkpoints, pictures and run file."""
    samples: list[Sample] = []
    checkpoints: list[Checkpoint] = []
    for name, folder in parts(place):
        texts = prompts(folder / "sample")
        for kind in PICTURES:
            for path in sorted((folder / kind).glob("*")):
                if path.suffix.lower() in IMAGES:
                    group, step = kind, None
                    if kind == "sample" and (sheet := SHEET.fullmatch(path.name)):
                        group, step = "all prompts", int(sheet[1])
                    elif kind == "sample" and (single := SINGLE.fullmatch(path.name)):
                        step, number = int(single[1]), int(single[2])
                        group = texts.get((step, number)) or f"prompt {number + 1}"
                    relative, time = path.relative_to(place.folder).as_posix(), path.stat().st_mtime
                    samples.append(
                        {"part": name, "name": path.name, "path": relative, "time": time, "group": group, "step": step}
                    )
        for entry, values in (read_values(folder / CHECKPOINTS).get("checkpoints") or {}).items():
            if isinstance(values, dict):
                keys = ("step", "epoch", "kind", "model", "ema", "metric", "value")
                checkpoints.append({"part": name, "name": entry, **{key: values.get(key) for key in keys}})  # type: ignore[typeddict-item]
    try:
        text = place.config.read_text(encoding="utf-8")
    except OSError:
        text = ""
    steps: list[StepState]
    steps = [{"name": name, "status": step.get("status"), "step": step.get("step")}
             for (name, _), step in zip(parts(place), read_values(place.folder / STEPS_FILE).get("steps") or [], strict=False)]  # fmt: skip
    return {
        **summary(place),
        "steps_of_file": steps,
        "samples": samples,
        "checkpoints": checkpoints,
        "toml": text,
        "draws": parts(place)[0][0] == "" and any(each["kind"] for each in checkpoints),
    }


def prompts(folder: Path) -> dict[tuple[int, int], str]:
    """Prompts of the samples in a folder, by update and number."""
    found = {}
    for path in folder.glob("prompts_step_*.txt"):
        step = path.stem.rpartition("_")[2]
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            number, colon, text = line.partition(": ")
            if colon and number.isdecimal() and step.isdecimal():
                found[int(step), int(number)] = text
    return found


def log_text(place: Place, offset: int, most: int) -> Log:
    """A piece of the console's log. offset: in bytes; negative counts from the end."""
    path = place.folder / CONSOLE
    try:
        size = path.stat().st_size
        begin = max(0, size + offset) if offset < 0 else min(offset, size)
        with path.open("rb") as file:
            file.seek(begin)
            data = file.read(most)
    except OSError:
        return {"text": "", "offset": 0, "size": 0}
    return {"text": data.decode("utf-8", "replace"), "offset": begin + len(data), "size": size}


def log_blocks(place: Place) -> Iterator[bytes]:
    """The console's log as it is now; what a live run adds meanwhile may be in it."""
    with (place.folder / CONSOLE).open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def picture(place: Place, relative: str) -> Path:
    """A picture of a run.

    Raises:
        ConfigError: for whatever is none, or lies outside.
    """
    try:
        wanted = (place.folder / relative).resolve()
        if wanted.is_relative_to(place.folder.resolve()) and wanted.suffix.lower() in IMAGES and wanted.is_file():
            return wanted
    except (OSError, ValueError, RuntimeError):  # names that are too long, null characters, links to themselves
        pass
    raise NotThere(f"{relative}: no such picture of this run")


def picture_facts(path: Path) -> dict[str, str]:
    """How a sample was drawn, from the text in its file; nothing where it has none."""
    try:
        with Image.open(path) as image:
            return {
                key: str(value)
                for key, value in image.info.items()
                if isinstance(key, str) and isinstance(value, str | int | float)
            }
    except (OSError, ValueError, SyntaxError):
        return {}


def request(place: Place, name: str) -> None:
    """Ask a run to stop, save or sample.

    Raises:
        ConfigError: if it does not run, or the request is none.
    """
    if name not in REQUESTS:
        raise ConfigError(f"{name}: a run can be asked to {', '.join(REQUESTS)}")
    if summary(place)["state"] not in (RUNNING, "stopping"):
        raise ConfigError(f"{place.folder.name}: does not run")
    (place.folder / CONTROL).mkdir(exist_ok=True)
    (place.folder / CONTROL / name).touch()


def options_of(place: Place) -> list[str]:
    """Options with which a run was started, secrets left out.

    Raises:
        ConfigError: if it runs, or its run file is gone.
    """
    if summary(place)["state"] in (RUNNING, "stopping"):
        raise ConfigError(f"{place.folder.name}: runs already")
    if not place.config.is_file():
        raise ConfigError(f"{place.config}: the run file is gone; start the run from a copy of it")
    options = read_values(place.folder / RUN_FILE).get("options")
    return [str(each) for each in options] if isinstance(options, list) else []


def end_now(place: Place) -> None:
    """End a run without saving: ask twice, as a person does who presses Ctrl-C twice.

    Raises:
        ConfigError: if it does not run, or not on this machine.
    """
    run = read_values(place.folder / RUN_FILE)
    if run.get("host") not in (None, platform.node()):
        raise ConfigError(f"{place.folder.name}: runs on {run['host']}; end it there")
    if not is_alive(run.get("pid"), run.get("started")):
        raise ConfigError(f"{place.folder.name}: does not run")
    for wait in (REPEAT_SECONDS + 0.2, 0.0):
        if not is_alive(run.get("pid"), run.get("started")):
            break
        os.kill(run["pid"], signal.SIGTERM)
        time.sleep(wait)


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """What a started run gets of this process's environment."""
    return {name: value for name, value in own.items() if name in PASSED_ON or name.startswith(PREFIXES)}


def start(snapshot: Path, log: Path, options: Sequence[str], folder: Path, secrets: Mapping[str, str]) -> int:
    """Start a run that does not depend on this process; its process id.

    Args:
        snapshot: the run file, which nobody changes any more. log: gets what it prints before the run has a log of its own.
        options: of train.py. folder: from which relative paths are meant. secrets: variables that it gets besides.
    """
    return launch(["musubi_tuner.runner", str(snapshot), *options], log, folder, secrets).pid


def launch(
    words: Sequence[str], log: Path, folder: Path, secrets: Mapping[str, str] = MappingProxyType({})
) -> "subprocess.Popen[bytes]":
    """A command of ours that goes on without this process.

    Args:
        words: its module and arguments. log: gets what it prints. folder, secrets: see `start`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=folder,
            env={**environment(os.environ), **secrets},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def wait_for(folder: Path, pid: int, seconds: float = 5.0) -> str | None:
    """The id of a run that has just been started, once it is recorded; None if it is not by then, or has ended."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        values = read_values(folder / RUN_FILE)
        if values.get("pid") == pid:
            return str(values.get("id"))
        if not is_alive(pid, time.time()):
            return None
        time.sleep(0.1)
    return None
