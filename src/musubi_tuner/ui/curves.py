"""The curves of runs: metrics.jsonl is parsed once, then only what is new in it; what is shown is thinned. Torch-free."""

import json
import threading
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from musubi_tuner.training.metrics import FILE
from musubi_tuner.ui.answers import Curve, Series
from musubi_tuner.ui.runs import Place, parts

USUAL = ("loss/total", "loss/main")
"""Tags that are shown first."""
BLOCK = 1 << 24
"""Bytes that are parsed at once."""
MOST_FILES = 16
"""Whose curves are kept."""
BEFORE = 256
"""Bytes before the end of what was parsed, by which a file that was cut and grew again is told."""


@dataclass
class Parsed:
    """What was read of a file.

    Attributes:
        offset: end of what was read. before: the bytes there. points: steps and values by tag. lost: steps whose value was not
            finite, by tag. starts: steps at which another start went on. start: mark of the last one. last: step.
    """

    offset: int = 0
    before: bytes = b""
    points: dict[str, tuple["array[int]", "array[float]"]] = field(default_factory=dict)
    lost: dict[str, "array[int]"] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    start: Any = None
    first: int | None = None
    last: int = 0

    def line(self, line: bytes) -> None:
        """Take in a line; half a line of a run that was killed is left out."""
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            return
        self.first, self.last = self.first if self.first is not None else step, step
        clock = row.pop("clock", None)
        if isinstance(clock, dict):
            start = clock.pop("start", None)
            if start is not None:
                if self.start is not None and start != self.start:
                    self.starts.append(step)
                self.start = start
            clock.pop("wall", None)
            row.update((f"clock/{name}", value) for name, value in clock.items())
        for tag in row.get("not_finite") or ():
            self.lost.setdefault(tag, array("q")).append(step)
        for tag, value in row.items():
            kind = type(value)
            if (kind is float or kind is int) and "/" in tag:
                found = self.points.get(tag)
                if found is None:
                    found = self.points[tag] = (array("q"), array("d"))
                found[0].append(step)
                found[1].append(value)


class Curves:
    """The curves of the runs that pages look at."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, Parsed] = OrderedDict()
        self._one_at_a_time = threading.Lock()

    def series(self, place: Place, most: int, tag: str = "") -> Series:
        """One curve of a run, over all its steps; updates are counted on from step to step.

        Args:
            most: points of a curve; of those between two that are kept the lowest and the highest stay, and the first and the last.
            tag: of the curve; empty or unknown = the usual one.
        """
        with self._one_at_a_time:
            found = [(name, self._parsed(folder / FILE)) for name, folder in parts(place)]
            tags = sorted({tag for _, own in found for tag in (*own.points, *own.lost)})
            shown = tag if tag in tags else next((usual for usual in USUAL if usual in tags), tags[0] if tags else "")
            steps, values = [np.empty(0, np.int64)], [np.empty(0)]
            lost: list[int] = []
            starts: list[int] = []
            borders: dict[str, int] = {}
            begun = 0
            for name, own in found:
                if own.first is not None:
                    borders[name] = begun + own.first
                if shown in own.points:
                    steps.append(np.array(own.points[shown][0], np.int64) + begun)
                    values.append(np.array(own.points[shown][1]))
                lost += [begun + step for step in own.lost.get(shown, ())]
                starts += [begun + step for step in own.starts]
                begun += own.last
        curves = {shown: thinned(np.concatenate(steps), np.concatenate(values), most)} if shown else {}
        return {
            "tags": tags,
            "curves": curves,
            "lost": {shown: lost} if lost else {},
            "borders": borders if len(borders) > 1 else {},
            "starts": starts,
        }

    def _parsed(self, path: Path) -> Parsed:
        """A file as far as it is written."""
        found = self._files.pop(path, None) or Parsed()
        try:
            with path.open("rb") as file:
                file.seek(found.offset - len(found.before))
                if found.before != file.read(
                    len(found.before)
                ):  # a start that went on from an earlier state has cut it
                    found = Parsed()
                    file.seek(0)
                while block := file.read(BLOCK):
                    end = block.rfind(b"\n") + 1
                    if not end:
                        break
                    for line in block[:end].splitlines():
                        found.line(line)
                    found.offset += end
                    found.before = (found.before + block[:end])[-BEFORE:]
                    file.seek(found.offset)
        except OSError:
            found = Parsed()
        self._files[path] = found
        while len(self._files) > MOST_FILES:
            self._files.popitem(last=False)
        return found


def thinned(steps: "np.ndarray", values: "np.ndarray", most: int) -> Curve:
    """A curve of at most so many points, with both ends and the extremes of what is left out."""
    count = len(steps)
    if count > most:
        groups = max(1, (most - 2) // 2)
        edges = [number * count // groups for number in range(groups + 1)]
        kept = {0, count - 1}
        for low, high in pairwise(edges):
            kept |= {low + int(values[low:high].argmin()), low + int(values[low:high].argmax())}
        index = np.array(sorted(kept))
        steps, values = steps[index], values[index]
    return {"steps": steps.tolist(), "values": values.tolist()}
