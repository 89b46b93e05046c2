"""Learning-rate multipliers, and decays of the averaged weights, as plain functions of the update number. Torch-free.

The multiplier of update k (from 0) is applied before that update, so a linear warm-up begins at 0. There is no
scheduler state to save: resuming asks for the same k again. What measurements make of the rate is elsewhere: `plateau`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from musubi_tuner.optimizers import OPTIMIZERS
from musubi_tuner.schedules import Curve, multiplier

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig


def cosine_schedule(
    step: int, warmup_steps: int, total_steps: int, min_ratio: float = 0.0, warmup_type: str = "linear"
) -> float:
    """``r + (1 - r) (1 + cos(pi q)) / 2`` after warm-up, with r = min_ratio and q the share of time."""
    return multiplier("cosine", Curve(warmup_steps, total_steps, min_ratio), warmup_type)(step)


def linear_schedule(
    step: int, warmup_steps: int, total_steps: int, min_ratio: float = 0.0, warmup_type: str = "linear"
) -> float:
    """``max(r, 1 - q (1 - r))``: a straight line from 1 to r."""
    return multiplier("linear", Curve(warmup_steps, total_steps, min_ratio), warmup_type)(step)


def constant_with_warmup(step: int, warmup_steps: int, warmup_type: str = "linear") -> float:
    """1 after warm-up."""
    return multiplier("constant", Curve(warmup_steps, warmup_steps), warmup_type)(step)


def make_schedule(
    kind: str, *, lr: float, min_lr: float, warmup_steps: int, warmup_type: str, total_steps: int, **shape: Any
) -> Callable[[int], float]:
    """Multiplier by update number.

    Args:
        shape: of the curves that have more settings; see `schedules.Curve`.

    Raises:
        ValueError: for an unknown kind.
    """
    ratio, least = (min_lr / lr, 1e-7 / lr) if lr else (0.0, 0.0)
    return multiplier(kind, Curve(warmup_steps, total_steps, ratio, least=least, **shape), warmup_type)


def schedule_length(config: "RunConfig", total: int) -> int:
    """Update at which the schedule of a run of ``total`` updates ends."""
    return config.scheduler.total_steps or total


def schedule_of(config: "RunConfig", total: int) -> Callable[[int], float]:
    """The schedule of a run of so many updates; schedule-free optimizers have none."""
    if OPTIMIZERS[config.optimizer.type].averages:
        return lambda step: 1.0
    return make_schedule(
        config.scheduler.type,
        lr=config.optimizer.lr,
        min_lr=config.scheduler.min_lr,
        warmup_steps=config.scheduler.warmup_updates(schedule_length(config, total)),
        warmup_type=config.scheduler.warmup_type,
        total_steps=schedule_length(config, total),
        **config.scheduler.shape(),
    )


@dataclass(frozen=True)
class RateJump:
    """Where a run goes on along another curve of the learning rate.

    Attributes:
        step: updates done. former_end, end: update at which the old curve ended, and at which the new one does.
        before: rate of the last update done. after: rate of the next one.
    """

    step: int
    former_end: int
    end: int
    before: float
    after: float

    def __str__(self) -> str:
        times = self.after / self.before if self.before else 0.0
        size = f", {times:.0f} times as high" if times >= 2 else ""
        return f"{self.before:.3g} at update {self.step}, {self.after:.3g} at update {self.step + 1}{size}"


def rate_jump(
    config: "RunConfig", total: int, began: Mapping[str, Any], former_end: int | None, step: int, left: float = 1.0
) -> RateJump | None:
    """How the learning rate leaves the curve that it followed; None where it does not, by more than 1 %.

    Args:
        total: updates of the run. began: fixed settings of the state that it goes on from.
        former_end: update at which the schedule ended that the state was made with; None = it is not known. step: updates done.
        left: share of the rate that a plateau had left.
    """
    if former_end is None or not 0 < step < total:
        return None
    lr, changed = config.optimizer.lr, config.resume.allow
    former = {name: began.get(key, getattr(config.scheduler, name)) for name in type(config.scheduler).model_fields
              if (key := f"scheduler.{name}") == "scheduler.min_lr" or key in changed}  # fmt: skip
    before_lr = began.get("optimizer.lr", lr) if "optimizer.lr" in changed else lr
    tables = {
        "scheduler": config.scheduler.model_copy(update={**former, "total_steps": former_end}),
        "optimizer": config.optimizer.model_copy(update={"lr": before_lr}),
    }
    before = config.model_copy(update=tables)
    old, new = schedule_of(before, total), schedule_of(config, total)
    before_lr *= left if before.scheduler.type == "plateau" else 1.0
    lr *= left if config.scheduler.type == "plateau" else 1.0
    if math.isclose(before_lr * old(step), lr * new(step), rel_tol=0.01):
        return None
    return RateJump(step, former_end, schedule_length(config, total), before_lr * old(step - 1), lr * new(step))


def average_decay(update: int, decay: float, warmup: bool) -> float:
    """Share of the old average that the n-th update (from 0) keeps: ``decay``, under warm-up at most ``(1 + n) / (10 + n)``."""
    return min(decay, (1 + update) / (10 + update)) if warmup else decay


def start_left(updates: int, decay: float, warmup: bool) -> float:
    """Share of its start that an average still holds after so many updates: the product of their `average_decay`."""
    if not warmup:
        return decay**updates
    # (1 + n) / (10 + n) is below decay for so many updates; its product over m of them is 9! m! / (m + 9)!.
    below = min(updates, max(0, math.ceil((10 * decay - 1) / (1 - decay))))
    return decay ** (updates - below) / math.comb(below + 9, 9)
