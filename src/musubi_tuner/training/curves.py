"""Curves of a run, drawn from its metrics.jsonl.

    losses.png               losses of training and, where there is one, validation
    learning_rate.png        as the optimizer had it
    gradient_norm.png        before clipping
    training_by_noise.png    training loss around each noise level, over the updates and in a few parts of the run
    loss_by_noise.png        validation loss at each noise level, over the updates and at a few of them
    step_time.png            seconds per update, and images per second
    steps.png                losses and learning rate of the steps of a file, one after the other

A curve of many points is drawn pale, with its running mean over it. A picture whose values the file lacks is not made.
"""

import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from musubi_tuner.errors import DataError
from musubi_tuner.files import read_text, replace_file
from musubi_tuner.training.metrics import FILE, SIGMA

Row = dict[str, Any]
Points = tuple[np.ndarray, np.ndarray]
MANY = 120
"""Points from which on a curve is smoothed."""
SHOWN_STEPS = 5
"""Validations, or parts of the training, that are drawn over the noise level."""
VAL_SIGMA = "loss/val_sigma_"
RATE = "train/lr_x"


def read_rows(path: Path) -> list[Row]:
    """Lines of a metrics file; one that a killed run left half is passed over.

    Raises:
        DataError: if the file is missing, holds something else, or nothing.
    """
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the output folder of a run, which holds {FILE}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path} line {number}: is not a line of metrics ({line[:40]!r})") from error
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: holds no lines yet; the run has not logged an update (see log.every_steps)")
    return rows


def points(rows: Iterable[Row], tag: str) -> Points:
    """Steps and values of a tag, where it was written; ``clock/<name>`` is a value of the clock."""
    clock, _, name = tag.partition("/")
    sources = ((row["step"], row.get("clock", {}) if clock == "clock" else row) for row in rows)
    key = name if clock == "clock" else tag
    found = [(step, values[key]) for step, values in sources if isinstance(values.get(key), int | float)]
    steps, values = (np.array([pair[axis] for pair in found], dtype=float) for axis in (0, 1))
    return steps, values


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window, shorter at the ends; values that are not finite are left out."""
    good = np.isfinite(values)
    ones = np.ones(window)
    total, count = (np.convolve(x, ones)[window // 2 :][: len(values)] for x in (np.where(good, values, 0.0), good))
    return total / np.where(count > 0, count, np.nan)


def mean_of(values: np.ndarray) -> float:
    """Mean of the finite values; NaN of none."""
    good = values[np.isfinite(values)]
    return float(good.mean()) if len(good) else float("nan")


def draw_curve(axes: Any, found: Points, label: str, smooth: bool = True, **style: Any) -> None:
    """One curve, smoothed if it is long."""
    steps, values = found
    if len(steps) < MANY or not smooth:
        marker = "o" if len(steps) < 30 else None
        axes.plot(steps, values, label=label, marker=marker, markersize=3, **style)
        return
    (pale,) = axes.plot(steps, values, alpha=0.25, linewidth=0.8, **style)
    axes.plot(steps, running_mean(values, max(3, len(steps) // 40)), label=label, color=pale.get_color())


def log_if_wide(axes: Any, *values: np.ndarray) -> None:
    """A log scale where positive values differ more than fivefold."""
    every = np.concatenate([value[np.isfinite(value)] for value in values])
    if len(every) and every.min() > 0 and every.max() > 5 * every.min():
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        if every.max() < 100 * every.min():
            # A decade or two has too few powers of ten to read values from.
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())


def finish_axes(axes: Any, title: str, ylabel: str, xlabel: str = "update") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if xlabel == "update":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.grid(alpha=0.3)


def add_legend(axes: Any, **options: Any) -> None:
    """Names of the curves, beside the axes so that they cover none."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, **options)


def new_figure(rows: int = 1, columns: int = 1, **options: Any) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, layout="constrained", **options)


def save_figure(figure: Any, target: Path, dpi: int = 120) -> None:
    from matplotlib import pyplot

    replace_file(target, lambda path: figure.savefig(path, format="png", dpi=dpi))
    pyplot.close(figure)


def loss_tags(rows: Iterable[Row]) -> list[str]:
    """Losses to draw: the parts of the training loss, its total where it is more than one part, and the validation loss."""
    found = dict.fromkeys(
        tag
        for row in rows
        for tag in row
        if tag == "epoch/loss"
        or (tag.startswith("loss/") and not tag.startswith((VAL_SIGMA, SIGMA)) and not tag.endswith("_weight"))
    )
    parts = [tag for tag in found if tag not in ("loss/total", "loss/val", "epoch/loss")]
    whole = ["loss/total"] if len(parts) > 1 and "loss/total" in found else []
    return [*whole, *parts, *(tag for tag in ("epoch/loss", "loss/val") if tag in found)]


def plot_losses(rows: list[Row], target: Path, title: str) -> bool:
    """Losses over the updates; false if there are none."""
    tags = loss_tags(rows)
    if not tags:
        return False
    figure, axes = new_figure(figsize=(9, 5))
    names = {"loss/val": "validation", "epoch/loss": "mean of the epoch"}
    for tag in tags:
        style: dict[str, Any] = {"color": "black"} if tag in names else {}
        if tag == "epoch/loss":
            style["linestyle"] = "--"
        draw_curve(axes, points(rows, tag), names.get(tag, tag.removeprefix("loss/")), **style)
    log_if_wide(axes, *(points(rows, tag)[1] for tag in tags))
    finish_axes(axes, f"{title}: losses", "loss")
    add_legend(axes)
    save_figure(figure, target)
    return True


def _plot_one(rows: list[Row], target: Path, title: str, *, tags: dict[str, str], ylabel: str, wide: bool) -> bool:
    """Curves of a few tags on one pair of axes."""
    shown = {label: points(rows, tag) for tag, label in tags.items() if len(points(rows, tag)[0])}
    if not shown:
        return False
    figure, axes = new_figure(figsize=(8, 4))
    for label, found in shown.items():
        draw_curve(axes, found, label, smooth=wide)
    if wide:
        log_if_wide(axes, *(values for _, values in shown.values()))
    else:
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    finish_axes(axes, f"{title}: {ylabel}", ylabel)
    if len(shown) > 1:
        add_legend(axes)
    save_figure(figure, target)
    return True


def plot_step_time(rows: list[Row], target: Path, title: str) -> bool:
    """Seconds per update above, images per second below."""
    seconds, rate = points(rows, "clock/step_seconds"), points(rows, "clock/images_per_second")
    if not len(seconds[0]):
        return False
    figure, (upper, lower) = new_figure(2, figsize=(8, 6), sharex=True)
    draw_curve(upper, seconds, "seconds")
    draw_curve(lower, rate, "images", color="tab:green")
    log_if_wide(upper, seconds[1])
    if upper.get_yscale() == "linear":
        upper.set_ylim(bottom=0)
    lower.set_ylim(bottom=0)
    finish_axes(upper, f"{title}: time of an update, mean since the last line", "seconds", "")
    finish_axes(lower, "", "images per second")
    save_figure(figure, target)
    return True


def plot_loss_by_noise(rows: list[Row], target: Path, title: str, *, prefix: str, what: str, parts: bool) -> bool:
    """Loss at each noise level: over the updates on the left, over the noise level on the right.

    Args:
        prefix: of the tags, before the noise level. what: names the loss.
        parts: show means over parts of the run on the right, for values of which one line is mostly chance.
    """
    from matplotlib import colormaps

    tags = sorted({tag for row in rows for tag in row if tag.startswith(prefix)})
    if not tags:
        return False
    sigmas = [float(tag.removeprefix(prefix)) for tag in tags]
    measured = [row for row in rows if any(tag in row for tag in tags)]
    figure, (left, right) = new_figure(1, 2, figsize=(13, 5))
    colours = colormaps["viridis"]
    for tag, sigma in zip(tags, sigmas):
        draw_curve(left, points(measured, tag), f"{sigma:g}", color=colours(0.95 * sigma))
    every = [points(measured, tag)[1] for tag in tags]
    shown = min(SHOWN_STEPS, len(measured))
    if parts:
        groups = np.array_split(np.arange(len(measured)), shown)
    else:
        groups = list(np.unique(np.linspace(0, len(measured) - 1, shown).round().astype(int))[:, None])
    for number, group in enumerate(groups):
        chosen = [measured[index] for index in group]
        means = [mean_of(points(chosen, tag)[1]) for tag in tags]
        shade = colormaps["cividis"](0.95 * (1 - (number + 1) / len(groups)))
        first, last = chosen[0]["step"], chosen[-1]["step"]
        label = f"{last:,}" if first == last else f"{first:,} to {last:,}"
        right.plot(sigmas, means, marker="o", markersize=4, color=shade, label=label)
    for axes in (left, right):
        log_if_wide(axes, *every)
    finish_axes(left, f"{title}: {what} by noise level", "loss")
    finish_axes(right, "the same over the noise level", "loss", "noise level (0 = image, 1 = noise)")
    right.set_xlim(0, 1)
    add_legend(left, title="noise level", fontsize="small", ncols=-(-len(tags) // 20))
    add_legend(right, title="update", fontsize="small")
    save_figure(figure, target)
    return True


def plot_learning_rates(rows: list[Row], target: Path, title: str) -> bool:
    """The rate, and those of groups of parameters that have a factor of their own."""
    factors = sorted({float(tag.removeprefix(RATE)) for row in rows for tag in row if tag.startswith(RATE)})
    tags = {"train/lr": "optimizer.lr and its schedule"} | {
        f"{RATE}{x:g}": f"parameters with {x:g} times that" for x in factors
    }
    return _plot_one(rows, target, title, tags=tags, ylabel="learning rate", wide=False)


PLOTS: dict[str, Callable[[list[Row], Path, str], bool]] = {
    "losses.png": plot_losses,
    "learning_rate.png": plot_learning_rates,
    "gradient_norm.png": partial(
        _plot_one, tags={"train/grad_norm": "gradient norm"}, ylabel="gradient norm before clipping", wide=True
    ),
    "training_by_noise.png": partial(plot_loss_by_noise, prefix=SIGMA, what="training loss", parts=True),
    "loss_by_noise.png": partial(plot_loss_by_noise, prefix=VAL_SIGMA, what="validation loss", parts=False),
    "step_time.png": plot_step_time,
}  # fmt: skip


def plot_steps(steps: list[tuple[str, Path]], target: Path, title: str) -> Path:
    """Draw the steps of a file one after the other in one picture: losses above, learning rate below, borders between them.

    Args:
        steps: name and metrics file of each, in order.

    Raises:
        DataError: if a file cannot be read, or the folder of ``target`` cannot be written.
    """
    figure, (upper, lower) = new_figure(2, 1, figsize=(11, 7), sharex=True)
    begun, every = 0, []
    for number, (name, path) in enumerate(steps):
        try:
            rows = read_rows(path)
        except DataError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        for axes, tags in ((upper, ("loss/total", "loss/val")), (lower, ("train/lr",))):
            for style, tag in zip(("-", "--"), tags):
                updates, values = points(rows, tag)
                if len(updates):
                    axes.plot(begun + updates, values, style, color=f"C{number}", label=f"{name}: {tag}")
                    every += [values] if axes is upper else []
        if number:
            for axes in (upper, lower):
                axes.axvline(begun, color="grey", linewidth=0.8, linestyle=":")
        upper.annotate(
            name, (begun, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -12), textcoords="offset points"
        )
        begun += int(rows[-1]["step"])
    if not every:
        raise DataError(f"{title}: no step has a loss to draw")
    upper.set_xlim(0, begun)
    upper.margins(y=0.12)  # for the names
    log_if_wide(upper, *every)
    lower.set_ylim(bottom=0)
    finish_axes(upper, title, "loss", "")
    finish_axes(lower, "", "learning rate", "update, over all steps")
    add_legend(upper, fontsize="small")
    _make(target.parent)
    save_figure(figure, target)
    return target


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror}); choose another folder with --output") from error


def plot_run(metrics: Path, folder: Path, title: str) -> tuple[list[Path], list[str]]:
    """Draw all curves of a metrics file.

    Returns:
        The pictures made, and the names of those whose values are not there.

    Raises:
        DataError: if the file cannot be read, or the folder cannot be written.
    """
    rows = read_rows(metrics)
    _make(folder)
    made = [folder / name for name, plot in PLOTS.items() if plot(rows, folder / name, title)]
    return made, [name for name in PLOTS if folder / name not in made]
