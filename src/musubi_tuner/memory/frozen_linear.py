"""A Linear layer whose weight never trains, stored as it is or in 8-bit floating point.

Its autograd function keeps no weight for the backward pass: the stored form is fetched and brought to the compute dtype
again there. So a step holds the compute form of one layer at a time.

    storage     bytes per weight   scale (float32)
    plain       as given           none
    fp8         1                  none: cast to float8_e4m3fn
    fp8_scaled  1                  per tensor, per row, or per 64 columns of a row: max |w| / 448

The product is computed as ``x @ dequantize(weight).T``: on every device, without scaled matrix products.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.models.scaled_fp8 import dequantize, is_fp8

Scale = Literal["tensor", "row", "block"]
BLOCK = 64
"""Columns that share a scale."""
FP8_MAX = 448.0
SCALE_FLOOR = 1e-8


def quantize_fp8(weight: Tensor, scale: Scale | None = "block") -> tuple[Tensor, Tensor | None]:
    """Store a weight [out, in] in float8_e4m3fn.

    Args:
        scale: what shares one, or None for a plain cast. Weights whose columns do not divide by 64 take rows for blocks.

    Returns:
        The fp8 tensor and its float32 scale, of shape [], [out, 1] or [out, in / 64, 1].

    Raises:
        ValueError: for a weight that is fp8 already; rescaling it would lose precision twice.
    """
    if is_fp8(weight):
        raise ValueError("the weight is stored in float8 already")
    values = torch.nan_to_num(weight.float())
    if scale is None:
        return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), None
    if scale == "tensor" or values.ndim != 2:
        factor = (values.abs().amax() / FP8_MAX).clamp(min=SCALE_FLOOR)
        return _cast(values / factor), factor
    if scale == "row" or values.shape[1] % BLOCK:
        factor = (values.abs().amax(1, keepdim=True) / FP8_MAX).clamp(min=SCALE_FLOOR)
        return _cast(values / factor), factor
    groups = values.view(len(values), -1, BLOCK)
    factor = (groups.abs().amax(2, keepdim=True) / FP8_MAX).clamp(min=SCALE_FLOOR)
    return _cast(groups / factor).view(values.shape), factor


def _cast(values: Tensor) -> Tensor:
    # Rounding may leave the range by one step; the cast saturates on some devices and gives NaN on others.
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


class _FrozenProduct(torch.autograd.Function):
    """``x @ W.T + b`` with W fetched when it is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "FrozenLinear", dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.dtype = layer, dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return F.linear(x, layer.dense_weight(dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dense_weight(gradient.dtype), None, None


class FrozenLinear(nn.Module):
    """A Linear layer that is not trained.

    Args:
        stored: weight [out, in] in its storage dtype. scale: float32 factor of an fp8 weight, or None.
        bias: [out] or None.
        dtype: computed in outside of autocast.
    """

    stored: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, stored: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.out_features, self.in_features = stored.shape
        self.register_buffer("stored", stored)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def quantized(cls, linear: nn.Linear, scale: Scale | None = "block") -> "FrozenLinear":
        """An fp8 copy of a Linear layer, computing in the dtype of its weight."""
        stored, factor = quantize_fp8(linear.weight.detach(), scale)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(stored, factor, bias, linear.weight.dtype)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight in a compute dtype; multiplied in float32."""
        return self.stored.to(dtype) if self.scale is None else dequantize(self.stored, self.scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        with torch.autocast(kind, enabled=False):
            return _FrozenProduct.apply(x.to(dtype), self, dtype)
