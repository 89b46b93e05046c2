"""What is written down while training: console lines, metrics.jsonl and trackers, with one vocabulary of tags.

    loss/total  loss/main  loss/<term>     means over the updates since the last line
    loss/<term>_weight                     factor of a term other than main in the last update
    loss/sigma_<noise level>               main loss of the samples around a noise level, see `noise_bins`
    train/lr  train/grad_norm  train/epoch
    train/lr_x<factor>                     rate of the parameters that have a factor of their own
    loss/val  loss/val_sigma_<noise level>  a line of their own after each validation
    epoch/loss  epoch/step                  likewise after an epoch: mean loss of its updates, and the updates done; in
                                            TensorBoard over the number of the epoch

A line of metrics.jsonl keeps wall-clock values apart, under "clock": everything else of a resumed run equals that of
an undisturbed one. The state stores the file's length, and resuming cuts the file there.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from musubi_tuner.run_record import finite_values, json_line, tell
from musubi_tuner.training.trackers import Tracker
from musubi_tuner.units import format_seconds

FILE = "metrics.jsonl"
SIGMA = "loss/sigma_"
"""Begins the tags of the training loss by noise level."""


class Metrics:
    """Writer of one run; used by the main process only.

    Args:
        folder: run folder. step: updates already done; later lines of an interrupted attempt are cut off.
        length: bytes of metrics.jsonl that belong to the state resumed from. trackers: that show the same values.
    """

    def __init__(self, folder: Path, *, step: int, total: int, length: int, trackers: Sequence[Tracker] = ()) -> None:
        self.path = folder / FILE
        self.total = total
        self.path.touch()
        os.truncate(self.path, min(length, self.path.stat().st_size))
        self.trackers = list(trackers)
        self.bar = tqdm(total=total, initial=step, unit="step", disable=None, mininterval=0.5, dynamic_ncols=True)
        self._mark = time.perf_counter()
        self._images, self._begun = 0, round(time.time(), 3)
        self._step = self._done = step  # the bar counts only where it is shown
        self.step_seconds = 0.0

    def advance(self, images: int) -> None:
        """Count an update of so many images."""
        self._images += images
        self._done += 1
        self.bar.update(1)
        self._tell(self._done)

    def _tell(self, step: int, **values: Any) -> None:
        tell(phase="train", done=step, total=self.total, step=step, steps=self.total, **finite_values(values))

    def log(self, step: int, values: dict[str, float], *, peak_gib: float | None) -> None:
        """Write one line everywhere.

        Args:
            values: by tag; must not depend on the clock.
            peak_gib: peak memory of the device, or None on a CPU.
        """
        now = time.perf_counter()
        seconds = max(now - self._mark, 1e-9)
        rate = self._images / seconds
        step_seconds = seconds / max(step - self._step, 1)
        left = (self.total - step) * step_seconds
        self._mark, self._images, self._step = now, 0, step
        self.step_seconds = step_seconds
        clock = {
            "images_per_second": round(rate, 3),
            "step_seconds": round(step_seconds, 4),
            "seconds_left": round(left, 1),
            "wall": round(time.time(), 3),
            "start": self._begun,
        }
        if peak_gib is not None:
            clock["peak_gib"] = round(peak_gib, 3)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_line(step, values, clock))
        self._tell(step, loss=values["loss/total"], seconds_left=clock["seconds_left"])
        for tracker in self.trackers:
            tracker.scalars({**values, "train/images_per_second": rate}, step)
        parts = [
            f"step {step}/{self.total}",
            f"loss {values['loss/total']:.4f}",
            *(f"{tag.removeprefix('loss/')} {value:.4f}" for tag, value in values.items()
              if tag.startswith("loss/") and tag not in ("loss/total", "loss/main")
              and not tag.endswith("_weight") and not tag.startswith(SIGMA)),
            *(f"{_named('lr', tag)} {value:.2e}" for tag, value in values.items()
              if tag.startswith("train/lr") and "_x" not in tag),
            *(f"{_named('grad norm', tag)} {value:.3f}" for tag, value in values.items()
              if tag.startswith("train/grad_norm")),
            f"{rate:.1f} images/s",
            f"{format_seconds(left)} left",
        ]  # fmt: skip
        if peak_gib is not None:
            parts.append(f"{peak_gib:.1f} GiB")
        self.say("  ".join(parts))

    def measured(self, step: int, values: dict[str, float], seconds: float, *, place: int | None = None) -> None:
        """Write what was measured between updates; it took ``seconds``, which are not those of an update.

        Args:
            place: where TensorBoard shows it; absent = at the step.
        """
        self._mark += seconds
        clock = {"seconds": round(seconds, 3), "wall": round(time.time(), 3)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_line(step, values, clock))
        for tracker in self.trackers:
            tracker.scalars(values, step if place is None else place)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        tqdm.write(text)

    def image(self, tag: str, array: Any, step: int) -> None:
        """Show a picture [H, W, 3], uint8."""
        for tracker in self.trackers:
            tracker.image(tag, array, step)

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size

    def flush(self) -> None:
        """Put everything on the disk before a state refers to it."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        for tracker in self.trackers:
            tracker.flush()

    def close(self) -> None:
        """Finish the bar and the trackers."""
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()


def _named(what: str, tag: str) -> str:
    """Name of a value on the console: that of its role behind it, where there are several."""
    role = tag.removeprefix("train/lr").removeprefix("train/grad_norm").lstrip("_")
    return f"{what} {role}" if role else what
