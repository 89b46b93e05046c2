"""A checkpoint of the published trainer, imported with the command, goes on with the training command."""

from pathlib import Path
from typing import Any

import pytest
import torch
from project import GEOMETRY, ForkServer, copy_tree, metrics, write_run
from safetensors.torch import load_file
from torch import Tensor

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


def test_the_run_goes_on_from_the_step(
    published: Path, tmp_path: Path, photographs: Path, encoders: Path, caches: Path, server: ForkServer
) -> None:
    copy_tree(caches, tmp_path / "cache")
    tables: dict[str, Any] = {
        "model": {"init": None, "init_scheme": None, "geometry": None, "path": str(published)},
        "experts": {"expert_input": "noised_image", "expert_time": "aligned", "sol_spatial_norm": "max"},
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
