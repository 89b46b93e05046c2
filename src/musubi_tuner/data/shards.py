"""WebDataset shards: which there are, and the samples in one. Torch-free.

A shard is a tar file in which files of one name, such as ``000.jpg`` and ``000.json``, are a sample. It is local, behind an http address,
or in a data set of the hub, for which a token is taken from the environment (HF_TOKEN) by the hub's own library and seen by nobody else.
"""

import json
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import IO, Any

from musubi_tuner.config.streams import StreamSettings
from musubi_tuner.data.images import EXTENSIONS
from musubi_tuner.errors import DataError

HUB = "hf://"
TIMEOUT = 30
"""Seconds without an answer of a server."""


@dataclass(frozen=True)
class Sample:
    """One picture of a shard.

    Attributes:
        name: shard and key, for messages. key: its name in the shard. picture: the bytes of its file. caption: None = it has none.
    """

    name: str
    key: str
    picture: bytes
    caption: str | None


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


def _open(shard: str) -> IO[bytes]:
    if shard.startswith(HUB):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(shard.removeprefix(HUB), "rb", block_size=0)  # type: ignore[no-any-return]
    if "://" in shard:
        return urllib.request.urlopen(shard, timeout=TIMEOUT)  # type: ignore[no-any-return]
    return Path(shard).open("rb")


def _errors_of_the_hub(shard: str) -> tuple[type[Exception], ...]:
    """What its library raises beside OSError where a connection breaks."""
    if not shard.startswith(HUB):
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
    tries, is_local = 0, "://" not in shard
    broken: tuple[type[Exception], ...] = (
        OSError,
        tarfile.TarError,
        EOFError,
        HTTPException,
        *_errors_of_the_hub(shard),
    )
    while True:
        try:
            with closing(_open(shard)) as stream:
                for sample in _samples(shard, stream, settings, skip):
                    skip, tries = skip + 1, 0
                    yield sample
            if not skip:
                raise DataError(f"{shard}: holds no samples")
            return
        except broken as problem:
            tries += 1
            is_wrong = isinstance(problem, InvalidURL)
            if is_wrong or is_local or tries > settings.shard_retries:
                again = "" if is_wrong or is_local else f"; tried {tries} times (shard_retries)"
                raise DataError(f"{shard}: cannot be read ({type(problem).__name__}: {problem}){again}") from problem
            time.sleep(settings.shard_retry_delay * 2 ** (tries - 1))


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
