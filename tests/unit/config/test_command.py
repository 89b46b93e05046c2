"""The command over run files: what `validate` answers, of one step and as JSON, and which options each part takes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from musubi_tuner.config.__main__ import main

Write = Callable[..., Path]

DATA = '[[datasets]]\nimage_directory = "images"\n'
STEPS = f'{DATA}[[steps]]\nname = "good"\n[[steps]]\nname = "bad"\ntrain = {{max_steps = 0}}\n'


@pytest.mark.parametrize(
    "words",
    [["import", "a.toml", "-o", "b.toml"], ["migrate", "a.toml", "-o", "b.toml"], ["explain", "lr"], ["schema"]],
)
def test_settings_are_refused_where_no_run_is_read(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--lr", "1e-4"]) == 2
    assert f"{words[0]}: takes no settings of a run; remove optimizer.lr" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["validate"], ["resolve"]])
def test_settings_act_where_a_run_is_read(words: list[str], write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, str(write()), "--lr", "0.125"]) == 0
    assert "0.125" in capsys.readouterr().out


def test_data_sets_are_taken_in_or_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "a.toml", "-o", "b.toml", "--dataset", "d.toml", "--dataset_config", "d.toml"]) == 2
    assert "--dataset copies the data sets into the run file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "code", "said"),
    [
        ([], 2, "step bad: 1 problem"),
        (["--step", "good"], 0, "run.toml: good"),
        (["--step", "bad"], 2, "train.max_steps: is 0"),
        (["--step", "other"], 2, "has no step 'other'"),
    ],
)
def test_one_step_is_validated_alone(
    step: list[str], code: int, said: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(write(data=STEPS)), *step]) == code
    printed = capsys.readouterr()
    assert said in (printed.err if code else printed.out)


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (DATA, None, ""),
        (f"{DATA}is_reg = 3\n", "U02", "expected true or false"),
        (STEPS, "U03", "is 0, expected"),
        ("[[datasets", "P01", "not valid TOML"),
        (None, "P01", "no such file"),
    ],
)
def test_every_error_is_json_where_that_is_asked_for(
    data: str | None, code: str | None, said: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("none.toml") if data is None else write(data=data)
    assert main(["validate", str(path), "--json"]) == (2 if code else 0)
    found = {entry["code"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(found) == ({code} if code else set())
    assert code is None or (said in found[code]["reason"] and found[code]["level"] == "error")
