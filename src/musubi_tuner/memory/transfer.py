"""Copies from main memory to the device, beside the computation. The interface, and one engine per kind of device."""

from typing import Any, Protocol

import torch
from torch import Tensor

from musubi_tuner.errors import ConfigError

POISON = 0xFF
"""Bytes that the CPU engine fills a target with until the copy has arrived; as floats they are not a number."""


class Transfer(Protocol):
    """Copies under a key, one at a time per key."""

    def record(self) -> Any:
        """A mark after everything computed so far."""

    def submit(self, key: int, target: Tensor, source: Tensor, after: Any) -> None:
        """Begin to copy once the mark has passed; the target must not be read before `wait`."""

    def wait(self, key: int) -> None:
        """Let the computation that follows wait for the copy of a key; a second call does nothing."""

    def sync(self) -> None:
        """Wait for everything."""


class HostTransfer:
    """For a CPU: copies arrive as late as they may. Until then their target is garbage, so that reading early shows."""

    def __init__(self) -> None:
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}

    def record(self) -> None:
        """Computation on a CPU is always done."""

    def submit(self, key: int, target: Tensor, source: Tensor, after: Any) -> None:
        """Poison the target, copy later."""
        target.fill_(POISON)
        self.pending[key] = (target, source)

    def wait(self, key: int) -> None:
        """Copy now."""
        if key in self.pending:
            target, source = self.pending.pop(key)
            target.copy_(source)

    def sync(self) -> None:
        """Copy everything."""
        for key in list(self.pending):
            self.wait(key)


class CudaTransfer:
    """For a GPU: a side stream copies while the compute stream works. Asynchronous only from pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.done: dict[int, torch.cuda.Event] = {}

    def record(self) -> torch.cuda.Event:
        """An event on the compute stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def submit(self, key: int, target: Tensor, source: Tensor, after: Any) -> None:
        """Copy on the side stream, after the event."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            target.record_stream(self.stream)
            event = torch.cuda.Event()
            event.record(self.stream)
        self.done[key] = event

    def wait(self, key: int) -> None:
        """Let the compute stream wait for the copy; the host does not."""
        event = self.done.pop(key, None)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def sync(self) -> None:
        """Wait on the host."""
        self.stream.synchronize()


def transfer_for(device: torch.device) -> Transfer:
    """The engine of a device.

    Raises:
        ConfigError: if the device has none.
    """
    if device.type == "cuda":
        return CudaTransfer(device)
    if device.type == "cpu":
        return HostTransfer()
    raise ConfigError(f"memory.blocks_to_swap: blocks cannot be swapped on {device.type}; set it to 0")
