"""A checkpoint of the published trainer, imported with the command, goes on with the training command."""

from pathlib import Path
from typing import Any

import pytest
import torch
from project import GEOMETRY, ForkServer, copy_tree, metrics, write_run
from safetensors.torch import load_file
from torch import Tensor

from musubi_tuner.export_checkpoint import main as export
from musubi_tuner.import_checkpoint import main
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep

STEP, EPOCH, DECAY = 7, 1, 0.75
BETAS = (0.9, 0.95)
UNSEEN = 1e-50  # a learning rate whose updates vanish in float32; run.strict refuses 0


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file as that trainer saves it after `STEP` updates."""
    torch.manual_seed(3)
    config = TinyFluxConfig.from_dict(GEOMETRY)
    model = TinyFluxDeep(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        parameter.data += 0.05 * torch.randn_like(parameter)
        # Parameters that no forward pass uses never get a gradient.
        parameter.grad = None if "spatial_to_qk_scale" in name else torch.randn_like(parameter) * 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=BETAS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for _ in range(STEP):
        optimizer.step()
        scheduler.step()
    path = tmp_path / f"step_{STEP}.pt"
    torch.save(
        {
            "step": STEP,
            "epoch": EPOCH,
            "best_loss": 0.125,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "ema": {"shadow": {k: v + 0.5 for k, v in model.state_dict().items()}, "decay": DECAY},
            "trainer_config": {"learning_rate": 1e-3, "betas": list(BETAS), "dtype": "torch.float32"},
            "model_config": config.to_dict(),
        },
        path,
    )
    return path


def continued(published: Path) -> dict[str, Any]:
    """Tables of a run that goes on from a file of the published trainer, under its conditions."""
    return {
        "model": {"init": None, "init_scheme": None, "geometry": None, "path": str(published)},
        "experts": {"expert_input": "noised_image", "expert_time": "aligned", "sol_spatial_norm": "max"},
    }


def test_the_run_goes_on_from_the_step(
    published: Path, tmp_path: Path, photographs: Path, encoders: Path, caches: Path, server: ForkServer
) -> None:
    copy_tree(caches, tmp_path / "cache")
    tables: dict[str, Any] = {
        **continued(published),
        "ema": {"decay": DECAY},
        "optimizer": {"lr": UNSEEN, "betas": list(BETAS), "decay_all": True},
        "train": {"max_steps": STEP + 1},
        "save": {"best": True},
    }
    config = write_run(tmp_path, photographs, encoders, **tables)
    assert main([str(published), str(config)]) == 0
    result = server.run("train", [config], tmp_path).expect(0)
    assert f"continuing from photos-step{STEP:08d}-state: step {STEP} of {STEP + 1}\n" in result.out
    assert "other conditions" not in result.out
    out = tmp_path / "out"
    [row] = metrics(out)
    assert row["step"] == STEP + 1 and row["train/epoch"] > EPOCH

    held = torch.load(published, weights_only=True)
    model, average = load_file(out / "photos.safetensors"), load_file(out / "photos_ema.safetensors")
    assert model.keys() == held["model"].keys()
    for key, tensor in held["model"].items():
        assert torch.equal(model[key], tensor), key  # no update of this learning rate shows
        shadow: Tensor = held["ema"]["shadow"][key]
        expected = tensor if key.startswith("rope.") else DECAY * shadow + (1 - DECAY) * tensor
        torch.testing.assert_close(average[key], expected, msg=key)

    names = [key for key in held["model"] if not key.startswith("rope.")]
    moments = load_file(out / "photos-state" / "optimizer.safetensors")
    trained = {key.partition("/")[0] for key in moments}
    assert trained == {name for name in names if "spatial_to_qk_scale" not in name}
    for index, before in held["optimizer"]["state"].items():
        name = names[index]
        assert moments[f"{name}/step"] == STEP + 1
        # What is added to the second moment is not negative, so the old one shows in it.
        assert (moments[f"{name}/exp_avg_sq"] >= BETAS[1] * before["exp_avg_sq"] * (1 - 1e-5)).all(), name


def test_a_state_goes_back_to_the_published_trainer(
    published: Path, tmp_path: Path, photographs: Path, encoders: Path, caches: Path, server: ForkServer
) -> None:
    """Its optimizer and schedule take the file, and what we import from it again is the same to the bit."""
    copy_tree(caches, tmp_path / "cache")
    tables: dict[str, Any] = {
        **continued(published),
        "optimizer": {"lr": 1e-3, "betas": list(BETAS), "decay_all": True},
        "train": {"max_steps": STEP + 2, "mixed_precision": "no"},
        "ema": {"decay": DECAY, "init": "checkpoint"},
    }
    config = write_run(tmp_path, photographs, encoders, **tables)
    assert main([str(published), str(config)]) == 0
    server.run("train", [config], tmp_path).expect(0)
    target = tmp_path / "back.pt"
    assert export([str(config), str(target)]) == 0
    assert export([str(config), str(target)]) == 2  # it is there
    held = torch.load(target, weights_only=True)
    assert (held["step"], held["ema"]["decay"]) == (STEP + 2, DECAY)

    model = TinyFluxDeep(TinyFluxConfig.from_dict(held["model_config"]))
    learning = list(model.requires_grad_(True).parameters())  # nothing of it is frozen
    optimizer = torch.optim.AdamW(learning, lr=9.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model.load_state_dict(held["model"])
    optimizer.load_state_dict(held["optimizer"])
    scheduler.load_state_dict(held["scheduler"])
    assert scheduler.last_epoch == STEP + 2 and optimizer.param_groups[0]["betas"] == BETAS
    state = tmp_path / "out" / "photos-state"
    moments = load_file(state / "optimizer.safetensors")
    parameters = dict(model.named_parameters())
    assert moments and all(
        torch.equal(optimizer.state[parameters[name]][entry], tensor)
        for key, tensor in moments.items()
        for name, _, entry in [key.rpartition("/")]
    )
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    scheduler.step()

    again = config.with_name("again.toml")
    again.write_text(
        config.read_text()
        .replace(str(tmp_path / "out"), str(tmp_path / "again"))
        .replace(f"max_steps = {STEP + 2}", "max_steps = 99")
    )
    assert main([str(target), str(again)]) == 0
    (imported,) = (tmp_path / "again").glob("*-state")
    for name in ("model", "ema", "optimizer"):
        ours, theirs = load_file(state / f"{name}.safetensors"), load_file(imported / f"{name}.safetensors")
        assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours), name
