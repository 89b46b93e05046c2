"""Every cell of signals x workers x accumulation x processes x moments, three times; tests/e2e/test_signals.py has six of them."""

import itertools
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "e2e"))

from project import JOBS, ForkServer, Place, make_encoders, make_photographs, write_run
from test_signals import MOMENTS, assert_saved, stop_at

pytestmark = pytest.mark.slow
REPETITIONS = 3
OFTEN = 20
"""Of the cells that lost most: Ctrl-C with workers, while training and while drawing."""
CELLS = list(itertools.product((signal.SIGINT, signal.SIGTERM), (0, 2), (1, 6), (1, 2), MOMENTS))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("bench")
    photographs, encoders = make_photographs(folder / "photographs"), make_encoders(folder / "encoders")
    config = write_run(folder / "cached", photographs, encoders)
    server = ForkServer(folder / "server", folder / "home")
    for job in JOBS:
        server.run(job, [config], folder).expect(0)
    yield Place(folder / "runs", photographs, encoders, folder / "cached" / "cache", server)
    server.close()


@pytest.mark.parametrize(("number", "workers", "accumulation", "processes", "moment"), CELLS)
def test_a_signal_to_the_group_saves_a_state(
    number: signal.Signals, workers: int, accumulation: int, processes: int, moment: str, place: Place
) -> None:
    often = number == signal.SIGINT and workers and moment != "saving" and (accumulation, processes) == (1, 1)
    for repetition in range(OFTEN if often else REPETITIONS):
        result, config = stop_at(
            moment, place, number, repetition,
            loader_workers=workers, grad_accum_steps=accumulation, num_processes=processes,
        )  # fmt: skip
        assert_saved(result, config, number)
