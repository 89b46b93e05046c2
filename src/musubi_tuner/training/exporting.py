"""A state of a run as a checkpoint of the family's own trainer; the way back of `importing`."""

from functools import partial
from pathlib import Path

import torch

from musubi_tuner.config import RunConfig
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.files import replace_file
from musubi_tuner.models.family import PublishedState
from musubi_tuner.training.checkpoint import newest_good_state, read_tensors, read_values
from musubi_tuner.training.identity import as_begun
from musubi_tuner.training.schedulers import schedule_of


def export_checkpoint(config: RunConfig, target: Path, state: Path | None = None) -> list[str]:
    """Write the file.

    Args:
        target: the torch file. state: a state folder of the run; None = the newest one that is whole.

    Returns:
        Lines for a person: what went over, and where that trainer goes on in another way.

    Raises:
        ConfigError: if the family has no trainer of its own, or the run is of a kind that it does not have.
        CheckpointError: if there is no such state.
    """
    published = config.spec.published
    if published is None:
        raise ConfigError(f"{config.path}: {config.spec.title} has no trainer of its own to export to")
    if config.adapter.type != "none":
        raise ConfigError(
            f'{config.path}: adapter.type is "{config.adapter.type}", and that trainer trains whole models; '
            "python -m musubi_tuner.convert_lora writes the LoRA, merge_lora a whole model"
        )
    found = (state, read_values(state)) if state is not None else newest_good_state(config.output_dir, config.run.name)
    if found is None:
        raise CheckpointError(
            f"{config.output_dir}: has no state of {config.run.name}; train with save.state = true, or name one with --state"
        )
    path, values = found
    begun = as_begun(config, values["config"])
    step, end = int(values["step"]), int(values["schedule_end"])
    moments = read_tensors(path, "optimizer")
    best = values.get("best")
    held = PublishedState(
        model=read_tensors(path, "model"),
        ema=read_tensors(path, "ema") or None,
        optimizer=moments,
        scalars=values["optimizer"],
        step=step,
        epoch=int(values["position"]["epoch"]),
        best=float(best["value"]) if isinstance(best, dict) and best.get("value") is not None else None,
        rate=begun.optimizer.lr * schedule_of(begun, end)(step),
    )
    document, lines = published.write_state(held, begun)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, partial(torch.save, document))
    return [f"{target}: update {step} of {path.name}", *lines]
