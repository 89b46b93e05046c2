"""DyLoRA: a LoRA whose first ranks are of use alone (Valipour et al. 2022, arXiv:2210.07558).

At each call a number of blocks of ranks is drawn; those ranks are used, and only the last of these blocks is trained. The scale is
alpha / rank whatever is drawn. Drawing, saving and merging use all ranks; files are those of LoRA, and cutting down and up to their
first ranks gives a smaller LoRA of the same alpha / rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.adapters.lora import LoRALinear


class DyLoRA(LoRALinear):
    """LoRA trained for all multiples of ``block_size`` up to its rank.

    Raises:
        ValueError: if the rank is no multiple of it.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float = 0.0, *, block_size: int = 1, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, **options)
        if rank % block_size:
            raise ValueError(f"rank {rank} is not a multiple of block_size {block_size}")
        self.block_size = block_size

    def product(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().product(x)
        last = (int(torch.randint(self.rank // self.block_size, ()).item()) + 1) * self.block_size
        first = last - self.block_size
        down, up = self.lora_down.weight, self.lora_up.weight
        down = torch.cat([down[:first].detach(), down[first:last]])
        up = torch.cat([up[:, :first].detach(), up[:, first:last]], 1)
        return F.linear(self.dropped(F.linear(x, down)), up) * self.raised(self.factor)
