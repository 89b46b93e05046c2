"""Every setting of [memory] reaches what it sets. That those parts do what they should is tested beside them."""

from typing import Any

import pytest
import torch
from torch import nn

from musubi_tuner.config.schema.memory import MemorySection
from musubi_tuner.errors import ConfigError
from musubi_tuner.memory import checkpointing
from musubi_tuner.memory import compose as compose
from musubi_tuner.memory.activation_offload import ActivationOffload
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.memory.compose import compose_memory, freeze_of
from musubi_tuner.memory.frozen_linear import FrozenLinear
from musubi_tuner.memory.storage import freeze_layers
from musubi_tuner.memory.transfer import HostTransfer, StagedTransfer
from musubi_tuner.models.flux_dev import FluxConfig, build
from musubi_tuner.models.registry import MODELS

pytestmark = pytest.mark.long

SPEC, CPU = MODELS["fd"], torch.device("cpu")
GEOMETRY = FluxConfig(
    in_channels=16, vec_in_dim=64, context_in_dim=64, hidden_size=64, num_heads=2, depth=5, depth_single_blocks=6,
    axes_dim=(8, 12, 12),
)  # fmt: skip


def frozen(memory: MemorySection) -> nn.Module:
    """A FLUX.1 whose weights are stored as the settings say."""
    torch.manual_seed(0)
    model = build(GEOMETRY).to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    freeze = freeze_of(memory, SPEC)
    if freeze is not None:
        freeze_layers(model, freeze)
    return model


def step(model: nn.Module) -> None:
    """Forward and backward through all blocks."""
    inputs = torch.randn(2, 4, 16), torch.zeros(2, 4, 3), torch.randn(2, 3, 64), torch.zeros(2, 3, 3)
    out = model(inputs[0].requires_grad_(), *inputs[1:], torch.rand(2), torch.randn(2, 64), torch.ones(2))
    out.square().mean().backward()


def composed(**settings: Any) -> tuple[nn.Module, BlockSwap | None, list[str]]:
    memory = MemorySection(**settings)
    model = frozen(memory)
    return model, *compose_memory(model, memory, SPEC, CPU)


def layers(model: nn.Module) -> dict[str, FrozenLinear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, FrozenLinear)}


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({"blocks_to_swap": 2}, ["single_blocks.1", "single_blocks.4"]),
        ({"blocks_to_swap": 5}, ["double_blocks.2", *(f"single_blocks.{index}" for index in (0, 2, 3, 5))]),
        ({"blocks_to_swap": 2, "swap_policy": "balanced"}, ["double_blocks.2", "single_blocks.1", "single_blocks.3", "single_blocks.5"]),
    ],
)  # fmt: skip
def test_blocks_of_the_policy_are_streamed(settings: dict[str, Any], blocks: list[str]) -> None:
    _, swap, _ = composed(**settings)
    assert swap is not None
    assert [block.name for block in swap.streamed] == blocks


@pytest.mark.parametrize("ring", [1, 3])
def test_the_ring_has_as_many_buffers(ring: int) -> None:
    _, swap, _ = composed(blocks_to_swap=5, swap_ring=ring)
    assert swap is not None and len(swap.slots) == ring


@pytest.mark.parametrize(("pinned", "engine"), [(True, HostTransfer), (False, StagedTransfer)])
def test_memory_that_is_not_pinned_is_staged(pinned: bool, engine: type) -> None:
    _, swap, _ = composed(blocks_to_swap=5, swap_pinned=pinned)
    assert swap is not None and type(swap.transfer) is engine


@pytest.mark.parametrize(
    ("settings", "recomputed"),
    [({}, 0), ({"gradient_checkpointing": True}, 11), ({"gradient_checkpointing": True, "checkpoint_every": 3}, 4)],
)
def test_every_nth_block_is_recomputed(
    settings: dict[str, Any], recomputed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    checkpoint = checkpointing.checkpoint

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return checkpoint(*args, **options)

    monkeypatch.setattr(checkpointing, "checkpoint", counting)
    step(composed(**settings)[0])
    assert calls == recomputed


@pytest.mark.parametrize("offload", [False, True])
def test_inputs_of_recomputed_blocks_go_to_main_memory(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ActivationOffload] = []

    class Noted(ActivationOffload):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            made.append(self)

    monkeypatch.setattr(compose, "ActivationOffload", Noted)
    step(composed(gradient_checkpointing=True, checkpoint_offload=offload)[0])
    assert [each.bytes > 0 for each in made] == ([True] if offload else [])


@pytest.mark.parametrize(("scale", "shape"), [("tensor", ()), ("row", (192, 1)), ("block", (192, 1, 1))])
def test_scales_are_shared_as_asked_for(scale: str, shape: tuple[int, ...]) -> None:
    found = layers(composed(base_storage="fp8_scaled", fp8_scale=scale)[0])
    assert found["double_blocks.0.img_attn.qkv"].scale_shape == shape


@pytest.mark.parametrize("storage", ["fp8", "fp8_scaled", "int8", "nf4"])
@pytest.mark.parametrize("modulation", [False, True])
def test_layers_are_stored_as_asked_for(storage: str, modulation: bool) -> None:
    found = layers(composed(base_storage=storage, fp8_modulation=modulation)[0])
    assert {layer.storage for layer in found.values()} == {storage}
    assert ("single_blocks.0.modulation.lin" in found) is modulation and "img_in" not in found


@pytest.mark.parametrize(("backward", "computed"), [("bf16", "forward"), ("fp8", "both")])
def test_products_in_fp8(backward: str, computed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(compose, "require_fp8", asked.append)
    settings = {"base_storage": "fp8_scaled", "fp8_compute": True, "fp8_compute_backward": backward}
    found, _, lines = composed(**settings)
    assert asked == [CPU] and {layer.fp8_compute for layer in layers(found).values()} == {computed}
    assert any(line.startswith("fp8: ") for line in lines)
    assert {layer.fp8_compute for layer in layers(composed(base_storage="fp8_scaled")[0]).values()} == {"no"}


def test_what_the_machine_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory\.fp8_compute needs a GPU"):
        composed(base_storage="fp8_scaled", fp8_compute=True)
    with pytest.raises(ConfigError, match=r"memory\.attention"):
        composed(attention="xformers")
