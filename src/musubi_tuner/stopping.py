"""Signals that ask a program to stop: Ctrl-C, SIGTERM, and SIGHUP when a terminal closes. Torch-free.

A command unwinds its stack (`exit_on_terminate`). Training must not: the update is finished and a state is saved first, so
there a signal becomes a request that is read between updates (`StopRequest`).

One request can arrive several times: a terminal signals the whole process group, a service manager every process, and the
launcher passes on what it gets. So what follows within `REPEAT_SECONDS` is the same request.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any

from musubi_tuner.errors import Interrupted

REPEAT_SECONDS = 1.0
"""Signals that come within this time after the first belong to it."""
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_active: "StopRequest | None" = None


def stop_signals() -> list[signal.Signals]:
    """Signals that ask to stop; one that was ignored when the process began (SIGHUP under nohup) is left alone."""
    found = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [number for number in found if signal.getsignal(number) is not signal.SIG_IGN]


def is_stop(code: int) -> bool:
    """Whether an exit code is that of a program that was asked to stop, see `stop_signals`; 137 and 139 are crashes."""
    return code - 128 in {getattr(signal, name) for name in _NAMES if hasattr(signal, name)}


class Repeats:
    """Tells the copies of one request from a second one."""

    def __init__(self) -> None:
        self._first: float | None = None

    def count(self) -> int:
        """Call when a signal arrives: 1 = the first, 0 = a copy of it, 2 = another one."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            return 1
        return 2 if now - self._first > REPEAT_SECONDS else 0


class StopRequest:
    """Inside the block a signal only asks to stop; a second one ends the process at once.

    A thread watches the signals, so the answer comes at once although the main thread may be deep in a computation.

    Args:
        answer: prints what a person reads after the first signal.

    Attributes:
        signum: number of the signal that asked; 0 = none.
    """

    def __init__(self, answer: Callable[[], None]) -> None:
        self.signum = 0
        self._answer = answer
        self._repeats = Repeats()

    def __enter__(self) -> "StopRequest":
        global _active
        self._numbers = {int(number) for number in stop_signals()}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # The wake-up pipe does the work; a handler must exist for it to be written.
        self._previous = {number: signal.signal(number, lambda *_: None) for number in self._numbers}
        _active = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _active
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)
        _active = None

    def _watch(self) -> None:
        while numbers := os.read(self._reader, 64):
            for number in numbers:
                if number not in self._numbers:
                    continue
                count = self._repeats.count()
                if count == 1:
                    self.signum = number
                    self._answer()
                elif count == 2:
                    os._exit(128 + number)


def stop_requested() -> bool:
    """Whether this process was asked to stop and is on its way."""
    return _active is not None and _active.signum != 0


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started inside never see a stop signal: it is for the process that started them, which ends them.

    Windows has no such mask.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # The first process that multiprocessing starts brings a tracker with it, whose start takes the mask away.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def kill_workers() -> None:
    """End processes of multiprocessing that an error left behind: the interpreter would wait for them as it exits."""
    left = multiprocessing.active_children()
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error for every worker that is killed
    for process in left:
        process.kill()
        process.join()


def exit_on_terminate() -> None:
    """Let signals unwind the stack like Ctrl-C does, so that temporary files are removed on the way out."""
    repeats = Repeats()

    def stop(signum: int, frame: Any) -> None:
        if not repeats.count():
            return
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted(signum, "terminated; run the same command again to continue")

    for number in stop_signals():
        signal.signal(number, stop)
