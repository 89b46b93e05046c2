"""Ids of pictures that a JSONL file lists: the root that they are relative to. Torch-free.

A folder of pictures is its own root. A list has none: its pictures may lie anywhere, and a common parent moves with each
picture that comes from another place. So the common parent of the first pictures is written into the cache folder when it
is first filled, ``cache.json``:

    {"version": 1, "roots": ["/data/cats"]}

Pictures below the root have their path relative to it as id. Later pictures from elsewhere have ``<folder>-<hash>/<stem>``,
where the hash is that of their folder's path relative to the root. So what has an id keeps it, whatever comes or goes.

A cache folder without this file (made by an older version, or from a folder of pictures), or whose data set lies at another
place now, still knows its root: the folder under which its files belong to the pictures, which `find_root` makes sure of by
their content. Such a root is added to the list; machines that mount the data elsewhere have one each.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.errors import CacheError
from musubi_tuner.files import write_json
from musubi_tuner.headers import read_header
from musubi_tuner.stamps import hash_file

NAME = "cache.json"
_VERSION = 1
_SAMPLE = 8
"""Pictures per possible root that are compared with their caches; one would do, but pictures change."""
_CACHE_NAME = re.compile(r"(.+?)_(?:\d{4,}x\d{4,}_[a-z]+|[a-z]+_te|[a-z]+_experts)\.safetensors")


@dataclass(frozen=True)
class Root:
    """What the ids of a list are relative to.

    Attributes:
        cache_directory: whose it is.
    """

    cache_directory: Path
    path: Path

    def id_of(self, picture: Path) -> str:
        """The id of a picture, given by its absolute path."""
        if picture.is_relative_to(self.path):
            return picture.relative_to(self.path).with_suffix("").as_posix()
        try:
            folder = Path(os.path.relpath(picture.parent, self.path))
        except ValueError:  # another drive of Windows
            folder = picture.parent
        mark = hashlib.blake2b(folder.as_posix().encode(), digest_size=5).hexdigest()
        return f"{picture.parent.name[:40]}-{mark}/{picture.stem}"

    def keep(self) -> None:
        """Write it into the cache folder; those that are there stay."""
        roots = _stored(self.cache_directory)
        if self.path not in roots:
            self.cache_directory.mkdir(parents=True, exist_ok=True)
            value = {"version": _VERSION, "roots": [str(root) for root in [*roots, self.path]]}
            write_json(self.cache_directory / NAME, value)


def find_root(cache_directory: Path, pictures: Mapping[Path, Sequence[str]]) -> Root:
    """The root of a list's pictures.

    Args:
        pictures: absolute path of each -> its captions.
    """
    cached = _cached(cache_directory)
    stored = [Root(cache_directory, path) for path in _stored(cache_directory)]
    hits = {root: sum(root.id_of(path) in cached for path in pictures) for root in stored}
    best = max(stored, key=hits.__getitem__, default=None)
    if best is not None and hits[best]:
        return best
    found = _root_of_caches(cached, pictures)
    if found is not None:
        return Root(cache_directory, found)
    return stored[0] if stored else Root(cache_directory, _common_parent(list(pictures)))


def _stored(cache_directory: Path) -> list[Path]:
    """Roots in ``cache.json``; none if it is not there or not readable."""
    try:
        value = json.loads((cache_directory / NAME).read_text(encoding="utf-8-sig"))
        return [Path(root) for root in value["roots"]] if value["version"] == _VERSION else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _cached(cache_directory: Path) -> dict[str, list[Path]]:
    """Id, by their names -> cache files of a folder and those below it."""
    found: dict[str, list[Path]] = {}
    for folder, _, names in os.walk(cache_directory):
        inner = Path(folder).relative_to(cache_directory)
        for name in names:
            match = _CACHE_NAME.fullmatch(name)
            if match and not name.startswith("."):
                found.setdefault((inner / match[1]).as_posix(), []).append(Path(folder, name))
    return found


def _root_of_caches(cached: Mapping[str, list[Path]], pictures: Mapping[Path, Sequence[str]]) -> Path | None:
    """The folder relative to which pictures have the ids of cache files that were made from them."""
    candidates: dict[Path, list[tuple[Path, str]]] = {}
    for picture in pictures if cached else ():
        parts = picture.with_suffix("").parts
        for depth in range(1, len(parts)):
            name = "/".join(parts[depth:])
            if name in cached:
                candidates.setdefault(Path(*parts[:depth]), []).append((picture, name))
    best, rank = None, (0, 0, 0)
    for root, pairs in candidates.items():
        sample = pairs[:: -(-len(pairs) // _SAMPLE)]
        proven = sum(_made_from(cached[name], picture, pictures[picture]) for picture, name in sample)
        if proven and (proven, len(pairs), len(root.parts)) > rank:
            best, rank = root, (proven, len(pairs), len(root.parts))
    return best


def _made_from(files: Sequence[Path], picture: Path, captions: Sequence[str]) -> bool:
    """Whether cache files are of a picture, by its content; by a caption only where none of them was made from a picture."""
    by_caption = False
    for file in files:
        try:
            stored = read_header(file).fingerprint or {}
            image = stored.get("image")
            if image:
                same_size = image.get("size", picture.stat().st_size) == picture.stat().st_size
                return same_size and image.get("sha256") == hash_file(picture)
            by_caption |= stored.get("caption") in captions
        except (OSError, CacheError):
            continue
    return by_caption


def _common_parent(pictures: Sequence[Path]) -> Path:
    parents = [picture.parent for picture in pictures]
    if not parents:
        return Path()
    common = parents[0]
    while not all(parent.is_relative_to(common) for parent in parents):
        common = common.parent
    return common
