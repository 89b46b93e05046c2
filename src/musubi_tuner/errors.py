"""Errors that a user can cause, and the exit codes of every command.

A message says where (file or TOML key), what was found, what was expected and what to do. Each class
derives from the built-in exception that a caller of the library would expect. Commands run their body
through `run_command`, which prints such an error without a traceback.

    0 done    1 failed while working    2 wrong input    130 Ctrl-C    143 SIGTERM    129 the terminal closed
"""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from musubi_tuner.output import secure_output
from musubi_tuner.quiet import quiet_libraries

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPT = 130
EXIT_TERMINATE = 143


class UserError(Exception):
    """Base of everything a user can mend; printed without a traceback."""

    exit_code = EXIT_FAILED


class ConfigError(UserError, ValueError):
    """Something in a TOML file or on the command line is wrong."""

    exit_code = EXIT_WRONG_INPUT


class DataError(UserError, ValueError):
    """Images, captions or metadata files are not usable."""

    exit_code = EXIT_WRONG_INPUT


class CacheError(UserError, RuntimeError):
    """A cache file is missing, stale or broken."""


class CheckpointError(UserError, RuntimeError):
    """A model file or a saved state cannot be used."""


class NoAverageError(CheckpointError):
    """A checkpoint has no averaged weights."""


class TrainingError(UserError, RuntimeError):
    """Training had to stop."""


class Interrupted(BaseException):
    """The program was asked to stop: by a signal, and ``exit_code`` is 128 + its number; or otherwise (``signum`` 0), and it is 0.

    Without a message nothing is printed.

    Like KeyboardInterrupt it is no `Exception`: code that catches those must not swallow it.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum if signum else EXIT_OK


def describe_os_error(error: OSError) -> str:
    """One line for an operating-system error: the file, the reason, and what to do about a full or read-only disk."""
    advice = {
        errno.ENOSPC: "free some space or point the key at another disk, then run the same command again",
        errno.EACCES: "check the permissions of the folder",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.EDQUOT: "your quota on this disk is used up",
    }.get(error.errno or 0)
    where = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error)
    return f"{where}{reason}" + (f"; {advice}" if advice else "")


def describe_unwritable(error: UnicodeEncodeError) -> str:
    """One line for a name that the system's encoding cannot express, or that no text can."""
    return (
        f"{error.object!r} holds {error.object[error.start : error.end]!r}, which {error.encoding} cannot express; rename the file, "
        "or if the letter is right, run with the variables LC_ALL=C.UTF-8 and PYTHONUTF8=1"
    )


def out_of_memory(error: BaseException) -> tuple[str, bool] | None:
    """What a lack of memory is called in one line, and whether it is the device's; None for any other error."""
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    if not (on_device or isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)):
        return None
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    where = "the device's memory" if on_device else "main memory"
    return f"{where} is full" + (f" ({asked[1]} more were wanted)" if asked else ""), on_device


@contextmanager
def advise_on_memory(kind: type[UserError], advice: str | Callable[[bool], str]) -> Iterator[None]:
    """Turn a lack of memory inside into an error with advice.

    Args:
        advice: the same for all memory, or made from whether it is the device's.

    Raises:
        UserError: of the ``kind``.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        found = out_of_memory(error)
        if found is None:
            raise
        reason, on_device = found
        raise kind(f"{reason}; {advice if isinstance(advice, str) else advice(on_device)}") from None


_secrets: set[str] = set()


def keep_secret(text: object) -> None:
    """Let no error show a text, such as an access token."""
    if isinstance(text, str) and len(text) >= 8:  # no token is as short, and a word would be hidden everywhere
        _secrets.add(text)


def mask_secrets(text: str) -> str:
    """A message without access tokens, which a server or a library may repeat."""
    for secret in {*_secrets, os.environ.get("HF_TOKEN") or ""} - {""}:
        text = text.replace(secret, "***").replace(repr(secret)[1:-1], "***")
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text)


def run_command(body: Callable[[], int | None]) -> int:
    """Run a command's body and turn its outcome into an exit code, with no traceback for a user's mistake."""
    secure_output()
    quiet_libraries()
    # Threads that wait for each other spin only briefly before they sleep: beside another busy program endless spinning
    # makes a step several times as long. Read by OpenMP when torch is loaded, so it is set here, before.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    try:
        return body() or EXIT_OK
    except UserError as error:
        print(f"error: {mask_secrets(str(error))}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stop:
        if text := str(stop):
            print(text, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPT
    except UnicodeEncodeError as error:
        print(f"error: {describe_unwritable(error)}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {describe_os_error(error)}", file=sys.stderr)
        return EXIT_FAILED
    except (RuntimeError, MemoryError) as error:
        found = out_of_memory(error)
        if found is None:
            raise
        print(f"error: {found[0]}; end other programs that use it", file=sys.stderr)
        return EXIT_FAILED
