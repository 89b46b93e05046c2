"""[train]."""

from typing import Literal

from musubi_tuner.config.fields import MOST, Section, param
from musubi_tuner.config.when import is_, on


class TrainSection(Section):
    """Length, precision and batching."""

    max_steps: int | None = param(
        None,
        "Updates to train; or set max_epochs.",
        flat=("max_train_steps",),
        ge=1,
        le=MOST,
        resume="free",
        unit="updates",
        tab="dataset",
    )
    max_epochs: int | None = param(
        None, "Passes over the data; with max_steps too, whichever ends first.", flat=("max_train_epochs",), ge=1, le=MOST,
        resume="free", unit="epochs", tab="dataset"
    )  # fmt: skip
    grad_accum_steps: int = param(
        1,
        "Micro-batches per update and process.",
        flat=("gradient_accumulation_steps",),
        ge=1,
        le=65536,
        resume="free",
        unit="micro-batches",
        tab="learning rate",
    )
    prior_loss_weight: float = param(
        1.0, "Loss weight of regularisation images (data sets with is_reg = true).", ge=0, le=10, tab="dataset"
    )
    masked_loss: bool = param(
        False,
        "Weight the loss of each position by the image's mask; mask settings are in [general] and [[datasets]].",
        tab="dataset",
    )
    mask_foreground: float = param(
        1.0, "Weight of the loss where the mask is white.", ge=0, le=100, when=on("train.masked_loss"), tab="dataset"
    )
    mask_background: float = param(
        0.0, "Weight of the loss where the mask is black.", ge=0, le=100, when=on("train.masked_loss"), tab="dataset"
    )
    mask_normalize: bool = param(
        False,
        "Divide the weights of a masked image by their mean, so that the scale of its loss does not change.",
        when=on("train.masked_loss"),
        tab="dataset",
    )
    max_grad_norm: float = param(1.0, "Gradients are clipped to this norm; 0 = no clipping.", ge=0, tab="learning rate")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = param(
        "bf16", "Precision of the computation; weights, losses and optimizer stay float32. auto = bf16 if the device has it, "
        "else no.",
    )  # fmt: skip
    full_half: bool = param(
        False, "Hold what trains and its gradients in bfloat16, which halves both; rounded at random, optimizer state stays float32.", flat=("full_bf16",)
    )  # fmt: skip
    stochastic_rounding: bool = param(
        True,
        "Round the steps of bfloat16 weights at random, so that small ones are not lost.",
        when=on("train.full_half"),
    )
    on_nonfinite: Literal["stop", "skip"] = param(
        "stop",
        "A loss or gradient that is not finite stops the run, or skips the update; fp16 always skips.",
        resume="free",
    )
    max_skipped_updates: int = param(
        20,
        "Stop after this many skipped updates in a row.",
        ge=1,
        le=MOST,
        resume="free",
        unit="updates",
        when=is_("train.on_nonfinite", "skip") | is_("train.mixed_precision", "fp16"),
    )
    loader_workers: int = param(
        0,
        "Processes that read cache files.",
        flat=("max_data_loader_n_workers",),
        ge=0,
        le=64,
        resume="free",
        unit="processes",
    )
