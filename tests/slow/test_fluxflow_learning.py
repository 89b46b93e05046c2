"""FluxFlow learns pictures of 32 x 32 pixels: the autoencoder uses its latents, the flow draws what a caption says."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "e2e"))

import tomli_w
from project import ForkServer, differing, final_files, metrics
from test_fluxflow_run import GEOMETRY, tokenizer_of

from musubi_tuner.config import load_config
from musubi_tuner.config.pipeline import TABLE
from musubi_tuner.data.pixels import read_pixels
from musubi_tuner.data.sources import scan
from musubi_tuner.demo.pictures import vocabulary, write_dataset
from musubi_tuner.demo.score import trained
from musubi_tuner.models.fluxflow.encoding import open_autoencoder

pytestmark = pytest.mark.slow
COUNT = 300
SHAPE = {**GEOMETRY, "vae_dim": 16, "head_widths": [32, 16], "feature_maps_dim": 64, "flow_layers": 3, "flow_heads": 4,
         "text_embedding_dim": 64, "text_width": 32, "text_ff": 64, "feature_maps_dim_disc": 8}  # fmt: skip
VAE = {"train_vae": True, "kl_warmup_steps": 0, "frequency_alpha": 1.5, "mse_weight": 2.0, "histogram_weight": 0.0}
STEPS: list[dict[str, Any]] = [
    {"name": "vae", "objective": VAE, "train": {"max_steps": 500}},
    {
        "name": "gan",
        "start": "previous",
        "objective": {**VAE, "gan_training": True, "lambda_adv": 0.05},
        "optimizer": {"lr": 5e-4},
        "train": {"max_steps": 60},
    },
    {
        "name": "flow",
        "start": "previous",
        "objective": {"train_diff_full": True},
        "optimizer": {"lr": 4e-3},
        "train": {"max_steps": 600, "grad_accum_steps": 4},
        "sample": {"prompts": ["a red circle on the left of a white background"], "every_steps": 600},
    },
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ForkServer]]:
    root = tmp_path_factory.mktemp("learning")
    write_dataset(root / "pictures", COUNT, 32, 24, 0)
    tables = {
        "schema_version": 1,
        "run": {"name": "photos", "output_dir": str(root / "out"), "seed": 1, "threads": 2, "device": "cpu"},
        "model": {"arch": "ff", "init": "scratch", "geometry": SHAPE, "text_max_tokens": 16,
                  "bert_tokenizer": str(tokenizer_of(root / "tokenizer", vocabulary()))},
        "general": {"resolution": 32, "batch_size": 4},
        "datasets": [{"image_directory": str(root / "pictures"), "cache_directory": str(root / "cache")}],
        "train": {"mixed_precision": "no"},
        "optimizer": {"lr": 2e-3, "betas": [0.9, 0.99]},
        "scheduler": {"type": "cosine", "warmup_steps": 40},
        "sample": {"width": 32, "height": 32, "guidance": 1.5, "every_steps": 500},
        "ema": {"decay": 0.99},
        "save": {"every_steps": 250, "every_epochs": 0, "release": False},
        "log": {"every_steps": 20, "tensorboard": False},
        TABLE: STEPS,
    }  # fmt: skip
    config = root / "run.toml"
    config.write_text(tomli_w.dumps(tables), encoding="utf-8")
    server = ForkServer(root / "server", root / "home")
    server.run("train", [config], root).expect(0)
    yield config, server
    server.close()


def losses(config: Path, folder: str, name: str) -> tuple[float, float]:
    """Mean of the first and of the last fifth."""
    values = [row[f"loss/{name}"] for row in metrics(config.parent / "out" / folder)]
    share = max(1, len(values) // 5)
    return sum(values[:share]) / share, sum(values[-share:]) / share


@pytest.mark.parametrize("folder", ["01-vae", "02-gan"])
def test_the_reconstruction_depends_on_the_latents(run: tuple[Path, ForkServer], folder: str) -> None:
    config = trained(load_config(run[0], {"step": folder.partition("-")[2]}))
    assert str(config.model.path).endswith(folder)
    vae = open_autoencoder(config, torch.device("cpu"))
    items = scan(config.datasets, "ff").items[:64]
    pixels = torch.stack([read_pixels(item) for item in items])
    latents = vae.encode(pixels, None, False)
    right = (vae.decode(latents, False) - pixels).abs().mean()
    swapped = (vae.decode(latents.roll(1, 0), False) - pixels).abs().mean()
    print(f"{folder}: L1 {right:.3f}, swapped {swapped:.3f}")
    assert swapped > 3 * right


def test_losses_fall(run: tuple[Path, ForkServer]) -> None:
    for folder, name, share in (("01-vae", "recon", 0.2), ("03-flow", "flow", 0.7)):
        first, last = losses(run[0], folder, name)
        print(f"{folder}: {name} {first:.3f} -> {last:.3f}")
        assert last < share * first
    assert (run[0].parent / "out" / "03-flow" / "sample" / "samples_step_600.png").is_file()


def test_a_killed_run_ends_in_the_same_bits(run: tuple[Path, ForkServer], tmp_path: Path) -> None:
    config, server = run
    text = config.read_text(encoding="utf-8").replace(str(config.parent / "out"), str(tmp_path / "out"))
    again = tmp_path / "run.toml"
    again.write_text(text, encoding="utf-8")
    server.run("train", [again, "--step", "vae"], tmp_path, MUSUBI_FAULT="checkpoint.listed:1").expect(-9)
    server.run("train", [again, "--step", "vae"], tmp_path).expect(0)
    ends = [final_files(folder / "01-vae") for folder in (tmp_path / "out", config.parent / "out")]
    assert differing(*ends) == []
