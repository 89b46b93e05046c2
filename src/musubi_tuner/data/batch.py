"""Micro-batches, and a rank's share of an epoch as an iterator over them, read ahead by loader workers if there are any."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from musubi_tuner.data.plan import MicroBatch, PlanGroups, PlanItem
from musubi_tuner.data.workers import to_shared_memory
from musubi_tuner.errors import UserError
from musubi_tuner.stopping import signals_blocked


@dataclass
class Batch:
    """One micro-batch of B samples.

    Attributes:
        tensors: by plain name, stacked, [B, ...]; which there are depends on where they come from.
        valid: name -> [B] boolean, false where an item has no such tensor (its row is zero).
        items: ids, for messages.
        presentations: running numbers in the epoch, the key of random draws.
        dataset_ids: number of the dataset that each item is from, [B] int64.
        place: of a stream, who read it and how far that is; see `Source`.
    """

    tensors: dict[str, Tensor]
    valid: dict[str, Tensor]
    items: list[str]
    presentations: tuple[int, ...]
    dataset_ids: Tensor
    place: tuple[str, Any] | None = None

    def all_tensors(self) -> list[Tensor]:
        """Every tensor in it."""
        return [self.dataset_ids, *self.tensors.values(), *self.valid.values()]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; copies may still be on their way."""
        if device.type == "cpu":
            return self

        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        ids = self.dataset_ids.to(device, non_blocking=True)
        return Batch(move(self.tensors), move(self.valid), self.items, self.presentations, ids, self.place)


class Source(Protocol):
    """Where the micro-batches of a run come from: caches, live pictures, or a stream."""

    @property
    def places(self) -> dict[str, Any] | None:
        """How far a stream is read, by reader, in plain values: part of the state, and set again when a run continues. None for
        what is not a stream."""

    def plan_items(self) -> Sequence[PlanItem] | PlanGroups:
        """What `plan_epoch` needs to know of them."""

    def first(self, count: int) -> list[Tensor]:
        """Pictures [3, H, W] or latents [C, h, w] of up to so many items of the largest bucket; always the same."""

    def read(self, batch: MicroBatch, epoch: int) -> Batch:
        """A micro-batch of tensors in memory of their own; the same whenever and wherever it is read.

        Args:
            epoch: keys what is drawn per presentation.

        Raises:
            UserError: if a file is missing or broken.
        """


class PlannedBatches(Dataset[Any]):
    """The batches of one rank's share of an epoch, by position; what loader workers iterate over."""

    def __init__(self, source: Source, batches: Sequence[MicroBatch], epoch: int) -> None:
        self.source, self.batches, self.epoch = source, list(batches), epoch

    def __getitem__(self, position: int) -> Batch | UserError:
        """A batch, or what a user can mend about it: raised in a worker, it would come back inside a traceback."""
        try:
            return self.source.read(self.batches[position], self.epoch)
        except UserError as error:
            return error

    def __len__(self) -> int:
        return len(self.batches)


def raise_errors(batches: Iterable[Batch | UserError]) -> Iterator[Batch]:
    """The batches of `PlannedBatches`.

    Raises:
        UserError: in the place of a batch that could not be read.
    """
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def load_batches(source: Source, batches: Sequence[MicroBatch], epoch: int, workers: int) -> Iterator[Batch]:
    """Batches in order.

    Args:
        workers: processes that read ahead; 0 reads each batch when it is asked for.
    """
    planned = PlannedBatches(source, batches, epoch)
    if workers == 0:
        return _noted(source, raise_errors(planned[position] for position in range(len(planned))))
    loader: DataLoader[Batch | UserError] = DataLoader(
        planned,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        multiprocessing_context="spawn",
        collate_fn=to_shared_memory,  # type: ignore[arg-type]  # of one batch, because batch_size is None
    )
    with signals_blocked():
        return _noted(source, raise_errors(iter(loader)))


def _noted(source: Source, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches; how far their readers were is noted in the source of this process."""
    for batch in batches:
        if batch.place is not None and source.places is not None:
            source.places[batch.place[0]] = batch.place[1]
        yield batch
