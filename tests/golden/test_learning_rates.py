"""Learning-rate multipliers and loss-weight warm-ups equal the published code, and stay at their end beyond it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.flow import ramp
from musubi_tuner.schedules import BY_NAME, pieces_of
from musubi_tuner.training.schedulers import (
    constant_with_warmup,
    cosine_schedule,
    linear_schedule,
    make_schedule,
)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "tinyflux_lr.json").read_text(encoding="utf-8"))
CASES: list[dict[str, Any]] = GOLDEN["lambda_lr"]
RELATIVE = 1e-9
"""Both sides compute in double precision; a published zero must be a zero."""

HELPERS: dict[str, Callable[[int, int, int], float]] = {
    "cosine_schedule": lambda step, warmup, total: cosine_schedule(step, warmup, total),
    "cosine_schedule_min_0.1": lambda step, warmup, total: cosine_schedule(step, warmup, total, 0.1),
    "constant_with_warmup": lambda step, warmup, total: constant_with_warmup(step, warmup),
}


def case_name(case: dict[str, Any]) -> str:
    return f"{case['lr_scheduler']}-{case['warmup_type']}-{case['warmup_steps']}of{case['total_steps']}"


def schedule_of(case: dict[str, Any], **changes: Any) -> Callable[[int], float]:
    settings = {
        "lr": case["learning_rate"],
        "min_lr": case["min_lr"],
        "warmup_steps": case["warmup_steps"],
        "warmup_type": case["warmup_type"],
        "total_steps": case["total_steps"],
    }
    return make_schedule(case["lr_scheduler"], **(settings | changes))


def assert_equal(ours: list[float], published: list[float]) -> None:
    assert ours == pytest.approx(published, rel=RELATIVE, abs=0)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_schedule_equals_the_published_one(case: dict[str, Any]) -> None:
    schedule = schedule_of(case)
    assert_equal([schedule(step) for step in case["steps"]], case["multiplier"])
    assert_equal([case["learning_rate"] * schedule(step) for step in case["steps"]], case["lr"])


def test_every_kind_of_schedule_is_in_the_file() -> None:
    assert {case["lr_scheduler"] for case in CASES} == {"cosine", "linear", "constant"}


@pytest.mark.parametrize("name", HELPERS)
def test_helper_equals_the_published_one(name: str) -> None:
    helpers = GOLDEN["helpers"]
    ours = [HELPERS[name](step, helpers["warmup_steps"], helpers["total_steps"]) for step in helpers["steps"]]
    assert_equal(ours, helpers[name])


def test_every_helper_of_the_file_is_covered() -> None:
    # A decay straight to 0 is a helper that no schedule of the published trainer uses.
    left_out = {"linear_decay", "linear_decay_min_0.1"}
    assert set(GOLDEN["helpers"]) == {*HELPERS, *left_out, "steps", "warmup_steps", "total_steps"}


@pytest.mark.parametrize("name", [name for name in GOLDEN["loss_weights"] if name != "steps"])
def test_loss_weight_equals_the_published_one(name: str) -> None:
    found = re.fullmatch(r"\w+\((\d+),([\d.]+)\)", name)
    assert found
    warmup, target = int(found[1]), float(found[2])
    ours = [ramp(step, warmup, target) for step in GOLDEN["loss_weights"]["steps"]]
    assert_equal(ours, GOLDEN["loss_weights"][name])


# Beyond the end the published cosine rises again; ours is clamped.


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("beyond", [1, 137, 1_000_000])
def test_schedule_keeps_its_last_value_beyond_the_end(case: dict[str, Any], beyond: int) -> None:
    schedule = schedule_of(case)
    end = schedule(case["total_steps"])
    expected = 1.0 if case["lr_scheduler"] == "constant" else case["min_lr"] / case["learning_rate"]
    assert end == pytest.approx(expected, rel=RELATIVE, abs=1e-15)  # 1 - (1 - r) is r but for the last bit
    assert schedule(case["total_steps"] + beyond) == end


@pytest.mark.parametrize("ratio", [0.0, 0.1])
@pytest.mark.parametrize("helper", [cosine_schedule, linear_schedule])
def test_helper_keeps_its_minimum_beyond_the_end(helper: Callable[..., float], ratio: float) -> None:
    assert [helper(step, 10, 100, ratio) for step in (100, 101, 190, 280)] == pytest.approx([ratio] * 4, abs=1e-15)


def test_loss_weight_keeps_its_target_beyond_the_warm_up() -> None:
    assert [ramp(step, 10, 0.05) for step in (10, 11, 1_000_000)] == [0.05] * 3


# What the published code does not do


@pytest.mark.parametrize("kind", ["linear", "constant"])
def test_cosine_warm_up_acts_in_every_schedule(kind: str) -> None:
    cosine = next(case for case in CASES if case["warmup_type"] == "cosine")
    schedule = schedule_of(cosine | {"lr_scheduler": kind})
    warming = [index for index, step in enumerate(cosine["steps"]) if step < cosine["warmup_steps"]]
    assert len(warming) > 2
    assert_equal([schedule(cosine["steps"][i]) for i in warming], [cosine["multiplier"][i] for i in warming])


def test_warm_up_as_long_as_the_run_ends_at_the_full_rate() -> None:
    schedule = schedule_of(CASES[0], warmup_steps=50, total_steps=50)
    assert [schedule(0), schedule(25), schedule(49)] == [0.0, 0.5, 0.98]


def test_unknown_schedule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown schedule 'cosin'; known: cosine, linear, constant"):
        schedule_of(CASES[0] | {"lr_scheduler": "cosin"})


OTHERS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "lr_schedules.json").read_text(encoding="utf-8"))
"""Rates of sd-scripts' schedules, made with diffusers, transformers and its own rex."""
ARGUMENTS = {
    "lr_scheduler_num_cycles": "cycles", "lr_scheduler_power": "power", "lr_scheduler_timescale": "timescale", "lr_decay_steps": "decay"
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS["cases"], ids=lambda case: f"{case['lr_scheduler']}-{case['args']}")
def test_a_schedule_equals_that_of_sd_scripts_up_to_its_end(case: dict[str, Any]) -> None:
    """Past its end a cosine rises again there, and the warm-up of rex jumps to its floor; neither is ours."""
    total, rate, given = OTHERS["max_train_steps"], OTHERS["base_lr"], dict(case["args"])
    name, first = case["lr_scheduler"], 0
    warmup = given.pop("lr_warmup_steps", 0)
    warmup = int(warmup * total) if warmup < 1 else warmup
    ratio = given.pop("lr_scheduler_min_lr_ratio", 0.01 if name == "rex" else 0.0)
    shape = {ARGUMENTS[key]: value for key, value in given.items() if key in ARGUMENTS}
    for text in given.get("lr_scheduler_args", []):
        key, _, value = text.partition("=")
        shape |= {"pieces": pieces_of(value.strip("'"))} if key == "step_rules" else {key: float(value)}
    shape.pop("rex_beta", None)  # 1 - alpha, in all of them
    if name == "rex" and warmup:
        first, warmup, total = total, 0, total
    schedule = make_schedule(
        BY_NAME[name],
        lr=rate,
        min_lr=ratio * rate,
        warmup_steps=warmup,
        warmup_type="linear",
        total_steps=total,
        **shape,
    )
    found = [rate * schedule(step) for step in range(first, total + 1)]
    assert found == pytest.approx(case["lr"][first : total + 1], rel=1e-8, abs=1e-13)  # nine digits in the file
