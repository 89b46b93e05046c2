"""Gradient checkpointing: a block's activations are recomputed in the backward pass instead of being kept.

Saves about (activations of a block) x (number of blocks) for one more forward pass. The recomputation replays the
random state, so dropout gives the same numbers, and results are bit for bit those without checkpointing.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Offload(Protocol):
    """Where the inputs of recomputed blocks are kept."""

    def saving(self) -> AbstractContextManager[Any]:
        """Context for the call of one block."""


def checkpoint_blocks(
    model: nn.Module, block_lists: Sequence[str], every: int = 1, offload: Offload | None = None
) -> None:
    """Checkpoint the blocks of the named lists; parameters and their names stay as they are.

    Args:
        block_lists: attribute names of module lists, in call order.
        every: recompute every n-th block, counted over all lists; the others keep their activations.
        offload: takes the inputs of recomputed blocks; absent = they stay on the device.
    """
    blocks = [block for name in block_lists for block in getattr(model, name)]
    for index, block in enumerate(blocks):
        if index % every == 0:
            block.forward = _checkpointed(block.forward, offload)


def _checkpointed(forward: Callable[..., Any], offload: Offload | None) -> Callable[..., Any]:
    @wraps(forward)
    def recomputing(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        # What the recomputation saves goes to checkpoint's own hooks; only the inputs go to the outer ones.
        with offload.saving() if offload else nullcontext():
            return checkpoint(forward, *args, use_reentrant=False)

    return recomputing
