"""Which files of a folder are pictures of a data set. Torch-free.

Sub-folders are entered when the data set is recursive, those behind links too. Each folder is entered once, however many
ways lead there (circles among links are cut), and by its own path rather than by a link, so that ids do not change when
somebody adds one.

Left out, counted and reported: hidden files and folders, what systems leave behind (waste bins, thumbnails, indexes of
volumes), what this program writes, links that lead nowhere, and pictures whose ending nobody here can read.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.data.images import PLUGINS, can_read

_SYSTEM = frozenset(
    ("__macosx", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot",
     "$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "lost+found", "lost.dir")
)  # fmt: skip
"""Folders of systems, in lower case: macOS archives, network storage, Windows, Linux file systems, Android."""
_UNREAD = frozenset(
    (*PLUGINS, ".apng", ".mng", ".jif", ".jfi", ".pjpeg", ".pjp", ".dib", ".jp2", ".j2k", ".j2c", ".jpx", ".jpf", ".jxr",
     ".tga", ".qoi", ".pcx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".exr", ".hdr", ".dds", ".ico", ".icns", ".avifs",
     ".svg", ".eps", ".ai", ".wmf", ".emf", ".psd", ".psb", ".xcf", ".kra", ".clip", ".ora", ".raw", ".dng", ".cr2",
     ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".srw", ".orf", ".rw2", ".raf", ".pef", ".3fr", ".iiq",
     ".x3f", ".heics", ".heifs")
)  # fmt: skip
"""Endings of pictures that are not read, or only with a plug-in."""
_PICTURES_OF_RUNS = ("sample", "plots")
"""Sub-folders of an output folder that hold pictures."""


@dataclass
class Listing:
    """What a folder holds.

    Attributes:
        pictures: files to read, sorted. notes: what was left out. problems: folders that cannot be looked into, and names
            that no cache can have.
    """

    pictures: list[Path]
    notes: list[str]
    problems: list[str]


def list_pictures(
    root: Path, recursive: bool, *, apart: Collection[Path] = (), silently: Collection[Path] = ()
) -> Listing:
    """Look through a folder.

    Args:
        apart: folders that hold no pictures of the data set although they may lie below it; ``silently``: such whose
            pictures are not counted. The root itself is looked through even where it is one of them or lies below one.
    """
    walk = _Walk(root, recursive, {*apart, *silently})
    walk.run()
    quiet = {folder.resolve() for folder in silently}
    return Listing(sorted(walk.pictures), walk.notes(quiet), walk.problems)


class _Walk:
    def __init__(self, root: Path, recursive: bool, apart: Collection[Path]) -> None:
        self.root, self.recursive = root, recursive
        here = root.resolve()
        resolved = {folder.resolve() for folder in apart}
        self.apart = {folder for folder in resolved if not here.is_relative_to(folder)}
        self.is_output = here in resolved
        self.pictures: list[Path] = []
        self.problems: list[str] = []
        self.hidden: list[Path] = []
        self.apart_folders: list[Path] = []
        self.dangling: list[Path] = []
        self.unread: Counter[str] = Counter()
        self._entered: set[tuple[int, int] | Path] = set()
        self._links: list[Path] = []

    def run(self) -> None:
        """Own folders first, then those behind links, which may hold further links."""
        self._enter(self.root)
        while self._links:
            self._links.sort(reverse=True)
            self._enter(self._links.pop())

    def _enter(self, start: Path) -> None:
        waiting = [start]
        while waiting:
            folder = waiting.pop()
            try:
                if not self._is_new(folder):
                    continue
                with os.scandir(folder) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self.problems.append(f"{folder}: cannot be read ({error.strerror}); give access to it, or move it away")
                continue
            names = {entry.name for entry in found}
            written = _PICTURES_OF_RUNS if _is_output(names) or (folder == self.root and self.is_output) else ()
            if written and folder != self.root:
                self.apart_folders.append(folder)
                continue
            for entry in found:
                path = folder / entry.name
                # os.path: Path raises for links into folders that nobody may enter.
                if entry.is_dir(follow_symlinks=False) or os.path.isdir(path):  # noqa: PTH112
                    if not self.recursive:
                        continue
                    if is_hidden(entry.name):
                        self.hidden.append(path)
                    elif entry.name in written or self._is_apart(path):
                        self.apart_folders.append(path)
                    else:
                        (self._links if entry.is_symlink() else waiting).append(path)
                else:
                    self._take(path, entry)

    def _take(self, path: Path, entry: "os.DirEntry[str]") -> None:
        ending = path.suffix.lower()
        if not can_read(ending):
            if ending in _UNREAD and not is_hidden(entry.name):
                self.unread[ending] += 1
        elif is_hidden(entry.name):
            self.hidden.append(path)
        elif any("\udc80" <= character <= "\udcff" for character in str(path)):
            self.problems.append(f"{os.fsencode(path)!r}: its name is not UTF-8, which caches need; rename it")
        elif entry.is_file(follow_symlinks=False) or os.path.isfile(path):  # noqa: PTH113
            self.pictures.append(path)
        else:
            self.dangling.append(path)

    def _is_new(self, folder: Path) -> bool:
        status = folder.stat()
        # Some file systems number nothing; there the path decides.
        identity = (status.st_dev, status.st_ino) if status.st_ino else folder.resolve()
        known = identity in self._entered
        self._entered.add(identity)
        return not known

    def _is_apart(self, path: Path) -> bool:
        place = path.resolve()
        return any(place.is_relative_to(folder) for folder in self.apart)

    def notes(self, quiet: Collection[Path]) -> list[str]:
        """What was left out, a line for each reason."""
        found = []
        hidden = _count(self.hidden)
        if hidden:
            found.append(f"{_left_out(hidden)} of {self.root}: hidden, or in folders of the system ({_shown(hidden)})")
        written = _count(
            [path for path in self.apart_folders if not any(path.resolve().is_relative_to(folder) for folder in quiet)]
        )
        if written:
            found.append(
                f"{_left_out(written)} of {self.root}: in output folders of runs, or masks ({_shown(written)})"
            )
        if self.dangling:
            links = dict.fromkeys(self.dangling, 1)
            found.append(f"{_left_out(links)} of {self.root}: broken links ({_shown(links)})")
        if self.unread:
            counts = ", ".join(f"{count} {ending}" for ending, count in sorted(self.unread.items()))
            packages = sorted({PLUGINS[ending][1] for ending in self.unread if ending in PLUGINS})
            plugins = f", or pip install {' '.join(packages)}" if packages else ""
            found.append(
                f"{_left_out(self.unread)} of {self.root}: not readable here ({counts}); convert to PNG or JPEG{plugins}"
            )
        return found


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or the system's."""
    return name.startswith(".") or name.lower() in _SYSTEM


def _is_output(names: Collection[str]) -> bool:
    """Whether the files of a folder are those of a run."""
    return "checkpoints.json" in names or (
        "metrics.jsonl" in names and any(name.endswith(".config.toml") for name in names)
    )


def _count(places: list[Path]) -> dict[Path, int]:
    """How many pictures files and folders are, without those that have none."""
    counts = {path: sum(1 for _ in _below(path)) if path.is_dir() else 1 for path in places}
    return {path: count for path, count in counts.items() if count}


def _below(folder: Path) -> Iterator[str]:
    for _, _, names in os.walk(folder):
        yield from (name for name in names if can_read(Path(name).suffix.lower()))


def _left_out(counts: Mapping[Any, int]) -> str:
    number = sum(counts.values())
    return "1 image is left out" if number == 1 else f"{number} images are left out"


def _shown(paths: Collection[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
