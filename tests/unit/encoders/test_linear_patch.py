"""The linear autoencoder: shapes, its fit to the demo's pictures, and the scale of what it makes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.demo.pictures import combinations, draw
from musubi_tuner.encoders.linear_patch import LinearPatchAutoencoder, LinearPatchConfig

pytestmark = pytest.mark.long


def pictures(count: int, seed: int, width: int = 64, height: int = 64) -> Tensor:
    """Pictures of the demo, [count, 3, height, width] in [-1, 1]."""
    everything = combinations()
    drawn = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        drawn.append(draw(everything[int(rng.integers(len(everything)))], rng, width, height))
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(first: Tensor, second: Tensor) -> float:
    """Of pictures in [-1, 1], in decibels."""
    return 10 * math.log10(4 / (first - second).square().mean().item())


@pytest.fixture(scope="module")
def fitted() -> LinearPatchAutoencoder:
    """As the demo fits it: 384 pictures, 16 channels."""
    return LinearPatchAutoencoder.fit(pictures(384, 0), LinearPatchConfig())


@torch.no_grad()
def reconstruct(model: LinearPatchAutoencoder, x: Tensor) -> Tensor:
    return model.decode(model.encode(x)).clamp(-1, 1)


def test_pictures_it_was_not_fitted_to_come_back_above_28_decibels(fitted: LinearPatchAutoencoder) -> None:
    fresh = pictures(64, 1)
    assert psnr(reconstruct(fitted, fresh), fresh) > 28


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (128, 40)])
def test_other_sizes_and_shapes_come_back_too(fitted: LinearPatchAutoencoder, width: int, height: int) -> None:
    x = pictures(16, 2, width, height)
    with torch.no_grad():
        assert fitted.encode(x).shape == (16, 16, height // 8, width // 8)
    found = reconstruct(fitted, x)
    assert found.shape == x.shape
    # The same shapes at another size are drawn by other patches than those it saw, hence less than 28.
    assert psnr(found, x) > 24


def test_latents_of_the_fitted_pictures_have_mean_0_and_deviation_1(fitted: LinearPatchAutoencoder) -> None:
    with torch.no_grad():
        latents = fitted.encode(pictures(384, 0))
    # The mean of every channel is subtracted and the whole is scaled in float64; the convolution rounds in float32.
    assert latents.mean(dim=(0, 2, 3)).abs().max().item() < 1e-4
    assert latents.std().item() == pytest.approx(1, abs=1e-4)


def test_channels_keep_the_square_root_of_their_spread(fitted: LinearPatchAutoencoder) -> None:
    """Neither whitened (all alike) nor left as they are: each principal component over the root of its deviation."""
    x = pictures(384, 0)
    patches = F.unfold(x, 8, stride=8).transpose(1, 2).flatten(0, 1).double()
    spread = torch.linalg.svdvals(patches - patches.mean(0))[:16] / math.sqrt(len(patches) - 1)
    with torch.no_grad():
        found = fitted.encode(x).std(dim=(0, 2, 3)).double()
    expected = spread.sqrt() / spread.mean().sqrt()
    # Both are computed in float64 and applied in float32.
    assert (found / expected - 1).abs().max().item() < 1e-3
    assert found[0] / found[-1] > 2


def test_channels_are_uncorrelated(fitted: LinearPatchAutoencoder) -> None:
    with torch.no_grad():
        latents = fitted.encode(pictures(384, 0)).transpose(0, 1).flatten(1).double()
    correlation = torch.corrcoef(latents) - torch.eye(16)
    assert correlation.abs().max().item() < 1e-3


def test_fitting_twice_gives_the_same_bits() -> None:
    x = pictures(96, 3)
    first, second = (LinearPatchAutoencoder.fit(x, LinearPatchConfig()).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_fitting_does_not_depend_on_the_random_state() -> None:
    x = pictures(96, 3)
    fits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        fits.append(LinearPatchAutoencoder.fit(x, LinearPatchConfig()).state_dict())
    assert all(torch.equal(fits[0][key], fits[1][key]) for key in fits[0])


def test_the_largest_weight_of_every_channel_is_positive(fitted: LinearPatchAutoencoder) -> None:
    """An eigenvector may come with either sign, differently on every machine; this fixes it."""
    weights = fitted.encoder.weight.flatten(1)
    largest = weights.gather(1, weights.abs().argmax(dim=1, keepdim=True))
    assert largest.min().item() > 0


def test_a_fitted_autoencoder_is_frozen(fitted: LinearPatchAutoencoder) -> None:
    assert not any(parameter.requires_grad for parameter in fitted.parameters())
    assert not fitted.training


def test_wider_windows_see_beyond_the_patch() -> None:
    x = pictures(96, 3)
    config = LinearPatchConfig(encoder_window=12)
    model = LinearPatchAutoencoder.fit(x, config)
    assert model.encoder.weight.shape == (16, 3, 12, 12)
    moved = x.clone()
    moved[:, :, :, 9] += 1  # outside the first patch, inside its window of pixels -2 .. 9
    with torch.no_grad():
        change = (model.encode(moved) - model.encode(x)).abs().amax(dim=(0, 1, 2))
    assert change[0] > 0.01
    assert change[2:].max() == 0
    assert psnr(reconstruct(model, x), x) > 24


def test_one_decoder_cell_reaches_its_neighbours_and_no_further(fitted: LinearPatchAutoencoder) -> None:
    z = torch.zeros(1, 16, 5, 7)
    moved = z.clone()
    moved[0, :, 2, 3] = 1
    with torch.no_grad():
        change = (fitted.decode(moved) - fitted.decode(z)).abs().amax(dim=(0, 1))
    cells = F.max_pool2d(change[None], 8)[0]
    assert (cells[1:4, 2:5] > 0).all()
    cells[1:4, 2:5] = 0
    assert cells.max() == 0


def test_a_flat_picture_comes_back_flat(fitted: LinearPatchAutoencoder) -> None:
    """Borders are replicated, so the frame of a picture is no different from its middle."""
    flat = torch.tensor([0.5, -0.25, 0.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    inner = reconstruct(fitted, flat)
    assert torch.allclose(inner[:, :, :8, :8], inner[:, :, 24:32, 24:32], atol=1e-4)


def test_fewer_channels_cost_quality(fitted: LinearPatchAutoencoder) -> None:
    x = pictures(96, 3)
    small = LinearPatchAutoencoder.fit(x, LinearPatchConfig(latent_channels=4))
    assert psnr(reconstruct(small, x), x) < psnr(reconstruct(fitted, x), x) - 3


def test_windows_that_cannot_be_centred_are_refused() -> None:
    for window in (6, 9):
        with pytest.raises(ValueError, match=f"encoder_window is {window}, expected patch_size 8 plus an even number"):
            LinearPatchConfig(encoder_window=window)
    with pytest.raises(ValueError, match="decoder_window is 4, expected an odd number"):
        LinearPatchConfig(decoder_window=4)


def test_its_config_names_its_class_and_all_fields() -> None:
    assert LinearPatchConfig(shift_factor=0.5).to_dict() == {
        "_class_name": "LinearPatchAutoencoder",
        "patch_size": 8,
        "encoder_window": 8,
        "decoder_window": 3,
        "latent_channels": 16,
        "scaling_factor": 1.0,
        "shift_factor": 0.5,
    }
