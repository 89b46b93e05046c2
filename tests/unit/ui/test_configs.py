"""Run files as the page sees them: findings with their places, steps, differences."""

from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.ui import configs

pytest.importorskip("fastapi")

RUN: dict[str, Any] = {
    "schema_version": 1,
    "run": {"name": "a", "output_dir": "out"},
    "model": {"arch": "ff", "init": "scratch", "bert_tokenizer": "words"},
    "objective": {"train_vae": True},
    "train": {"max_steps": 5},
    "general": {"resolution": 64},
}


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of two steps over a named data set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    data = [{"name": "cats", "image_directory": "pictures"}]
    return {**RUN, "datasets": data, "steps": [{"name": "one"}, {"name": "two", "train": {"max_steps": 7}}]}


def places(document: dict[str, Any], level: str = "error") -> set[tuple[str, int | None]]:
    found = configs.check(document)["diagnostics"]
    return {
        (finding["keys"][0] if finding["keys"] else "", finding["step"])
        for finding in found
        if finding["level"] == level
    }


def test_every_step_has_its_values(document: dict[str, Any]) -> None:
    found = configs.check(document)
    assert [step["resolved"]["train.max_steps"] for step in found["steps"]] == [5, 7]
    assert found["resolved"] == {} and places(document) == set()


def test_a_finding_is_where_its_setting_stands(document: dict[str, Any]) -> None:
    document["optimizer"] = {"lr": -1}
    document["steps"][1]["scheduler"] = {"type": "cosinus"}
    document["datasets"][0]["image_directory"] = "nowhere"
    assert places(document) == {("optimizer.lr", None), ("scheduler.type", 1), ("datasets[0].image_directory", None)}
    document["steps"][1]["until"] = {"metric": 3}
    assert {("until.metric", 1)} <= places(document)


def test_a_step_without_a_name_is_said(document: dict[str, Any]) -> None:
    document["steps"].append({})
    assert ("name", 2) in places(document)


def test_differences_are_those_of_the_values_that_act(document: dict[str, Any]) -> None:
    del document["steps"]
    other = {**document, "optimizer": {"lr": 1e-5}, "train": {"max_steps": 5, "grad_accum_steps": 1}}
    assert [row["key"] for row in configs.differences(document, other)] == ["optimizer.lr"]
    keys = {row["key"]: row["theirs"] for row in configs.differences(document, {})}
    assert keys["train.max_steps"] is None and "optimizer.lr" not in keys
    assert {"key": "steps[1].train", "ours": {"max_steps": 7}, "theirs": None} in configs.differences(
        {**document, "steps": [{"name": "one"}, {"name": "two", "train": {"max_steps": 7}}]}, document
    )


def test_warnings_of_a_strict_file_of_steps_are_errors(document: dict[str, Any]) -> None:
    document["run"] = {**document["run"], "strict": True}
    document["log"] = {"project": "x"}  # nothing is logged there
    assert places(document) == {("log.project", None)} or places(document) == {("", None)}


def test_the_defaults_are_those_of_the_family() -> None:
    keys = {
        row["key"]
        for row in configs.differences(
            {"model": {"arch": "tf"}, "optimizer": {"betas": [0.9, 0.95]}, "log": {"every_steps": 100}}, {}
        )
    }
    assert not keys & {"optimizer.betas", "log.every_steps"}
    assert configs.differences({"model": 3}, {})[0]["key"] == "model"
