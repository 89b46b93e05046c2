"""The users' field test: random pictures and prompts, all caches, fifty updates, a falling loss. Offline, by one command."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from project import ForkServer, cache_paths, metrics, words, write_run


@pytest.mark.slow
def test_random_pictures_and_prompts_are_cached_and_learned(tmp_path: Path, encoders: Path, server: ForkServer) -> None:
    noise, choice = np.random.default_rng(0), random.Random(0)
    images = tmp_path / "random"
    images.mkdir()
    for index in range(8):
        Image.fromarray(noise.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text(" ".join(choice.choices(words(), k=6)))
    config = write_run(
        tmp_path, images, encoders, train={"max_steps": 50}, save={"every_steps": 0, "release": False},
        log={"every_steps": 1, "tensorboard": False},
    )  # fmt: skip
    printed = server.run("train", [config], tmp_path).expect(0).out
    for job in ("latents", "text", "experts"):
        assert f"{job}: encoded 8" in printed
    assert len(cache_paths(tmp_path / "cache")) == 3 * 8
    losses = [row["loss/total"] for row in metrics(tmp_path / "out")]
    assert len(losses) == 50
    first, last = (sum(part) / 10 for part in (losses[:10], losses[-10:]))
    # An update sees four pictures or fewer at random times, so ten of them are averaged.
    assert last < 0.9 * first, (first, last)
    assert last < 1.0, (first, last)
