"""A killed run goes on from its newest state to the bits of an unbroken one, also where the optimizer remembers more than moments."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from project import Place, content, differing

UPDATES = 5


def tables(kind: str) -> dict[str, Any]:
    """A run that saves a state after every update; Prodigy begins with a rate that moves something."""
    args = {"Prodigy": {"d0": 1e-3}, "AdamW8bit": {"min_8bit_size": 1024}}.get(kind, {})
    return {
        "train": {"max_steps": UPDATES, "mixed_precision": "no"},
        "optimizer": {"type": kind, "lr": None, "args": args},
        "scheduler": {"warmup_steps": 0},
        "ema": {"enabled": False},
        "save": {"every_steps": 1, "every_epochs": 0, "keep_last_steps": 2},
        "log": {"every_steps": 1, "tensorboard": False},
    }


def final(config: Path) -> dict[str, Any]:
    """Weights, and the tensors of the final state."""
    out = config.parent / "out"
    paths = [out / "photos.safetensors", *sorted((out / "photos-state").glob("*.safetensors"))]
    return {path.name: content(path) for path in paths}


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("AdamWScheduleFree", "AdamW8bit")]


@pytest.mark.parametrize("kind", ["Prodigy", *SLOW])
def test_a_run_killed_while_it_writes_a_state_ends_in_the_bits_of_an_unbroken_one(kind: str, place: Place) -> None:
    whole, killed = (place.write(f"{kind} {name}", **tables(kind)) for name in ("whole", "killed"))
    place.server.run("train", [whole], whole.parent).expect(0)
    died_at = random.Random(kind).randint(3, UPDATES - 1)
    fault = f"state.optimizer:{died_at}"
    place.server.run("train", [killed], killed.parent, MUSUBI_FAULT=fault).expect(-signal.SIGKILL)
    again = place.server.run("train", [killed], killed.parent).expect(0)
    assert f"continuing from photos-step{died_at - 1:08d}-state" in again.out
    expected = final(whole)
    assert {"model.safetensors", "optimizer.safetensors"} <= set(expected)
    assert differing(final(killed), expected) == []
