"""The benchmark of memory and speed: its arithmetic, and the whole program on a tiny model."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmark_programs import BENCHMARKS, load_benchmark


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("memory")


@pytest.mark.parametrize(
    ("spans", "by", "share"),
    [
        ([(0, 10)], [(0, 4), (2, 6)], 0.6),
        ([(0, 10), (20, 30)], [(5, 25)], 0.5),
        ([(0, 10)], [], 0.0),
        ([], [(0, 1)], None),
        ([(1, 2)], [(0, 1), (0, 5), (2, 3)], 1.0),
    ],
)
def test_share_of_copies_beside_computation(spans: Any, by: Any, share: Any, benchmark: ModuleType) -> None:
    assert benchmark.share_covered(spans, by) == share


def row(storage: str, swapped: int, step: float, peak: float | None, planned: float = 10.0) -> dict[str, Any]:
    return {"storage": storage, "swapped": swapped, "step": step, "peak": peak, "planned": planned, "moved": 4.0, "copied": 2.0,
            "operations": 1, "hidden": 0.5, "device": "GPU", "torch": "2", "recoveries": 0}  # fmt: skip


def test_what_misses_its_target_is_named(benchmark: ModuleType) -> None:
    good = [row("bf16", 0, 1.0, 10.0), row("bf16", 25, 2.05, 10.0), row("fp8_scaled", 0, 1.0, 7.0, 7.0),
            row("fp8_modulation", 0, 1.0, 5.5, 5.5), row("fp8_compute", 0, 0.8, 7.0, 7.0)]  # fmt: skip
    assert benchmark.report(good).endswith("all targets met")
    bad = [row("bf16", 0, 1.0, 10.0, 12.0), row("bf16", 25, 2.2, 10.0), row("fp8_scaled", 0, 1.0, 7.5, 7.5),
           row("fp8_compute", 0, 0.9, 7.0, 7.0)]  # fmt: skip
    missed = [line for line in benchmark.report(bad).splitlines() if line.startswith("missed: ")]
    assert missed == [
        "missed: bf16 with 0 swapped: the plan is off by +20.0%",
        "missed: bf16 with 25 swapped: 1.100 of its bound, target 1.05",
        "missed: fp8_scaled: peak is 0.750 of bf16, target 0.72",
        "missed: fp8_compute: 1.111 of the throughput of bf16, target 1.15",
    ]
    assert benchmark.report(bad).endswith(
        "not judged: fp8_modulation against bf16: one of them has no result without swap"
    )
    # On a small card the variant that all are compared with has no result.
    small = benchmark.report([row("bf16", 53, 2.0, 6.0, 6.0) | {"recoveries": 2}, *good[2:]])
    assert small.splitlines()[-5:] == [
        "missed: bf16 with 53 swapped: 2 blocks fetched on the spot",
        "not judged: bf16 with 53 swapped: not run without swap",
        *(f"not judged: {name} against bf16: one of them has no result without swap"
          for name in ("fp8_scaled", "fp8_modulation", "fp8_compute")),
    ]  # fmt: skip
    assert "nothing is judged" in benchmark.report([row("bf16", 0, 1.0, None)])


@pytest.mark.slow
def test_the_program_runs(tmp_path: Path) -> None:
    arguments = [
        "--tiny",
        "--device",
        "cpu",
        "--storage",
        "fp8_scaled",
        "--swap",
        "0",
        "3",
        "--steps",
        "1",
        "--warmup",
        "0",
    ]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "memory.py"), *arguments, "--trace", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| fp8_scaled | 3 |" in done.stdout and "failed" not in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8_scaled-0.json", "fp8_scaled-3.json"]
