"""Copies through two small buffers: all bytes arrive, in order, whatever the sizes. What the engine of a GPU asks of its streams."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from musubi_tuner.errors import TrainingError
from musubi_tuner.memory import block_swap
from musubi_tuner.memory.activation_offload import ActivationOffload
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.memory.checkpointing import checkpoint_blocks
from musubi_tuner.memory.storage import Freeze, freeze_layers
from musubi_tuner.memory.transfer import (
    MANY_EVENTS,
    CudaTransfer,
    HostTransfer,
    StagedTransfer,
    host_buffer,
    transfer_for,
)

CPU = torch.device("cpu")


def random_bytes(size: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_sizes_around_the_buffer() -> None:
    engine = StagedTransfer(CPU, HostTransfer(), size=64)
    sources = [random_bytes(size, size) for size in (0, 1, 63, 64, 65, 128, 1000)]
    targets = [torch.empty(len(source), dtype=torch.uint8) for source in sources]
    for key, (target, source) in enumerate(zip(targets, sources)):
        engine.submit(key, target, source, engine.record())
    for key in reversed(range(len(sources))):
        engine.wait(key)
        engine.wait(key)  # does nothing
    engine.sync()
    assert all(torch.equal(target, source) for target, source in zip(targets, sources))


def test_later_copy_into_the_same_target_wins() -> None:
    engine = StagedTransfer(CPU, HostTransfer(), size=16)
    target = torch.empty(200, dtype=torch.uint8)
    for seed in range(5):
        engine.submit(0, target, random_bytes(200, seed), None)
    engine.wait(0)
    engine.sync()
    assert torch.equal(target, random_bytes(200, 4))


class Slow(HostTransfer):
    """An engine whose host waits last until a test lets them pass."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.open = threading.Event(), threading.Event()

    def host_wait(self, key: int) -> None:
        self.asked.set()
        assert self.open.wait(60)
        super().host_wait(key)


def test_the_program_goes_on_while_the_thread_waits_for_a_buffer() -> None:
    """Only for the copy that it needs does it wait: those behind it may have to wait for a buffer, and that for the device."""
    inner = Slow()
    engine = StagedTransfer(CPU, inner, size=16)
    targets = [torch.empty(32, dtype=torch.uint8) for _ in range(2)]
    for key, target in enumerate(targets):
        engine.submit(key, target, random_bytes(32, key), None)
    assert inner.asked.wait(60)  # the second copy has begun, and both buffers are taken
    engine.wait(0)
    assert torch.equal(targets[0], random_bytes(32, 0))
    inner.open.set()
    engine.sync()
    assert torch.equal(targets[1], random_bytes(32, 1))


def test_pageable_memory_goes_through_staging() -> None:
    assert isinstance(transfer_for(CPU, pinned=False), StagedTransfer)
    assert isinstance(transfer_for(CPU), HostTransfer)


# The engine of a GPU, with streams and events that only note what is asked of them


class Event:
    """Notes where it was recorded. It has passed once the host has waited for it, or when a test says so."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.passed = False

    def record(self, stream: "Stream") -> None:
        self.stream = stream
        stream.log.append(("record", self))

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True


class Stream:
    """Notes what was put on it, in order."""

    def __init__(self, device: Any = None) -> None:
        self.log: list[tuple[str, Any]] = []

    def wait_event(self, event: Event) -> None:
        assert event.stream is not None, "waits for an event that was never recorded"
        self.log.append(("wait", event))


class Gpu(threading.local):
    """The compute stream, and which stream copies go to: in every thread its own, and at first the compute stream."""

    def __init__(self, compute: Stream) -> None:
        self.compute = self.current = compute

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@contextmanager
def any_device(device: torch.device) -> Iterator[None]:
    yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu(Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: gpu.current)
    monkeypatch.setattr(torch.cuda, "stream", gpu.on)
    monkeypatch.setattr(torch.cuda, "device", any_device)
    copy = Tensor.copy_

    def noted(self: Tensor, *args: Any, **options: Any) -> Tensor:
        gpu.current.log.append(("copy", options))
        return copy(self, *args, **options)

    monkeypatch.setattr(Tensor, "copy_", noted)
    return gpu


def test_a_copy_goes_to_the_side_stream_after_its_mark(gpu: Gpu) -> None:
    engine: Any = CudaTransfer(CPU)
    source, target = random_bytes(100, 1), torch.zeros(100, dtype=torch.uint8)
    mark: Any = engine.record()
    assert gpu.compute.log == [("record", mark)]
    engine.submit(7, target, source, mark)
    done = engine.done[7]
    assert engine.stream.log == [("wait", mark), ("copy", {"non_blocking": True}), ("record", done)]
    assert gpu.compute.log == [("record", mark)] and gpu.current is gpu.compute
    assert torch.equal(target, source)
    engine.submit(7, target, source, None)  # no mark: nothing to wait for
    assert [what for what, _ in engine.stream.log[3:]] == ["copy", "record"]


def test_the_compute_stream_waits_for_a_copy_once(gpu: Gpu) -> None:
    engine: Any = CudaTransfer(CPU)
    for key in (0, 1):
        engine.submit(key, torch.zeros(4), torch.ones(4), engine.record())
    gpu.compute.log.clear()
    second = engine.done[1]
    engine.wait(1)
    engine.wait(1)
    engine.wait(2)  # never begun
    assert gpu.compute.log == [("wait", second)] and not second.passed
    # The host waits for the last copy of a key although the computation did so already, and once too.
    engine.host_wait(1)
    assert second.passed and not engine.done.keys() & {1}
    second.passed = False
    engine.host_wait(1)
    assert not second.passed


def test_copies_that_are_done_are_forgotten(gpu: Gpu) -> None:
    """Keys that never come again and that no host waits for: what is remembered stays small."""
    engine: Any = CudaTransfer(CPU)
    for key in range(20 * MANY_EVENTS):
        engine.submit(key, torch.zeros(4), torch.ones(4), None)
        engine.wait(key)
        engine.last[key].passed = True
        assert len(engine.last) <= MANY_EVENTS and not engine.done
    # Those under way are kept, however many.
    for key in range(2 * MANY_EVENTS):
        engine.submit(key, torch.zeros(4), torch.ones(4), None)
    assert set(range(2 * MANY_EVENTS)) <= set(engine.last)


class FiveBlocks(torch.nn.Module):
    """Blocks one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_training_leaves_few_events_behind(gpu: Gpu) -> None:
    """Streamed blocks and inputs kept in main memory: keys come again, so their number is that of one step."""

    model = FiveBlocks()
    engine: Any = CudaTransfer(CPU)
    swapping: Any = CudaTransfer(CPU)
    checkpoint_blocks(model, ["blocks"], 1, ActivationOffload(CPU, engine))
    BlockSwap(model, {"blocks": 3}, CPU, transfer=swapping)
    for tokens in (3, 5, 4, 5):
        model(torch.randn(1, tokens, 8, requires_grad=True)).sum().backward()
        assert set(engine.last) == set(range(5)) and set(swapping.last) == {0, 1}
        assert not engine.done
    # Every copy into or out of a buffer is behind a mark of the computation.
    for each in (engine, swapping):
        kinds = "".join({"wait": "w", "copy": "c", "record": "r"}[what] for what, _ in each.stream.log)
        assert kinds == "wcr" * (len(kinds) // 3)


@pytest.mark.parametrize("held", [False, True])
def test_memory_that_nobody_holds_is_marked_as_used_by_the_copy(held: bool, gpu: Gpu) -> None:
    marked: list[Any] = []

    class OnDevice:
        is_cuda = True

        def copy_(self, source: Any, non_blocking: bool) -> None:
            assert non_blocking

        def record_stream(self, stream: Stream) -> None:
            marked.append(stream)

    engine: Any = CudaTransfer(CPU)
    engine.submit(0, OnDevice(), OnDevice(), None, held=held)
    assert marked == ([] if held else [engine.stream] * 2)


def test_staged_copies_are_waited_for_by_their_own_key(gpu: Gpu) -> None:
    """Two copies of two parts each are on their way; the computation that needs the first does not wait for the second."""
    inner: Any = CudaTransfer(CPU)
    engine = StagedTransfer(CPU, inner, size=16)
    for key in range(2):
        engine.submit(key, torch.empty(32, dtype=torch.uint8), random_bytes(32, key), engine.record())
    engine.pending[1].result()
    copies = [event for what, event in inner.stream.log if what == "record"]
    for key in range(2):
        engine.wait(key)
        waited = [event for what, event in gpu.compute.log if what == "wait"]
        assert waited == copies[: 2 * (key + 1)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_a_buffer_is_refilled_behind_the_last_computation_that_reads_it(
    trains: bool, checkpointing: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event that a copy waits for stands behind every use of the buffer before, on the stream that computes."""

    fetch, log = block_swap._Residence.fetch, gpu.compute.log

    def read(self: Any, layer: Any, name: str) -> Tensor | None:
        log.append(("compute", self.rank % len(self.swap.slots)))
        return fetch(self, layer, name)

    monkeypatch.setattr(block_swap._Residence, "fetch", read)
    engine: Any = CudaTransfer(CPU)
    submit, refills = engine.submit, []

    def checked(key: int, target: Tensor, source: Tensor, after: Any) -> None:
        uses = [index for index, entry in enumerate(log) if entry == ("compute", key)]
        assert log.index(("record", after)) > max(uses, default=-1)
        refills.append(bool(uses))
        submit(key, target, source, after)

    engine.submit = checked
    model = FiveBlocks()
    if not trains:
        freeze_layers(model, Freeze("plain", r"nothing", plain=r"blocks\..*"))
    if checkpointing:
        checkpoint_blocks(model, ["blocks"], 1)
    BlockSwap(model, {"blocks": 5}, CPU, transfer=engine)
    for _ in range(3):
        model(torch.randn(1, 3, 8, requires_grad=True)).sum().backward()
    # 5 blocks pass through 2 buffers forward and back: 3 refills each way, and the first blocks once more.
    assert sum(refills) >= 3 * 6 - 2


def test_main_memory_that_cannot_be_pinned_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(TrainingError) as caught:
        host_buffer(3 << 30, True, "set memory.swap_pinned = false")
    for part in ("main memory", "3.00 GiB", "memory.swap_pinned = false"):
        assert part in str(caught.value)
    with pytest.raises(RuntimeError, match="CUDA error"):
        host_buffer(3 << 30, False, "")
