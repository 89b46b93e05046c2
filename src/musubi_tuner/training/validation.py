"""The loss on images that are never trained.

Every image is measured at the same noise levels with the same noise each time, in evaluation mode, with its text and
without features of teachers, as pictures are drawn; so two values differ by the weights alone. Noise is keyed (seed, "validation", item), times are the
middles of equal slices of [0, 1]; the loss is weighted as in training.

    loss/val                       mean of the main loss over images and times
    loss/val_sigma_<noise level>   its mean at one time

Batches are a fixed partition of the images, dealt to the processes in turn; each fills its rows of one table, which is
summed and averaged in one order, so that any number of processes gives the same number. No global random state is
touched.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from musubi_tuner.caching.reader import CachedDataset
from musubi_tuner.config.schema.validation import ValidationSection
from musubi_tuner.data.item import Item
from musubi_tuner.data.plan import MicroBatch
from musubi_tuner.models.family import Process
from musubi_tuner.precision import autocast
from musubi_tuner.randomness import normal
from musubi_tuner.training.sampling import evaluating
from musubi_tuner.training.task import Draws, losses_at

METRIC = "loss/val"
KEEP = 1 - 2.0**-24
"""The largest uniform draw: it drops nothing but what is always dropped."""


def time_grid(count: int) -> list[float]:
    """Middles of ``count`` equal slices of [0, 1]; as noise levels they are the same in either direction of time."""
    return [(index + 0.5) / count for index in range(count)]


def validation_batches(items: Sequence[Item]) -> list[MicroBatch]:
    """A fixed partition: images of one bucket and batch size together, in the order of their keys."""
    groups: dict[tuple[tuple[int, int], int], list[int]] = {}
    for position in sorted(range(len(items)), key=lambda i: items[i].key):
        groups.setdefault((items[position].bucket, items[position].batch_size), []).append(position)
    return [
        MicroBatch(part, part)
        for (_, size), members in sorted(groups.items())
        for part in (tuple(members[start : start + size]) for start in range(0, len(members), size))
    ]


class Validator:
    """Measures a model on the held-out images of a run.

    Args:
        dataset: of the images that are measured. rank, processes: this process among all.
        hidden: cached tensors that count as missing: features of teachers.
        compute_dtype: of the model's products; None = that of its weights.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        process: Process,
        settings: ValidationSection,
        *,
        device: torch.device,
        compute_dtype: torch.dtype | None,
        rank: int = 0,
        processes: int = 1,
        hidden: Sequence[str] = (),
    ) -> None:
        self.dataset, self.process, self.settings = dataset, process, settings
        self.device, self.compute_dtype = device, compute_dtype
        self.processes, self.hidden = processes, hidden
        self.times = time_grid(settings.times)
        self.batches = validation_batches(dataset.items)[rank::processes]
        sigmas = process.sigma(torch.tensor(self.times, dtype=torch.float64)).tolist()
        self.tags = [f"{METRIC}_sigma_{sigma:.3f}" for sigma in sigmas]

    @torch.no_grad()
    def measure(self, model: nn.Module, update: int) -> dict[str, float]:
        """Values by tag, the noise levels ascending; equal on all processes, which must call this together.

        Args:
            model: without wrappers of data parallelism. update: optimizer steps done.
        """
        table = torch.zeros(len(self.dataset), len(self.times), dtype=torch.float64)
        with evaluating(model):
            for planned in self.batches:
                table[list(planned.items)] = self._rows(model, planned, update)
        if self.processes > 1:
            table = self._summed(table)
        means = table.mean(dim=0).tolist()
        bins = dict(sorted(zip(self.tags, means)))
        return {METRIC: float(table.mean()), **bins}

    def _rows(self, model: nn.Module, planned: MicroBatch, update: int) -> Tensor:
        """Main loss of every image of a batch at every time, [B, times] float64 on the CPU."""
        batch = self.dataset[planned].to(self.device)
        hidden = {name: torch.zeros_like(batch.valid[name]) for name in self.hidden if name in batch.valid}
        batch = replace(batch, valid={**batch.valid, **hidden})
        shape, count = tuple(batch.tensors["latents"].shape[1:]), len(planned)
        noise = torch.stack([normal(shape, self.settings.seed, "validation", item) for item in batch.items])
        keep = {name: torch.full((count,), KEEP) for name in self.process.uniforms}
        columns = []
        for value in self.times:
            time = torch.full((count,), value)
            draws = Draws(noise, time, keep).to(self.device)
            with autocast(self.device, self.compute_dtype):
                terms = losses_at(model, self.process, batch, draws, draws.time, update)
            columns.append(terms["main"].per_sample_B)
        return torch.stack(columns, dim=1).cpu().double()

    def _summed(self, table: Tensor) -> Tensor:
        """The table with the rows of all processes; each row is filled by one of them."""
        shared = table.to(self.device)
        torch.distributed.all_reduce(shared)
        return shared.cpu()
