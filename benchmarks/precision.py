"""What the forms of storage cost in precision: python benchmarks/run.py precision [--seeds N]

The output of a FLUX.1-shaped model with random weights as initialised, its layers stored in every form, against the same model
with plain weights, in float32: norm of the difference over norm of the output, mean of the seeds. It takes two minutes on a CPU.
"""

import argparse
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from musubi_tuner.config.schema.memory import MemorySection
from musubi_tuner.memory.compose import freeze_of
from musubi_tuner.memory.storage import freeze_layers
from musubi_tuner.models.flux_dev import Flux, FluxConfig
from musubi_tuner.models.layers import image_positions
from musubi_tuner.models.registry import MODELS

SHAPE = FluxConfig(
    hidden_size=768,
    num_heads=6,
    depth=3,
    depth_single_blocks=6,
    context_in_dim=256,
    vec_in_dim=128,
    guidance_embed=True,
)
STORAGES = {
    "fp8": {"base_storage": "fp8"},
    "fp8_scaled (64 columns)": {"base_storage": "fp8_scaled"},
    "fp8_scaled (rows)": {"base_storage": "fp8_scaled", "fp8_scale": "row"},
    "int8 (rows)": {"base_storage": "int8"},
    "nf4": {"base_storage": "nf4"},
}
SIDE, TEXT = 8, 32
"""Tokens per axis of the picture, and of the text."""


def output(seed: int, memory: MemorySection) -> Tensor:
    """Of the model of a seed, [1, 64, 64] float32."""
    torch.manual_seed(seed)
    model = Flux(SHAPE).eval()
    img, txt, pooled = (
        torch.randn(1, SIDE * SIDE, 64),
        torch.randn(1, TEXT, SHAPE.context_in_dim),
        torch.randn(1, SHAPE.vec_in_dim),
    )
    freeze = freeze_of(memory, MODELS["fd"])
    if freeze is not None:
        freeze_layers(model, freeze)
    ids = image_positions(SIDE, SIDE, torch.device("cpu")).float()[None]
    with torch.no_grad():
        return model(img, ids, txt, torch.zeros(1, TEXT, 3), torch.full((1,), 0.5), pooled, torch.full((1,), 3.5))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())


def main(arguments: Sequence[str]) -> int:
    """Print the table of benchmarks/RESULTS.md."""
    parser = argparse.ArgumentParser(prog="precision", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="models (default: 3)")
    count = parser.parse_args(arguments).seeds
    if count < 1:
        parser.error(f"--seeds: found {count}, expected at least 1")
    seeds = range(count)
    expected = [output(seed, MemorySection()) for seed in seeds]
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {len(expected)} models")
    print(f"| {'storage':<24} | without modulation layers | with fp8_modulation |")
    for name, settings in STORAGES.items():
        errors = [
            sum(relative_error(output(seed, MemorySection.model_validate({**settings, "fp8_modulation": modulation})), expected[seed])
                for seed in seeds) / len(expected)
            for modulation in (False, True)
        ]  # fmt: skip
        print(f"| {name:<24} | {errors[0]:.2%} | {errors[1]:.2%} |", flush=True)
    return 0
