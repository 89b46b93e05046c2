"""Runs over datasets with different teachers, from pictures to weights, in one process and in two."""

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from project import JOBS, ForkServer, Result, copy_tree, metrics, write_run
from safetensors.torch import load_file

SETS = (("astronaut",), ("moon", "coffee", "chelsea"), ("camera",))
"""The first and the last are squares and share their batches with the moon; those of the other two have no teachers."""
OWN = {"enable_sol": False, "time_buckets": 7}
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """Three folders of photographs."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, names in enumerate(SETS):
        (folder / f"set{number}").mkdir()
        for path in photographs.iterdir():
            if path.stem in names:
                shutil.copy(path, folder / f"set{number}" / path.name)
    return folder


@pytest.fixture(scope="module")
def new(folder: Path, encoders: Path) -> Callable[..., Path]:
    """Write a run file over the three folders into a folder of its own."""

    def write(name: str, own: Any = OWN, **train: Any) -> Path:
        root = folder / name
        data: list[dict[str, Any]] = [
            {"image_directory": str(folder / f"set{number}"), "cache_directory": str(root / f"cache{number}")}
            for number in range(3)
        ]
        data[1]["experts"] = False
        data[2]["experts"] = own
        train = {"max_steps": STEPS, "mixed_precision": "no", **train}
        return write_run(
            root, folder, encoders, datasets=data, train=train, general={"resolution": 128, "batch_size": 3}
        )

    return write


@pytest.fixture(scope="module")
def alone(new: Callable[..., Path], server: ForkServer) -> tuple[Path, Result]:
    """A run of one process that accumulates two micro-batches, and its plan from before there were caches."""
    config = new("alone", grad_accum_steps=2)
    planned = server.run("train", [config, "--plan"], config.parent).expect(0)
    for job in (*JOBS, "train"):
        server.run(job, [config], config.parent).expect(0)
    return config.parent, planned


def test_run_over_datasets_with_and_without_teachers_trains_to_its_end(alone: tuple[Path, Result]) -> None:
    root, planned = alone
    lines = planned.out.splitlines()
    first = lines.index("  experts  0 up to date, 2 to make (2 x missing)")
    assert lines[first + 1 : first + 4] == [
        "           datasets[0]: lune and sol at 4 times: 0 up to date, 1 to make (1 x missing)",
        "           datasets[1]: no teachers: 3 images are trained without",
        "           datasets[2]: lune at 7 times: 0 up to date, 1 to make (1 x missing)",
    ]
    made = {path.parent.name: load_file(path) for path in sorted(root.glob("cache*/*_experts.safetensors"))}
    assert {name: (len(t["t_buckets_float32"]), "sol_stats_float32" in t) for name, t in made.items()} == {
        "cache0": (4, True),
        "cache2": (7, False),
    }
    rows = metrics(root / "out")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["loss/main"] > 0 and row["loss/lune"] > 0 and row["loss/sol"] >= 0 for row in rows)
    # Of five images two have Lune and one has Sol; the loss of an image without is nothing.
    assert sum(row["loss/lune"] for row in rows) > 0 < sum(row["loss/sol"] for row in rows)
    written = tomllib.loads((root / "out" / "photos.config.toml").read_text(encoding="utf-8"))
    assert [dataset.get("experts") for dataset in written["datasets"]] == [None, False, OWN]
    assert (root / "out" / "photos.safetensors").is_file()


def test_other_teachers_since_the_run_began_are_refused(
    alone: tuple[Path, Result], new: Callable[..., Path], server: ForkServer
) -> None:
    root, _ = alone
    for name in ("out", *(f"cache{number}" for number in range(3))):
        copy_tree(root / name, root.parent / "changed" / name)
    config = new("changed", own=False, grad_accum_steps=2, max_steps=STEPS + 2)
    result = server.run("train", [config], config.parent).expect(2)
    assert "the data set has other images, captions, masks, buckets, batch sizes or teachers" in result.err
    config = new("changed", grad_accum_steps=2, max_steps=STEPS + 2)
    result = server.run("train", [config], config.parent).expect(0)
    assert f"continuing from photos-state: step {STEPS} of {STEPS + 2}" in result.out


def test_two_processes_whose_batches_have_different_teachers_train_the_model_of_one(
    alone: tuple[Path, Result], new: Callable[..., Path], server: ForkServer
) -> None:
    root, _ = alone
    config = new("two")
    for number in range(3):
        copy_tree(root / f"cache{number}", config.parent / f"cache{number}")
    server.run("train", [config, "--set", "distributed.num_processes=2"], config.parent).expect(0)
    for row, expected in zip(metrics(config.parent / "out"), metrics(root / "out"), strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-7)
    found, expected = (load_file(path / "out" / "photos.safetensors") for path in (config.parent, root))
    gap = max(float((found[key] - expected[key]).abs().max()) for key in expected)
    # Float32 rounding, which AdamW at a rate of 3e-3 lets grow.
    assert gap <= 1e-6
