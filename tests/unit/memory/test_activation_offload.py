"""Inputs of checkpointed blocks in main memory: the same bits, the copies ahead of their use, the memory used again.

The CPU engine fills targets with not-a-number until somebody waits for the copy, so reading too early shows.
"""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.memory.activation_offload import ActivationOffload
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.memory.checkpointing import checkpoint_blocks
from musubi_tuner.memory.transfer import HostTransfer

pytestmark = pytest.mark.long

CPU = torch.device("cpu")


class Block(nn.Module):
    """Two streams, a shared vector, and dropout: what the blocks of the families take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a: Tensor, b: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        a = a + torch.dropout(torch.tanh(self.first(b)) * vec[:, None], 0.2, True)
        return a, b + torch.tanh(self.second(a))


class Model(nn.Module):
    def __init__(self, count: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        a, b = x, x * 2
        for block in self.blocks:
            a, b = block(a, b, vec)
        return a + b


def steps(model: Model, count: int = 3, tokens: tuple[int, ...] = (4, 7, 4)) -> list[Tensor]:
    """Losses and gradients of a few steps, with buckets of several sizes."""
    found = []
    for step in range(count):
        torch.manual_seed(step)
        loss = model(torch.randn(2, tokens[step % len(tokens)], 8), torch.randn(2, 8)).square().mean()
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("every", [1, 2])
def test_bits_are_those_without(every: int) -> None:
    model = Model()
    checkpoint_blocks(model, ["blocks"], every, ActivationOffload(CPU))
    assert same(steps(model), steps(Model()))


def test_streamed_blocks_too() -> None:
    model = Model()
    checkpoint_blocks(model, ["blocks"], 1, ActivationOffload(CPU))
    BlockSwap(model, {"blocks": 3}, CPU)
    assert same(steps(model), steps(Model()))


class Counting(HostTransfer):
    """Notes what is waited for while it has not been begun ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []

    def submit(self, key: int, target: Tensor, source: Tensor, after: Any, *, held: bool = False) -> None:
        self.log.append(("copy", key))
        super().submit(key, target, source, after, held=held)

    def wait(self, key: int) -> None:
        if key in self.pending:
            self.log.append(("wait", key))
        super().wait(key)


def test_inputs_come_back_one_block_ahead() -> None:
    engine = Counting()
    model = Model(3)
    checkpoint_blocks(model, ["blocks"], 1, ActivationOffload(CPU, engine))
    loss = model(torch.randn(1, 4, 8), torch.randn(1, 8)).sum()
    # Two streams of three blocks go out; the first input needs no gradient and is kept all the same.
    assert [entry for entry in engine.log if entry[0] == "copy"] == [("copy", key) for key in range(6)]
    # The third block waits for what the first one sends: its memory may be used again.
    assert engine.log.index(("wait", 0)) < engine.log.index(("copy", 4)) and ("wait", 2) not in engine.log
    engine.log.clear()
    loss.backward()
    copies = [key for what, key in engine.log if what == "copy"]
    assert copies[:2] == [4, 5] and sorted(copies) == list(range(6))
    # Block 1 (keys 2 and 3) begins to arrive before block 2 is recomputed for good, so before block 1 is asked for.
    arrived = {key: next(i for i, entry in enumerate(engine.log) if entry == ("copy", key)) for key in range(6)}
    used = {key: [i for i, entry in enumerate(engine.log) if entry == ("wait", key)][-1] for key in range(6)}
    assert arrived[2] < used[5] < used[2] and arrived[0] < used[3] < used[0]


class Watching(HostTransfer):
    """Copies at once and holds nothing; counts what is dropped before the computation has waited for its copy."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, list[list[bool]]] = {}
        self.watched = self.early = 0

    def submit(self, key: int, target: Tensor, source: Tensor, after: Any, *, held: bool = False) -> None:
        assert held
        target.copy_(source)
        waited = [False]
        self.copies.setdefault(key, []).append(waited)
        for tensor in (target, source):
            self.watched += 1
            weakref.finalize(tensor, self._dropped, waited).atexit = False

    def _dropped(self, waited: list[bool]) -> None:
        self.early += not waited[0]

    def wait(self, key: int) -> None:
        for waited in self.copies.pop(key, []):
            waited[0] = True


def test_nothing_is_dropped_before_its_copy_is_done() -> None:
    """So the engine of a GPU need not keep its memory for longer. With a graph that is dropped half-way, too."""
    engine, model = Watching(), Model()
    checkpoint_blocks(model, ["blocks"], 1, ActivationOffload(CPU, engine))
    steps(model, 2)
    out = model(torch.randn(2, 4, 8), torch.randn(2, 8)).sum()
    del out
    gc.collect()
    steps(model, 1)
    gc.collect()
    assert engine.watched >= 4 * 2 * 5 * 2 and engine.early == 0


def test_main_memory_is_used_again() -> None:
    offload = ActivationOffload(CPU)
    model = Model()
    checkpoint_blocks(model, ["blocks"], 1, offload)
    steps(model, 1)
    size = offload.bytes
    assert size == 5 * 2 * (2 * 4 * 8) * 4
    for _ in range(3):
        steps(model, 1)
    # A graph without a backward pass gives its buffers back too.
    loss = model(torch.randn(2, 4, 8), torch.randn(2, 8)).sum()
    del loss
    gc.collect()
    steps(model, 1)
    assert offload.bytes == size
    assert len(offload.free) == 10


@pytest.mark.parametrize("tokens", [(2, 4, 6, 8, 3), (8, 6, 4, 3, 2), (4, 8, 2, 8, 6)], ids=str)
def test_main_memory_is_what_the_largest_bucket_needs(tokens: tuple[int, ...]) -> None:
    """Whatever the order of the buckets, and for another dtype too."""
    offload = ActivationOffload(CPU)
    model = Model()
    checkpoint_blocks(model, ["blocks"], 1, offload)
    assert same(steps(model, 10, tokens), steps(Model(), 10, tokens))
    assert offload.bytes == 5 * 2 * (2 * 8 * 8) * 4
    model.bfloat16()
    model(torch.randn(2, 8, 8).bfloat16(), torch.randn(2, 8).bfloat16()).sum().backward()
    assert offload.bytes == 5 * 2 * (2 * 8 * 8) * 4 and len(offload.free) == 10


def test_main_memory_of_graphs_that_overlap() -> None:
    """A graph that is dropped only when the next is there: twice the memory of one, however often."""
    offload = ActivationOffload(CPU)
    model = Model()
    checkpoint_blocks(model, ["blocks"], 1, offload)
    loss = torch.zeros(())
    for _ in range(6):
        loss = model(torch.randn(2, 4, 8), torch.randn(2, 8)).sum()
    loss.backward()
    assert offload.bytes == 2 * 5 * 2 * (2 * 4 * 8) * 4


def test_what_a_dropped_graph_left_lands_nowhere() -> None:
    """A copy that was begun and never waited for is finished before its buffer is used again."""
    model, offload = Model(), ActivationOffload(CPU)
    checkpoint_blocks(model, ["blocks"], 1, offload)
    with pytest.raises(RuntimeError, match="half-way"):
        out = model(torch.randn(2, 4, 8), torch.randn(2, 8))
        raise RuntimeError("half-way")
    del out
    gc.collect()
    assert not offload.transfer.pending  # type: ignore[attr-defined]
    assert same(steps(model), steps(Model()))


def test_a_second_backward_pass_reads_them_again() -> None:
    model, plain = Model(), Model()
    checkpoint_blocks(model, ["blocks"], 1, ActivationOffload(CPU))
    grads = []
    for each in (model, plain):
        torch.manual_seed(0)
        loss = each(torch.randn(2, 4, 8), torch.randn(2, 8)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append([p.grad for p in each.parameters()])
    assert same(*grads)


def test_an_engine_that_does_not_wait_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    checkpoint_blocks(model, ["blocks"], 1, ActivationOffload(CPU))
    monkeypatch.setattr(HostTransfer, "wait", lambda self, key: None)
    found = steps(model, 1)
    assert any(tensor.isnan().any() for tensor in found)
