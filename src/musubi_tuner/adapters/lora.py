"""LoRA on a Linear layer (Hu et al. 2021, arXiv:2106.09685).

    y = W x + b + multiplier * (alpha / rank) * up(down(x))

down is Kaiming-uniform (a = sqrt 5), up zero: an untrained adapter changes nothing. Both are float32 whatever the base
is stored in. Without autocast the input is brought to float32; the sum with the base's output is rounded once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """The change of one Linear layer; its parameters are named as in the files of musubi-tuner and sd-scripts.

    Args:
        rank: 1 or more. alpha: 0 counts as the rank.
        dropout: share of rank activations dropped. rank_dropout: share of ranks dropped per sample, the rest scaled up.
        module_dropout: probability that the whole change is skipped in a call. All of them only while training.

    Attributes:
        multiplier: see above. active: whether the layer adds its change; see `AdapterSet`.
    """

    alpha: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float = 0.0,
        *,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is {rank}, it must be at least 1")
        self.rank, self.multiplier, self.active = rank, 1.0, True
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.lora_down = nn.Linear(in_features, rank, bias=False, dtype=torch.float32)
        self.lora_up = nn.Linear(rank, out_features, bias=False, dtype=torch.float32)
        self.register_buffer("alpha", torch.tensor(float(alpha or rank)))
        # Read once: a buffer on a device would have to be fetched in every call.
        self.scale = float(alpha or rank) / rank

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Random down, zero up."""
        bound = 1 / math.sqrt(self.lora_down.in_features)  # Kaiming-uniform with a = sqrt 5
        values = torch.rand(self.lora_down.weight.shape, generator=generator) * (2 * bound) - bound
        self.lora_down.weight.copy_(values)
        self.lora_up.weight.zero_()

    @property
    def factor(self) -> float:
        """Of the product of both matrices."""
        return self.scale * self.multiplier

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[arg-type]
        self.scale = float(self.alpha) / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """The change for inputs [..., in]; [..., out], in the compute dtype of autocast or else float32."""
        if self.training and self.module_dropout and torch.rand(()).item() < self.module_dropout:
            # Zero gradients, not missing ones: data parallelism waits for every parameter.
            nothing = 0 * (self.lora_down.weight.sum() + self.lora_up.weight.sum())
            return x.new_zeros(*x.shape[:-1], self.lora_up.out_features) + nothing
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_down.weight.dtype)
        hidden, scale = self.lora_down(x), self.factor
        if self.training and self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.training and self.rank_dropout:
            shape = (len(hidden), *[1] * (hidden.ndim - 2), self.rank)
            hidden = hidden * (torch.rand(shape, device=hidden.device) >= self.rank_dropout)
            scale = scale / (1 - self.rank_dropout)
        return self.lora_up(hidden) * scale

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Change of the weight [out, in], float32, at the present multiplier."""
        return (self.lora_up.weight.float() @ self.lora_down.weight.float()) * self.factor

    @torch.no_grad()
    def limit_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Scale both factors so that the Frobenius norm of the change is at most ``max_norm``.

        Returns:
            The norm before that, and whether it was above the limit, as tensors on the device. As in sd-scripts, a norm
            below half the limit counts as half the limit.
        """
        norm = ((self.lora_up.weight @ self.lora_down.weight) * self.scale).norm().clamp(min=max_norm / 2)
        factor = (max_norm / norm).clamp(max=1).sqrt()
        self.lora_up.weight.mul_(factor)
        self.lora_down.weight.mul_(factor)
        return norm, norm > max_norm
