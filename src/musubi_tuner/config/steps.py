"""How many updates a run makes. Torch-free; works on real bucket counts, not on images divided by batch."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from musubi_tuner.errors import ConfigError


@dataclass(frozen=True)
class Steps:
    """Length of a run.

    Attributes:
        micro_batches: per epoch, over all processes.
        updates_per_epoch: the last one may have fewer micro-batches.
        total_updates: of the whole run.
        epochs: begun during the run.
        images_per_epoch: presentations, repeats included.
    """

    micro_batches: int
    updates_per_epoch: int
    total_updates: int
    epochs: int
    images_per_epoch: int


def calculate_steps(
    buckets: Iterable[tuple[int, int]],
    *,
    num_processes: int = 1,
    grad_accum_steps: int = 1,
    max_steps: int | None = None,
    max_epochs: int | None = None,
) -> Steps:
    """Count updates.

    Args:
        buckets: (presentations, micro-batch size) of every bucket.
        num_processes, grad_accum_steps: an update is their product of consecutive micro-batches.
        max_steps, max_epochs: whichever ends first; at least one is given.

    Raises:
        ConfigError: if there is nothing to train on, or no budget.
    """
    counted = list(buckets)
    images = sum(count for count, _ in counted)
    micro_batches = sum(ceil(count / size) for count, size in counted)
    if micro_batches == 0:
        raise ConfigError("there is nothing to train on: no dataset has a usable image")
    per_update = num_processes * grad_accum_steps
    updates = ceil(micro_batches / per_update)
    limits = [limit for limit in (max_steps, max_epochs and max_epochs * updates) if limit is not None]
    if not limits:
        raise ConfigError("train.max_steps or train.max_epochs is required")
    total = min(limits)
    return Steps(micro_batches, updates, total, ceil(total / updates), images)
