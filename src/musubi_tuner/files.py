"""Text files of people and programs, files that are never half-written, locks of folders, and the named points where a
test may pull the plug. Torch-free.

`read_text` is the one way to read text: UTF-8, with or without a byte order mark. What has no UTF-8, such as the bytes of a
file name that no encoding explains, is written by `encodable` and `json_text` so that no writer stumbles over it.

`replace_file` writes beside the target, flushes and renames: a reader sees the old file or the new one. A crash
leaves at most a file whose name begins with `.tmp-`, which the next writer of the folder removes.

`folder_lock` keeps two writers apart by a lock of the kernel, which ends with its process.

Fault points: with MUSUBI_FAULT="name:n" in the environment the process kills itself with SIGKILL when it passes
the point of that name for the n-th time. Tests use it to prove that any interruption can be continued from.
"""

import errno
import json
import logging
import os
import platform
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from musubi_tuner.errors import DataError, UserError

logger = logging.getLogger(__name__)
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
    replace_file(target, lambda path: path.write_text(encodable(text), encoding="utf-8", newline="\n"))


def write_json(target: Path, value: Any) -> None:
    """Replace a JSON file."""
    write_text(target, json_text(value, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON with letters as they are; what has no UTF-8 makes all of it ASCII with escapes, which read back the same."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text if encodable(text) == text else json.dumps(value, indent=indent)


def encodable(text: str) -> str:
    """The text, such that UTF-8 can hold it.

    Python keeps bytes of file names and command lines that the system's encoding does not explain as lone surrogates. Those
    that are UTF-8 after all (the C locale knows ASCII only) become the letters that they stand for, others U+FFFD.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        except UnicodeEncodeError:  # halves of a pair, which JSON can hold
            return text.encode("utf-8", "replace").decode("utf-8")
    return text


_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""Byte order marks of encodings that are not read; the longer ones first."""


def read_text(path: Path, kind: type[UserError] = DataError) -> str:
    """Text of a UTF-8 file. Byte order marks at the start of lines are left out, and all line ends become newlines.

    Args:
        kind: of the error for another encoding.

    Raises:
        OSError: if the file cannot be read.
        UserError: of that kind, if it is in another encoding: what was found, and the way out.
    """
    data = path.read_bytes()
    found = next((f"{name} text" for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if found is None and len(data) > 1 and (data[0] == 0) != (data[1] == 0):
        found = "UTF-16 text without a byte order mark"
    if found is None:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            byte, line = data[error.start], data.count(b"\n", 0, error.start) + 1
            letter = bytes([byte]).decode("cp1252", "replace")
            reading = f", '{letter}' in Windows code page 1252" if letter.isprintable() and letter != "\ufffd" else ""
            found = f"not UTF-8 text: line {line} holds the byte {byte:02X}{reading}"
        else:
            if "\0" in text:
                raise kind(f"{path}: holds a NUL character at byte {data.index(0)}; save it as plain UTF-8 text")
            return re.sub("^\ufeff+", "", text.replace("\r\n", "\n").replace("\r", "\n"), flags=re.MULTILINE)
    raise kind(
        f"{path}: is {found}; convert it to UTF-8 (editor: Save as, encoding UTF-8; PowerShell: Set-Content -Encoding utf8)"
    )


def read_json(path: Path) -> Any:
    """Content of a JSON file, read as `read_text` does.

    Raises:
        OSError: if it cannot be read.
        DataError: if it is in another encoding, or no JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not a JSON file ({error})") from error


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
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def folder_lock(
    folder: Path, busy: Callable[[str], Exception], name: str = ".lock", *, must_write: bool = True
) -> Iterator[bool]:
    """Hold a folder for one writer; yields whether it can be written to. The kernel releases the lock when the process dies.

    Some network mounts have no locks. There a second writer of this machine is refused by what the first one wrote into
    the lock file, as long as that process lives; a warning says that nothing refuses one of another machine.

    Args:
        folder: created if missing.
        busy: makes the error to raise when another process holds the lock, from what it wrote about itself.
        name: of the lock file.
        must_write: false = a read-only folder is no error; it needs no lock, because nobody writes there.

    Raises:
        OSError: if the folder cannot be written to, and must be.
    """
    descriptor = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if must_write or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    if descriptor is None:
        yield False
        return
    try:
        held, reason = _try_lock(descriptor)
        if not held:
            record = os.read(descriptor, 300).decode("utf-8", "replace").split("\n")
            if reason is None or _lives(record):
                raise busy(record[0].strip() or "another process")
            _warn_without_lock(folder, os.fstat(descriptor).st_dev, reason)
        with suppress(OSError):  # on a full disk the message of another process is poorer, no more
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n{_started(os.getpid())}\n".encode())
        try:
            yield True
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> tuple[bool, str | None]:
    """Whether the lock is ours now; if not, why this file system has no locks, or None if another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        # Windows locks bytes: one far behind the content, which others must be able to read.
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        calls = [lambda: msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)]  # type: ignore[attr-defined]  # on Windows only
    else:
        calls = [
            lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB),
            lambda: fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB),  # some mounts know only those of POSIX
        ]
    reason = None
    for call in calls:
        try:
            call()
            return True, None
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                return False, None
            reason = error.strerror or str(error)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    return False, reason


def _started(pid: int) -> str:
    """What tells a living process from any other that has or had its number; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return f"{boot} {after_name[19].decode()}"


def _lives(record: list[str]) -> bool:
    """Whether the process that wrote a lock file lives, on this machine; a file that is left after a crash says nothing."""
    found = re.match(r"process (\d+) ", record[0])
    if found is None or len(record) < 2 or int(found[1]) == os.getpid():
        return False
    return record[1] != "" and _started(int(found[1])) == record[1]


_warned: set[int] = set()


def _warn_without_lock(folder: Path, device: int, reason: str) -> None:
    """Say once for a file system that it has no locks."""
    if device not in _warned:
        _warned.add(device)
        logger.warning(
            "%s: its file system has no locks (%s): make sure that no program on another machine writes there at the same "
            "time; nothing here can refuse it",
            folder,
            reason,
        )
