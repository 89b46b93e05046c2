"""LoRA on a Linear layer (Hu et al. 2021, arXiv:2106.09685).

    y = W x + b + multiplier * (alpha / rank) * up(down(x))

down is Kaiming-uniform (a = sqrt 5), up zero: an untrained adapter changes nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.adapters.base import Adapter, kaiming


class LoRALinear(Adapter):
    """The sum of the layer and two matrices; its parameters are named as in the files of musubi-tuner and sd-scripts."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float = 0.0, **options: Any) -> None:
        super().__init__(in_features, out_features, rank, **options)
        self.lora_down = nn.Linear(in_features, rank, bias=False, dtype=torch.float32)
        self.lora_up = nn.Linear(rank, out_features, bias=False, dtype=torch.float32)
        self.keep_alpha(alpha)

    @classmethod
    def sizes_of(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        return {"rank": len(parts["lora_down.weight"]), "alpha": float(parts.get("alpha", 0.0))}

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Random down, zero up."""
        self.lora_down.weight.copy_(kaiming(tuple(self.lora_down.weight.shape), generator))
        self.lora_up.weight.zero_()

    def product(self, x: Tensor) -> Tensor:
        return self.lora_up(self.dropped(self.lora_down(x))) * self.raised(self.factor)

    def dropped(self, hidden: Tensor) -> Tensor:
        """Rank activations [B, ..., rank] with what dropout leaves of them; `raised` makes up for dropped ranks."""
        if self.training and self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.training and self.rank_dropout:
            shape = (len(hidden), *[1] * (hidden.ndim - 2), hidden.shape[-1])
            hidden = hidden * (torch.rand(shape, device=hidden.device) >= self.rank_dropout)
        return hidden

    def raised(self, factor: float) -> float:
        """A factor of rank activations of which some were dropped."""
        return factor / (1 - self.rank_dropout) if self.training else factor

    @torch.no_grad()
    def delta(self) -> Tensor:
        return (self.lora_up.weight.float() @ self.lora_down.weight.float()) * self.factor

    def factors(self) -> list[nn.Parameter]:
        return list(self.parameters())
