"""Data sets without pictures: what complete cache files say of their items. Torch-free.

A latents file names its item and says how the picture became its bucket; the text file beside it has the captions. So caches that were made
elsewhere are trained as they are, without pictures, caption files and encoders.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.config.datasets import KEPT
from musubi_tuner.data.buckets import Placement, Size, place
from musubi_tuner.data.masks import Mask
from musubi_tuner.data.views import View
from musubi_tuner.errors import CacheError, DataError
from musubi_tuner.headers import read_header


@dataclass(frozen=True)
class Stored:
    """An item, as its cache files have it; see `sources.Item`.

    Attributes:
        content: hash of its picture; None if the file does not say.
    """

    id: str
    stem: str
    folder: Path
    size: Size
    placement: Placement
    captions: tuple[str, ...]
    mask: Mask | None
    views: tuple[View, ...]
    squashed: bool
    interpolation: str | None
    background: str
    content: str | None


def stored_items(folder: Path, code: str, problems: list[str]) -> Iterator[Stored]:
    """Items whose latents lie in a folder or below it, in the order of their file names.

    Args:
        code: of the family, which is part of the names. problems: gets what is wrong with files.
    """
    pattern = re.compile(rf"(.+)_(\d{{4,}})x(\d{{4,}})_{re.escape(code)}\.safetensors")
    for place_of, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            match = None if name.startswith(".") else pattern.fullmatch(name)
            if match is None:
                continue
            path = Path(place_of, name)
            try:
                yield _stored(path, match[1], (int(match[2]), int(match[3])), code)
            except (CacheError, DataError, OSError) as problem:
                problems.append(str(problem) if str(path.parent) in str(problem) else f"{path}: {problem}")


def _stored(path: Path, stem: str, size: Size, code: str) -> Stored:
    """One item.

    Raises:
        CacheError, OSError: for files that cannot be read. DataError: for files that do not say what they hold.
    """
    made = _fingerprint(path)
    text = _fingerprint(path.with_name(f"{stem}_{code}_te.safetensors"))
    try:
        bucket = _pair(made["bucket"])
        placement = place(size, bucket)
        if "resized" in made:  # files that were imported do not say
            placement = Placement(bucket, _pair(made["resized"]), _pair(made["crop"]), placement.filter)
        views = tuple(
            View((int(x), int(y)), bool(flip), float(hue), float(gamma))
            for x, y, flip, hue, gamma in made.get("views") or ()
        )
        captions = tuple(str(each) for each in text.get("captions") or [text["caption"]])
        image = made.get("image") or {}
        return Stored(
            id=str(made["item"]),
            stem=stem,
            folder=path.parent,
            size=size,
            placement=placement,
            captions=captions,
            mask=Mask(made["mask"], alpha=bool(made.get("mask_alpha"))) if made.get("mask") else None,
            views=views,
            squashed=bool(made.get("squashed", False)),
            interpolation=made.get("interpolation"),
            background=made.get("background") or KEPT,
            content=image.get("sha256"),
        )
    except (KeyError, TypeError, ValueError) as problem:
        raise DataError(
            f"{path}: does not say what it holds ({problem}); make the caches again where the pictures are"
        ) from problem


def _fingerprint(path: Path) -> dict[str, Any]:
    """What made a file.

    Raises:
        DataError: if it does not say, or there is no such file. CacheError: if it cannot be read.
    """
    try:
        found = read_header(path).fingerprint
    except FileNotFoundError as problem:
        raise DataError(f"{path}: no such file; the caches are not complete") from problem
    if found is None:
        raise DataError(f"{path}: does not say what made it, so its item is not known")
    return found


def _pair(values: Any) -> Size:
    first, second = values
    return int(first), int(second)
