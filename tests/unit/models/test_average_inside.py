"""Averaged weights inside a torch file of the published trainer, where none lie beside it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.tinyflux import load_checkpoint
from musubi_tuner.weights.checkpoints import locate_weights

CONFIG = {"hidden_size": 16}


def save(path: Path, **parts: object) -> Path:
    torch.save({"model": {"img_in.weight": torch.zeros(2)}, "model_config": CONFIG, **parts}, path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    shadow = {"_orig_mod.img_in.weight": torch.ones(2)}
    return save(tmp_path / "step_5.pt", optimizer={}, ema={"shadow": shadow, "decay": 0.9})


def value(**arguments: object) -> float:
    found = load_checkpoint(complete=False, **arguments)  # type: ignore[arg-type]
    assert found.config == CONFIG
    return found.tensors["img_in.weight"][0].item()


def test_they_are_found_where_averaged_weights_are_asked_for(file: Path) -> None:
    assert value(source=file) == 0
    assert value(source=file, ema=True) == 1
    assert value(source=file, ema_file=file.name) == 1


def test_a_run_names_them_beside_another_checkpoint(file: Path) -> None:
    other = save(file.with_name("final.pt"))
    assert value(source=other, ema_file="step_5.pt") == 1
    assert value(source=other, ema_file=str(file)) == 1


def test_a_file_beside_goes_first(file: Path) -> None:
    save_file({"img_in.weight": torch.full((2,), 2.0)}, file.with_name("step_5_ema.safetensors"))
    file.with_name("config.json").write_text('{"hidden_size": 16}', encoding="utf-8")
    assert value(source=file, ema=True) == 2


@pytest.mark.parametrize("content", ["plain", "text"])
def test_a_file_without_them_has_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "step_5.pt"
    if content == "plain":
        save(path)
    else:
        path.write_text("not a torch file", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"step_5_ema\.pt: no averaged weights beside step_5\.pt"):
        locate_weights(path, ema=True)
