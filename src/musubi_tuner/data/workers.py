"""Loader workers: the shared memory through which their batches come, and what it means when one dies. Torch-free.

A worker writes a batch into /dev/shm, where the training process takes it up. Containers give it little (Docker 64 MB). A worker
that finds no room gets an error, or dies of a bus error where the system grants more than there is. Some locks of Python lie
there too.
"""

import multiprocessing
import multiprocessing.queues
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from musubi_tuner.errors import TrainingError, UserError
from musubi_tuner.units import Bytes, format_bytes

if TYPE_CHECKING:
    from musubi_tuner.data.batch import Batch

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps shared memory; other systems have no such limit."""
AHEAD = 2
"""Batches that torch's loader lets every worker make ahead."""
_PAGES: Bytes = 1 << 16
"""What a batch takes beside its bytes: whole pages for its small tensors and for locks."""
_LOCKS = 3
"""Semaphores of a queue; there is a queue for each worker, one for all, and an event."""
_MORE_ROOM = "Set train.loader_workers = 0, or give it more room: docker run --shm-size=2g, or mount -o remount,size=2g"
_CONTINUE = "The same command continues from the newest state, if there is one"


def shared_memory_warning(batch: Bytes, workers: int, processes: int = 1) -> str | None:
    """A warning if batches of loader workers may not fit into the shared memory that is free.

    Args:
        batch: bytes of the largest one. processes: that train, each with its own workers.
    """
    needed = processes * (AHEAD * workers + 1) * (batch + _PAGES)
    if not workers or not SHARED_MEMORY.is_dir() or needed <= shutil.disk_usage(SHARED_MEMORY).free:
        return None
    return (
        f"warning: {_room()}, and {processes * workers} loader worker(s) may put {format_bytes(needed)} of batches there; one that "
        f"finds no room ends the run, often by a bus error. {_MORE_ROOM} {SHARED_MEMORY}"
    )


@contextmanager
def explain_workers(workers: int) -> Iterator[None]:
    """Turn the death of a loader worker inside into an error that says what it died of.

    Raises:
        TrainingError: for a worker that died, and at once if there is no room for the locks of the workers.
    """
    if not workers:
        yield
        return
    spawn = multiprocessing.get_context("spawn")
    try:
        locks = [spawn.Lock() for _ in range(_LOCKS * (workers + 2))]
    except OSError as error:
        raise TrainingError(
            f"no loader worker can be started ({error.strerror}): {_room()}. {_MORE_ROOM} {SHARED_MEMORY}"
        ) from error
    del locks
    try:
        yield
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if getattr(error, "filename", None):
            raise
        raise TrainingError(
            "a loader worker ended while it handed over a batch: it failed, or was killed, as the system does when main memory is "
            f"full (its log, dmesg, says so); lower train.loader_workers, or set it to 0. {_CONTINUE}"
        ) from None
    except RuntimeError as error:
        reason = _cause(error)
        if reason is None:
            raise
        raise TrainingError(f"{reason}. {_CONTINUE}") from None


def to_shared_memory(batch: "Batch | UserError") -> "Batch | UserError":
    """In a worker: put a batch where the training process finds it.

    Left to the thread that sends it, a failure would only be printed there, and the training would wait for the batch for ever.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]
    if isinstance(batch, UserError):
        return batch
    for tensor in batch.all_tensors():
        tensor.share_memory_()
    return batch


def _end_worker(error: BaseException, batch: object) -> None:
    """A batch that cannot be sent after all ends its worker, which the training process notices."""
    print(f"error: a loader worker cannot send a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _cause(error: BaseException) -> str | None:
    """What an error of torch's loader means; None if it is none of a dead worker or of shared memory."""
    found: BaseException | None = error
    texts: list[str] = []
    while found is not None:  # the loader's own error says less than the one that it was raised from
        texts.insert(0, str(found))
        found = found.__cause__ or found.__context__
    text = "\n".join(texts)
    dead = re.search(
        r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: ([\w ]+)|exited unexpectedly)", text
    )
    signal = (dead[3] or "").strip() if dead is not None else ""
    if signal == "Bus error" or (dead is None and re.search(r"unable to .*(shared memory|/torch_)", text)):
        who = f"a loader worker (process {dead[1]}) died of a bus error" if dead else "a loader worker failed"
        return f"{who}: {_room()}, and batches come through it. {_MORE_ROOM} {SHARED_MEMORY}"
    if dead is None:
        if "Too many open files" in text:
            return "the loader workers have too many files open; raise the limit (ulimit -n 65536), or set train.loader_workers = 0"
        return None
    if signal == "Killed":
        return (
            f"a loader worker (process {dead[1]}) was killed, as the system does when main memory is full (its log, dmesg, "
            "says so); lower train.loader_workers, or set it to 0"
        )
    how = (
        f"ended by a signal ({signal})"
        if signal
        else "ended without a message: it failed, or was killed, as the system does when main memory is full (its log, dmesg, says so)"
    )
    return f"a loader worker (process {dead[1]}) {how}; train.loader_workers = 0 reads the batches without workers"


def _room() -> str:
    """How much shared memory there is."""
    if not SHARED_MEMORY.is_dir():
        return "there is no room in shared memory"
    usage = shutil.disk_usage(SHARED_MEMORY)
    return (
        f"{SHARED_MEMORY} (shared memory) has {format_bytes(usage.total)}, of which {format_bytes(usage.free)} are free"
    )
