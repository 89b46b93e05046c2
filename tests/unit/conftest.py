"""Small picture folders and resolved dataset entries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from musubi_tuner.config.datasets import DatasetConfig


@pytest.fixture
def picture() -> Callable[..., Path]:
    """Write a one-coloured picture, with a caption beside it unless ``caption`` is None; return its path."""

    def make(path: Path, size: tuple[int, int] = (64, 64), caption: str | None = "a caption") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 100, 50)).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return make


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., DatasetConfig]:
    """A resolved dataset entry: the folder ``images`` of the test unless keywords say otherwise."""

    def make(**changes: Any) -> DatasetConfig:
        directory = None if "image_jsonl_file" in changes else changes.get("image_directory", tmp_path / "images")
        values = {
            "name": "datasets[0]",
            "image_directory": directory,
            "image_jsonl_file": None,
            "cache_directory": directory or tmp_path / "cache",
            "resolution": (64, 64),
            "enable_bucket": True,
            "bucket_no_upscale": False,
            "caption_extension": ".txt",
            "batch_size": 2,
            "num_repeats": 1,
            "missing_caption": "error",
            "recursive": False,
        }
        return DatasetConfig(**(values | changes))

    return make
