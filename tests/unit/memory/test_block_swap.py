"""Streaming blocks changes no bit, needs no hook, and a mistake in its order raises instead of passing.

The engine for a CPU delivers copies as late as it may and fills their targets with not-a-number until then, so a block that is
used too early shows.
"""

import copy
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from musubi_tuner.adapters.attach import attach, make_adapters, place_adapters, target_paths
from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.config.swap import most_swapped, swapped_counts
from musubi_tuner.errors import ConfigError
from musubi_tuner.memory.block_swap import BlockSwap, streamed_indices, weights
from musubi_tuner.memory.checkpointing import checkpoint_blocks
from musubi_tuner.memory.storage import Freeze, freeze_layers
from musubi_tuner.memory.transfer import HostTransfer, StagedTransfer, transfer_for
from musubi_tuner.models.flux_dev import Flux, FluxConfig
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep

pytestmark = pytest.mark.long

SPEC = MODELS["fd"]
CPU = torch.device("cpu")
ALL_BLOCKS = r"(double|single)_blocks\.\d+\..*"


def flux(double: int = 19, single: int = 38) -> Flux:
    torch.manual_seed(0)
    config = FluxConfig(
        in_channels=16, vec_in_dim=8, context_in_dim=8, hidden_size=16, num_heads=2, depth=double,
        depth_single_blocks=single, axes_dim=(2, 2, 4), mlp_ratio=2.0,
    )  # fmt: skip
    return Flux(config).requires_grad_(False)


def prepare(storage: Any, double: int = 19, single: int = 38, dropout: float = 0.0) -> Flux:
    """A model with stored layers and adapters that have moved a little."""
    model = flux(double, single)
    freeze_layers(model, Freeze(storage, SPEC.quantizable, plain=ALL_BLOCKS))
    section = AdapterSection(type="lora", rank=2, alpha=2.0, dropout=dropout)
    adapters = make_adapters(model, place_adapters(target_paths(model, SPEC.adapters), SPEC.adapters, section), section)
    generator = torch.Generator().manual_seed(1)
    for _, adapter in adapters.items():
        adapter.lora_up.weight.data.copy_(0.1 * torch.randn(adapter.lora_up.weight.shape, generator=generator))
    attach(model, adapters)
    return model.train()


def inputs(seed: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 4, 16, generator=generator),
        torch.zeros(2, 4, 3),
        torch.randn(2, 3, 8, generator=generator),
        torch.zeros(2, 3, 3),
        torch.rand(2, generator=generator),
        torch.randn(2, 8, generator=generator),
        torch.ones(2),
    )


def train(model: Flux, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and adapters afterwards."""
    optimizer = torch.optim.AdamW(model.adapters.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(*inputs(step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {key: tensor.clone() for key, tensor in model.adapters.state_dict().items()}


def swapped(model: Flux, count: int, **options: Any) -> BlockSwap:
    counts = {"double_blocks": len(model.double_blocks), "single_blocks": len(model.single_blocks)}
    return BlockSwap(model, swapped_counts(count, counts), CPU, **options)


def assert_same(first: Any, second: Any) -> None:
    assert first[0] == second[0]
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])


@pytest.fixture(scope="module")
def plain() -> Callable[[bool], Any]:
    """20 steps of the full number of blocks, without swap, without or with dropout."""
    return cache(lambda dropout: train(prepare("plain", dropout=0.1 * dropout), 20))


def cases(counts: list[int], quick: set[tuple[int, bool]]) -> list[Any]:
    """Every number of blocks without and with checkpointing; all but a few belong to the slow suite."""
    pairs = [(count, checkpointing) for count in counts for checkpointing in (False, True)]
    return [pytest.param(*pair, marks=[] if pair in quick else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("count", "checkpointing"), cases([1, 2, 25, 36, 37, 53], {(53, True)}))
def test_twenty_steps_are_those_without_swap(count: int, checkpointing: bool, plain: Callable[[bool], Any]) -> None:
    model = prepare("plain")
    if checkpointing:
        checkpoint_blocks(model, SPEC.block_lists)
    swap = swapped(model, count)
    assert_same(train(model, 20), plain(False))
    assert swap.recoveries == 0


@pytest.mark.parametrize(("count", "checkpointing"), cases([1, 20, 36], {(36, True)}))
def test_tinyflux_too(count: int, checkpointing: bool) -> None:
    spec = MODELS["tf"]

    def prepared() -> TinyFluxDeep:
        torch.manual_seed(0)
        model = TinyFluxDeep(TinyFluxConfig(
            hidden_size=16, num_attention_heads=2, attention_head_dim=8, axes_dims_rope=(2, 2, 4), joint_attention_dim=8,
            pooled_projection_dim=8, lune_expert_dim=4, lune_hidden_dim=8, sol_hidden_dim=8, mlp_ratio=2.0,
        )).requires_grad_(False)  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        freeze_layers(model, Freeze("plain", spec.quantizable, plain=ALL_BLOCKS))
        section = AdapterSection(type="lora", rank=2, alpha=2.0)
        adapters = make_adapters(
            model, place_adapters(target_paths(model, spec.adapters), spec.adapters, section), section
        )
        attach(model, adapters)
        return model.eval()

    def train_it(model: TinyFluxDeep) -> tuple[list[float], dict[str, Tensor]]:
        optimizer = torch.optim.AdamW(model.adapters.parameters(), lr=1e-2)
        losses = []
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(2, 6, 16, generator=generator)
            text, pooled = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 8, generator=generator)
            loss = model(x, text, pooled, torch.rand(2, generator=generator), height=2, width=3).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, dict(model.adapters.state_dict())

    model = prepared()
    if checkpointing:
        checkpoint_blocks(model, spec.block_lists)
    swap = swapped(model, count)  # type: ignore[arg-type]
    assert_same(train_it(model), train_it(prepared()))
    assert swap.recoveries == 0


@pytest.mark.slow
def test_dropout_and_checkpointing_too(plain: Callable[[bool], Any]) -> None:
    model = prepare("plain", dropout=0.1)
    checkpoint_blocks(model, SPEC.block_lists)
    swapped(model, 25)
    assert_same(train(model, 20), plain(True))


@pytest.mark.parametrize("storage", ["fp8", "fp8_scaled", "int8", "nf4"])
def test_every_storage(storage: Any) -> None:
    reference = train(prepare(storage, 3, 5), 3)
    model = prepare(storage, 3, 5)
    swapped(model, 4)
    assert_same(train(model, 3), reference)


@pytest.mark.parametrize("storage", ["plain", "fp8_scaled"])
def test_main_memory_that_is_not_pinned(storage: Any) -> None:
    reference = train(prepare(storage, 3, 5), 3)
    model = prepare(storage, 3, 5)
    swap = swapped(model, 4, pinned=False)
    assert isinstance(swap.transfer, StagedTransfer)
    assert_same(train(model, 3), reference)


def test_layers_that_are_given_their_buffers(plain: Callable[[bool], Any]) -> None:
    """As compiled blocks need it: a block holds views of the ring while it computes, and nothing before and after."""
    model = prepare("plain")
    checkpoint_blocks(model, SPEC.block_lists)
    swap = swapped(model, 25, bind=True)
    layer = swap.streamed[0].layers[0][0]
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, _: seen.append(module.stored is not None))
    assert_same(train(model, 20), plain(False))
    handle.remove()
    assert layer.stored is None and len(seen) == 40 and all(seen)


@pytest.mark.parametrize("ring", [1, 2, 3, 8])
def test_every_ring(ring: int) -> None:
    reference = train(prepare("plain", 4, 6), 3)
    model = prepare("plain", 4, 6)
    swap = swapped(model, 6, ring=ring)
    assert len(swap.slots) == min(ring, 6)
    assert_same(train(model, 3), reference)
    assert swap.recoveries == 0


@settings(max_examples=25, deadline=None)
@given(double=st.integers(1, 5), single=st.integers(1, 6), data=st.data())
def test_any_number_of_blocks(double: int, single: int, data: st.DataObject) -> None:
    most = max(0, double - 2) + max(0, single - 2)
    count = data.draw(st.integers(0, most))
    model, other = prepare("plain", double, single), prepare("plain", double, single)
    if data.draw(st.booleans()):
        checkpoint_blocks(other, SPEC.block_lists)
    if count:
        swapped(other, count, ring=data.draw(st.integers(1, 3)))
    assert_same(train(other, 2), train(model, 2))


def test_drawing_between_steps_costs_no_recovery_beyond_the_first() -> None:
    reference, model = prepare("plain", 4, 6), prepare("plain", 4, 6)
    swap = swapped(model, 6)
    with torch.no_grad():
        expected = reference(*inputs())
        assert torch.equal(model(*inputs()), expected) and torch.equal(model(*inputs()), expected)
    assert swap.recoveries == 0
    assert_same(train(model, 2), train(reference, 2))
    assert swap.recoveries == 0


def test_forward_with_gradients_but_no_backward_is_recovered_and_counted() -> None:
    reference, model = prepare("plain", 4, 6), prepare("plain", 4, 6)
    swap = swapped(model, 6)
    model(*inputs())
    assert swap.recoveries == 0
    assert_same(train(model, 2), train(reference, 2))
    assert swap.recoveries > 0


@pytest.mark.parametrize("name", ["double_blocks.1.img_mlp.2", "single_blocks.3.linear1"])
def test_exception_half_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model = prepare("plain", 4, 6), prepare("plain", 4, 6)
    swapped(model, 6)
    with monkeypatch.context() as patch:

        def fail(*args: Any) -> Tensor:
            raise MemoryError("out of memory")

        patch.setattr(model.get_submodule(name), "forward", fail)
        with pytest.raises(MemoryError):
            model(*inputs())
    assert_same(train(model, 2), train(reference, 2))


def failing_in_backward(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backward pass end in a layer."""
    layer = model.get_submodule(name)
    forward = layer.forward

    def fail(gradient: Tensor) -> None:
        raise MemoryError("out of memory")

    def fail_later(x: Tensor) -> Tensor:
        out = forward(x)
        out.register_hook(fail)
        return out

    monkeypatch.setattr(layer, "forward", fail_later)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["double_blocks.1.img_mlp.2", "single_blocks.3.linear1"])
def test_exception_half_way_through_the_backward_pass(
    name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, model = prepare("plain", 4, 6), prepare("plain", 4, 6)
    if checkpointing:
        checkpoint_blocks(model, SPEC.block_lists)
    swap = swapped(model, 6)
    with monkeypatch.context() as patch:
        failing_in_backward(model, name, patch)
        loss = model(*inputs()).square().mean()
        with pytest.raises(MemoryError):
            loss.backward()
    assert any(slot.in_use for slot in swap.slots)
    model.adapters.zero_grad()
    assert_same(train(model, 2), train(reference, 2))


def test_refilling_a_buffer_too_early_raises() -> None:
    model = prepare("plain", 4, 6)
    swap = swapped(model, 6)
    swap.enter(0)
    with pytest.raises(RuntimeError, match=r"would overwrite double_blocks.1 while that computes"):
        swap._load(len(swap.slots), None)


def test_reading_a_block_that_is_not_there_raises() -> None:
    model = prepare("plain", 4, 6)
    swap = swapped(model, 6)
    layer: Any = model.get_submodule(f"{swap.streamed[-1].name}.linear1")
    with pytest.raises(RuntimeError, match="is read while its weights are not on the device"):
        layer.dense_weight(torch.float32)
    # On its way is not there either: the engine for a CPU has filled the buffer with garbage.
    first: Any = model.get_submodule(f"{swap.streamed[0].name}.img_attn.qkv")
    with pytest.raises(RuntimeError, match="is read while its weights are not on the device"):
        first.dense_weight(torch.float32)
    assert swap.slots[0].buffer[:16].eq(0xFF).all()


def test_a_swap_that_forgets_to_wait_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostTransfer, "wait", lambda self, key: None)
    model = prepare("plain", 4, 6)
    swapped(model, 6)
    assert not model(*inputs()).isfinite().all()


def test_streamed_weights_lie_in_main_memory_only() -> None:
    model = prepare("plain", 4, 6)
    before = dict(weights(copy.deepcopy(model)))
    swap = swapped(model, 6)
    layer: Any = model.get_submodule(f"{swap.streamed[0].name}.img_attn.qkv")
    assert layer.stored is None and layer.bias is None
    assert swap.host_bytes > swap.device_bytes == 2 * max(len(block.master) for block in swap.streamed)
    after = dict(weights(model))
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)


# Trained models: weights, gradients and optimizer state of streamed blocks stay in main memory


def tinyflux(double: int = 3, single: int = 5) -> TinyFluxDeep:
    torch.manual_seed(0)
    model = TinyFluxDeep(TinyFluxConfig(
        hidden_size=16, num_attention_heads=2, attention_head_dim=8, axes_dims_rope=(2, 2, 4), joint_attention_dim=8,
        pooled_projection_dim=8, lune_expert_dim=4, lune_hidden_dim=8, sol_hidden_dim=8, mlp_ratio=2.0, lune_dropout=0.0,
        num_double_layers=double, num_single_layers=single,
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.train()


def train_all(
    model: TinyFluxDeep, steps: int, swap: BlockSwap | None = None, autocast: bool = False, accumulate: int = 1
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and all weights afterwards; clipped, with AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    if swap is not None:
        swap.watch(optimizer)
    losses = []
    for step in range(steps):
        for part in range(accumulate):
            generator = torch.Generator().manual_seed(100 * step + part)
            x = torch.randn(2, 6, 16, generator=generator)
            text, pooled = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 8, generator=generator)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                out = model(x, text, pooled, torch.rand(2, generator=generator), height=2, width=3)
            loss = out.float().square().mean()
            loss.backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        losses.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {key: tensor.clone() for key, tensor in model.state_dict().items()}


def swapped_training(model: TinyFluxDeep, count: int, **options: Any) -> BlockSwap:
    counts = {"double_blocks": len(model.double_blocks), "single_blocks": len(model.single_blocks)}
    return BlockSwap(model, swapped_counts(count, counts), CPU, **options)


@pytest.mark.parametrize(("count", "checkpointing"), cases([1, 20, 36], {(36, True)}))
def test_twenty_steps_of_a_trained_model(count: int, checkpointing: bool) -> None:
    model = tinyflux(15, 25)
    if checkpointing:
        checkpoint_blocks(model, MODELS["tf"].block_lists)
    swap = swapped_training(model, count)
    assert_same(train_all(model, 20, swap), train_all(tinyflux(15, 25), 20))
    assert swap.recoveries == 0


class AtOnce(HostTransfer):
    """Delivers copies as early as they may come, so that one made before the weights changed shows."""

    def submit(self, key: int, target: Tensor, source: Tensor, after: Any, *, held: bool = False) -> None:
        target.copy_(source)


@pytest.mark.parametrize("engine", [HostTransfer, AtOnce])
@pytest.mark.parametrize("ring", [1, 2, 3])
@pytest.mark.parametrize("options", [{"autocast": True}, {"accumulate": 3}], ids=str)
def test_trained_model_with_every_ring(ring: int, options: dict[str, Any], engine: type[HostTransfer]) -> None:
    model = tinyflux()
    swap = swapped_training(model, 4, ring=ring, transfer=engine())
    assert_same(train_all(model, 4, swap, **options), train_all(tinyflux(), 4, **options))
    assert swap.recoveries == 0


@settings(max_examples=8, deadline=None)
@given(double=st.integers(1, 4), single=st.integers(1, 5), data=st.data())
def test_any_number_of_trained_blocks(double: int, single: int, data: st.DataObject) -> None:
    most = max(0, double - 2) + max(0, single - 2)
    count = data.draw(st.integers(0, most))
    options = {"accumulate": data.draw(st.integers(1, 2)), "autocast": data.draw(st.booleans())}
    model, swap = tinyflux(double, single), None
    if data.draw(st.booleans()):
        checkpoint_blocks(model, MODELS["tf"].block_lists)
    if count:
        engine = data.draw(st.sampled_from([HostTransfer, AtOnce]))()
        swap = swapped_training(model, count, ring=data.draw(st.integers(1, 3)), transfer=engine)
    assert_same(train_all(model, 2, swap, **options), train_all(tinyflux(double, single), 2, **options))
    assert swap is None or swap.recoveries == 0


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["double_blocks.1.img_mlp.fc2", "single_blocks.3.attn.qkv"])
def test_exception_half_way_through_a_step_of_a_trained_model(
    name: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the broken step are dropped; the next one finds all weights as they were."""
    model = tinyflux()
    swap = swapped_training(model, 4)
    with monkeypatch.context() as patch:
        if backward:
            failing_in_backward(model, name, patch)
        else:

            def fail(x: Tensor) -> Tensor:
                raise MemoryError("out of memory")

            patch.setattr(model.get_submodule(name), "forward", fail)
        with pytest.raises(MemoryError):
            train_all(model, 1, swap)
    model.zero_grad()
    assert_same(train_all(model, 3, swap), train_all(tinyflux(), 3))


def test_copies_older_than_loaded_weights_are_found_out() -> None:
    """Without being told that weights were loaded, the swap finds out, and counts the copies made on the spot."""
    model, other = tinyflux(), tinyflux()
    swap = swapped_training(model, 4)
    changed = {key: tensor + 0.01 for key, tensor in other.state_dict().items()}
    model.load_state_dict(changed)
    other.load_state_dict(changed)
    assert_same(train_all(model, 4, swap), train_all(other, 4))
    assert swap.recoveries == 2


def test_trained_weights_gradients_and_state_lie_in_main_memory() -> None:
    model = tinyflux()
    names = list(model.state_dict())
    swap = swapped_training(model, 4)
    assert list(model.state_dict()) == names
    layer: Any = model.get_submodule(f"{swap.streamed[0].name}.attn.img_qkv" if "double" in swap.streamed[0].name
                                     else f"{swap.streamed[0].name}.attn.qkv")  # fmt: skip
    master = swap.streamed[0].master
    assert layer.weight.data_ptr() - master.data_ptr() in range(len(master))
    kept = [parameter for block in swap.streamed for parameter in block.trained]
    assert any(p is layer.weight for p in kept) and not any(p is model.img_in.weight for p in kept)
    model.load_state_dict(tinyflux().state_dict())
    assert swap.streamed[0].version != swap.slots[0].version


def test_a_copy_that_could_not_begin_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model = prepare("plain", 4, 6), prepare("plain", 4, 6)
    swapped(model, 6)
    with monkeypatch.context() as patch:

        def interrupted(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(HostTransfer, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(*inputs())
    assert_same(train(model, 2), train(reference, 2))


def test_replaced_parameters_are_found_out() -> None:
    model = tinyflux()
    swapped_training(model, 4)
    model.load_state_dict(tinyflux().state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="was replaced; load weights into it in place"):
        train_all(model, 1)


# Which blocks


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, (0, 0)), (1, (0, 1)), (2, (0, 2)), (25, (0, 25)), (36, (0, 36)), (37, (1, 36)), (53, (17, 36))],
)
def test_single_blocks_first(count: int, expected: tuple[int, int]) -> None:
    found = swapped_counts(count, {"double_blocks": 19, "single_blocks": 38})
    assert (found["double_blocks"], found["single_blocks"]) == expected


@pytest.mark.parametrize(("count", "expected"), [(1, (0, 3)), (2, (1, 3)), (25, (12, 27)), (34, (17, 35))])
def test_balanced_is_the_split_of_musubi_tuner(count: int, expected: tuple[int, int]) -> None:
    found = swapped_counts(count, {"double_blocks": 19, "single_blocks": 38}, "balanced")
    assert (found["double_blocks"], found["single_blocks"]) == expected


@pytest.mark.parametrize(
    ("blocks", "policy", "most"),
    [((19, 38), "single_first", 53), ((19, 38), "balanced", 34), ((15, 25), "single_first", 36), ((15, 25), "balanced", 22),
     ((1, 1), "single_first", 0), ((1, 4), "single_first", 2), ((4, 3), "balanced", 0), ((0, 9), "balanced", 1)],
)  # fmt: skip
def test_too_many_blocks(blocks: tuple[int, int], policy: str, most: int) -> None:
    lists = dict(zip(("double_blocks", "single_blocks"), blocks))
    assert most_swapped(lists, policy) == most
    for count in range(most + 1):
        found = swapped_counts(count, lists, policy)
        assert all(0 <= found[name] <= max(0, total - 2) for name, total in lists.items())
    limit = rf"memory\.blocks_to_swap is {most + 1}, at most {most} of {blocks[0]} double_blocks \+ {blocks[1]} single_blocks"
    with pytest.raises(ConfigError, match=limit):
        swapped_counts(most + 1, lists, policy)


def test_streamed_blocks_are_spread_evenly() -> None:
    assert streamed_indices(38, 2) == [9, 28]
    assert streamed_indices(5, 5) == [0, 1, 2, 3, 4]
    for swapped_blocks in range(1, 37):
        found = streamed_indices(38, swapped_blocks)
        gaps = [b - a for a, b in itertools.pairwise(found)]
        assert len(set(found)) == swapped_blocks and max(gaps, default=1) - min(gaps, default=1) <= 1


def test_device_without_an_engine() -> None:
    with pytest.raises(ConfigError, match=r"memory\.blocks_to_swap: is not supported on mps"):
        transfer_for(torch.device("mps"))
