"""Whether pictures and masks still hold what their cache files were made from. Torch-free.

A file that passes the quick check of `stamps` is believed, be it against the header of its cache file or against the
index. Every other file is hashed, and the same hash is fresh. What was hashed goes into the index, so a data set that was
copied is hashed once and not at each start.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from musubi_tuner.caching.fingerprint import Expectation, Fingerprint
from musubi_tuner.caching.index import CacheIndex
from musubi_tuner.config import RunConfig
from musubi_tuner.data.item import Item
from musubi_tuner.stamps import State, agrees, hashed_state, quick_state


@dataclass(frozen=True)
class Doubt:
    """A file that must be read.

    Attributes:
        name: of its state in the fingerprint. sha256: what the cache file was made from. note: why, for the plan.
    """

    item: Item
    name: str
    path: Path
    sha256: str | None
    note: str


class Contents:
    """Compares files with fingerprints; what it reads is known to it from then on, and to later starts after `save`."""

    def __init__(self, config: RunConfig) -> None:
        self.full = config.cache.verify == "full"
        self._workers = max(1, config.cache.workers)
        self._roots, self._code = [dataset.cache_directory for dataset in config.datasets], config.spec.code
        self._indexes: dict[Path, CacheIndex] = {}
        self._read: dict[Path, State] = {}

    def _index(self, item: Item) -> CacheIndex:
        """The index of an item's cache directory; opened for the first file whose header is not enough."""
        root = self._roots[item.dataset]
        if root not in self._indexes:
            self._indexes[root] = CacheIndex(root, self._code)
        return self._indexes[root]

    def doubts(self, item: Item, expected: Expectation, stored: Fingerprint | None) -> list[Doubt]:
        """The files of an item that are not known to be what its cache file was made from."""
        found = []
        for name, path in expected.files(item).items():
            known: dict[str, Any] = (stored or {}).get(name) or {}
            if not self.full and self._believed(item, name, path, known):
                continue
            found.append(Doubt(item, name, path, known.get("sha256"), _note(name, known, self.full)))
        return found

    def _believed(self, item: Item, name: str, path: Path, known: dict[str, Any]) -> bool:
        try:
            now = quick_state(path)
        except OSError:
            return False
        if agrees(known, now):
            return True
        return known.get("sha256") is not None and self._index(item).hash_of(_key(item, name), now) == known["sha256"]

    def settle(self, doubts: Iterable[Doubt]) -> dict[str, str]:
        """Read the files in doubt: key of an item -> what is wrong, for those whose content is another."""
        doubts, wrong = list(doubts), {}
        with ThreadPoolExecutor(self._workers) as pool:
            states = pool.map(self._state, [doubt.path for doubt in doubts])
            bar = tqdm(states, "hashing pictures", len(doubts), leave=False, unit="file", disable=None, delay=1)
            for doubt, state in zip(doubts, bar, strict=True):
                if isinstance(state, OSError):
                    wrong[doubt.item.key] = f"{doubt.path} cannot be read ({state.strerror})"
                elif state["sha256"] != doubt.sha256:
                    wrong[doubt.item.key] = f"the {'mask' if doubt.name == 'mask_image' else 'image'} has changed"
                elif "inode" in state:
                    self._index(doubt.item).remember(_key(doubt.item, doubt.name), state)
        return wrong

    def _state(self, path: Path) -> State | OSError:
        if path not in self._read:
            try:
                self._read[path] = hashed_state(path)
            except OSError as error:
                return error
        return self._read[path]

    def difference(self, item: Item, expected: Expectation, stored: Fingerprint | None) -> str | None:
        """What is wrong with the files of one item, if their content is another."""
        doubts = self.doubts(item, expected, stored)
        return self.settle(doubts).get(item.key) if doubts else None

    def save(self) -> None:
        """Write what was read into the indexes."""
        for index in self._indexes.values():
            index.save()


def _key(item: Item, name: str) -> str:
    return f"{name}:{item.id}"


def _note(name: str, known: dict[str, Any], full: bool) -> str:
    files = "masks" if name == "mask_image" else "pictures"
    if full:
        return f'{files} are hashed because cache.verify is "full"'
    if "inode" not in known:
        reason = "their caches do not hold their change times and inodes yet"
    else:
        reason = "their times or inodes are not those that were cached (they were copied, moved or touched)"
    return f"{files} are hashed once because {reason}"
