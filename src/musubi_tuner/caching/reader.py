"""Cache files as micro-batches. Every tensor is read into memory of its own, never mapped."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

from musubi_tuner.caching.file_format import TIMES, split_caption
from musubi_tuner.caching.index import CachedFile, open_items
from musubi_tuner.caching.status import wants
from musubi_tuner.config import RunConfig
from musubi_tuner.config.captions import CaptionSettings
from musubi_tuner.data.batch import Batch
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import ItemTable, forget, tally
from musubi_tuner.data.pixels import first_of_largest
from musubi_tuner.data.plan import MicroBatch, PlanGroups, PlanItem, caption_of, number_of_view
from musubi_tuner.errors import CacheError
from musubi_tuner.headers import TensorEntry


class CachedDataset:
    """Reads micro-batches from cache files.

    Args:
        items: of all datasets. kinds: of cache that are opened, for the datasets that want them. texts: of the data sets, if
            they are not the config's. dropping: leave captions out as the data sets say.

    Raises:
        CacheError: if files are missing or broken, or latents have another size than their bucket.
    """

    def __init__(
        self,
        config: RunConfig,
        items: Sequence[Item],
        kinds: list[str],
        *,
        texts: Sequence[CaptionSettings] = (),
        dropping: bool = True,
    ) -> None:
        roots = [dataset.cache_directory for dataset in config.datasets]
        wanted = [[kind for kind in kinds if wants(config, dataset, kind)] for dataset in config.datasets]
        self.items, self.seed = items, config.run.seed
        self.places: dict[str, Any] | None = None
        self.texts, self.dropping = texts or [dataset.text for dataset in config.datasets], dropping
        self.of_epoch = sum(count * item.num_repeats for item, count in tally(items))
        self.roots, self.code = roots, config.spec.code
        self.files: Sequence[dict[str, CachedFile]] = open_items(
            items, roots, wanted, self.code, _without_teachers(config)
        )
        self.tables = {*config.spec.expert_keys, TIMES}
        self.substitutes: dict[str, Tensor] = {}
        self._check_times(config.spec.expert_keys)
        self._check_sizes(config.latents.factor, config.latents.channels, masked=config.train.masked_loss)
        self._check_captions()
        if config.get("objective.missing_teacher") == "zeros":
            self._fill_in_zeros()

    def _examples(self) -> Iterator[tuple[Item, dict[str, CachedFile]]]:
        """Items with their files; of those that are alike in all that is checked here, one."""
        if isinstance(self.items, ItemTable):
            yield from ((self.items[row], self.files[row]) for row, _ in self.items.examples)
        else:
            yield from zip(self.items, self.files, strict=True)

    def _fill_in_zeros(self) -> None:
        """Give items without the table of a teacher that others have one of zeros."""
        for _, files in self._examples():
            for name, entry in files["experts"].tensors.items() if "experts" in files else ():
                plain = split_caption(name)[0]
                if plain in self.tables and plain not in self.substitutes:
                    self.substitutes[plain] = torch.zeros(entry.shape, dtype=getattr(torch, entry.dtype))

    def _check_times(self, keys: Sequence[str]) -> None:
        """Tables of teachers must have an entry for every time of their file."""
        wrong = []
        for item, files in self._examples():
            entries = files["experts"].tensors if "experts" in files else {}
            times = entries[TIMES].shape if TIMES in entries else ()
            for name, entry in entries.items():
                if split_caption(name)[0] in keys and entry.shape[:1] != times:
                    wrong.append(f"{item.id}: {name} is {list(entry.shape)}, {TIMES} is {list(times) or 'missing'}")
        _refuse("features of teachers do not fit their times; run the experts job again", wrong)

    def _check_sizes(self, factor: int, channels: int, masked: bool) -> None:
        wrong = []
        for item, files in self._examples():
            width, height = item.bucket
            expected = (channels, height // factor, width // factor)
            entry = files["latents"].tensors.get("latents")
            if entry is None:
                wrong.append(f"{item.id}: {files['latents'].path.name} holds no latents")
            elif entry.shape != expected:
                wrong.append(f"{item.id}: latents {list(entry.shape)}, this run needs {list(expected)}")
            elif (
                held := len({split_caption(name)[1] for name in files["latents"].tensors if name.startswith("latents")})
            ) != max(1, len(item.views)):
                wrong.append(
                    f"{item.id}: {files['latents'].path.name} is of {held} versions, the data wants {max(1, len(item.views))}"
                )
            elif masked:
                mask = files["latents"].tensors.get("mask_weights")
                if (mask.shape if mask else None) != (expected[1:] if item.mask else None):
                    wrong.append(f"{item.id}: {files['latents'].path.name} holds {'another' if mask else 'no'} mask")
        _refuse("latents were cached with other settings; run the latents job again", wrong)

    def _check_captions(self) -> None:
        """Files of text and experts must hold what belongs to every caption."""
        wrong = []
        for item, files in self._examples():
            for file in files.values():
                held = 1 + max((split_caption(name)[1] for name in file.tensors), default=0)
                if held != len(item.captions) and file is not files.get("latents"):
                    wrong.append(
                        f"{item.id}: {file.path.name} is of {held} captions, the data has {len(item.captions)}"
                    )
        _refuse("caches are of other captions; run the cache jobs again", wrong)

    def shapes(self) -> list[tuple[int, dict[str, tuple[int, ...]]]]:
        """The shapes that occur, each once: number of a dataset, and shape of every tensor of a first caption by plain name."""
        found = set()
        for item, files in self._examples():
            entries = [
                pair for file in files.values() for pair in file.tensors.items() if not split_caption(pair[0])[1]
            ]
            found.add((item.dataset, tuple((name, entry.shape) for name, entry in entries)))
        return [(number, dict(shapes)) for number, shapes in sorted(found)]

    def plan_items(self) -> Sequence[PlanItem] | PlanGroups:
        """What `plan_epoch` needs to know."""
        if isinstance(self.items, ItemTable):
            kinds = self.items.kinds
            alike = [PlanItem("", kind.bucket, kind.num_repeats, kind.batch_size) for kind in kinds]
            return PlanGroups(alike, self.items.kind.tolist())
        return [PlanItem(item.key, item.bucket, item.num_repeats, item.batch_size) for item in self.items]

    def first(self, count: int) -> list[Tensor]:
        """See `Source`."""
        return [self._read(number, 0, 0)["latents"].float() for number in first_of_largest(self.items, count)]

    def __getitem__(self, batch: MicroBatch) -> Batch:
        return self.read(batch, epoch=0)

    def read(self, batch: MicroBatch, epoch: int) -> Batch:
        """A micro-batch; the epoch keys the draw of the caption of an item that has several."""
        rows = [
            self._read(
                index,
                self._caption(self.items[index], epoch, presentation),
                self._view(self.items[index], epoch, presentation),
            )
            for index, presentation in zip(batch.items, batch.presentations, strict=True)
        ]
        for row in rows:
            for name, zeros in self.substitutes.items():
                row.setdefault(name, zeros[: len(row.get(TIMES, zeros))])
        for row in rows:
            row["latents"] = row["latents"].float()
        names = sorted({name for row in rows for name in row})
        tensors, valid = {}, {}
        times = max(len(row.get(TIMES, ())) for row in rows)
        for name in names:
            given = [row.get(name) for row in rows]
            if name in self.tables:
                given = [None if table is None else _lengthened(table, times, name) for table in given]
            like = next(tensor for tensor in given if tensor is not None)
            for index, tensor in zip(batch.items, given):
                if tensor is not None and tensor.shape != like.shape:
                    raise CacheError(
                        f"{self.items[index].id}: its {name} is {list(tensor.shape)}, others of its batch have "
                        f"{list(like.shape)}; the caches were made with different settings, run the cache jobs again"
                    )
            tensors[name] = torch.stack([torch.zeros_like(like) if tensor is None else tensor for tensor in given])
            valid[name] = torch.tensor([tensor is not None for tensor in given])
        return Batch(
            tensors,
            valid,
            [self.items[index].id for index in batch.items],
            batch.presentations,
            torch.tensor([self.items[index].dataset for index in batch.items]),
        )

    def _caption(self, item: Item, epoch: int, presentation: int) -> int:
        """Number of the caption that a presentation takes."""
        text = self.texts[item.dataset]
        return caption_of(
            len(item.captions), self.seed, epoch, presentation, text, of_epoch=self.of_epoch, dropping=self.dropping
        )

    def _view(self, item: Item, epoch: int, presentation: int) -> int:
        """Number of the version of its picture that a presentation takes; the first one where nothing is drawn."""
        return number_of_view(len(item.views), self.seed, epoch, presentation) if self.dropping else 0

    def __len__(self) -> int:
        return len(self.items)

    def _read(self, index: int, caption: int, view: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        item = self.items[index]
        for kind, cached in self.files[index].items():
            number, several = (view, len(item.views) > 1) if kind == "latents" else (caption, len(item.captions) > 1)
            chosen = _of_caption(cached.tensors, number) if several else cached.tensors
            try:
                with cached.path.open("rb") as file:
                    if not cached.is_still(file):
                        forget(self.roots[item.dataset], self.code)
                        raise CacheError(
                            f"{cached.path}: was overwritten after its header was read; start the run again (with --fresh if its contents "
                            "changed)"
                        )
                    for name, entry in chosen.items():
                        tensors[name] = read_tensor(file, entry)
            except (OSError, EOFError) as error:
                raise CacheError(f"{cached.path}: changed or removed while training ({error})") from error
        return tensors


def _without_teachers(config: RunConfig) -> list[set[str]]:
    """Tensors of teachers that a dataset has not, or has no longer, by dataset."""
    keys = config.spec.expert_keys
    return [
        {name for name in keys if name.partition("_")[0] not in config.experts_of(dataset).teachers}
        for dataset in config.datasets
    ]


def _refuse(head: str, wrong: list[str]) -> None:
    """Stop if something is wrong, and show the first ten.

    Raises:
        CacheError: with the head as its first line.
    """
    if wrong:
        shown = wrong[:10] + ([f"... and {len(wrong) - 10} more"] if len(wrong) > 10 else [])
        raise CacheError("\n  ".join([head, *shown]))


def _lengthened(table: Tensor, length: int, name: str) -> Tensor:
    """A table [T, ...] with as many entries as the longest of its batch; `linear_lookup` ignores those at infinite times."""
    rest = table.new_full((length - len(table), *table.shape[1:]), math.inf if name == TIMES else 0)
    return torch.cat([table, rest]) if len(rest) else table


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
