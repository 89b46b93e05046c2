"""[optimizer]."""

from typing import Any

from pydantic import field_validator

from musubi_tuner.config.fields import Section, param
from musubi_tuner.config.when import is_
from musubi_tuner.optimizers import Name, having, named


class OptimizerSection(Section):
    """The update rule."""

    tab = "learning rate"

    type: Name = param(
        "AdamW", "Update rule; docs/optimizers.md compares them. Other packages: pip install \".[optim]\".", flat=("optimizer_type",)
    )  # fmt: skip
    lr: float = param(
        1e-4, "Learning rate after warm-up; for optimizers that find theirs, a factor of it (absent = 1).", flat=("learning_rate",),
        ge=0, le=10, step=1e-5
    )  # fmt: skip
    group_lr: dict[str, float] = param(
        {},
        'Pattern of parameter names -> their learning rate, such as {"double_blocks.*" = 5e-5}; the first match counts, 0 keeps them.',
    )
    weight_decay: float = param(0.01, "Decoupled weight decay.", ge=0, le=10, step=0.01)
    betas: list[float] = param(
        [0.9, 0.999],
        "Decay of the moments; absent = as usual for the optimizer.",
        min_length=2,
        max_length=3,
        when=is_("optimizer.type", *having(lambda record: bool(record.betas))),
    )
    eps: float = param(
        1e-8, "Added to the denominator.", gt=0, le=1, when=is_("optimizer.type", *having(lambda record: record.eps))
    )
    args: dict[str, Any] = param(
        {}, "More arguments of the optimizer, such as {d_coef = 2.0} of Prodigy; docs/optimizers.md lists them."
    )
    decay_all: bool = param(
        False, "Decay every parameter as published; otherwise norms, biases, gates and scalars are left alone."
    )
    fused_backward: bool = param(
        False, "Step each parameter as soon as its gradient is complete, so that no others are held; without clipping and accumulation.",
        flat=("fused_backward_pass",), when=is_("optimizer.type", *having(lambda record: record.alone)),
    )  # fmt: skip

    @field_validator("type", mode="before")
    @classmethod
    def _in_any_spelling(cls, value: Any) -> Any:
        return (named(value) if isinstance(value, str) and value else None) or value
