"""Index of cache files: where every tensor of every item lies, so that training opens no headers. Torch-free.

The index is derived: it can be deleted at any time and is rebuilt from the headers. It lies in the dataset's cache
directory as ``index_{code}.json`` and is written last. An entry is used only while the file has the size and
modification time that it names. Equal layouts (shapes, dtypes, relative offsets) are stored once.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.caching.file_format import TensorEntry, cache_path, plain_name, read_header
from musubi_tuner.data.sources import Item
from musubi_tuner.errors import CacheError

INDEX_VERSION = 1


@dataclass(frozen=True)
class CachedFile:
    """Where the tensors of one cache file lie, by plain name."""

    path: Path
    tensors: dict[str, TensorEntry]


def index_path(root: Path, code: str) -> Path:
    """Where the index of a cache directory lies."""
    return root / f"index_{code}.json"


class CacheIndex:
    """Reads the index of one cache directory, falls back to headers, and can be written again."""

    def __init__(self, root: Path, code: str) -> None:
        self.path = index_path(root, code)
        self.root = root
        self.layouts: list[dict[str, Any]] = []
        self.files: dict[str, list[int]] = {}
        self.changed = False
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["version"] == INDEX_VERSION:
                self.layouts, self.files = list(stored["layouts"]), dict(stored["files"])
        except (OSError, ValueError, KeyError, TypeError):
            self.changed = True
        self._layout_numbers = {json.dumps(layout, sort_keys=True): n for n, layout in enumerate(self.layouts)}

    def lookup(self, path: Path) -> CachedFile:
        """Layout of a cache file.

        Raises:
            FileNotFoundError: if it is missing.
            CacheError: if it is broken.
        """
        status = path.stat()
        name = path.relative_to(self.root).as_posix()
        entry = self.files.get(name)
        known = isinstance(entry, list) and len(entry) == 4 and entry[3] in range(len(self.layouts))
        if entry is None or not known or entry[:2] != [status.st_size, status.st_mtime_ns]:
            entry = self._index(path, name, status.st_size, status.st_mtime_ns)
        begin, layout = entry[2], self.layouts[entry[3]]
        tensors = {
            key: TensorEntry(dtype, tuple(shape), begin + start, begin + end)
            for key, (dtype, shape, start, end) in layout.items()
        }
        return CachedFile(path, tensors)

    def _index(self, path: Path, name: str, size: int, mtime_ns: int) -> list[int]:
        header = read_header(path)
        begin = min((entry.start for entry in header.tensors.values()), default=0)
        layout = {
            plain_name(key): [entry.dtype, list(entry.shape), entry.start - begin, entry.end - begin]
            for key, entry in header.tensors.items()
        }
        text = json.dumps(layout, sort_keys=True)
        if text not in self._layout_numbers:
            self._layout_numbers[text] = len(self.layouts)
            self.layouts.append(layout)
        self.changed = True
        self.files[name] = [size, mtime_ns, begin, self._layout_numbers[text]]
        return self.files[name]

    def save(self) -> None:
        """Write the index if it changed; a read-only folder only costs time at the next start."""
        from musubi_tuner.files import replace_file

        if not self.changed:
            return
        text = json.dumps({"version": INDEX_VERSION, "layouts": self.layouts, "files": self.files})
        try:
            replace_file(self.path, lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            import logging

            logging.getLogger(__name__).warning(
                "cannot write %s (%s); headers are read at each start", self.path, error
            )
        self.changed = False


def open_items(items: list[Item], roots: list[Path], kinds: list[list[str]], code: str) -> list[dict[str, CachedFile]]:
    """Cache files of every item, by kind.

    Args:
        roots: cache directory of every dataset. kinds: what its items must have, and what is opened.

    Raises:
        CacheError: listing items whose files are missing or broken, and the job to run.
    """
    indexes = [CacheIndex(root, code) for root in roots]
    opened: list[dict[str, CachedFile]] = []
    problems: list[str] = []
    for item in items:
        index = indexes[item.dataset]
        files = {}
        for kind in kinds[item.dataset]:
            try:
                files[kind] = index.lookup(cache_path(item, kind, code))
            except FileNotFoundError:
                problems.append(f"{item.id}: no {kind} cache ({cache_path(item, kind, code).name})")
            except CacheError as error:
                problems.append(str(error))
        opened.append(files)
    if problems:
        shown = problems[:10] + ([f"... and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise CacheError("caches are not complete; run the cache jobs first\n  " + "\n  ".join(shown))
    for index in indexes:
        index.save()
    return opened
