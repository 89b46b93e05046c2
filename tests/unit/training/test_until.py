"""A metric that ends a step."""

from musubi_tuner.config.pipeline import Until
from musubi_tuner.training.until import WINDOW, UntilMetric


def fed(until: Until, values: list[float], epochs: int = 9) -> tuple[int | None, UntilMetric]:
    """The line at which it ends, from 1."""
    metric = UntilMetric(until)
    for number, value in enumerate(values, start=1):
        metric.add({"loss/main": value, "train/lr": 0.0}, epochs)
        if metric.reason:
            return number, metric
    return None, metric


def test_the_mean_of_the_last_values_counts_and_not_a_single_one() -> None:
    falling = [1.0] * WINDOW + [0.0] * WINDOW
    # Eleven zeros bring the mean of twenty below a half.
    line, metric = fed(Until("loss/main", 0.5), falling)
    assert line == WINDOW + 11
    assert metric.reason == "the mean of the last 20 values of loss/main is 0.45, below 0.5"
    assert fed(Until("loss/main", 0.5), [0.0] * (WINDOW - 1))[0] is None


def test_patience_is_counted_in_a_row_and_epochs_are_waited_for() -> None:
    values = [1.0] * WINDOW + [0.0] * 11 + [5.0] + [0.0] * WINDOW
    line, _ = fed(Until("loss/main", 0.5, patience=3), values)
    assert line is not None and line > WINDOW + 12
    # Low twice, high at the 9.0, and low again from the seventh zero after it.
    once_high = [1.0] * WINDOW + [0.0] * 12 + [9.0] + [0.0] * WINDOW
    line, _ = fed(Until("loss/main", 0.5, patience=3), once_high)
    assert line == WINDOW + 12 + 1 + 9
    assert fed(Until("loss/main", 0.5, min_epochs=3), [0.0] * 40, epochs=2)[0] is None


def test_lines_without_the_metric_and_values_that_are_null_do_not_count() -> None:
    metric = UntilMetric(Until("loss/val", 1.0))
    for _ in range(50):
        metric.add({"loss/main": 0.0, "loss/val": None}, 9)
    assert not metric.reason


def test_a_state_goes_on() -> None:
    values = [1.0] * WINDOW + [0.0] * WINDOW
    whole, _ = fed(Until("loss/main", 0.5, patience=3), values)
    assert whole == WINDOW + 13
    first, second = (UntilMetric(Until("loss/main", 0.5, patience=3)) for _ in range(2))
    for value in values[: whole - 1]:  # two tests have held by then
        first.add({"loss/main": value}, 0)
    second.load_state(first.state())
    assert not second.reason
    second.add({"loss/main": values[whole - 1]}, 0)
    assert second.reason
    # A stop in the very update that ends the step: the next start has nothing left to train.
    third = UntilMetric(Until("loss/main", 0.5, patience=3))
    third.load_state(second.state())
    assert third.reason == second.reason


def test_a_metric_that_no_line_has_is_said_once() -> None:
    metric = UntilMetric(Until("loss/mian", 1.0))
    said = []
    for _ in range(2 * WINDOW):
        metric.add({"loss/main": 0.0}, 9)
        said.append(metric.warning)
    assert [bool(text) for text in said] == [line == WINDOW - 1 for line in range(2 * WINDOW)]
    assert "none of the first 20 log lines has 'loss/mian'" in said[WINDOW - 1] and "'loss/main'" in said[WINDOW - 1]
    validated = UntilMetric(Until("loss/val", 1.0))
    for _ in range(2 * WINDOW):
        validated.add({"loss/main": 0.0}, 9)
        assert not validated.warning
