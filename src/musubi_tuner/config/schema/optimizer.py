"""[optimizer]."""

from typing import Literal

from musubi_tuner.config.fields import Section, param
from musubi_tuner.config.when import is_not


class OptimizerSection(Section):
    """The update rule."""

    tab = "learning rate"

    type: Literal["AdamW", "AdamW8bit", "Adafactor"] = param(
        "AdamW", "AdamW of torch, 8-bit AdamW of bitsandbytes, or Adafactor of transformers.", flat=("optimizer_type",)
    )
    lr: float = param(1e-4, "Learning rate after warm-up.", flat=("learning_rate",), ge=0, le=10, step=1e-5)
    weight_decay: float = param(0.01, "Decoupled weight decay.", ge=0, le=10, step=0.01)
    betas: list[float] = param(
        [0.9, 0.999],
        "Decay of the first and second moment.",
        min_length=2,
        max_length=2,
        when=is_not("optimizer.type", "Adafactor"),
    )
    eps: float = param(1e-8, "Added to the denominator.", gt=0, le=1, when=is_not("optimizer.type", "Adafactor"))
    decay_all: bool = param(
        False, "Decay every parameter as published; otherwise norms, biases, gates and scalars are left alone."
    )
