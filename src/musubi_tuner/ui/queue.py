"""Run files that wait for their turn: one runs at a time, in an order that can be changed. Torch-free.

Each is a file of its own in the queue's folder, so a restart of the server loses nothing; an edit of the config after it was queued changes nothing.
"""

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from musubi_tuner.config import RunConfig, load_documents
from musubi_tuner.errors import ConfigError, UserError
from musubi_tuner.files import read_json, write_json, write_text
from musubi_tuner.run_record import RUN_FILE, read_values
from musubi_tuner.runner.steps import root_of
from musubi_tuner.ui import runs
from musubi_tuner.ui.answers import NotThere, QueueAnswer, Queued, QueueState
from musubi_tuner.ui.configs import from_toml

PAUSED = "paused"
"""File in the queue's folder while nothing is to be started."""
WAITING: QueueState = "waiting"
STARTED: QueueState = "started"
ENDED: QueueState = "ended"


@dataclass
class Entry:
    """One run file of the queue.

    Attributes:
        number: its own. place: in the order. name: of the run. state: waiting, started or ended. run: id of the run that it became.
        folder: of that run. since: when the state changed. reason: why it could not be started, or how its run ended.
    """

    number: int
    name: str
    place: int = 0
    state: QueueState = "waiting"
    run: str | None = None
    folder: str = ""
    pid: int = 0
    since: float = 0.0
    reason: str = ""


def folder_of(config: RunConfig, directory: Path) -> Path:
    """The folder in which a run is recorded: that of all its steps, where it has some."""
    folder = root_of(config) if config.step is not None else config.output_dir
    return folder if folder.is_absolute() else directory / folder


class Queue:
    """The queue of a project.

    Args:
        folder: where its files lie. project: from which relative paths of run files are meant. secrets: variables of its runs.
    """

    def __init__(self, folder: Path, project: Path, secrets: Mapping[str, str]) -> None:
        self.folder, self.project, self.secrets = folder, project, secrets
        self._one_at_a_time = threading.RLock()

    def entries(self) -> list[Entry]:
        """All of them, in order."""
        found = []
        for path in self.folder.glob("*.json"):
            try:
                entry = Entry(**read_json(path))
            except (OSError, UserError, TypeError):
                continue  # not ours
            if isinstance(entry.number, int) and isinstance(entry.place, int):
                found.append(entry)
        return sorted(found, key=lambda entry: (entry.place, entry.number))

    def text_of(self, number: int) -> Path:
        """Where the run file of an entry lies."""
        return self.folder / f"{number:05d}.toml"

    def add(self, text: str) -> Entry:
        """Queue a run file.

        Raises:
            ConfigError: if it is wrong.
        """
        config = load_documents(from_toml(text))[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._one_at_a_time:
            there = self.entries()
            number = max((entry.number for entry in there), default=0) + 1
            place = max((entry.place for entry in there), default=0) + 1
            write_text(self.text_of(number), text)
            entry = Entry(number, config.run.name, place, since=time.time())
            self._write(entry)
        return entry

    def remove(self, number: int) -> None:
        """Take out an entry that does not run.

        Raises:
            ConfigError: if there is none, or it runs.
        """
        with self._one_at_a_time:
            entry = self._entry(number)
            if entry.state == STARTED:
                raise ConfigError(f"{entry.name}: runs; stop the run instead")
            for path in (self.text_of(number), self._log(number), self._path(number)):
                path.unlink(missing_ok=True)

    def move(self, number: int, up: bool) -> None:
        """Change places with the waiting entry before or after.

        Raises:
            ConfigError: if there is none.
        """
        with self._one_at_a_time:
            waiting = [entry.number for entry in self.entries() if entry.state == WAITING]
            if number not in waiting:
                raise NotThere(f"{number}: no such entry waits in the queue")
            place = waiting.index(number) + (-1 if up else 1)
            if not 0 <= place < len(waiting):
                return
            one, two = self._entry(number), self._entry(waiting[place])
            one.place, two.place = two.place, one.place
            self._write(one)
            self._write(two)

    @property
    def paused(self) -> bool:
        """Whether nothing is to be started for now; what runs goes on."""
        return (self.folder / PAUSED).exists()

    def pause(self, on: bool) -> None:
        """Pause, or go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if on:
            (self.folder / PAUSED).touch()
        else:
            (self.folder / PAUSED).unlink(missing_ok=True)

    def turn(self) -> None:
        """See how the run is that was started, and start the next one where none runs."""
        with self._one_at_a_time:
            for entry in self.entries():
                if entry.state != STARTED:
                    continue
                state = self._state(entry)
                if state is None:
                    return
                entry.state, entry.reason, entry.since = ENDED, state, time.time()
                self._write(entry)
            following = next((entry for entry in self.entries() if entry.state == WAITING), None)
            if following is not None and not self.paused:
                self._start(following)

    def _state(self, entry: Entry) -> str | None:
        """How a started run has ended; None while it goes on."""
        if entry.run is None:
            values = read_values(Path(entry.folder) / RUN_FILE)
            if values.get("pid") == entry.pid:
                entry.run = str(values.get("id"))
                self._write(entry)
            elif runs.is_alive(entry.pid, entry.since):
                return None
            else:
                return _last_line(self._log(entry.number))
        try:
            found = runs.summary(runs.place_of(entry.run))
        except ConfigError:
            return "its folder is gone"
        if found["state"] in (runs.RUNNING, "stopping"):
            return None
        message = found["exit"]["message"] if found["exit"] else None
        return f"{found['state']}: {message}" if message else str(found["state"])

    def _start(self, entry: Entry) -> None:
        path = self.text_of(entry.number)
        entry.since = time.time()
        try:
            entry.folder = str(folder_of(load_documents(from_toml(path.read_text(encoding="utf-8")))[0], self.project))
            entry.pid = runs.start(path, self._log(entry.number), [], self.project, self.secrets)
            entry.state, entry.since = STARTED, time.time()
        except (UserError, OSError) as problem:
            entry.state, entry.reason = ENDED, str(problem)
        self._write(entry)

    def _log(self, number: int) -> Path:
        return self.folder / f"{number:05d}.log"

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"

    def _entry(self, number: int) -> Entry:
        found = next((entry for entry in self.entries() if entry.number == number), None)
        if found is None:
            raise NotThere(f"{number}: no such entry of the queue")
        return found

    def _write(self, entry: Entry) -> None:
        write_json(self._path(entry.number), asdict(entry))

    def as_data(self) -> QueueAnswer:
        """The queue for the page."""
        entries: list[Queued] = [
            {"number": each.number, "name": each.name, "state": each.state, "run": each.run, "reason": each.reason}
            for each in self.entries()
        ]
        return {"paused": self.paused, "entries": entries}


def _last_line(log: Path) -> str:
    """What a run said last that ended before it had a record."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    found = re.sub(r"\s+", " ", lines[-1]) if lines else ""
    return f"failed: {found}" if found else "failed at once"
