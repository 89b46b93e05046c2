"""The end of a step by a metric, before its budget.

The mean of the last 20 values that were logged under a tag is tested at each log line. When it has been low enough often enough in a
row, the step ends as if its budget were used up. What was logged is part of the state, so a run that goes on ends at the same update.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from musubi_tuner.config.pipeline import Until

WINDOW = 20


class UntilMetric:
    """Follows the metric of a step.

    Attributes:
        reason: why the step ends now; empty before.
    """

    def __init__(self, until: Until) -> None:
        self.until = until
        self.reason = ""
        self._values: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0

    def add(self, values: Mapping[str, Any], epochs: int) -> None:
        """Take what a line of metrics.jsonl says.

        Args:
            epochs: that are complete.
        """
        value = values.get(self.until.metric)
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
        return {"values": list(self._values), "in_a_row": self._in_a_row}

    def load_state(self, stored: Mapping[str, Any] | None) -> None:
        """Continue from a state."""
        if stored:
            self._values = deque(stored["values"], maxlen=WINDOW)
            self._in_a_row = stored["in_a_row"]
