"""Noise recipes: what is added to the noise that the model sees, never to the noise that it should predict."""

from torch import Tensor


def perturb(noise: Tensor, perturbation: Tensor, strength: float | Tensor) -> Tensor:
    """Input perturbation (Ning et al. 2023, arXiv:2301.11706): ``noise + strength * perturbation``.

    Args:
        noise, perturbation: independent standard normals [B, ...].
        strength: one number, or one per sample [B].
    """
    if isinstance(strength, Tensor):
        strength = strength.view(-1, *[1] * (noise.ndim - 1))
    return noise + strength * perturbation
