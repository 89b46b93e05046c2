"""Whether a file is still the one that was hashed, without reading it. Torch-free.

The quick check compares size, time of modification, time of the last change of any kind (ctime) and inode. Size and
modification time alone say little: archives and file managers put times back, and pictures of one size that swap their
names look alike. No program can set a ctime, and a rename brings its own inode.

A file that is written twice within one tick of its file system's clock keeps its times. So a file that was changed a moment
ago is hashed when its tick is over: a later change then shows.

Windows has no ctime: the field holds the time of creation, and the inode is 0 on file systems without file numbers. What is
written over in place there and given its old size and modification time passes the quick check; ``cache.verify = "full"``
finds it. File systems that number files anew at each mount (sshfs, some cloud drives) only cost a hash per file and mount.
"""

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TICK_NS, COARSE_TICK_NS = 100_000_000, 2_000_000_000
"""Longest ticks of clocks that count parts of a second, and of those that do not (FAT counts every other second)."""
KEPT = 8
"""States remembered of one file: one per machine that reads it, and some that are history."""

STAMPS = ("size", "mtime_ns", "ctime_ns", "inode")

State = dict[str, Any]
"""`STAMPS`, and ``sha256`` where the content was read."""


def stamps_of(status: os.stat_result) -> tuple[int, ...]:
    """The values of `STAMPS`."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def quick_state(path: Path) -> State:
    """The state of a file but for its hash: one stat."""
    return dict(zip(STAMPS, stamps_of(path.stat()), strict=True))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashed_state(path: Path) -> State:
    """The state of a file with its hash. One that does not stop changing has nothing but a hash, which nobody believes."""
    state: State = {}
    for _ in range(3):
        before = quick_state(path)
        time.sleep(rest_of_tick(before) / 1e9)
        state = {**before, "sha256": hash_file(path)}
        if quick_state(path) == before:
            return state
    return {"sha256": state["sha256"]}


def rest_of_tick(state: State) -> int:
    """Nanoseconds until a change of the file must show in its times. Times far ahead are another clock's, and show it now."""
    now, rest = time.time_ns(), 0
    for stamp in (state["mtime_ns"], state["ctime_ns"]):
        tick = TICK_NS if stamp % 1_000_000_000 else COARSE_TICK_NS
        if stamp < now + tick:
            rest = max(rest, stamp + tick - now)
    return rest


def agrees(known: Mapping[str, Any], now: State) -> bool:
    """Whether a known state is that of the file now, by the quick check."""
    return all(known.get(name) == value for name, value in now.items())
