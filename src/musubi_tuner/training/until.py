"""Ends a step early when a metric is low enough; see `Until`.

The mean of the last 20 logged values is tested at each log line. These values are part of the state, so a resumed run ends at the same
update.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from musubi_tuner.config.diagnostics import did_you_mean
from musubi_tuner.config.pipeline import Until

WINDOW = 20


class UntilMetric:
    """Tests the metric of a step.

    Attributes:
        reason: why the step ends; empty while it goes on.
        warning: what is wrong with the metric, after the line of `add` that shows it; else empty.
    """

    def __init__(self, until: Until) -> None:
        self.until = until
        self.reason = self.warning = ""
        self._lines = 0
        self._values: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0

    def add(self, values: Mapping[str, Any], epochs: int) -> None:
        """Add a line of metrics.jsonl.

        Args:
            epochs: complete ones.
        """
        metric = self.until.metric
        value = values.get(metric)
        self._lines += 1
        # Values of a validation come seldom, and the rules know whether there are any.
        is_absent = self._lines == WINDOW and not self._values and not metric.startswith("loss/val")
        self.warning = (
            f"warning: until.metric: none of the first {WINDOW} log lines has {metric!r}, so it does not end the step."
            f"{did_you_mean(metric, values)} They have {', '.join(values)}"
            if is_absent and value is None
            else ""
        )
        if not isinstance(value, int | float):
            return
        self._values.append(float(value))
        mean = sum(self._values) / len(self._values)
        low = len(self._values) == WINDOW and mean < self.until.below and epochs >= self.until.min_epochs
        self._in_a_row = self._in_a_row + 1 if low else 0
        if self._in_a_row >= self.until.patience:
            self.reason = (
                f"the mean of the last {WINDOW} values of {self.until.metric} is {mean:.4g}, below {self.until.below:g}"
            )

    def state(self) -> dict[str, Any]:
        """Plain data for a state."""
        return {"values": list(self._values), "in_a_row": self._in_a_row, "reason": self.reason}

    def load_state(self, stored: Mapping[str, Any] | None) -> None:
        """Continue from a state."""
        if stored:
            self._values = deque(stored["values"], maxlen=WINDOW)
            self._in_a_row = stored["in_a_row"]
            self.reason = stored.get("reason", "")
