"""How training times are drawn, and the shift that bends them.

Times here are a plain number x in [0, 1] that a family reads in its own direction. The shift

    x' = s * x / (1 + (s - 1) * x)

(Esser et al. 2024, arXiv:2403.03206, eq. 23) pushes x towards 1 for s > 1: towards noise where x is the
noise fraction, towards data where x counts from noise to data. ``1 - shift(1 - x, s) = shift(x, 1/s)``.

Random numbers are passed in, never drawn here: the caller keys them (see training.randomness).
"""

import torch
from torch import Tensor

TIME_MARGIN = 1e-4
"""Training times keep this distance from both ends."""


def flux_shift(x: Tensor, shift: float | Tensor) -> Tensor:
    """Bend times in [0, 1] towards 1 by the factor ``shift`` (> 0; 1 changes nothing)."""
    return shift * x / (1 + (shift - 1) * x)


def flux_unshift(x: Tensor, shift: float | Tensor) -> Tensor:
    """Inverse of `flux_shift`."""
    return x / (shift - (shift - 1) * x)


def stratify(u_B: Tensor) -> Tensor:
    """Place the i-th of B uniform draws in the i-th of B equal slices of [0, 1], ascending."""
    count = len(u_B)
    return (torch.arange(count, device=u_B.device, dtype=torch.float32) + u_B.float()) / count


def sample_timesteps(
    draws_B: Tensor,
    method: str = "logit_normal",
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    shift: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
    preserve_shape: bool = False,
) -> Tensor:
    """Turn random draws into training times.

    Args:
        draws_B: standard normal draws for ``logit_normal``; uniform draws in [0, 1] for ``uniform`` and
            ``stratified`` (where draw i lands in slice i; permute the result, or the strata follow the sample order).
        method: ``logit_normal``, ``uniform`` or ``stratified``.
        logit_mean, logit_std: of the normal under the sigmoid.
        shift: factor of `flux_shift`, applied after them.
        low, high: range of the times; ``preserve_shape`` truncates the density to it, else it is squeezed in.

    Returns:
        [B] float32 in [1e-4, 1 - 1e-4]. Never cast it to bfloat16: that rounds 1 - 1e-4 to 1.

    Raises:
        ValueError: for an unknown method.
    """
    narrowed = preserve_shape and (low, high) != (0.0, 1.0)
    device = draws_B.device
    if narrowed and device.type == "mps":  # has no float64
        draws_B = draws_B.cpu()
    if method == "logit_normal":
        draws = draws_B.float()
        if narrowed:
            ends = [_normal_below(bound, logit_mean, logit_std, shift) for bound in (low, high)]
            draws = torch.special.ndtri(ends[0] + torch.special.ndtr(draws.double()) * (ends[1] - ends[0])).float()
        x = torch.sigmoid(logit_mean + logit_std * draws)
    elif method in ("uniform", "stratified"):
        x = draws_B.float() if method == "uniform" else stratify(draws_B)
        if narrowed:
            ends = [float(flux_unshift(torch.tensor(bound, dtype=torch.float64), shift)) for bound in (low, high)]
            x = ends[0] + x * (ends[1] - ends[0])
    else:
        raise ValueError(f"unknown timestep method '{method}'; known: logit_normal, uniform, stratified")
    x = flux_shift(x, shift)
    if (low, high) != (0.0, 1.0):
        x = x.clamp(low, high) if preserve_shape else low + x * (high - low)
    return x.clamp(TIME_MARGIN, 1 - TIME_MARGIN).to(device)


def _normal_below(bound: float, mean: float, std: float, shift: float) -> float:
    """Probability that a shifted logit-normal lies below a bound in [0, 1]."""
    if bound in (0.0, 1.0):
        return bound
    inside = flux_unshift(torch.tensor(bound, dtype=torch.float64), shift)
    return float(torch.special.ndtr((torch.logit(inside) - mean) / std))


def uniform_between(u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform times in [low, high] without shift."""
    return u * (high - low) + low
