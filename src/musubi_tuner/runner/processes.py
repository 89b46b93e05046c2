"""Stages and the processes of a training, run as children whose memory is gone when they end.

The processes of a training are started here rather than by torch's elastic agent, which kills its processes 30 seconds after a
signal, however large the state is that they write, and calls a wanted stop an error. `accelerate launch` works as well; what it
lacks is said in the README.
"""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from musubi_tuner.errors import ConfigError
from musubi_tuner.parent import child_environment
from musubi_tuner.stopping import Repeats, is_stop, stop_signals

_POLL_SECONDS = 0.1
_OTHER_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables in which MPI and SLURM say how many processes they have started."""


def launched_processes() -> int:
    """How many processes a launcher has started together with this one; 1 = none has.

    torch's launcher says so in WORLD_SIZE, and only then do processes find each other.

    Raises:
        ConfigError: if several were started that do not know of each other: each would train alone, in the same folder.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    found = next((name for name in _OTHER_COUNTS if os.environ.get(name, "1") not in ("", "0", "1")), None)
    if found is None and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ):
        found = "MASTER_ADDR"  # accelerate sets it for several processes or machines; with --cpu, or without --multi_gpu, it starts one
    if found is not None:
        raise ConfigError(
            f"{found}={os.environ[found]}: a launcher started several processes that would train apart and overwrite each other, "
            "because WORLD_SIZE is not set. Start one torchrun per machine (torchrun --nnodes N ... train.py RUN.toml), or accelerate launch "
            "--multi_gpu (on a CPU too, with ACCELERATE_USE_CPU=true); docs/scaling.md has the commands"
        )
    return 1


def run_child(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run ``python arguments...`` and return its exit code, 128 + n for a signal; see `run_children`."""
    return run_children(arguments, [environment or {}])


def run_children(arguments: Sequence[str], environments: Sequence[Mapping[str, str]], patience: float = 10.0) -> int:
    """Run ``python arguments...`` once per environment, side by side.

    Each child is in a process group of its own: a signal reaches this process only, which passes it on once and waits as
    long as the children take; a second one ends them at once. Children end when this process does (their standard input
    is a pipe). If one fails, the others, which can only wait for it, are ended.

    Args:
        patience: seconds for the others to end by themselves when one has failed.

    Returns:
        Exit code of the first that failed, 128 + n for a signal; 0 if none did.
    """
    received: list[int] = []
    repeats = Repeats()
    children = [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            env={**child_environment(), **environment},
            start_new_session=True,
        )
        for environment in environments
    ]

    def forward(signum: int, frame: object) -> None:
        count = repeats.count()
        if count == 1:
            received.append(signum)
            for child in children:
                child.send_signal(signum)
        elif count == 2:
            _kill(children)

    previous = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        code = _wait(children, patience)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for child in children:
            if child.stdin:
                child.stdin.close()
    return 128 + received[0] if received else code


def rank_environments(processes: int, port: int | None, gpu: bool) -> list[dict[str, str]]:
    """Variables by which torch.distributed and accelerate know a process, one dict per rank.

    Args:
        port: where the processes find each other; None = any that is free. gpu: each process takes the GPU of its rank.
    """
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or _free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        # Until the trainer sets the threads of every process.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "no",
    }
    if not gpu:
        shared["ACCELERATE_USE_CPU"] = "true"
    else:
        from accelerate.utils import check_cuda_p2p_ib_support

        if not check_cuda_p2p_ib_support():
            # Consumer cards of the RTX 40 series cannot exchange directly; accelerate refuses to start without these.
            shared |= {name: os.environ.get(name, "1") for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(children: Sequence["subprocess.Popen[bytes]"], patience: float) -> int:
    """Wait for all children; returns the exit code of the first that failed, or 0."""
    failed, give_up = 0, math.inf
    while True:
        running = [child for child in children if child.poll() is None]
        failed = failed or next((child.returncode for child in children if child.returncode), 0)
        if not running:
            return 128 - failed if failed < 0 else failed
        if failed and not is_stop(failed):
            give_up = min(give_up, time.monotonic() + patience)
        if time.monotonic() > give_up:
            _kill(running)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0].wait(_POLL_SECONDS)


def _kill(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    for child in children:
        if child.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(child.pid, signal.SIGKILL)
            else:
                child.kill()
