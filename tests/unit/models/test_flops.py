"""The formulas count what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from musubi_tuner.models.tinyflux import TinyFluxConfig, build
from musubi_tuner.models.tinyflux.flops import forward_flops, training_flops
from musubi_tuner.models.tinyflux.state_dict import example_inputs

pytestmark = pytest.mark.long

TINY = TinyFluxConfig(
    hidden_size=32, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6), joint_attention_dim=24,
    pooled_projection_dim=20, num_double_layers=2, num_single_layers=3, lune_expert_dim=18, lune_hidden_dim=16,
    sol_hidden_dim=8,
)  # fmt: skip


@pytest.mark.parametrize(("batch", "height", "width", "text"), [(1, 4, 4, 5), (3, 6, 4, 7)])
def test_forward_equals_the_counter_of_torch(batch: int, height: int, width: int, text: int) -> None:
    model = build(TINY).to_empty(device="cpu")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**example_inputs(TINY, batch, height, width, text), height=height, width=width)
    assert counter.get_total_flops() == forward_flops(TINY, batch, height, width, text)


def test_full_size_is_counted_on_the_meta_device() -> None:
    config = TinyFluxConfig()
    with torch.device("meta"):
        inputs = example_inputs(config, 1, 64, 64, 128)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        build(config)(**inputs, height=64, width=64)
    assert counter.get_total_flops() == forward_flops(config, 1, 64, 64, 128)


def test_a_training_step_is_three_forward_passes_and_checkpointing_adds_the_blocks() -> None:
    forward = forward_flops(TINY, 2, 4, 4, 5)
    assert training_flops(TINY, 2, 4, 4, 5) == 3 * forward
    assert 3.8 * forward < training_flops(TINY, 2, 4, 4, 5, checkpointing=True) < 4 * forward
