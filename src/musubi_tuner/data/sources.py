"""What there is to train on: images with captions, found in folders and JSONL files. Torch-free.

Everything wrong with the data is collected and raised at once, before anything is encoded.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

from tqdm import tqdm

from musubi_tuner.config.datasets import KEPT, DatasetConfig
from musubi_tuner.data.buckets import BucketSelector, Placement, Size, filtered, place, squash
from musubi_tuner.data.caption_files import WAY_OUT, folder_captions
from musubi_tuner.data.caption_variants import unread_wildcard, variants
from musubi_tuner.data.captions import Transform, make_transform
from musubi_tuner.data.folders import Listing, list_pictures
from musubi_tuner.data.images import EXTENSIONS, Header, read_picture_header
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import ItemTable, items_of_caches
from musubi_tuner.data.masks import Mask, belonging
from musubi_tuner.data.roots import Root, find_root
from musubi_tuner.data.shards import list_shards, recorded_files, shard_names
from musubi_tuner.data.texts import Names, first_names, is_blank, read_text
from musubi_tuner.data.views import View, views
from musubi_tuner.errors import ConfigError, DataError

_SHOWN = 10
_KOHYA = re.compile(r"(\d+)_.+")
"""Folders whose names begin with a number of repeats, in the layout of kohya's scripts."""
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")


@dataclass
class ScannedItems:
    """The usable items of all datasets, and what a user should know about the rest.

    Attributes:
        roots: of datasets from JSONL files; whoever fills their cache folders keeps them.
    """

    items: Sequence[Item]
    notes: list[str]
    roots: list[Root] = field(default_factory=list)


def scan(datasets: Sequence[DatasetConfig], architecture: str, *, listed: bool = False) -> ScannedItems:
    """List the items of all datasets, sorted by dataset and id.

    Args:
        listed: they will be listed one by one, as for a validation split; nothing that is kept of caches is believed then.

    Raises:
        DataError: listing unreadable images, missing captions, equal stems and broken JSONL lines together.
    """
    problems: list[str] = []
    notes: list[str] = []
    items: list[Item] = []
    roots: list[Root] = []
    for index, dataset in enumerate(datasets):
        if dataset.stream is not None:
            if dataset.stream.cached:
                items += _of_shards(index, dataset, architecture, notes)
            else:
                items.append(stream_item(index, dataset, architecture, notes))
            continue
        if dataset.precached:
            table = _precached(index, dataset, architecture, problems, keeps=len(datasets) == 1 and not listed)
            if len(datasets) == 1 and not problems:
                return ScannedItems(table, notes)
            items += table
            continue
        before, noted = len(problems), len(notes)
        entries = list(_entries(dataset, problems, notes, roots))
        if not entries and len(problems) == before and dataset.missing_caption == "skip" and len(notes) > noted:
            said = "; ".join(notes[noted:])
            problems.append(f"{said}; so nothing is left of {_root_name(dataset)}: write captions")
        elif not entries and len(problems) == before:
            problems.append(f"{dataset.name}: {_root_name(dataset)} holds no images ({', '.join(EXTENSIONS)})")
        items += _items(index, dataset, entries, architecture, problems, notes)
    problems += _shared_files(items)
    items = _balanced(items, [dataset.is_reg for dataset in datasets])
    if problems:
        raise DataError(_join(problems))
    return ScannedItems(items, notes, roots)


def _precached(index: int, dataset: DatasetConfig, architecture: str, problems: list[str], *, keeps: bool) -> ItemTable:
    """Items of a data set without pictures."""
    folder, before = dataset.cache_directory, len(problems)
    found = items_of_caches(folder, architecture, problems, keeps=keeps)
    if not found and len(problems) == before:
        problems.append(
            f"{dataset.name}.cache_directory: {folder} holds no latents (files ending in _{architecture}.safetensors)"
        )
    return found.of(index, dataset.num_repeats, dataset.batch_size)


def _of_shards(index: int, dataset: DatasetConfig, architecture: str, notes: list[str]) -> Iterator[Item]:
    """Items of the shards that were read, from their caches; one item for each of the others.

    Raises:
        DataError: if there are no shards. ConfigError: if there is no bucket.
    """
    assert dataset.stream is not None
    shards = shard_names(list_shards(dataset.stream))
    bucket = selector_of(dataset, architecture).select(dataset.resolution)
    unread = 0
    for name in sorted(shards):
        folder, problems = dataset.cache_directory / name, list[str]()
        files = recorded_files(folder, "latents")
        if files is not None:
            found = items_of_caches(folder, architecture, problems, only=set(files))
            if len(found) == len(files) and not problems:
                found = found.of(index, dataset.num_repeats, dataset.batch_size)
                yield from (replace(item, shard=name) for item in found)
                continue
        unread += 1
        yield Item(
            id=name,
            key=f"{index}:{name}",
            path=Path(name),
            caption="",
            cache_directory=folder,
            size=bucket,
            placement=place(bucket, bucket),
            num_repeats=dataset.stream.shard_samples * dataset.num_repeats,
            batch_size=dataset.batch_size,
            shard=name,
        )
    if unread:
        notes.append(
            f"{dataset.name}: {unread} of {len(shards)} shards are not read yet; each counts as {dataset.stream.shard_samples} pictures "
            "(shard_samples) until then"
        )


def stream_item(index: int, dataset: DatasetConfig, architecture: str, notes: list[str]) -> Item:
    """What stands for all pictures of a stream where they are counted: it repeats as often as an epoch has pictures.

    Raises:
        DataError: if there are no shards. ConfigError: if there is no bucket.
    """
    settings = dataset.stream
    assert settings is not None
    shards = list_shards(settings)
    length = settings.epoch_samples or len(shards) * settings.shard_samples
    counted = "epoch_samples" if settings.epoch_samples else f"shards x {settings.shard_samples}, shard_samples"
    notes.append(
        f"{dataset.name}: a stream of {len(shards)} shards, read in an order of its own and not kept; {length:,} pictures count as an epoch ({counted})"
    )
    bucket = selector_of(dataset, architecture).select(dataset.resolution)
    name = " ".join(
        settings.shards or filter(None, (settings.dataset_name, settings.dataset_config_name, settings.dataset_split))
    )
    return Item(
        id=name,
        key=f"{index}:{name}",
        path=Path(name),
        caption="",
        cache_directory=dataset.cache_directory,
        size=bucket,
        placement=place(bucket, bucket),
        num_repeats=length,
        batch_size=dataset.batch_size,
    )


def selector_of(dataset: DatasetConfig, architecture: str) -> BucketSelector:
    """The buckets of a data set.

    Raises:
        ConfigError: if there are none.
    """
    low, high = dataset.bucket_sides
    return BucketSelector(
        dataset.resolution, architecture, dataset.enable_bucket, dataset.bucket_no_upscale, step=dataset.bucket_step,
        min_side=low, max_side=high,
    )  # fmt: skip


def placement_of(size: Size, dataset: DatasetConfig, selector: BucketSelector) -> Placement:
    """How a picture of this size becomes its bucket.

    Raises:
        DataError: if it is too small.
    """
    put = squash if dataset.resize == "squash" else place
    return filtered(put(size, selector.select(size)), dataset.interpolation)


def _balanced(items: list[Item], is_reg: Sequence[bool]) -> list[Item]:
    """Items with regularisation images repeated until an epoch has as many presentations of them as of the others."""
    wanted = sum(item.num_repeats for item in items if not is_reg[item.dataset])
    regular = [item for item in items if is_reg[item.dataset]]
    missing = wanted - sum(item.num_repeats for item in regular)
    if not regular or missing <= 0:
        return items
    each, rest = divmod(missing, len(regular))
    more = {item.key: each + (number < rest) for number, item in enumerate(regular)}
    return [replace(item, num_repeats=item.num_repeats + more.get(item.key, 0)) for item in items]


def _shared_files(items: list[Item]) -> list[str]:
    """Items of different datasets that would write the same cache files."""
    owners: dict[tuple[Path, str], Item] = {}
    folders: dict[Path, str] = {}
    resolved: dict[Path, Path] = {}
    for item in items:
        if item.cache_directory not in resolved:
            resolved[item.cache_directory] = item.cache_directory.resolve()
        place = (resolved[item.cache_directory], item.stem)
        other = owners.setdefault(place, item)
        if other is not item:
            folders.setdefault(place[0], f"{other.path} and {item.path}")
    return [
        f"two datasets write their caches into {folder} (for {pair}); give one another cache_directory"
        for folder, pair in folders.items()
    ]


def _join(problems: list[str]) -> str:
    shown = problems[: 2 * _SHOWN]
    rest = [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    return "\n  ".join([f"data: {count}", *shown, *rest])


def _root_name(dataset: DatasetConfig) -> str:
    return str(dataset.image_directory or dataset.image_jsonl_file)


def _elsewhere(dataset: DatasetConfig) -> str:
    """Where the images of a folder without any may be, to be added to that message."""
    root, found = dataset.image_directory, ""
    if root is None:
        return ""
    if not dataset.recursive:
        below = Counter(path.relative_to(root).parts[0] for path in _listing(dataset, root, True).pictures)
        if below:
            counts = first_names([f"{name}: {count}" for name, count in sorted(below.items())])
            found += f"; its sub-folders hold {sum(below.values())} ({counts}): set recursive = true"
            found += f". {text}" if (text := _kohya(list(below))) else ""
    names = sorted(path.name for path in root.iterdir() if path.is_file())
    archives = [name for name in names if name.lower().endswith(_ARCHIVES)]
    listings = [name for name in names if name.lower().endswith(".jsonl")]
    if archives:
        found += f"; {first_names(archives)} may hold them: unpack it, archives are not read"
    if listings:
        found += f"; {first_names(listings)} may list them: name it in image_jsonl_file instead of image_directory"
    return found


def _kohya(folders: Iterable[str]) -> str:
    """What to do about folders with kohya's names; empty if there are none."""
    numbers = {name: match[1] for name in sorted(folders) if (match := _KOHYA.fullmatch(name))}
    if not numbers:
        return ""
    name, number = next(iter(numbers.items()))
    return (
        f"Numbers in front of names ({first_names(list(numbers))}) are repeats for kohya's scripts and are not read here: give each such "
        f'folder [[datasets]] of its own, image_directory = ".../{name}" with num_repeats = {int(number)}'
    )


@dataclass(frozen=True)
class _Entry:
    path: Path
    captions: tuple[str, ...]
    id: str
    mask_path: Path | None = None


def _entries(dataset: DatasetConfig, problems: list[str], notes: list[str], roots: list[Root]) -> Iterator[_Entry]:
    try:
        transform = make_transform(dataset.caption_transform, dataset.beside)
    except DataError as error:
        problems.append(f"{dataset.name}.{error}")
        return
    if dataset.image_directory is not None:
        yield from _directory(dataset, dataset.image_directory, transform, problems, notes)
    else:
        yield from _jsonl(dataset, transform, problems, notes, roots)


def _transformed(
    transform: Transform, captions: list[str], columns: Mapping[str, Any], where: str, problems: list[str]
) -> tuple[str, ...]:
    """Captions after the transform; empty ones beside others are left out. None remain where something is wrong."""
    try:
        found = [caption.strip() for caption in transform(captions, columns)]
    except DataError as error:
        problems.append(f"{where}: {error}")
        return ()
    return tuple(caption for caption in found if caption) or tuple(found[:1])


def _directory(
    dataset: DatasetConfig, root: Path, transform: Transform, problems: list[str], notes: list[str]
) -> Iterator[_Entry]:
    if not root.is_dir():
        problems.append(f"{dataset.name}.image_directory: {root}: no such folder")
        return
    listing = _listing(dataset, root, dataset.recursive)
    images, left_out = listing.pictures, [f"{dataset.name}: {note}" for note in listing.notes]
    notes += left_out
    problems += listing.problems
    if not images and not listing.problems:
        head = f"{dataset.name}: {root} holds no images ({', '.join(EXTENSIONS)}){_elsewhere(dataset)}"
        problems.append("\n    ".join([head, *left_out]))
    masks = _mask_files(dataset, problems, notes)
    for path, caption in folder_captions(dataset, root, images, problems, notes).items():
        columns = {"image_path": str(path)}
        if caption is None and dataset.text.class_tokens:
            caption = dataset.text.class_tokens
        if caption is None:
            if dataset.missing_caption in ("error", "skip"):
                transform([], columns)
                continue
            caption = "" if dataset.missing_caption == "empty" else path.stem.replace("_", " ").replace("-", " ")
        name = path.relative_to(root).with_suffix("").as_posix()
        captions = _transformed(transform, [caption], columns, str(path), problems)
        if captions:
            yield _Entry(path, captions, name, masks.get(normalize("NFC", name)))
    ids = {normalize("NFC", path.relative_to(root).with_suffix("").as_posix()) for path in images}
    spare = sorted(str(path) for name, path in masks.items() if name not in ids)
    if spare:
        names = first_names([Path(text).name for text in spare])
        meant = belonging([name for name in masks if name not in ids], ids)
        hint = f"; a mask has the name of its image, so {meant}" if meant else ""
        notes.append(
            f"{dataset.name}: {len(spare)} files in {dataset.mask_directory} belong to no image ({names}){hint}"
        )
    folders = {path.relative_to(root).parts[0] for path in images if path.parent != root}
    if images and not dataset.recursive:
        folders = {path.name for path in root.iterdir() if _KOHYA.fullmatch(path.name) and path.is_dir()}
        folders = {name for name in folders if _listing(dataset, root / name, False).pictures}
    kohya = _kohya(folders)
    if kohya:
        notes.append(f"{dataset.name}: {'' if dataset.recursive else 'sub-folders are left out. '}{kohya}")


def _listing(dataset: DatasetConfig, folder: Path, recursive: bool) -> Listing:
    """Pictures of the image folder or of one below it, without what caches, masks and runs keep there."""
    own = [dataset.cache_directory] + ([dataset.mask_directory] if dataset.mask_directory else [])
    return list_pictures(folder, recursive, apart=dataset.apart, silently=own)


def _mask_files(dataset: DatasetConfig, problems: list[str], notes: list[str]) -> dict[str, Path]:
    """The files of the mask folder by the id of their image; whatever their extension."""
    root, found = dataset.mask_directory, dict[str, Path]()
    if root is None:
        return found
    if not root.is_dir():
        problems.append(f"{dataset.name}.mask_directory: {root}: no such folder")
        return found
    listing = list_pictures(root, dataset.recursive)
    problems += listing.problems
    notes += [f"{dataset.name}: masks: {note}" for note in listing.notes]
    for path in listing.pictures:
        first = found.setdefault(normalize("NFC", path.relative_to(root).with_suffix("").as_posix()), path)
        if first != path:
            problems.append(f"{first} and {path} are masks of the same image; keep one")
    return found


@dataclass(frozen=True, order=True)
class _Row:
    path: Path
    captions: tuple[str, ...]
    mask: Path | None = field(compare=False)


def _jsonl(
    dataset: DatasetConfig, transform: Transform, problems: list[str], notes: list[str], roots: list[Root]
) -> Iterator[_Entry]:
    source = dataset.image_jsonl_file
    assert source is not None
    try:
        lines = read_text(source).split("\n")
    except FileNotFoundError:
        problems.append(f"{dataset.name}.image_jsonl_file: {source}: no such file")
        return
    except DataError as error:
        problems.append(str(error))
        return
    names = Names()
    rows: list[_Row] = []
    missing: list[str] = []
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        count += 1
        row = _row(line, f"{source} line {number}", source.parent, dataset, transform, problems, missing, names)
        if row:
            rows.append(row)
    if missing:
        notes.append(
            f"{dataset.name}: {len(missing)} of {count} lines in {source} have no caption ({first_names(missing)}); "
            f'missing_caption = "{dataset.missing_caption}"'
        )
    # Without "..", which would lead out of the cache folder; links stay, for they are how the list names its pictures.
    paths = [Path(os.path.normpath(row.path.absolute())) for row in rows]
    root = find_root(dataset.cache_directory, {path: row.captions for path, row in zip(paths, rows, strict=True)})
    roots.append(root)
    for row, path in sorted(zip(rows, paths, strict=True)):
        yield _Entry(row.path, row.captions, root.id_of(path), row.mask)


def _row(
    line: str,
    where: str,
    folder: Path,
    dataset: DatasetConfig,
    transform: Transform,
    problems: list[str],
    missing: list[str],
    names: Names,
) -> _Row | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        problems.append(f"{where}: not JSON ({error.msg} at column {error.colno})")
        return None
    if not isinstance(row, dict):
        problems.append(f"{where}: is {line.strip()[:40]}, expected an object with image_path and caption")
        return None
    for key in row:
        if key.startswith(("control_path", "image_path_")) and key != "image_path_0":
            problems.append(f"{where}: {key} is for editing models; this architecture takes one image per line")
            return None
    text = row.get("image_path", row.get("image_path_0"))
    if not isinstance(text, str):
        problems.append(f"{where}: image_path is missing")
        return None
    path = _near(text, folder, names)
    if not path.is_file():
        problems.append(f"{where}: image {text}: no such file")
        return None
    mask = _row_mask(row.get("mask_path"), where, folder, dataset, problems, names)
    given = {column: row.get(column) for column in dataset.caption_columns or ("caption",)}
    wrong = [column for column, value in given.items() if value is not None and not isinstance(value, str)]
    if wrong:
        problems.append(f"{where}: {wrong[0]} is {given[wrong[0]]!r}, expected a text")
        return None
    captions = [value.strip() for value in given.values() if value is not None and not is_blank(value)]
    broken = [column for column, value in given.items() if value is not None and "\0" in value]
    if broken:
        problems.append(f"{where}: {broken[0]} holds a NUL character; write plain text")
        return None
    if not captions and dataset.text.class_tokens:
        captions = [dataset.text.class_tokens]
    if not captions and dataset.caption_transform != "imagenet":
        if dataset.missing_caption != "error":
            missing.append(path.name)
        match dataset.missing_caption:
            case "error":
                state = "missing" if given.get("caption") is None else "empty"
                problems.append(f"{where}: {' and '.join(given)} is {state}; write it, or {WAY_OUT}")
                return None
            case "skip":
                transform([], row)
                return None
            case "empty":
                captions = [""]
            case "stem":
                captions = [path.stem.replace("_", " ").replace("-", " ")]
    made = _transformed(transform, captions, row, where, problems)
    return _Row(path, made, mask) if made else None


def in_listed_order(items: Iterable[Item], dataset: DatasetConfig) -> list[Item]:
    """Items of one dataset in the order of their source: a folder by file name, a JSONL file by line.

    Caches of other programs know items by this order only; `scan` sorts by id, which differs (``a-1.png`` before ``a.png``).
    """
    if dataset.image_jsonl_file is None:
        return sorted(items, key=lambda item: item.path)
    rows = [json.loads(line) for line in read_text(dataset.image_jsonl_file).split("\n") if line.strip()]
    folder, names = dataset.image_jsonl_file.parent, Names()
    paths = [_near(row.get("image_path", row.get("image_path_0")), folder, names) for row in rows]
    place = {path: index for index, path in enumerate(paths)}
    return sorted(items, key=lambda item: place[item.path])


def _near(text: str, folder: Path, names: Names) -> Path:
    """A path of a JSONL file: as it is, or below the folder of the file; else one whose names differ in form only."""
    path = Path(text)
    places = [path] if path.is_absolute() else [path, folder / path]
    known = [place for place in places if place.exists()] or [
        found for place in places if (found := names.find(place)).exists()
    ]
    return known[0] if known else path


def _row_mask(
    value: object, where: str, folder: Path, dataset: DatasetConfig, problems: list[str], names: Names
) -> Path | None:
    """The mask that a line names; an empty one counts as none."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        problems.append(f"{where}: mask_path is {value!r}, expected a text")
        return None
    if dataset.mask_source not in ("file", "smpl"):
        problems.append(
            f'{where}: has a mask_path, but mask_source is "{dataset.mask_source}", which reads no mask files'
        )
        return None
    path = _near(value, folder, names)
    if not path.is_file():
        problems.append(f"{where}: mask {value}: no such file")
        return None
    return path


def _items(
    index: int, dataset: DatasetConfig, entries: list[_Entry], architecture: str, problems: list[str], notes: list[str]
) -> Iterator[Item]:
    by_id: dict[str, Path] = {}
    remarks: dict[str, list[str]] = {}
    try:
        selector = selector_of(dataset, architecture)
    except ConfigError as error:
        problems.append(f"{dataset.name}: {error}")
        return
    counts = Counter(entry.id for entry in entries)
    for entry in _with_progress(sorted(entries, key=lambda entry: entry.id), dataset.name):
        if counts[entry.id] > 1:
            if entry.id in by_id:
                first = by_id[entry.id]
                problems.append(
                    f"{entry.path} is listed twice; keep one line of it"
                    if first.absolute() == entry.path.absolute()
                    else f"{first} and {entry.path} have the same name without extension, so they would share one cache file; "
                    "rename one"
                )
            by_id[entry.id] = entry.path
            continue
        try:
            header = read_picture_header(entry.path)
            size = header.size
            placement = placement_of(size, dataset, selector)
            mask = _mask(dataset, entry, header)
        except DataError as error:
            text = str(error)
            named = str(entry.path) in text or (entry.mask_path is not None and str(entry.mask_path) in text)
            problems.append(text if named else f"{entry.path}: {text}")
            continue
        for remark in header.remarks:
            remarks.setdefault(remark, []).append(entry.path.name)
        folder = entry.id.rpartition("/")[0]
        captions = variants(entry.captions, dataset.text, entry.id)
        if dataset.text.enable_wildcard:
            for remark in {found for text in entry.captions if (found := unread_wildcard(text))}:
                remarks.setdefault(f"have captions with {remark}", []).append(entry.path.name)
        own = views(entry.id, placement, dataset.views)
        yield Item(
            id=entry.id,
            key=f"{index}:{entry.id}",
            path=entry.path,
            caption=captions[0],
            cache_directory=dataset.cache_directory / folder if folder else dataset.cache_directory,
            size=size,
            placement=placement,
            num_repeats=dataset.num_repeats,
            batch_size=dataset.batch_size,
            mask=mask,
            more_captions=captions[1:],
            squashed=dataset.resize == "squash",
            interpolation=dataset.interpolation,
            background=dataset.alpha_background if header.alpha else KEPT,
            views=own if own != (View(placement.crop),) else (),
        )
    for remark, files in sorted(remarks.items()):
        names = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        notes.append(f"{dataset.name}: {len(files)} files {remark} ({names})")


def _mask(dataset: DatasetConfig, entry: _Entry, image: Header) -> Mask | None:
    """Where the mask of an image comes from.

    Raises:
        DataError: if its file is not a picture of the image's size.
    """
    match dataset.mask_source:
        case "none":
            return None
        case "product" | "imported":
            return Mask(dataset.mask_source)
        case "alpha":
            return Mask("alpha") if image.alpha else None
    if entry.mask_path is None:
        return None
    found, size = read_picture_header(entry.mask_path), image.size
    if found.size != size:
        raise DataError(
            f"{entry.mask_path}: is {found.size[0]}x{found.size[1]}, its image {entry.path} is {size[0]}x{size[1]}; save the "
            "mask at the size of the image"
        )
    return Mask(dataset.mask_source, entry.mask_path, found.alpha)


def _with_progress(entries: list[_Entry], name: str) -> Iterable[_Entry]:
    """A bar for large folders only: measuring 5,000 images takes about a second."""
    if len(entries) < 5000:
        return entries
    return tqdm(entries, desc=f"measuring {name}", unit="image", leave=False)
