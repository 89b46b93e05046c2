"""What the caches of a shard were made from: recorded beside them once the shard is done. Torch-free; `shards` writes it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from musubi_tuner.caching.fingerprint import Expectation, differences
from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.shards import is_on_disk, list_shards, shard_names
from musubi_tuner.errors import DataError
from musubi_tuner.files import read_json, write_json

_OF_PICTURES = ("resolution", "enable_bucket", "bucket_no_upscale", "bucket_step", "bucket_sides", "resize", "interpolation",
                "alpha_background", "views")  # fmt: skip
_OF_TEXTS = ("text",)
"""Fields of a data set that decide about files of latents, and of texts."""
_OF_SAMPLES = (
    "shard_image_key",
    "shard_label_key",
    "shard_caption_key",
    "dataset_config_name",
    "image_column",
    "caption_column",
)
"""Fields of a stream that decide which pictures and captions there are."""


def _asked(dataset: DatasetConfig, shard: str, expected: Expectation) -> dict[str, Any]:
    """What decides about the files of a shard, as plain values."""
    fields = {"latents": _OF_PICTURES, "text": _OF_TEXTS, "experts": (*_OF_PICTURES, *_OF_TEXTS)}[expected.kind]
    assert dataset.stream is not None
    own, stream = asdict(dataset), asdict(dataset.stream)
    file: list[Any] = [shard]
    if is_on_disk(shard) and Path(shard).is_file():
        status = Path(shard).stat()
        file += [status.st_size, status.st_mtime_ns]
    settings = {key: own[key] for key in (*fields, "missing_caption")} | {key: stream[key] for key in _OF_SAMPLES}
    asked = {**expected.shared, "shard": file, **{f"datasets.{key}": value for key, value in settings.items()}}
    found: dict[str, Any] = json.loads(json.dumps(asked))
    return found


def _record(dataset: DatasetConfig, name: str, kind: str) -> Path:
    return dataset.cache_directory / name / f"shard_{kind}.json"


class Shards:
    """The shards of a data set that is cached, and which of them are to be read for a kind of cache."""

    def __init__(self, dataset: DatasetConfig) -> None:
        assert dataset.stream is not None
        self.dataset, self.shards = dataset, shard_names(list_shards(dataset.stream))

    def why_due(self, name: str, expected: Expectation) -> str | None:
        """Why a shard must be read, None if its files are right."""
        try:
            stored = read_json(_record(self.dataset, name, expected.kind))["asked"]
            return next(differences(stored, _asked(self.dataset, self.shards[name], expected)), None)
        except FileNotFoundError:
            return "not read yet"
        except (OSError, DataError, KeyError, TypeError):
            return f"shard_{expected.kind}.json cannot be read"

    def is_done(self, name: str, expected: Expectation) -> None:
        """Record that the files of a shard are right."""
        write_json(
            _record(self.dataset, name, expected.kind), {"asked": _asked(self.dataset, self.shards[name], expected)}
        )
