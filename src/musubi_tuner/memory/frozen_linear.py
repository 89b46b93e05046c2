"""A Linear layer whose weight never trains, in one of several forms of storage.

Its autograd function keeps no weight for the backward pass: the stored form is fetched and brought to the compute dtype
again there. So a step holds the compute form of one layer at a time, and a weight may leave the device in between.

    storage     bytes per weight   scale (float32)
    plain       as given           none
    fp8         1                  none: cast to float8_e4m3fn
    fp8_scaled  1                  per tensor, per row, or per 64 columns of a row: max |w| / 448
    int8        1                  per row: max |w| / 127
    nf4         0.5                per 64 values: max |w|; 16 levels (Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes

The product is computed as ``x @ dequantize(weight).T``, on every device; fp8_product has the one for GPUs that multiply fp8.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from musubi_tuner.memory.fp8_product import FP8_MAX, SCALE_FLOOR, TracedProduct, scaled_gradient, scaled_product
from musubi_tuner.weights.stored import StoredWeight, dequantize, is_fp8

Storage = Literal["plain", "fp8", "fp8_scaled", "int8", "nf4"]
Scale = Literal["tensor", "row", "block"]
Form = tuple[Tensor | None, Tensor | None, Storage, Literal["no", "forward", "both"]]
BLOCK = 64
"""Columns that share a scale, and values that share one in nf4."""
INT8_MAX = 127.0
TOGETHER = 1 << 19
"""Values that are quantised together: half a dozen float32 copies of them are alive at once."""


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
    if scale is None:
        return _by_rows(weight, lambda rows: (_to_fp8(rows), None))
    if scale == "tensor":
        largest = torch.stack([_values(rows).abs().amax() for rows in weight.split(_rows(weight))]).amax()
        factor = (largest / FP8_MAX).clamp(min=SCALE_FLOOR)
        return _by_rows(weight, lambda rows: (_to_fp8(rows / factor), None))[0], factor
    if scale == "row" or weight.shape[1] % BLOCK:
        return _by_rows(weight, lambda rows: _scaled(rows, rows))
    return _by_rows(weight, lambda rows: _scaled(rows, rows.view(len(rows), -1, BLOCK)))


def _scaled(rows: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of rows, with one scale for each last axis of ``groups``."""
    factor = (groups.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=SCALE_FLOOR)
    return _to_fp8(groups / factor).view(rows.shape), factor


def _to_fp8(values: Tensor) -> Tensor:
    # Rounding may leave the range by one step; the cast saturates on some devices and gives NaN on others.
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _values(weight: Tensor) -> Tensor:
    return torch.nan_to_num(weight.float())


def _rows(weight: Tensor) -> int:
    """Rows that are quantised together."""
    return max(1, TOGETHER // max(1, weight[0].numel()))


def _by_rows(weight: Tensor, convert: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Convert a weight a few rows at a time, in float32.

    What they become is written into place: beside the weight and its codes, only those rows are held.
    """
    whole: list[Tensor | None] = [None, None]
    done = 0
    for rows in weight.split(_rows(weight)):
        for slot, part in enumerate(convert(_values(rows))):
            if part is None:
                continue
            target = whole[slot]
            if target is None:
                target = whole[slot] = part.new_empty((len(part) * len(weight) // len(rows), *part.shape[1:]))
            start = done * len(part) // len(rows)
            target[start : start + len(part)].view(torch.uint8).copy_(part.view(torch.uint8))
        done += len(rows)
    codes, factors = whole
    assert codes is not None
    return codes, factors


def quantize(weight: Tensor, storage: Storage, scale: Scale = "block") -> tuple[Tensor, Tensor | None]:
    """Bring a weight [out, in] into a form of storage.

    Returns:
        Codes and their float32 scale. Codes of nf4 are packed, two in a byte, [out * in / 2].

    Raises:
        ValueError: for fp8 input, an unknown storage, or an nf4 weight whose number of values is odd.
    """
    if storage == "plain":
        return weight, None
    if storage == "fp8":
        return quantize_fp8(weight, None)
    if storage == "fp8_scaled":
        return quantize_fp8(weight, scale)
    if storage == "int8":
        return _by_rows(weight, _to_int8)
    if storage == "nf4":
        # Blocks of 64 values run through the rows, so chunks must end where blocks do.
        return _by_rows(weight, _to_nf4) if weight.shape[1] % BLOCK == 0 else _to_nf4(_values(weight))
    raise ValueError(f"unknown storage '{storage}'; known: plain, fp8, fp8_scaled, int8, nf4")


def _to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    factor = (rows.abs().amax(1, keepdim=True) / INT8_MAX).clamp(min=SCALE_FLOOR)
    return (rows / factor).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), factor


def _to_nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(rows.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed.flatten(), state.absmax.float()


class _FrozenProduct(torch.autograd.Function):
    """``x @ W.T + b`` with W fetched when it is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "FrozenLinear", dtype: torch.dtype) -> Tensor:
        ctx.layer = layer
        bias = layer.fetch("bias")
        if layer.fp8_compute == "no":
            return F.linear(x, layer.dense_weight(dtype), None if bias is None else bias.to(dtype))
        out = scaled_product(x, *layer.rows())
        return out if bias is None else out + bias.to(out.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), layer = gradients, ctx.layer
        if layer.fp8_compute == "both":
            return scaled_gradient(gradient, *layer.rows()).to(gradient.dtype), None, None
        return gradient @ layer.dense_weight(gradient.dtype), None, None


class FrozenLinear(nn.Module):
    """A Linear layer that is not trained.

    Attributes:
        residence: who holds the buffers, if not the layer itself (see block_swap); asked at every use.
        fp8_compute: which products are computed in fp8 (see fp8_product): none, the forward one, or both.
    """

    stored: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    BUFFERS = ("stored", "scale", "bias")

    def __init__(
        self,
        stored: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        storage: Storage = "fp8_scaled",
        shape: tuple[int, int] | None = None,
    ) -> None:
        """See `of_weight`.

        Args:
            stored: codes. scale: their float32 factor. bias: [out]. dtype: computed in outside of autocast.
            shape: [out, in], where the codes do not show it.
        """
        super().__init__()
        self.dtype, self.storage = dtype, storage
        self.out_features, self.in_features = shape or (stored.shape[0], stored.shape[1])
        self.code_dtype, self.scale_shape = stored.dtype, None if scale is None else scale.shape
        self.fp8_compute: Literal["no", "forward", "both"] = "no"
        self.residence: Any = None
        for name, buffer in zip(self.BUFFERS, (stored, scale, bias)):
            self.register_buffer(name, buffer)

    @classmethod
    def of_weight(
        cls,
        weight: StoredWeight,
        bias: Tensor | None,
        storage: Storage,
        dtype: torch.dtype,
        *,
        scale: Scale = "block",
        device: torch.device | str = "cpu",
        quantize_on: torch.device | None = None,
    ) -> "FrozenLinear":
        """A layer from a weight of a file.

        fp8 weights of a file are used as they are by the fp8 storages, with their scales: rescaling would round twice.

        Args:
            dtype: computed in outside of autocast. scale: what shares one, for fp8_scaled.
            device: where it lives. quantize_on: where it is quantised.
        """
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        if weight.is_fp8 and storage in ("fp8", "fp8_scaled"):
            (codes, factor), fresh = weight.codes(), False
        else:
            dense = weight.dense(dtype)
            fresh = storage != "plain"
            place = quantize_on if fresh and quantize_on is not None else dense.device
            codes, factor = quantize(dense.to(place), storage, scale)
        # Copies of their own: a view of the mapped file would keep it open.
        codes = codes.to(device, copy=not fresh)
        factor = None if factor is None else factor.to(device, copy=not fresh)
        bias = None if bias is None else bias.detach().to(device, dtype, copy=True)
        return cls(codes, factor, bias, dtype, storage=storage, shape=shape)

    def fetch(self, name: str) -> Tensor | None:
        """A buffer, wherever it is; compiled code reads what the swap has bound to the layer."""
        if torch.compiler.is_compiling() or self.residence is None:
            return getattr(self, name)
        return self.residence.fetch(self, name)

    def form(self) -> Form:
        """How the weight is held; see `take_form`."""
        return self.stored, self.scale, self.storage, self.fp8_compute

    def take_form(self, form: Form) -> None:
        """Hold another weight of the same shape, or this one otherwise: codes, scale, storage, and what is computed in fp8."""
        self.stored, self.scale, self.storage, self.fp8_compute = form

    def rows(self) -> tuple[Tensor, Tensor]:
        """fp8 codes [out, in] and a float32 scale per row, [out, 1]."""
        stored, scale = self.fetch("stored"), self.fetch("scale")
        assert stored is not None
        if scale is None:
            return stored, torch.ones(self.out_features, 1, device=stored.device)
        return stored, scale.float().reshape(-1, 1).expand(self.out_features, 1).contiguous()

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in a compute dtype; multiplied in float32."""
        stored, scale = self.fetch("stored"), self.fetch("scale")
        assert stored is not None
        if scale is None:
            return stored.to(dtype)
        if self.storage != "nf4":
            return dequantize(stored, scale, dtype)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # By blocks or as one row: on CPUs with AVX-512 bitsandbytes 0.50 takes other scales where a block ends inside a later row.
        values = self.out_features * self.in_features
        shape = torch.Size((values // BLOCK, BLOCK) if values % BLOCK == 0 else (values,))
        state = QuantState(absmax=scale, shape=shape, dtype=torch.float32, blocksize=BLOCK, quant_type="nf4")
        weight = dequantize_4bit(stored.view(-1, 1), state)
        return weight.view(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        with torch.autocast(kind, enabled=False):
            if torch.compiler.is_compiling():
                return self._traced(x.to(dtype), dtype)
            return _FrozenProduct.apply(x.to(dtype), self, dtype)

    def _traced(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """As plain operations, which a compiler fuses.

        The weight is marked as recomputed: left to choose, a compiler dequantises once and keeps the result for the backward
        pass. So it keeps the stored form, which costs nothing, and dequantises again.
        """
        bias, stored = self.fetch("bias"), self.fetch("stored")
        assert stored is not None
        if self.fp8_compute == "no":
            again = torch.is_grad_enabled() and stored.dtype != dtype
            weight = checkpoint(self.dense_weight, dtype, use_reentrant=False) if again else self.dense_weight(dtype)
            return F.linear(x, weight, None if bias is None else bias.to(dtype))
        out = TracedProduct.apply(x, *self.rows(), self.fp8_compute == "both")
        return out if bias is None else out + bias.to(out.dtype)
