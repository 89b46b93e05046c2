"""Upload of checkpoints to the hub, beside the training.

Every upload is a process of its own: it cannot slow the training down, a wrong answer of the server cannot hang it, and
a time limit can end it. Failures are reported and never stop a run.
"""

import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

from musubi_tuner.config.schema import HubSection

logger = logging.getLogger(__name__)
_ATTEMPTS = 3


class HubUploader:
    """Uploads files in the order they are given, on the main process.

    Args:
        settings: [hub]. run: name of the run, the folder below checkpoint_runs/ unless settings name one.
    """

    def __init__(self, settings: HubSection, run: str) -> None:
        assert settings.repo_id is not None
        self.settings = settings
        self.folder = f"checkpoint_runs/{settings.run_name or run}"
        self.uploaded, self.failed = 0, 0
        self._queue: queue.Queue[tuple[str, list[tuple[Path, str]]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="hub-upload", daemon=True)
        self._thread.start()

    def upload(self, message: str, files: list[Path], *, to_root: dict[str, Path] | None = None) -> None:
        """Queue one commit: files below the run's folder, and ``to_root`` (name -> file) at the root."""
        pairs = [(path, f"{self.folder}/{path.name}") for path in files]
        pairs += [(path, name) for name, path in (to_root or {}).items()]
        self._queue.put((message, pairs))

    def close(self) -> None:
        """Wait for what is queued, each upload no longer than its limit."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            message, pairs = job
            gone = [path.name for path, _ in pairs if not path.exists()]
            if gone:
                logger.warning("hub: %s: %s was removed before its turn and is left out", message, ", ".join(gone))
            if self._attempt(message, [pair for pair in pairs if pair[0].exists()]):
                self.uploaded += 1
            else:
                self.failed += 1

    def _mask(self, text: str) -> str:
        """A message without access tokens, which a server or a library may repeat."""
        for token in (self.settings.token, os.environ.get("HF_TOKEN")):
            if token:
                text = text.replace(token, "***").replace(repr(token)[1:-1], "***")
        return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text)

    def _attempt(self, message: str, pairs: list[tuple[Path, str]]) -> bool:
        request = {
            "repo_id": self.settings.repo_id,
            "private": self.settings.private,
            "message": message,
            "files": [[str(path), name] for path, name in pairs],
        }
        environment = dict(os.environ)
        if self.settings.token:
            environment["HF_TOKEN"] = self.settings.token
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "musubi_tuner.training.hub"],
                    input=json.dumps(request),
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=self.settings.timeout_seconds,
                )
            except subprocess.TimeoutExpired:
                logger.warning(
                    "hub: %s: given up after %s seconds (hub.timeout_seconds)", message, self.settings.timeout_seconds
                )
                return False
            except OSError as error:
                logger.warning("hub: %s: cannot start the upload (%s)", message, error)
                return False
            if done.returncode == 0:
                logger.info("hub: %s: uploaded to %s", message, self.settings.repo_id)
                return True
            reason = self._mask((done.stderr.strip().splitlines() or ["no message"])[-1])
            logger.warning("hub: %s: attempt %s of %s failed: %s", message, attempt, _ATTEMPTS, reason)
        return False


def _upload(request: dict[str, object]) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    repo_id = str(request["repo_id"])
    api.create_repo(repo_id, private=bool(request["private"]), exist_ok=True)
    files = request["files"]
    assert isinstance(files, list)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for path, name in files]
    api.create_commit(repo_id, operations, commit_message=str(request["message"]))


def main() -> int:
    """Upload what standard input asks for; a failure is one line on standard error."""
    try:
        _upload(json.load(sys.stdin))
    except Exception as error:  # whatever the library raises, the training process wants one line of it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"{type(error).__name__}: {' '.join(lines[:2])}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
