"""Folders of this machine for choosing a path: the project's, and those that --root names. Torch-free."""

from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.ui.answers import Entry, Listing, NotThere

MOST = 1000
"""Entries of a folder that are listed."""


@dataclass(frozen=True)
class Folders:
    """What may be seen: everything below some folders, except hidden files."""

    roots: tuple[Path, ...]

    def listing(self, text: str) -> Listing:
        """A folder, folders first; an empty path is the first root.

        Raises:
            ConfigError: for whatever is none, or lies outside.
        """
        roots = [root.resolve() for root in self.roots]
        try:
            wanted = (self.roots[0] / text).resolve()
            home = next(root for root in roots if _is_seen(wanted, root) and wanted.is_dir())
        except (
            OSError,
            RuntimeError,
            ValueError,
            StopIteration,
        ) as problem:  # also null characters, links to themselves
            seen = " or ".join(map(str, roots))
            raise NotThere(f"{text}: no such folder below {seen}; --root FOLDER adds another one") from problem
        found: list[Entry] = []
        for path in wanted.iterdir():
            try:
                inside = any(path.resolve().is_relative_to(root) for root in roots)  # a link may lead out
            except (OSError, RuntimeError):  # or to itself
                continue
            if not path.name.startswith(".") and inside:
                is_folder = path.is_dir()
                size = 0 if is_folder or not path.exists() else path.stat().st_size
                found.append({"name": path.name, "path": self._shown(path), "folder": is_folder, "size": size})
        found.sort(key=lambda entry: (not entry["folder"], entry["name"].lower()))
        parent = None if wanted == home else self._shown(wanted.parent)
        return {
            "path": self._shown(wanted),
            "parent": parent,
            "roots": [self._shown(root) for root in roots],
            "entries": found[:MOST],
        }

    def _shown(self, path: Path) -> str:
        """A path as a run file has it: relative to the project, or absolute."""
        project = self.roots[0].resolve()
        return path.relative_to(project).as_posix() or "." if path.is_relative_to(project) else str(path)


def _is_seen(path: Path, root: Path) -> bool:
    """Whether a path lies below a root, with nothing hidden between them."""
    return path.is_relative_to(root) and not any(part.startswith(".") for part in path.relative_to(root).parts)
