"""What every adapter has: the change of one layer, on activations and on weights.

An adapter adds to the output of its layer, or multiplies or rotates it; `changed` is the same for the weight, in float32, and both
agree for any multiplier. Parameters are float32 whatever the layer is stored in, and are named as in files. Without autocast the
input is brought to float32; the sum with the layer's output is rounded once.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

Base = Callable[[Tensor], Tensor]
"""The layer below: inputs [..., in] -> outputs [..., out], bias included."""
Bias = Callable[[], Tensor | None]


class Adapter(nn.Module, ABC):
    """The change of one Linear layer [out, in].

    Subclasses have `product` and `delta`, if they add to the output, or else `apply_to` and `changed`.

    Args:
        rank: 1 or more. alpha: 0 counts as the rank.
        dropout: share of rank activations dropped. rank_dropout: share of ranks dropped, the rest scaled up.
        module_dropout: probability that the whole change is skipped in a call. All of them only while training.

    Attributes:
        multiplier: strength of the change; 0 = none. active: whether the layer shows it; see `AdapterSet`.
        scale: alpha / rank. starts: whether it must see the layer's weight before it begins; see `begin_from`.
    """

    starts: ClassVar[bool] = False
    alpha: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 1,
        alpha: float = 0.0,
        *,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is {rank}, it must be at least 1")
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.multiplier, self.active = rank, 1.0, True
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.scale = 1.0

    def keep_alpha(self, alpha: float) -> None:
        """Hold alpha as a buffer of the file; 0 = the rank. Read once: a buffer on a device would be fetched in every call."""
        self.register_buffer("alpha", torch.tensor(float(alpha or self.rank)))
        self.scale = float(alpha or self.rank) / self.rank

    @classmethod
    @abstractmethod
    def sizes_of(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        """Arguments with which a layer of a file was made.

        Args:
            parts: tensors by leaf. shape: [out, in] of the layer.
        """

    @classmethod
    def of_parts(cls, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        """A layer of a file.

        Raises:
            ValueError: naming a part that is missing, unknown or of another shape.
        """
        adapter = cls(shape[1], shape[0], **cls.sizes_of(parts, shape))
        own = adapter.state_dict()
        for name in (*own, *parts):
            if name not in parts:
                if name == "alpha":
                    continue
                raise ValueError(f"{name} is missing")
            if name not in own or parts[name].numel() != own[name].numel():
                wanted = "none" if name not in own else str(list(own[name].shape))
                raise ValueError(f"{name} is {list(parts[name].shape)}, expected {wanted}")
        given = {name: parts[name].to(own[name].dtype).view(own[name].shape) for name in own if name in parts}
        adapter.load_state_dict({**own, **given})
        return adapter

    @property
    def factor(self) -> float:
        """alpha / rank at the present multiplier."""
        return self.scale * self.multiplier

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.take_alpha()

    def take_alpha(self) -> None:
        """Follow a loaded alpha."""
        if "alpha" in self._buffers:
            self.scale = float(self.alpha) / self.rank

    @abstractmethod
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Values of the beginning, at which nothing is changed."""

    def begin_from(self, weight: Tensor, *, fresh: bool) -> None:
        """See the weight [out, in] of the layer, float32, as earlier adapters on it leave it.

        Args:
            fresh: whether parameters begin from it; else only constants do.
        """

    def skips(self) -> bool:
        """Whether the change is left out of this call."""
        return bool(self.training and self.module_dropout and torch.rand(()).item() < self.module_dropout)

    def nothing(self) -> Tensor:
        """Zero, with zero gradients and not missing ones: data parallelism waits for every parameter."""
        return 0 * sum(parameter.sum() for parameter in self.parameters())  # type: ignore[return-value]

    def cast(self, x: Tensor) -> Tensor:
        """Inputs in float32, unless autocast chooses."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(next(self.parameters()).dtype)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the output for inputs [..., in]; [..., out], in the compute dtype of autocast or else float32."""
        if self.skips():
            return x.new_zeros(*x.shape[:-1], self.out_features) + self.nothing()
        return self.product(self.cast(x))

    def product(self, x: Tensor) -> Tensor:
        """The same without dropping the whole of it; of classes that add to the output."""
        raise NotImplementedError(f"{type(self).__name__} does not add to the output")

    def apply_to(self, x: Tensor, base: Base, bias: Bias) -> Tensor:
        """Output of the layer with the change, [..., in] -> [..., out], in the dtype of the layer's output.

        Args:
            base: the layer. bias: its bias, or None.
        """
        out = base(x)
        return (out + self(x)).to(out.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What is added to the weight [out, in], float32, at the present multiplier; of classes that add to it."""
        raise NotImplementedError(f"{type(self).__name__} does not add to the weight")

    @torch.no_grad()
    def changed(self, weight: Tensor) -> Tensor:
        """The weight [out, in], float32, with the change at the present multiplier."""
        return weight + self.delta().to(weight.device)

    def factors(self) -> list[nn.Parameter]:
        """Parameters whose product the change is, each once; empty where its norm cannot be scaled through them."""
        return []

    @torch.no_grad()
    def limit_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Scale the factors so that the Frobenius norm of the change is at most ``max_norm``.

        Returns:
            The norm before that, and whether it was above the limit, as tensors on the device. As in sd-scripts, a norm
            below half the limit counts as half the limit.
        """
        strength, self.multiplier = self.multiplier, 1.0
        norm = self.delta().norm().clamp(min=max_norm / 2)
        self.multiplier = strength
        factors = self.factors()
        ratio = (max_norm / norm).clamp(max=1) ** (1 / len(factors))
        for each in factors:
            each.mul_(ratio)
        return norm, norm > max_norm


def kaiming(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Kaiming-uniform numbers with a = sqrt 5: within 1 / sqrt(columns)."""
    bound = 1 / math.sqrt(shape[1])
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def matrix(rows: int, columns: int) -> nn.Parameter:
    """A float32 parameter without values yet."""
    return nn.Parameter(torch.empty(rows, columns, dtype=torch.float32))


def blend(before: Tensor, after: Tensor, share: float) -> Tensor:
    """``before + share (after - before)``; exactly ``after`` for 1."""
    return after if share == 1 else before + share * (after - before)
