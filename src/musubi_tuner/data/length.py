"""How many updates a run comes to on the pictures that it has. Torch-free."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from musubi_tuner.config import RunConfig, Steps, calculate_steps
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import tally


def steps_on(config: RunConfig, items: Sequence[Item], processes: int) -> Steps:
    """The length of a run on these pictures; each bucket fills micro-batches of its own."""
    counts = Counter[tuple[Any, int]]()
    for item, count in tally(items):
        counts[item.bucket, item.batch_size] += count * item.num_repeats
    return calculate_steps(
        [(count, size) for (_, size), count in counts.items()],
        num_processes=processes,
        grad_accum_steps=config.train.grad_accum_steps,
        max_steps=config.train.max_steps,
        max_epochs=config.train.max_epochs,
    )


def sources_of(items: Sequence[Item]) -> list[tuple[int, int, int]]:
    """How many pictures have which number of repeats and batch size, for `sentence`."""
    counts = Counter[tuple[int, int]]()
    for item, count in tally(items):
        counts[item.num_repeats, item.batch_size] += count
    return [(count, repeats, size) for (repeats, size), count in sorted(counts.items())]
