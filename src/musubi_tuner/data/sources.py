"""What there is to train on: images with captions, found in folders and JSONL files. Torch-free.

Everything wrong with the data is collected and raised at once, before anything is encoded.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.buckets import BucketSelector, Placement, Size, place
from musubi_tuner.data.images import EXTENSIONS, has_alpha, image_size
from musubi_tuner.data.masks import Mask
from musubi_tuner.errors import DataError

_SHOWN = 10


@dataclass(frozen=True)
class Item:
    """One image with its caption.

    Attributes:
        id: path relative to the dataset's root, POSIX, without extension; the key of its random draws.
        key: the same with the dataset's number in front, unique in the run.
        cache_directory: folder of its cache files (a sub-folder mirrors the image's where needed).
        size: (width, height) upright. placement: how it becomes its bucket.
        mask: where its loss mask comes from; None if it has none.
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

    @property
    def stem(self) -> str:
        """Beginning of its cache file names."""
        return self.path.stem

    @property
    def bucket(self) -> Size:
        """(width, height) it is trained at."""
        return self.placement.bucket


@dataclass
class Found:
    """The usable items of all datasets, and what a user should know about the rest."""

    items: list[Item]
    notes: list[str]


def scan(datasets: Iterable[DatasetConfig], architecture: str) -> Found:
    """List the items of all datasets, sorted by dataset and id.

    Raises:
        DataError: listing unreadable images, missing captions, equal stems and broken JSONL lines together.
    """
    problems: list[str] = []
    notes: list[str] = []
    items: list[Item] = []
    for index, dataset in enumerate(datasets):
        before, noted = len(problems), len(notes)
        entries = list(_entries(dataset, problems, notes))
        if not entries and len(problems) == before and len(notes) > noted:
            problems.append(f"{notes[-1]}; so nothing is left of {_root_name(dataset)}: write captions")
        elif not entries and len(problems) == before:
            problems.append(f"{dataset.name}: {_root_name(dataset)} holds no images ({', '.join(EXTENSIONS)})")
        items += _items(index, dataset, entries, architecture, problems)
    problems += _shared_files(items)
    if problems:
        raise DataError(_join(problems))
    return Found(items, notes)


def _shared_files(items: list[Item]) -> list[str]:
    """Items of different datasets that would write the same cache files."""
    owners: dict[tuple[Path, str], Item] = {}
    folders: dict[Path, str] = {}
    for item in items:
        place = (item.cache_directory.resolve(), item.stem)
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


@dataclass(frozen=True)
class _Entry:
    path: Path
    caption: str
    id: str
    mask_path: Path | None = None


def _entries(dataset: DatasetConfig, problems: list[str], notes: list[str]) -> Iterator[_Entry]:
    if dataset.image_directory is not None:
        yield from _directory(dataset, dataset.image_directory, problems, notes)
    else:
        yield from _jsonl(dataset, problems, notes)


def _directory(dataset: DatasetConfig, root: Path, problems: list[str], notes: list[str]) -> Iterator[_Entry]:
    if not root.is_dir():
        problems.append(f"{dataset.name}.image_directory: {root}: no such folder")
        return
    others = [dataset.cache_directory] + ([dataset.mask_directory] if dataset.mask_directory else [])
    images = _images(root, dataset.recursive, [folder for folder in others if folder.resolve() != root.resolve()])
    masks = _mask_files(dataset, problems)
    missing: list[Path] = []
    for path in images:
        caption = _caption(path.with_suffix(dataset.caption_extension), problems)
        if caption is None:
            missing.append(path)
            if dataset.missing_caption in ("error", "skip"):
                continue
            caption = "" if dataset.missing_caption == "empty" else path.stem.replace("_", " ").replace("-", " ")
        name = path.relative_to(root).with_suffix("").as_posix()
        yield _Entry(path, caption, name, masks.get(name))
    ids = {path.relative_to(root).with_suffix("").as_posix() for path in images}
    spare = sorted(str(path) for name, path in masks.items() if name not in ids)
    if spare:
        names = ", ".join(Path(text).name for text in spare[:3]) + (", ..." if len(spare) > 3 else "")
        notes.append(f"{dataset.name}: {len(spare)} files in {dataset.mask_directory} belong to no image ({names})")
    if missing:
        names = ", ".join(path.name for path in missing[:3]) + (", ..." if len(missing) > 3 else "")
        text = f"{len(missing)} of {len(images)} images in {root} have no {dataset.caption_extension} file ({names})"
        if dataset.missing_caption == "error":
            problems.append(
                f'{dataset.name}: {text}; write the captions, or set missing_caption = "skip", "empty" or "stem"'
            )
        else:
            notes.append(f'{dataset.name}: {text}; missing_caption = "{dataset.missing_caption}"')


def _images(root: Path, recursive: bool, without: list[Path]) -> list[Path]:
    """Picture files of a folder, sorted; those below the folders ``without`` are left out."""
    walk = root.rglob("*") if recursive else root.iterdir()
    left_out = [folder.resolve() for folder in without]
    return sorted(
        path
        for path in walk
        if path.suffix.lower() in EXTENSIONS
        and path.is_file()
        and not path.name.startswith(".")
        and not any(path.resolve().is_relative_to(folder) for folder in left_out)
    )


def _mask_files(dataset: DatasetConfig, problems: list[str]) -> dict[str, Path]:
    """The files of the mask folder by the id of their image; whatever their extension."""
    root, found = dataset.mask_directory, dict[str, Path]()
    if root is None:
        return found
    if not root.is_dir():
        problems.append(f"{dataset.name}.mask_directory: {root}: no such folder")
        return found
    for path in _images(root, dataset.recursive, []):
        first = found.setdefault(path.relative_to(root).with_suffix("").as_posix(), path)
        if first != path:
            problems.append(f"{first} and {path} are masks of the same image; keep one")
    return found


def _caption(path: Path, problems: list[str]) -> str | None:
    """The whole file, stripped; None if there is none."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        problems.append(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8")
        return ""
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
        return ""


def _jsonl(dataset: DatasetConfig, problems: list[str], notes: list[str]) -> Iterator[_Entry]:
    source = dataset.image_jsonl_file
    assert source is not None
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        problems.append(f"{dataset.name}.image_jsonl_file: {source}: no such file")
        return
    except UnicodeDecodeError as error:
        problems.append(f"{source}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8")
        return
    rows: list[tuple[Path, str, Path | None]] = []
    missing: list[str] = []
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        count += 1
        row = _row(line, f"{source} line {number}", source.parent, dataset, problems, missing)
        if row:
            rows.append(row)
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        notes.append(
            f"{dataset.name}: {len(missing)} of {count} lines in {source} have no caption ({names}); "
            f'missing_caption = "{dataset.missing_caption}"'
        )
    parent = _common_parent([path for path, _, _ in rows])
    for path, caption, mask in sorted(rows, key=lambda row: row[:2]):
        yield _Entry(path, caption, path.absolute().relative_to(parent).with_suffix("").as_posix(), mask)


def _row(
    line: str, where: str, folder: Path, dataset: DatasetConfig, problems: list[str], missing: list[str]
) -> tuple[Path, str, Path | None] | None:
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
    text, caption = row.get("image_path", row.get("image_path_0")), row.get("caption")
    if not isinstance(text, str):
        problems.append(f"{where}: image_path is missing")
        return None
    path = _near(text, folder)
    if not path.is_file():
        problems.append(f"{where}: image {text}: no such file")
        return None
    mask = _row_mask(row.get("mask_path"), where, folder, dataset, problems)
    if caption is None:
        if dataset.missing_caption != "error":
            missing.append(path.name)
        match dataset.missing_caption:
            case "error":
                problems.append(
                    f'{where}: caption is missing; write it, or set missing_caption = "skip", "empty" or "stem"'
                )
                return None
            case "skip":
                return None
            case "empty":
                caption = ""
            case "stem":
                caption = path.stem.replace("_", " ").replace("-", " ")
    if not isinstance(caption, str):
        problems.append(f"{where}: caption is {caption!r}, expected a text")
        return None
    return path, caption.strip(), mask


def _near(text: str, folder: Path) -> Path:
    """A path of a JSONL file: as it is, or below the folder of the file."""
    path = Path(text)
    return folder / path if not path.is_absolute() and not path.exists() and (folder / path).exists() else path


def _row_mask(value: object, where: str, folder: Path, dataset: DatasetConfig, problems: list[str]) -> Path | None:
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
    path = _near(value, folder)
    if not path.is_file():
        problems.append(f"{where}: mask {value}: no such file")
        return None
    return path


def _common_parent(paths: list[Path]) -> Path:
    parents = [path.absolute().parent for path in paths]
    if not parents:
        return Path()
    common = parents[0]
    while not all(parent.is_relative_to(common) for parent in parents):
        common = common.parent
    return common


def _items(
    index: int, dataset: DatasetConfig, entries: list[_Entry], architecture: str, problems: list[str]
) -> Iterator[Item]:
    by_id: dict[str, Path] = {}
    selector = BucketSelector(dataset.resolution, architecture, dataset.enable_bucket, dataset.bucket_no_upscale)
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
            size = image_size(entry.path)
            bucket = selector.select(size)
            mask = _mask(dataset, entry, size)
        except DataError as error:
            text = str(error)
            named = str(entry.path) in text or (entry.mask_path is not None and str(entry.mask_path) in text)
            problems.append(text if named else f"{entry.path}: {text}")
            continue
        folder = entry.id.rpartition("/")[0]
        yield Item(
            id=entry.id,
            key=f"{index}:{entry.id}",
            path=entry.path,
            caption=entry.caption,
            cache_directory=dataset.cache_directory / folder if folder else dataset.cache_directory,
            size=size,
            placement=place(size, bucket),
            num_repeats=dataset.num_repeats,
            batch_size=dataset.batch_size,
            mask=mask,
        )


def _mask(dataset: DatasetConfig, entry: _Entry, size: Size) -> Mask | None:
    """Where the mask of an image comes from.

    Raises:
        DataError: if its file is not a picture of the image's size.
    """
    match dataset.mask_source:
        case "none":
            return None
        case "product":
            return Mask("product")
        case "alpha":
            return Mask("alpha") if has_alpha(entry.path) else None
    if entry.mask_path is None:
        return None
    found = image_size(entry.mask_path)
    if found != size:
        raise DataError(
            f"{entry.mask_path}: is {found[0]}x{found[1]}, its image {entry.path} is {size[0]}x{size[1]}; save the mask at the "
            "size of the image"
        )
    return Mask(dataset.mask_source, entry.mask_path)


def _with_progress(entries: list[_Entry], name: str) -> Iterable[_Entry]:
    """A bar for large folders only: measuring 5,000 images takes about a second."""
    if len(entries) < 5000:
        return entries
    from tqdm import tqdm

    return tqdm(entries, desc=f"measuring {name}", unit="image", leave=False)
