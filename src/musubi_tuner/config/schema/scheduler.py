"""[scheduler]."""

from typing import Any, Literal

from pydantic import field_validator

from musubi_tuner.config.fields import MOST, Section, param
from musubi_tuner.config.when import When, is_, is_not, on
from musubi_tuner.schedules import SCHEDULES, WITHOUT_WARMUP, Name, pieces_of, using


def _acts(setting: str) -> When:
    """Where a setting acts: on the curves that use it."""
    return is_("scheduler.type", *using(setting))


_WARMS = is_not("scheduler.type", *WITHOUT_WARMUP)


class SchedulerSection(Section):
    """The learning rate over updates."""

    tab = "learning rate"

    type: Name = param("cosine", "Shape after warm-up.", flat=("lr_scheduler",))
    warmup_steps: int = param(
        0, 'Updates of warm-up from zero. A share of the run, 0.05 or "5%", is warmup_ratio.', flat=("lr_warmup_steps",), ge=0, le=MOST,
        unit="updates", when=_WARMS, rule="V30", as_share="scheduler.warmup_ratio"
    )  # fmt: skip
    warmup_ratio: float | None = param(
        None,
        "Warm-up as a fraction of all updates (or of total_steps), instead of warmup_steps; 0 = use warmup_steps.",
        flat=("lr_warmup_ratio",),
        ge=0,
        lt=1,
        step=0.01,
        when=_WARMS,
        rule="V30",
    )
    warmup_type: Literal["linear", "cosine"] = param(
        "linear", "Shape of the warm-up.", when=on("scheduler.warmup_steps") | on("scheduler.warmup_ratio"), rule="V30"
    )
    min_lr: float = param(
        0.0,
        "Learning rate at the end, or below which plateau does not go.",
        ge=0,
        le=10,
        resume="free",
        when=_acts("min_lr"),
        rule="V30",
        step=1e-5,
    )
    total_steps: int | None = param(
        None, "Updates until the schedule reaches its end, where it stays; absent = the length of the run, so an extended run "
        "continues at a higher rate, unless its previous length is set here.", ge=1, le=MOST, resume="free", unit="updates",
        when=_acts("total_steps") | on("scheduler.warmup_ratio"), rule="V30"
    )  # fmt: skip
    cycles: int = param(
        1, "Cosines that cosine_with_restarts goes through.", flat=("lr_scheduler_num_cycles", "lr_scheduler_number"), ge=1, le=1000,
        neutral=1, when=_acts("cycles"), rule="V30", unit="cycles"
    )  # fmt: skip
    power: float = param(
        1.0, "Exponent of polynomial; 1 = a straight line.", flat=("lr_scheduler_power", "lr_power"), gt=0, le=100, neutral=1.0,
        when=_acts("power"), rule="V30"
    )  # fmt: skip
    timescale: int | None = param(
        None, "Updates after which inverse_sqrt has fallen to 1/sqrt(2) of its start; absent = as many as warm-up, or 10,000.",
        flat=("lr_scheduler_timescale",), ge=1, le=MOST, when=_acts("timescale"), rule="V30", unit="updates"
    )  # fmt: skip
    decay_steps: float | None = param(
        None, "Updates of the fall at the end of warmup_stable_decay (below 1: a share of all); absent = a tenth of all.",
        flat=("lr_decay_steps",), ge=0, le=MOST, when=_acts("decay_steps"), rule="V30", unit="updates"
    )  # fmt: skip
    rex_alpha: float = param(
        0.1, "Of rex, z / (alpha + (1 - alpha) z) with what is left of the time, z.", gt=0, le=1, expert=True, when=_acts("rex_alpha"), rule="V30"
    )  # fmt: skip
    gamma: float = param(
        0.999, "What exponential multiplies the learning rate by at every update; 0.999 halves it every 693.", gt=0, le=1, step=0.001,
        when=_acts("gamma"), rule="V30"
    )  # fmt: skip
    rules: str | None = param(
        None, "Multipliers of piecewise_constant: 1:1000,0.1:2000,0.01 = whole before update 1000, a tenth before 2000, then a hundredth.",
        when=_acts("rules"), rule="V30"
    )  # fmt: skip

    factor: float = param(
        0.1, "What plateau multiplies the learning rate by.", gt=0, lt=1, step=0.05, when=_acts("factor"), rule="V30"
    )  # fmt: skip
    patience: int = param(
        10, "Measurements in a row without improvement that plateau lets pass; the next one lowers the rate.", ge=0, le=MOST,
        when=_acts("patience"), rule="V30", unit="measurements"
    )  # fmt: skip
    threshold: float = param(
        1e-4, "Share of the lowest loss by which another one must be lower to count as an improvement.", ge=0, lt=1, step=1e-4,
        when=_acts("threshold"), rule="V30"
    )  # fmt: skip
    cooldown: int = param(
        0, "Measurements after a fall of the rate that plateau does not count.", ge=0, le=MOST, when=_acts("cooldown"), rule="V30",
        unit="measurements"
    )  # fmt: skip

    @field_validator("rules")
    @classmethod
    def _pieces(cls, value: str | None) -> str | None:
        if value is not None:
            pieces_of(value)
        return value

    def warmup_updates(self, total: int) -> int:
        """Updates of warm-up of a schedule that ends after so many."""
        if not SCHEDULES[self.type].warms:
            return 0
        return int(self.warmup_ratio * total) if self.warmup_ratio else self.warmup_steps

    def shape(self) -> dict[str, Any]:
        """What the curve is made from beside its length and its warm-up; see `schedules.Curve`."""
        return {
            "cycles": self.cycles,
            "power": self.power,
            "timescale": self.timescale,
            "decay": self.decay_steps,
            "rex_alpha": self.rex_alpha,
            "gamma": self.gamma,
            "pieces": pieces_of(self.rules) if self.rules is not None else (),
        }
