"""DoRA on a Linear layer (Liu et al. 2024, arXiv:2402.09353).

    V = W + (alpha / rank) up down        W' = m V / |V| by rows

m, one number for each row, begins as |W|. The gradient does not go through |V| (section 4.3 there). Neither W' nor V is ever
made: |V|^2 = |W|^2 + 2 s <W, up down> + s^2 |up down|^2 by rows, where W goes into the second term through the layer's own product
with the rows of down. So the layer may be stored and streamed in any way.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.base import Base, Bias, blend
from musubi_tuner.adapters.lora import LoRALinear


class DoRA(LoRALinear):
    """LoRA whose rows have trained norms, ``dora_scale`` [out, 1] as in LyCORIS."""

    starts = True
    base_square: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float = 0.0, **options: Any) -> None:
        super().__init__(in_features, out_features, rank, alpha, **options)
        self.dora_scale = nn.Parameter(torch.ones(out_features, 1, dtype=torch.float32))
        self.register_buffer("base_square", torch.ones(out_features), persistent=False)

    @classmethod
    def sizes_of(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        if parts["dora_scale"].numel() != shape[0]:
            raise ValueError(
                "dora_scale holds norms of columns (wd_on_out = false), which is not supported; only norms of rows are"
            )
        return super().sizes_of(parts, shape)

    @torch.no_grad()
    def begin_from(self, weight: Tensor, *, fresh: bool) -> None:
        square = weight.float().square().sum(1)
        self.base_square.copy_(square)
        if fresh:
            self.dora_scale.copy_(square.sqrt()[:, None])

    @torch.no_grad()
    def _norm(self, base: Base, bias: Tensor | None) -> Tensor:
        """|V| by rows, [out] float32."""
        down, up = self.lora_down.weight, self.lora_up.weight
        product = base(down).float()  # [rank, out]
        if bias is not None:
            product = product - bias.float()
        with torch.autocast(down.device.type, enabled=False):
            down, up = down.float(), up.float()
            cross = (product.T * up).sum(1)
            square = ((up @ (down @ down.T)) * up).sum(1)
            return (self.base_square + 2 * self.scale * cross + self.scale**2 * square).clamp(min=1e-12).sqrt()

    def apply_to(self, x: Tensor, base: Base, bias: Bias) -> Tensor:
        out = base(x)
        if self.skips():
            return out + self.nothing().to(out.dtype)
        offset = bias()
        size = self.dora_scale.flatten() / self._norm(base, offset)
        low = self.lora_up(self.dropped(self.lora_down(self.cast(x)))) * self.raised(self.scale)
        after = (out + low) * size
        if offset is not None:
            after = after + offset * (1 - size)
        return blend(out, after, self.multiplier).to(out.dtype)

    @torch.no_grad()
    def changed(self, weight: Tensor) -> Tensor:
        direction = (
            weight + (self.lora_up.weight.float() @ self.lora_down.weight.float()).to(weight.device) * self.scale
        )
        norm = direction.norm(dim=1, keepdim=True).clamp(min=1e-6)
        return blend(weight, direction * (self.dora_scale.float().to(weight.device) / norm), self.multiplier)
