"""The learning rate that a run plans, as a picture: `train.py RUN_FILE --plan --plot` draws it.

Steps of a file follow one another, with borders between them. Roles that move differently have a curve each. Whatever depends on the
run itself is drawn as its plan has it: under a plateau the rate can be lower than the curve, but not higher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from musubi_tuner.config import RunConfig
from musubi_tuner.errors import ConfigError
from musubi_tuner.schedules import SCHEDULES
from musubi_tuner.training.curves import add_legend, finish_axes, new_figure, save_figure
from musubi_tuner.training.schedulers import schedule_length, schedule_of

MOST_POINTS = 4000
"""Points of a curve; a longer run is drawn at so many of its updates."""


@dataclass(frozen=True)
class Part:
    """A run, or a step of a file.

    Attributes:
        name: of the step; "" = the file has none. total: updates. done: of these, by a state that it would go on from.
    """

    name: str
    config: RunConfig
    total: int
    done: int = 0


@dataclass(frozen=True)
class Curve:
    """Rates of one or more roles that move alike.

    Attributes:
        label: their names and the schedule. rates: of the updates; NaN where the optimizer sets them.
        warmup, end: updates at which warm-up and schedule end; 0 = it has none.
        floor: rate below which measurements do not lower it; 0 = there is no such.
    """

    label: str
    updates: np.ndarray
    rates: np.ndarray
    warmup: int
    end: int
    floor: float


@dataclass(frozen=True)
class Mark:
    """Words at an update, to its left if it is the last one; a border is that of a step or of the run."""

    update: int
    words: str
    to_left: bool = False
    is_border: bool = False


def curves_of(config: RunConfig, total: int) -> list[Curve]:
    """The different curves of a run of so many updates, in the order of its roles."""
    alike: dict[str, tuple[RunConfig, list[str]]] = {}
    for role in [role for role in config.spec.task(config).roles if role not in config.frozen]:
        own = config.for_role(role)
        key = f"{own.optimizer.lr} {own.scheduler.model_dump_json()}"
        alike.setdefault(key, (own, []))[1].append(role)
    return [_curve(own, total, ", ".join(roles) if len(alike) > 1 else "") for own, roles in alike.values()]


def _curve(config: RunConfig, total: int, roles: str) -> Curve:
    scheduler, length = config.scheduler, schedule_length(config, total)
    schedule = schedule_of(config, total)
    steps = np.unique(np.linspace(0, total - 1, min(total, MOST_POINTS)).round().astype(int))
    rates = np.array([config.optimizer.lr * schedule(int(step)) for step in steps])
    label = f"{roles}: {scheduler.type}" if roles else scheduler.type
    if scheduler.type == "plateau":
        label += f"\n(at most; x {scheduler.factor:g} each time the\nloss has stopped improving)"
    if scheduler.type == "adafactor":
        label, rates = f"{label}\n(Adafactor sets the rate)", np.full_like(rates, np.nan)
    return Curve(
        label=label,
        updates=steps + 1,  # after the update, as in metrics.jsonl
        rates=rates,
        warmup=min(scheduler.warmup_updates(length), total),
        end=length if SCHEDULES[scheduler.type].ends else 0,
        floor=scheduler.min_lr if scheduler.type == "plateau" else 0.0,
    )


def draw_schedule(parts: Sequence[Part], target: Path, title: str) -> Path:
    """Draw the planned rates of a run, or of the steps of a file one after the other.

    Raises:
        ConfigError: if the picture cannot be written.
    """
    figure, axes = new_figure(figsize=(10, 4.5))
    begun, number, peaks, marks = 0, 0, list[float](), list[Mark]()
    for part in parts:
        curves = curves_of(part.config, part.total)
        for curve in curves:
            label = f"{part.name}: {curve.label}" if part.name else curve.label
            axes.plot(begun + curve.updates, curve.rates, color=f"C{number}", label=label)
            if curve.floor:
                ends = (begun + curve.updates[0], begun + curve.updates[-1])
                axes.hlines(
                    curve.floor,
                    *ends,
                    color=f"C{number}",
                    linewidth=1,
                    linestyle=":",
                    label=f"min_lr = {curve.floor:g}",
                )
            peaks += [float(curve.rates.max())] if np.isfinite(curve.rates).any() else []
            number += 1
        marks += _marks(part, curves, begun)
        begun += part.total
    axes.set_xlim(0, begun)
    _scale(axes, [peak for peak in peaks if peak > 0], _write(axes, marks, begun))
    finish_axes(axes, f"{title}: planned learning rate", "learning rate")
    if len(parts) > 1:
        axes.set_xlabel("update, over all steps")
    add_legend(axes, fontsize="small")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, target)
    except OSError as error:
        raise ConfigError(f"--plot: {target} cannot be written ({error.strerror}); change run.output_dir") from error
    return target


def _marks(part: Part, curves: Sequence[Curve], begun: int) -> list[Mark]:
    """Where warm-up ends, the schedule ends, the run stands, and the run or a step ends."""
    words: dict[int, list[str]] = {}
    for curve in curves:
        if curve.warmup:
            words.setdefault(curve.warmup, []).append(f"warm-up ends: {curve.warmup:,}")
        if 0 < curve.end < part.total:
            words.setdefault(curve.end, []).append(f"schedule ends: {curve.end:,}")
    if 0 < part.done < part.total:
        words.setdefault(part.done, []).append(f"done: {part.done:,}")
    found = [Mark(begun + update, ", ".join(dict.fromkeys(texts))) for update, texts in sorted(words.items())]
    if part.name:
        return [Mark(begun, f"{part.name}: {part.total:,} updates", is_border=True), *found]
    return [*found, Mark(part.total, f"end: {part.total:,}", to_left=True, is_border=True)]


def _write(axes: Any, marks: Sequence[Mark], width: int) -> int:
    """Draw marks, their words in as many rows as it takes for none to cover another; the number of rows.

    Args:
        width: of the axes, in updates.
    """
    rows: list[list[tuple[float, float]]] = []
    for mark in sorted(marks, key=lambda mark: not mark.is_border):
        style: dict[str, Any] = {"linewidth": 1.2} if mark.is_border else {"linewidth": 0.8, "linestyle": ":"}
        axes.axvline(mark.update, color="grey", **style)
        size = len(mark.words) * LETTER * width
        to_left = mark.to_left or mark.update + size > width
        begin, end = (mark.update - size, mark.update) if to_left else (mark.update, mark.update + size)
        free = (
            number for number, taken in enumerate(rows) if all(end <= left or right <= begin for left, right in taken)
        )
        row = next(free, len(rows))
        rows += [[]] * (row == len(rows))
        rows[row] = [*rows[row], (begin, end)]
        axes.annotate(
            mark.words,
            (mark.update, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if to_left else 4, -4 - ROW * row),
            textcoords="offset points",
            ha="right" if to_left else "left",
            va="top",
            fontsize="small",
            color="dimgrey",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5},
        )
    return len(rows)


LETTER, ROW, HEIGHT = 0.0105, 12, 270
"""Width of a letter of the words as a share of the axes; height of a row of them, and of the axes, in points."""


def _scale(axes: Any, peaks: Sequence[float], rows: int) -> None:
    """Show all rates below so many rows of words; on a log scale where they would otherwise not be seen side by side."""
    if not peaks:
        axes.text(0.5, 0.4, "Adafactor sets the rate", transform=axes.transAxes, ha="center", color="dimgrey")
        axes.set_yticks([])
        return
    share = (8 + ROW * rows) / HEIGHT
    highest, lowest = max(peaks), min(peaks) / 100
    if highest > 10 * min(peaks):
        axes.set_yscale("log")
        axes.set_ylim(lowest, highest * (highest / lowest) ** (share / (1 - share)))
        return
    axes.set_ylim(0, highest / (1 - share))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
