"""Making models fit: storage of frozen weights, streamed blocks, checkpointing. Names are imported on use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musubi_tuner.memory.block_swap import BlockSwap, weights
    from musubi_tuner.memory.compose import compose_memory
    from musubi_tuner.memory.frozen_linear import FrozenLinear, quantize

_PLACES = {
    "BlockSwap": "block_swap",
    "FrozenLinear": "frozen_linear",
    "compose_memory": "compose",
    "quantize": "frozen_linear",
    "weights": "block_swap",
}

__all__ = ["BlockSwap", "FrozenLinear", "compose_memory", "quantize", "weights"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
