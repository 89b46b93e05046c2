"""For all tests: one thread per process, since threads that wait for each other cost tiny tensors more than they give; and signals."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

STATE_HOME = tempfile.mkdtemp(prefix="musubi-tests-")
os.environ["MUSUBI_STATE_HOME"] = STATE_HOME  # not among the pages of a real user
atexit.register(shutil.rmtree, STATE_HOME, ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, so before any test module is


for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
    # Ignored in what a shell starts in the background, or nohup: our commands would leave it so, and the tests send it.
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What a test makes of the number of threads ends with it."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
