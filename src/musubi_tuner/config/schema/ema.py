"""[ema]."""

from typing import Literal

from musubi_tuner.config.fields import Section, param
from musubi_tuner.config.when import on


class EmaSection(Section):
    """A moving average of the weights, saved beside them and used for samples."""

    acts_when = on("ema.enabled")

    enabled: bool = param(True, "Keep the average.")
    decay: float = param(0.9999, "Share of the old average kept at every update.", ge=0, lt=1)
    warmup: bool | Literal["auto"] = param(
        "auto", "Start with a smaller decay: min(decay, (1 + n) / (10 + n)) after n updates. auto = true with a checkpoint and for "
        'adapters, false for a new model and with init = "checkpoint"; a run that continues keeps what it began with.',
    )  # fmt: skip
    on_cpu: bool = param(
        False, "Keep the average in main memory: less memory on the device, one more copy of the weights per update.",
    )  # fmt: skip
    init: Literal["model", "checkpoint"] = param(
        "model", "Start the average as a copy of the model, or from the averaged weights of the checkpoint."
    )
