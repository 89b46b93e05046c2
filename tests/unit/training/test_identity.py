"""What a run that goes on must share with its state."""

from musubi_tuner.training.identity import compare_config


def test_differences_are_named_with_both_values() -> None:
    stored = {"run.seed": 1, "optimizer.lr": 0.1, "gone": "x", "same": [1, 2]}
    current = {"run.seed": 2, "optimizer.lr": 0.1, "added": True, "same": [1, 2]}
    assert compare_config(stored, current) == [
        "added was None, now True",
        "gone was 'x', now None",
        "run.seed was 1, now 2",
    ]


def test_a_setting_that_is_younger_than_the_state_was_its_default() -> None:
    stored, defaults = {"run.seed": 1}, {"added": False, "run.seed": 7}
    assert compare_config(stored, {"run.seed": 1, "added": False}, defaults) == []
    assert compare_config(stored, {"run.seed": 1, "added": True}, defaults) == ["added was False, now True"]


def test_equal_configs_have_no_differences() -> None:
    assert compare_config({"a": 1.5, "b": None}, {"a": 1.5, "b": None}) == []
