"""240 seeded interruptions of cache jobs and of training, each followed by the same command again.

60 are of the three cache jobs. 180 are of training: 36 of TinyFlux, 27 of its LoRA, 33 of a file with three steps of it, 24 of a
LoRA on FLUX.1, 40 of FluxFlow's autoencoder, GAN and flow, 20 of a GAN of a family that exists for tests only. The points are
those that an undisturbed run of the very file passes: every one in every step, with the pass drawn. The process must die there,
and then up to twice more, anywhere. In the end the files and the lines of metrics are those of the undisturbed run.

`tests/e2e/test_interruption.py` has one for every named point.
"""

import random
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "e2e"))

from project import (
    JOBS,
    SAVES,
    TRAINING_POINTS,
    CacheRehearsal,
    ForkServer,
    Place,
    Rehearsal,
    altered_package,
    differing,
    everything,
    make_encoders,
    make_flux,
    make_photographs,
    words,
    write_flux_run,
    write_run,
)
from test_fluxflow_run import tokenizer_of
from test_fluxflow_run import write as write_fluxflow
from test_steps import write as write_steps
from test_toy_family import gan_run, with_toy

pytestmark = pytest.mark.slow
CACHE_FAULTS = 60
FAULTS = {"tinyflux": 36, "tinyflux_lora": 27, "tinyflux_steps": 33, "flux_lora": 24, "fluxflow": 40, "toy_gan": 20}
OWN_POINTS = {
    "tinyflux_steps": ["step.finished"], "fluxflow": ["step.finished", "train.phase"], "toy_gan": ["train.phase"],
}  # fmt: skip


class Bench:
    """Everything that is made once for all interruptions."""

    def __init__(self, folder: Path, ends: ExitStack) -> None:
        self.folder, self.ends = folder, ends
        photographs, encoders = make_photographs(folder / "photographs"), make_encoders(folder / "encoders")
        server = self.start("server")
        config = write_run(folder / "cached", photographs, encoders)
        for job in JOBS:
            server.run(job, [config], folder).expect(0)
        self.jobs = CacheRehearsal(folder / "jobs", server, photographs, encoders)
        self.place = Place(folder / "runs", photographs, encoders, folder / "cached" / "cache", server)
        self.made: dict[str, Rehearsal] = {}

    def start(self, name: str, **environment: str) -> ForkServer:
        server = ForkServer(self.folder / name, self.folder / "home", **environment)
        self.ends.callback(server.close)
        return server

    def of(self, setting: str) -> Rehearsal:
        """The undisturbed run of a setting."""
        if setting not in self.made:
            self.made[setting] = getattr(self, setting)(self.folder / setting)
        return self.made[setting]

    def tinyflux(self, folder: Path, **environment: str) -> Rehearsal:
        server = self.start(f"{folder.name} server", **environment) if environment else self.place.server
        place = Place(folder, self.place.photographs, self.place.encoders, self.place.caches, server)
        return Rehearsal(server, partial(place.write, save=SAVES))

    def tinyflux_lora(self, folder: Path) -> Rehearsal:
        base = self.of("tinyflux").reference.parent / "out" / "release"
        tables: dict[str, Any] = {
            "model": {"init": None, "init_scheme": None, "geometry": None, "path": str(base)},
            "adapter": {"type": "lora", "rank": 4},
            "experts": {"expert_input": "noised_image", "expert_time": "aligned", "sol_spatial_norm": "max"},
        }
        return Rehearsal(self.place.server, lambda name: self.place.write(f"lora {name}", save=SAVES, **tables))

    def tinyflux_steps(self, folder: Path) -> Rehearsal:
        return Rehearsal(self.place.server, lambda name: write_steps(self.place, f"steps {name}"))

    def flux_lora(self, folder: Path) -> Rehearsal:
        inputs = self.place.photographs, self.place.encoders, make_flux(folder / "flux.safetensors")
        tables = {"datasets": [self._data(folder)], "save": SAVES}
        config = write_flux_run(folder / "cached", *inputs, **tables)
        for job in ("latents", "text"):
            self.place.server.run(job, [config], folder).expect(0)
        return Rehearsal(self.place.server, lambda name: write_flux_run(folder / name, *inputs, **tables))

    def fluxflow(self, folder: Path) -> Rehearsal:
        inputs, data = (self.place.photographs, tokenizer_of(folder / "tokenizer", words())), [self._data(folder)]
        return Rehearsal(self.place.server, lambda name: write_fluxflow(folder / name, *inputs, datasets=data))

    def toy_gan(self, folder: Path) -> Rehearsal:
        server = self.start("toy server", PYTHONPATH=str(with_toy(folder / "package")))
        roles = {"discriminator": {"optimizer": {"lr": 5e-3}, "ema": {"enabled": False}, "max_grad_norm": 0.5}}
        return Rehearsal(server, lambda name: gan_run(folder / name, self.place.photographs, roles=roles))

    def _data(self, folder: Path) -> dict[str, str]:
        """A data set whose caches all runs of a setting share."""
        return {"image_directory": str(self.place.photographs), "cache_directory": str(folder / "cache")}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with ExitStack() as ends:
        yield Bench(tmp_path_factory.mktemp("bench"), ends)


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


def by_point(passed: Sequence[str]) -> dict[tuple[int, str], list[str]]:
    """Faults of a run file, by the steps that are finished there and the point."""
    counts, found = Counter[str](), defaultdict(list)
    for point in passed:
        finished = counts["step.finished"]
        counts[point] += 1
        found[finished, point].append(f"{point}:{counts[point]}")
    return found


def interrupt(run: Rehearsal, name: str, first: str, *later: str) -> None:
    """Kill a run at points in turn, and compare its end."""
    config = run.new(name)
    run.start(config, MUSUBI_FAULT=first).expect(-signal.SIGKILL)
    for fault in later:
        # A run that continues has less left to do, so a later fault may lie beyond its end.
        result = run.start(config, MUSUBI_FAULT=fault)
        if result.code == 0:
            break
        result.expect(-signal.SIGKILL)
    run.start(config).expect(0)
    run.assert_equal(config)


@pytest.mark.parametrize("setting", FAULTS)
def test_there_are_draws_for_every_point_of_every_step(setting: str, bench: Bench) -> None:
    found = by_point(bench.of(setting).passed)
    assert len(found) <= FAULTS[setting]
    assert {point for _, point in found} | {"state.ema"} == {*TRAINING_POINTS, *OWN_POINTS.get(setting, [])}


@pytest.mark.parametrize(("setting", "seed"), [(name, seed) for name, count in FAULTS.items() for seed in range(count)])
def test_a_run_killed_at_drawn_points_ends_identical_to_an_undisturbed_one(
    setting: str, seed: int, bench: Bench
) -> None:
    draw = random.Random(f"{setting} {seed}")
    run = bench.of(setting)
    faults = list(by_point(run.passed).values())
    later = [draw.choice(draw.choice(faults)) for _ in range(draw.randint(0, 2))]
    interrupt(run, str(seed), draw.choice(faults[seed % len(faults)]), *later)


def test_a_writer_that_writes_into_the_file_that_is_there_is_noticed(bench: Bench) -> None:
    halves = """
        content = temporary.read_bytes()
        with target.open("wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            fault_point("file.renamed")
            file.write(content[len(content) // 2 :])"""
    atomic = """
        temporary.replace(target)
        fault_point("file.renamed")"""
    package = altered_package(bench.folder / "halves package", "files.py", atomic, halves)
    run = bench.tinyflux(bench.folder / "halves", PYTHONPATH=str(package))
    before = run.passed[: run.passed.index("checkpoint.listed")]
    fault = f"file.renamed:{before.count('file.renamed')}"
    interrupt(bench.of("tinyflux"), "as halves", fault)
    with pytest.raises(AssertionError, match=r"exit code 1, expected 0(.|\n)*checkpoints\.json: cannot be read"):
        interrupt(run, "killed", fault)


def test_a_writer_that_rounds_averages_is_noticed(bench: Bench) -> None:
    """Both runs write rounded states, but only the one that is killed goes on from one."""
    rounded = '"ema": {key: t.bfloat16().to(t.dtype) for key, t in state.ema.items()}'
    package = altered_package(
        bench.folder / "rounded package",
        "training/checkpoint.py",
        '"ema": state.ema, "optimizer"',
        f'{rounded}, "optimizer"',
    )
    run = bench.tinyflux(bench.folder / "rounded", PYTHONPATH=str(package))
    fault = "train.update:7"
    interrupt(bench.of("tinyflux"), "as rounded", fault)
    with pytest.raises(AssertionError, match=r"'photos_ema\.safetensors'"):
        interrupt(run, "killed", fault)
    different = differing(everything(bench.folder / "rounded" / "killed" / "out"), run.files)
    assert all("ema" in name for name in different), different
