"""Noise levels as musubi-tuner, sd-scripts and diffusers draw and weigh them; sigma = 1 is pure noise.

Nearly every mode in use is a logit-normal: with z standard normal,

    logit(sigma) = location + scale * z

since the shift of Esser et al. 2024 (arXiv:2403.03206, eq. 23), ``k s / (1 + (k - 1) s)``, adds ln k to the logit. So a
mode is a list of (weight, location, scale), and truncating it to a range is exact: no rejection, no second draw.

The resolution-dependent shifts take ln k = mu linear in the number of tokens, as Black Forest Labs' sampler does; outside
the two given points the line goes on.

Uniform numbers are passed in, never drawn here. ``z = sqrt(2) erfinv(2 u - 1)`` with u kept 1e-7 away from both ends.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.flow.timesteps import flux_shift

QUANTILE_MARGIN = 1e-7
TABLE = 1000
"""Entries of the discrete noise table of the ``sigma`` mode."""
SIGMA_FLOOR = 1e-3
"""``sigma_sqrt`` weighs noise levels below this like this."""
LINES: dict[str, tuple[int, float, int, float]] = {
    "flux_shift": (256, 0.5, 4096, 1.15),
    "flux2_shift": (256, 0.5, 4096, 1.15),
    "qwen_shift": (256, 0.5, 8192, 0.9),
    "krea2_shift": (256, 0.5, 6400, 1.15),
}
"""Mode -> two points (tokens, mu) of its line."""
MODES = (
    "uniform", "sigmoid", "shift", *LINES, "logsnr", "qinglong_flux", "qinglong_qwen", "ideogram4_shift", "sigma",
)  # fmt: skip
WEIGHTING_SCHEMES = ("none", "logit_normal", "mode", "cosmap", "sigma_sqrt")
Component = tuple[float, float, float]
"""Weight, location and scale of a logit-normal."""


@dataclass(frozen=True)
class NoiseSettings:
    """How noise levels are drawn.

    Attributes:
        mode: one of `MODES`. sigmoid_scale: spread of the sigmoid and the shift modes. shift: factor of ``shift``.
        logit_mean, logit_std: of ``logsnr`` and of the ``logit_normal`` density.
        low, high: range of the noise level; ``preserve_shape`` truncates the density to it, else it is squeezed in.
        density: weighting scheme that shapes the ``sigma`` mode; mode_scale: of its ``mode`` scheme.
        upstream_sigma: draw ``sigma`` exactly as musubi-tuner does: no shift, and the range acts on the table index.
    """

    mode: str = "uniform"
    sigmoid_scale: float = 1.0
    shift: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    low: float = 0.0
    high: float = 1.0
    preserve_shape: bool = False
    density: str = "none"
    mode_scale: float = 1.29
    upstream_sigma: bool = False


def line(tokens: int, mode: str = "flux_shift") -> float:
    """mu of a resolution-dependent shift; the factor is ``exp(mu)``."""
    x1, y1, x2, y2 = LINES[mode]
    return y1 + (tokens - x1) * (y2 - y1) / (x2 - x1)


def line_of_latent(height: int, width: int, mode: str) -> float:
    """mu for a latent of this size; FLUX.2 counts latent pixels, the others 2 x 2 patches of them."""
    tokens = height * width if mode == "flux2_shift" else (height // 2) * (width // 2)
    return line(tokens, mode)


def normal_quantile(u: Tensor) -> Tensor:
    """Standard normal values with cumulative probability u; float32 inside, as elsewhere in the field, then float64."""
    u = u.float().clamp(QUANTILE_MARGIN, 1 - QUANTILE_MARGIN)
    return (math.sqrt(2) * torch.erfinv(2 * u - 1)).double()


def components(settings: NoiseSettings, height: int, width: int) -> list[Component]:
    """The logit-normals that a mode consists of.

    Raises:
        ValueError: for a mode that is none.
    """
    mode, spread = settings.mode, settings.sigmoid_scale

    def snr(mean: float, std: float) -> tuple[float, float]:
        return -mean / 2, -std / 2  # sigma = sigmoid(-logsnr / 2)

    if mode == "sigmoid":
        return [(1.0, 0.0, spread)]
    if mode == "shift":
        return [(1.0, math.log(settings.shift), spread)]
    if mode in LINES:
        return [(1.0, line_of_latent(height, width, mode), spread)]
    if mode == "logsnr":
        return [(1.0, *snr(settings.logit_mean, settings.logit_std))]
    if mode == "qinglong_flux":
        return [
            (0.79, line_of_latent(height, width, "flux_shift"), spread),
            (0.11, *snr(settings.logit_mean, settings.logit_std)),
            (0.10, *snr(5.36, 1.0)),
        ]
    if mode == "qinglong_qwen":
        return [(0.95, line_of_latent(height, width, "qwen_shift"), spread), (0.05, *snr(5.36, 1.0))]
    if mode == "ideogram4_shift":
        return [(1.0, 0.5 * math.log(256 * height * width / 512**2), 1.5)]
    raise ValueError(f"mode '{mode}' is not a mixture of logit-normals")


def sample_noise_levels(
    u_B: Tensor, settings: NoiseSettings, *, height: int = 128, width: int = 128, pick_B: Tensor | None = None
) -> Tensor:
    """Turn uniform draws into noise levels.

    Args:
        u_B: uniform in [0, 1].
        height, width: latent size, for the modes that depend on it.
        pick_B: uniform draws that choose the component of a mixture; without them, the first component is taken.

    Returns:
        [B] float32 in [0, 1].

    Raises:
        ValueError: for an unknown mode.
    """
    if settings.mode not in MODES:
        raise ValueError(f"unknown timestep mode '{settings.mode}'; known: {', '.join(MODES)}")
    low, high = settings.low, settings.high
    if u_B.device.type == "mps":  # has no float64
        pick = None if pick_B is None else pick_B.cpu()
        return sample_noise_levels(u_B.cpu(), settings, height=height, width=width, pick_B=pick).to(u_B.device)
    if settings.mode == "uniform":
        return (low + u_B.double() * (high - low)).float()
    if settings.mode == "sigma":
        return _table_levels(u_B, settings)
    parts = components(settings, height, width)
    if settings.preserve_shape:
        ranges = [_quantile_range(location, scale, low, high) for _, location, scale in parts]
        # A component takes part as often as its draws would have landed in the range.
        parts = [(weight * (end - start), a, c) for (weight, a, c), (start, end) in zip(parts, ranges)]
    else:
        ranges = [(0.0, 1.0)] * len(parts)
    table = torch.tensor([(*part, *bounds) for part, bounds in zip(parts, ranges)], dtype=torch.float64)
    edges = (table[:, 0] / table[:, 0].sum()).cumsum(0)  # here: GPUs have no deterministic one
    # A copy that blocks would wait for all that the device has to compute. This one is taken from the source before it returns.
    table, edges = (tensor.to(u_B.device, non_blocking=True) for tensor in (table, edges))
    _, location, scale, start, end = table[_pick(edges, pick_B, u_B)].unbind(-1)
    u = start + u_B.double() * (end - start)
    sigma = torch.sigmoid(location + scale * normal_quantile(u))
    if settings.mode == "ideogram4_shift":
        sigma = sigma.clamp(1 - 1 / (1 + math.exp(-7.5)), 1 - 1 / (1 + math.exp(9)))
    if settings.preserve_shape:
        sigma = sigma.clamp(low, high)  # rounding only
    else:
        sigma = low + sigma * (high - low)
    return sigma.float()


def _pick(edges: Tensor, pick_B: Tensor | None, u_B: Tensor) -> Tensor:
    """Component of every sample."""
    if pick_B is None or len(edges) == 1:
        return torch.zeros(len(u_B), dtype=torch.long, device=u_B.device)
    return torch.searchsorted(edges, pick_B.double(), right=True).clamp(max=len(edges) - 1)


def _quantile_range(location: float, scale: float, low: float, high: float) -> tuple[float, float]:
    """Cumulative probabilities between which a logit-normal lies in [low, high]."""

    def probability(sigma: float) -> float:
        if sigma in (0.0, 1.0):
            inside = math.inf if sigma else -math.inf
        else:
            inside = (math.log(sigma / (1 - sigma)) - location) / abs(scale)
        return 0.5 * (1 + math.erf(inside / math.sqrt(2)))

    start, end = probability(low), probability(high)
    # A negative scale turns the order of the draws around.
    return (start, end) if scale > 0 else (1 - end, 1 - start)


def density(u_B: Tensor, settings: NoiseSettings) -> Tensor:
    """Position in the noise table that the ``sigma`` mode takes for uniform draws, in [0, 1] (Esser et al. 2024)."""
    if settings.density == "logit_normal":
        return torch.sigmoid(settings.logit_mean + settings.logit_std * normal_quantile(u_B))
    u = u_B.double()
    if settings.density == "mode":
        return 1 - u - settings.mode_scale * (torch.cos(math.pi * u / 2).square() - 1 + u)
    return u


def _table_levels(u_B: Tensor, settings: NoiseSettings) -> Tensor:
    place = density(u_B, settings)
    if settings.upstream_sigma:
        low, high = settings.low * TABLE, settings.high * TABLE
        return table_sigma((place * (high - low) + low).long().clamp(0, TABLE - 1))
    sigma = table_sigma((place * TABLE).long().clamp(0, TABLE - 1))
    return settings.low + flux_shift(sigma, settings.shift) * (settings.high - settings.low)


def table_sigma(index: Tensor) -> Tensor:
    """Noise level of an entry of the discrete table: 1 at index 0 down to 1/1000."""
    return ((TABLE - index.double()) / TABLE).float()


def noise_level_weight(sigma_B: Tensor, scheme: str) -> Tensor:
    """Loss weight at a noise level (Esser et al. 2024): ``sigma_sqrt`` is 1 / sigma^2, the others as named there.

    Raises:
        ValueError: for an unknown scheme.
    """
    sigma = sigma_B.float()
    if scheme == "sigma_sqrt":
        return sigma.clamp(min=SIGMA_FLOOR) ** -2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    if scheme in WEIGHTING_SCHEMES:
        return torch.ones_like(sigma)
    raise ValueError(f"unknown weighting scheme '{scheme}'; known: {', '.join(WEIGHTING_SCHEMES)}")


def sampling_schedule(steps: int, *, shift: float | None = None, tokens: int | None = None) -> list[float]:
    """Noise levels from 1 to 0 for a sampler, ``steps + 1`` values.

    Args:
        shift: factor of the shift; 1 = linear. tokens: image tokens, from which the shift follows when it is not given.
    """
    factor = shift if shift is not None else math.exp(line(tokens)) if tokens is not None else 1.0
    return flux_shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), factor).tolist()
