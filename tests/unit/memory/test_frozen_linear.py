"""Frozen Linear layers: what they keep for the backward pass, in which precision they compute, what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.memory.frozen_linear import FrozenLinear, Storage, quantize, quantize_fp8
from musubi_tuner.models.stored import StoredWeight


def linear(columns: int = 128, rows: int = 96) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows)


def frozen(layer: nn.Linear, storage: Storage = "fp8_scaled") -> FrozenLinear:
    weight = StoredWeight.of(layer.weight.detach())
    return FrozenLinear.of_weight(weight, layer.bias, storage, layer.weight.dtype)


@pytest.mark.parametrize("scale", [None, "tensor", "row", "block"])
def test_error_is_that_of_three_mantissa_bits(scale: Any) -> None:
    """e4m3 rounds to 1/16 of a power of two at worst, so a weight is off by at most 1/16 of itself, but for denormals."""
    weight = linear().weight.detach()
    stored, factor = quantize_fp8(weight, scale)
    back = FrozenLinear(stored, factor, None, torch.float32).dense_weight(torch.float32)
    smallest = 2.0**-9 * (1.0 if factor is None else float(factor.max()))
    assert ((back - weight).abs() <= weight.abs() / 16 + smallest).all()


def test_error_of_int8_is_half_a_step_of_the_row() -> None:
    weight = linear().weight.detach()
    stored, factor = quantize(weight, "int8")
    assert factor is not None
    back = FrozenLinear(stored, factor, None, torch.float32, storage="int8").dense_weight(torch.float32)
    assert ((back - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all()


def test_error_of_nf4_is_half_the_widest_gap_of_its_levels() -> None:
    """The widest gap between two of the 16 levels is 0.304 (from -1 to -0.696), in units of the largest of 64 values."""
    weight = linear().weight.detach()
    layer = frozen(linear(), "nf4")
    back = layer.dense_weight(torch.float32)
    assert layer.stored is not None and layer.stored.numel() == weight.numel() // 2
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
    assert ((back - weight).view(-1, 64).abs() <= 0.153 * largest).all()
    assert float((back - weight).norm() / weight.norm()) < 0.11


@pytest.mark.parametrize("storage", ["plain", "fp8", "fp8_scaled", "int8", "nf4"])
def test_backward_pass_keeps_no_weight(storage: Storage) -> None:
    """Saved for backward: nothing at all; a plain Linear layer saves its input or its weight."""
    sizes: list[int] = []
    layer = frozen(linear(), storage)
    x = torch.randn(4, 128, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    assert sizes == []
    out.sum().backward()
    assert x.grad is not None


def test_compute_dtype_is_that_of_autocast_or_of_the_layer() -> None:
    layer = frozen(linear())
    x = torch.randn(2, 128)
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert frozen(linear().bfloat16())(x).dtype == torch.bfloat16


def test_columns_that_do_not_divide_take_a_scale_per_row() -> None:
    _, factor = quantize_fp8(linear(columns=100).weight.detach(), "block")
    assert factor is not None and factor.shape == (96, 1)


def test_zero_rows_and_broken_values() -> None:
    weight = torch.zeros(3, 64)
    weight[1, 0], weight[2] = float("nan"), 1e6
    stored, factor = quantize_fp8(weight, "row")
    back = FrozenLinear(stored, factor, None, torch.float32).dense_weight(torch.float32)
    assert (back[:2] == 0).all() and torch.allclose(back[2], torch.full((64,), 1e6))


def test_fp8_is_not_quantised_again() -> None:
    stored, _ = quantize_fp8(linear().weight.detach())
    with pytest.raises(ValueError, match="stored in float8 already"):
        quantize_fp8(stored)
