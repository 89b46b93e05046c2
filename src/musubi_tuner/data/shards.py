"""WebDataset shards and data sets of Hugging Face: which parts there are, and the samples in one. Torch-free.

A shard is a tar file in which files of one name, such as ``000.jpg`` and ``000.json``, are a sample. It is local, behind an http address,
or in a data set of the hub, for which a token is taken from the environment (HF_TOKEN) by the hub's own library and seen by nobody else.
A data set of Hugging Face is read as a stream, by the files that it consists of; one of these counts as a shard.
"""

import json
import re
import tarfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import IO, Any

from musubi_tuner.config.streams import StreamSettings
from musubi_tuner.data.folders import is_hidden
from musubi_tuner.data.images import EXTENSIONS
from musubi_tuner.errors import DataError
from musubi_tuner.files import read_json

HUB = "hf://"
TABLE = "datasets://"
"""Begins the name of a part of a data set of Hugging Face."""
_LONGEST = 100
"""Letters of the name of a shard's folder, without its hash."""
TIMEOUT = 30
"""Seconds without an answer of a server."""


@dataclass(frozen=True)
class Sample:
    """One picture of a shard.

    Attributes:
        name: shard and key, for messages. key: its name in the shard. picture: the bytes of its file. caption: None = it has none.
        ending: of its file, with the dot.
    """

    name: str
    key: str
    picture: bytes
    caption: str | None
    ending: str = ".png"


def _library() -> Any:
    try:
        import braceexpand
        from webdataset import tariterators
    except ImportError:
        raise DataError("datasets.shards: streams need the package webdataset: pip install webdataset") from None
    return tariterators, braceexpand.braceexpand


def list_shards(settings: StreamSettings) -> list[str]:
    """All shards, sorted.

    Raises:
        DataError: for a pattern that matches nothing, or a repository that cannot be listed.
    """
    if settings.dataset_name is not None:
        count = _table(settings).num_shards
        digits = len(str(count - 1))
        return [
            f"{TABLE}{settings.dataset_name}/{settings.dataset_split}-{number:0{digits}d}" for number in range(count)
        ]
    _, expand = _library()
    found: list[str] = []
    for given in settings.shards:
        own: list[str] = []
        for pattern in expand(given):
            if pattern.startswith(HUB):
                own += _on_the_hub(pattern)
            elif "://" in pattern:
                if not pattern.startswith(("http://", "https://")):
                    raise DataError(f"datasets.shards: {pattern}: expected a path, http://, https:// or hf://datasets/")
                own.append(pattern)
            else:
                path = Path(pattern).expanduser().absolute()
                own += [str(found) for found in Path(path.anchor).glob(str(path.relative_to(path.anchor)))]
        if not own:
            raise DataError(f"datasets.shards: {given}: matches no file")
        found += own
    return sorted(set(found))


@cache
def _table(settings: StreamSettings) -> Any:
    """A data set of Hugging Face as a stream, whose pictures are not decoded.

    Raises:
        DataError: if it cannot be opened, or lacks a column.
    """
    try:
        import datasets
    except ImportError:
        raise DataError("datasets.dataset_name: needs the package datasets: pip install datasets") from None
    name, split = str(settings.dataset_name), settings.dataset_split
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            if settings.dataset_config_name is not None:
                raise ValueError("a folder of save_to_disk has no configurations; remove dataset_config_name")
            saved = datasets.load_from_disk(name)
            if isinstance(saved, dict):
                saved = saved[split]
            elif split not in ("train", str(saved.split)):
                raise ValueError(f"it was saved as one split, {saved.split or 'train'}")
            found = saved.to_iterable_dataset(num_shards=max(1, min(len(saved), len(saved.cache_files))))
        else:
            found = datasets.load_dataset(name, settings.dataset_config_name, split=split, streaming=True)
    except Exception as problem:  # of its files, of the connection, of the repository, or of the right to see it
        raise DataError(
            f"datasets.dataset_name: {name}, split {split}: cannot be opened ({type(problem).__name__}: {problem}); check the name and "
            "dataset_split, and set HF_TOKEN if it is not open to all"
        ) from problem
    columns = list(found.features or next(iter(found), {}))
    for key, column in (("image_column", settings.image_column), ("caption_column", settings.caption_column)):
        if column not in columns and (key == "image_column" or column != "text"):
            raise DataError(
                f"datasets.{key}: {name} has no column {column!r}, but {', '.join(columns)}; name one of these"
            )
    if not isinstance((found.features or {}).get(settings.image_column), datasets.Image):
        raise DataError(
            f"datasets.image_column: column {settings.image_column!r} of {name} holds no pictures; name one that does"
        )
    return found.cast_column(settings.image_column, datasets.Image(decode=False))


def _rows(shard: str, settings: StreamSettings, skip: int) -> Iterator[Sample]:
    """Samples of a part of a data set of Hugging Face."""
    table, number = _table(settings), int(shard.rpartition("-")[2])
    for row, values in enumerate(table.shard(num_shards=table.num_shards, index=number).skip(skip), start=skip):
        picture, key = values[settings.image_column] or {}, f"{row:08d}"
        data, path = picture.get("bytes"), picture.get("path") or ""
        if data is None and path:
            import fsspec

            with fsspec.open(path) as file:
                data = file.read()
        ending = Path(path.partition("::")[0]).suffix.lower()
        caption = values.get(settings.caption_column)
        if isinstance(caption, list):
            caption = caption[0] if caption else None
        text = " ".join(caption.split()) if isinstance(caption, str) else ""
        yield Sample(f"{shard}: {key}", key, data or b"", text or None, ending if ending in EXTENSIONS else ".png")


def _on_the_hub(pattern: str) -> list[str]:
    """Files of a data set of the hub."""
    from huggingface_hub import HfFileSystem

    try:
        return [HUB + name for name in HfFileSystem().glob(pattern.removeprefix(HUB))]
    except Exception as problem:  # of the connection, of the repository, or of the right to see it
        raise DataError(
            f"datasets.shards: {pattern}: cannot be listed ({type(problem).__name__}: {problem}); check the name, and set HF_TOKEN if the "
            "data set is not open to all"
        ) from problem


def shard_names(shards: Sequence[str]) -> dict[str, str]:
    """Name of the folder of its caches -> shard: its file's name, with a hash of its address where that alone is no name for it."""
    stems = [_stem(shard) for shard in shards]
    counts = Counter(stem.lower() for stem in stems)
    return {
        f"{stem[:_LONGEST]}-{sha256(shard.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
        if counts[stem.lower()] > 1 or len(stem) > _LONGEST or not stem or is_hidden(stem)
        else stem: shard
        for stem, shard in zip(stems, shards, strict=True)
    }


def _stem(shard: str) -> str:
    """The name of a shard's file, without what comes behind it in an address."""
    address = shard.partition("?")[0].partition("#")[0] if "://" in shard else shard
    name = address.rstrip("/").rpartition("/")[2].removesuffix(".tar")
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).lstrip(".")


def record_path(folder: Path, kind: str) -> Path:
    """Where it is recorded what the cache files of one kind of a shard were made from, in their folder."""
    return folder / f"shard_{kind}.json"


def recorded_files(folder: Path, kind: str) -> list[str] | None:
    """Names of the cache files of one kind that a shard has, below their folder; None if it is not read yet."""
    try:
        files = read_json(record_path(folder, kind))["files"]
    except (OSError, DataError, KeyError, TypeError):
        return None
    return [str(name) for name in files] if isinstance(files, list) else None


def _open(shard: str) -> IO[bytes]:
    if shard.startswith(HUB):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(shard.removeprefix(HUB), "rb", block_size=0)  # type: ignore[no-any-return]
    if "://" in shard:
        return urllib.request.urlopen(shard, timeout=TIMEOUT)  # type: ignore[no-any-return]
    return Path(shard).open("rb")


def _errors_of_the_hub(shard: str) -> tuple[type[Exception], ...]:
    """What its library raises beside OSError where a connection breaks."""
    if not shard.startswith((HUB, TABLE)):
        return ()
    try:
        from httpx import HTTPError
    except ImportError:  # versions that do not use it
        return ()
    return (HTTPError,)


def read_shard(shard: str, settings: StreamSettings, skip: int = 0) -> Iterator[Sample]:
    """The samples of a shard in their order; a broken connection is taken up again where it broke.

    Args:
        skip: samples to leave out at the beginning.

    Raises:
        DataError: if it cannot be read to its end, or holds nothing of the kind.
    """
    tries, is_local = 0, is_on_disk(shard)
    broken: tuple[type[Exception], ...] = (
        OSError,
        tarfile.TarError,
        EOFError,
        HTTPException,
        ValueError,  # of the libraries: a name that occurs twice, or a broken table
        *_errors_of_the_hub(shard),
    )
    while True:
        try:
            for sample in _read(shard, settings, skip):
                skip, tries = skip + 1, 0
                yield sample
            if not skip:
                raise DataError(f"{shard}: holds no samples")
            return
        except DataError:
            raise
        except broken as problem:
            tries += 1
            is_wrong = isinstance(problem, InvalidURL | ValueError)
            if is_wrong or is_local or tries > settings.shard_retries:
                again = "" if is_wrong or is_local else f"; tried {tries} times (shard_retries)"
                raise DataError(f"{shard}: cannot be read ({type(problem).__name__}: {problem}){again}") from problem
            time.sleep(settings.shard_retry_delay * 2 ** (tries - 1))


def is_on_disk(shard: str) -> bool:
    """Whether a shard is a file of this machine, or part of a data set that is."""
    return Path(shard.removeprefix(TABLE)).parent.exists() if shard.startswith(TABLE) else "://" not in shard


def _read(shard: str, settings: StreamSettings, skip: int) -> Iterator[Sample]:
    if shard.startswith(TABLE):
        yield from _rows(shard, settings, skip)
        return
    with closing(_open(shard)) as stream:
        yield from _samples(shard, stream, settings, skip)


def _samples(shard: str, stream: IO[bytes], settings: StreamSettings, skip: int) -> Iterator[Sample]:
    tariterators, _ = _library()
    files = tariterators.tar_file_expander([{"url": shard, "stream": stream}])
    for number, sample in enumerate(tariterators.group_by_keys(files)):
        endings = [name for name in sample if not name.startswith("__")]
        wanted = settings.shard_image_key
        picture = next((name for name in endings if f".{name}" in EXTENSIONS), None) if wanted is None else wanted
        if number == 0 and (picture is None or picture not in sample):
            raise DataError(
                f"{shard}: its first sample has {', '.join(endings)} and no {wanted or 'picture'}; set shard_image_key to one of these endings"
            )
        if number < skip:
            continue
        data = sample.get(picture) if picture is not None else None
        yield Sample(
            f"{shard}: {sample['__key__']}",
            sample["__key__"],
            data or b"",
            _caption(sample.get(settings.shard_label_key), settings),
            f".{picture}" if f".{picture}" in EXTENSIONS else ".png",
        )


def _caption(label: bytes | None, settings: StreamSettings) -> str | None:
    """The caption of a sample in one line; None if it has none."""
    text: Any = None
    if label is not None:
        text = label.decode("utf-8", errors="replace")
        if settings.shard_label_key == "json" or settings.shard_label_key.endswith(".json"):
            try:
                fields = json.loads(text)
            except ValueError:
                return None
            text = fields.get(settings.shard_caption_key) if isinstance(fields, dict) else None
    return (" ".join(text.split()) or None) if isinstance(text, str) else None
