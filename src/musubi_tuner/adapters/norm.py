"""The change of the scale of a norm (adapter.train_norm): ``s' = s + d``, d beginning as zero; ``w_norm`` in files, as in LyCORIS."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.base import Adapter

SCALES = ("weight", "scale")
"""Names of the scale of a norm."""


def scale_name(norm: nn.Module) -> str | None:
    """Name of the scale of a norm; None for another module, or a norm without one."""
    own = [name for name, parameter in norm.named_parameters(recurse=False) if parameter.ndim == 1]
    return own[0] if "Norm" in type(norm).__name__ and len(own) == 1 and own[0] in SCALES else None


class NormScale(Adapter):
    """What is added to the scale of a norm; [out] with in = out."""

    def __init__(self, in_features: int, out_features: int, rank: int = 1, alpha: float = 0.0, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self.w_norm = nn.Parameter(torch.zeros(out_features, dtype=torch.float32))

    @classmethod
    def sizes_of(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        self.w_norm.zero_()

    def shown(self, scale: Tensor) -> Tensor:
        """The scale [out] with its change, in its own dtype."""
        change = self.nothing() if self.skips() else self.w_norm * self.multiplier
        return (scale + change).to(scale.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        return self.w_norm.float() * self.multiplier
