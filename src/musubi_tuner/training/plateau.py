"""A learning rate that falls when the loss has stopped improving. Torch-free.

    a measurement improves                  if it is below (1 - threshold) times the lowest one so far
    more than patience in a row do not      share <- max(share * factor, floor), from the next update on
    cooldown measurements after that        are compared, but not counted

The rules are those of ``torch.optim.lr_scheduler.ReduceLROnPlateau`` (mode "min", threshold_mode "rel", eps 0), and NaN never improves.
The share multiplies the rate that the schedule gives, so warm-up comes before it: what is measured until its end does not count.

What is measured is the validation loss, or without validation the mean loss of an epoch. All ranks have the same value, and so
take the same decision.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from musubi_tuner.training.schedulers import schedule_length

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig, Steps


class Plateau:
    """What is left of a learning rate.

    Args:
        factor: of a fall. patience, cooldown: in measurements. threshold: of an improvement, relative.
        floor: least share. warmup: updates of warm-up, in which nothing counts.

    Attributes:
        share: of the learning rate, from 1 down to the floor.
        lowest: measurement so far. bad: measurements in a row that were no improvement. resting: those of a cooldown to come.
    """

    def __init__(
        self, *, factor: float, patience: int, threshold: float, cooldown: int = 0, floor: float = 0.0, warmup: int = 0
    ) -> None:
        self.factor, self.patience, self.threshold = factor, patience, threshold
        self.cooldown, self.floor, self.warmup = cooldown, floor, warmup
        self.share, self.lowest, self.bad, self.resting = 1.0, math.inf, 0, 0

    def measure(self, value: float, updates: int) -> bool:
        """Take a measurement; whether the rate falls.

        Args:
            updates: done before it.
        """
        if updates < self.warmup:
            return False
        if value < self.lowest * (1 - self.threshold):
            self.lowest, self.bad = value, 0
        else:
            self.bad += 1
        if self.resting > 0:
            self.resting, self.bad = self.resting - 1, 0
        if self.bad <= self.patience:
            return False
        self.resting, self.bad = self.cooldown, 0
        before, self.share = self.share, min(self.share, max(self.share * self.factor, self.floor))
        return self.share < before

    def state(self) -> dict[str, Any]:
        """Plain data for a state; JSON has no infinity."""
        lowest = None if self.lowest == math.inf else self.lowest
        return {"share": self.share, "lowest": lowest, "bad": self.bad, "resting": self.resting}

    def load_state(self, stored: Mapping[str, Any] | None) -> None:
        """Continue from a state; one of a run with another schedule has none."""
        if stored:
            self.share, self.bad, self.resting = stored["share"], stored["bad"], stored["resting"]
            self.lowest = math.inf if stored["lowest"] is None else stored["lowest"]


def plateau_of(config: "RunConfig", total: int) -> Plateau | None:
    """That of a run of so many updates, or of a role of it; None with another schedule."""
    scheduler = config.scheduler
    if scheduler.type != "plateau":
        return None
    return Plateau(
        factor=scheduler.factor,
        patience=scheduler.patience,
        threshold=scheduler.threshold,
        cooldown=scheduler.cooldown,
        floor=scheduler.min_lr / config.optimizer.lr if config.optimizer.lr else 0.0,
        warmup=scheduler.warmup_updates(schedule_length(config, total)),
    )


def left_of(state: Mapping[str, Any], role: str) -> float:
    """Share of the rate of a role that a state has left.

    Args:
        state: its plain data.
    """
    return (state.get("plateau") or {}).get(role, {}).get("share", 1.0)


def measurements(config: "RunConfig", steps: "Steps", validated: bool) -> int:
    """How many measurements of a run count and come before its end, where they can no longer change anything.

    Args:
        config: of a role, if there are several. validated: there are held-out images.
    """
    first = max(1, config.scheduler.warmup_updates(schedule_length(config, steps.total_updates)))
    last, epoch, validation = steps.total_updates - 1, steps.updates_per_epoch, config.validation

    def multiples(period: int) -> int:
        return max(0, last // period - (first - 1) // period) if period else 0

    if not validated:
        return multiples(epoch)
    by_step, by_epoch = validation.every_steps or 0, (validation.every_epochs or 0) * epoch
    return multiples(by_step) + multiples(by_epoch) - multiples(math.lcm(by_step, by_epoch))
