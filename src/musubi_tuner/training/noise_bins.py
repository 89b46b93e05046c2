"""The training loss by noise level.

    loss/sigma_<noise level>    mean of the main loss over the samples since the last line whose noise level lies in one of
                                the equal slices of [0, 1]; named by the middle of the slice, as loss/val_sigma_ is

Sums and numbers of samples stay on the device until a line is written. Each process counts its own samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from musubi_tuner.training.metrics import SIGMA
from musubi_tuner.training.validation import time_grid


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
