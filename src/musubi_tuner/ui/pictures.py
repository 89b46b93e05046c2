"""The pictures of a data set with their captions: looked at a page at a time, captions edited, replaced in all files, put back. Torch-free."""

import hashlib
import io
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from musubi_tuner.config import load_documents
from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.buckets import BucketSelector
from musubi_tuner.data.folders import list_pictures
from musubi_tuner.data.images import image_size, open_image
from musubi_tuner.data.sources import placement_of, selector_of
from musubi_tuner.data.texts import Names
from musubi_tuner.errors import ConfigError, DataError
from musubi_tuner.files import replace_file
from musubi_tuner.ui.answers import CaptionState, Change, NotThere, OpenedSet, Picture, Replaced, TagCount, Undone
from musubi_tuner.ui.configs import Conflict

SIDE = 256
"""Longest side of a thumbnail, in pixels."""
MOST_PIXELS = 64_000_000
"""Of a picture that is decoded for a thumbnail."""
MOST_CHANGES = 50
"""Of a replacement that are shown."""
HowToChange = Literal["replace", "remove tag", "before", "after"]
"""What can be done to all captions."""
BOM = b"\xef\xbb\xbf"


@dataclass
class Folder:
    """The pictures of one data set, as they were listed.

    Attributes:
        dataset: what they belong to. pictures: by path relative to its folder, sorted. selector: of buckets. undo: caption files
            that the last replacement changed, with their bytes before and after.
    """

    dataset: DatasetConfig
    pictures: dict[str, Path]
    selector: BucketSelector
    names: Names = field(default_factory=Names)
    undo: list[tuple[Path, bytes, bytes]] = field(default_factory=list)

    def picture(self, name: str) -> Path:
        """One of the pictures.

        Raises:
            ConfigError: if there is none of this name.
        """
        if name not in self.pictures:
            raise NotThere(f"{name}: no such picture of {self.dataset.name}")
        return self.pictures[name]

    def caption_file(self, name: str) -> Path:
        """Where the caption of a picture lies, or would lie."""
        return self.names.find(self.picture(name).with_suffix(self.dataset.caption_extension))

    def item(self, name: str) -> Picture:
        """What the page shows of a picture; ``crop`` is left, top, width and height as shares of the picture."""
        path = self.picture(name)
        found: dict[str, Any] = {
            "name": name, "problem": "", "size": None, "bucket": None, "crop": None, "version": 0,
        }  # fmt: skip
        try:
            found["version"] = path.stat().st_mtime_ns
            found["size"] = size = image_size(path)
            placement = placement_of(size, self.dataset, self.selector)
            (width, height), (left, top) = placement.resized, placement.crop
            found["bucket"] = placement.bucket
            found["crop"] = [left / width, top / height, placement.bucket[0] / width, placement.bucket[1] / height]
        except (DataError, OSError) as problem:
            found["problem"] = str(problem)
        return {**found, **self.caption(name)}  # type: ignore[typeddict-item]

    def caption(self, name: str) -> CaptionState:
        """The caption of a picture with its tag; ``caption`` is None where there is no file, or none that is UTF-8."""
        path = self.caption_file(name)
        data = _bytes(path)
        if data is None:
            return {"caption": None, "tag": None, "locked": ""}
        try:
            return {"caption": _text(data), "tag": _tag(data), "locked": ""}
        except UnicodeDecodeError:
            return {"caption": None, "tag": _tag(data), "locked": f"{path.name} is not UTF-8; convert it first"}


class Pictures:
    """The data sets that pages have opened; a picture is reached only through one of them."""

    def __init__(self) -> None:
        self._folders: dict[str, Folder] = {}
        self._writing = threading.Lock()

    def open(self, document: dict[str, Any]) -> list[OpenedSet]:
        """List the pictures of all data sets of a run file, or say why that is not done here.

        Raises:
            InvalidConfig: for a run file with errors.
        """
        configs = load_documents(document)
        spec = configs[0].spec
        own = {dataset.name: dataset for config in configs for dataset in config.datasets}
        found: list[OpenedSet] = []
        for dataset in own.values():
            root = dataset.image_directory
            why = ""
            if root is None:
                why = "only folders of pictures are shown, not lists and streams"
            elif dataset.captions_file is not None:
                why = f"its captions are lines of {dataset.captions_file}; edit that file"
            elif not root.is_dir():
                why = f"{root}: no such folder"
            if root is None or why:
                found.append({"id": "", "name": dataset.name, "folder": str(root or ""), "count": 0, "problem": why})
                continue
            apart = [dataset.cache_directory, *([dataset.mask_directory] if dataset.mask_directory else [])]
            listing = list_pictures(root, dataset.recursive, apart=dataset.apart, silently=apart)
            identity = hashlib.sha256(f"{root.resolve()}\0{dataset}".encode()).hexdigest()[:16]
            undo = self._folders[identity].undo if identity in self._folders else []
            selector = selector_of(dataset, spec.code)
            pictures = {path.relative_to(root).as_posix(): path for path in listing.pictures}
            self._folders[identity] = Folder(dataset, pictures, selector, undo=undo)
            found.append(
                {
                    "id": identity,
                    "name": dataset.name,
                    "folder": str(root),
                    "count": len(listing.pictures),
                    "problem": "; ".join(listing.problems),
                }
            )
        return found

    def folder(self, identity: str) -> Folder:
        """One that has been opened.

        Raises:
            ConfigError: if none has this id.
        """
        if identity not in self._folders:
            raise NotThere(f"{identity}: no such data set is open; open it again")
        return self._folders[identity]

    def page(self, identity: str, offset: int, limit: int) -> list[Picture]:
        """Some pictures of a data set."""
        folder = self.folder(identity)
        return [folder.item(name) for name in islice(folder.pictures, max(0, offset), max(0, offset) + limit)]

    def thumbnail(self, identity: str, name: str) -> bytes:
        """A picture made small, as WebP.

        Raises:
            DataError: if it cannot be read, or is too large.
        """
        path = self.folder(identity).picture(name)
        return _thumbnail(path, path.stat().st_mtime_ns)

    def write_caption(self, identity: str, name: str, text: str, tag: str | None) -> CaptionState:
        """Write the caption of a picture; mark of the encoding, line ends and the end of the file stay as they are.

        Args:
            tag: of what it replaces; None = there is no file yet.

        Raises:
            Conflict: if something else is there. ConfigError: if it is not UTF-8.
        """
        folder = self.folder(identity)
        with self._writing:
            now = folder.caption(name)
            if now["locked"]:
                raise ConfigError(now["locked"])
            if now["tag"] != tag:
                raise Conflict(now["tag"])
            path = folder.caption_file(name)
            _write(path, _data(text, _bytes(path)))
            folder.names = Names()
            return folder.caption(name)

    def tags(self, identity: str, most: int = 200) -> list[TagCount]:
        """The most frequent parts of captions between commas."""
        folder = self.folder(identity)
        counts: Counter[str] = Counter()
        for name in folder.pictures:
            caption = folder.caption(name)["caption"] or ""
            counts.update({tag.strip() for tag in caption.replace("\n", ",").split(",") if tag.strip()})
        return [{"tag": tag, "count": count} for tag, count in counts.most_common(most)]

    def change(self, identity: str, how: HowToChange, find: str, by: str, apply: bool) -> Replaced:
        """Change all captions of a data set, or show what that would change.

        Args:
            how: replace a text; take a tag out, with its comma; write a text before or after the caption, where it is not there yet.

        Raises:
            ConfigError: if there is nothing to find, or to write.
        """
        if not (find if how in ("replace", "remove tag") else by):
            raise ConfigError("the text is empty; say what to change")
        folder = self.folder(identity)
        changes: list[Change] = []
        files = []
        with self._writing:
            for name in folder.pictures:
                caption = folder.caption(name)["caption"]
                after = caption if caption is None else changed(caption, how, find, by)
                if caption is None or after is None or after == caption:
                    continue
                path = folder.caption_file(name)
                before = _bytes(path) or b""
                changes.append({"name": path.name, "before": caption, "after": after})
                files.append((path, before, _data(after, before)))
            if not apply:
                return {
                    "count": len(changes),
                    "changes": changes[:MOST_CHANGES],
                    "undo": len(folder.undo),
                    "problem": "",
                }
            folder.undo, problem = [], ""
            for path, before, data in files:
                try:
                    _write(path, data)
                except OSError as error:
                    problem = f"{path}: cannot be written ({error.strerror}); the captions before it were changed, and can be put back"
                    break
                folder.undo.append((path, before, data))
        return {"count": len(folder.undo), "changes": [], "undo": len(folder.undo), "problem": problem}

    def undo(self, identity: str) -> Undone:
        """Put back what the last replacement changed, except files that were edited since."""
        folder = self.folder(identity)
        kept, count = [], 0
        with self._writing:
            while folder.undo:
                path, before, after = folder.undo[-1]
                if _bytes(path) == after:
                    _write(path, before)  # if that fails, what is left can be put back later
                    count += 1
                else:
                    kept.append(path.name)
                folder.undo.pop()
        return {"count": count, "kept": kept[:MOST_CHANGES]}


def changed(caption: str, how: HowToChange, find: str, by: str) -> str:
    """A caption after a change; see `Pictures.change`."""
    if how == "replace":
        return caption.replace(find, by)
    if how == "remove tag":
        return "\n".join(_without(line, find.strip()) for line in caption.split("\n"))
    if how == "before":
        return caption if caption.startswith(by) else by + caption
    return caption if caption.endswith(by) else caption + by


def _without(line: str, tag: str) -> str:
    parts = [part for part in line.split(",") if part.strip() != tag]
    return line if len(parts) == line.count(",") + 1 else ",".join(parts).strip()


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _text(data: bytes) -> str:
    """What a caption file says, without the end of its last line."""
    text = data.removeprefix(BOM).decode("utf-8").replace("\r\n", "\n")
    return text.removesuffix("\n")


def _data(text: str, before: bytes | None) -> bytes:
    """A caption as bytes, in the form of the file that it replaces."""
    old = before or b""
    text = text.replace("\r\n", "\n").removesuffix("\n") + ("\n" if old.endswith(b"\n") else "")
    if b"\r\n" in old:
        text = text.replace("\n", "\r\n")
    return (BOM if old.startswith(BOM) else b"") + text.encode("utf-8")


def _write(path: Path, data: bytes) -> None:
    replace_file(path, lambda target: target.write_bytes(data))


@lru_cache(maxsize=2048)
def _thumbnail(path: Path, version: int) -> bytes:
    width, height = image_size(path)
    if width * height > MOST_PIXELS:
        raise DataError(f"{path.name}: {width}x{height} is too large for a thumbnail")
    image = open_image(path)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
