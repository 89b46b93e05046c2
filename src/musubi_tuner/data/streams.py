"""Live pictures from shards, as they come: whole shards are dealt to the loader workers of all ranks.

    shards, shuffled for every pass -> those of this worker -> a buffer that shuffles samples -> one pile for every bucket -> micro-batches

How far every worker is goes into the state. What waited in buffers and piles is left out when a run continues, and batches depend on the
number of workers, so it goes on well and not bit for bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import get_worker_info

from musubi_tuner.config.captions import CaptionSettings
from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.batch import Batch
from musubi_tuner.data.buckets import Placement, Size
from musubi_tuner.data.caption_files import WAY_OUT
from musubi_tuner.data.caption_variants import variants
from musubi_tuner.data.images import Memory, open_image
from musubi_tuner.data.item import Item
from musubi_tuner.data.pixels import PixelSource, Tokenize, to_pixels, view_of
from musubi_tuner.data.plan import MicroBatch, PlanItem
from musubi_tuner.data.shards import Sample, list_shards, read_shard
from musubi_tuner.data.sources import placement_of, selector_of
from musubi_tuner.data.views import View, views
from musubi_tuner.errors import DataError
from musubi_tuner.randomness import keyed_random

BUFFER = 100
"""Samples from which the next one is drawn."""
MOST_BAD = 100
"""Samples in a row that are left out before it is an error."""

Place = tuple[int, int, int]
"""Pass over all shards, shard of this worker in that pass, samples read of it."""


@dataclass
class _Picture:
    """A sample that has a bucket."""

    name: str
    captions: tuple[str, ...]
    pixels: Tensor
    placement: Placement
    views: tuple[View, ...]
    data: bytes


def caption_of_sample(sample: Sample, dataset: DatasetConfig) -> str | None:
    """The caption of a sample, as the data set wants it; None if it is to be left out.

    Raises:
        DataError: if it has none, and that is an error.
    """
    settings, missing = dataset.stream, dataset.missing_caption
    caption = sample.caption or dataset.text.class_tokens or None
    if caption is not None or settings is None or missing == "skip":
        return caption
    if missing == "empty":
        return ""
    if missing == "stem":
        return sample.key.rpartition("/")[2].replace("_", " ").replace("-", " ")
    keys = f"shard_label_key {settings.shard_label_key!r}, shard_caption_key {settings.shard_caption_key!r}"
    if settings.dataset_name is not None:
        keys = f"caption_column {settings.caption_column!r}"
    raise DataError(f"{sample.name}: has no caption ({keys}); name where captions are, or {WAY_OUT}")


class StreamSource(PixelSource):
    """Micro-batches from shards; see the module.

    Args:
        item: that stands for all pictures of the stream. dataset: its data set, with ``stream``.
        rank, ranks: of this process, and how many there are. workers: loader workers of each, 0 = none.

    Attributes:
        places: how far the worker ``number/count`` is, counted over all ranks; see `Place`.

    Raises:
        DataError: if there are fewer shards than workers.
    """

    def __init__(
        self,
        item: Item,
        dataset: DatasetConfig,
        seed: int,
        tokenize: Tokenize | None = None,
        texts: Sequence[CaptionSettings] = (),
        *,
        architecture: str,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
    ) -> None:
        super().__init__([item], seed, tokenize, texts)
        assert dataset.stream is not None
        self.dataset, self.settings, self.rank = dataset, dataset.stream, rank
        self.shards, self.readers = list_shards(dataset.stream), ranks * max(1, workers)
        self.selector = selector_of(dataset, architecture)
        self._places: dict[str, Place] = {}
        self.places = self._places
        self._piles: dict[Size, list[_Picture]] = {}
        self._feed: Iterator[_Picture] | None = None
        if len(self.shards) < self.readers:
            raise DataError(
                f"{dataset.name}: {len(self.shards)} shards are too few for {self.readers} readers ({ranks} processes x {max(1, workers)} loader "
                "workers), each of which reads whole shards; lower train.loader_workers or the number of processes, or cut the shards smaller"
            )

    def plan_items(self) -> list[PlanItem]:
        """See `Source`; the bucket of a micro-batch is that of the pictures that fill it."""
        return [PlanItem(item.key, "stream", item.num_repeats, item.batch_size) for item in self.items]

    def first(self, count: int) -> list[Tensor]:
        """See `Source`: of the first shards, in their own order."""
        piles: dict[Size, list[Tensor]] = {}
        for found in self._pictures(sample for shard in self.shards for sample in read_shard(shard, self.settings)):
            pile = piles.setdefault(found.placement.bucket, [])
            pile.append(found.pixels)
            if len(pile) == count:
                return pile
        return max(piles.values(), key=len, default=[])

    def read(self, batch: MicroBatch, epoch: int) -> Batch:
        """See `Source`; but micro-batches come in the order in which they are read."""
        worker = get_worker_info()
        number = self.rank * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        key = f"{number}/{self.readers}"
        if self._feed is None:
            self._feed = self._pictures(self._samples(key, number))
        while not (pile := self._full(len(batch))):
            picture = next(self._feed)
            self._piles.setdefault(picture.placement.bucket, []).append(picture)
        taken = [pile.pop(0) for _ in range(len(batch))]
        pixels = []
        for picture, presentation in zip(taken, batch.presentations, strict=True):
            view = view_of(picture.views, self.seed, epoch, presentation)
            pixels.append(picture.pixels if view is None else self._seen(picture, view))
        made = self._batch(pixels, [(p.name, self.items[0].dataset, p.captions) for p in taken], batch, epoch)
        made.place = (key, self._places[key])
        return made

    def _full(self, count: int) -> list[_Picture]:
        """A pile of at least so many; empty if there is none."""
        return next((pile for pile in self._piles.values() if len(pile) >= count), [])

    def _pictures(self, samples: Iterator[Sample]) -> Iterator[_Picture]:
        """What can be trained of the samples.

        Raises:
            DataError: after many in a row that cannot be, or for one without a caption where that is an error.
        """
        bad, reason = 0, ""
        for sample in samples:
            found = self._picture(sample)
            if not isinstance(found, str):
                bad = 0
                yield found
                continue
            bad, reason = bad + 1, found
            if bad == 1:
                print(f"warning: left out: {reason}", flush=True)
            if bad >= MOST_BAD:
                raise DataError(f"{self.dataset.name}: {bad} samples in a row cannot be trained; the last: {reason}")

    def _samples(self, key: str, number: int) -> Iterator[Sample]:
        """The samples of this worker, pass after pass, shuffled a little; in `places`, how far they are read."""
        # With another number of readers everything begins anew, in another order.
        begun = max((place[0] for place in self._places.values()), default=-1) + 1
        turn, at, skip = self._places.get(key, (begun, 0, 0))
        buffer: list[Sample] = []
        while True:
            order = list(self.shards)
            keyed_random(self.seed, "shards", turn).shuffle(order)
            source = keyed_random(self.seed, "samples", turn, number, at, skip)
            for position, shard in enumerate(order[number :: self.readers]):
                if position < at:
                    continue
                for count, sample in enumerate(read_shard(shard, self.settings, skip), start=skip + 1):
                    self._places[key] = (turn, position, count)
                    buffer.append(sample)
                    if len(buffer) >= BUFFER:
                        yield buffer.pop(source.randrange(len(buffer)))
                skip = 0
            source.shuffle(buffer)
            yield from buffer
            buffer.clear()
            turn, at, skip = turn + 1, 0, 0

    def _picture(self, sample: Sample) -> _Picture | str:
        """A sample as it is trained, or why it cannot be."""
        caption = caption_of_sample(sample, self.dataset) if self.tokenize is not None else sample.caption
        if caption is None and self.tokenize is not None:
            return f"{sample.name}: has no caption"
        try:
            image = open_image(Memory(sample.picture, sample.name), self.dataset.alpha_background)
            placement = placement_of(image.size, self.dataset, self.selector)
        except DataError as problem:
            return str(problem)
        own = views(sample.name, placement, self.dataset.views)
        captions = variants((caption or "",), self.dataset.text, sample.name)
        is_plain = own == (View(placement.crop),)
        pixels = to_pixels(image, placement)
        return _Picture(
            sample.name, captions, pixels, placement, () if is_plain else own, b"" if is_plain else sample.picture
        )

    def _seen(self, picture: _Picture, view: View) -> Tensor:
        image = open_image(Memory(picture.data, picture.name), self.dataset.alpha_background)
        return to_pixels(image, picture.placement, view)
