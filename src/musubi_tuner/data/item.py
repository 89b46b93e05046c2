"""One image with its captions. Torch-free."""

from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.config.datasets import KEPT
from musubi_tuner.data.buckets import Placement, Size
from musubi_tuner.data.masks import Mask
from musubi_tuner.data.views import View


@dataclass(frozen=True)
class Item:
    """One image with its captions.

    Attributes:
        id: path relative to the dataset's root (`roots` for that of a list), POSIX, without extension; the key of its random
            draws.
        key: the same with the dataset's number in front, unique in the run.
        cache_directory: folder of its cache files (a sub-folder mirrors the image's where needed).
        size: (width, height) upright. placement: how it becomes its bucket.
        mask: where its loss mask comes from; None if it has none.
        more_captions: beside ``caption``; each presentation takes one of all.
        squashed: whether its proportions give way to those of its bucket, for the teachers too.
        interpolation: filter of the resize that was asked for, for the teachers too; None = the usual one.
        background: colour (#rrggbb) that its transparent pixels are laid over; `KEPT` if they keep theirs, or if it has none.
        views: versions of the picture, of which each presentation takes one; empty = the picture as it is.
        content: hash of a picture that is not there, from its caches; None = it is there.
        shard: name of the shard that it comes from; None = it comes from none. Without content it stands for a shard that is not read yet.
    """

    id: str
    key: str
    path: Path
    caption: str
    cache_directory: Path
    size: Size
    placement: Placement
    num_repeats: int
    batch_size: int
    mask: Mask | None = None
    more_captions: tuple[str, ...] = ()
    squashed: bool = False
    interpolation: str | None = None
    background: str = KEPT
    views: tuple[View, ...] = ()
    content: str | None = None
    shard: str | None = None

    @property
    def is_unread(self) -> bool:
        """Whether it stands for the pictures of a shard that is not read yet."""
        return self.shard is not None and self.content is None

    @property
    def dataset(self) -> int:
        """Number of its dataset."""
        return int(self.key.partition(":")[0])

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions."""
        return (self.caption, *self.more_captions)

    @property
    def stem(self) -> str:
        """Beginning of its cache file names."""
        return self.path.stem

    @property
    def bucket(self) -> Size:
        """(width, height) it is trained at."""
        return self.placement.bucket
