"""Loss masks that are black in all that is trained of their image: nothing of it would be learned. Torch-free.

What is cached is looked up in the cache file; masks that are still to be encoded are read as the cache job will read them.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from musubi_tuner.caching.file_format import cache_path, plain_name
from musubi_tuner.caching.status import KindStatus
from musubi_tuner.config import RunConfig
from musubi_tuner.data.item import Item
from musubi_tuner.data.masks import read_mask, to_latent
from musubi_tuner.errors import CacheError, DataError
from musubi_tuner.headers import read_header

_LONG = 2000
"""Masks whose reading takes long enough for a bar."""


def black_masks(config: RunConfig, items: Sequence[Item], latents: KindStatus) -> list[Item]:
    """Items whose mask is black everywhere; broken masks and missing files are left to the cache job.

    Args:
        latents: state of the latents, beside which masks are cached.
    """
    if not config.train.masked_loss:
        return []

    def is_black(item: Item) -> bool:
        return _cached_is_black(config, item) if item.key not in latents.due else _file_is_black(config, item)

    masked = [item for item in items if item.mask is not None]
    if len(masked) < _LONG:
        return [item for item in masked if is_black(item)]
    with ThreadPoolExecutor(max(1, config.cache.workers)) as pool:
        found = list(
            tqdm(pool.map(is_black, masked), total=len(masked), desc="masks", unit="mask", leave=False, disable=None)
        )
    return [item for item, black in zip(masked, found, strict=True) if black]


def _cached_is_black(config: RunConfig, item: Item) -> bool:
    path = cache_path(item, "latents", config.spec.code)
    try:
        entries = read_header(path).tensors
        with path.open("rb") as file:
            for key, entry in entries.items():
                if plain_name(key) == "mask_weights":
                    file.seek(entry.start)
                    return not any(file.read(entry.end - entry.start))
    except (OSError, CacheError):
        return False  # said where the file is read for training
    return False


def _file_is_black(config: RunConfig, item: Item) -> bool:
    if item.mask is None or item.mask.source == "imported":
        return False
    try:
        grey = read_mask(item.mask, item.path, item.background)
    except DataError:
        return False
    return bool(to_latent(grey, item.placement, config.latents.factor).max() == 0)
