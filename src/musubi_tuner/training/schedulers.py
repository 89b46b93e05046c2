"""Learning-rate multipliers as plain functions of the update number.

The multiplier of update k (from 0) is applied before that update, so a linear warm-up begins at 0. There is no
scheduler state to save: resuming asks for the same k again.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig


def warmup(step: int, warmup_steps: int, kind: str = "linear") -> float:
    """Warm-up multiplier for step < warmup_steps: ``linear`` k / W, ``cosine`` (1 - cos(pi k / W)) / 2."""
    share = step / warmup_steps
    return 0.5 * (1 - math.cos(math.pi * share)) if kind == "cosine" else share


def progress(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the time after warm-up, clamped to [0, 1]: past the end the rate stays at its minimum."""
    return min(max((step - warmup_steps) / max(1, total_steps - warmup_steps), 0.0), 1.0)


def cosine_schedule(
    step: int, warmup_steps: int, total_steps: int, min_ratio: float = 0.0, warmup_type: str = "linear"
) -> float:
    """``r + (1 - r) (1 + cos(pi q)) / 2`` after warm-up, with r = min_ratio and q the share of time."""
    if step < warmup_steps:
        return warmup(step, warmup_steps, warmup_type)
    share = progress(step, warmup_steps, total_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * share))


def linear_schedule(
    step: int, warmup_steps: int, total_steps: int, min_ratio: float = 0.0, warmup_type: str = "linear"
) -> float:
    """``max(r, 1 - q (1 - r))``: a straight line from 1 to r."""
    if step < warmup_steps:
        return warmup(step, warmup_steps, warmup_type)
    return max(min_ratio, 1 - progress(step, warmup_steps, total_steps) * (1 - min_ratio))


def linear_decay(step: int, warmup_steps: int, total_steps: int, min_ratio: float = 0.0) -> float:
    """``max(r, 1 - q)``: a straight line to 0 that stops at r; the stand-alone helper of the published code."""
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    return max(min_ratio, 1 - progress(step, warmup_steps, total_steps))


def constant_with_warmup(step: int, warmup_steps: int, warmup_type: str = "linear") -> float:
    """1 after warm-up."""
    return warmup(step, warmup_steps, warmup_type) if step < warmup_steps else 1.0


def make_schedule(
    kind: str, *, lr: float, min_lr: float, warmup_steps: int, warmup_type: str, total_steps: int
) -> Callable[[int], float]:
    """Multiplier by update number.

    Raises:
        ValueError: for an unknown kind.
    """
    ratio = min_lr / lr if lr else 0.0
    if kind == "cosine":
        return lambda step: cosine_schedule(step, warmup_steps, total_steps, ratio, warmup_type)
    if kind == "linear":
        return lambda step: linear_schedule(step, warmup_steps, total_steps, ratio, warmup_type)
    if kind == "constant":
        return lambda step: constant_with_warmup(step, warmup_steps, warmup_type)
    raise ValueError(f"unknown schedule '{kind}'; known: cosine, linear, constant")


def schedule_of(config: "RunConfig", total: int) -> Callable[[int], float]:
    """The schedule of a run of so many updates."""
    return make_schedule(
        config.scheduler.type,
        lr=config.optimizer.lr,
        min_lr=config.scheduler.min_lr,
        warmup_steps=config.scheduler.warmup_steps,
        warmup_type=config.scheduler.warmup_type,
        total_steps=config.scheduler.total_steps or total,
    )
