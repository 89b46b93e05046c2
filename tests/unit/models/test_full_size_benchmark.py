"""The benchmark at full size: what it reads from metrics.jsonl, and that its run file is valid."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from benchmark_programs import load_benchmark
from musubi_tuner.config import load_config
from musubi_tuner.models.tinyflux.flops import training_flops
from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("full_size")


def write_metrics(folder: Path, steps: list[float], peak: float | None) -> None:
    (folder / "run").mkdir()
    rows = [{"step": n, "clock": {"step_seconds": seconds} | ({"peak_gib": peak} if peak else {})}
            for n, seconds in enumerate(steps)]  # fmt: skip
    rows.append({"step": len(steps), "epoch/loss": 1.0, "clock": {"seconds": 0.0}})
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_steps_after_the_first_half_are_compared_with_the_device(tmp_path: Path, benchmark: ModuleType) -> None:
    write_metrics(tmp_path, [9.0, 5.0, 0.25, 0.5, 0.5], 12.5)
    rate = training_flops(TinyFluxConfig(), 8, 64, 64, 128) / 0.5
    text = benchmark.training(tmp_path, 8, "NVIDIA H200")
    assert text == (
        f"step 0.5000 s, 16.00 images/s, {rate / 1e12:.2f} * 10^12 operations/s, MFU {rate / 989e12:.1%}, "
        "peak 12.50 GiB on the device"
    )


def test_a_device_without_a_known_rate_has_no_mfu(tmp_path: Path, benchmark: ModuleType) -> None:
    write_metrics(tmp_path, [1.0, 1.0], None)
    assert benchmark.training(tmp_path, 1, "2 CPU cores").endswith("MFU unknown: the rate of this device is not listed")


def test_its_run_file_is_valid(tmp_path: Path, benchmark: ModuleType) -> None:
    for name in ("vae", "clip", "t5", "unet", "images"):
        (tmp_path / name).mkdir()
    values = {"steps": 50, "batch": 8, "repeats": 400, "checkpointing": "false"}
    (tmp_path / "run.toml").write_text(benchmark.RUN_FILE.format(folder=tmp_path.as_posix(), **values))
    config = load_config(tmp_path / "run.toml", {})
    assert not config.memory.gradient_checkpointing and config.train.max_steps == 50
    assert config.datasets[0].batch_size == 8 and config.datasets[0].num_repeats == 400
