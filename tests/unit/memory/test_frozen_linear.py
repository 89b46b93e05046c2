"""Frozen Linear layers: what they keep for the backward pass, in which precision they compute, what they refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.memory.frozen_linear import FrozenLinear, Storage, quantize, quantize_fp8
from musubi_tuner.planning.fake_step import Alive
from musubi_tuner.weights.stored import StoredWeight


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


@pytest.mark.parametrize("shape", [(192, 32), (1000, 48), (3, 96), (5, 130), (6, 10), (64, 64)])
def test_values_of_nf4_have_the_scale_of_their_block_in_rows_of_any_length(shape: tuple[int, int]) -> None:
    """Rows differ by orders of magnitude, so that the scale of another block would show."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 10 ** torch.randn(shape[0], 1, generator=generator)
    layer = FrozenLinear.of_weight(StoredWeight.of(weight), None, "nf4", torch.float32)
    for error, block in zip(
        (layer.dense_weight(torch.float32) - weight).flatten().split(64), weight.flatten().split(64)
    ):
        assert (error.abs() <= 0.153 * block.abs().max()).all()


ROWS, COLUMNS, STD = 192, 256, 0.05


def normal_weight() -> Tensor:
    return STD * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def float8_error(weight: Tensor, scaled: bool) -> float:
    """e4m3 has 8 steps between a power of two and the next, so 2^-3 of it each, and errors are spread evenly over a step:

        error = 2^-3 / sqrt(12) = 0.0361 of the power of two below, and of the value itself
        0.0361 * sqrt(mean of 1 / m^2) = 0.0361 * sqrt(0.541) = 0.0266       m in [1, 2), spread evenly over log m

    Without a scale, values below 2^-6 have steps of 2^-9.
    """
    coarse = 0.0 if scaled else 2**-9 / math.sqrt(12) / float(weight.square().mean().sqrt())
    return math.hypot(0.0266, coarse)


def int8_error(weight: Tensor) -> float:
    """Even steps of max |w| / 127 in each row, and errors spread evenly over them."""
    step = weight.abs().amax(1) / 127
    return float(step.square().mean().div(12).sqrt() / weight.square().mean().sqrt())


@pytest.mark.parametrize(
    ("storage", "scale", "expected"),
    [
        ("fp8", "block", lambda weight: float8_error(weight, scaled=False)),
        ("fp8_scaled", "tensor", lambda weight: float8_error(weight, scaled=True)),
        ("fp8_scaled", "row", lambda weight: float8_error(weight, scaled=True)),
        ("fp8_scaled", "block", lambda weight: float8_error(weight, scaled=True)),
        ("int8", "block", int8_error),
        # Known for normal weights in blocks of 64: Dettmers et al. 2023 place the levels at their quantiles.
        ("nf4", "block", lambda weight: 0.09),
    ],
)
def test_error_of_the_output_is_that_of_the_weight(storage: Storage, scale: Any, expected: Any) -> None:
    """For x of independent normal numbers |E x| / |W x| is |E| / |W| on average, E the error of the weight W.

    Over 256 x 192 products it strays by a few percent; the figures for the weight hold within a fifth.
    """
    weight = normal_weight()
    layer = FrozenLinear.of_weight(StoredWeight.of(weight), torch.ones(ROWS), storage, torch.float32, scale=scale)
    of_weight = float((layer.dense_weight(torch.float32) - weight).norm() / weight.norm())
    x = torch.randn(256, COLUMNS, generator=torch.Generator().manual_seed(1))
    true = x.double() @ weight.double().T
    of_output = float((layer(x) - 1 - true).norm() / true.norm())
    figure = expected(weight)
    assert 0.8 * figure < of_weight < 1.2 * figure
    assert 0.95 * of_weight < of_output < 1.05 * of_weight


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


@pytest.mark.parametrize(
    ("storage", "computed"),
    [("plain", "no"), ("fp8", "no"), ("fp8_scaled", "no"), ("int8", "no"), ("nf4", "no"), ("fp8", "both"), ("fp8_scaled", "both")],
)  # fmt: skip
def test_no_weight_lives_between_the_passes(storage: Storage, computed: Any) -> None:
    """Whoever might keep it: autograd, the function's context, or the layer. A weight has 32 times the bytes of the output."""
    weight = StoredWeight.of(linear().weight.detach())
    layer = FrozenLinear.of_weight(weight, None, storage, torch.bfloat16, scale="row")
    layer.fp8_compute = computed
    x = torch.randn(4, 128, requires_grad=True)
    with Alive() as alive:
        out = layer(x)
        assert (alive.peak > 2 * 96 * 128) is (computed == "no" and storage != "plain")  # there for the moment
        assert alive.now <= 2 * (out.nbytes + x.nbytes)
        out.sum().backward()


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
