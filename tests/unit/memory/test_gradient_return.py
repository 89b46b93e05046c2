"""Gradients of streamed blocks come to main memory beside the computation, and are those of autograd."""

import time
from collections.abc import Callable
from threading import Event, Timer
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.memory.gradient_return import GradientReturn
from musubi_tuner.memory.transfer import HostTransfer

CPU = torch.device("cpu")


class Block(nn.Module):
    """Uses one of its layers twice, and one not at all in some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.seldom = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.fixed = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.tanh(self.first(x)))
        if x.shape[1] > 3:
            x = x + self.seldom(x)
        return torch.tanh(self.fixed(self.second(x)))


class Blocks(nn.Module):
    """Six, of which four are streamed below."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def swapped(transfer: Any = None) -> tuple[Blocks, GradientReturn]:
    model = Blocks()
    found = BlockSwap(model, {"blocks": 4}, CPU).gradients
    assert found is not None
    if transfer is not None:
        found.transfer = transfer
    return model, found


def backward(model: nn.Module, seed: int, tokens: int = 3) -> None:
    x = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert (other is None) == (tensor is None), name
        assert tensor is None or (other is not None and torch.equal(other, tensor)), name


@pytest.mark.parametrize("tokens", [(3, 3, 3), (3, 4, 3), (4, 4, 4)])
def test_sums_over_micro_batches_are_those_of_autograd(tokens: tuple[int, ...]) -> None:
    """Layers that have no gradient yet, or again, and layers that have two from one backward pass."""
    model, plain = swapped()[0], Blocks()
    for _ in range(2):
        for seed, count in enumerate(tokens):
            backward(model, seed, count)
            backward(plain, seed, count)
            assert_same(gradients(model), gradients(plain))
        model.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("keep", [True, False])
def test_gradients_that_are_there_already_are_added_to(keep: bool) -> None:
    """Set to zero instead of being dropped; and given by somebody else."""
    model, plain = swapped()[0], Blocks()
    for each in (model, plain):
        backward(each, 0)
        if keep:
            each.zero_grad(set_to_none=False)
        else:
            for parameter in each.parameters():
                parameter.grad = torch.ones_like(parameter)
        backward(each, 1)
        backward(each, 2)
    assert_same(gradients(model), gradients(plain))


def test_an_interrupted_backward_pass_leaves_no_gradients() -> None:
    model, plain = swapped()[0], Blocks()

    def fail(gradient: Tensor) -> None:
        raise MemoryError("out of memory")

    handle = model.blocks[1].register_forward_hook(lambda *args: args[-1].register_hook(fail) and None)
    with pytest.raises(MemoryError):
        backward(model, 0)
    handle.remove()
    streamed = [name for name, p in model.named_parameters() if name.startswith("blocks.3") and p.requires_grad]
    assert streamed and all(gradients(model)[name] is None for name in streamed)
    model.zero_grad()
    backward(model, 1)
    backward(plain, 1)
    assert_same(gradients(model), gradients(plain))


def test_a_gradient_outside_of_its_blocks_backward_pass_raises() -> None:
    model, _ = swapped()
    layer: Any = model.blocks[5].second
    with pytest.raises(RuntimeError, match="a gradient of streamed block 3 comes when the buffer is that of None"):
        layer.leave("weight", torch.zeros(4, 4))


class Noted(HostTransfer):
    """Writes down what is asked of it; nothing arrives before ``let_go``, nor at once."""

    def __init__(self, let_go: Event) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.let_go = let_go

    def submit(self, key: int, *args: Any, **options: Any) -> None:
        self.calls.append(("copy", key))
        super().submit(key, *args, **options)

    def wait(self, key: int) -> None:
        self.calls.append(("wait", key))
        super().wait(key)

    def host_wait(self, key: int) -> None:
        assert self.let_go.wait(30)
        time.sleep(0.05)
        HostTransfer.wait(self, key)
        self.calls.append(("arrived", key))

    def count(self, name: str) -> int:
        return [call for call, _ in self.calls].count(name)


def test_the_backward_pass_goes_on_while_gradients_arrive() -> None:
    """One copy per block. The third block that comes back is computed while nothing of the first has arrived."""
    engine = Noted(Event())
    model, found = swapped(engine)
    send: Callable[[int], None] = found.send

    def released_late(rank: int) -> None:
        if rank == 1:  # of 3, 2, 1, 0
            assert engine.count("copy") == 2 and engine.count("arrived") == 0
            Timer(0.1, engine.let_go.set).start()
        send(rank)

    found.send = released_late  # type: ignore[method-assign]
    backward(model, 0)
    plain = Blocks()
    backward(plain, 0)
    assert_same(gradients(model), gradients(plain))
    # A buffer is filled when the copy out of it is ordered before, and copied to where nothing waits to be added up.
    for key in (0, 1):
        own = [call for call, each in engine.calls if each == key]
        assert own in (
            ["wait", "copy", "wait", "arrived", "copy", "arrived"],
            ["wait", "copy", "arrived", "wait", "copy", "arrived"],
        )


def test_gradients_that_are_not_waited_for_are_found_out() -> None:
    """The engine for a CPU fills a target with not-a-number until it is waited for."""

    class Forgetful(HostTransfer):
        def host_wait(self, key: int) -> None:
            """Too soon."""

    model, _ = swapped(Forgetful())
    backward(model, 0)
    assert any(tensor is not None and not tensor.isfinite().all() for tensor in gradients(model).values())


def test_a_buffer_that_is_filled_too_early_is_found_out() -> None:
    """Where the computation does not wait for the copy out of it, and the copy is late."""
    filled = Event()

    class Late(HostTransfer):
        def wait(self, key: int) -> None:
            """Forgotten."""

        def host_wait(self, key: int) -> None:
            assert filled.wait(30)
            super().wait(key)

    model, found = swapped(Late())
    put: Callable[..., None] = found.put

    def noting(rank: int, *args: Any) -> None:
        put(rank, *args)
        if rank == 1:
            filled.set()

    found.put = noting  # type: ignore[method-assign]
    backward(model, 0)
    plain = Blocks()
    backward(plain, 0)
    last = "blocks.5.second.weight"  # the last block is streamed, and comes back first
    assert not torch.equal(gradients(model)[last], gradients(plain)[last])  # type: ignore[arg-type]
