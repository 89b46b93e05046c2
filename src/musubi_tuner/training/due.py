"""When things between updates are due. Plain arithmetic on the position of a run."""

from dataclasses import dataclass

from musubi_tuner.config import RunConfig, Steps
from musubi_tuner.training.task import Position


@dataclass(frozen=True)
class Due:
    """What is due after an update.

    Attributes:
        is_last: the run is complete.
        epoch_ends: so is the epoch.
        checkpoints: names of those to save on the way, with their kinds.
        upload: of the newest checkpoint, on [hub]'s own schedule.
    """

    is_last: bool
    epoch_ends: bool
    log: bool
    validate: bool
    sample: bool
    checkpoints: dict[str, str]
    upload: bool


def due_after(config: RunConfig, steps: Steps, at: Position) -> Due:
    """What is due at a position, which counts the update just done."""
    is_last = at.step >= steps.total_updates
    epoch_ends = at.update == steps.updates_per_epoch

    def every(some_steps: int | None, some_epochs: int | None) -> bool:
        by_step = bool(some_steps) and at.step % (some_steps or 1) == 0
        by_epoch = bool(some_epochs) and epoch_ends and (at.epoch + 1) % (some_epochs or 1) == 0
        return by_step or by_epoch

    save, validation = config.save, config.validation
    checkpoints = {f"step_{at.step}": "step"} if every(save.every_steps, None) else {}
    if every(None, save.every_epochs):
        checkpoints[f"epoch_{at.epoch + 1}"] = "epoch"
    return Due(
        is_last=is_last,
        epoch_ends=epoch_ends,
        log=is_last or at.step % config.log.every_steps == 0,
        validate=is_last or every(validation.every_steps, validation.every_epochs),
        sample=every(config.sample.every_steps, config.sample.every_epochs),
        checkpoints=checkpoints,
        upload=every(config.hub.every_steps, config.hub.every_epochs),
    )
