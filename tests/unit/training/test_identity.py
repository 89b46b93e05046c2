"""What a run that goes on must share with its state."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.models.registry import MODELS
from musubi_tuner.training import identity
from musubi_tuner.training.identity import changed_settings, compare_config, fixed_settings


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


@pytest.mark.parametrize(("now", "said"), [(0.5, []), (0.7, ["roles.a.optimizer.lr was 0.5, now 0.7"])])
def test_a_role_that_a_state_says_nothing_of_moved_as_the_run(
    now: float, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    current = {"optimizer.lr": 0.5, "roles.a.optimizer.lr": now}
    monkeypatch.setattr(identity, "fixed_settings", lambda *_: current)
    monkeypatch.setattr(identity, "as_begun", lambda config, _: config)
    config: Any = SimpleNamespace(spec=MODELS["tf"], resume=SimpleNamespace(allow=[]))
    assert changed_settings(config, {"optimizer.lr": 0.5}, 1) == said


def test_a_state_made_when_all_families_had_the_same_tables_is_continued(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    document = {
        "schema_version": 1,
        "run": {"name": "x", "output_dir": str(tmp_path / "out")},
        "model": {"arch": "fd", "path": str(tmp_path / "model.safetensors")},
        "cache": {"run": "never"},
        "train": {"max_steps": 10},
        "datasets": [{"image_directory": str(tmp_path)}],
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(document), encoding="utf-8")
    config = load_config(path)
    before = {
        "objective.lune_weight": 0.1,
        "experts.enable_lune": True,
        "model.geometry": {},
        "cache.experts_batch_size": 1,
    }
    stored = fixed_settings(config, 1)
    assert not set(before) & set(stored)
    assert changed_settings(config, {**stored, **before}, 1) == []
    assert changed_settings(config, {**stored, **before, "objective.sigmoid_scale": 2.0}, 1) == [
        "objective.sigmoid_scale was 2.0, now 1.0"
    ]


def test_a_run_goes_on_if_its_warm_up_is_written_in_another_way(tmp_path: Path) -> None:
    """Also from a state of before, which has none of the settings of a plateau."""
    (tmp_path / "model.safetensors").touch()

    def load(**scheduler: Any) -> RunConfig:
        document = {
            "schema_version": 1,
            "run": {"name": "x", "output_dir": str(tmp_path / "out")},
            "model": {"arch": "tf", "path": str(tmp_path / "model.safetensors")},
            "experts": {"enable_lune": False, "enable_sol": False},
            "cache": {"run": "never"},
            "train": {"max_steps": 1000},
            "scheduler": scheduler,
            "datasets": [{"image_directory": str(tmp_path)}],
        }
        (tmp_path / "run.toml").write_text(tomli_w.dumps(document), encoding="utf-8")
        return load_config(tmp_path / "run.toml")

    younger = ("factor", "patience", "threshold", "cooldown")
    began = fixed_settings(load(warmup_ratio=0.05), 1)
    before = {key: value for key, value in began.items() if key.removeprefix("scheduler.") not in younger}
    assert len(before) == len(began) - 4
    for written in ("5%", 0.05):
        assert changed_settings(load(warmup_steps=written), before, 1) == []
    assert changed_settings(load(warmup_steps="6%"), before, 1) == ["scheduler.warmup_ratio was 0.05, now 0.06"]
