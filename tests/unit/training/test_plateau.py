"""A rate that falls when the loss stops improving: as torch's, after warm-up only, the same after a restart."""

import json
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from musubi_tuner.config import Steps
from musubi_tuner.config.schema.optimizer import OptimizerSection
from musubi_tuner.config.schema.scheduler import SchedulerSection
from musubi_tuner.config.schema.validation import ValidationSection
from musubi_tuner.training.due import due_after
from musubi_tuner.training.plateau import Plateau, left_of, measurements, plateau_of
from musubi_tuner.training.task import Position

LR = 1e-2


def losses(seed: int, count: int = 200) -> list[float]:
    """Losses that fall, stay and rise, with a NaN here and there."""
    draw, level, found = random.Random(seed), 1.0, []
    for _ in range(count):
        level *= draw.choice([0.9, 0.9999, 1.0, 1.0, 1.1])
        found.append(math.nan if draw.random() < 0.02 else level)
    return found


def settings(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    return {
        "factor": draw.choice([0.1, 0.5, 0.9]),
        "patience": draw.choice([0, 1, 3, 10]),
        "threshold": draw.choice([0.0, 1e-4, 0.1]),
        "cooldown": draw.choice([0, 1, 4]),
    }


@pytest.mark.parametrize("seed", range(20))
def test_it_falls_where_the_scheduler_of_torch_does(seed: int) -> None:
    floor = random.Random(seed).choice([0.0, 1e-3])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    theirs = ReduceLROnPlateau(optimizer, **settings(seed), min_lr=floor, eps=0.0)
    ours = Plateau(**settings(seed), floor=floor / LR)
    for step, loss in enumerate(losses(seed), start=1):
        before = optimizer.param_groups[0]["lr"]
        theirs.step(loss)
        after = optimizer.param_groups[0]["lr"]
        assert ours.measure(loss, step) == (after < before)
        assert ours.share * LR == pytest.approx(after, rel=1e-12)
        assert (ours.bad, ours.resting, ours.lowest) == (theirs.num_bad_epochs, theirs.cooldown_counter, theirs.best)


@pytest.mark.parametrize("seed", range(5))
def test_a_state_in_a_file_continues_it_bit_for_bit(seed: int) -> None:
    whole, first, second = (Plateau(**settings(seed)) for _ in range(3))
    found = losses(seed)
    for step, loss in enumerate(found):
        whole.measure(loss, step)
        if step < 77:
            first.measure(loss, step)
    second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    for step, loss in enumerate(found[77:], start=77):
        second.measure(loss, step)
    assert second.state() == whole.state() and whole.share < 1


def test_a_state_before_the_first_measurement_is_json() -> None:
    stored = json.loads(json.dumps(Plateau(factor=0.1, patience=0, threshold=0.0).state(), allow_nan=False))
    again = Plateau(factor=0.1, patience=0, threshold=0.0)
    again.load_state(stored)
    assert again.lowest == math.inf
    again.load_state(None)  # of a run that had another schedule
    assert again.share == 1.0


def test_nothing_counts_until_warm_up_ends() -> None:
    plateau = Plateau(factor=0.5, patience=1, threshold=0.0, warmup=10)
    assert not any(plateau.measure(loss, step) for step, loss in enumerate([0.1] + [0.5] * 8, start=1))
    assert plateau.lowest == math.inf and plateau.bad == 0
    assert [plateau.measure(0.5, step) for step in (10, 11, 12)] == [False, False, True]


def test_a_floor_above_the_rate_does_not_raise_it() -> None:
    plateau = Plateau(factor=0.5, patience=0, threshold=0.0, floor=0.2)
    plateau.load_state({"share": 0.1, "lowest": 1.0, "bad": 0, "resting": 0})
    assert not plateau.measure(2.0, 1) and plateau.share == 0.1


def run_of(scheduler: dict[str, Any], validation: dict[str, Any] | None = None) -> Any:
    """What is read of a config."""
    every_never = {"every_steps": None, "every_epochs": None}
    return SimpleNamespace(
        scheduler=SchedulerSection(type="plateau", **scheduler),
        optimizer=OptimizerSection(lr=LR),
        validation=ValidationSection(**(validation or {})),
        **{name: SimpleNamespace(**every_never) for name in ("save", "sample", "hub")},
        log=SimpleNamespace(every_steps=1),
    )


def test_it_is_made_as_the_run_says() -> None:
    config = run_of(
        {"factor": 0.5, "patience": 2, "threshold": 0.01, "cooldown": 3, "min_lr": 1e-3, "warmup_ratio": 0.1}
    )
    plateau = plateau_of(config, total=50)
    assert plateau is not None and vars(plateau) == vars(
        Plateau(factor=0.5, patience=2, threshold=0.01, cooldown=3, floor=0.1, warmup=5)
    )
    config.scheduler = SchedulerSection(type="cosine")
    assert plateau_of(config, total=50) is None


@pytest.mark.parametrize(
    "validation", [None, {"every_steps": 6}, {"every_steps": 6, "every_epochs": 2}, {"every_epochs": 0}]
)
@pytest.mark.parametrize("warmup", [0, 1, 9, 30])
def test_measurements_are_counted_as_they_will_happen(validation: dict[str, Any] | None, warmup: int) -> None:
    config, steps = run_of({"warmup_steps": warmup}, validation), Steps(8, 8, 30, 4, 8)
    at, count = Position(), 0
    while at.step < steps.total_updates - 1:
        if at.update == steps.updates_per_epoch:
            at.epoch, at.update = at.epoch + 1, 0
        at.step, at.update = at.step + 1, at.update + 1
        due = due_after(config, steps, at)
        count += at.step >= warmup and (due.validate if validation is not None else due.epoch_ends)
    assert measurements(config, steps, validated=validation is not None) == count


def test_what_a_state_has_left_of_the_rate() -> None:
    assert left_of({"plateau": {"model": {"share": 0.25}}}, "model") == 0.25
    assert left_of({"plateau": {"model": {"share": 0.25}}}, "vae") == 1.0
    assert left_of({}, "model") == 1.0
