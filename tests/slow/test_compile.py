"""Compiled blocks: nearly the same numbers, one compilation for all alike blocks, few over many buckets, whatever the storage.

Minutes, since compilers run: ``pytest -m slow tests/slow/test_compile.py``.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from musubi_tuner.adapters.attach import attach, make_adapters, place_adapters, target_paths
from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.config.schema.memory import MemorySection
from musubi_tuner.errors import ConfigError
from musubi_tuner.memory.compiling import check_backend
from musubi_tuner.memory.compose import compose_memory, freeze_of
from musubi_tuner.memory.fp8_compute import compute_in_fp8
from musubi_tuner.memory.storage import freeze_layers
from musubi_tuner.models.flux_dev import Flux, FluxConfig
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # compilers and what they load warn of their own matters
]
CPU = torch.device("cpu")
BUCKETS = [(8, 8), (6, 10), (10, 6), (4, 8), (12, 4)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adapted(model: nn.Module, code: str, memory: MemorySection) -> Any:
    spec = MODELS[code]
    model.requires_grad_(False).eval()
    freeze = freeze_of(memory, spec)
    if freeze is not None:
        freeze_layers(model, freeze)
    section = AdapterSection(type="lora", rank=4)
    adapters = make_adapters(
        model, place_adapters(target_paths(model, spec.adapters), spec.adapters, section), section, 1
    )
    torch.manual_seed(3)
    for _, adapter in adapters.items():
        nn.init.normal_(adapter.lora_up.weight, std=0.02)
    attach(model, adapters)
    return model


def flux(memory: MemorySection) -> Any:
    torch.manual_seed(0)
    config = FluxConfig(in_channels=16, hidden_size=64, num_heads=2, depth=3, depth_single_blocks=5, vec_in_dim=16,
                        context_in_dim=16, axes_dim=(8, 12, 12))  # fmt: skip
    return adapted(Flux(config), "fd", memory)


def run(model: Any, size: tuple[int, int], train: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Prediction and gradients of the adapters."""
    torch.manual_seed(1)
    height, width = size
    ids = torch.zeros(1, height * width, 3)
    ids[0, :, 1], ids[0, :, 2] = torch.arange(height * width) // width, torch.arange(height * width) % width
    img = torch.randn(1, height * width, 16)
    inputs = (
        img,
        ids,
        torch.randn(1, 8, 16),
        torch.zeros(1, 8, 3),
        torch.tensor([0.5]),
        torch.randn(1, 16),
        torch.ones(1),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(train):
        out = model(*inputs)
    if not train:
        return out, []
    out.float().square().mean().backward()
    found = [parameter.grad for parameter in model.adapters.parameters()]
    model.adapters.zero_grad()
    return out.detach(), found


def assert_close(found: Any, expected: Any) -> None:
    """bfloat16 keeps 8 bits; a compiler rounds at fewer places, so numbers differ in the last two of them."""
    assert float((found[0] - expected[0]).float().norm() / expected[0].float().norm()) < 0.02
    norms = [float((a - b).norm() / b.norm()) for a, b in zip(found[1], expected[1]) if float(b.norm()) > 0]
    assert norms and max(norms) < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"base_storage": "fp8_scaled"},
        {"base_storage": "nf4", "gradient_checkpointing": True},
        {"base_storage": "int8"},
        {"base_storage": "fp8_scaled", "blocks_to_swap": 4, "gradient_checkpointing": True},
        {"blocks_to_swap": 3, "checkpoint_offload": True},
    ],
    ids=str,
)
def test_numbers_and_number_of_compilations(settings: dict[str, Any]) -> None:
    eager = flux(MemorySection(**settings))
    compose_memory(eager, MemorySection(**settings), MODELS["fd"], CPU)
    memory = MemorySection(**settings, compile=True)
    model = flux(memory)
    compose_memory(model, memory, MODELS["fd"], CPU)
    names = list(model.state_dict())
    for size in (*BUCKETS, *BUCKETS):
        assert_close(run(model, size), run(eager, size))
    # Forms of inputs: with and without gradient for double blocks (the first one's image needs none), with for single ones,
    # and without when they are recomputed. Each is compiled for fixed sizes at first, then for symbolic ones.
    assert counters["stats"]["unique_graphs"] <= 2 * (4 if memory.checkpoints else 3), dict(counters["stats"])
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names and not any("_orig_mod" in name for name, _ in model.named_modules())
    before = counters["stats"]["unique_graphs"]
    run(model, BUCKETS[0], train=False)
    run(model, BUCKETS[1], train=False)
    assert counters["stats"]["unique_graphs"] <= before + 4
    assert_close(run(model, BUCKETS[2]), run(eager, BUCKETS[2]))


def test_products_in_fp8() -> None:
    memory = MemorySection(base_storage="fp8_scaled", fp8_scale="row")
    eager, model = flux(memory), flux(memory)
    compute_in_fp8(eager, backward=True)
    compute_in_fp8(model, backward=True)
    compose_memory(model, MemorySection(base_storage="fp8_scaled", fp8_scale="row", compile=True), MODELS["fd"], CPU)
    assert_close(run(model, (8, 8)), run(eager, (8, 8)))


def test_tinyflux_trained_in_full() -> None:
    def tiny() -> TinyFluxDeep:
        torch.manual_seed(0)
        model = TinyFluxDeep(TinyFluxConfig(
            hidden_size=32, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6), joint_attention_dim=8,
            pooled_projection_dim=8, lune_expert_dim=4, lune_hidden_dim=8, sol_hidden_dim=8, num_double_layers=3,
            num_single_layers=4,
        ))  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        return model

    def step(model: TinyFluxDeep, height: int, width: int) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(5)
        tokens, text, pooled = torch.randn(2, height * width, 16), torch.randn(2, 6, 8), torch.randn(2, 8)
        out = model(tokens, text, pooled, torch.rand(2), height=height, width=width)
        out.square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return out.detach(), grads

    eager, model = tiny(), tiny()
    compose_memory(model, MemorySection(compile=True, gradient_checkpointing=True), MODELS["tf"], CPU)
    for size in BUCKETS:
        (found, grads), (expected, expected_grads) = step(model, *size), step(eager, *size)
        assert torch.allclose(found, expected, atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-3) for a, b in zip(grads, expected_grads))
    # Two kinds of blocks, forward and recomputed, for fixed sizes and for symbolic ones.
    assert counters["stats"]["unique_graphs"] <= 8, dict(counters["stats"])


def test_too_many_compilations_are_an_error() -> None:
    memory = MemorySection(compile=True, compile_dynamic="false", compile_limit=2)
    model = flux(memory)
    compose_memory(model, memory, MODELS["fd"], CPU)
    with pytest.raises(ConfigError, match=r"memory\.compile: a block was compiled 2 times, .*compile_dynamic"):
        for size in BUCKETS:
            run(model, size)


def test_unknown_backend() -> None:
    with pytest.raises(ConfigError, match=r"memory\.compile_backend: 'inducktor' is unknown; known: .*inductor"):
        check_backend(MemorySection(compile=True, compile_backend="inducktor"))
