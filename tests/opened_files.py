"""What is opened below a folder, heard by an audit hook; hooks stay for good, so there is one, and it listens while it is asked to."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_heard: list[tuple[Path, Counter[str]]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard and event in ("open", "os.scandir", "os.listdir") and isinstance(arguments[0], str | os.PathLike):
        path, (root, found) = Path(os.fspath(arguments[0])).absolute(), _heard[-1]
        if path.is_relative_to(root):
            found[path.name if event == "open" else event] += 1


sys.addaudithook(_hear)


@contextmanager
def opened_below(folder: Path) -> Iterator[Counter[str]]:
    """Counts names of files that are opened inside the block, and how often folders are listed, by event."""
    found = Counter[str]()
    _heard.append((folder.absolute(), found))
    try:
        yield found
    finally:
        _heard.pop()
