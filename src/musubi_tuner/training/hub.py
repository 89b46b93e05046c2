"""Commits to a repository on the hub, beside the training.

A commit waits in a queue, and a thread gives one after the other to a process of its own: it cannot slow the training
down, a wrong answer of the server cannot hang it, a time limit can end it, and it ends with the program. Failures are
reported and never stop a run.

What waits is held by hard links in a temporary folder of the run: a checkpoint that is pruned, or a file that is replaced
meanwhile, goes up as it was. Where the file system has no links, the file itself waits, and is left out if it vanishes.

The queue is short. Of checkpoints the newest few wait; of all else one commit, which takes over what failed before.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from musubi_tuner.errors import keep_secret, mask_secrets
from musubi_tuner.files import encodable, read_json, temporary_path
from musubi_tuner.parent import child_environment, join_parent

if TYPE_CHECKING:  # every upload is a start of Python, which need not read the settings again
    from musubi_tuner.config.schema.hub import HubSection

logger = logging.getLogger(__name__)
Kind = Literal["checkpoint", "samples", "logs", "release"]
_ATTEMPTS = 3
_SLOWER = 4
"""Each pause between attempts is so many times as long as the one before."""
_WAITING_CHECKPOINTS = 2
_REFUSED = 2
"""Exit code of an upload that would fail the same way again."""


@dataclass
class Commit:
    """Files that go up together.

    Attributes:
        files: path in the repository -> local file.
        growing: the files are still written to; what is in them when their turn comes is copied and uploaded.
        holds: temporary folders of links and copies. reason: why it failed, if it did.
    """

    kind: Kind
    message: str
    files: dict[str, Path]
    growing: bool = False
    holds: list[Path] = field(default_factory=list)
    reason: str = ""

    def take_over(self, older: "Commit") -> None:
        """Add the files of an older commit; of two at one place in the repository, ours goes up."""
        self.files = {**older.files, **self.files}
        self.holds += older.holds


class HubUploader:
    """Uploads commits in the order they are given; used by the main process only.

    Args:
        settings: [hub]. folder: of the run, where files that wait are held.
        patient: any number of checkpoints may wait, and the end is waited for without a limit.

    Attributes:
        uploaded, failed: commits that arrived, and those that did not and that no later one took over.
    """

    def __init__(self, settings: "HubSection", folder: Path, *, patient: bool = False) -> None:
        assert settings.repo_id is not None
        keep_secret(settings.token)
        self.settings, self.patient = settings, patient
        self.uploaded: list[Commit] = []
        self.failed: list[Commit] = []
        self._hold = temporary_path(folder / "hub")
        self._numbers = count()
        self._waiting: list[Commit] = []
        self._current: Commit | None = None
        self._child: subprocess.Popen[str] | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="hub-upload", daemon=True)
        self._thread.start()

    def upload(self, kind: Kind, message: str, files: Mapping[str, Path | str], *, growing: bool = False) -> None:
        """Queue one commit.

        Args:
            files: path in the repository -> local file, or the text to write there.
            growing: see `Commit`.
        """
        hold = self._hold / str(next(self._numbers))
        commit = Commit(kind, message, {}, growing, [hold])
        try:
            hold.mkdir(parents=True)
            commit.files = {name: self._held(file, hold, growing) for name, file in files.items()}
        except OSError as error:
            with self._changed:
                self._fail(commit, f"its files cannot be held ({error})")
            return
        with self._changed:
            if kind != "checkpoint":
                for others in (self._waiting, self.failed):
                    for older in [other for other in others if other.kind == kind]:
                        others.remove(older)
                        commit.take_over(older)
            self._waiting.append(commit)
            checkpoints = [waiting for waiting in self._waiting if waiting.kind == "checkpoint"]
            for late in [] if self.patient else checkpoints[:-_WAITING_CHECKPOINTS]:
                self._waiting.remove(late)
                self._fail(late, "newer ones were saved before its turn; raise hub.every_steps or hub.every_epochs")
            self._changed.notify_all()

    @property
    def left(self) -> int:
        """Commits that wait or are under way."""
        with self._changed:
            return len(self._waiting) + (self._current is not None)

    def close(self) -> None:
        """Wait for what is left, up to the limit; what takes longer is given up."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        try:
            self._thread.join(None if self.patient else self.settings.finish_seconds)
        finally:
            self._given_up.set()
            with self._changed:
                for commit in self._waiting:
                    self._fail(commit, self._out_of_time)
                self._waiting.clear()
                if self._child is not None:
                    self._child.kill()
            self._thread.join()
            shutil.rmtree(self._hold, ignore_errors=True)

    @property
    def _out_of_time(self) -> str:
        return f"the run ended {self.settings.finish_seconds} seconds ago (hub.finish_seconds)"

    def _held(self, file: Path | str, hold: Path, growing: bool) -> Path:
        """What stands for a file while it waits."""
        held = hold / str(next(self._numbers))
        if isinstance(file, str):
            held.write_text(encodable(file), encoding="utf-8", newline="\n")
            return held
        if growing:
            return file
        try:
            os.link(file, held)
        except OSError:  # no links here, or no such file; which of the two is seen when its turn comes
            return file
        return held

    def _fail(self, commit: Commit, reason: str) -> None:
        """Keep a commit for the report, or give its files to the next of its kind; call it with the lock."""
        commit.reason = reason
        logger.warning("hub: %s is not uploaded: %s", commit.message, reason)
        newer = next((other for other in self._waiting if other is not commit and other.kind == commit.kind), None)
        if newer and commit.kind != "checkpoint":
            newer.take_over(commit)
            return
        self.failed.append(commit)
        if commit.kind == "checkpoint":
            _remove_holds(commit)

    # -- in the thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                commit = self._current = self._waiting.pop(0)
            try:
                reason = self._upload(commit)
            except Exception as error:  # whatever it is, the next commit is tried, and the training goes on
                reason = mask_secrets(f"{type(error).__name__}: {error}")
            with self._changed:
                self._current = None
                if reason:
                    self._fail(commit, reason)
                else:
                    logger.info("hub: %s: uploaded to %s", commit.message, self.settings.repo_id)
                    self.uploaded.append(commit)
                    _remove_holds(commit)

    def _upload(self, commit: Commit) -> str:
        """Try to upload a commit; returns why it failed, or nothing."""
        limit, pause = self.settings.timeout_seconds, self.settings.retry_seconds
        deadline = time.monotonic() + limit
        for attempt in range(1, _ATTEMPTS + 1):
            files = self._files(commit)
            if not files:
                return "its files were removed before its turn"
            try:
                code, reason = self._try(commit, files, deadline - time.monotonic())
            except subprocess.TimeoutExpired:
                return f"given up after {limit} seconds (hub.timeout_seconds)"
            if code == 0:
                return ""
            if self._given_up.is_set():
                return self._out_of_time
            if code == _REFUSED:
                return reason
            logger.warning("hub: %s: attempt %s of %s failed: %s", commit.message, attempt, _ATTEMPTS, reason)
            if attempt < _ATTEMPTS and self._given_up.wait(min(pause, max(deadline - time.monotonic(), 0))):
                return self._out_of_time
            pause *= _SLOWER
        return reason

    def _files(self, commit: Commit) -> dict[str, Path]:
        """The files of a commit that are there; copies of those that still grow."""
        gone = [name for name, path in commit.files.items() if not path.exists()]
        if gone:
            logger.warning("hub: %s: %s was removed before its turn and is left out", commit.message, ", ".join(gone))
            commit.files = {name: path for name, path in commit.files.items() if name not in gone}
        if not commit.growing:
            return commit.files
        copies = {name: commit.holds[0] / str(number) for number, name in enumerate(commit.files)}
        for name, copy in copies.items():
            shutil.copyfile(commit.files[name], copy)
        return copies

    def _try(self, commit: Commit, files: dict[str, Path], seconds: float) -> tuple[int, str]:
        """Upload in a process of its own; returns its exit code and the last line of what it said.

        Raises:
            subprocess.TimeoutExpired: after so many seconds.
        """
        request = commit.holds[0] / "request.json"
        values = {
            "repo_id": self.settings.repo_id,
            "private": self.settings.private,
            "message": commit.message,
            "files": {name: str(path.absolute()) for name, path in files.items()},
        }
        request.write_text(json.dumps(values), encoding="utf-8")
        environment = child_environment()
        if self.settings.token:
            environment["HF_TOKEN"] = self.settings.token
        with self._changed:
            if self._given_up.is_set():
                return 1, ""
            # Not in our process group: a Ctrl-C lets the training save, and the upload go on.
            self._child = child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(request)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="backslashreplace",
                start_new_session=True,
            )
        # `communicate` would close the pipe by which the child knows that we are here.
        pipe, child.stdin = child.stdin, None
        assert pipe is not None
        try:
            _, said = child.communicate(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise
        finally:
            pipe.close()
            with self._changed:
                self._child = None
        return child.returncode, mask_secrets((said.strip().splitlines() or ["no message"])[-1])


def _remove_holds(commit: Commit) -> None:
    for hold in commit.holds:
        shutil.rmtree(hold, ignore_errors=True)


def _send(request: dict[str, object]) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    repo_id = str(request["repo_id"])
    api.create_repo(repo_id, private=bool(request["private"]), exist_ok=True)
    files = request["files"]
    assert isinstance(files, dict)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    api.create_commit(repo_id, operations, commit_message=str(request["message"]))


def _advice(error: Exception) -> str | None:
    """What to do about a refusal that another attempt would meet again; None where one may help."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    if status in (401, 403):
        return "put a token with write access into HF_TOKEN"
    # A time-out, a commit of somebody else in between, or too many requests pass.
    return "the hub refuses it" if 400 <= status < 500 and status not in (408, 409, 412, 429) else None


def main() -> int:
    """Upload what a request file asks for; a failure is one line on standard error."""
    join_parent()
    try:
        _send(read_json(Path(sys.argv[1])))
    except Exception as error:  # whatever the library raises, the training process wants one line of it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text, advice = f"{type(error).__name__}: {' '.join(lines[:2])}", _advice(error)
        print(f"{text} ({advice})" if advice else text, file=sys.stderr)
        return _REFUSED if advice else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
