"""Text files of a data set: how they are read, and found under names that differ in form only. Torch-free."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from musubi_tuner import files
from musubi_tuner.errors import DataError


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, see `files.read_text`.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it cannot be read, or is in another encoding.
    """
    try:
        return files.read_text(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def first_names(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and whether there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: spaces, line ends, marks without width."""
    return not any(char.isprintable() and not char.isspace() for char in text)


def folded(name: str) -> str:
    """A name without its case and Unicode form: equal for names that Windows or macOS would not tell apart."""
    return unicodedata.normalize("NFC", name.casefold())


class Names:
    """The names in folders, each folder listed once; a name is found again if only its case or Unicode form differs.

    Archives packed on a Mac hold decomposed names (NFD), and captions made on Windows may end in ``.TXT``.
    """

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, list[str]]] = {}

    def alike(self, path: Path) -> list[Path]:
        """Files and folders whose name differs from that of a path in form only, the path itself first, sorted."""
        found = self.of(path.parent).get(folded(path.name), [])
        return [path.with_name(name) for name in sorted(found, key=lambda name: (name != path.name, name))]

    def find(self, path: Path) -> Path:
        """The path itself if it exists, else the only one that differs from it in form only, else the path."""
        if path.exists() or path.parent == path:
            return path
        parent = self.find(path.parent)
        found = self.alike(parent / path.name)
        return found[0] if len(found) == 1 else path

    def of(self, folder: Path) -> dict[str, list[str]]:
        """Folded name -> names in a folder; empty where it cannot be listed."""
        if folder not in self._folders:
            names: dict[str, list[str]] = {}
            try:
                for path in folder.iterdir():
                    names.setdefault(folded(path.name), []).append(path.name)
            except OSError:
                names = {}
            self._folders[folder] = names
        return self._folders[folder]
