"""A Linear layer that trains although its weight lives in main memory.

The parameters stay on the host, with their gradients and the optimizer's state; only a copy passes through the device, for the
forward and for the backward pass. The device computes the gradient, the host adds it up. Names in the state dict are those
of an ordinary layer, and so are the numbers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _HostProduct(torch.autograd.Function):
    """``x @ W.T + b`` with device copies of W and b; their gradients go to the host."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: "HostLinear") -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.has_bias = layer, bias is not None
        copy, offset = layer.fetch("weight"), layer.fetch("bias")
        # As one matrix, which is what an ordinary layer does while it trains: other shapes take other kernels.
        out = F.linear(x.flatten(0, -2), copy.to(x.dtype), None if offset is None else offset.to(x.dtype))
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        layer = ctx.layer
        rows = gradient.flatten(0, -2)
        for_x = (rows @ layer.fetch("weight").to(gradient.dtype)).view_as(x)
        for_weight = (rows.t() @ x.flatten(0, -2)).to(layer.weight.device, layer.weight.dtype)
        for_bias = rows.sum(0).to(layer.weight.device, layer.weight.dtype) if ctx.has_bias else None
        return for_x, for_weight, for_bias, None


class HostLinear(nn.Module):
    """See the module text; made of an ordinary layer, whose parameters it takes over."""

    BUFFERS = ("weight", "bias")

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.residence: Any = None

    def fetch(self, name: str) -> Any:
        """A copy on the device."""
        return self.residence.fetch(self, name)

    def _apply(self, fn: Any, recurse: bool = True) -> "HostLinear":
        """The parameters stay where they are, whatever device the model is moved to."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        with torch.autocast(kind, enabled=False):
            return _HostProduct.apply(x.to(dtype), self.weight, self.bias, self)
