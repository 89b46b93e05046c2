"""Inputs of checkpointed blocks kept in main memory instead of on the device.

Checkpointing keeps one input per block and stream for the whole forward pass. Here each is copied to main memory while the
next block computes, and comes back one block ahead of its recomputation:

    forward     block i is called: begin to copy its inputs out, wait for those of block i - 2
    backward    block i is recomputed: wait for its inputs, begin to copy those of block i - 1 in

The device then holds the inputs of two blocks. Copies change no bit. Main memory is a list of flat buffers: the n-th activation
of a forward pass takes the n-th, which grows to the largest shape it has met. So it is what the largest bucket needs, and serves
the others too. Only activations [B, tokens, width] move; what all blocks share stays.
"""

import heapq
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.memory.transfer import Transfer, host_buffer, transfer_for


def leaves(tensor: Tensor) -> bool:
    """Whether an input of a block is kept in main memory: activations [B, tokens, width] are, what blocks share stays."""
    return tensor.ndim >= 3 and tensor.is_floating_point()


class _Kept:
    """An activation in main memory; its buffer is free again with the last reference. Its key is the buffer's number.

    What arrives is dropped only behind a `wait`: for the reading of it, or with the last reference (`_return`).
    """

    def __init__(self, key: int, host: Tensor, device: torch.device) -> None:
        self.key, self.host, self.device = key, host, device
        self.arriving: Tensor | None = None


class _Call:
    """What one call of a block keeps, and the call before it."""

    def __init__(self, before: "weakref.ref[_Call] | None") -> None:
        self.before = before
        self.kept: list[weakref.ref[_Kept]] = []


class ActivationOffload:
    """The buffers and the copies of one model.

    Args:
        transfer: engine; absent = the device's.
    """

    def __init__(self, device: torch.device, transfer: Transfer | None = None) -> None:
        self.transfer = transfer or transfer_for(device, "memory.checkpoint_offload")
        self.pinned = device.type == "cuda"
        self.buffers: list[Tensor] = []
        self.free: list[int] = []
        self.leaving: deque[list[tuple[int, Tensor]]] = deque()
        """What is on its way out, by call; a reference keeps its memory from being used again before the copy is done."""
        self._last: weakref.ref[_Call] | None = None

    @property
    def bytes(self) -> int:
        """Main memory taken; torch rounds pinned memory up to a power of two."""
        return sum(len(buffer) for buffer in self.buffers)

    def saving(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Context for the call of one checkpointed block."""
        self._let_go(1)
        self.leaving.append([])
        call = _Call(self._last)
        self._last = weakref.ref(call)
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: self._pack(tensor, call), lambda kept: self._unpack(kept, call)
        )

    def _pack(self, tensor: Tensor, call: _Call) -> Any:
        if not leaves(tensor):
            return tensor
        key, host = self._take(tensor)
        kept = _Kept(key, host, tensor.device)
        weakref.finalize(kept, self._return, key).atexit = False
        # Detached: a copy that nobody waits for must not keep the graph alive.
        source = tensor.detach()
        self.transfer.submit(kept.key, host, source, self.transfer.record(), held=True)
        self.leaving[-1].append((kept.key, source))
        call.kept.append(weakref.ref(kept))
        return kept

    def _let_go(self, calls: int) -> None:
        """Let the computation wait for the copies of all calls but the last ones, whose memory is free then."""
        while len(self.leaving) > calls:
            for key, _ in self.leaving.popleft():
                self.transfer.wait(key)

    def _take(self, tensor: Tensor) -> tuple[int, Tensor]:
        """The first free buffer, made larger where it must be: its number, and a view like the tensor."""
        if self.free:
            key = heapq.heappop(self.free)
        else:
            key = len(self.buffers)
            self.buffers.append(torch.empty(0, dtype=torch.uint8))
        if len(self.buffers[key]) < tensor.nbytes:
            self.buffers[key] = torch.empty(0, dtype=torch.uint8)  # before the larger one is asked for
            self.buffers[key] = host_buffer(
                tensor.nbytes, self.pinned, "turn memory.checkpoint_offload off, or lower the batch size"
            )
        return key, self.buffers[key][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _return(self, key: int) -> None:
        self.transfer.wait(key)  # a copy that nobody waited for must not land in what comes next
        heapq.heappush(self.free, key)

    def _unpack(self, kept: Any, call: _Call) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._let_go(0)
        self._begin(call)
        before = call.before() if call.before else None
        if kept.arriving is None:
            self._fetch(kept)  # asked for a second time
        self.transfer.wait(kept.key)
        tensor, kept.arriving = kept.arriving, None
        if before is not None:
            self._begin(before)
        assert tensor is not None
        return tensor

    def _begin(self, call: _Call) -> None:
        """Begin to copy in what a call keeps, once."""
        for reference in call.kept:
            kept = reference()
            if kept is not None and kept.arriving is None:
                self._fetch(kept)
        call.kept = []

    def _fetch(self, kept: _Kept) -> None:
        self.transfer.wait(kept.key)  # the way out
        kept.arriving = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=kept.device)
        self.transfer.submit(kept.key, kept.arriving, kept.host, self.transfer.record(), held=True)
