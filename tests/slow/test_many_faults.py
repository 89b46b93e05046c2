"""Two hundred seeded interruptions of cache jobs and of training, each followed by the same command again.

`tests/e2e/test_interruption.py` has one for every named point; here the counts are drawn, and runs are killed up to three
times in a row.
"""

import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "e2e"))

from project import (
    JOBS,
    TRAINING_POINTS,
    CacheRehearsal,
    ForkServer,
    Rehearsal,
    make_encoders,
    make_photographs,
    write_run,
)

pytestmark = pytest.mark.slow
CACHE_FAULTS = 60
TRAINING_FAULTS = 140


class Bench:
    """Everything that is made once for all interruptions."""

    def __init__(self, folder: Path, server: ForkServer) -> None:
        photographs, encoders = make_photographs(folder / "photographs"), make_encoders(folder / "encoders")
        config = write_run(folder / "cached", photographs, encoders)
        for job in JOBS:
            server.run(job, [config], folder).expect(0)
        self.jobs = CacheRehearsal(folder / "jobs", server, photographs, encoders)
        self.training = Rehearsal(folder / "training", server, folder / "cached" / "cache", photographs, encoders)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    server = ForkServer(folder / "server", folder / "home")
    yield Bench(folder, server)
    server.close()


@pytest.mark.parametrize("seed", range(CACHE_FAULTS))
def test_a_cache_job_killed_at_a_drawn_point_continues_to_the_same_files(seed: int, bench: Bench) -> None:
    draw = random.Random(f"cache {seed}")
    job = draw.choice(JOBS)
    # Nine files each; the teachers write as many halves before.
    halves = 9 if job == "experts" else 0
    batches = {"latents": 6, "text": 3, "experts": 12}[job]
    point, passes = draw.choice(
        [(f"cache.{job}.batch", batches), ("file.written", 9 + halves), ("file.renamed", 9 + halves)]
    )
    count = draw.randint(1, passes)
    left = bench.jobs.interrupt(f"{seed}", job, f"{point}:{count}")
    written = max(0, count - halves)
    assert left == {"file.written": max(0, written - 1), "file.renamed": written}.get(point, left)


@pytest.mark.parametrize("seed", range(TRAINING_FAULTS))
def test_a_run_killed_at_drawn_points_ends_identical_to_an_undisturbed_one(seed: int, bench: Bench) -> None:
    draw = random.Random(f"training {seed}")
    run = bench.training
    config = run.new(f"{seed}")
    kills = 0
    for _ in range(draw.randint(1, 3)):
        point = draw.choice(TRAINING_POINTS)
        result = run.start(config, MUSUBI_FAULT=f"{point}:{draw.randint(1, run.passes(point))}")
        # A run that continues has less left to do, so a later fault may lie beyond its end.
        kills += result.code == -signal.SIGKILL
        if result.code == 0:
            break
        result.expect(-signal.SIGKILL)
    assert kills >= 1
    run.start(config).expect(0)
    run.assert_equal(config)
