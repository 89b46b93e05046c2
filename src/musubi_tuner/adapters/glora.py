"""GLoRA on a Linear layer (Chavan et al. 2023, arXiv:2306.07967; LyCORIS).

    W' = W + (alpha / rank) (W A1 A2 + B1 B2)

The first term changes the input of the layer, the second its output. A2 and B2 begin as zero.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.base import Base, Bias, kaiming
from musubi_tuner.adapters.lora import LoRALinear


class GLoRA(LoRALinear):
    """Low-rank changes before and behind the layer: ``a1`` [in, rank], ``a2`` [rank, in], ``b1`` [out, rank], ``b2`` [rank, in]."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float = 0.0, **options: Any) -> None:
        super().__init__(in_features, out_features, rank, alpha, **options)
        del self.lora_down, self.lora_up
        self.a1 = nn.Linear(rank, in_features, bias=False, dtype=torch.float32)
        self.a2 = nn.Linear(in_features, rank, bias=False, dtype=torch.float32)
        self.b1 = nn.Linear(rank, out_features, bias=False, dtype=torch.float32)
        self.b2 = nn.Linear(in_features, rank, bias=False, dtype=torch.float32)

    @classmethod
    def sizes_of(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        return {"rank": len(parts["a2.weight"]), "alpha": float(parts.get("alpha", 0.0))}

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        for random, zero in ((self.a1, self.a2), (self.b1, self.b2)):
            random.weight.copy_(kaiming(tuple(random.weight.shape), generator))
            zero.weight.zero_()

    def apply_to(self, x: Tensor, base: Base, bias: Bias) -> Tensor:
        if self.skips():
            out = base(x)
            return out + self.nothing().to(out.dtype)
        wide, factor = self.cast(x), self.raised(self.factor)
        out = base((wide + self.a1(self.dropped(self.a2(wide))) * factor).to(x.dtype))
        return (out + self.b1(self.dropped(self.b2(wide))) * factor).to(out.dtype)

    @torch.no_grad()
    def changed(self, weight: Tensor) -> Tensor:
        inner, outer = self.a1.weight.float() @ self.a2.weight.float(), self.b1.weight.float() @ self.b2.weight.float()
        return weight + (weight @ inner.to(weight.device) + outer.to(weight.device)) * self.factor
