"""What cannot act as it is written is said: weights that are 8 bits in their file, and numbers above what the model has."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import save_file

from musubi_tuner.assemble import load_trainee
from musubi_tuner.config import load_config
from musubi_tuner.config.schema.memory import MemorySection
from musubi_tuner.memory.compose import compose_memory, freeze_of
from musubi_tuner.memory.frozen_linear import quantize_fp8
from musubi_tuner.memory.storage import storage_notes
from musubi_tuner.models.flux_dev import FluxConfig, build
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep
from musubi_tuner.weights.stored import StoredWeight

FLUX = MODELS["fd"]
TINY = TinyFluxConfig(
    hidden_size=32, num_attention_heads=2, attention_head_dim=16, in_channels=4, joint_attention_dim=12,
    pooled_projection_dim=10, num_double_layers=1, num_single_layers=4, axes_dims_rope=(4, 6, 6),
)  # fmt: skip


def notes(scaled: bool = True, stored: bool = True, **memory: Any) -> list[str]:
    """Of a file with a product, a modulation and an input layer of 1 Mi values each."""
    weight = torch.zeros(1024, 1024, dtype=torch.float8_e4m3fn if stored else torch.bfloat16)
    one = StoredWeight.of(weight, torch.ones(()) if scaled else None)
    paths = ("single_blocks.0.linear1", "single_blocks.0.modulation.lin")
    weights = {f"{path}.weight": one for path in paths} | {"img_in.weight": StoredWeight.of(torch.zeros(4, 4))}
    return storage_notes(weights, freeze_of(MemorySection(**memory), FLUX), FLUX.modulation, torch.bfloat16)


def test_weights_of_an_fp8_file_say_what_becomes_of_them() -> None:
    kept, dense = notes(base_storage="fp8", fp8_scale="row")
    assert kept == (
        "storage: 1 layers stay as the float8 numbers of the file, with its scales, whatever memory.base_storage and memory.fp8_scale "
        "say"
    )
    assert dense == (
        "storage: 1 layers are float8 numbers in the file and are brought to bfloat16, 1.0 MiB more; memory.fp8_modulation = true "
        "keeps 8 bits"
    )
    (kept,) = notes(scaled=False, base_storage="fp8_scaled", fp8_modulation=True)
    assert kept.startswith("storage: 2 layers stay as the float8 numbers of the file, without scales, ")
    (dense,) = notes()
    assert "2.0 MiB more" in dense and dense.endswith('memory.base_storage = "fp8_scaled" keeps 8 bits')


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_rounding_twice_is_a_warning(storage: str) -> None:
    (twice,) = notes(base_storage=storage, fp8_modulation=True)
    assert twice.startswith(
        f"warning: 2 layers are rounded twice, to float8 in the file and to {storage} here; use the bf16 file"
    )


@pytest.mark.parametrize("storage", ["none", "fp8_scaled", "nf4"])
def test_an_ordinary_file_has_nothing_to_say(storage: str) -> None:
    assert notes(stored=False, scaled=False, base_storage=storage) == []


def test_loading_says_what_the_file_keeps_and_leaves_out_what_is_merged(tmp_path: Path) -> None:
    small = FluxConfig(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1, vec_in_dim=64, context_in_dim=64)
    tensors = {key: torch.randn(t.shape).bfloat16() for key, t in build(small).state_dict().items()}
    layers = [f"single_blocks.0.{name}" for name in ("linear1", "linear2", "modulation.lin")]
    for layer in layers:
        tensors[f"{layer}.weight"], scale = quantize_fp8(tensors[f"{layer}.weight"], "tensor")
        assert scale is not None
        tensors[f"{layer}.scale_weight"] = scale
    save_file(tensors, tmp_path / "flux.safetensors")
    (tmp_path / "flux.json").write_text(json.dumps(small.to_dict()))
    rows, columns = tensors["single_blocks.0.linear2.weight"].shape
    lora = {
        "lora_down.weight": torch.randn(2, columns),
        "lora_up.weight": torch.randn(rows, 2),
        "alpha": torch.tensor(2.0),
    }
    save_file({f"lora_unet_single_blocks_0_linear2.{key}": t for key, t in lora.items()}, tmp_path / "lora.safetensors")
    (tmp_path / "images").mkdir()
    tables = {
        "schema_version": 1,
        "run": {"name": "x", "output_dir": str(tmp_path / "out"), "device": "cpu"},
        "model": {"arch": "fd", "path": str(tmp_path / "flux.safetensors")},
        "adapter": {"rank": 2},
        "memory": {"base_storage": "fp8_scaled"},
        "train": {"max_steps": 10, "mixed_precision": "no"},
        "scheduler": {"warmup_steps": 1},
        "cache": {"run": "never"},
        "datasets": [{"image_directory": str(tmp_path / "images")}],
    }
    (tmp_path / "run.toml").write_text(tomli_w.dumps(tables))
    for merge, kept in (([], 2), ([str(tmp_path / "lora.safetensors")], 1)):
        config = load_config(tmp_path / "run.toml", {"adapter.merge": merge})
        *_, first, second = load_trainee(config, torch.device("cpu")).notes
        assert first.startswith(f"storage: {kept} layers stay as the float8 numbers of the file, with its scales")
        assert second.startswith("storage: 1 layers are float8 numbers in the file and are brought to float32, ")


def composed(**memory: Any) -> list[str]:
    model = TinyFluxDeep(TINY)
    return compose_memory(model, MemorySection(**memory), MODELS["tf"], torch.device("cpu"))[1]


def test_numbers_above_what_the_model_has() -> None:
    assert composed(gradient_checkpointing=True, checkpoint_every=5) == []
    (line,) = composed(gradient_checkpointing=True, checkpoint_every=6)
    assert line.startswith(
        "warning: memory.checkpoint_every is 6, and the model has 5 blocks: only the first of them is recomputed"
    )
    here = "warning: memory.blocks_to_swap saves nothing here: this device computes in main memory"
    assert composed(blocks_to_swap=1) == [here]  # two buffers are the default, not what a person wrote
    assert composed(blocks_to_swap=2, swap_ring=2) == [here]
    assert composed(blocks_to_swap=2, swap_ring=3) == [
        here,
        "warning: memory.swap_ring is 3, and 2 block(s) are streamed: there are no more buffers than blocks",
    ]
