"""A FLUX.1-shaped model that has never seen one colour of the demo, and runs that teach it: for a test and a benchmark."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import save_file

from musubi_tuner.caching.reader import CachedDataset
from musubi_tuner.caching.status import needed_kinds
from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.data.plan import plan_epoch
from musubi_tuner.data.sources import scan
from musubi_tuner.demo.checker import score
from musubi_tuner.demo.pictures import Combination, combinations
from musubi_tuner.device import has_bf16
from musubi_tuner.encoders.for_run import TextEncoders
from musubi_tuner.models.flux_dev import Flux, FluxConfig, FluxProcess
from musubi_tuner.randomness import uniform
from musubi_tuner.training.ema import EMA
from musubi_tuner.training.generate import Generator
from musubi_tuner.training.sampling import contact_sheet, save_png
from musubi_tuner.training.schedulers import make_schedule
from musubi_tuner.training.task import make_draws
from steps import training_step

ROOT = Path(__file__).parents[1]
NEW = "purple"
BASE_STEPS = 1800
GEOMETRY = FluxConfig(
    vec_in_dim=128,
    context_in_dim=128,
    hidden_size=128,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(16, 24, 24),
)


def train_py(config: Path, *options: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), str(config), *options], capture_output=True, text=True,
                          cwd=config.parent)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def write_run(folder: Path, name: str, steps: int, repeats: dict[str, int], **own: dict[str, Any]) -> Path:
    """The run file of a LoRA, or of what other settings make of it.

    Args:
        repeats: folder of pictures -> repeats. own: tables of settings beside these, or instead of them; an adapter whole.
    """
    files = folder / "data" / "demo" / "files"
    tables: dict[str, Any] = {
        "schema_version": 1,
        "run": {"name": name, "output_dir": str(folder / name), "seed": 1},
        "model": {"arch": "fd", "path": str(folder / "base.safetensors"), "vae_path": str(files / "vae"),
                  "clip_path": str(files / "clip"), "t5_path": str(files / "t5"), "t5_max_tokens": 12},
        "adapter": {"rank": 8, "alpha": 8.0},
        "cache": {"latents_batch_size": 64, "text_batch_size": 128},
        "general": {"resolution": 64, "enable_bucket": False, "batch_size": 16},
        "datasets": [
            {"image_directory": str(folder / part), "cache_directory": str(folder / f"{part}_cache"), "num_repeats": count}
            for part, count in repeats.items()
        ],
        "objective": {"timestep_sampling": "shift", "discrete_flow_shift": 2.0},
        "train": {"max_steps": steps},
        "optimizer": {"lr": 2e-3},
        "scheduler": {"type": "cosine", "warmup_steps": 20},
        "save": {"every_steps": 0},
        "sample": {"shift": 2.0, "cfg_scale": 2.0, "guidance": 1.0},
        "log": {"every_steps": 50, "tensorboard": False},
    }  # fmt: skip
    merged = {name: table if name == "adapter" else {**tables.get(name, {}), **table} for name, table in own.items()}
    tables |= merged
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


def save_base(model: Flux, path: Path) -> None:
    save_file({key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")


def train_base(config: RunConfig, model: Flux, steps: int = BASE_STEPS) -> None:
    """Train all weights in the demo's way; a tenth of the captions is empty, so that guidance has a negative."""
    for name, module in model.named_modules():
        if name.endswith(("mod.lin", "modulation.lin", "final_layer.linear")):
            torch.nn.init.zeros_(module.weight)  # type: ignore[arg-type]
            torch.nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    process = FluxProcess(config.objective)
    dataset = CachedDataset(config, scan(config.datasets, "fd").items, needed_kinds(config))
    empty = TextEncoders(config, torch.device("cpu")).encode([""])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = make_schedule("cosine", lr=2e-3, min_lr=6e-5, warmup_steps=40, warmup_type="linear", total_steps=steps)
    average = EMA(model, 0.99, warmup=True)
    model.train()
    fast_bf16 = has_bf16(torch.device("cpu"))
    step = epoch = 0
    while step < steps:
        for planned in plan_epoch(dataset.plan_items(), seed=1, epoch=epoch)[: steps - step]:
            batch = dataset[planned]
            dropped = torch.tensor([uniform(1, "empty", epoch, index) < 0.1 for index in planned.presentations])
            for name in ("t5_vec", "clip_l_pooler"):
                tensor = batch.tensors[name].float()
                tensor[dropped] = empty[name].float()
                batch.tensors[name] = tensor
            draws = make_draws(process, tuple(batch.tensors["latents"].shape[1:]), planned, 1, epoch)
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * schedule(step)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bf16):
                output = training_step(model, process, batch, draws, step)
            (output.loss / len(planned)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
            step += 1
        epoch += 1
    model.load_state_dict(average.shadow)


def measure(
    config: RunConfig, adapters: Sequence[tuple[str, float]], wanted: list[Combination], sheet: Path
) -> dict[str, float | int | None]:
    generator = Generator.from_run(config, adapters=adapters)
    settings = generator.settings(seed=4321, width=64, height=64)
    pictures = generator.draw([one.caption for one in wanted], settings, batch_size=36)
    save_png(sheet, contact_sheet(pictures, columns=9))
    return score(pictures, wanted, set(wanted[:1]))


def make_project(folder: Path) -> Path:
    """Encoders and pictures of the demo in three folders (old, new, mixed), in a folder that is returned."""
    shutil.copytree(ROOT / "toml", folder / "toml")
    root = folder / "toml"
    train_py(
        root / "demo.toml", "--cache_only", "--set", "experts.enable_lune=false", "--set", "experts.enable_sol=false"
    )
    pictures = root / "data" / "demo" / "files" / "pictures"
    for part in ("old", "new", "mixed"):
        (root / part).mkdir()
    for index, text in enumerate(sorted(pictures.glob("*.txt"))):
        is_new = NEW in text.read_text(encoding="utf-8")
        places = ["new"] if is_new else ["old", *(["mixed"] if index % 16 == 0 else [])]
        for place in places:
            for path in (text, text.with_suffix(".png")):
                shutil.copy2(path, root / place / path.name)
    return root


def make_base(root: Path, steps: int = BASE_STEPS) -> None:
    """Train the model on the old pictures; it is ``base.safetensors``."""
    torch.manual_seed(0)
    model = Flux(GEOMETRY)
    save_base(model, root / "base.safetensors")
    base = write_run(root, "base", 100, {"old": 1})
    train_py(base, "--cache_only")
    train_base(load_config(base), model, steps)
    save_base(model, root / "base.safetensors")


def prompts() -> tuple[list[Combination], list[Combination]]:
    """What is drawn: all combinations of the new colour, and a third of the others."""
    new = [one for one in combinations() if one.colour == NEW]
    return new, [one for one in combinations() if one.colour != NEW][::3]
