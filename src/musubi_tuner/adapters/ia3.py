"""(IA)^3 on a Linear layer (Liu et al. 2022, arXiv:2205.05638; LyCORIS).

    W' = (1 + w) W by rows, or by columns where the input is scaled        w begins as 0

The bias is left alone, so that the change can be merged into the weight.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.base import Adapter, Base, Bias


class IA3(Adapter):
    """A factor for each output of a layer, or for each input; rank and alpha do not exist."""

    on_input: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 1,
        alpha: float = 0.0,
        *,
        on_input: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, **options)
        self.weight = nn.Parameter(torch.zeros(in_features if on_input else out_features, dtype=torch.float32))
        self.register_buffer("on_input", torch.tensor(int(on_input)))
        self.scales_input = on_input

    @classmethod
    def sizes_of(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        if "on_input" not in parts and shape[0] != shape[1]:
            return {"on_input": parts["weight"].numel() == shape[1]}
        return {"on_input": bool(parts.get("on_input", torch.tensor(0)))}

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        self.weight.zero_()

    def apply_to(self, x: Tensor, base: Base, bias: Bias) -> Tensor:
        if self.skips():
            out = base(x)
            return out + self.nothing().to(out.dtype)
        size = self.weight * self.multiplier
        if self.scales_input:
            return base((x * (1 + size)).to(x.dtype))
        out, offset = base(x), bias()
        return (out + (out if offset is None else out - offset) * size).to(out.dtype)

    @torch.no_grad()
    def changed(self, weight: Tensor) -> Tensor:
        size = 1 + self.weight.float().to(weight.device) * self.multiplier
        return weight * (size if self.scales_input else size[:, None])
