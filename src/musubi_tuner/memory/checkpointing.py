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


def checkpoint_blocks(model: nn.Module, block_lists: Sequence[str], every: int = 1) -> None:
    """Checkpoint the blocks of the named lists; parameters and their names stay as they are.

    Args:
        block_lists: attribute names of module lists, in call order.
        every: recompute every n-th block, counted over all lists; the others keep their activations.
    """
    blocks = [block for name in block_lists for block in getattr(model, name)]
    for index, block in enumerate(blocks):
        if index % every == 0:
            block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def recomputing(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)

    return recomputing
