"""What the caches of a shard were made from: recorded beside them once the shard is done. Torch-free; `shards` writes it."""

import json
import os
from collections.abc import Collection
from dataclasses import asdict
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from musubi_tuner.caching.fingerprint import Expectation, differences
from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.shards import TABLE, list_shards, record_path, recorded_files, shard_names
from musubi_tuner.errors import CacheError
from musubi_tuner.files import read_json, write_json
from musubi_tuner.headers import read_header

_OF_PICTURES = ("resolution", "enable_bucket", "bucket_no_upscale", "bucket_step", "bucket_sides", "resize", "interpolation",
                "alpha_background", "views")  # fmt: skip
"""Fields of a data set that decide about files of latents; captions decide about those of texts, and both about those of teachers."""
_OF_SAMPLES = (
    "shard_image_key",
    "shard_label_key",
    "shard_caption_key",
    "dataset_config_name",
    "image_column",
    "caption_column",
)
"""Fields of a stream that decide which pictures and captions there are."""
_OF_TRAINING = (
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "warmup_epochs",
    "token_warmup_step",
    "drop_as_empty",
)
"""Fields of the captions that decide when one is taken, but for whether there is one more for it."""


class Shards:
    """The shards of a data set that is cached, and which of them are to be read for a kind of cache.

    Args:
        by_name: files count by their names, whatever made them.
    """

    def __init__(self, dataset: DatasetConfig, by_name: bool = False) -> None:
        assert dataset.stream is not None
        self.dataset, self.stream, self.by_name = dataset, dataset.stream, by_name
        self.shards = shard_names(list_shards(dataset.stream))

    def folder(self, name: str) -> Path:
        """Where the caches of a shard lie."""
        return self.dataset.cache_directory / name

    def why_due(self, name: str, expected: Expectation, *, thorough: bool = False) -> str | None:
        """Why a shard must be read, None if its files are right.

        Args:
            thorough: read the headers of its files; those of items that are listed are read with the items.
        """
        files = recorded_files(self.folder(name), expected.kind)
        if files is None:
            return "not read yet"
        if not self.by_name:
            stored = read_json(record_path(self.folder(name), expected.kind)).get("asked") or {}
            different = next(differences(stored, self.asked(name, expected)), None)
            if different is not None:
                return different
        try:
            for each in files if thorough else ():
                read_header(self.folder(name) / each)
        except (OSError, CacheError) as problem:
            return f"{each} is missing" if isinstance(problem, FileNotFoundError) else str(problem)
        return None

    def asked(self, name: str, expected: Expectation) -> dict[str, Any]:
        """What decides about the files of a shard now, as plain values."""
        kind, own, stream = expected.kind, asdict(self.dataset), asdict(self.stream)
        text, captions = self.dataset.text, own["text"]
        settings = {key: own[key] for key in ("missing_caption", *(_OF_PICTURES if kind != "text" else ()))}
        settings |= {key: stream[key] for key in _OF_SAMPLES}
        if kind != "latents":
            settings |= {key: value for key, value in captions.items() if key not in _OF_TRAINING}
            settings |= {
                "caption_dropout": text.drops and text.drop_as_empty,
                "token_warmup": bool(text.token_warmup_step),
            }
        settings = {f"datasets.{key}": value for key, value in settings.items()}
        found: dict[str, Any] = json.loads(json.dumps({**expected.shared, "shard": self._state(name), **settings}))
        return found

    def _state(self, name: str) -> list[Any]:
        """What is known of a shard without reading it: of a remote one its address."""
        shard = self.shards[name]
        if shard.startswith(TABLE):
            return [shard, len(self.shards), self._table_state]
        if "://" in shard or not Path(shard).is_file():
            return [shard]
        status = Path(shard).stat()
        return [shard, status.st_size, status.st_mtime_ns]

    @cached_property
    def _table_state(self) -> str:
        """Names, sizes and times of the files of a data set of Hugging Face on this machine; "" for others."""
        root, found = Path(str(self.stream.dataset_name)), sha256()
        for place, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if Path(place, name) != self.dataset.cache_directory)
            for name in sorted(names):
                status = Path(place, name).stat()
                line = f"{os.path.relpath(place, root)}/{name} {status.st_size} {status.st_mtime_ns}\n"
                found.update(line.encode("utf-8", "surrogateescape"))
        return found.hexdigest()[:16] if root.exists() else ""

    def is_done(self, name: str, kind: str, asked: dict[str, Any], files: Collection[str]) -> None:
        """Record the files of a shard.

        Args:
            asked: what they were made for. files: their names below its folder.
        """
        path = record_path(self.folder(name), kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"asked": {} if self.by_name else asked, "files": sorted(files)})
