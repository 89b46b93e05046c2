"""Requests to stop: read between updates, answered at once, copies counted once."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from musubi_tuner.errors import Interrupted
from musubi_tuner.stopping import (
    REPEAT_SECONDS,
    StopRequest,
    exit_on_terminate,
    kill_workers,
    signals_blocked,
    stop_requested,
)

pytestmark = pytest.mark.long

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers():  # type: ignore[no-untyped-def]
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_until(happened) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_inside_the_block_only_asks_and_its_copies_change_nothing(number: int) -> None:
    answers: list[int] = []
    before = signal.getsignal(number)
    with StopRequest(lambda: answers.append(1)) as stop:
        assert not stop_requested()
        for _ in range(3):
            os.kill(os.getpid(), number)
        wait_until(lambda: stop.signum)
        time.sleep(0.05)
        assert (stop.signum, answers, stop_requested()) == (number, [1], True)
    assert signal.getsignal(number) is before
    assert not stop_requested()


def test_the_answer_comes_while_the_main_thread_computes() -> None:
    answered: list[float] = []
    with StopRequest(lambda: answered.append(time.monotonic())):
        child = subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -INT {os.getpid()}"])
        begun = time.monotonic()
        # Seconds in one call, in which no Python code of this thread runs.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
        done = time.monotonic()
        child.wait()
        wait_until(lambda: answered)
    # A handler in the main thread would answer when the call is over.
    assert answered[0] - begun < 0.8 * (done - begun)


def test_another_signal_after_the_copies_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time; from musubi_tuner.stopping import StopRequest\n"
        "with StopRequest(lambda: None):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        f"    time.sleep({REPEAT_SECONDS + 0.2})\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(20)\n"
    )
    begun = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 15


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    """As nohup does with SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest(lambda: None) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.02)
        assert not stop.signum
    exit_on_terminate()
    os.kill(os.getpid(), signal.SIGHUP)


def test_outside_of_training_a_signal_unwinds_once() -> None:
    exit_on_terminate()
    with pytest.raises(Interrupted) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stop.value.exit_code == 143
    os.kill(os.getpid(), signal.SIGTERM)  # a copy of the same request
    time.sleep(0.01)


def _report_mask(connection) -> None:  # type: ignore[no-untyped-def]
    connection.send(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    time.sleep(60)


def test_processes_started_inside_block_never_see_a_signal_and_can_be_killed() -> None:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with signals_blocked():
        process = context.Process(target=_report_mask, args=(theirs,), daemon=True)
        process.start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert set(NUMBERS) <= set(ours.recv())
    for number in NUMBERS:
        os.kill(process.pid, number)  # type: ignore[arg-type]
    time.sleep(0.05)
    assert process.is_alive()
    kill_workers()
    assert not process.is_alive()
