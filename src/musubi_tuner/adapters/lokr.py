"""LoKr on a Linear layer (Yeh et al. 2023, arXiv:2309.14859; LyCORIS).

    W' = W + (alpha / rank) W1 x W2        x: Kronecker product

out = a b and in = c d; W1 is [a, c], W2 [b, d]. W2 has rank ``rank`` where that is below half of its larger side, and so has W1 with
``decompose_both``. Where both are whole, alpha counts as the rank, as in LyCORIS. The last factor of W2 begins as zero. The product
with x is computed by factors: x as a matrix [c, d], from both sides.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.base import Adapter, kaiming, matrix


def divide(size: int, factor: int) -> tuple[int, int]:
    """A size as a product (smaller, larger).

    Args:
        factor: one of the two, if it divides the size; else the largest divisor up to it; -1 = the most square product.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = size if factor < 0 else factor
    small = max(n for n in range(1, int(size**0.5) + 1) if size % n == 0 and n <= most)
    return small, size // small


class LoKr(Adapter):
    """The sum of the layer and a Kronecker product.

    Args:
        factor: see `divide`; of both sides of the layer. decompose_both: W1 is low-rank too. full: W2 is whole whatever the rank.
        forms: sizes (a, b, c, d) and which of W1 and W2 are whole, of a file; they take the place of the other arguments.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float = 0.0,
        *,
        factor: int = -1,
        decompose_both: bool = False,
        full: bool = False,
        forms: tuple[int, int, int, int, bool, bool] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, **options)
        (a, b), (c, d) = divide(out_features, factor), divide(in_features, factor)
        whole1 = not (decompose_both and rank < max(a, c) / 2 and not full)
        whole2 = full or rank >= max(b, d) / 2
        if forms is not None:
            a, b, c, d, whole1, whole2 = forms
        self.sides = (a, b, c, d)
        if whole1:
            self.lokr_w1 = matrix(a, c)
        else:
            self.lokr_w1_a, self.lokr_w1_b = matrix(a, rank), matrix(rank, c)
        if whole2:
            self.lokr_w2 = matrix(b, d)
        else:
            self.lokr_w2_a, self.lokr_w2_b = matrix(b, rank), matrix(rank, d)
        self.whole1, self.whole2 = whole1, whole2
        self.keep_alpha(0.0 if whole1 and whole2 else alpha)

    @classmethod
    def sizes_of(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        sides, whole, rank = list[int](), list[bool](), 1
        for name in ("lokr_w1", "lokr_w2"):
            pair = (parts.get(f"{name}_a"), parts.get(f"{name}_b"))
            if name in parts:
                sides += parts[name].shape
            elif pair[0] is not None and pair[1] is not None:
                sides += [len(pair[0]), pair[1].shape[1]]
                rank = len(pair[1])
            else:
                raise ValueError(f"{name} is missing")
            whole.append(name in parts)
        a, c, b, d = sides
        if (a * b, c * d) != shape:
            raise ValueError(f"its parts make [{a * b}, {c * d}], the layer has {list(shape)}")
        alpha = float(parts.get("alpha", 0.0))
        return {"rank": rank, "alpha": alpha, "forms": (a, b, c, d, whole[0], whole[1])}

    def take_alpha(self) -> None:
        """Where both are whole, alpha / rank is 1 whatever stands there."""
        self.scale = 1.0 if self.whole1 and self.whole2 else float(self.alpha) / self.rank

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        for name, part in self.named_parameters():
            last = name == ("lokr_w2" if self.whole2 else "lokr_w2_b")
            part.copy_(torch.zeros(part.shape) if last else kaiming(tuple(part.shape), generator))

    def _small(self) -> Tensor:
        return self.lokr_w1 if self.whole1 else self.lokr_w1_a @ self.lokr_w1_b

    def product(self, x: Tensor) -> Tensor:
        _, _, c, d = self.sides
        hidden = x.unflatten(-1, (c, d))
        hidden = hidden @ (self.lokr_w2.T if self.whole2 else self.lokr_w2_b.T)
        if not self.whole2:
            hidden = hidden @ self.lokr_w2_a.T
        return (self._small() @ hidden).flatten(-2) * self.factor

    @torch.no_grad()
    def delta(self) -> Tensor:
        large = self.lokr_w2 if self.whole2 else self.lokr_w2_a @ self.lokr_w2_b
        return torch.kron(self._small().float(), large.float()) * self.factor

    def factors(self) -> list[nn.Parameter]:
        return list(self.parameters())
