"""A Linear layer that trains although its weight lives in main memory.

The parameters stay on the host, with their gradients and the optimizer's state; only a copy passes through the device, for the
forward and for the backward pass. The device computes the gradient, which goes to the host on a way of its own: autograd, which would
wait for it, is not told. Names in the state dict are those
of an ordinary layer, and so are the numbers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _HostProduct(torch.autograd.Function):
    """``x @ W.T + b`` with device copies of W and b; their gradients are left where the layer takes them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: "HostLinear") -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        copy, offset = layer.fetch("weight"), layer.fetch("bias")
        # As one matrix, which is what an ordinary layer does while it trains: other shapes take other kernels.
        out = F.linear(x.flatten(0, -2), copy.to(x.dtype), None if offset is None else offset.to(x.dtype))
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        layer = ctx.layer
        rows = gradient.flatten(0, -2)
        for_x = (rows @ layer.fetch("weight").to(gradient.dtype)).view_as(x)
        if ctx.needs_input_grad[1]:
            layer.leave("weight", rows.t() @ x.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            layer.leave("bias", rows.sum(0))
        return for_x, None, None, None


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

    def leave(self, name: str, gradient: Tensor) -> None:
        """A gradient on the device, for a parameter in main memory."""
        self.residence.leave(self, name, gradient)

    def _apply(self, fn: Any, recurse: bool = True) -> "HostLinear":
        """The parameters stay where they are, whatever device the model is moved to."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        with torch.autocast(kind, enabled=False):
            return _HostProduct.apply(x.to(dtype), self.weight, self.bias, self)
