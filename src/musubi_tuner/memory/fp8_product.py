"""Matrix products of float8 numbers, for frozen layers whose weight is stored with a scale per output row.

    out[t, n] = sum_k x8[t, k] w8[n, k] * x_scale[t] * w_scale[n]           x8, x_scale: x quantised token by token

The gradient of x is ``grad @ dequantize(W)`` in the compute dtype, or another such product: the sum now runs over n, so
w_scale goes into the gradient before that is quantised token by token,

    grad_x[t, k] = sum_n g8[t, n] w8[n, k] * g_scale[t]                     g = grad * w_scale

and the transposed codes that the kernel asks for are made for the moment. What is lost: x and g are rounded to 3 mantissa
bits, a relative error of at most 1/16 each and about 0.026 (root mean square) of every product.

Kernel: `torch._scaled_mm` with a scale per row (NVIDIA GPUs of compute capability 8.9 and up). CPUs emulate it, which is good for
tests only.
"""

from typing import Any

import torch
from torch import Tensor

FP8_MAX = 448.0
SCALE_FLOOR = 1e-8
"""Of weights."""
TOKEN_FLOOR = 1e-30
"""Of activations and gradients. The gradient of a mean over 10^5 values, times the scale of a weight, is far below the other one."""
MULTIPLE = 16
"""Both sides of a weight must divide by it."""


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of x [tokens, width] in float8_e4m3fn, and a float32 scale per token, [tokens, 1].

    One float32 copy of x is held for the moment.
    """
    largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float()
    scale = (largest / FP8_MAX).clamp(min=TOKEN_FLOOR)
    return (x / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def scaled_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``x @ (codes * scale).T`` for x [..., in], codes [out, in], scale [out, 1]; bfloat16 [..., out]."""
    x8, x_scale = quantize_tokens(x.flatten(0, -2))
    # The kernel takes contiguous scales only.
    by_row = scale.reshape(1, -1).contiguous()
    out = torch._scaled_mm(x8, codes.t(), scale_a=x_scale, scale_b=by_row, out_dtype=torch.bfloat16)
    return out.unflatten(0, x.shape[:-1])


def scaled_gradient(gradient: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``gradient @ (codes * scale)`` for gradients [..., out]; bfloat16 [..., in]."""
    g8, g_scale = quantize_tokens(gradient.flatten(0, -2).float() * scale.t())
    transposed = codes.t().contiguous()
    ones = torch.ones(1, codes.shape[1], device=codes.device)
    out = torch._scaled_mm(g8, transposed.t(), scale_a=g_scale, scale_b=ones, out_dtype=torch.bfloat16)
    return out.unflatten(0, gradient.shape[:-1])


class TracedProduct(torch.autograd.Function):
    """The product as compilers see it: of tensors alone. Keeps codes and scale, not the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, backward: bool) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.in_fp8, ctx.dtype = backward, x.dtype
        return scaled_product(x, codes, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,), (codes, scale) = gradients, ctx.saved_tensors
        if ctx.in_fp8:
            return scaled_gradient(gradient, codes, scale).to(ctx.dtype), None, None, None
        return gradient @ (codes.float() * scale).to(gradient.dtype), None, None, None
