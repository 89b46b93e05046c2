"""Index of cache files: where every tensor of every item lies, so that training opens no headers. Torch-free.

The index is derived: it can be deleted at any time and is rebuilt from the headers. It lies in the dataset's cache
directory as ``index_{code}.json`` and is written last. An entry is used only while the file passes the quick check of
`stamps`. Equal layouts (shapes, dtypes, relative offsets) are stored once.

It also remembers hashes of pictures and masks that are not as the header of their cache file says, although their content
is: data sets that were copied, touched, or are read by several machines. Several states are kept of one file, so machines
that share a cache folder do not forget each other's. Two processes that write at once may lose what one of them found; it
is found again.
"""

import json
import logging
import os
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, overload

from musubi_tuner.caching.file_format import cache_path, plain_name, split_caption
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import ItemTable
from musubi_tuner.errors import CacheError
from musubi_tuner.files import read_json, replace_file
from musubi_tuner.headers import Header, TensorEntry, read_header
from musubi_tuner.stamps import KEPT, STAMPS, State, stamps_of

INDEX_VERSION = 1


@dataclass(frozen=True)
class CachedFile:
    """Where the tensors of one cache file lie, by plain name.

    Attributes:
        stamps: quick state when this was found out. made: checksum of the fingerprint.
    """

    path: Path
    tensors: dict[str, TensorEntry]
    stamps: tuple[int, ...] = field(default=(), compare=False)
    made: int = field(default=0, compare=False)

    def is_still(self, file: BinaryIO) -> bool:
        """Whether an open file is the one that was looked at: one stat, and its header where that differs (it was touched)."""
        if stamps_of(os.fstat(file.fileno())) == self.stamps:
            return True
        try:
            header = read_header(self.path)
        except CacheError:
            return False
        found = {plain_name(key): entry for key, entry in header.tensors.items()}
        return _made(header) == self.made and all(found.get(name) == entry for name, entry in self.tensors.items())


def _made(header: Header) -> int:
    return zlib.crc32(header.metadata.get("fingerprint", "").encode())


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
        self.hashes: dict[str, list[list[Any]]] = {}
        self.changed = False
        try:
            stored = read_json(self.path)
            if stored["version"] == INDEX_VERSION:
                self.layouts, self.files = list(stored["layouts"]), dict(stored["files"])
                self.hashes = {
                    name: [list(entry) for entry in known] for name, known in stored.get("hashes", {}).items()
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # none yet, or not readable: what is looked up is found out again
        self._layout_numbers = {json.dumps(layout, sort_keys=True): n for n, layout in enumerate(self.layouts)}

    def lookup(self, path: Path) -> CachedFile:
        """Layout of a cache file.

        Raises:
            FileNotFoundError: if it is missing.
            CacheError: if it is broken.
        """
        stamps = stamps_of(path.stat())
        name = path.relative_to(self.root).as_posix()
        entry = self.files.get(name)
        known = isinstance(entry, list) and len(entry) == len(stamps) + 3 and entry[-2] in range(len(self.layouts))
        if entry is None or not known or tuple(entry[:-3]) != stamps:
            entry = self._index(path, name, stamps)
        begin, number, made = entry[-3:]
        tensors = {
            key: TensorEntry(dtype, tuple(shape), begin + start, begin + end)
            for key, (dtype, shape, start, end) in self.layouts[number].items()
        }
        return CachedFile(path, tensors, stamps, made)

    def _index(self, path: Path, name: str, stamps: tuple[int, ...]) -> list[int]:
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
        self.files[name] = [*stamps, begin, self._layout_numbers[text], _made(header)]
        return self.files[name]

    def hash_of(self, name: str, now: State) -> str | None:
        """The remembered hash of a picture or mask in the state that it has now.

        Args:
            name: of the item, and which of its files it is.
        """
        wanted = [now[stamp] for stamp in STAMPS]
        for entry in self.hashes.get(name, []):
            if entry[:-1] == wanted:
                return str(entry[-1])
        return None

    def remember(self, name: str, state: State) -> None:
        """Keep the hash of a picture or mask for the next start."""
        entry = [state[stamp] for stamp in STAMPS] + [state["sha256"]]
        others = [other for other in self.hashes.get(name, []) if other != entry]
        self.hashes[name] = [*others, entry][-KEPT:]
        self.changed = True

    def save(self) -> None:
        """Write the index if it changed; a read-only folder only costs time at the next start."""
        if not self.changed:
            return
        content = {"version": INDEX_VERSION, "layouts": self.layouts, "files": self.files, "hashes": self.hashes}
        text = json.dumps(content)
        try:
            replace_file(self.path, lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            logging.getLogger(__name__).warning(
                "cannot write %s (%s); what it would hold is found out at each start", self.path, error
            )
        self.changed = False


class TableFiles(Sequence[dict[str, CachedFile]]):
    """Cache files of the items of a table, by kind, made when they are asked for.

    Args:
        kinds: that are opened. hidden: names of tensors that are left out.
    """

    def __init__(self, table: ItemTable, kinds: Sequence[str], code: str, hidden: Collection[str] = ()) -> None:
        self.table, self.kinds, self.code = table, kinds, code
        self._layouts = {
            kind: [
                {
                    name: entry
                    for key, entry in layout.items()
                    if split_caption(name := plain_name(key))[0] not in hidden
                }
                for layout in table.files[kind].layouts
            ]
            for kind in kinds
        }

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> dict[str, CachedFile]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, CachedFile]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        item, found = self.table[index], {}
        for kind in self.kinds:
            files = self.table.files[kind]
            begin = int(files.begin[index])
            tensors = {
                name: TensorEntry(dtype, tuple(shape), begin + start, begin + end)
                for name, (dtype, shape, start, end) in self._layouts[kind][files.layout[index]].items()
            }
            stamps = tuple(files.stamps[index].tolist())
            found[kind] = CachedFile(cache_path(item, kind, self.code), tensors, stamps, int(files.made[index]))
        return found


def open_items(
    items: Sequence[Item],
    roots: list[Path],
    kinds: list[list[str]],
    code: str,
    hidden: Sequence[Collection[str]] | None = None,
) -> Sequence[dict[str, CachedFile]]:
    """Cache files of every item, by kind.

    Args:
        roots: cache directory of every dataset. kinds: what its items must have, and what is opened. hidden: plain names of a first
            caption's tensors that are left out.

    Raises:
        CacheError: listing items whose files are missing or broken, and the job to run.
    """
    if isinstance(items, ItemTable):
        absent = [kind for kind in kinds[0] if kind not in items.files or bool((items.files[kind].layout < 0).any())]
        if absent:
            raise CacheError(
                f"caches are not complete: {' and '.join(absent)} files are missing; run the cache jobs first"
            )
        return TableFiles(items, kinds[0], code, hidden[0] if hidden else ())
    indexes = [CacheIndex(root, code) for root in roots]
    opened: list[dict[str, CachedFile]] = []
    problems: list[str] = []
    for item in items:
        index = indexes[item.dataset]
        files = {}
        for kind in kinds[item.dataset]:
            try:
                found = index.lookup(cache_path(item, kind, code))
                if hidden and hidden[item.dataset]:
                    own = {n: e for n, e in found.tensors.items() if split_caption(n)[0] not in hidden[item.dataset]}
                    found = replace(found, tensors=own)
                files[kind] = found
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
