"""Copies from main memory to the device, beside the computation. The interface, and one engine per kind of device."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from musubi_tuner.errors import ConfigError, TrainingError
from musubi_tuner.memory.flat import pinned_pieces
from musubi_tuner.units import Bytes, format_bytes

POISON = 0xFF
"""Bytes that the CPU engine fills a target with until the copy has arrived; as floats they are not a number."""


class Transfer(Protocol):
    """Copies under a key, one at a time per key. One thread may submit and wait on the host while another waits."""

    def record(self) -> Any:
        """A mark after everything computed so far."""

    def submit(self, key: int, target: Tensor, source: Tensor, after: Any, *, held: bool = False) -> None:
        """Begin to copy once the mark has passed; the target must not be read before `wait`.

        Args:
            held: the caller drops neither tensor before it has called `wait`.
        """

    def wait(self, key: int) -> None:
        """Let the computation that follows wait for the copy of a key; a second call does nothing."""

    def host_wait(self, key: int) -> None:
        """Wait on the host for the last copy of a key, whatever the computation has waited for."""

    def sync(self) -> None:
        """Wait for everything."""


class HostTransfer:
    """For a CPU: copies arrive as late as they may. Until then their target is garbage, so that reading early shows."""

    def __init__(self) -> None:
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.lock = Lock()

    def record(self) -> None:
        """Computation on a CPU is always done."""

    def submit(self, key: int, target: Tensor, source: Tensor, after: Any, *, held: bool = False) -> None:
        """Poison the target, copy later."""
        with self.lock:
            target.view(torch.uint8).fill_(POISON)
            self.pending[key] = (target, source)

    def wait(self, key: int) -> None:
        """Copy now."""
        with self.lock:  # who comes second finds it copied
            if key in self.pending:
                target, source = self.pending.pop(key)
                target.copy_(source)

    def host_wait(self, key: int) -> None:
        """Copy now."""
        self.wait(key)

    def sync(self) -> None:
        """Copy everything."""
        for key in list(self.pending):
            self.wait(key)


MANY_EVENTS = 64
"""Remembered last copies from which on those that are done are forgotten."""


class CudaTransfer:
    """For a GPU: a side stream copies while the compute stream works. Asynchronous only from pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.done: dict[int, torch.cuda.Event] = {}
        self.last: dict[int, torch.cuda.Event] = {}

    def record(self) -> torch.cuda.Event:
        """An event on the compute stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def submit(self, key: int, target: Tensor, source: Tensor, after: Any, *, held: bool = False) -> None:
        """Copy on the side stream, after the event."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            for tensor in (target, source):
                if tensor.is_cuda and not held:
                    # Whoever frees it now must not have it reused before the copy has passed. It is then free only when the
                    # host sees that, which may be many blocks later.
                    tensor.record_stream(self.stream)
            event = torch.cuda.Event()
            event.record(self.stream)
        if len(self.last) >= MANY_EVENTS:
            self.last = {other: copy for other, copy in self.last.items() if not copy.query()}
        self.done[key] = self.last[key] = event

    def wait(self, key: int) -> None:
        """Let the compute stream wait for the copy; the host does not."""
        event = self.done.pop(key, None)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def host_wait(self, key: int) -> None:
        """Wait on the host for the last copy of a key."""
        event = self.last.pop(key, None)
        if event is not None:
            with torch.cuda.device(self.device):  # else a thread of its own would wake up the first GPU
                event.synchronize()

    def sync(self) -> None:
        """Wait on the host."""
        self.stream.synchronize()


def host_buffer(size: int, pinned: bool, advice: str) -> Tensor:
    """Flat bytes of main memory, which lasts.

    Args:
        size: in bytes. advice: what to do where that much cannot be pinned.

    Raises:
        TrainingError: if it cannot be pinned.
    """
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:
        if not pinned or "out of memory" not in str(error):
            raise
        raise TrainingError(
            f"main memory: {format_bytes(size)} more cannot be pinned, which the device needs for its copies; {advice}"
        ) from None


def block_buffers(sizes: Sequence[Bytes], pinned: bool, advice: str) -> Iterator[Tensor]:
    """Flat bytes of main memory for one block after the other; several share a piece of pinned memory.

    Args:
        sizes: in bytes. advice: see `host_buffer`.

    Raises:
        TrainingError: if it cannot be pinned.
    """
    left = iter(sizes)
    for size, count in pinned_pieces(sizes) if pinned else [(size, 1) for size in sizes]:
        piece, start = host_buffer(size, pinned, advice), 0
        for each in itertools.islice(left, count):
            yield piece[start : start + each]
            start += each


STAGING_BYTES = 32 << 20
"""Of each of the two staging buffers."""


class StagedTransfer:
    """For main memory that is not pinned: a thread brings it through two small pinned buffers to another engine.

    While one buffer is copied to the device, the thread fills the other; the program waits for the thread only where it
    needs the copy. A buffer is filled again once the copy out of it is done.
    """

    def __init__(self, device: torch.device, inner: Transfer, size: int = STAGING_BYTES) -> None:
        self.device, self.inner, self.size = device, inner, size
        self.thread = ThreadPoolExecutor(1, "staging")
        pinned, advice = device.type == "cuda", "turn memory.blocks_to_swap off"
        self.buffers = [host_buffer(size, pinned, advice) for _ in range(2)]
        self.copied_by: list[int | None] = [None, None]
        """Per buffer, the other engine's key of the last copy out of it. Of the thread alone, as `turn`."""
        self.turn = 0
        self.pending: dict[int, Future[None]] = {}

    def record(self) -> Any:
        """As the other engine."""
        return self.inner.record()

    def submit(self, key: int, target: Tensor, source: Tensor, after: Any, *, held: bool = False) -> None:
        """Begin in the thread; target and source are flat bytes."""
        self.pending[key] = self.thread.submit(self._copy, key, target, source, after)

    def _copy(self, key: int, target: Tensor, source: Tensor, after: Any) -> None:
        for start in range(0, len(source), self.size):
            part, turn = slice(start, min(start + self.size, len(source))), self.turn
            before = self.copied_by[turn]
            if before is not None:
                self.inner.host_wait(before)
            staging = self.buffers[turn][: part.stop - part.start]
            staging.copy_(source[part])
            self.copied_by[turn] = 2 * key + turn
            self.inner.submit(2 * key + turn, target[part], staging, after)
            self.turn = 1 - turn

    def wait(self, key: int) -> None:
        """Wait for the thread, then let the computation wait for the copies of this key."""
        pending = self.pending.pop(key, None)
        if pending is not None:
            pending.result()
            for turn in (0, 1):  # copies arrive in order, so the last one out of each buffer stands for all
                self.inner.wait(2 * key + turn)

    def host_wait(self, key: int) -> None:
        """Wait on the host."""
        self.wait(key)
        self.inner.sync()

    def sync(self) -> None:
        """Wait for everything."""
        for key in list(self.pending):
            self.host_wait(key)


def transfer_for(device: torch.device, key: str = "memory.blocks_to_swap", *, pinned: bool = True) -> Transfer:
    """The engine of a device.

    Args:
        key: whose setting asks for it. pinned: the main memory is pinned; else it goes through small pinned buffers.

    Raises:
        ConfigError: if the device has none.
    """
    engines: dict[str, Callable[[], Transfer]] = {"cuda": lambda: CudaTransfer(device), "cpu": HostTransfer}
    if device.type not in engines:
        raise ConfigError(f"{key}: is not supported on {device.type}; turn it off")
    engine = engines[device.type]()
    return engine if pinned else StagedTransfer(device, engine)
