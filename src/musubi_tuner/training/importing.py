"""A checkpoint of a family's own trainer as a state of a run.

The model, its average, the optimizer's moments, the step, the epoch and the best value go over. The learning rate is a
function of the step. What such a file does not hold is where in its epoch it was, and random states: the run goes on at the
beginning of an epoch, in its own order and with its own draws.
"""

import math
from pathlib import Path

from musubi_tuner import __version__
from musubi_tuner.config import RunConfig
from musubi_tuner.data.length import steps_on
from musubi_tuner.data.sources import scan
from musubi_tuner.errors import ConfigError
from musubi_tuner.files import folder_lock
from musubi_tuner.models.family import PublishedState
from musubi_tuner.training.checkpoint import (
    EPOCH_METRIC,
    Best,
    CheckpointList,
    TrainingState,
    find_states,
    write_state,
)
from musubi_tuner.training.held_out import new_split
from musubi_tuner.training.identity import as_begun, data_digest, fixed_settings, other_teachers
from musubi_tuner.training.schedulers import schedule_length, schedule_of
from musubi_tuner.training.task import Position


def import_checkpoint(config: RunConfig, path: Path, *, moments: bool = True) -> list[str]:
    """Write the state folder from which the run goes on.

    Args:
        path: the checkpoint. moments: take over those of the optimizer.

    Returns:
        Lines for a person: what went over, what could not, and where the run differs from the file.

    Raises:
        ConfigError: if the run cannot go on from such a file, or its folder is not empty.
        CheckpointError: if the file does not belong to the run's model and optimizer.
    """
    published = config.spec.published
    if published is None:
        raise ConfigError(f"{config.path}: {config.spec.title} has no trainer of its own to import from")
    if config.adapter.type != "none":
        raise ConfigError(f'{path}: is of a whole model, and adapter.type is "{config.adapter.type}"; write "none"')
    if config.resume.from_ != "auto":
        raise ConfigError(
            f'resume.from: is "{config.resume.from_}", so the run would not continue from what is imported; write "auto"'
        )
    config = as_begun(config, {})  # without warm-up of the average, as in such a trainer
    processes = config.distributed.num_processes
    trained, held_out = new_split(config, scan(config.datasets, config.spec.code, listed=True).items)
    steps = steps_on(config, trained, processes)
    state = published.read_state(path, config, moments=moments)
    if state.step >= steps.total_updates:
        raise ConfigError(
            f"{path}: is at step {state.step}, and the run ends at {steps.total_updates}; raise train.max_steps or max_epochs"
        )
    keeps_average = config.ema.enabled and state.ema is not None
    average = state.ema if keeps_average else state.model
    # In a published trainer, too, it is the lowest mean training loss of an epoch.
    best = Best(EPOCH_METRIC, math.inf if state.best is None else state.best)
    values = {
        "step": state.step,
        "position": vars(Position(step=state.step, epoch=state.epoch)),
        "optimizer": state.scalars,
        "ema_updates": state.step if keeps_average else 0,
        "scaler": None,
        "window": {},
        "window_updates": 0,
        "best": best.state(),
        "metrics_bytes": 0,
        "schedule_end": schedule_length(config, steps.total_updates),
        "config": fixed_settings(config, processes),
        "data": data_digest(trained, config.train.masked_loss, held_out, other_teachers(config)),
        "held_out": [item.key for item in held_out],
        "base": None,
        "environment": {},
        "code_version": __version__,
    }
    tensors = average if config.ema.enabled and average is not None else {}
    target = _write(config, TrainingState(state.model, tensors, state.optimizer, values))
    return [
        *state.notes,
        *_report(config, state, steps.total_updates, moments),
        f"{target}: step {state.step} of {steps.total_updates}",
    ]


def _write(config: RunConfig, state: TrainingState) -> Path:
    """Write the state into an empty run folder."""
    folder, name = config.output_dir, config.run.name
    with folder_lock(folder, lambda holder: ConfigError(f"run.output_dir {folder}: {holder} is training here")):
        if CheckpointList.read(folder, name).entries or find_states(folder, name):
            raise ConfigError(f"run.output_dir {folder}: holds checkpoints of this run already; choose another folder")
        target = folder / f"{name}-step{state.values['step']:08d}-state"
        write_state(target, state)
    return target


def _report(config: RunConfig, state: PublishedState, total: int, moments: bool) -> list[str]:
    """What a person should know about how the run goes on."""
    lines = []
    if not moments:
        lines.append("optimizer: begins with empty moments")
    if config.ema.enabled:
        lines.append(
            "average: taken over"
            if state.ema is not None
            else "average: not in the file; starts as a copy of the model"
        )
    elif state.ema is not None:
        lines.append("average: left out, because ema.enabled is false")
    if state.best is None:
        lines.append("best: not in the file")
    elif config.keeps_best and not config.validation.split:
        lines.append(f"best: {EPOCH_METRIC} {state.best:.4f}; best.safetensors is written when a lower one comes")
    else:
        reason = "the run follows the validation loss" if config.validation.split else "save.best is off"
        lines.append(f"best: {EPOCH_METRIC} {state.best:.4f} is left out, because {reason}")
    schedule = schedule_of(config, total)
    rate = config.optimizer.lr * schedule(state.step)
    if state.rate is not None and not math.isclose(rate, state.rate, rel_tol=1e-6, abs_tol=1e-15):
        lines.append(
            f"differs: the learning rate would have continued at {state.rate:.6g}, here it continues at {rate:.6g}"
        )
    lines.append(
        f"data: the file does not record which images of epoch {state.epoch + 1} were trained, nor random states: the epoch starts "
        "again, in this run's order and with its draws; train/images counts from here"
    )
    return lines
