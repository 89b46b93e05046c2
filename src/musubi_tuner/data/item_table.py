"""Items of a folder of complete caches, as columns: a million of them are no million objects. Torch-free.

A latents file names its item and says how the picture became its bucket; the text file beside it has the captions. So caches are trained without
pictures, caption files and encoders. Their headers are read once: what they say is kept in ``.table/<code>.npz`` in the cache folder, and used as long as
no folder there has changed (its times and inode; adding, removing or renaming a file changes them). A file that was overwritten in place is
noticed when it is read for training.
"""

import json
import os
import re
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, overload
from zipfile import BadZipFile

import numpy as np

from musubi_tuner.config.datasets import KEPT
from musubi_tuner.data.buckets import Placement, Size, place
from musubi_tuner.data.item import Item
from musubi_tuner.data.masks import Mask
from musubi_tuner.data.views import View
from musubi_tuner.errors import CacheError, DataError
from musubi_tuner.files import replace_file
from musubi_tuner.headers import Header, read_header
from musubi_tuner.stamps import rest_of_tick, stamps_of

VERSION = 1
FOLDER, READING = ".table", ".reading-"
"""Folder of what is kept, and beginning of those of shards that are being read; neither holds caches."""
LEAST_KEPT = 5000
"""Items of a folder whose headers take long enough to be kept."""
ENDINGS = {"text": "_te.safetensors", "experts": "_experts.safetensors"}
"""Of the files beside the latents, behind the code of the family."""
TEXTS = ("ids", "captions", "stems", "contents")
COLUMNS = {"layout": np.int32, "begin": np.int64, "made": np.int64, "stamps": np.int64, "imported": np.bool_}
"""Of `Files`, with their types."""
_CAPTIONS = "\0"
"""Between the captions of an item."""


def _numbers() -> "array[int]":
    return array("q")


@dataclass
class Files:
    """The cache files of one kind, a row for each item.

    Attributes:
        layouts: tensors by key: dtype, shape, start and end behind the first byte of the data.
        layout: number of the row's, -1 = it has no file. begin: first byte of its data. made: checksum of its fingerprint.
        stamps: [items, 4], see `stamps`. imported: whether the file came from another program. precisions: in which files were computed.
    """

    layouts: list[dict[str, list[Any]]] = field(default_factory=list)
    layout: Any = field(default_factory=_numbers)
    begin: Any = field(default_factory=_numbers)
    made: Any = field(default_factory=_numbers)
    stamps: Any = field(default_factory=_numbers)
    imported: Any = field(default_factory=_numbers)
    precisions: Counter[str] = field(default_factory=Counter)

    def add(self, header: Header, stamps: tuple[int, ...], numbers: dict[str, int]) -> dict[str, Any]:
        """Append a file; what made it."""
        begin = min((entry.start for entry in header.tensors.values()), default=0)
        layout = {
            key: [entry.dtype, list(entry.shape), entry.start - begin, entry.end - begin]
            for key, entry in header.tensors.items()
        }
        number = numbers.setdefault(json.dumps(layout), len(self.layouts))
        if number == len(self.layouts):
            self.layouts.append(layout)
        made = header.fingerprint or {}
        self.layout.append(number)
        self.begin.append(begin)
        self.made.append(zlib.crc32(header.metadata.get("fingerprint", "").encode()))
        self.stamps.extend(stamps)
        self.imported.append(made.get("provenance") == "imported")
        self.precisions[str(made.get("precision", "auto"))] += 1
        return made

    def add_none(self) -> None:
        """Append an item without a file."""
        self.layout.append(-1)
        self.begin.append(0)
        self.made.append(0)
        self.stamps.extend((0, 0, 0, 0))
        self.imported.append(False)

    def in_order(self, order: Any) -> "Files":
        """The rows in another order, as arrays."""
        found: dict[str, Any] = {name: np.array(getattr(self, name), dtype) for name, dtype in COLUMNS.items()}
        found["stamps"] = found["stamps"].reshape(-1, 4)
        return replace(self, **{name: values[order] for name, values in found.items()})


class ItemTable(Sequence[Item]):
    """The items of one data set, sorted by id.

    Attributes:
        root: folder of the caches. ids, captions, stems, folders, contents: of each item; several captions are joined.
        kinds, kind: what items have in common (size, placement, mask, versions, ...), and which each has.
        files: by kind of cache. spare: cache files that belong to no item.
    """

    def __init__(
        self,
        root: Path,
        *,
        ids: list[str],
        captions: list[str],
        stems: list[str],
        contents: list[str],
        folders: Any,
        places: list[str],
        kinds: list[Item],
        kind: Any,
        files: dict[str, Files],
        spare: list[str],
    ) -> None:
        self.root, self.ids, self.captions, self.stems, self.contents = root, ids, captions, stems, contents
        self.folders, self.places, self.kinds, self.kind = folders, places, kinds, kind
        self.files, self.spare = files, spare
        self.prefix = ""

    def of(self, number: int, num_repeats: int, batch_size: int) -> "ItemTable":
        """The same items as those of a data set with this number."""
        self.prefix = f"{number}:"
        self.kinds = [
            replace(kind, key=self.prefix, num_repeats=num_repeats, batch_size=batch_size) for kind in self.kinds
        ]
        return self

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        kind, captions = self.kinds[self.kind[index]], self.captions[index].split(_CAPTIONS)
        folder = self.root / self.places[self.folders[index]]
        stem = self.stems[index] or self.ids[index].rpartition("/")[2]
        return replace(
            kind, id=self.ids[index], key=f"{self.prefix}{self.ids[index]}", path=folder / f"{stem}.picture",
            caption=captions[0], more_captions=tuple(captions[1:]), cache_directory=folder,
            content=self.contents[index] or str(folder / stem),
        )  # fmt: skip

    def rows(self) -> Iterator[tuple[str, list[str], Item]]:
        """Key, captions and a representative of every item, without making it."""
        for identity, captions, kind in zip(self.ids, self.captions, self.kind.tolist(), strict=True):
            yield f"{self.prefix}{identity}", captions.split(_CAPTIONS), self.kinds[kind]

    @cached_property
    def examples(self) -> list[tuple[int, int]]:
        """Position of an item of each sort, and how many are alike: in all but names, captions' words and contents."""
        several = np.fromiter((text.count(_CAPTIONS) for text in self.captions), np.int64, len(self))
        columns = np.stack([self.kind, several, *(files.layout for files in self.files.values())], axis=1)
        _, first, counts = np.unique(columns, axis=0, return_index=True, return_counts=True)
        return sorted(zip(first.tolist(), counts.tolist(), strict=True))


def tally(items: Sequence[Item]) -> list[tuple[Item, int]]:
    """Items with their numbers, where those that are alike in all but names, words and contents may be counted together."""
    if isinstance(items, ItemTable):
        return [(items[position], count) for position, count in items.examples]
    return [(item, 1) for item in items]


def rows_of(items: Sequence[Item]) -> Iterator[tuple[str, Sequence[str], Item]]:
    """Key and captions of every item, and an item with what else it is."""
    if isinstance(items, ItemTable):
        return items.rows()
    return ((item.key, item.captions, item) for item in items)


def items_of_caches(
    root: Path, code: str, problems: list[str], *, only: Collection[str] | None = None, keeps: bool = False
) -> ItemTable:
    """The items of a cache folder.

    Args:
        code: of the family, which is part of the names. problems: gets what is wrong with files. only: latents files below the root that
            count; None = all. keeps: what was kept of the files is believed, and kept; for readers that compare files with it.
    """
    if not keeps:
        return _read(root, code, problems, only)
    kept = _load(root, code)
    if kept is not None:
        return kept
    before, wrong = _state_before(root), len(problems)
    table = _read(root, code, problems, only)
    if before is not None and len(problems) == wrong and len(table):
        _save(table, code, before)
    return table


def forget(root: Path, code: str) -> None:
    """Let the next start read all headers again."""
    (root / FOLDER / f"{code}.npz").unlink(missing_ok=True)


def _read(root: Path, code: str, problems: list[str], only: Collection[str] | None) -> ItemTable:
    pattern = re.compile(rf"(.+)_(\d{{4,}})x(\d{{4,}})_{re.escape(code)}\.safetensors")
    files = {kind: Files() for kind in ("latents", *ENDINGS)}
    numbers: dict[str, dict[str, int]] = {kind: {} for kind in files}
    columns: dict[str, list[str]] = {name: [] for name in TEXTS}
    places, folders, kinds, kind = list[str](), _numbers(), dict[Any, int](), _numbers()
    spare: list[str] = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(_with_caches(below))
        every, present, place_of, stems = set(names), set(names), os.path.relpath(folder, root), dict[str, str]()
        for name in sorted(names):
            match = None if name.startswith(".") else pattern.fullmatch(name)
            if match is None or (only is not None and os.path.normpath(Path(place_of, name)) not in only):
                continue
            stem, path = match[1], Path(folder, name)
            beside = {other: f"{stem}_{code}{ending}" for other, ending in ENDINGS.items()}
            try:
                if stem in stems:
                    raise DataError(f"{path} and {stems[stem]} are caches of the same picture; remove one")
                size = (int(match[2]), int(match[3]))
                text = path.with_name(beside["text"])
                if text.name not in every:
                    raise DataError(f"{text}: no such file; the caches are not complete")
                stored = _stored(path, text, size, files, numbers)
            except (CacheError, DataError, OSError) as problem:
                problems.append(str(problem) if str(path.parent) in str(problem) else f"{path}: {problem}")
                _trim(files, len(columns["ids"]))
                continue
            stems[stem] = name
            if beside["experts"] in every:
                try:
                    experts = path.with_name(beside["experts"])
                    files["experts"].add(*_looked_at(experts), numbers["experts"])
                except (CacheError, OSError):  # said where the run wants them
                    files["experts"].add_none()
            else:
                files["experts"].add_none()
            present -= {name, *beside.values()}
            identity, captions, content, common = stored
            if not places or places[-1] != place_of:
                places.append(place_of)
            columns["ids"].append(identity)
            columns["captions"].append(_CAPTIONS.join(captions))
            columns["stems"].append("" if identity.rpartition("/")[2] == stem else stem)
            columns["contents"].append(content or "")
            folders.append(len(places) - 1)
            kind.append(kinds.setdefault(common, len(kinds)))
        own = tuple(f"_{code}{ending}" for ending in ENDINGS.values())
        spare += [os.path.join(place_of, name) for name in present if name.endswith(own) and not name.startswith(".")]  # noqa: PTH118
    order = sorted(range(len(columns["ids"])), key=columns["ids"].__getitem__)
    ids = columns["ids"]
    for one, other in pairwise(order):
        if ids[one] == ids[other]:
            both = " and ".join(
                str(Path(root, places[folders[n]], columns["stems"][n] or ids[n].rpartition("/")[2]))
                for n in (one, other)
            )
            problems.append(f"{both} are caches of the same item; remove one")
    return ItemTable(
        root,
        **{name: [values[n] for n in order] for name, values in columns.items()},
        folders=np.array(folders, np.int32)[order],
        places=places,
        kinds=[_kind(common) for common in kinds],
        kind=np.array(kind, np.int32)[order],
        files={name: own.in_order(order) for name, own in files.items() if any(number >= 0 for number in own.layout)},
        spare=sorted(spare),
    )


def _looked_at(path: Path) -> tuple[Header, tuple[int, ...]]:
    """Header of a file, and its state before it was read."""
    stamps = stamps_of(path.stat())
    return read_header(path), stamps


def _trim(files: dict[str, Files], count: int) -> None:
    """Take back the files of an item that is none."""
    for own in files.values():
        for name in COLUMNS:
            del getattr(own, name)[(4 * count if name == "stamps" else count) :]


Common = tuple[Any, ...]


def _stored(
    path: Path, text: Path, size: Size, files: dict[str, Files], numbers: dict[str, dict[str, int]]
) -> tuple[str, list[str], str | None, Common]:
    """Id, captions, hash of the picture and what it has in common with others, of one item.

    Raises:
        CacheError, OSError: for files that cannot be read. DataError: for files that do not say what they hold.
    """
    made, words = (
        files[kind].add(*_looked_at(file), numbers[kind]) for kind, file in (("latents", path), ("text", text))
    )
    for file, found in ((path, made), (text, words)):
        if not found:
            raise DataError(f"{file}: does not say what made it, so its item is not known")
    try:
        bucket = _pair(made["bucket"])
        placement = place(size, bucket)
        if "resized" in made:  # files that were imported do not say
            placement = Placement(bucket, _pair(made["resized"]), _pair(made["crop"]), placement.filter)
        views = tuple(
            (int(x), int(y), bool(flip), float(hue), float(gamma)) for x, y, flip, hue, gamma in made.get("views") or ()
        )
        captions = [str(each) for each in words.get("captions") or [words["caption"]]]
        if any("\0" in text for text in (*captions, str(made["item"]))):
            raise DataError(f"{path}: its id or a caption holds a NUL character; make the caches again")
        mask = (made["mask"], bool(made.get("mask_alpha"))) if made.get("mask") else None
        common = (
            size, (placement.bucket, placement.resized, placement.crop, placement.filter), mask, views,
            bool(made.get("squashed", False)), made.get("interpolation"), made.get("background") or KEPT,
        )  # fmt: skip
        return str(made["item"]), captions, (made.get("image") or {}).get("sha256"), common
    except (KeyError, TypeError, ValueError) as problem:
        raise DataError(
            f"{path}: does not say what it holds ({problem}); make the caches again where the pictures are"
        ) from problem


def _pair(values: Any) -> Size:
    first, second = values
    return int(first), int(second)


def _kind(common: Common) -> Item:
    """What items have in common, as an item without names."""
    size, (bucket, resized, crop, filtering), mask, views, squashed, interpolation, background = common
    return Item(
        id="", key="", path=Path(), caption="", cache_directory=Path(), size=tuple(size),
        placement=Placement(tuple(bucket), tuple(resized), tuple(crop), filtering), num_repeats=1, batch_size=1,
        mask=None if mask is None else Mask(mask[0], alpha=mask[1]),
        views=tuple(View((x, y), flip, hue, gamma) for x, y, flip, hue, gamma in views),
        squashed=squashed, interpolation=interpolation, background=background,
    )  # fmt: skip


def _common(kind: Item) -> Common:
    put, mask = kind.placement, kind.mask
    return (
        kind.size, (put.bucket, put.resized, put.crop, put.filter), None if mask is None else (mask.source, mask.alpha),
        [(*view.crop, view.flip, view.hue, view.gamma) for view in kind.views], kind.squashed, kind.interpolation, kind.background,
    )  # fmt: skip


def _with_caches(folders: Sequence[str]) -> list[str]:
    return [name for name in folders if name != FOLDER and not name.startswith(READING)]


def _folders(root: Path) -> dict[str, list[int]]:
    """State of every folder below a root that may hold caches."""
    found = {}
    for folder, below, _ in os.walk(root):
        below[:] = _with_caches(below)
        status = Path(folder).stat()
        found[os.path.relpath(folder, root)] = [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return found


def _state_before(root: Path) -> dict[str, list[int]] | None:
    """State of the folders before their files are read; None if a table of them is not worth keeping, or cannot be."""
    if sum(len(names) for _, _, names in os.walk(root)) < 2 * LEAST_KEPT:
        return None
    try:
        (root / FOLDER).mkdir(exist_ok=True)
        found = _folders(root)
        newest = max(max(state[:2]) for state in found.values())
        time.sleep(rest_of_tick({"mtime_ns": newest, "ctime_ns": newest}) / 1e9)  # a later change then shows
        return found
    except OSError:
        return None


def _save(table: ItemTable, code: str, before: dict[str, list[int]]) -> None:
    """Keep a table, unless a folder changed meanwhile; where nothing can be written, headers are read at each start."""
    path = table.root / FOLDER / f"{code}.npz"
    try:
        if _folders(table.root) != before:
            return
        columns: dict[str, Any] = {"folders": table.folders, "kind": table.kind}
        for name in TEXTS:
            texts = getattr(table, name)
            columns[name] = np.frombuffer("".join(texts).encode("utf-8", "surrogatepass"), np.uint8)
            columns[f"{name}.lengths"] = np.array([len(text) for text in texts], np.int64)
        about: dict[str, Any] = {
            "version": VERSION, "state": before, "places": table.places, "kinds": [_common(kind) for kind in table.kinds],
            "spare": table.spare, "layouts": {}, "precisions": {},
        }  # fmt: skip
        for kind, files in table.files.items():
            about["layouts"][kind], about["precisions"][kind] = files.layouts, dict(files.precisions)
            for name in COLUMNS:
                columns[f"{kind}.{name}"] = getattr(files, name)
        columns["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **columns)

        replace_file(path, write)
    except OSError:
        return


def _is_still(root: Path, folders: dict[str, list[int]]) -> bool:
    """Whether folders are in the state in which they were; a new one below them would change it."""
    for name, state in folders.items():
        status = (root / name).stat()
        if [status.st_mtime_ns, status.st_ctime_ns, status.st_ino] != state:
            return False
    return True


def _texts(letters: Any, lengths: Any) -> list[str]:
    """The texts of a column."""
    whole, ends = letters.tobytes().decode("utf-8", "surrogatepass"), [0, *np.cumsum(lengths).tolist()]
    if ends[-1] != len(whole):
        raise ValueError("texts are cut short")
    return [whole[begin:end] for begin, end in pairwise(ends)]


def _load(root: Path, code: str) -> ItemTable | None:
    """What is kept of a folder; None if nothing is, or the folder has changed."""
    try:
        with (root / FOLDER / f"{code}.npz").open("rb") as file, np.load(file) as stored:
            about = json.loads(stored["about"].tobytes())
            if about["version"] != VERSION or not _is_still(root, about["state"]):
                return None
            texts = {name: _texts(stored[name], stored[f"{name}.lengths"]) for name in TEXTS}
            files = {
                kind: Files(
                    layouts,
                    **{name: stored[f"{kind}.{name}"] for name in COLUMNS},
                    precisions=Counter(about["precisions"][kind]),
                )
                for kind, layouts in about["layouts"].items()
            }  # fmt: skip
            return ItemTable(
                root, **texts, folders=stored["folders"], places=about["places"], kinds=[_kind(each) for each in about["kinds"]],
                kind=stored["kind"], files=files, spare=about["spare"],
            )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error, BadZipFile):
        return None
