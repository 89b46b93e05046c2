"""Noise recipes: what is done to the noise of a sample before it meets the image.

`noise_offset` and `multires_noise` change the noise itself, which the model sees and predicts; `perturb` only what it sees.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_RATIO, LARGEST_RATIO = 2.0, 4.0
"""Bounds of the random number whose powers divide the sides of the coarser noises."""


def perturb(noise: Tensor, perturbation: Tensor, strength: float | Tensor) -> Tensor:
    """Input perturbation (Ning et al. 2023, arXiv:2301.11706): ``noise + strength * perturbation``.

    Args:
        noise, perturbation: independent standard normals [B, ...].
        strength: one number, or one per sample [B].
    """
    if isinstance(strength, Tensor):
        strength = strength.view(-1, *[1] * (noise.ndim - 1))
    return noise + strength * perturbation


def noise_offset(normal_BC: Tensor, x0: Tensor, strength: float, adaptive_scale: float = 0.0) -> Tensor:
    """What noise offset (Guttenberg 2023) adds to the noise: one number per sample and channel.

    ``max(0, strength + adaptive_scale * |mean over the pixels of x0|) * normal``

    Args:
        normal_BC: standard normal.
        x0: latents [B, C, H, W].
        strength: at least 0; times a random share where it is drawn. adaptive_scale: how much more where the image is far from grey.

    Returns:
        [B, C, 1, 1], float32.
    """
    scale: float | Tensor = strength
    if adaptive_scale:
        scale = (strength + adaptive_scale * x0.float().mean((2, 3)).abs()).clamp(min=0)
    return (scale * normal_BC)[:, :, None, None]


def multires_sizes(height: int, width: int, ratios: Sequence[float]) -> list[tuple[int, int]]:
    """Rows and columns of the noises that multi-resolution noise adds up: sides divided by ``ratio ** i``; the last is the first
    with a side of 1."""
    sizes = []
    for index, ratio in enumerate(ratios):
        sizes.append((max(1, int(height / ratio**index)), max(1, int(width / ratio**index))))
        if 1 in sizes[-1]:
            break
    return sizes


def multires_noise(noise_CHW: Tensor, levels: Sequence[Tensor], discount: float) -> Tensor:
    """Multi-resolution noise (Whitaker 2023) of one sample, of standard deviation 1.

    Args:
        noise_CHW: standard normal.
        levels: standard normals [C, h, w] of the sizes of `multires_sizes`; level i counts ``discount ** i``.
        discount: between 0 and 1.
    """
    size = noise_CHW.shape[-2:]
    total = noise_CHW.clone()
    for index, level in enumerate(levels):
        total += discount**index * F.interpolate(level[None], size=size, mode="bilinear", align_corners=False)[0]
    return total / total.std().clamp(min=torch.finfo(total.dtype).tiny)
