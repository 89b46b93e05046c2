"""How many updates a run makes. Torch-free; works on real bucket counts, not on images divided by batch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from musubi_tuner.errors import ConfigError


@dataclass(frozen=True)
class Steps:
    """Length of a run, with every number on the way to it.

    Attributes:
        micro_batches: per epoch, over all processes.
        updates_per_epoch: the last one may have fewer micro-batches.
        total_updates: of the whole run.
        epochs: begun during the run.
        images_per_epoch: presentations, repeats included.
        per_update: micro-batches of an update: processes times accumulation.
        short_batches: micro-batches of an epoch that are not full, because a bucket ends in them.
        short_update: whether the last update of an epoch has fewer micro-batches than the others.
        budget: which setting ends the run, max_steps or max_epochs.
    """

    micro_batches: int
    updates_per_epoch: int
    total_updates: int
    epochs: int
    images_per_epoch: int
    per_update: int = 1
    short_batches: int = 0
    short_update: bool = False
    budget: str = "max_epochs"

    def as_data(self) -> dict[str, Any]:
        """All numbers by name."""
        return {
            **vars(self),
            "images_seen": self.images_per_epoch * self.total_updates // max(1, self.updates_per_epoch),
        }


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
        raise ConfigError("there is nothing to train on: no data set has a usable image")
    per_update = num_processes * grad_accum_steps
    updates = ceil(micro_batches / per_update)
    limits = {"max_steps": max_steps, "max_epochs": max_epochs and max_epochs * updates}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if not given:
        raise ConfigError("train.max_steps or train.max_epochs is required")
    budget = min(given, key=lambda name: given[name])
    total = given[budget]
    short = sum(count % size != 0 for count, size in counted)
    return Steps(
        micro_batches,
        updates,
        total,
        ceil(total / updates),
        images,
        per_update,
        short,
        micro_batches % per_update != 0,
        budget,
    )


def sentence(steps: Steps, sources: Sequence[tuple[int, int, int]]) -> str:
    """How the number of updates is calculated, in words: "50 images x 10 repeats x 5 epochs / 2 = 1,250 steps".

    Args:
        sources: images, repeats and micro-batch size of each data set; those of equal repeats and size count together.
    """
    groups: dict[tuple[int, int], int] = {}
    for images, repeats, size in sources:
        groups[repeats, size] = groups.get((repeats, size), 0) + images
    parts, exact = [], 0.0
    for (repeats, size), images in groups.items():
        words = f"{images:,} image{'s' if images != 1 else ''}" + (f" x {repeats} repeats" if repeats > 1 else "")
        parts.append(words + (f" / {size}" if size > 1 else ""))
        exact += images * repeats / size
    divisor = f" / {steps.per_update} micro-batches per update" if steps.per_update > 1 else ""
    if steps.budget == "max_steps":
        length = f"{steps.total_updates:,} steps are {steps.total_updates / steps.updates_per_epoch:.3g} epochs of {steps.updates_per_epoch:,}"
        return f"{' + '.join(parts)}{divisor} = {steps.updates_per_epoch:,} steps per epoch{_more(steps, exact, 1)}; {length}"
    whole = " + ".join(parts) if len(parts) == 1 else f"({' + '.join(parts)})"
    if len(groups) == 1:  # the division behind the epochs, as one would say it
        ((_, size),) = groups
        whole = parts[0].removesuffix(f" / {size}")
        divisor = (f" / {size}" if size > 1 else "") + divisor
    epochs = f" x {steps.epochs} epoch{'s' if steps.epochs != 1 else ''}"
    return f"{whole}{epochs}{divisor} = {steps.total_updates:,} steps{_more(steps, exact, steps.epochs)}"


def _more(steps: Steps, exact: float, epochs: int) -> str:
    """Why there are more updates than the division gives."""
    more = steps.updates_per_epoch * epochs - int(exact * epochs / steps.per_update)
    if more <= 0:
        return ""
    buckets = f"{steps.short_batches} bucket{'s' if steps.short_batches != 1 else ''} end{'s' if steps.short_batches == 1 else ''}"
    reasons = [f"{buckets} in a short batch"] if steps.short_batches else []
    reasons += ["the last update of an epoch is shorter"] if steps.short_update else []
    return f" ({more} of them because {' and '.join(reasons)})" if reasons else ""
