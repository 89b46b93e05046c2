"""Children that end with their parent: a pipe from the parent is the child's standard input, and its end is the signal.

This works on every system and also when the parent is killed outright.
"""

import os
import sys
import threading

_VARIABLE = "MUSUBI_PARENT_PIPE"


def child_environment() -> dict[str, str]:
    """Environment for a child started with a pipe as its standard input."""
    return {**os.environ, _VARIABLE: "1"}


def die_with_parent() -> None:
    """In a child: watch the pipe, and end the process when the parent is gone. Elsewhere: do nothing."""
    if os.environ.get(_VARIABLE) != "1":
        return
    threading.Thread(target=_watch, name="parent-watch", daemon=True).start()


def _watch() -> None:
    try:
        while os.read(sys.stdin.fileno(), 1024):
            pass
    except OSError:
        return
    os._exit(1)
