"""Straight lines between an image and noise, and conversions between prediction types.

    noisy = (1 - sigma) * x0 + sigma * noise          velocity = noise - x0

sigma is the noise fraction: 0 is the image, 1 is pure noise. The line is from Liu et al. 2022
(arXiv:2209.03003), in the direction of FLUX.1. A family that counts time from noise to data passes
``sigma = 1 - t`` and negates the velocity; that belongs to its ``process.py``.

The variance-preserving helpers take ``alpha``, the signal power (alpha-bar of DDPM): v-prediction is
from Salimans and Ho 2022 (arXiv:2202.00512), appendix D.

Pure functions: no random numbers, no device moves, no model. Arithmetic is in float32.
"""

import torch
from torch import Tensor


def per_sample(value_B: Tensor, like: Tensor) -> Tensor:
    """View one float32 value per sample so that it broadcasts over the trailing axes of ``like`` [B, ...].

    Raises:
        ValueError: if ``value_B`` does not hold one value per sample.
    """
    if value_B.shape != like.shape[:1]:
        raise ValueError(f"got {tuple(value_B.shape)} values, expected ({len(like)},): one value per sample")
    return value_B.float().view(-1, *[1] * (like.ndim - 1))


def interpolate(x0: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """Mix an image with noise at one noise level per image.

    Args:
        x0: clean latents [B, ...], already scaled for the model.
        noise: standard normal, same shape.
        sigma_B: noise fraction in [0, 1], [B].

    Returns:
        Noisy latents in the dtype of ``x0``, mixed in float32 (bfloat16 would round sigma 0.999 to 1).

    Raises:
        ValueError: if ``sigma_B`` does not hold one value per image.
    """
    sigma = per_sample(sigma_B, x0)
    return ((1 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)


def x0_from_velocity(noisy: Tensor, velocity: Tensor, sigma_B: Tensor) -> Tensor:
    """Clean latents from noisy ones and ``velocity = noise - x0``: ``x0 = noisy - sigma * velocity``."""
    return (noisy.float() - per_sample(sigma_B, noisy) * velocity.float()).to(noisy.dtype)


def noise_from_velocity(noisy: Tensor, velocity: Tensor, sigma_B: Tensor) -> Tensor:
    """Noise from noisy latents and ``velocity = noise - x0``: ``noise = noisy + (1 - sigma) * velocity``."""
    return (noisy.float() + (1 - per_sample(sigma_B, noisy)) * velocity.float()).to(noisy.dtype)


def _signal_and_noise(alpha_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha = per_sample(alpha_B, like)
    return alpha.sqrt(), (1 - alpha).sqrt()


def vp_interpolate(x0: Tensor, noise: Tensor, alpha_B: Tensor) -> Tensor:
    """Variance-preserving mix ``sqrt(alpha) * x0 + sqrt(1 - alpha) * noise``."""
    signal, spread = _signal_and_noise(alpha_B, x0)
    return signal * x0 + spread * noise


def v_target(x0: Tensor, noise: Tensor, alpha_B: Tensor) -> Tensor:
    """v-prediction target ``sqrt(alpha) * noise - sqrt(1 - alpha) * x0``."""
    signal, spread = _signal_and_noise(alpha_B, x0)
    return signal * noise - spread * x0


def x0_from_v(noisy: Tensor, v: Tensor, alpha_B: Tensor) -> Tensor:
    """Clean latents from a v-prediction."""
    signal, spread = _signal_and_noise(alpha_B, noisy)
    return signal * noisy - spread * v


def noise_from_v(noisy: Tensor, v: Tensor, alpha_B: Tensor) -> Tensor:
    """Noise from a v-prediction; the v -> epsilon conversion."""
    signal, spread = _signal_and_noise(alpha_B, noisy)
    return spread * noisy + signal * v


def x0_from_noise(noisy: Tensor, noise: Tensor, alpha_B: Tensor) -> Tensor:
    """Clean latents from an epsilon prediction: ``(noisy - sqrt(1 - alpha) * noise) / sqrt(alpha)``."""
    signal, spread = _signal_and_noise(alpha_B, noisy)
    return (noisy - spread * noise) / signal


def v_from_noise(noisy: Tensor, noise: Tensor, alpha_B: Tensor) -> Tensor:
    """v from an epsilon prediction, by way of the clean latents."""
    return v_target(x0_from_noise(noisy, noise, alpha_B), noise, alpha_B)


def pack_pixels(latents_BCHW: Tensor) -> Tensor:
    """Latents [B, C, H, W] to one token per latent pixel [B, H*W, C], row by row."""
    return latents_BCHW.flatten(2).transpose(1, 2)


def unpack_pixels(tokens_BNC: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, H*W, C] back to latents [B, C, H, W]."""
    batch, _, channels = tokens_BNC.shape
    return tokens_BNC.transpose(1, 2).reshape(batch, channels, height, width)


def pack_patches(latents_BCHW: Tensor, patch: int = 2) -> Tensor:
    """Latents [B, C, H, W] to one token per patch [B, (H/p)(W/p), C p p]: row by row, channel before row before column.

    Raises:
        ValueError: if a side is not a multiple of the patch.
    """
    batch, channels, height, width = latents_BCHW.shape
    if height % patch or width % patch:
        raise ValueError(
            f"latents of {height} x {width} cannot be cut into patches of {patch}: sides must be multiples"
        )
    grid = latents_BCHW.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpack_patches(tokens_BNC: Tensor, height: int, width: int, patch: int = 2) -> Tensor:
    """Tokens of `pack_patches` back to latents [B, C, height, width]."""
    batch = len(tokens_BNC)
    grid = tokens_BNC.reshape(batch, height // patch, width // patch, -1, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def linear_lookup(values_BTd: Tensor, grid: Tensor, t_B: Tensor) -> Tensor:
    """Interpolate tabulated values at one time per sample.

    Args:
        values_BTd: [B, T, ...] one table per sample.
        grid: ascending times of the tables, [T] for all or [B, T] for each; need not be evenly spaced. Where tables of
            different lengths are stacked, a shorter grid ends with times of infinity, whose entries are never read.
        t_B: [B]; times outside the grid take the end value.

    Returns:
        [B, ...] float32, ``(1 - a) * left + a * right``.

    Raises:
        ValueError: if the numbers of samples or of table entries do not agree.
    """
    count, length = values_BTd.shape[:2]
    if t_B.shape != (count,):
        raise ValueError(f"got {tuple(t_B.shape)} times, expected ({count},): one value per sample")
    if grid.shape not in ((length,), (count, length)):
        raise ValueError(f"the grid has {tuple(grid.shape)} times, the tables {length} entries")
    grid_BT = grid.float().expand(count, length).contiguous()
    last = grid_BT.isfinite().sum(1) - 1
    rows = torch.arange(count, device=values_BTd.device)
    t = torch.minimum(torch.maximum(t_B.float(), grid_BT[:, 0]), grid_BT[rows, last])
    low = (torch.searchsorted(grid_BT, t[:, None], right=True)[:, 0] - 1).clamp(min=0)
    low = torch.minimum(low, (last - 1).clamp(min=0))
    high = torch.minimum(low + 1, last)
    width = grid_BT[rows, high] - grid_BT[rows, low]
    # A grid of one time has no width, and neither has the row of zeros of a sample without a table.
    width = torch.where(width > 0, width, torch.ones_like(width))
    left, right = values_BTd[rows, low].float(), values_BTd[rows, high].float()
    a = per_sample((t - grid_BT[rows, low]) / width, left)
    return (1 - a) * left + a * right
