"""The whole change of a weight: ``W' = W + D``, D [out, in] beginning as zero.

It takes as much memory as the weight in float32, and works on weights that are quantised or streamed, as every adapter does; training
the model itself is adapter.type = "none". In files D is ``diff``, as ComfyUI and LyCORIS name it.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.adapters.base import Adapter, matrix


class Native(Adapter):
    """The sum of the layer and a whole matrix; rank and alpha do not exist."""

    def __init__(self, in_features: int, out_features: int, rank: int = 1, alpha: float = 0.0, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self.diff = matrix(out_features, in_features)

    @classmethod
    def sizes_of(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        self.diff.zero_()

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.diff) * self.factor

    @torch.no_grad()
    def delta(self) -> Tensor:
        return self.diff.float() * self.factor

    def factors(self) -> list[nn.Parameter]:
        return [self.diff]
