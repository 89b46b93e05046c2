"""Output that ends no program: not for a letter that the console lacks, and not because nobody reads any more. Torch-free.

The encoding stays the one of the user; a letter that it lacks is written as an escape. What cannot be written at all, because
the reader of the pipe has ended, the terminal is gone or the disk of the log is full, is dropped, which is said once. A
stream that was closed before the start leads nowhere: else the next file that is opened would get its number, and with it
whatever a library prints.

Children inherit the streams, and the way with letters in PYTHONIOENCODING: those too that are no command of ours.
"""

import io
import os
import select
import sys
from pathlib import Path
from typing import Any, TextIO

_HARMLESS = ("backslashreplace", "replace", "ignore", "xmlcharrefreplace", "namereplace")
"""Ways with a letter that the encoding lacks which are no error; the first is taken where the user chose none of them."""
_VARIABLE = "PYTHONIOENCODING"
_replaced: list[TextIO] = []
"""Streams that were standing before: a stream that nobody knows any more would close its file."""


class LastingOutput(io.FileIO):
    """A file to write to whose failures are no errors: what cannot be written is dropped, and the next attempt is a new one.

    Args:
        descriptor: of the open file, which is not closed. name: in the warning.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._unsaid = f"warning: {name} cannot be written"

    def write(self, data: Any) -> int:
        """Returns the bytes that were written or dropped."""
        try:
            while (written := super().write(data)) is None:  # it does not block, and its reader is slow
                select.select([], [self.fileno()], [], 1.0)
            return written
        except OSError as error:
            unsaid, self._unsaid = self._unsaid, ""
            if unsaid and self.fileno() != 2 and sys.stderr is not None:
                print(f"{unsaid} ({error.strerror}); continuing without it", file=sys.stderr)
            return memoryview(data).nbytes


def secure_output() -> None:
    """Prepare the standard streams of this process and its children. Called twice, it does nothing the second time."""
    _reopen_closed()
    encoding, _, handler = os.environ.get(_VARIABLE, "").partition(":")
    if handler not in _HARMLESS:
        os.environ[_VARIABLE] = f"{encoding}:{_HARMLESS[0]}"
    sys.stdout = _lasting(sys.stdout, 1, "standard output")
    sys.stderr = _lasting(sys.stderr, 2, "standard error")


def _reopen_closed() -> None:
    """Lead standard streams that are closed into nothing."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, so usually this one
            os.dup2(opened, number)
            if opened != number:
                os.close(opened)
            os.set_inheritable(number, True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Not on the number: a file of somebody else may have it by now.
            setattr(sys, name, Path(os.devnull).open("r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115 (stays open)


def _lasting(stream: TextIO, number: int, name: str) -> TextIO:
    """A standard stream that never fails; one that somebody else has put in its place only takes every letter."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    handler = stream.errors if stream.errors in _HARMLESS else _HARMLESS[0]
    stream.reconfigure(errors=handler)
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if type(raw) is not io.FileIO or raw.fileno() != number:
        return stream
    stream.flush()
    _replaced.append(stream)
    lasting = LastingOutput(number, name)
    return io.TextIOWrapper(
        lasting if raw is stream.buffer else io.BufferedWriter(lasting),  # type: ignore[arg-type]  # python -u has no buffer
        encoding=stream.encoding,
        errors=handler,
        newline="\n" if os.linesep == "\n" else None,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
