"""Where curves and pictures go beside metrics.jsonl: TensorBoard, and Weights & Biases.

What one of them raises is said once, and the training goes on without it: metrics.jsonl has the same values.
"""

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from musubi_tuner.config import RunConfig
from musubi_tuner.config.fields import Section
from musubi_tuner.config.schema import parameters
from musubi_tuner.errors import ConfigError, mask_secrets
from musubi_tuner.files import encodable, write_text

RUN_ID = "wandb_id"
"""File with the id under which W&B knows a run, beside its events; a run that goes on keeps it."""


class Tracker(Protocol):
    """Shows what is measured."""

    name: str

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show values by tag."""

    def image(self, tag: str, array: Any, step: int) -> None:
        """Show a picture [H, W, 3], uint8."""

    def flush(self) -> None:
        """Hand on what is waiting."""

    def close(self) -> None:
        """Finish."""


def open_trackers(config: RunConfig, step: int) -> list["Guarded"]:
    """The trackers of [log].

    Args:
        step: updates already done; what an interrupted attempt showed after them is forgotten where that can be.

    Raises:
        ConfigError: if W&B cannot be reached.
    """
    log, folder, found = config.log, config.log_folder, list[Guarded]()
    if log.tensorboard and encodable(str(folder)) != str(folder):
        print(
            f"warning: {folder}: TensorBoard takes no folder whose name is no UTF-8; metrics.jsonl holds the same values"
        )
    elif log.tensorboard:
        found.append(Guarded(TensorBoard(folder, step)))
    if log.wandb:
        found.append(Guarded(Wandb(config, folder, step)))
    return found


class TensorBoard:
    """Event files of a folder."""

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def image(self, tag: str, array: Any, step: int) -> None:
        """See `Tracker`."""
        self.writer.add_image(tag, array, step, dataformats="HWC")

    def flush(self) -> None:
        """See `Tracker`."""
        self.writer.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases. The update is a value of its own there: W&B's own step could not go back after a resume.

    It is told neither the command line nor the machine; WANDB_MODE = offline keeps everything in the folder.
    """

    name = "W&B"

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        import wandb

        self.wandb, log, file = wandb, config.log, folder / RUN_ID
        folder.mkdir(parents=True, exist_ok=True)
        if step == 0 or not file.is_file():
            write_text(file, secrets.token_hex(8))
        settings = wandb.Settings(
            api_key=log.wandb_api_key,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            host="",
            x_save_requirements=False,
        )
        try:
            self.run = wandb.init(
                **{
                    "project": log.project,
                    "name": log.wandb_run or config.run.name,
                    "config": public_settings(config) if log.config else None,
                    **log.tracker,
                },
                id=file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(folder),
                settings=settings,
            )
        except Exception as error:  # its own kinds, those of its server, and TypeError for a word of log.tracker
            raise ConfigError(
                f"log.wandb: W&B cannot be started ({mask_secrets(str(error))}); WANDB_MODE=offline writes a folder for "
                "`wandb sync`, and log.wandb = false goes without"
            ) from None
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self.run.log({**values, "step": step})

    def image(self, tag: str, array: Any, step: int) -> None:
        """See `Tracker`."""
        self.run.log({tag: self.wandb.Image(array), "step": step})

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        """See `Tracker`."""
        self.run.finish()


class Guarded:
    """A tracker whose failure ends it, and not the training."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.name, self.alive = tracker, tracker.name, True

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._try(lambda: self.tracker.scalars(values, step))

    def image(self, tag: str, array: Any, step: int) -> None:
        """See `Tracker`."""
        self._try(lambda: self.tracker.image(tag, array, step))

    def flush(self) -> None:
        """See `Tracker`."""
        self._try(self.tracker.flush)

    def close(self) -> None:
        """See `Tracker`."""
        self._try(self.tracker.close)

    def _try(self, act: Callable[[], None]) -> None:
        if not self.alive:
            return
        try:
            act()
        except Exception as error:
            self.alive = False
            reason = mask_secrets(str(error) or type(error).__name__)
            tqdm.write(f"warning: {self.name} is left out from here on ({reason}); metrics.jsonl has its values")


def public_settings(config: RunConfig) -> dict[str, Any]:
    """Settings that may leave the machine: no secrets, and nothing that is a path or may be one."""
    found = {}
    for parameter in parameters(config.spec):
        value = config.get(parameter.key)
        private = parameter.extra("secret") or parameter.extra("path")
        if not private and not isinstance(value, Section | dict) and not _is_path(value):
            found[parameter.key] = value
    return found


def _is_path(value: Any) -> bool:
    """Whether a value is a text with a slash, or has one inside."""
    if isinstance(value, list):
        return any(map(_is_path, value))
    return isinstance(value, Section) or (isinstance(value, str) and ("/" in value or "\\" in value))
