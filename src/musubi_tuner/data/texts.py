"""Text files of a data set: how they are read, and found under names that differ in form only. Torch-free."""

import codecs
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from musubi_tuner.errors import DataError

_MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
          (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))  # fmt: skip
_EXCERPT = 40


def read_text(path: Path) -> str:
    """A whole UTF-8 file with lines that end in line feeds, without its byte order mark.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: naming the file, what it holds instead of UTF-8 text, and what to do.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    for mark, name in _MARKS:
        if raw.startswith(mark):
            raise DataError(f"{path}: is {name} text; save it as UTF-8")
    try:
        text = raw.decode("utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        line = raw[raw.rfind(b"\n", 0, error.start) + 1 :].partition(b"\n")[0][:_EXCERPT].strip()
        raise DataError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8. As Windows-1252 it reads "
            f"'{line.decode('cp1252', 'replace')}'"
        ) from error
    if "\0" in text:
        wide = raw.count(0) > len(raw) // 3
        found = "is UTF-16 text without its mark" if wide else f"holds a NUL character at byte {raw.index(0)}"
        raise DataError(f"{path}: {found}; save it as plain UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def first_names(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and whether there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: spaces, line ends, marks without width."""
    return not any(char.isprintable() and not char.isspace() for char in text)


def folded(name: str) -> str:
    """A name without its case and Unicode form: equal for names that Windows or macOS would not tell apart."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


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
