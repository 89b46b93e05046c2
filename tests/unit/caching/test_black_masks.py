"""Masks that leave nothing to learn are found in files that are to be encoded, and in caches without looking at files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from musubi_tuner.planning.plan import describe, make_plan

pytestmark = pytest.mark.long


@pytest.fixture
def masked(project: Any) -> Any:
    """Four pictures: one without a mask, one with a white, one with a black mask, one whose mask is cut away."""
    for name in ("none", "white", "black"):
        project.picture(name)
    project.picture("cut", (256, 64))
    (project.root / "masks").mkdir()
    for name, size, value in (("white", (64, 64), 255), ("black", (64, 64), 0), ("cut", (256, 64), 0)):
        Image.new("L", size, value).save(project.root / "masks" / f"{name}.png")
    edge = np.zeros((64, 256), dtype=np.uint8)
    edge[:, :20] = 255
    Image.fromarray(edge).save(project.root / "masks" / "cut.png")
    project.tables["datasets"][0]["mask_directory"] = "masks"
    project.tables["train"] |= {"masked_loss": True, "mask_background": 0.0}
    project.tables["experts"] |= {"enable_lune": False, "enable_sol": False}
    project.tables["general"] |= {"enable_bucket": False}
    return project


def found(project: Any) -> list[str]:
    return [item.id for item in make_plan(project.config(), 1, download=False).black_masks]


def test_they_are_found_before_and_after_encoding(masked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(masked) == ["black", "cut"]
    assert masked.run("latents") == 0

    def refuse(*_: Any) -> None:
        raise AssertionError("a cached mask was read from its file")

    monkeypatch.setattr("musubi_tuner.caching.black_masks.read_mask", refuse)
    assert found(masked) == ["black", "cut"]


def test_the_plan_names_them_only_where_masks_count(masked: Any, tmp_path: Path) -> None:
    config = masked.config()
    text = describe(config, make_plan(config, 1, download=False), 1)
    assert "warning: the masks of 2 images are black all over (black.png, cut.png): nothing" in text
    off = masked.config(train={"masked_loss": False})
    assert make_plan(off, 1, download=False).black_masks == []


def test_a_broken_mask_is_left_to_the_job(masked: Any) -> None:
    path = masked.root / "masks" / "black.png"
    path.write_bytes(path.read_bytes()[:60])
    assert found(masked) == ["cut"]
