"""Training from a v3 file, and an average that goes on from the averaged weights of the checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from project import GEOMETRY, ForkServer, Result, copy_tree, write_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep
from musubi_tuner.models.tinyflux.upgrade import upgrade_weights

CONFIG = TinyFluxConfig.from_dict({key: value for key, value in GEOMETRY.items() if not key.startswith("sol_")})
"""A v3 config says nothing of Sol, so that its sizes are the published ones."""
DECAY = 0.75


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A v3 file and its averaged weights."""
    folder = tmp_path_factory.mktemp("v3")
    state = TinyFluxDeep(CONFIG).state_dict()
    sizes = {key: value for key, value in GEOMETRY.items() if not key.startswith(("lune_", "sol_"))}
    config = {**sizes, "use_expert_predictor": True, "expert_dim": CONFIG.lune_expert_dim, "expert_hidden_dim": 16}
    for name, seed in (("old", 1), ("old_ema", 2)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key.replace("lune_predictor.", "expert_predictor."): tensor.clone()
            if key.startswith("rope.")
            else torch.randn(tensor.shape, generator=generator) * 0.1
            for key, tensor in state.items()
            if not key.startswith(("sol_prior.", "t5_pool.", "text_balance")) and "spatial_to_mod" not in key
        }
        save_file(tensors, folder / f"{name}.safetensors", metadata={"config_json": json.dumps(config)})
    return folder / "old.safetensors"


@pytest.fixture
def train(
    tmp_path: Path, photographs: Path, encoders: Path, caches: Path, server: ForkServer
) -> Callable[..., tuple[Result, Path]]:
    """Train one update that moves nothing, from a checkpoint; returns what was printed and the output folder."""

    def run(path: str | Path, code: int = 0, **changes: Any) -> tuple[Result, Path]:
        copy_tree(caches, tmp_path / "cache")
        tables: dict[str, Any] = {
            "model": {"init": None, "init_scheme": None, "geometry": None, "path": str(path)},
            "experts": {"expert_input": "noised_image", "expert_time": "aligned", "sol_spatial_norm": "max"},
            "ema": {"decay": DECAY},
            "optimizer": {"lr": 0.0, "weight_decay": 0.0},
            "train": {"max_steps": 1},
            "scheduler": {"warmup_steps": 0},
        }
        for table, values in changes.items():
            tables[table] = {**tables.get(table, {}), **values}
        config = write_run(tmp_path, photographs, encoders, **tables)
        return server.run("train", [config], tmp_path).expect(code), tmp_path / "out"

    return run


def upgraded(path: Path) -> dict[str, Tensor]:
    return upgrade_weights(load_file(path), CONFIG, seed=7)[0]


def test_a_v3_file_is_upgraded_with_its_report_and_the_average_goes_on_from_its_own(
    v3: Path, train: Callable[..., tuple[Result, Path]]
) -> None:
    result, out = train(v3, run={"seed": 7}, ema={"init": "checkpoint"})
    assert f"weights: {v3}\n" in result.out
    assert f"{v3}: 59 tensors loaded, 13 of them under other names\n  fresh     28: " in result.out
    assert f"average: starts from {v3.with_name('old_ema.safetensors')}\n" in result.out
    assert "average: 59 tensors of the checkpoint, 28 copied from the model\n" in result.out
    model = upgraded(v3)
    saved = load_file(out / "photos.safetensors")
    assert saved.keys() == model.keys()
    for key, tensor in saved.items():
        assert torch.equal(tensor, model[key]), key
    began = upgrade_weights(load_file(v3.with_name("old_ema.safetensors")), CONFIG, model=model)[0]
    for key, tensor in load_file(out / "photos_ema.safetensors").items():
        expected = tensor if key.startswith("rope.") else DECAY * began[key] + (1 - DECAY) * model[key]
        torch.testing.assert_close(tensor, expected, msg=key)
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["use_sol_prior"] is True


def test_named_average_is_where_a_run_starts(v3: Path, train: Callable[..., tuple[Result, Path]]) -> None:
    _, out = train(v3, run={"seed": 7}, model={"ema_file": "old_ema.safetensors", "upgrade_neutral": False})
    saved = load_file(out / "photos.safetensors")
    assert torch.equal(saved["img_in.weight"], load_file(v3.with_name("old_ema.safetensors"))["img_in.weight"])
    assert saved["text_balance"] == 0
    for key, tensor in load_file(out / "photos_ema.safetensors").items():
        torch.testing.assert_close(tensor, saved[key], msg=key)  # the average begins as the model


def test_average_of_another_model_is_named(v3: Path, train: Callable[..., tuple[Result, Path]]) -> None:
    other = v3.with_name("other.safetensors")
    save_file({"conv_in.weight": torch.zeros(3)}, other)
    result, _ = train(v3, 1, model={"ema_file": "other.safetensors"}, ema={"init": "checkpoint"})
    assert f"error: {other}: is not an average of the model {v3}: 1 of 1 keys unexpected (conv_in.weight)" in result.err
