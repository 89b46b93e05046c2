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
            "operations": 1, "hidden": 0.95 if swapped else None, "device": "GPU", "torch": "2", "recoveries": 0}  # fmt: skip


def judged(benchmark: ModuleType, rows: list[dict[str, Any]], *missing: tuple[str, int]) -> list[str]:
    """What is said below the table."""
    wanted = [(each["storage"], each["swapped"]) for each in rows]
    text, open_ = benchmark.report(rows, [*wanted, *missing])
    lines: list[str] = text.rpartition("\n\n")[2].splitlines()
    assert open_ is (lines[0].startswith(("missed: ", "not judged: ")))
    return lines


def test_what_misses_its_target_is_named(benchmark: ModuleType) -> None:
    good = [row("bf16", 0, 3.0, 10.0), row("bf16", 25, 3.1, 10.0), row("fp8_scaled", 0, 3.0, 7.0, 7.0),
            row("fp8_modulation", 0, 3.0, 5.5, 5.5), row("fp8_rows", 0, 3.0, 5.5, 5.5), row("fp8_compute", 0, 2.4, 7.0, 7.0)]  # fmt: skip
    assert judged(benchmark, good) == ["all targets met"]
    bad = [row("bf16", 0, 3.0, 10.0, 12.0), row("bf16", 25, 3.3, 10.0) | {"hidden": 0.0}, row("fp8_scaled", 0, 3.0, 7.5, 7.5),
           row("fp8_rows", 0, 3.0, 5.7, 5.7), row("fp8_compute", 0, 2.7, 7.0, 7.0)]  # fmt: skip
    assert judged(benchmark, bad, ("nf4", 0), ("bf16", 53)) == [
        "missed: bf16 with 0 swapped: the plan is off by +20.0%",
        "missed: bf16 with 25 swapped: 1.100 of its bound, target 1.05",
        "missed: bf16 with 25 swapped: 0% of its copies are hidden, target 90%",
        "missed: fp8_scaled: peak is 0.750 of bf16, target 0.72",
        "missed: fp8_compute: 1.111 of the throughput of bf16, target 1.15",
        "not judged: nf4 with 0 swapped: it gave no result",
        "not judged: bf16 with 53 swapped: it gave no result",
        "not judged: fp8_modulation against bf16: one of them has no result without swap",
    ]
    # Copies that take longer than the computation cannot hide behind it.
    bound = [
        good[0] | {"step": 1.0},
        row("bf16", 25, 2.05, 10.0) | {"hidden": 0.4},
        *(each | {"step": 0.8} for each in good[2:]),
    ]
    assert judged(benchmark, bound) == ["all targets met"]
    blind = [*good, row("nf4", 0, 3.0, 5.0, 5.0), row("nf4", 40, 3.0, 5.0, 5.0) | {"hidden": None}]
    assert judged(benchmark, blind) == ["not judged: nf4 with 40 swapped: its trace shows no copies"]
    # On a small card the variant that all are compared with has no result.
    small = [row("bf16", 53, 2.0, 6.0, 6.0) | {"recoveries": 2}, *good[2:]]
    assert judged(benchmark, small, ("bf16", 0)) == [
        "missed: bf16 with 53 swapped: 2 blocks fetched on the spot",
        "not judged: bf16 with 0 swapped: it gave no result",
        "not judged: bf16 with 53 swapped: not run without swap",
        *(f"not judged: {name} against bf16: one of them has no result without swap"
          for name in ("fp8_scaled", "fp8_modulation", "fp8_rows", "fp8_compute")),
    ]  # fmt: skip
    (line,) = judged(benchmark, [row("bf16", 0, 1.0, None)])
    assert "nothing is judged" in line


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
