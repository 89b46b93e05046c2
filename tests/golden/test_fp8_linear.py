"""Quantised Linear layers equal musubi-tuner's: codes, scales and products."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from musubi_tuner.memory.frozen_linear import FrozenLinear, quantize_fp8

GOLDEN = load_file(Path(__file__).parent / "data" / "fp8_linear.safetensors")
NAMES: dict[str, Any] = {"tensor": "tensor", "row": "channel", "block": "block"}


@pytest.mark.parametrize("scale", ["tensor", "row", "block"])
def test_codes_scales_and_product(scale: Any) -> None:
    name = NAMES[scale]
    stored, factor = quantize_fp8(GOLDEN["weight"], scale)
    assert factor is not None and factor.dtype == torch.float32
    assert torch.equal(stored.view(torch.uint8), GOLDEN[f"{name}.q_bits"])
    assert torch.allclose(factor.flatten(), GOLDEN[f"{name}.scale"].flatten(), rtol=1e-6, atol=0)
    layer = FrozenLinear(stored, factor, GOLDEN["bias"], torch.float32)
    assert torch.allclose(layer(GOLDEN["x"]), GOLDEN[f"{name}.y"], atol=1e-5, rtol=1e-5)


def test_plain_cast() -> None:
    stored, factor = quantize_fp8(GOLDEN["weight"], None)
    assert factor is None
    assert torch.equal(stored.view(torch.uint8), GOLDEN["plain.q_bits"])
    layer = FrozenLinear(stored, None, GOLDEN["bias"], torch.float32)
    assert torch.allclose(layer(GOLDEN["x"]), GOLDEN["plain.y"], atol=1e-5, rtol=1e-5)


def test_input_gradient_is_that_of_the_stored_weight() -> None:
    stored, factor = quantize_fp8(GOLDEN["weight"], "block")
    layer = FrozenLinear(stored, factor, GOLDEN["bias"], torch.float32)
    x: Tensor = GOLDEN["x"].clone().requires_grad_()
    layer(x).sum().backward()
    expected = torch.ones(*x.shape[:-1], layer.out_features) @ layer.dense_weight(torch.float32)
    assert x.grad is not None and torch.allclose(x.grad, expected, atol=1e-5)
