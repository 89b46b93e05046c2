"""A TinyFlux that trains while blocks of it live in main memory: the run of one that does not swap, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from project import (
    GEOMETRY,
    ForkServer,
    copy_tree,
    differing,
    final_files,
    metrics,
    write_run,
)
from safetensors.torch import load_file

from musubi_tuner.assemble import load_trainee

DEEP = {"model": {"geometry": {**GEOMETRY, "num_double_layers": 3, "num_single_layers": 4}}}
SAMPLES = {"prompts": ["a cat"], "every_steps": 10, "width": 64, "height": 64, "steps": 2}
NewRun = Callable[..., Path]


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory, photographs: Path, encoders: Path, caches: Path) -> NewRun:
    """Write a run file with its caches."""
    folder = tmp_path_factory.mktemp("swap")

    def write(name: str, **changes: Any) -> Path:
        copy_tree(caches, folder / name / "cache")
        return write_run(folder / name, photographs, encoders, **{**DEEP, "sample": SAMPLES, **changes})

    return write


@pytest.fixture(scope="module")
def plain(new: NewRun, server: ForkServer) -> Path:
    """Output of the run without swap."""
    config = new("plain")
    server.run("train", [config], config.parent).expect(0)
    return config.parent / "out"


def test_swapped_training_is_the_same_run(new: NewRun, plain: Path, server: ForkServer) -> None:
    config = new("swapped", memory={"blocks_to_swap": 3, "gradient_checkpointing": True})
    result = server.run("train", [config], config.parent).expect(0)
    assert "swap: 3 blocks stay in main memory" in result.out
    assert "one device sync per update, more for swapped blocks\n" in result.out
    assert result.out.count("  memory   about ") == result.out.count(" while a sample is decoded") == 1
    assert "fetched on the spot" not in result.out
    assert differing(final_files(config.parent / "out"), final_files(plain)) == []
    assert metrics(config.parent / "out") == metrics(plain)
    for name in ("photos_00000010_00.png", "photos_00000020_00.png"):
        assert (config.parent / "out" / "sample" / name).read_bytes() == (plain / "sample" / name).read_bytes()


def test_killed_with_swap_continued_without(new: NewRun, plain: Path, server: ForkServer) -> None:
    config = new("killed", memory={"blocks_to_swap": 2})
    assert server.run("train", [config], config.parent, MUSUBI_FAULT="train.update:8").code == -9
    server.run("train", [config, "--blocks_to_swap", "0"], config.parent).expect(0)
    assert differing(final_files(config.parent / "out"), final_files(plain)) == []


def test_two_processes_reduce_what_lies_in_main_memory(new: NewRun, server: ForkServer) -> None:
    common: dict[str, Any] = {"sample": None, "save": {"every_steps": 0}, "general": {"num_repeats": 3}}
    alone = new("alone", **common, train={"grad_accum_steps": 2, "max_steps": 10})
    server.run("train", [alone], alone.parent).expect(0)
    both = new(
        "both", **common, train={"max_steps": 10}, distributed={"num_processes": 2}, memory={"blocks_to_swap": 3}
    )
    result = server.run("train", [both], both.parent).expect(0)
    # The command plans the memory of its processes, and they know that it did.
    assert result.out.count("  memory   about ") == 1 and "in each of 2 processes" in result.out
    expected, found = (load_file(run.parent / "out" / "photos.safetensors") for run in (alone, both))
    start = load_start(alone)
    moved = max(float((expected[key] - start[key]).abs().max()) for key in expected)
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= 1e-5 * moved


def load_start(run: Path) -> dict[str, Any]:
    """Weights before the first update."""
    from musubi_tuner.config import load_config

    config = load_config(run)
    return load_trainee(config, torch.device("cpu")).model.state_dict()


def test_an_optimizer_that_cannot_step_in_main_memory(new: NewRun, server: ForkServer) -> None:
    changes = {"optimizer": {"type": "AdamW8bit"}, "train": {"mixed_precision": "fp16"}}
    config = new("refused", memory={"blocks_to_swap": 2}, **changes)
    err = server.run("train", [config], config.parent).expect(2).err
    assert 'optimizer.type: "AdamW8bit" runs on the device only' in err
    assert 'train.mixed_precision: "fp16" does not work with trained blocks in main memory' in err
