"""Curves of the learning rate: one record for each, from which settings, importers, checks and docs take what they need. Torch-free.

A curve is a pure function of the update number k, from 0: the multiplier of the learning rate of that update. There is no state to save:
resuming asks for the same k again. The formulas are those of diffusers and transformers where they have the curve.

Two of them say less than the rate. That of plateau is multiplied by what the measurements have left of it (`training.plateau`), and
adafactor leaves the rate to the optimizer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Name = Literal[
    "cosine", "linear", "constant", "cosine_with_restarts", "polynomial", "inverse_sqrt", "warmup_stable_decay", "rex", "exponential",
    "piecewise_constant", "plateau", "adafactor",
]  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """What a curve is made from.

    Attributes:
        warmup: updates of warm-up. total: update at which it ends. floor: its least value, a share of the learning rate.
        cycles: falls of a cosine with restarts. power: of a polynomial. timescale: of an inverse square root; None = the warm-up,
            or 10,000 without one. decay: updates of the fall at the end of a stable curve, or their share of all; None = a tenth.
            rex_alpha: of rex, which is z / (alpha + (1 - alpha) z) of what is left of the time, z.
        gamma: of an exponential, whose rate is multiplied by it at every update.
        pieces: (update at which a piece ends, its multiplier), then the multiplier of the rest.
        least: floor of a polynomial without one: 1e-7, as a share of the learning rate.
    """

    warmup: int
    total: int
    floor: float = 0.0
    cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    decay: float | None = None
    rex_alpha: float = 0.1
    gamma: float = 0.999
    pieces: tuple[tuple[float, float], ...] = ()
    least: float = 0.0

    def progress(self, step: int) -> float:
        """Share of the time after warm-up, clamped to [0, 1]: past the end the rate stays as it is there."""
        return min(max((step - self.warmup) / max(1, self.total - self.warmup), 0.0), 1.0)


@dataclass(frozen=True)
class Schedule:
    """One curve.

    Attributes:
        factor: (curve, k) -> multiplier after warm-up. about: a sentence.
        uses: settings of [scheduler] that act on it, beside those of warm-up. warms: whether there is a warm-up. rises: whether that
            begins at the floor, and not at 0.
        ends: whether it depends on the length of the run. elsewhere: names of other trainers.
    """

    factor: Callable[[Curve, int], float]
    about: str
    uses: tuple[str, ...] = ()
    warms: bool = True
    rises: bool = False
    ends: bool = True
    elsewhere: tuple[str, ...] = ()


def _cosine(share: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def _restarts(curve: Curve, step: int) -> float:
    share = curve.progress(step)
    return 0.0 if share >= 1 else 0.5 * (1 + math.cos(math.pi * ((curve.cycles * share) % 1.0)))


def _polynomial(curve: Curve, step: int) -> float:
    end = curve.floor or curve.least
    return float((1 - curve.progress(step)) ** curve.power) * (1 - end) + end


def _inverse_sqrt(curve: Curve, step: int) -> float:
    timescale = curve.timescale or curve.warmup or 10_000
    return 1 / math.sqrt((step + timescale - curve.warmup) / timescale)


def _stable(curve: Curve, step: int) -> float:
    wanted = 0.1 if curve.decay is None else curve.decay
    length = min(int(wanted * curve.total) if wanted < 1 else int(wanted), curve.total - curve.warmup)
    passed = step - (curve.total - length)
    return 1.0 if passed < 0 else _cosine(min(passed / max(1, length), 1.0), curve.floor)


def _rex(curve: Curve, step: int) -> float:
    left = 1 - curve.progress(step)
    return curve.floor + (1 - curve.floor) * left / (curve.rex_alpha + (1 - curve.rex_alpha) * left)


def _pieces(curve: Curve, step: int) -> float:
    return next(value for end, value in curve.pieces if step < end)


SCHEDULES: dict[Name, Schedule] = {
    "cosine": Schedule(
        lambda curve, step: _cosine(curve.progress(step), curve.floor),
        "half a cosine down to min_lr", ("min_lr", "total_steps"), elsewhere=("cosine_with_min_lr",),
    ),
    "linear": Schedule(
        lambda curve, step: max(curve.floor, 1 - curve.progress(step) * (1 - curve.floor)),
        "a straight line down to min_lr", ("min_lr", "total_steps"),
    ),
    "constant": Schedule(lambda curve, step: 1.0, "as it is", ends=False, elsewhere=("constant_with_warmup",)),
    "cosine_with_restarts": Schedule(
        _restarts, "cycles cosines from the whole rate to 0, one after the other", ("cycles", "total_steps")
    ),
    "polynomial": Schedule(_polynomial, "a power of what is left of the time", ("power", "min_lr", "total_steps")),
    "inverse_sqrt": Schedule(_inverse_sqrt, "falls with the square root of the time", ("timescale",), ends=False),
    "warmup_stable_decay": Schedule(
        _stable, "constant, then a cosine over the last decay_steps", ("decay_steps", "min_lr", "total_steps"), rises=True,
        elsewhere=("wsd",),
    ),
    "rex": Schedule(_rex, "slow at first, steep at the end", ("rex_alpha", "min_lr", "total_steps")),
    "exponential": Schedule(
        lambda curve, step: max(curve.floor, curve.gamma ** (step - curve.warmup)), "multiplied by gamma at every update",
        ("gamma", "min_lr"), ends=False, elsewhere=("ExponentialLR",),
    ),
    "piecewise_constant": Schedule(_pieces, "multipliers by update, as in rules", ("rules",), warms=False, ends=False),
    "plateau": Schedule(
        lambda curve, step: 1.0, "falls by factor each time the loss has not improved for patience measurements",
        ("factor", "patience", "threshold", "cooldown", "min_lr"), ends=False,
        elsewhere=("reduce_lr_on_plateau", "ReduceLROnPlateau"),
    ),
    "adafactor": Schedule(
        lambda curve, step: 1.0, "the rate is internal to Adafactor with relative_step", warms=False, ends=False
    ),
}  # fmt: skip
assert tuple(SCHEDULES) == get_args(Name)
BY_NAME: dict[str, Name] = {
    other.lower(): name for name, record in SCHEDULES.items() for other in (name, *record.elsewhere)
}
"""Names of all trainers, in lower case -> ours."""
WITHOUT_WARMUP: tuple[Name, ...] = tuple(name for name, record in SCHEDULES.items() if not record.warms)


def using(setting: str) -> tuple[Name, ...]:
    """The curves on which a setting of [scheduler] acts."""
    return tuple(name for name, record in SCHEDULES.items() if setting in record.uses)


def pieces_of(rules: str) -> tuple[tuple[float, float], ...]:
    """Pieces of ``1:10,0.1:20,0.01``: multiplier 1 before update 10, 0.1 before 20, 0.01 from there.

    Raises:
        ValueError: saying what is expected.
    """
    *parts, last = rules.split(",")
    found: list[tuple[float, float]] = []
    try:
        for part in parts:
            value, _, end = part.partition(":")
            found.append((int(end), float(value)))
        found.append((math.inf, float(last)))
    except ValueError:
        raise ValueError('expected pieces such as "1:1000,0.1:2000,0.01"') from None
    ends = [end for end, _ in found]
    if sorted(set(ends)) != ends or ends[0] < 1:
        raise ValueError("expected updates that increase from piece to piece")
    if not all(0 <= value <= 1000 for _, value in found):
        raise ValueError("expected multipliers from 0 to 1000")
    return tuple(found)


def warmup(step: int, warmup_steps: int, kind: str = "linear") -> float:
    """Warm-up multiplier for step < warmup_steps: ``linear`` k / W, ``cosine`` (1 - cos(pi k / W)) / 2."""
    share = step / warmup_steps
    return 0.5 * (1 - math.cos(math.pi * share)) if kind == "cosine" else share


def multiplier(name: str, curve: Curve, warmup_type: str = "linear") -> Callable[[int], float]:
    """The multiplier of a curve by update number.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule '{name}'; known: {', '.join(SCHEDULES)}")
    record = SCHEDULES[name]  # type: ignore[index]  # a key, as was just asked
    if not record.warms:
        return lambda step: record.factor(curve, step)
    least = curve.floor if record.rises else 0.0

    def at(step: int) -> float:
        if step >= curve.warmup:
            return record.factor(curve, step)
        risen = warmup(step, curve.warmup, warmup_type)
        return least + (1 - least) * risen if least else risen

    return at
