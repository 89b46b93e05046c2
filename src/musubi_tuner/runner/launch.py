"""What the processes of a training on this machine learn from their environment.

They are started as our own children rather than by torch's elastic agent, which kills its processes 30 seconds after a
signal, however large the state is that they write, and calls a wanted stop an error. `accelerate launch` works as well;
what it lacks is said in the README.
"""

import os
import socket


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
