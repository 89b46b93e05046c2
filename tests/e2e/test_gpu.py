"""On a CUDA GPU: `python -m pytest -m gpu`. Precisions that a CPU does not have, and resuming there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from project import REPOSITORY, Result, copy_tree, make_flux, metrics, write_flux_run
from safetensors.torch import load_file

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
def test_tinyflux_trains_and_continues(
    precision: str, new_run: Callable[..., Path], caches: Path, python: Callable[..., Result]
) -> None:
    whole = new_run(train={"mixed_precision": precision})
    root = whole.parent
    copy_tree(caches, root / "cache")
    python(REPOSITORY / "train.py", whole, "--skip_cache").expect(0)
    rows = metrics(root / "out")
    assert len(rows) == 20
    assert sum(row["loss/main"] for row in rows[-5:]) < sum(row["loss/main"] for row in rows[:5])
    expected = load_file(root / "out" / "photos.safetensors")
    assert all(tensor.isfinite().all() for tensor in expected.values())

    part = new_run(root / "part", train={"mixed_precision": precision, "max_steps": 20})
    copy_tree(caches, root / "part" / "cache")
    assert python(REPOSITORY / "train.py", part, "--skip_cache", MUSUBI_FAULT="train.update:12").code == -9
    again = python(REPOSITORY / "train.py", part, "--skip_cache").expect(0)
    assert "continuing from" in again.out
    found = load_file(root / "part" / "out" / "photos.safetensors")
    moved = max(float(tensor.abs().max()) for tensor in expected.values())
    # Sums of attention's backward pass may be formed in another order on a GPU.
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-3 * moved


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lora_on_flux_trains(
    precision: str, tmp_path: Path, photographs: Path, encoders: Path, python: Callable[..., Result]
) -> None:
    base = make_flux(tmp_path / "flux.safetensors")
    run = write_flux_run(tmp_path / "run", photographs, encoders, base, train={"mixed_precision": precision})
    python(REPOSITORY / "train.py", run).expect(0)
    rows = metrics(tmp_path / "run" / "out")
    assert sum(row["loss/main"] for row in rows[-5:]) < sum(row["loss/main"] for row in rows[:5])
