"""Noise recipes, Huber losses and ranges of training times against their formulas."""

import math

import pytest
import torch
from torch import Tensor

from musubi_tuner.flow import (
    element_loss,
    flux_shift,
    huber_loss,
    huber_threshold,
    multires_noise,
    multires_sizes,
    noise_offset,
    sample_timesteps,
)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_noise_offset_is_one_number_per_channel() -> None:
    x0 = normals(2, 4, 8, 8)
    found = noise_offset(normals(2, 4, seed=1), x0, 0.1)
    assert found.shape == (2, 4, 1, 1)
    assert torch.equal(found[..., 0, 0], 0.1 * normals(2, 4, seed=1))


def test_adaptive_offset_grows_with_the_mean_of_the_channel_and_is_never_negative() -> None:
    x0 = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), -2.0)])
    ones = torch.ones(2, 3)
    assert torch.allclose(noise_offset(ones, x0, 0.1, 0.05)[:, :, 0, 0], torch.tensor([[0.1] * 3, [0.2] * 3]))
    assert torch.equal(noise_offset(ones, x0, 0.1, -0.5)[1], torch.zeros(3, 1, 1))


def test_sizes_of_coarser_noises_shrink_by_powers_of_their_ratio() -> None:
    assert multires_sizes(64, 32, [3.0, 2.0, 4.0]) == [(64, 32), (32, 16), (4, 2)]
    assert multires_sizes(16, 8, [3.0, 4.0, 3.0, 2.0]) == [(16, 8), (4, 2), (1, 1)]


def test_multires_noise_has_variance_one_and_its_neighbours_agree() -> None:
    levels = [normals(4, *size, seed=n + 1) for n, size in enumerate(multires_sizes(32, 32, [3.0, 3.0, 3.0, 3.0]))]
    plain, found = normals(4, 32, 32), multires_noise(normals(4, 32, 32), levels, 0.6)
    assert found.std().item() == pytest.approx(1, abs=1e-5)

    def alike(noise: Tensor) -> float:
        return (noise[..., 1:] * noise[..., :-1]).mean().item()

    assert abs(alike(plain)) < 0.05 < alike(found)
    # one level of the size of the noise itself is another plain noise
    total = (plain + levels[0]) / (plain + levels[0]).std()
    assert torch.allclose(multires_noise(plain, levels[:1], 0.6), total)


def test_huber_losses_by_their_formulas() -> None:
    d, c = torch.tensor([[-3.0, 0.05, 0.5]]), 0.1
    zero, threshold = torch.zeros_like(d), torch.tensor([c])
    root = (d.square() + c * c).sqrt() - c
    expected = {"l1": d.abs(), "l2": d.square(), "huber": huber_loss(d, zero, c), "smooth_l1": huber_loss(d, zero, c) / c,
                "pseudo_huber": 2 * c * root, "pseudo_smooth_l1": 2 * root}  # fmt: skip
    for kind, value in expected.items():
        assert torch.allclose(element_loss(d, zero, kind, threshold), value), kind
    with pytest.raises(ValueError, match="unknown loss 'l3'; known: l2, l1"):
        element_loss(d, zero, "l3", threshold)


def test_scheduled_thresholds_run_from_one_at_the_image_to_the_threshold_at_the_noise() -> None:
    sigma = torch.tensor([0.0, 0.5, 1.0])
    assert huber_threshold(sigma, 0.1, "constant", 2.0).tolist() == pytest.approx([0.2] * 3)
    assert huber_threshold(sigma, 0.1, "exponential").tolist() == pytest.approx([1, math.sqrt(0.1), 0.1])
    assert huber_threshold(sigma, 0.1, "snr").tolist() == pytest.approx([1, 0.9 * 0.25 + 0.1, 0.1])
    with pytest.raises(ValueError, match="unknown Huber schedule 'linear'"):
        huber_threshold(sigma, 0.1, "linear")


@pytest.mark.parametrize("method", ["logit_normal", "uniform"])
def test_times_of_a_range_are_squeezed_into_it_or_cut_out_of_the_density(method: str) -> None:
    draws = (
        normals(20_000) if method == "logit_normal" else torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    )
    whole = sample_timesteps(draws, method, shift=3.0)
    squeezed = sample_timesteps(draws, method, shift=3.0, low=0.2, high=0.6)
    assert torch.allclose(squeezed, 0.2 + 0.4 * sample_timesteps(draws, method, shift=3.0), atol=1e-3)
    cut = sample_timesteps(draws, method, shift=3.0, low=0.2, high=0.6, preserve_shape=True)
    inside = whole[(whole > 0.2) & (whole < 0.6)]
    assert cut.min() >= 0.2 and cut.max() <= 0.6
    for share in (0.1, 0.5, 0.9):  # the same distribution as what of the whole lies in the range
        assert cut.quantile(share).item() == pytest.approx(inside.quantile(share).item(), abs=0.02)
    assert torch.equal(sample_timesteps(draws, method, shift=3.0, preserve_shape=True), whole)


def test_cutting_keeps_the_shift() -> None:
    # Uniform draws under a shift: the density of x is that of shift(u), cut to the range.
    u = torch.linspace(0, 1, 5)
    cut = sample_timesteps(u, "uniform", shift=3.0, low=0.5, high=0.9, preserve_shape=True)
    ends = 0.5 / (3 - 2 * 0.5), 0.9 / (3 - 2 * 0.9)
    assert torch.allclose(cut, flux_shift(ends[0] + u * (ends[1] - ends[0]), 3.0), atol=1e-6)
