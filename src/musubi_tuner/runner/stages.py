"""Running a stage as a child process whose memory is gone when it ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from musubi_tuner.runner.parent import child_environment


def override_arguments(overrides: Mapping[str, Any]) -> list[str]:
    """Command-line form of overrides, for a child."""
    import tomli_w

    words = []
    for key, value in overrides.items():
        text = (
            "none" if value is None else tomli_w.dumps({"v": value}, multiline_strings=False).partition("=")[2].strip()
        )
        if isinstance(value, str):
            text = value
        words += ["--set", f"{key}={text}"]
    return words


def run_child(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run ``python arguments...`` and return its exit code, 128 + n for a signal.

    The child is in a process group of its own: a Ctrl-C reaches this process only, which passes it on once; a second
    one ends the child at once. The child ends when this process does (its standard input is a pipe).
    """
    received: list[int] = []
    child = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        env={**child_environment(), **(environment or {})},
        start_new_session=True,
    )

    def forward(signum: int, frame: object) -> None:
        received.append(signum)
        if len(received) == 1:
            child.send_signal(signum)
        elif hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if child.stdin:
            child.stdin.close()
    if received:
        return 128 + received[0]
    return 128 - code if code < 0 else code
