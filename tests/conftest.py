"""For all tests: one thread per process. Their tensors are tiny, and threads that wait for each other cost more than they give."""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, so before any test module is


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What a test makes of the number of threads ends with it."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
