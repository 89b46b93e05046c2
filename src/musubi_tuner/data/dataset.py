"""Cache files as micro-batches. Every tensor is read into memory of its own, never mapped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import Dataset

from musubi_tuner.caching.file_format import TensorEntry, split_caption
from musubi_tuner.caching.index import CachedFile, open_items
from musubi_tuner.config import RunConfig
from musubi_tuner.data.plan import MicroBatch, PlanItem
from musubi_tuner.data.sources import Item
from musubi_tuner.errors import CacheError
from musubi_tuner.randomness import uniform


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        latents: [B, C, H, W] float32. tensors: everything else by plain name, stacked.
        valid: name -> [B] boolean, false where an item has no such tensor (its row is zero).
        items: ids, for messages. presentations: running numbers in the epoch, the key of random draws.
    """

    latents: Tensor
    tensors: dict[str, Tensor]
    valid: dict[str, Tensor]
    items: list[str]
    presentations: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            move(self.latents),
            {name: move(tensor) for name, tensor in self.tensors.items()},
            {name: move(tensor) for name, tensor in self.valid.items()},
            self.items,
            self.presentations,
        )


class CachedDataset(Dataset[Batch]):
    """Reads micro-batches from cache files.

    Args:
        items: of all datasets; code: architecture code of the files.

    Raises:
        CacheError: if files are missing or broken, or latents have another size than their bucket.
    """

    def __init__(self, config: RunConfig, items: Sequence[Item], kinds: list[str]) -> None:
        roots = {str(index): dataset.cache_directory for index, dataset in enumerate(config.datasets)}
        self.items, self.seed = list(items), config.run.seed
        self.files: list[dict[str, CachedFile]] = open_items(self.items, roots, kinds, config.spec.code)
        self._check_sizes(config.spec.vae_factor, config.spec.latent_channels, masked=config.train.masked_loss)
        self._check_captions()

    def _check_sizes(self, factor: int, channels: int, masked: bool) -> None:
        wrong = []
        for item, files in zip(self.items, self.files):
            width, height = item.bucket
            expected = (channels, height // factor, width // factor)
            entry = files["latents"].tensors.get("latents")
            if entry is None:
                wrong.append(f"{item.id}: {files['latents'].path.name} holds no latents")
            elif entry.shape != expected:
                wrong.append(f"{item.id}: latents {list(entry.shape)}, this run needs {list(expected)}")
            elif masked:
                mask = files["latents"].tensors.get("mask_weights")
                if (mask.shape if mask else None) != (expected[1:] if item.mask else None):
                    wrong.append(f"{item.id}: {files['latents'].path.name} holds {'another' if mask else 'no'} mask")
        if wrong:
            shown = wrong[:10] + ([f"... and {len(wrong) - 10} more"] if len(wrong) > 10 else [])
            raise CacheError(
                "latents were cached with other settings; run the latents job again\n  " + "\n  ".join(shown)
            )

    def _check_captions(self) -> None:
        """Files of text and experts must hold what belongs to every caption."""
        wrong = []
        for item, files in zip(self.items, self.files):
            for file in files.values():
                held = 1 + max((split_caption(name)[1] for name in file.tensors), default=0)
                if held != len(item.captions) and file is not files.get("latents"):
                    wrong.append(
                        f"{item.id}: {file.path.name} is of {held} captions, the data has {len(item.captions)}"
                    )
        if wrong:
            shown = wrong[:10] + ([f"... and {len(wrong) - 10} more"] if len(wrong) > 10 else [])
            raise CacheError("caches are of other captions; run the cache jobs again\n  " + "\n  ".join(shown))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the first item and its first caption, by plain name."""
        return {
            name: entry.shape
            for file in self.files[0].values()
            for name, entry in file.tensors.items()
            if not split_caption(name)[1]
        }

    def plan_items(self) -> list[PlanItem]:
        """What `plan_epoch` needs to know."""
        return [PlanItem(item.key, item.bucket, item.num_repeats, item.batch_size) for item in self.items]

    def __getitem__(self, batch: MicroBatch) -> Batch:
        return self.read(batch, epoch=0)

    def read(self, batch: MicroBatch, epoch: int) -> Batch:
        """A micro-batch; the epoch keys the draw of the caption of an item that has several."""
        rows = [
            self._read(index, self.caption_of(index, epoch, presentation))
            for index, presentation in zip(batch.items, batch.presentations, strict=True)
        ]
        names = sorted({name for row in rows for name in row} - {"latents"})
        tensors, valid = {}, {}
        for name in names:
            like = next(row[name] for row in rows if name in row)
            for index, row in zip(batch.items, rows):
                if name in row and row[name].shape != like.shape:
                    raise CacheError(
                        f"{self.items[index].id}: its {name} is {list(row[name].shape)}, others of its batch have "
                        f"{list(like.shape)}; the caches were made with different settings, run the cache jobs again"
                    )
            tensors[name] = torch.stack([row.get(name, torch.zeros_like(like)) for row in rows])
            valid[name] = torch.tensor([name in row for row in rows])
        return Batch(
            torch.stack([row["latents"] for row in rows]).float(),
            tensors,
            valid,
            [self.items[index].id for index in batch.items],
            batch.presentations,
        )

    def __len__(self) -> int:
        return len(self.items)

    def caption_of(self, index: int, epoch: int, presentation: int) -> int:
        """Which caption of an item a presentation takes: one draw for text and teacher features alike."""
        count = len(self.items[index].captions)
        return 0 if count == 1 else int(count * uniform(self.seed, "caption", epoch, presentation))

    def _read(self, index: int, caption: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        several = len(self.items[index].captions) > 1
        for cached in self.files[index].values():
            chosen = _of_caption(cached.tensors, caption) if several else cached.tensors
            try:
                with cached.path.open("rb") as file:
                    for name, entry in chosen.items():
                        tensors[name] = read_tensor(file, entry)
            except (OSError, EOFError) as error:
                raise CacheError(f"{cached.path}: changed or removed while training ({error})") from error
        return tensors


def _of_caption(tensors: Mapping[str, TensorEntry], caption: int) -> dict[str, TensorEntry]:
    """The tensors of one caption by their plain names, with those that all captions share."""
    split = {name: split_caption(name) for name in tensors}
    own = {plain for plain, number in split.values() if number}
    return {
        plain: tensors[name] for name, (plain, number) in split.items() if number == (caption if plain in own else 0)
    }


def read_tensor(file: BinaryIO, entry: TensorEntry) -> Tensor:
    """Read one tensor of a cache file into fresh memory.

    Raises:
        EOFError: if the file is shorter than its entry says.
    """
    tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    size = entry.end - entry.start
    if size:
        file.seek(entry.start)
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers
        if file.readinto(view) != size:  # type: ignore[attr-defined]  # buffered readers have readinto
            raise EOFError("file is too short")
    return tensor


class PlannedBatches(Dataset[Any]):
    """The batches of one rank's share of an epoch, by position; what loader workers iterate over."""

    def __init__(self, dataset: CachedDataset, batches: Sequence[MicroBatch], epoch: int) -> None:
        self.dataset, self.batches, self.epoch = dataset, list(batches), epoch

    def __getitem__(self, position: int) -> Batch:
        return self.dataset.read(self.batches[position], self.epoch)

    def __len__(self) -> int:
        return len(self.batches)
