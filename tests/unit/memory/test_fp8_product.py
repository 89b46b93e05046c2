"""Products of fp8 numbers: how far off they are, which layers take part, and what is said where they cannot."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.errors import ConfigError
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.memory.fp8_compute import compute_in_fp8, multiply_once, require_fp8, why_not
from musubi_tuner.memory.fp8_product import TracedProduct, quantize_tokens, scaled_gradient, scaled_product
from musubi_tuner.memory.frozen_linear import FrozenLinear, Scale, Storage, quantize_fp8
from musubi_tuner.weights.stored import StoredWeight

BOUND = 0.05
"""e4m3 rounds to 3 mantissa bits: a relative error spread over +-1/16, 0.026 root mean square for random numbers. Both factors
of every product are rounded, independently: 0.026 * sqrt(2) = 0.037; a third more for denormals and unlucky draws."""


def layer(storage: Storage = "fp8_scaled", scale: Scale = "row", columns: int = 64, rows: int = 48) -> FrozenLinear:
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows)
    return FrozenLinear.of_weight(
        StoredWeight.of(linear.weight.detach()), linear.bias, storage, torch.bfloat16, scale=scale
    )


def gradients(frozen: FrozenLinear) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 33, 64, generator=generator).bfloat16().requires_grad_()
    out = frozen(x)
    out.backward(torch.randn(out.shape, generator=generator).bfloat16())
    assert x.grad is not None
    return out.detach(), x.grad


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_tokens_are_rounded_by_at_most_a_sixteenth() -> None:
    x = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    codes, scale = quantize_tokens(x)
    assert scale.shape == (5, 1) and codes.dtype == torch.float8_e4m3fn
    assert ((codes.float() * scale - x).abs() <= x.abs() / 16 + 2.0**-9 * scale).all()
    assert quantize_tokens(torch.zeros(1, 64))[0].float().abs().max() == 0


@pytest.mark.parametrize(("storage", "scale"), [("fp8_scaled", "row"), ("fp8_scaled", "tensor"), ("fp8", "row")])
def test_product_is_off_by_the_rounding_of_both_factors(storage: Storage, scale: Scale) -> None:
    plain, fast = layer(storage, scale), layer(storage, scale)
    compute_in_fp8(fast, backward=False)
    (expected, expected_gradient), (found, found_gradient) = gradients(plain), gradients(fast)
    assert 0 < distance(found, expected) < BOUND
    # The weight is rounded already in both, so only one factor differs; the gradient is computed alike.
    assert torch.equal(found_gradient, expected_gradient)


def test_gradient_in_fp8_is_off_by_the_rounding_of_both_factors() -> None:
    plain, fast = layer(), layer()
    compute_in_fp8(fast, backward=True)
    (_, expected), (_, found) = gradients(plain), gradients(fast)
    assert 0 < distance(found, expected) < BOUND


def test_scales_of_rows_go_into_the_gradient() -> None:
    """Rows whose scales differ a thousandfold: leaving the scale out, or applying it afterwards, would be far off."""
    weight = torch.randn(32, 64) * torch.logspace(-3, 0, 32)[:, None]
    codes, scale = quantize_fp8(weight, "row")
    assert scale is not None
    gradient = torch.randn(7, 32)
    assert distance(scaled_gradient(gradient, codes, scale), gradient @ weight) < BOUND
    assert distance(scaled_product(torch.eye(64), codes, scale), weight.t()) < BOUND


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e-14])
def test_gradients_are_rounded_alike_however_small_they_are(size: float) -> None:
    """That of a mean over the latents of a picture is 1e-6 and less, and the scale of a weight makes it ten thousand times smaller."""
    codes, scale = quantize_fp8(0.02 * torch.randn(32, 64), "row")
    assert scale is not None
    gradient = size * torch.randn(7, 32)
    assert distance(scaled_gradient(gradient, codes, scale), gradient @ (codes.float() * scale)) < BOUND


@pytest.mark.parametrize("backward", [False, True])
def test_compiled_form_is_the_same_product(backward: bool) -> None:
    fast = layer()
    compute_in_fp8(fast, backward=backward)
    expected, expected_gradient = gradients(fast)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 33, 64, generator=generator).bfloat16().requires_grad_()
    out = TracedProduct.apply(x, *fast.rows(), backward) + fast.bias.to(torch.bfloat16)
    out.backward(torch.randn(out.shape, generator=generator).bfloat16())
    assert x.grad is not None
    assert torch.equal(out, expected) and torch.equal(x.grad, expected_gradient)


def test_nothing_is_kept_for_the_backward_pass() -> None:
    fast, kept = layer(), []
    compute_in_fp8(fast, backward=True)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fast(torch.randn(4, 64, requires_grad=True))
    assert kept == []


def test_streamed_blocks_multiply_in_fp8_too() -> None:
    def model() -> nn.Module:
        whole = nn.Module()
        whole.blocks = nn.ModuleList(nn.Sequential(layer(rows=64)) for _ in range(4))
        compute_in_fp8(whole, backward=True)
        return whole

    def run(whole: Any) -> tuple[Tensor, Tensor]:
        x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        out = x
        for block in whole.blocks:
            out = block(out)
        out.float().square().sum().backward()
        assert x.grad is not None
        return out.detach(), x.grad

    expected, streamed = run(model()), model()
    BlockSwap(streamed, {"blocks": 2}, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(run(streamed), expected))


@pytest.mark.parametrize(
    ("frozen", "reason"),
    [
        (layer(scale="block", columns=128), "scaled by blocks of columns"),
        (layer("int8"), "stored as int8"),
        (layer(columns=72), "sides not multiples of 16"),
        (layer(rows=40), "sides not multiples of 16"),
        (
            FrozenLinear(torch.zeros(16, 16).to(torch.float8_e5m2), None, None, torch.bfloat16, storage="fp8"),
            "stored in float8_e5m2",
        ),
        (layer(), None),
        (layer(scale="tensor"), None),
        (layer("fp8"), None),
    ],
    ids=str,
)
def test_layers_that_cannot(frozen: FrozenLinear, reason: str | None) -> None:
    assert why_not(frozen) == reason


def test_what_dequantises_instead_is_said() -> None:
    model = nn.Sequential(layer(), layer(scale="block", columns=128), layer("plain"))
    assert compute_in_fp8(model, backward=False) == [
        "fp8: 1 layers multiply in fp8, their input gradients in bf16",
        "note: 1 layers are scaled by blocks of columns; these are dequantised and multiplied in bf16",
    ]
    assert [part.fp8_compute for part in model] == ["forward", "no", "no"]
    with pytest.raises(ConfigError, match=r"memory\.fp8_compute: no layer .* \(1 layers are stored as nf4\)"):
        compute_in_fp8(nn.Sequential(layer("nf4")), backward=False)


def test_the_kernel_is_given_what_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules of the kernel for a scale per row, of which its emulation on a CPU checks few."""
    real, seen = torch._scaled_mm, []

    def strict(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert a.is_contiguous() and b.t().is_contiguous()
        assert a.dtype == b.dtype == torch.float8_e4m3fn and out_dtype == torch.bfloat16
        assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
        assert all(scale.is_contiguous() and scale.dtype == torch.float32 for scale in (scale_a, scale_b))
        assert all(side % 16 == 0 for side in b.shape)
        seen.append(b.shape)
        return real(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", strict)
    assert torch.equal(multiply_once(torch.device("cpu")), torch.full((16, 16), 16.0, dtype=torch.bfloat16))
    codes, scales = torch.ones(32, 48).to(torch.float8_e4m3fn), torch.ones(32, 5)
    for scale in (scales[:, :1], scales[:1, :1].expand(32, 1), torch.ones(32, 1)):
        scaled_product(torch.ones(2, 3, 48), codes, scale)
        scaled_gradient(torch.ones(2, 3, 32), codes, scale)
    assert len(seen) == 7


def test_device_without_fp8() -> None:
    with pytest.raises(
        ConfigError, match=r"needs a GPU that multiplies float8 .* this run computes on cpu; set it to false"
    ):
        require_fp8(torch.device("cpu"))
