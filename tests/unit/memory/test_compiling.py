"""Compilation reaches every block with its settings, and keeps no weight; its numbers are tested in tests/slow/test_compile.py."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.config as limits
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import TritonMissing

from musubi_tuner.config.schema.memory import MemorySection
from musubi_tuner.errors import ConfigError
from musubi_tuner.memory.compiling import check_float8, compile_blocks
from musubi_tuner.memory.compose import check_machine, compose_memory
from musubi_tuner.memory.frozen_linear import FrozenLinear, Storage
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep
from musubi_tuner.weights.stored import StoredWeight

pytestmark = pytest.mark.long

GEOMETRY = {
    "hidden_size": 16, "num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": [2, 2, 4], "num_double_layers": 2,
    "num_single_layers": 3, "lune_expert_dim": 8, "lune_hidden_dim": 8, "sol_hidden_dim": 8,
}  # fmt: skip


def model() -> nn.Module:
    return TinyFluxDeep(TinyFluxConfig.from_dict(GEOMETRY))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """What torch.compile is asked for: blocks and options; it compiles nothing."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def compile_nothing(function: Any, **options: Any) -> Any:
        calls.append((function.__self__, options))
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with limits.patch(recompile_limit=8, fail_on_recompile_limit_hit=False, optimize_ddp=True):
        yield calls


@pytest.mark.parametrize("on", [False, True])
def test_every_block_goes_through_the_compiler(on: bool, asked: list[tuple[Any, dict[str, Any]]]) -> None:
    trained = model()
    names = list(trained.state_dict())
    _, lines = compose_memory(trained, MemorySection(compile=on), MODELS["tf"], torch.device("cpu"))
    assert [block for block, _ in asked] == ([*trained.double_blocks, *trained.single_blocks] if on else [])
    assert any(line.startswith("compile: ") for line in lines) == on
    assert list(trained.state_dict()) == names


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"backend": "inductor", "mode": None, "dynamic": None}),
        (
            {"compile_mode": "max-autotune-no-cudagraphs"},
            {"backend": "inductor", "mode": "max-autotune-no-cudagraphs", "dynamic": None},
        ),
        (
            {"compile_backend": "eager", "compile_dynamic": "false"},
            {"backend": "eager", "mode": None, "dynamic": False},
        ),
        ({"compile_dynamic": "true"}, {"backend": "inductor", "mode": None, "dynamic": True}),
    ],
)
def test_settings_reach_the_compiler(
    settings: dict[str, Any], expected: dict[str, Any], asked: list[tuple[Any, dict[str, Any]]]
) -> None:
    memory = MemorySection(compile=True, compile_limit=5, **settings)
    compose_memory(model(), memory, MODELS["tf"], torch.device("cpu"))
    assert [options for _, options in asked] == [expected] * 5
    # Beyond its limit torch would compute uncompiled, in silence.
    assert limits.recompile_limit == 5 and limits.fail_on_recompile_limit_hit and not limits.optimize_ddp


@pytest.mark.filterwarnings("default")  # the compiler warns of its own matters
@pytest.mark.parametrize("storage", ["plain", "fp8", "fp8_scaled", "int8", "nf4"])
def test_compiled_layers_keep_no_dequantised_weight(storage: Storage) -> None:
    """Without checkpointing too: saved for the backward pass are the layers' own buffers and a few activations.

    The backend traces and partitions as inductor does, and then computes as without compilation, so bits are the same.
    """

    def layer() -> FrozenLinear:
        made = nn.Linear(64, 64)
        return FrozenLinear.of_weight(StoredWeight.of(made.weight.detach()), made.bias, storage, torch.bfloat16)

    torch.manual_seed(0)
    layers = nn.Sequential(layer(), nn.GELU(), layer())
    own, others = {buffer.data_ptr() for buffer in layers.buffers()}, 0
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    expected = layers(x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)

    def pack(tensor: Tensor) -> Tensor:
        nonlocal others
        others += 0 if tensor.data_ptr() in own else tensor.nbytes
        return tensor

    torch._dynamo.reset()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = torch.compile(layers, backend="aot_eager_decomp_partition", fullgraph=True)(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, expected) and torch.equal(gradient, expected_gradient)
    assert others <= 2 * x.nbytes  # one weight in bfloat16 is 16 times x


@pytest.mark.parametrize("failing", ["missing", "broken"])
def test_a_compiler_that_is_not_there_or_fails_is_named(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(*_: Any, **__: Any) -> Any:
        def call(*args: Any) -> Any:
            if failing == "missing":
                raise TritonMissing(first_useful_frame=None)
            raise BackendCompilerFailed(lambda: None, ValueError("no such kernel\nand more"), None)

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    with limits.patch(recompile_limit=8, fail_on_recompile_limit_hit=False, optimize_ddp=True):
        compile_blocks(model, ["blocks"], MemorySection(compile=True))
    found = []
    with pytest.raises(ConfigError) as caught:
        model.blocks[0](torch.zeros(1, 2))
    found.append(str(caught.value))
    with pytest.raises(ConfigError) as caught:  # and before anything is loaded
        check_machine(SimpleNamespace(memory=MemorySection(compile=True)), torch.device("cpu"))  # type: ignore[arg-type]
    found.append(str(caught.value))
    reason = {"missing": "Cannot find a working triton installation", "broken": "(no such kernel)"}[failing]
    for message in found:
        assert message.startswith("memory.compile: inductor cannot compile here (") and reason in message
        assert message.endswith("install them, or set memory.compile = false")


def test_a_compiler_that_reads_no_float8_is_named_with_the_ways_out() -> None:
    def failing(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("type fp8e4nv not supported in this architecture")

    memory = MemorySection(compile=True, base_storage="fp8_scaled")
    check_float8(memory.model_copy(update={"compile_backend": "eager"}), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r'float8 on cpu \(type fp8e4nv .*"nf4" instead of "fp8_scaled"'):
        check_float8(memory.model_copy(update={"compile_backend": failing}), torch.device("cpu"))
