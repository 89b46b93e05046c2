"""Running a stage, or the processes of a training, as children whose memory is gone when they end."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from musubi_tuner.config.command_line import secret_keys
from musubi_tuner.runner.parent import child_environment
from musubi_tuner.stopping import Repeats, stop_signals

_STOPPED = {128 + int(number) for number in stop_signals()}
"""Exit codes of a child that was asked to stop."""
_POLL_SECONDS = 0.1


def override_arguments(overrides: Mapping[str, Any]) -> list[str]:
    """Command-line form of overrides, for a child; secrets go another way, see `secret_environment`."""
    import tomli_w

    words, secrets = [], secret_keys()
    for key, value in overrides.items():
        if key in secrets:
            continue
        text = (
            "none" if value is None else tomli_w.dumps({"v": value}, multiline_strings=False).partition("=")[2].strip()
        )
        if isinstance(value, str):
            text = value
        words += ["--set", f"{key}={text}"]
    return words


def run_child(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run ``python arguments...`` and return its exit code, 128 + n for a signal; see `run_children`."""
    return run_children(arguments, [environment or {}])


def run_children(arguments: Sequence[str], environments: Sequence[Mapping[str, str]], patience: float = 10.0) -> int:
    """Run ``python arguments...`` once per environment, side by side.

    Each child is in a process group of its own: a signal reaches this process only, which passes it on once and waits as
    long as the children take; a second one ends them at once. Children end when this process does (their standard input
    is a pipe). If one fails, the others, which can only wait for it, are ended.

    Args:
        patience: seconds for the others to end by themselves when one has failed.

    Returns:
        Exit code of the first that failed, 128 + n for a signal; 0 if none did.
    """
    received: list[int] = []
    repeats = Repeats()
    children = [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            env={**child_environment(), **environment},
            start_new_session=True,
        )
        for environment in environments
    ]

    def forward(signum: int, frame: object) -> None:
        count = repeats.count()
        if count == 1:
            received.append(signum)
            for child in children:
                child.send_signal(signum)
        elif count == 2:
            _kill(children)

    previous = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        code = _wait(children, patience)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for child in children:
            if child.stdin:
                child.stdin.close()
    return 128 + received[0] if received else code


def _wait(children: Sequence["subprocess.Popen[bytes]"], patience: float) -> int:
    """Wait for all children; returns the exit code of the first that failed, or 0."""
    failed, give_up = 0, math.inf
    while True:
        running = [child for child in children if child.poll() is None]
        failed = failed or next((child.returncode for child in children if child.returncode), 0)
        if not running:
            return 128 - failed if failed < 0 else failed
        if failed and failed not in _STOPPED:
            give_up = min(give_up, time.monotonic() + patience)
        if time.monotonic() > give_up:
            _kill(running)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0].wait(_POLL_SECONDS)


def _kill(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    for child in children:
        if child.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(child.pid, signal.SIGKILL)
            else:
                child.kill()
