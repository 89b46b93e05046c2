"""[distributed]."""

from musubi_tuner.config.fields import MOST, Section, param
from musubi_tuner.config.when import is_not


class DistributedSection(Section):
    """How many processes train; also written [accelerate]."""

    expert = True

    num_processes: int = param(
        1, "Processes on this machine, one per GPU.", ge=1, le=1024, resume="free", unit="processes"
    )
    main_process_port: int | None = param(None, "Port of the main process; absent = a free one.", ge=1, le=65535,
                                          resume="free", when=is_not("distributed.num_processes", 1))  # fmt: skip
    fsdp: bool = param(
        False,
        "Shard weights, gradients, optimizer state and EMA across the processes (FSDP2); for full training.",
        resume="free",
    )
    timeout_minutes: int = param(
        30, "How long a process waits for the gradients of the others; there is no limit while the main process draws or saves.",
        ge=1, le=MOST, resume="free", unit="minutes"
    )  # fmt: skip
