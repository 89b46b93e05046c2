"""Children that end with their parent: a pipe from the parent is the child's standard input, and its end is the signal.

This works on every system and also when the parent is killed outright.
"""

import os
import sys
import threading
import time

from musubi_tuner.run_record import log_console
from musubi_tuner.stopping import stop_requested

_VARIABLE = "MUSUBI_PARENT_PIPE"
_SECONDS_TO_SAVE = 600
"""Left to a child that was asked to stop before its parent died: launchers kill their children before a large state is written."""


def child_environment() -> dict[str, str]:
    """Environment for a child started with a pipe as its standard input."""
    return {**os.environ, _VARIABLE: "1"}


def has_parent_pipe() -> bool:
    """Whether this process is a child that ends with its parent."""
    return os.environ.get(_VARIABLE) == "1"


def join_parent() -> None:
    """In a child: end when the parent does, and print into the log of its run. Elsewhere: do nothing."""
    if not has_parent_pipe():
        return
    log_console()
    threading.Thread(target=_watch, name="parent-watch", daemon=True).start()


def _watch() -> None:
    try:
        while os.read(sys.stdin.fileno(), 1024):
            pass
    except OSError:
        return
    if stop_requested():
        time.sleep(_SECONDS_TO_SAVE)
    os._exit(1)
