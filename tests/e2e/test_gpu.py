"""On a CUDA GPU: `python -m pytest -m gpu`. Precisions that a CPU does not have, and resuming there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from project import GEOMETRY, REPOSITORY, Result, copy_tree, make_flux, metrics, write_flux_run
from safetensors.torch import load_file
from torch import Tensor

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


SWAPPED = {"blocks_to_swap": 4}
RECOMPUTED = {"gradient_checkpointing": True}
SAID = {
    "blocks_to_swap": "swap: 4 blocks stay in main memory",
    "fp8_compute": "fp8: ",
    "compile": "compile: every kind of block",
}
"""Setting of [memory] -> what a run prints when it acts."""


def assert_acts(result: Result, memory: dict[str, Any]) -> None:
    for key, line in SAID.items():
        assert (line in result.out) is bool(memory.get(key)), (key, result.out)
    assert "fetched on the spot" not in result.out


@pytest.mark.parametrize(
    ("shared", "moving"),
    [
        ({}, SWAPPED),
        ({}, {**SWAPPED, "swap_pinned": False}),
        (RECOMPUTED, SWAPPED),
        (RECOMPUTED, {"checkpoint_offload": True}),
        ({**RECOMPUTED, "base_storage": "fp8_scaled"}, {**SWAPPED, "checkpoint_offload": True}),
        ({"base_storage": "nf4"}, SWAPPED),
    ],
)
def test_what_moves_between_memories_changes_nothing(
    shared: dict[str, Any],
    moving: dict[str, Any],
    tmp_path: Path,
    photographs: Path,
    encoders: Path,
    python: Callable[..., Result],
) -> None:
    """A copy that came too early or too late would train on other weights; sums on a GPU differ by rounding only."""
    base = make_flux(tmp_path / "flux.safetensors", depth=3, depth_single_blocks=6)
    found = {}
    for name, memory in (("resident", shared), ("moving", {**shared, **moving})):
        root = tmp_path / name
        run = write_flux_run(root, photographs, encoders, base, train={"mixed_precision": "no"}, memory=memory)
        assert_acts(python(REPOSITORY / "train.py", run).expect(0), memory)
        found[name] = load_file(root / "out" / "photos.safetensors")
    assert_trained_alike(found["moving"], found["resident"])


@pytest.mark.parametrize("memory", [SWAPPED, {**SWAPPED, **RECOMPUTED}, {**SWAPPED, "swap_pinned": False}])
def test_blocks_that_train_in_main_memory_learn_the_same(
    memory: dict[str, Any], tmp_path: Path, new_run: Callable[..., Path], caches: Path, python: Callable[..., Result]
) -> None:
    deep = {**GEOMETRY, "num_double_layers": 3, "num_single_layers": 6}
    found = {}
    for name, settings in (("resident", {}), ("moving", memory)):
        root = tmp_path / name
        run = new_run(root, model={"geometry": deep}, train={"mixed_precision": "no"}, memory=settings)
        copy_tree(caches, root / "cache")
        assert_acts(python(REPOSITORY / "train.py", run, "--skip_cache").expect(0), settings)
        found[name] = load_file(root / "out" / "photos.safetensors")
    assert_trained_alike(found["moving"], found["resident"])


@pytest.mark.parametrize(
    "memory",
    [
        {"base_storage": "fp8_scaled", "fp8_compute": True},
        {"base_storage": "fp8_scaled", "fp8_compute": True, "fp8_compute_backward": "fp8"},
        {"compile": True},
        {"compile": True, "base_storage": "fp8_scaled", **RECOMPUTED, **SWAPPED},
        {"compile": True, "base_storage": "nf4"},
        {"attention": "flash"},
        {"attention": "xformers"},
    ],
)
def test_faster_products_learn(
    memory: dict[str, Any], tmp_path: Path, photographs: Path, encoders: Path, python: Callable[..., Result]
) -> None:
    """With measurements and samples between the updates, which compute without a backward pass."""
    if "attention" in memory:
        pytest.importorskip({"flash": "flash_attn", "xformers": "xformers"}[memory["attention"]])
    base = make_flux(tmp_path / "flux.safetensors", depth=3, depth_single_blocks=6)
    run = write_flux_run(
        tmp_path / "run", photographs, encoders, base, train={"mixed_precision": "bf16"}, memory=memory,
        validation={"split": 0.3, "every_steps": 5}, sample={"prompts": ["a cat"], "every_steps": 5, "steps": 2},
    )  # fmt: skip
    assert_acts(python(REPOSITORY / "train.py", run).expect(0), memory)
    rows = [row for row in metrics(tmp_path / "run" / "out") if "loss/main" in row]
    assert sum(row["loss/main"] for row in rows[-5:]) < sum(row["loss/main"] for row in rows[:5])


def test_auto_swaps_nothing_where_everything_fits(
    tmp_path: Path, photographs: Path, encoders: Path, python: Callable[..., Result]
) -> None:
    base = make_flux(tmp_path / "flux.safetensors", depth=3, depth_single_blocks=6)
    run = write_flux_run(tmp_path / "run", photographs, encoders, base, memory={"blocks_to_swap": "auto"})
    result = python(REPOSITORY / "train.py", run).expect(0)
    assert 'swap: memory.blocks_to_swap = "auto" is 0: about' in result.out


def test_two_gpus_swap_like_one(
    tmp_path: Path, photographs: Path, encoders: Path, python: Callable[..., Result]
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    base = make_flux(tmp_path / "flux.safetensors", depth=3, depth_single_blocks=6)
    found = {}
    for processes in (1, 2):
        root = tmp_path / str(processes)
        train = {"mixed_precision": "no", "grad_accum_steps": 3 - processes}
        run = write_flux_run(root, photographs, encoders, base, train=train, memory=SWAPPED,
                             distributed={"num_processes": processes})  # fmt: skip
        assert_acts(python(REPOSITORY / "train.py", run).expect(0), SWAPPED)
        found[processes] = load_file(root / "out" / "photos.safetensors")
    assert_trained_alike(found[2], found[1])


def test_quantising_on_the_device_holds_one_weight_at_a_time(tmp_path: Path) -> None:
    """Codes go to main memory; the device never holds more than a layer, in its file's form and in float32 copies."""
    from musubi_tuner.memory.storage import Freeze
    from musubi_tuner.models.flux_dev import load_model

    wide = {"hidden_size": 768, "num_heads": 6, "axes_dim": [16, 56, 56]}
    base = make_flux(tmp_path / "flux.safetensors", depth=2, depth_single_blocks=6, **wide)
    device = torch.device("cuda")
    freeze = Freeze("fp8_scaled", r"(double|single)_blocks\..*", quantize_on=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model = load_model(base, dtype=torch.bfloat16, freeze=freeze)
    largest = max(layer.out_features * layer.in_features for layer in model.modules() if hasattr(layer, "in_features"))
    assert torch.cuda.memory_allocated(device) == before
    assert torch.cuda.max_memory_allocated(device) - before < 2**20 + 16 * largest


def assert_trained_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1 % of the whole: Adam divides by the gradient, so single small elements may differ by more than rounding."""
    learned = torch.stack([tensor.norm() for key, tensor in expected.items()]).norm()
    apart = torch.stack([(found[key] - tensor).norm() for key, tensor in expected.items()]).norm()
    assert found.keys() == expected.keys() and float(apart) < 1e-2 * float(learned)
