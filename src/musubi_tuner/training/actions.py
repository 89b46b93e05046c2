"""What happens between updates: log, end an epoch, validate, draw, save, stop. All ranks do it together, the main one writes."""

import math
import time

import torch

from musubi_tuner.data.plan import Update
from musubi_tuner.errors import Interrupted, TrainingError
from musubi_tuner.run_record import STOPPED, recorder, tell
from musubi_tuner.training.build import Run
from musubi_tuner.training.checkpoint import EPOCH_METRIC
from musubi_tuner.training.due import due_after
from musubi_tuner.training.optimizers import found_rate
from musubi_tuner.training.role import weights_of
from musubi_tuner.training.samples import DrawingLeft, Samples
from musubi_tuner.training.update import Outcome
from musubi_tuner.training.validation import METRIC
from musubi_tuner.units import format_seconds


def count(run: Run, update: Update, outcome: Outcome) -> None:
    """Count an update, with its losses if its gradients were finite.

    Raises:
        TrainingError: if they were not, and that ends the run.
    """
    position, window = run.position, run.snapshot.window
    window.weights |= outcome.weights
    if outcome.not_finite is None:
        position.skipped_in_a_row = 0
        if "total" in outcome.sums:  # unless no phase was due
            run.snapshot.epoch_loss.add(outcome.sums["total"] / update.samples)
        for name, value in outcome.sums.items():
            window.add(f"loss/{name}", value.to(run.ranks.sum_device, torch.float64) / update.samples)
        window.bins.add(outcome.bins)
        for tag, value in outcome.measured.items():
            window.add(tag, value)
        window.updates += 1
    else:
        _not_finite(run, outcome)
    position.step += 1
    position.update += 1
    position.images += update.samples
    if run.metrics:
        run.metrics.advance(update.samples)


def _not_finite(run: Run, outcome: Outcome) -> None:
    """A gradient that is not finite: stop, or skip the update.

    fp16 finds its loss scale by overflowing now and then, so a few such updates in a row are normal there.
    """
    position, train = run.position, run.config.train
    position.skipped += 1
    position.skipped_in_a_row += 1
    several = f" of {outcome.not_finite}" if len(run.task.phases) > 1 else ""
    where = f"step {position.step + 1}: the gradient{several} is not finite (items {', '.join(outcome.items[:8])})"
    moved = " and ".join(outcome.moved)
    if outcome.moved_anyway:
        raise TrainingError(
            f"{where}. With optimizer.fused_backward weights have moved by then, so nothing is saved; the same command continues from the "
            "newest state. Lower optimizer.lr, look at these items, or set optimizer.fused_backward = false"
        )
    if run.roles[0].scaler is None and train.on_nonfinite == "stop":
        raise TrainingError(
            f"{where}. {'It changed nothing' if not outcome.moved else f'It changed nothing, but {moved} had moved'}. Lower optimizer.lr, "
            'look at these items, or set train.on_nonfinite = "skip"'
        )
    if position.skipped_in_a_row >= train.max_skipped_updates:
        raise TrainingError(f"{where}; {position.skipped_in_a_row} updates in a row were skipped, giving up")
    if run.metrics:
        skipped = f"it is skipped, after {moved} moved" if outcome.moved else "the update is skipped"
        run.metrics.say(f"warning: {where}; {skipped}")


def log(run: Run) -> None:
    """Write the line of the window."""
    if run.snapshot.window.updates == 0:
        return
    weights = run.snapshot.window.weights
    means, by_noise = run.snapshot.window.means()
    if run.metrics is None:
        return
    position, device = run.position, run.ranks.device
    first: tuple[str, ...] = ("loss/total", "loss/main")
    losses = {tag: means[tag] for tag in first if tag in means}
    losses |= {tag: value for tag, value in means.items() if tag.startswith("loss/")}
    rates: dict[str, float] = {}
    of_groups: dict[str, float] = {}
    for role in [role for role in run.roles if not role.frozen]:
        suffix, lr = f"_{role.name}" if len(run.roles) > 1 else "", role.rate(position.step - 1)
        rates[f"train/lr{suffix}"] = lr
        found = found_rate(role.optimizer)
        if found is not None:
            rates[f"train/d{suffix}"] = found
        scales = {group["lr_scale"] for group in role.optimizer.param_groups} - {1.0}
        of_groups |= {f"train/lr{suffix}_x{scale:g}": lr * scale for scale in sorted(scales)}
    values = {
        **losses,
        **{f"loss/{name}_weight": weight for name, weight in weights.items()},
        **by_noise,
        **rates,
        **{tag: value for tag, value in means.items() if tag.startswith("train/grad_norm")},
        "train/epoch": position.epoch + position.update / run.steps.updates_per_epoch,
        "train/images": position.images,
        "train/skipped": position.skipped,
        **{tag: value for tag, value in means.items() if tag.startswith("max_norm/")},
        **of_groups,
    }
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    run.metrics.log(position.step, values, peak_gib=peak)
    if run.config.spec.log_line is not None:
        run.metrics.say(_published_line(run, run.config.spec.log_line(values)))
    _follow(run, values)


def _published_line(run: Run, text: str) -> str:
    """A line of the family's own trainer: time, step of the file, epoch and batch before it, time of a batch behind it."""
    assert run.metrics is not None
    position, steps, step = run.position, run.steps, run.config.step
    epochs = -(-steps.total_updates // steps.updates_per_epoch)
    where = [time.strftime("[%H:%M:%S]") + (f" Step {step.name} ({step.number}/{step.of})" if step else "")]
    where += [f"Epoch {position.epoch + 1}/{epochs}", f"Batch {position.update}/{steps.updates_per_epoch}"]
    return " | ".join([*where, text, f"{run.metrics.step_seconds:.1f}s/batch"])


def _follow(run: Run, values: dict[str, float]) -> None:
    """Let the metric that may end a step see a line."""
    until, position = run.snapshot.until, run.position
    if until is not None:
        until.add(values, position.epoch + (position.update == run.steps.updates_per_epoch))
        if until.warning and run.metrics:
            run.metrics.say(until.warning)


def reached(run: Run) -> bool:
    """Whether the metric of a step ends it now, the same on all ranks."""
    until = run.snapshot.until
    if until is None or not run.ranks.any(bool(until.reason)):
        return False
    if run.metrics:
        run.metrics.say(f"step {run.position.step}: this step of the file ends here: {until.reason}")
    return True


def end_epoch(run: Run) -> None:
    """Write the mean loss of an epoch, and keep its weights if it is the lowest and there is no validation."""
    if not run.snapshot.epoch_loss.updates:
        return
    step, mean = run.position.step, run.snapshot.epoch_loss.mean()
    if run.metrics:
        values = {EPOCH_METRIC: mean, "epoch/step": step}
        run.metrics.measured(step, values, 0.0, place=run.position.epoch + 1)
        _follow(run, values)
    if run.validator is None:
        _lower_rates(run, EPOCH_METRIC, mean)
        if run.best and run.best.improve(mean):
            _save_best(run)


def _lower_rates(run: Run, metric: str, value: float) -> None:
    """Let the plateaus see a measurement, which all ranks have; the rates that fall do so from the next update on."""
    step = run.position.step
    for role in run.roles:
        if role.plateau is not None and role.plateau.measure(value, step) and run.metrics:
            whose = f" of {role.name}" if len(run.roles) > 1 else ""
            run.metrics.say(
                f"step {step}: the learning rate{whose} falls to {role.rate(step):.3g}, since {metric} has not improved on "
                f"{role.plateau.lowest:.4g} in {role.plateau.patience + 1} measurement(s)"
            )


def validate(run: Run) -> None:
    """Measure the held-out images, on all ranks together, and keep the weights if they are the best."""
    if run.validator is None:
        return
    if run.metrics:
        tell(phase="validate")
    begun, step, ema = time.perf_counter(), run.position.step, run.role.ema
    averaged = run.config.validation.weights == "ema" and ema is not None and ema.updates > 0
    with run.role.averaged(averaged):
        values = run.validator.measure(run.model, step)
    value = values[METRIC]
    better = run.best is not None and run.best.improve(value)
    if run.metrics:
        seconds = time.perf_counter() - begun
        run.metrics.measured(step, values, seconds)
        _follow(run, values)
        run.metrics.say(
            f"step {step}: validation loss {value:.4f}{', the lowest so far' if better else ''} "
            f"({'averaged' if averaged or run.role.averages_itself else 'trained'} weights, {len(run.validator.dataset)} image(s) at "
            f"{len(run.validator.times)} noise levels, {format_seconds(seconds)})"
        )
        if not math.isfinite(value):
            run.metrics.say(f"warning: step {step}: the validation loss is not finite")
    _lower_rates(run, METRIC, value)
    if better:
        _save_best(run)


def _save_best(run: Run) -> None:
    weights = weights_of(run.roles)
    if run.saver:
        assert run.best is not None
        entry = run.saver.best(run.best, run.position, weights)
        if run.uploads and run.config.hub.release == "best":
            run.uploads.release(entry)
    run.ranks.wait()


def draw_samples(run: Run) -> None:
    """Draw the sample prompts; a request to stop leaves them to the next start."""
    samples, step = run.samples, run.position.step
    if samples is None or (isinstance(samples, Samples) and run.config.sample.prompts is None):
        return
    samples.due = True
    if run.metrics:
        tell(phase="sample", message=samples.message)
    try:
        drawn = samples.draw(step, run.metrics)
        samples.due = False
        if drawn and run.metrics:
            run.metrics.say(f"step {step}: drew {drawn} samples into {samples.folder}")
            if run.uploads:
                run.uploads.samples(step)
    except DrawingLeft:
        assert run.metrics is not None
        run.metrics.say(f"step {step}: samples are drawn when the run continues")
    run.ranks.wait()


def save(run: Run, due: dict[str, str], *, with_state: bool | None = None) -> None:
    """Save checkpoints on the way, by name and kind.

    Args:
        with_state: absent = as [save] says.
    """
    if not due:
        return
    with_state = run.config.save.state if with_state is None else with_state
    if run.saver:
        tell(phase="save")
    weights, state = weights_of(run.roles), run.snapshot.take(run.metrics) if with_state else None
    if run.saver:
        for entry in run.saver.on_the_way(due, run.position, weights, state):
            if run.uploads:
                run.uploads.saved(entry)
    if with_state:
        run.state_step = run.position.step
    run.ranks.wait()


def answer_requests(run: Run) -> None:
    """Draw, save or stop if a signal or a file in control asks for it; a stop has a state of this very update.

    Raises:
        Interrupted: with a message on the main rank.
    """
    current = recorder() if run.ranks.main else None
    asked = run.ranks.requests(current.requests() if current else ())
    step = run.position.step
    if asked.sample:
        if run.metrics and run.config.sample.prompts is None:
            run.metrics.say("note: control/sample draws nothing, because the run file has no sample.prompts")
        draw_samples(run)
    stops = bool(asked.signum) or asked.stop
    if (asked.save or stops) and run.state_step != step:
        save(run, {f"step_{step}": "step"}, with_state=True)
    if stops:
        if current:
            current.tell(phase=STOPPED, stopped=True)
        text = f"stopped after step {step}; run the same command again to continue"
        raise Interrupted(asked.signum, text if run.ranks.main else "")


def finish(run: Run) -> None:
    """The final checkpoint and the release folder; then a request to stop that came meanwhile.

    Raises:
        Interrupted: without a message, since the run is complete and has said so.
    """
    weights = weights_of(run.roles)
    state = run.snapshot.take(run.metrics) if run.config.save.state else None
    if run.saver and run.metrics:
        position = run.position
        ended = run.snapshot.until.reason if run.snapshot.until else ""
        names = due_after(run.config, run.steps, position).checkpoints
        entry = run.saver.final(names, position, weights, state, ended)
        if run.uploads:
            run.uploads.saved(entry)
        if run.best and run.validator is None and run.best.value == math.inf:
            run.metrics.say("note: no epoch was trained to its end, so save.best kept nothing")
        taken = format_seconds(time.monotonic() - run.begun)
        run.metrics.say(
            f"finished: {position.step} updates, {position.images} images, {taken} in this start; "
            f"{position.skipped} updates skipped; see {run.config.output_dir}"
        )
    run.ranks.wait()
    if signum := run.ranks.requests().signum:
        raise Interrupted(signum, "")
