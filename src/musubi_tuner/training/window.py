"""Losses since the last line of the log, and since the start of the epoch.

    loss/<term>                 mean over the updates of the window in which the term was computed
    loss/sigma_<noise level>    mean of the main loss over the samples of the window whose noise level lies in one of the equal
                                slices of [0, 1]; named by the middle of the slice, as loss/val_sigma_ is

Sums stay on the device until a line is written. Every rank knows the losses of its own samples; all else is the same
everywhere. A state holds the sums of all ranks, so a run that goes on writes the lines of one that was never interrupted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.training.metrics import SIGMA
from musubi_tuner.training.ranks import Ranks
from musubi_tuner.training.validation import time_grid

LOSS = "loss/"
"""Prefix of tags whose values each rank has for its own samples only."""


def binned(sigma_B: Tensor, loss_B: Tensor, count: int) -> Tensor:
    """Sum of the losses and number of samples in each of ``count`` slices of the noise level, [2, count] float32.

    Nothing is added atomically, so the numbers do not depend on the order in which a GPU works.
    """
    index = (sigma_B * count).long().clamp(0, count - 1)
    member = index[:, None] == torch.arange(count, device=sigma_B.device)
    return torch.stack((torch.where(member, loss_B[:, None], 0.0).sum(0), member.sum(0).float()))


class NoiseBins:
    """Losses by noise level since the last line.

    Args:
        count: number of slices; 0 = none. device: where the sums are kept, in float64.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.count = count
        self.table = torch.zeros(2, count, dtype=torch.float64, device=device)
        self.tags = [f"{SIGMA}{middle:.3f}" for middle in time_grid(count)]

    def add(self, table: Tensor) -> None:
        """Count what `binned` gave."""
        self.table = self.table + table.to(self.table)

    def clear(self) -> None:
        """Forget everything, after a line was written or another process took it over."""
        self.table = torch.zeros_like(self.table)

    def means(self, values: Sequence[float]) -> dict[str, float]:
        """Mean loss by tag from the flattened table; slices without a sample are left out."""
        pairs = zip(self.tags, values[: self.count], values[self.count :], strict=True)
        return {tag: total / number for tag, total, number in pairs if number}

    def state(self) -> list[list[float]]:
        """Plain data for a state."""
        rows: list[list[float]] = self.table.tolist()
        return rows

    def load_state(self, stored: list[list[float]] | None) -> None:
        """Continue from a state; one with another number of slices counts for nothing."""
        if stored and len(stored[0]) == self.count:
            self.table = torch.tensor(stored, dtype=self.table.dtype, device=self.table.device)


class Window:
    """Sums since the last line of the log.

    Attributes:
        updates: how many count; those that were skipped do not.
        weights: factors of the loss terms that occurred, other than ``main``; of each the last.

    Args:
        bins: slices of the noise level.
    """

    def __init__(self, ranks: Ranks, bins: int) -> None:
        self.updates = 0
        self.weights: dict[str, float] = {}
        self.bins = NoiseBins(bins, ranks.sum_device)
        self._ranks = ranks
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, tag: str, value: Tensor) -> None:
        """Add the value of an update, a scalar."""
        value = value.to(self._ranks.sum_device, torch.float64)
        self._sums[tag] = self._sums[tag] + value if tag in self._sums else value
        self._counts[tag] = self._counts.get(tag, 0) + 1

    def means(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means by tag and losses by noise level, over all ranks, which must call this together; resets the window."""
        tags = sorted(self._sums)
        totals = torch.stack([self._sums[tag] for tag in tags])
        if self._ranks.count > 1:
            shares = torch.tensor([1.0 if tag.startswith(LOSS) else 1.0 / self._ranks.count for tag in tags])
            totals = totals.float() * shares.to(totals.device)
        totals = torch.cat((totals, self.bins.table.flatten().to(totals.dtype)))
        self._ranks.add_up(totals)
        numbers = totals.tolist() if self._ranks.main else [0.0] * len(totals)
        means = {tag: value / self._counts[tag] for tag, value in zip(tags, numbers)}
        by_noise = self.bins.means(numbers[len(tags) :])
        self._sums, self._counts, self.updates, self.weights = {}, {}, 0, {}
        self.bins.clear()
        return means, by_noise

    def gather(self) -> None:
        """Bring the losses of all ranks to the main one, whose state is written; all ranks call this together."""
        if self._ranks.count == 1:
            return
        tags = sorted(tag for tag in self._sums if tag.startswith(LOSS))
        if tags:
            totals = torch.stack([self._sums[tag] for tag in tags])
            self._ranks.add_up(totals)
            self._sums |= dict(zip(tags, totals))
        if self.bins.count:
            self._ranks.add_up(self.bins.table)
        self._leave_to_main()

    def _leave_to_main(self) -> None:
        """The main rank goes on with the losses of all."""
        if not self._ranks.main:
            self._sums = {
                tag: torch.zeros_like(value) if tag.startswith(LOSS) else value for tag, value in self._sums.items()
            }
            self.bins.clear()

    def state(self) -> dict[str, Any]:
        """Plain data for a state."""
        return {
            "window": {tag: value.item() for tag, value in self._sums.items()},
            "window_counts": dict(self._counts),
            "window_updates": self.updates,
            "window_weights": self.weights,
            "noise_bins": self.bins.state(),
        }

    def load_state(self, values: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self._sums = {
            tag: torch.tensor(value, dtype=torch.float64, device=self._ranks.sum_device)
            for tag, value in values["window"].items()
        }
        self.updates, self.weights = values["window_updates"], dict(values.get("window_weights", {}))
        self._counts = values.get("window_counts") or dict.fromkeys(self._sums, self.updates)
        self.bins.load_state(values.get("noise_bins"))
        self._leave_to_main()


class EpochLoss:
    """Mean loss of the updates of an epoch.

    Reduced over the ranks at every update, not at the end: so the sum has one order, however often the run is interrupted.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.updates = 0
        self._ranks = ranks
        self._total = torch.zeros((), dtype=torch.float64, device=ranks.sum_device)

    def add(self, loss: Tensor) -> None:
        """Count this rank's loss of an update; nothing waits for the device."""
        loss = loss.to(self._ranks.sum_device, torch.float64)
        self._ranks.add_up(loss)
        self._total = self._total + loss
        self.updates += 1

    def mean(self) -> float:
        """The mean of the epoch; resets it for the next one."""
        mean = float(self._total) / self.updates
        self._total, self.updates = torch.zeros_like(self._total), 0
        return mean

    def state(self) -> dict[str, Any]:
        """Plain data for a state."""
        return {"epoch_loss": {"total": float(self._total), "updates": self.updates}}

    def load_state(self, values: Mapping[str, Any]) -> None:
        """Continue from a state; those of earlier versions hold it beside the best value."""
        stored = values.get("epoch_loss") or values.get("best") or {}
        self._total += stored.get("total", 0.0)
        self.updates = stored.get("updates", 0)
