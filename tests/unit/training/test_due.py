"""What is due after which update."""

from types import SimpleNamespace
from typing import Any

import pytest

from musubi_tuner.config.schema.hub import HubSection
from musubi_tuner.config.schema.log import LogSection
from musubi_tuner.config.schema.sample import SampleSection
from musubi_tuner.config.schema.save import SaveSection
from musubi_tuner.config.schema.validation import ValidationSection
from musubi_tuner.config.steps import Steps
from musubi_tuner.training.due import due_after
from musubi_tuner.training.task import Position

STEPS = Steps(micro_batches=3, updates_per_epoch=3, total_updates=18, epochs=6, images_per_epoch=3)


def dues(what: str, **sections: Any) -> list[int]:
    """Updates of six epochs of three updates after which something is due."""
    nothing = {"every_steps": 0, "every_epochs": 0}
    config = SimpleNamespace(
        log=LogSection(every_steps=5), save=SaveSection(**(nothing | sections.get("save", {}))),
        **{name: kind(**(nothing | sections.get(name, {}))) for name, kind in
           {"validation": ValidationSection, "sample": SampleSection, "hub": HubSection}.items()},
    )  # fmt: skip
    positions = [Position(step=step, epoch=(step - 1) // 3, update=(step - 1) % 3 + 1) for step in range(1, 19)]
    return [at.step for at in positions if getattr(due_after(config, STEPS, at), what)]  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["validation", "sample", "hub"])
@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, []),
        ({"every_steps": 4}, [4, 8, 12, 16]),
        ({"every_epochs": 1}, [3, 6, 9, 12, 15, 18]),
        ({"every_epochs": 2}, [6, 12, 18]),
        ({"every_epochs": 4}, [12]),
        ({"every_steps": 9, "every_epochs": 4}, [9, 12, 18]),
    ],
)
def test_steps_and_epochs_are_counted_from_the_start_of_the_run(what: str, section: Any, expected: list[int]) -> None:
    name = {"validation": "validate", "hub": "upload"}.get(what, what)
    at_the_end = {18} if what == "validation" else set()
    assert dues(name, **{what: section}) == sorted({*expected, *at_the_end})


def test_checkpoints_are_named_by_what_made_them_due() -> None:
    config: Any = SimpleNamespace(
        log=LogSection(), save=SaveSection(every_steps=6, every_epochs=2), validation=ValidationSection(),
        sample=SampleSection(), hub=HubSection(),
    )  # fmt: skip
    assert due_after(config, STEPS, Position(step=3, epoch=0, update=3)).checkpoints == {}
    both = due_after(config, STEPS, Position(step=6, epoch=1, update=3)).checkpoints
    assert both == {"step_6": "step", "epoch_2": "epoch"}


def test_the_last_update_is_logged_whatever_the_interval() -> None:
    assert dues("log") == [5, 10, 15, 18]
    assert dues("is_last") == [18]
    assert dues("epoch_ends") == [3, 6, 9, 12, 15, 18]
