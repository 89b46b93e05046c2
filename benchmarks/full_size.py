"""The whole way at full width with random weights: python benchmarks/run.py full_size [--steps 2] [--batch 1]

Makes a 245 M parameter TinyFlux, a FLUX-sized autoencoder, CLIP-L, flan-T5-base and an SD1.5-sized teacher with random
weights, encodes one 512 px photograph through the three cache jobs and trains a few steps. Every stage is the real
command in a process of its own. Printed are, for each, wall time and peak memory (maximum resident set), and for training:

    step    median over the second half of the lines in metrics.jsonl, and images per second
    MFU     operations of the model, without recomputation, per second over the device's dense bf16 rate
    peak    of the device's allocator

Needs about 8 GB of disk and 16 GB of memory; no download. With a GPU the same stages run there; what is wanted of one:

    python benchmarks/run.py full_size --steps 50 --batch 8 --no-checkpointing
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUN_FILE = """schema_version = 1
[run]
name = "full"
output_dir = "{folder}/run"
[model]
arch = "tf"
init = "scratch"
vae_path = "{folder}/vae"
clip_path = "{folder}/clip"
t5_path = "{folder}/t5"
[experts]
unet = "{folder}/unet"
expert_input = "random"
[train]
max_steps = {steps}
mixed_precision = "bf16"
[scheduler]
warmup_steps = 1
[memory]
gradient_checkpointing = {checkpointing}
[log]
every_steps = 1
tensorboard = false
[save]
every_epochs = 0
every_steps = 0
state = false
release = false
[general]
resolution = 512
batch_size = {batch}
[[datasets]]
image_directory = "{folder}/images"
cache_directory = "{folder}/cache"
num_repeats = {repeats}
"""
RATES = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "RTX 4090": 165e12}
"""Dense bf16 operations per second by a part of the device's name, from the makers' data sheets."""


def make_encoders(folder: Path) -> None:
    """Random weights in the published shapes, saved once."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from skimage import data
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from musubi_tuner.demo.prepare import word_tokenizer
    from musubi_tuner.encoders.autoencoder import FLUX_CONFIG
    from musubi_tuner.encoders.teachers import SD15_UNET_CONFIG
    from musubi_tuner.encoders.text import CLIP_L_CONFIG, T5_BASE_CONFIG

    if (folder / "done").exists():
        return
    torch.manual_seed(0)
    words = ["a", "an", "and", "astronaut", "before", "flag", "in", "orange", "shuttle", "suit"]
    clip_tokenizer = word_tokenizer(words, "<|startoftext|>", "<|endoftext|>", "<pad>", 77)
    t5_tokenizer = word_tokenizer(words, None, "</s>", "<pad>", 128)
    models = {
        "vae": lambda: AutoencoderKL.from_config({k: v for k, v in FLUX_CONFIG.items() if k != "_class_name"}),
        "clip": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L_CONFIG)),
        "t5": lambda: T5EncoderModel(T5Config(**T5_BASE_CONFIG)),
        "unet": lambda: UNet2DConditionModel.from_config(SD15_UNET_CONFIG),
    }
    for name, build in models.items():
        print(f"making {name} with random weights", flush=True)
        build().save_pretrained(folder / name)
    clip_tokenizer.save_pretrained(folder / "clip")
    t5_tokenizer.save_pretrained(folder / "t5")
    from PIL import Image

    (folder / "images").mkdir(exist_ok=True)
    Image.fromarray(data.astronaut()).save(folder / "images" / "astronaut.png")
    (folder / "images" / "astronaut.txt").write_text("an astronaut in an orange suit before a flag and a shuttle")
    (folder / "done").touch()


def measure(name: str, command: list[str]) -> tuple[str, float, float]:
    """Run a stage; returns its name, seconds and peak memory in GiB."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed")
    return name, time.perf_counter() - begun, usage.ru_maxrss / 2**20


def training(folder: Path, batch: int, device: str) -> str:
    """What metrics.jsonl says of the steps."""
    from musubi_tuner.models.tinyflux.flops import training_flops
    from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig

    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    clocks = [row["clock"] for row in rows if "step_seconds" in row["clock"]]
    seconds = statistics.median(clock["step_seconds"] for clock in clocks[len(clocks) // 2 :])
    rate = training_flops(TinyFluxConfig(), batch, 64, 64, 128) / seconds
    text = f"step {seconds:.4f} s, {batch / seconds:.2f} images/s, {rate / 1e12:.2f} * 10^12 operations/s"
    most = next((value for name, value in RATES.items() if name in device), None)
    text += f", MFU {rate / most:.1%}" if most else ", MFU unknown: the rate of this device is not listed"
    peak = clocks[-1].get("peak_gib")
    return text + (f", peak {peak:.2f} GiB on the device" if peak else "")


def main(arguments: list[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="data/benchmarks/full_size", help="where models and caches are made")
    parser.add_argument("--steps", type=int, default=2, help="training steps")
    parser.add_argument("--batch", type=int, default=1, help="images per step")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute blocks")
    options = parser.parse_args(arguments)
    folder = Path(options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make_encoders(folder)
    run_file = folder / "run.toml"
    shutil.rmtree(folder / "run", ignore_errors=True)
    values = {"steps": options.steps, "batch": options.batch, "repeats": options.batch * options.steps}
    checkpointing = str(options.checkpointing).lower()
    run_file.write_text(
        RUN_FILE.format(folder=folder.as_posix(), checkpointing=checkpointing, **values), encoding="utf-8"
    )
    stages = [(kind, ["-m", "musubi_tuner.caching", kind, str(run_file)]) for kind in ("latents", "text", "experts")]
    stages.append((f"{options.steps} steps", ["-m", "musubi_tuner.runner", str(run_file), "--skip_cache"]))
    rows = [measure(name, [*command, *(["--set", "cache.run=always"] if "caching" in command[1] else [])])
            for name, command in stages]  # fmt: skip
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"\n{device}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{'stage':<10} {'seconds':>9} {'peak GiB':>9}")
    for name, seconds, peak in rows:
        print(f"{name:<10} {seconds:>9.1f} {peak:>9.2f}")
    print(f"\nbatch {options.batch}, checkpointing {checkpointing}: {training(folder, options.batch, device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
