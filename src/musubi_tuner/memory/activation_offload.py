"""Inputs of checkpointed blocks kept in main memory instead of on the device.

Checkpointing keeps one input per block and stream for the whole forward pass. Here each is copied to main memory while the
next block computes, and comes back one block ahead of its recomputation:

    forward     block i is called: begin to copy its inputs out
    backward    block i is recomputed: wait for its inputs, begin to copy those of block i - 1 in

The device then holds the inputs of two blocks. Copies change no bit. Main memory is taken from a pool, which grows to what one
forward pass needs and serves all later ones. Only activations [B, tokens, width] move; what all blocks share stays.
"""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.memory.transfer import Transfer, transfer_for


def leaves(tensor: Tensor) -> bool:
    """Whether an input of a block is kept in main memory: activations [B, tokens, width] are, what blocks share stays."""
    return tensor.ndim >= 3 and tensor.is_floating_point()


class _Kept:
    """An activation in main memory; its buffer goes back to the pool with the last reference."""

    def __init__(self, key: int, host: Tensor, device: torch.device) -> None:
        self.key, self.host, self.device = key, host, device
        self.arriving: Tensor | None = None


class _Call:
    """What one call of a block keeps, and the call before it."""

    def __init__(self, before: "weakref.ref[_Call] | None") -> None:
        self.before = before
        self.kept: list[weakref.ref[_Kept]] = []


class ActivationOffload:
    """The pool and the copies of one model.

    Args:
        transfer: engine; absent = the device's.
    """

    def __init__(self, device: torch.device, transfer: Transfer | None = None) -> None:
        self.transfer = transfer or transfer_for(device, "memory.checkpoint_offload")
        self.pinned = device.type == "cuda"
        self.free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self.keys = itertools.count()
        self.bytes = 0
        self._last: weakref.ref[_Call] | None = None

    def saving(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Context for the call of one checkpointed block."""
        call = _Call(self._last)
        self._last = weakref.ref(call)
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: self._pack(tensor, call), lambda kept: self._unpack(kept, call)
        )

    def _pack(self, tensor: Tensor, call: _Call) -> Any:
        if not leaves(tensor):
            return tensor
        shape, dtype = tensor.shape, tensor.dtype
        buffers = self.free.setdefault((shape, dtype), [])
        if buffers:
            host = buffers.pop()
        else:
            host = torch.empty(shape, dtype=dtype, pin_memory=self.pinned)
            self.bytes += host.numel() * host.element_size()
        kept = _Kept(next(self.keys), host, tensor.device)
        weakref.finalize(kept, self._return, kept.key, host).atexit = False
        # Detached: a copy that nobody waits for must not keep the graph alive.
        self.transfer.submit(kept.key, host, tensor.detach(), self.transfer.record())
        call.kept.append(weakref.ref(kept))
        return kept

    def _return(self, key: int, host: Tensor) -> None:
        self.transfer.wait(key)  # a copy that nobody waited for must not land in what comes next
        self.free[host.shape, host.dtype].append(host)

    def _unpack(self, kept: Any, call: _Call) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
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
        self.transfer.submit(kept.key, kept.arriving, kept.host, self.transfer.record())
