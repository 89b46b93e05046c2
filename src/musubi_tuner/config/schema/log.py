"""[log]."""

from typing import Any

from musubi_tuner.config.fields import MOST, Section, param
from musubi_tuner.config.when import on

_WANDB = on("log.wandb")


class LogSection(Section):
    """What is written down while training."""

    tab = "logging"

    every_steps: int = param(
        10, "Log every so many updates.", flat=("log_every",), ge=1, le=MOST, resume="free", unit="updates"
    )
    tensorboard: bool = param(True, "Write TensorBoard events to `logs/`.", resume="free")
    wandb: bool = param(
        False, "Show the run on Weights & Biases (pip install wandb); WANDB_MODE=offline keeps it on this machine.", resume="free"
    )  # fmt: skip
    dir: str | None = param(
        None, "Folder for events, in which every run has its own; absent = `logs/` in output_dir.", flat=("logging_dir",), path=True,
        resume="free", when=on("log.tensorboard") | _WANDB
    )  # fmt: skip
    prefix: str = param("", "Begins the name of the run's folder in log.dir.", flat=("log_prefix",), resume="free",
                        pattern=r"^[\w.\- ]*$", accepts="letters, digits, dots, spaces, - and _", when=on("log.dir"))  # fmt: skip
    project: str = param(
        "musubi-tuner", "Project of W&B.", flat=("log_tracker_name",), min_length=1, resume="free", when=_WANDB
    )
    wandb_run: str | None = param(
        None, "Name of the run on W&B; absent = run.name.", flat=("wandb_run_name",), resume="free", when=_WANDB
    )
    wandb_api_key: str | None = param(
        None, "Key of W&B; better left to WANDB_API_KEY or `wandb login`.", flat=("wandb_key",), secret=True, resume="free",
        tab="setup", when=_WANDB
    )  # fmt: skip
    config: bool = param(
        False, "Show the settings on W&B, without paths and secrets.", flat=("log_config",), resume="free", when=_WANDB
    )  # fmt: skip
    tracker: dict[str, Any] = param(
        {}, "Further arguments of wandb.init, such as entity, group, tags.", resume="free", expert=True, when=_WANDB
    )  # fmt: skip
    noise_bins: int = param(
        8, "Number of equal slices of the noise level for which the training loss is logged separately; 0 = off.", ge=0, le=100,
        resume="free", unit="slices"
    )  # fmt: skip
