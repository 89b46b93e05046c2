"""Discrete-time diffusion: tables of times, a prior over them, and solvers for v-prediction.

Times are indices 0..999 of a variance-preserving process; ``alphas`` is its signal power by index (alpha-bar of DDPM, Ho et al.
2020, arXiv:2006.11239), float32 [1000]. Mixing and targets are `vp_interpolate` and `v_target` at ``alphas[index]``.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

NUM_TIMES = 1000
Predict = Callable[[Tensor, int], Tensor]
"""v of noisy latents at a time."""


def linear_alphas(
    first: float = 1e-4, last: float = 0.02, *, scaled: bool = False, zero_terminal: bool = False
) -> Tensor:
    """Signal power of betas that rise linearly.

    Args:
        scaled: their roots rise linearly instead.
        zero_terminal: rescale so that nothing of the image is left at the last time (Lin et al. 2023, arXiv:2305.08891, algorithm 1).
    """
    betas = (
        torch.linspace(first**0.5, last**0.5, NUM_TIMES).square() if scaled else torch.linspace(first, last, NUM_TIMES)
    )
    alphas = (1 - betas).cumprod(dim=0)
    if not zero_terminal:
        return alphas
    roots = alphas.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()


def cosine_time_prior(offset: float = 0.008) -> Tensor:
    """Probability of every time, proportional to ``cos^2(pi/2 (s + offset) / (1 + offset))``: it falls with the noise."""
    s = torch.linspace(0, 1, NUM_TIMES)
    weight = torch.cos((s + offset) / (1 + offset) * math.pi / 2).square()
    return weight / weight.sum()


def times_from(u_B: Tensor, prior: Tensor | None = None) -> Tensor:
    """Times from uniform draws in [0, 1), int64 [B].

    Args:
        prior: probability of every time; None = all alike.
    """
    if prior is None:
        return (u_B * NUM_TIMES).long().clamp(max=NUM_TIMES - 1)
    edges = prior.double().cumsum(dim=0).to(u_B.device)
    return torch.searchsorted(edges, u_B.double(), right=True).clamp(max=NUM_TIMES - 1)


def trailing_times(steps: int) -> list[int]:
    """Times of a solver from noise to image, evenly spaced and beginning with the last one (Lin et al. 2023, table 2)."""
    return [round(NUM_TIMES - index * NUM_TIMES / steps) - 1 for index in range(steps)]


def _powers(alphas: Tensor, time: int | None) -> tuple[float, float]:
    """Signal and noise at a time; None = the image."""
    if time is None:
        return 1.0, 0.0
    alpha = float(alphas[time])
    return math.sqrt(alpha), math.sqrt(1 - alpha)


def ddim(predict: Predict, x: Tensor, times: Sequence[int], alphas: Tensor) -> Tensor:
    """DDIM without added noise (Song et al. 2020, arXiv:2010.02502, eq. 12), one model call per time."""
    for time, following in zip(times, [*times[1:], None]):
        (signal, noise), (signal_next, noise_next) = _powers(alphas, time), _powers(alphas, following)
        v = predict(x, time).float()
        x0, eps = signal * x - noise * v, noise * x + signal * v
        x = signal_next * x0 + noise_next * eps
    return x


def dpm_solver(predict: Predict, x: Tensor, times: Sequence[int], alphas: Tensor) -> Tensor:
    """DPM-Solver++ (2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2), one model call per time.

    The first step is of first order, and so is the last, into the image itself.
    """
    before: tuple[float, Tensor] | None = None
    for time, following in pairwise(times):
        (signal, noise), (signal_next, noise_next) = _powers(alphas, time), _powers(alphas, following)
        x0 = signal * x - noise * predict(x, time).float()
        # Half the logarithm of the signal-to-noise ratio; where nothing is left of the image it is infinite.
        half = math.log(signal / noise) if signal > 0 else -math.inf
        h = math.log(signal_next / noise_next) - half
        direction = x0
        if before is not None and math.isfinite(before[0]):
            direction = x0 + (x0 - before[1]) * h / (2 * (half - before[0]))
        x = noise_next / noise * x - signal_next * math.expm1(-h) * direction
        before = half, x0
    signal, noise = _powers(alphas, times[-1])
    return signal * x - noise * predict(x, times[-1]).float()
