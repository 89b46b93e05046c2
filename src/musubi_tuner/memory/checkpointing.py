"""Gradient checkpointing: a block's activations are recomputed in the backward pass instead of being kept.

Saves about (activations of a block) x (number of blocks) for one more forward pass. The recomputation replays the
random state, so dropout gives the same numbers, and results are bit for bit those without checkpointing.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: nn.Module, block_lists: Sequence[str]) -> None:
    """Checkpoint every block of the named lists; parameters and their names stay as they are.

    Args:
        block_lists: attribute names of module lists.
    """
    for name in block_lists:
        for block in getattr(model, name):
            block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def recomputing(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)

    return recomputing
