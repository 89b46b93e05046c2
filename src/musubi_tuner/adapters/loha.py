"""LoHa on a Linear layer (Hyeon-Woo et al. 2022, arXiv:2108.06098; LyCORIS).

    W' = W + (alpha / rank) (B1 A1) * (B2 A2)        * by elements

In files A1 is ``hada_w1_b`` [rank, in], B1 ``hada_w1_a`` [out, rank], and so on. A1 and A2 begin as N(0, 1), B1 as N(0, 0.1^2), B2 as 0.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.adapters.base import Adapter, matrix


class _Hadamard(torch.autograd.Function):
    """``(b1 a1) * (b2 a2)``; keeps only the four factors for the backward pass."""

    @staticmethod
    def forward(ctx: Any, b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
        ctx.save_for_backward(b1, a1, b2, a2)
        return (b1 @ a1) * (b2 @ a2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (gradient,), (b1, a1, b2, a2) = gradients, ctx.saved_tensors
        first = gradient * (b2 @ a2)
        second = gradient * (b1 @ a1)
        return first @ a1.T, b1.T @ first, second @ a2.T, b2.T @ second


class LoHa(Adapter):
    """The sum of the layer and a product, element by element, of two low-rank matrices."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float = 0.0, **options: Any) -> None:
        super().__init__(in_features, out_features, rank, **options)
        self.hada_w1_a, self.hada_w1_b = matrix(out_features, rank), matrix(rank, in_features)
        self.hada_w2_a, self.hada_w2_b = matrix(out_features, rank), matrix(rank, in_features)
        self.keep_alpha(alpha)

    @classmethod
    def sizes_of(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        return {"rank": len(parts["hada_w1_b"]), "alpha": float(parts.get("alpha", 0.0))}

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        for part, size in ((self.hada_w1_a, 0.1), (self.hada_w1_b, 1.0), (self.hada_w2_b, 1.0)):
            part.copy_(torch.randn(part.shape, generator=generator) * size)
        self.hada_w2_a.zero_()

    def product(self, x: Tensor) -> Tensor:
        a1: Tensor = self.hada_w1_b
        if self.training and self.rank_dropout:
            kept = (torch.rand(self.rank, 1, device=x.device) >= self.rank_dropout) / (1 - self.rank_dropout)
            a1 = a1 * kept
        with torch.autocast(x.device.type, enabled=False):
            delta = _Hadamard.apply(self.hada_w1_a.float(), a1.float(), self.hada_w2_a.float(), self.hada_w2_b.float())
        return F.linear(x, delta.to(x.dtype)) * self.factor

    @torch.no_grad()
    def delta(self) -> Tensor:
        first = self.hada_w1_a.float() @ self.hada_w1_b.float()
        return first * (self.hada_w2_a.float() @ self.hada_w2_b.float()) * self.factor

    def factors(self) -> list[nn.Parameter]:
        return [self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b]
