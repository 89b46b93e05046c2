"""Live pictures as micro-batches: through the same buckets, crops and captions as cached ones."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from musubi_tuner.config.captions import CaptionSettings
from musubi_tuner.data.batch import Batch
from musubi_tuner.data.buckets import Placement
from musubi_tuner.data.images import open_image, resize_crop, to_array
from musubi_tuner.data.item import Item
from musubi_tuner.data.plan import MicroBatch, PlanItem, caption_of, number_of_view
from musubi_tuner.data.views import View

Tokenize = Callable[[list[str]], dict[str, Tensor]]
"""Captions -> tensors by name, one row per caption, such as ``tokens`` [B, L] int64; picklable, for loader workers."""


def read_pixels(item: Item, view: View | None = None) -> Tensor:
    """The picture at its bucket, [3, H, W] float32 in [-1, 1].

    Args:
        view: version of it; None = as it is.

    Raises:
        DataError: if it cannot be read.
    """
    return to_pixels(open_image(item.path, item.background), item.placement, view)


def to_pixels(image: Image, placement: Placement, view: View | None = None) -> Tensor:
    """A picture at its bucket, [3, H, W] float32 in [-1, 1]."""
    if view is None:
        array = to_array(resize_crop(image, placement))
    else:
        array = view.mirror(view.colour(to_array(resize_crop(image, view.place(placement)))))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1


def first_of_largest(items: Sequence[Item], count: int) -> list[int]:
    """Positions of the first items, by their keys, of the bucket that has most."""
    buckets = Counter(item.bucket for item in items)
    largest = max(sorted(buckets), key=lambda bucket: buckets[bucket])
    return sorted((n for n, item in enumerate(items) if item.bucket == largest), key=lambda n: items[n].key)[:count]


def view_of(views: Sequence[View], seed: int, epoch: int, presentation: int) -> View | None:
    """Which version of its picture a presentation takes; None = the picture as it is."""
    return views[number_of_view(len(views), seed, epoch, presentation)] if views else None


class PixelSource:
    """Reads micro-batches from the pictures themselves: ``pixels`` [B, 3, H, W] float32 in [-1, 1], and token ids.

    Args:
        items: of all datasets. seed: of the run, which keys the draw of the caption.
        tokenize: turns captions into tensors; None = captions are not used. texts: by data set, how captions are dropped.
    """

    def __init__(
        self, items: Sequence[Item], seed: int, tokenize: Tokenize | None = None, texts: Sequence[CaptionSettings] = ()
    ) -> None:
        self.items, self.seed, self.tokenize, self.texts = list(items), seed, tokenize, texts
        self.of_epoch = sum(item.num_repeats for item in items)
        self.places: dict[str, Any] | None = None

    def plan_items(self) -> list[PlanItem]:
        """See `Source`."""
        return [PlanItem(item.key, item.bucket, item.num_repeats, item.batch_size) for item in self.items]

    def first(self, count: int) -> list[Tensor]:
        """See `Source`."""
        return [read_pixels(self.items[number]) for number in first_of_largest(self.items, count)]

    def read(self, batch: MicroBatch, epoch: int) -> Batch:
        """See `Source`."""
        items = [self.items[index] for index in batch.items]
        chosen = [view_of(item.views, self.seed, epoch, n) for item, n in zip(items, batch.presentations, strict=True)]
        pixels = [read_pixels(item, view) for item, view in zip(items, chosen, strict=True)]
        return self._batch(pixels, [(item.id, item.dataset, item.captions) for item in items], batch, epoch)

    def _batch(
        self, pixels: list[Tensor], named: Sequence[tuple[str, int, Sequence[str]]], batch: MicroBatch, epoch: int
    ) -> Batch:
        """A micro-batch of pictures.

        Args:
            named: id, number of the data set and captions of each.
        """
        tensors = {"pixels": torch.stack(pixels)}
        if self.tokenize is not None:
            captions = [
                own[
                    caption_of(
                        len(own),
                        self.seed,
                        epoch,
                        presentation,
                        self.texts[number] if self.texts else None,
                        of_epoch=self.of_epoch,
                    )
                ]
                for (_, number, own), presentation in zip(named, batch.presentations, strict=True)
            ]
            tensors |= self.tokenize(captions)
        valid = {name: torch.ones(len(named), dtype=torch.bool) for name in tensors}
        ids = torch.tensor([number for _, number, _ in named])
        return Batch(tensors, valid, [name for name, _, _ in named], batch.presentations, ids)
