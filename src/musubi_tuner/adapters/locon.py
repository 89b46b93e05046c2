"""LoCon: LoRA that takes convolutions too (LyCORIS; sd-scripts' conv_dim).

    y = conv(x) + (alpha / rank) up(down(x))        down: the layer's kernel, stride and padding to rank channels; up: 1x1

A Linear layer gets a plain LoRA. In files ``lora_down.weight`` is [rank, in, k, k], ``lora_up.weight`` [out, rank, 1, 1].
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.adapters.lora import LoRALinear


class LoCon(LoRALinear):
    """The sum of the layer and two matrices, or two convolutions.

    Args:
        kernel: sides of the kernel of a convolution; empty = a Linear layer.
        way: its stride, padding and dilation, as torch's conv2d takes them; without them only its weight can be changed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float = 0.0,
        *,
        kernel: tuple[int, ...] = (),
        way: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, **options)
        self.kernel, self.way = kernel, way
        if kernel:
            self.lora_down.weight = nn.Parameter(torch.empty(rank, in_features, *kernel))
            self.lora_up.weight = nn.Parameter(torch.empty(out_features, rank, *[1] * len(kernel)))

    @classmethod
    def sizes_of(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        return {**super().sizes_of(parts, shape), "kernel": tuple(parts["lora_down.weight"].shape[2:])}

    def product(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], or [B, in, H, W] -> [B, out, H', W']."""
        if not self.kernel:
            return super().product(x)
        assert self.way is not None, "this adapter was not made for a layer"
        hidden = F.conv2d(x, self.lora_down.weight, **self.way)
        hidden = self.dropped(hidden.movedim(1, -1)).movedim(-1, 1)
        return F.conv2d(hidden, self.lora_up.weight) * self.raised(self.factor)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the output; see `Adapter.forward`."""
        if self.kernel and self.skips():
            return self.nothing()
        return super().forward(x) if not self.kernel else self.product(self.cast(x))

    @torch.no_grad()
    def delta(self) -> Tensor:
        if not self.kernel:
            return super().delta()
        change = self.lora_up.weight.float().flatten(1) @ self.lora_down.weight.float().flatten(1) * self.factor
        return change.view(self.out_features, self.in_features, *self.kernel)
