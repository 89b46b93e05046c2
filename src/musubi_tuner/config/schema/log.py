"""[log]."""

from musubi_tuner.config.fields import MOST, Section, param


class LogSection(Section):
    """What is written down while training."""

    tab = "logging"

    every_steps: int = param(
        10, "Updates between log lines.", flat=("log_every",), ge=1, le=MOST, resume="free", unit="updates"
    )
    tensorboard: bool = param(True, "Write TensorBoard events to `logs/`.", resume="free")
    noise_bins: int = param(
        8, "Equal slices of the noise level, for each of which the training loss is logged; 0 = off.", ge=0, le=100,
        resume="free", unit="slices"
    )  # fmt: skip
