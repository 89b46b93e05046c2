"""[validation]."""

from typing import Literal

from musubi_tuner.config.fields import MOST, Section, param
from musubi_tuner.config.when import on


class ValidationSection(Section):
    """The loss on images that are never trained on, with the same noise and noise levels every time."""

    tab = "dataset"
    acts_when = on("validation.split")

    split: float = param(
        0.0, "Share of the pictures held out for validation, with their copies in all data sets; 0 = off.",
        flat=("validation_split",), ge=0, le=0.5, step=0.01
    )  # fmt: skip
    seed: int = param(
        42, "Seed for choosing the images and for their noise.", flat=("validation_seed",), ge=0, lt=2**32
    )
    every_steps: int | None = param(
        None, "Validate every so many updates, and always at the end; 0 = off.", flat=("validate_every_n_steps",), ge=0, le=MOST,
        resume="free", unit="updates"
    )  # fmt: skip
    every_epochs: int | None = param(
        1, "Validate every so many epochs, and always at the end; 0 = off.", flat=("validate_every_n_epochs",), ge=0, le=MOST,
        resume="free", unit="epochs"
    )  # fmt: skip
    times: int = param(
        8, "Noise levels at which each image is measured, evenly spread over [0, 1].", ge=1, le=100, unit="noise levels"
    )
    max_images: int | None = param(
        None, "Validate on at most so many of the held-out images; absent = all.", ge=1, le=MOST, unit="images"
    )
    weights: Literal["ema", "model"] = param(
        "ema",
        "Validate the averaged weights, if ema.enabled keeps them, or the trained ones.",
        when=on("ema.enabled"),
        neutral="model",
    )
