"""What leaves for TensorBoard and Weights & Biases, and what happens when they fail."""

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musubi_tuner.config import RunConfig
from musubi_tuner.config.load import load_document
from musubi_tuner.errors import ConfigError
from musubi_tuner.training.trackers import RUN_ID, Guarded, open_trackers, public_settings


def config_of(folder: Path, **log: Any) -> RunConfig:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "model.safetensors").touch()
    return load_document(
        {
            "run": {"name": "cat", "output_dir": str(folder / "out")},
            "model": {"arch": "tf", "path": str(folder / "model.safetensors")},
            "train": {"max_steps": 3000},
            "objective": {"text_dropout": 0.1},
            "experts": {"enable_lune": False, "enable_sol": False},
            "cache": {"run": "never"},
            "hub": {"token": "hf_abcdefghijkl"},
            "log": log,
            "datasets": [{"image_directory": str(folder / "images")}],
        }
    )


@pytest.mark.long
def test_wandb_without_a_network_holds_values_pictures_and_public_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(socket, "gethostname", lambda: "name-of-this-machine")
    config = config_of(tmp_path, tensorboard=False, wandb=True, config=True, wandb_api_key="a" * 40, dir=str(tmp_path / "all"),
                       prefix="x-", tracker={"tags": ["mine"]})  # fmt: skip
    folder = tmp_path / "all" / "x-cat"
    assert config.log_folder == folder  # which uploads read too
    ids = []
    for step in (0, 2, 0):
        (tracker,) = open_trackers(config, step)
        tracker.scalars({"loss/total": 0.625}, step + 1)
        tracker.image("samples", np.zeros((8, 8, 3), np.uint8), step + 1)
        tracker.close()
        ids.append((folder / RUN_ID).read_text(encoding="utf-8"))
    assert ids[0] == ids[1] != ids[2]  # a run that goes on is the same there
    records = b"".join(path.read_bytes() for path in folder.rglob("*.wandb"))
    assert all(part in records for part in (b"loss/total", b"0.625", b"mine", b"train.max_steps", b"musubi-tuner"))
    everything = records + b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert not any(
        secret in everything for secret in (b"hf_abc", b"a" * 40, b"model.safetensors", b"name-of-this-machine")
    )
    assert len(list(folder.rglob("*.png"))) == 3


def test_settings_that_leave_the_machine_hold_no_paths_and_no_secrets(tmp_path: Path) -> None:
    shown = public_settings(config_of(tmp_path))
    assert shown["train.max_steps"] == 3000 and shown["run.name"] == "cat"
    assert str(tmp_path) not in str(shown) and "hf_abc" not in str(shown)


def test_a_tracker_that_fails_is_left_out_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        name = "Board"
        calls = 0

        def scalars(self, values: Any, step: int) -> None:
            self.calls += 1
            raise OSError("disk full")

    broken = Broken()
    guarded = Guarded(broken)  # type: ignore[arg-type]
    for step in range(3):
        guarded.scalars({"a": 1.0}, step)
    assert (
        broken.calls == 1 and capsys.readouterr().out.count("warning: Board is left out from here on (disk full)") == 1
    )


@pytest.mark.parametrize(
    ("mode", "key", "installed", "said"),
    [
        ("online", "", True, "has no key"),
        ("online", "k" * 40, True, ""),
        ("offline", "", True, ""),
        ("offline", "", False, "is not installed: pip install wandb"),
    ],
)
def test_what_wandb_needs_is_said_before_anything_begins(
    mode: str, key: str, installed: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if not installed:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if not said:
        assert config_of(tmp_path, wandb=True).log.wandb
        return
    with pytest.raises(ConfigError, match=said):
        config_of(tmp_path, wandb=True)


@pytest.mark.parametrize(
    ("word", "expected"), [("none", (False, False)), ("tensorboard", (True, False)), ("wandb", (True, True)), ("all", (True, True))]
)  # fmt: skip
def test_log_with_means_the_two_switches(
    word: str, expected: tuple[bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_of(tmp_path, **{"with": word})
    assert (config.log.tensorboard, config.log.wandb) == expected
