"""[scheduler]."""

from typing import Literal

from musubi_tuner.config.fields import MOST, Section, param
from musubi_tuner.config.when import is_not, on


class SchedulerSection(Section):
    """The learning rate over updates."""

    tab = "learning rate"

    type: Literal["cosine", "linear", "constant"] = param("cosine", "Shape after warm-up.", flat=("lr_scheduler",))
    warmup_steps: int = param(
        0, "Updates of warm-up from zero.", flat=("lr_warmup_steps",), ge=0, le=MOST, unit="updates"
    )
    warmup_ratio: float | None = param(
        None,
        "Warm-up as a fraction of all updates (or of total_steps), instead of warmup_steps; 0 = use warmup_steps.",
        flat=("lr_warmup_ratio",),
        ge=0,
        lt=1,
        step=0.01,
    )
    warmup_type: Literal["linear", "cosine"] = param(
        "linear", "Shape of the warm-up.", when=on("scheduler.warmup_steps") | on("scheduler.warmup_ratio"), rule="V30"
    )
    min_lr: float = param(
        0.0,
        "Learning rate at the end of cosine and linear.",
        ge=0,
        le=10,
        resume="free",
        when=is_not("scheduler.type", "constant"),
        rule="V30",
        step=1e-5,
    )
    total_steps: int | None = param(
        None, "Updates until cosine and linear reach their end, where they stay; absent = the length of the run, so an extended run "
        "continues at a higher rate, unless its previous length is set here.", ge=1, le=MOST, resume="free", unit="updates", when=is_not("scheduler.type", "constant")
        | on("scheduler.warmup_ratio"), rule="V30"
    )  # fmt: skip

    def warmup_updates(self, total: int) -> int:
        """Updates of warm-up of a schedule that ends after so many."""
        return int(self.warmup_ratio * total) if self.warmup_ratio else self.warmup_steps
