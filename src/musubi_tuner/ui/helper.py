"""What the page asks that needs torch or a tokenizer, asked in a process of its own: the server imports no torch. See `helper_process`."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from musubi_tuner.errors import ConfigError

ANSWER_SECONDS = 300.0
COLUMNS = "120"


class Helper:
    """The server's end. One question is answered at a time; others wait.

    Args:
        folder: from which relative paths are meant. environment: of the process.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, dict(environment)
        self._process: subprocess.Popen[str] | None = None
        self._one_at_a_time = threading.Lock()

    def ask(self, what: str, **values: Any) -> Any:
        """The answer to a question; see `helper_process.ANSWERS`.

        Raises:
            ConfigError: if there is none, in words for the person.
        """
        with self._one_at_a_time:
            for _ in range(2):  # one that was idle may just have ended
                answer = self._answer(json.dumps({"what": what, **values}) + "\n")
                if answer:
                    found = json.loads(answer)
                    if "problem" in found:
                        raise ConfigError(found["problem"])
                    return found["answer"]
        raise ConfigError("the process that computes this ended without an answer; the terminal of the page says more")

    def _answer(self, question: str) -> str:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(question)
            process.stdin.flush()
        except OSError:
            self.end()
            return ""
        late = threading.Event()

        def stop() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(ANSWER_SECONDS, stop)
        timer.start()
        try:
            answer = process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            self.end()
            raise ConfigError(
                f"it took more than {ANSWER_SECONDS:.0f} s; ask for it in a terminal: train.py RUN.toml --plan"
            )
        return answer

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "musubi_tuner.ui.helper_process"],
                cwd=self.folder,
                env={**self.environment, "COLUMNS": COLUMNS},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        return self._process

    def end(self) -> None:
        """End the process, if it runs."""
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def _kill(process: "subprocess.Popen[str]") -> None:
    """End a process with the one that is answering for it."""
    with suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
