"""What cannot act as it is written is said: weights that are 8 bits in their file, and numbers above what the model has."""

from typing import Any

import pytest
import torch

from musubi_tuner.config.schema import MemorySection
from musubi_tuner.memory.compose import compose_memory, freeze_of
from musubi_tuner.memory.storage import storage_notes
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.stored import StoredWeight
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep

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
