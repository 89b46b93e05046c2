"""Lay out a FluxFlow run as the published trainer does, and draw its diagrams: fluxflow-graphs OUTPUT_DIR

    fluxflow-graphs outputs/flux
    fluxflow-graphs data/output/fluxflow_pipeline -o published --training_states

OUTPUT_DIR is the output folder of a run or of a file of steps; a folder of the published trainer, which has graph/training_metrics*.jsonl and no
run, is only drawn. graph/ gets, for every step, training_losses, kl_loss, learning_rates, batch_times, training_overview (PNG) and
training_summary (text).
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musubi_tuner.config.command_line import Parser
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.files import read_text, write_text
from musubi_tuner.fluxflow_output import GRAPH, METRICS, lay_out
from musubi_tuner.runner.steps import FILE as STEPS_FILE
from musubi_tuner.stopping import exit_on_terminate
from musubi_tuner.training.curves import (
    Row,
    draw_curve,
    finish_axes,
    log_if_wide,
    new_figure,
    points,
    running_mean,
    save_figure,
)
from musubi_tuner.training.metrics import FILE

DPI = 150
LOSSES = {
    "vae_loss": "VAE", "recon_loss": "reconstruction", "lpips_loss": "LPIPS", "flow_loss": "flow", "discriminator_loss": "discriminator",
    "generator_loss": "generator",
}  # fmt: skip
VAE_LOSSES = ("vae_loss", "discriminator_loss", "generator_loss", "lpips_loss")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="fluxflow-graphs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_path", metavar="OUTPUT_DIR", help="output folder of a run")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="where the files go (default: OUTPUT_DIR)")
    parser.add_argument(
        "--training_states", action="store_true", help="write training_states.pt too: moments and averages"
    )
    options = parser.parse_args(arguments)
    run = Path(options.output_path)
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; give the output folder of a run")
    exit_on_terminate()
    output = Path(options.output) if options.output else run
    if (run / STEPS_FILE).is_file() or (run / FILE).is_file():
        lay_out(run, output, states=options.training_states)
        source = output / GRAPH
    elif options.training_states or not list((run / GRAPH).glob(f"{METRICS}*.jsonl")):
        raise ConfigError(f"{run}: holds no run: neither {STEPS_FILE} nor {FILE}, nor {GRAPH}/{METRICS}*.jsonl to draw")
    else:
        source = run / GRAPH
    for path in draw_all(source, output / GRAPH):
        print(path)
    return EXIT_OK


def draw_all(source: Path, folder: Path) -> list[Path]:
    """Draw the diagrams of every metrics file of a folder; the files made.

    Raises:
        ConfigError: if a file holds no metrics.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    for path in sorted(source.glob(f"{METRICS}*.jsonl")):
        rows, step = read_published(path), path.stem.removeprefix(METRICS)
        for name, draw in DIAGRAMS.items():
            target = folder / f"{name}{step}.png"
            if draw(rows, target, step.strip("_")):
                made.append(target)
        target = folder / f"training_summary{step}.txt"
        write_text(target, summary(rows))
        made.append(target)
    return made


def read_published(path: Path) -> list[Row]:
    """Lines of published metrics, flat: ``step``, metrics by name, rates as ``lr/<role>``, ``clock`` with what else was measured."""
    rows: list[Row] = []
    for number, line in enumerate(read_text(path, ConfigError).splitlines(), start=1):
        try:
            entry = json.loads(line)
            rates = {f"lr/{name.removesuffix('_lr')}": rate for name, rate in entry.get("learning_rates", {}).items()}
            head = {
                "step": entry["global_step"] + 0,
                "session": entry.get("session_id"),
                "when": entry.get("timestamp"),
            }
            rows.append({**head, **entry["metrics"], **rates, "clock": entry.get("extras", {})})
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise ConfigError(f"{path} line {number}: is not a line of metrics ({line[:40]!r})") from problem
    if not rows:
        raise ConfigError(f"{path}: is empty")
    return rows


def _rates(rows: list[Row]) -> list[str]:
    return sorted({tag for row in rows for tag in row if tag.startswith("lr/")})


def _losses(axes: Any, rows: list[Row], names: Sequence[str]) -> bool:
    """Curves of losses; logarithmic, or nearly so where there are values of both signs."""
    found = {name: points(rows, name) for name in names}
    shown = {name: values for name, values in found.items() if len(values[0])}
    if "vae_loss" in shown and "recon_loss" in shown and np.array_equal(shown["vae_loss"][1], shown["recon_loss"][1]):
        del shown["recon_loss"]  # the same numbers here
    for name, own in shown.items():
        draw_curve(axes, own, LOSSES[name])
    every = [values for _, values in shown.values()]
    if any((values[np.isfinite(values)] <= 0).any() for values in every):
        axes.set_yscale("symlog", linthresh=1e-3)
    elif every:
        log_if_wide(axes, *every)
    if shown:
        axes.legend(fontsize=9)
    return bool(shown)


def _title(step: str, text: str) -> str:
    return f"{step}: {text}" if step else text


def draw_losses(rows: list[Row], target: Path, step: str) -> bool:
    """All losses but KL."""
    figure, axes = new_figure(figsize=(12, 6))
    shown = _losses(axes, rows, list(LOSSES))
    finish_axes(axes, _title(step, "losses"), "loss", "global step")
    return _done(figure, target, shown)


def draw_kl(rows: list[Row], target: Path, step: str) -> bool:
    """KL on the left, its weight on the right."""
    kl, beta = points(rows, "kl_loss"), points(rows, "kl_beta")
    figure, axes = new_figure(figsize=(12, 6))
    draw_curve(axes, kl, "KL", color="tab:orange")
    log_if_wide(axes, kl[1])
    finish_axes(axes, _title(step, "KL, and its weight (dashed, right)"), "KL", "global step")
    if len(beta[0]):
        other = axes.twinx()
        draw_curve(other, beta, "beta", smooth=False, color="tab:green", linestyle="--")
        other.set_ylabel("beta", color="tab:green")
        other.set_ylim(bottom=0)
    return _done(figure, target, len(kl[0]) > 0)


def _draw_rates(axes: Any, rows: list[Row]) -> bool:
    found = [(tag, points(rows, tag)) for tag in _rates(rows)]
    for number, (tag, own) in enumerate(found):
        draw_curve(axes, own, tag.removeprefix("lr/"), smooth=False, linestyle=("-", "--", ":", "-.")[number % 4])
    if found:
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=9)
    return bool(found)


def draw_rates(rows: list[Row], target: Path, step: str) -> bool:
    """One line per rate."""
    figure, axes = new_figure(figsize=(12, 6))
    shown = _draw_rates(axes, rows)
    finish_axes(axes, _title(step, "learning rates"), "learning rate", "global step")
    return _done(figure, target, shown)


def draw_times(rows: list[Row], target: Path, step: str) -> bool:
    """Seconds per batch with their running mean."""
    steps, seconds = points(rows, "clock/batch_time")
    figure, axes = new_figure(figsize=(12, 6))
    axes.plot(steps, seconds, alpha=0.35, linewidth=1)
    if len(steps) > 10:
        axes.plot(steps, running_mean(seconds, max(3, min(50, len(steps) // 5))), color="tab:red", label="running mean")
        axes.legend(fontsize=9)
    axes.set_ylim(bottom=0)
    finish_axes(axes, _title(step, "time of a batch"), "seconds", "global step")
    return _done(figure, target, len(steps) > 0)


def draw_overview(rows: list[Row], target: Path, step: str) -> bool:
    """Up to three panels: losses of the autoencoder, of the flow, rates."""
    panels: list[tuple[str, str, Callable[[Any], bool]]] = [
        ("losses of the autoencoder", "loss", lambda axes: _losses(axes, rows, VAE_LOSSES)),
        ("loss of the flow", "loss", lambda axes: _losses(axes, rows, ("flow_loss",))),
        ("learning rates", "learning rate", lambda axes: _draw_rates(axes, rows)),
    ]
    has = (len(points(rows, "vae_loss")[0]), len(points(rows, "flow_loss")[0]), len(_rates(rows)))
    shown = [panel for panel, count in zip(panels, has, strict=True) if count]
    if not shown:
        return False
    figure, every = new_figure(len(shown), 1, figsize=(12, 4.2 * len(shown)), squeeze=False)
    for axes, (text, label, draw) in zip(every[:, 0], shown, strict=True):
        draw(axes)
        finish_axes(axes, _title(step, text), label, "global step")
    return _done(figure, target, True)


def _done(figure: Any, target: Path, shown: bool) -> bool:
    """Save a figure in which something is shown; whether it is."""
    from matplotlib import pyplot

    if shown:
        save_figure(figure, target, dpi=DPI)
    else:
        pyplot.close(figure)
    return shown


DIAGRAMS: dict[str, Callable[[list[Row], Path, str], bool]] = {
    "training_losses": draw_losses,
    "kl_loss": draw_kl,
    "learning_rates": draw_rates,
    "batch_times": draw_times,
    "training_overview": draw_overview,
}


def summary(rows: list[Row]) -> str:
    """Numbers of a metrics file as text."""
    lines = [
        f"session {rows[0]['session']}",
        f"logged  {len(rows)} times, from {rows[0]['when']} to {rows[-1]['when']}",
        f"steps   {rows[0]['step']} to {rows[-1]['step']}",
        "",
        f"{'metric':<24}{'first':>12}{'last':>12}{'least':>12}{'most':>12}{'mean':>12}{'spread':>12}{'change':>10}",
    ]
    names = sorted({key for row in rows for key in row} - {"step", "clock", "session", "when", *_rates(rows)})
    for name in names:
        values = points(rows, name)[1]
        if not len(values):
            continue
        first, last = values[0], values[-1]
        change = f"{100 * (last - first) / abs(first):+.1f} %" if first else ""
        numbers = (first, last, values.min(), values.max(), values.mean(), values.std())
        lines.append(f"{name:<24}" + "".join(f"{value:>12.5g}" for value in numbers) + f"{change:>10}")
    rates = _rates(rows)
    if rates:
        lines += ["", f"{'learning rate':<24}{'first':>12}{'last':>12}"]
        for tag in rates:
            values = points(rows, tag)[1]
            lines.append(f"{tag.removeprefix('lr/'):<24}{values[0]:>12.4g}{values[-1]:>12.4g}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
