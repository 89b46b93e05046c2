"""Files that are never half-written, and the named points where a test may pull the plug. Torch-free.

`replace_file` writes beside the target, flushes and renames: a reader sees the old file or the new one. A crash
leaves at most a file whose name begins with `.tmp-`, which the next writer of the folder removes.

Fault points: with MUSUBI_FAULT="name:n" in the environment the process kills itself with SIGKILL when it passes
the point of that name for the n-th time. Tests use it to prove that any interruption can be continued from.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"
MAX_NAME = 255
"""Bytes of a file name that every usual file system takes."""
_fault_name, _, _fault_count = os.environ.get("MUSUBI_FAULT", "").partition(":")
_fault_left = int(_fault_count or 1)


def fault_point(name: str) -> None:
    """Die here if the environment asks for it; otherwise do nothing."""
    global _fault_left
    if _fault_name == name:
        _fault_left -= 1
        if _fault_left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


def temporary_path(target: Path) -> Path:
    """A name in the folder of ``target`` that no other process or thread uses."""
    own = f"{TEMPORARY_PREFIX}{os.getpid()}-{threading.get_ident()}-"
    name = own + target.name
    return target.with_name(name if fits(name) else own + sha256(name_bytes(target.name)).hexdigest())


def fits(name: str) -> bool:
    """Whether a file can have this name."""
    return len(name_bytes(name)) <= MAX_NAME


def name_bytes(name: str) -> bytes:
    """A file name as file systems of UTF-8 store it, whatever the locale."""
    return name.encode("utf-8", "surrogateescape")


def replace_file(target: Path, write: Callable[[Path], object], *, sync: bool = True) -> None:
    """Write a file through a temporary name and rename it into place.

    Args:
        target: final path; its folder must exist.
        write: writes the content to the path it is given.
        sync: flush the content to the disk before the rename. A caller that writes many files may sync once instead.
    """
    temporary = temporary_path(target)
    try:
        write(temporary)
        fault_point("file.written")
        if sync:
            sync_path(temporary)
        temporary.replace(target)
        fault_point("file.renamed")
    finally:
        temporary.unlink(missing_ok=True)
    if sync:
        sync_path(target.parent)


def write_new_file(target: Path, write: Callable[[Path], object]) -> bool:
    """As `replace_file`, but never over another file: false where the name is taken, also by another process just now."""
    try:
        target.touch(exist_ok=False)
    except FileExistsError:
        return False
    try:
        replace_file(target, write)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return True


def link_file(source: Path, target: Path) -> bool:
    """Give a file a second name instead of writing it again; false where the file system has no such links.

    Nothing here writes into a file that exists, so replacing one of the two leaves the other as it was.
    """
    try:
        replace_file(target, lambda path: os.link(source, path))
    except OSError:
        return False
    return True


def write_text(target: Path, text: str) -> None:
    """Replace a text file."""
    replace_file(target, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))


def write_json(target: Path, value: Any) -> None:
    """Replace a JSON file."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_path(path: Path) -> None:
    """Flush a file or folder to the disk; folders are skipped where the system cannot open them (Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process left in a folder; call it only while holding the folder's lock."""
    import shutil

    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def folder_lock(folder: Path, busy: Callable[[str], Exception], name: str = ".lock") -> Iterator[None]:
    """Hold a folder for one writer. The kernel releases the lock when the process dies.

    Args:
        folder: created if missing.
        busy: makes the error to raise when another process holds the lock, from what it wrote about itself.
        name: of the lock file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(descriptor):
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            raise busy(holder or "another process")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}".encode())
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # exists on Windows only
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
