"""The record of a run for other programs, and requests to it. Torch-free.

    run.json            id, name, pid, start, directory (of its relative paths), options, phase, done and total of it, step and steps, loss,
                        seconds left; at most once a second. In a file of several steps the phase begins with the step
    exit.json           how this start ended: code, signal, reason (finished, stopped, failed), last step, message
    logs/console.log    what it printed, without the intermediate states of progress bars
    control/            a file named stop, save or sample is a request, taken between two updates

All of them lie in the run folder. So that a page finds runs, ``<user's state folder>/musubi-tinyflux/runs/<id>.json`` names the
folder of each. The process that a person started writes first; its children learn the folder from their environment and go on.
A program that is no run, such as a cache job of its own, records nothing.
"""

import json
import math
import os
import platform
import secrets
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from musubi_tuner.files import json_text, read_json, temporary_path

RUN_FILE, EXIT_FILE = "run.json", "exit.json"
CONSOLE = Path("logs") / "console.log"
CONTROL = "control"
REQUESTS = ("stop", "save", "sample")
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
_VARIABLE = "MUSUBI_RUN_FOLDER"
_SECONDS = 1.0
"""Between two writes of run.json, and between two looks into control."""
_recorder: "Recorder | None" = None


class Recorder:
    """The record of one start of a run.

    Args:
        values: of the start; absent = those that run.json has, of a start that this process belongs to.
    """

    def __init__(self, folder: Path, values: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.values: dict[str, Any] = values if values is not None else read_values(folder / RUN_FILE)
        self._written = self._looked = -math.inf

    def tell(self, **values: Any) -> None:
        """Note how far the run is; written at once when the phase changes.

        Args:
            values: entries of run.json. A new phase forgets what the last one had done.
        """
        if "phase" in values and self.values.get("part"):
            values["phase"] = f"{self.values['part']}: {values['phase']}"
        changed = "phase" in values and values["phase"] != self.values.get("phase")
        if changed:
            self.values |= {"done": None, "total": None, "message": None}
        self.values |= values
        now = time.monotonic()
        complete = "done" in values and values["done"] == values.get("total")
        if changed or complete or now - self._written >= _SECONDS:
            self._written = now
            self.write()

    def write(self) -> None:
        """Replace run.json. A failed write does not end the run."""
        _write(self.folder / RUN_FILE, {**self.values, "updated": round(time.time(), 3)})

    def requests(self, names: Collection[str] = REQUESTS) -> set[str]:
        """Requests of these names in control/, which are removed; looks at most once a second."""
        now = time.monotonic()
        if now - self._looked < _SECONDS:
            return set()
        self._looked = now
        return take_requests(self.folder, names)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a small file of the record, without waiting for the disk: what it says is of this moment. Errors are ignored."""
    beside = temporary_path(path)
    with suppress(OSError):
        beside.write_text(json_text(values, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
    with suppress(OSError):
        beside.unlink(missing_ok=True)


def read_values(path: Path) -> dict[str, Any]:
    """What a small file of a record says; nothing where it cannot be read."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def take_requests(folder: Path, names: Collection[str] = REQUESTS) -> set[str]:
    """Which of these requests are in a run folder; they are removed."""
    found = set()
    for name in names:
        with suppress(OSError):
            (folder / CONTROL / name).unlink()
            found.add(name)
    return found


def begin(folder: Path, config: Path, name: str, options: Sequence[str] = ()) -> Recorder:
    """Begin the record of a start; requests that came before it are dropped.

    Args:
        folder: of the run, which this process has locked. config: its run file. name: of the run. options: of the command line.
    """
    global _recorder
    before = read_values(folder / RUN_FILE)
    identity = before.get("id") if isinstance(before.get("id"), str) else secrets.token_hex(8)
    with suppress(OSError):
        (folder / CONTROL).mkdir(exist_ok=True)
    take_requests(folder)
    (folder / EXIT_FILE).unlink(missing_ok=True)
    now = round(time.time(), 3)
    _recorder = Recorder(
        folder,
        {
            "id": identity,
            "name": name,
            "pid": os.getpid(),
            "host": platform.node(),
            "config": str(config.absolute()),
            "directory": str(Path.cwd()),
            "options": list(options),
            "started": now,
        },
    )
    _recorder.write()  # what an earlier start told is no longer true
    os.environ[_VARIABLE] = str(folder.absolute())
    with suppress(OSError):
        runs = user_state_folder() / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        _write(
            runs / f"{identity}.json",
            {"folder": str(folder.absolute()), "config": str(config.absolute()), "started": now},
        )
    log_console()
    return _recorder


def end(code: int, reason: str, *, signum: int | None = None, message: str | None = None) -> None:
    """Write exit.json.

    Args:
        reason: finished, stopped or failed. signum: of the signal that asked to stop. message: why it failed.
    """
    global _recorder
    if _recorder is None:
        return
    known = {**_recorder.values, **read_values(_recorder.folder / RUN_FILE)}  # a child may have been further
    values = {"id": known.get("id"), "code": code, "reason": reason, "signal": signum, "step": known.get("step")}
    _write(_recorder.folder / EXIT_FILE, {**values, "message": message, "ended": round(time.time(), 3)})
    _recorder.values = {**known, "phase": reason}
    _recorder.write()
    _recorder = None
    os.environ.pop(_VARIABLE, None)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, _Copied):
            setattr(sys, name, stream.original)


def recorder() -> Recorder | None:
    """The record of the run that this process belongs to; None if it belongs to none."""
    global _recorder
    if _recorder is None and _VARIABLE in os.environ:
        _recorder = Recorder(Path(os.environ[_VARIABLE]))
    return _recorder


def tell(**values: Any) -> None:
    """See `Recorder.tell`; does nothing outside of a run."""
    current = recorder()
    if current is not None:
        current.tell(**values)


def was_stopped(folder: Path) -> bool:
    """Whether a child of this start ended because control asked it to."""
    return bool(read_values(folder / RUN_FILE).get("stopped"))


def user_state_folder() -> Path:
    """Where pointers to runs lie: MUSUBI_STATE_HOME, or the system's folder for the state of programs."""
    own = os.environ.get("MUSUBI_STATE_HOME")
    if own:
        return Path(own)
    base = os.environ.get("XDG_STATE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return Path(base or Path.home() / ".local" / "state") / "musubi-tinyflux"


def finite_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a line of JSON: NaN and infinities are null, and ``not_finite`` lists their tags."""
    lost = [tag for tag, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    plain = {tag: None if tag in lost else value for tag, value in values.items()}
    return {**plain, "not_finite": lost} if lost else plain


# -- the console -------------------------------------------------------------------------------------------------------


class _Copied:
    """A standard stream whose finished lines go to a file too."""

    def __init__(self, stream: TextIO, log: "_Log") -> None:
        self.original = stream
        self._log = log
        self._line = ""

    def write(self, text: str) -> int:
        """As the stream itself; a carriage return begins the line anew."""
        count = self.original.write(text)
        *lines, rest = (self._line + text).split("\n")
        self._log.add(line.rpartition("\r")[2] for line in lines)
        self._line = rest.rpartition("\r")[2]
        return count

    def writelines(self, lines: Iterable[str]) -> None:
        """As the stream itself."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


class _Log:
    """The file of all lines, to which several processes append."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def add(self, lines: Iterable[str]) -> None:
        """Append lines; what cannot be written is dropped."""
        text = "".join(f"{line}\n" for line in lines)
        if text:
            with suppress(OSError):
                os.write(self._descriptor, text.encode("utf-8", "backslashreplace"))


def log_console() -> None:
    """Copy what this process prints into the log of the run that it belongs to, if it does. A second call does nothing."""
    folder = os.environ.get(_VARIABLE)
    if folder is None or isinstance(sys.stdout, _Copied):
        return
    with suppress(OSError):
        log = _Log(Path(folder) / CONSOLE)
        sys.stdout = _Copied(sys.stdout, log)  # type: ignore[assignment]  # prints and flushes like a stream
        sys.stderr = _Copied(sys.stderr, log)  # type: ignore[assignment]


def json_line(step: int, values: Mapping[str, Any], clock: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl."""
    return json.dumps({"step": step, **finite_values(values), "clock": finite_values(clock)}, allow_nan=False) + "\n"
