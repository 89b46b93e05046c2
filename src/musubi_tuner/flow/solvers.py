"""Ordinary differential equation solvers for sampling.

A solver follows ``dx/dtau = velocity(x, tau)`` along a list of times; the direction (noise to data or back) is
that of the list. State and times are float32 whatever the model computes in.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
SOLVERS = ("euler", "heun")


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """First-order solver: one model call per interval."""
    for now, following in pairwise(times):
        x = x + (following - now) * velocity(x, now).float()
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Second-order solver (Karras et al. 2022, arXiv:2206.00364, algorithm 1): two calls per interval, one in the last."""
    last = len(times) - 2
    for index, (now, following) in enumerate(pairwise(times)):
        slope = velocity(x, now).float()
        ahead = x + (following - now) * slope
        if index < last:
            slope = (slope + velocity(ahead, following).float()) / 2
            ahead = x + (following - now) * slope
        x = ahead
    return x


def solve(name: str, velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Run the solver of that name.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "euler":
        return euler(velocity, x.float(), times)
    if name == "heun":
        return heun(velocity, x.float(), times)
    raise ValueError(f"unknown solver '{name}'; known: {', '.join(SOLVERS)}")


def guide(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): ``negative + scale * (positive - negative)``."""
    return negative + scale * (positive - negative)
