"""Training from nothing but imported caches: no encoder, no teacher, only the pictures that the rows belong to."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from project import TEACHER_WIDTH, WIDTH, ForkServer, metrics, write_run

from musubi_tuner.caching.__main__ import main
from reference_caches import make_columns, write_shards

CAPTIONS = {"red": "a red card", "green": "a green card", "blue": "a blue card", "white": "a white card"}
TIMES = (0.125, 0.375, 0.625, 0.875)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of two updates without encoders and teachers, whose pictures were squashed to squares."""
    images = tmp_path / "images"
    images.mkdir()
    for name, caption in CAPTIONS.items():
        Image.new("RGB", (160, 100), name).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(caption)
    model = dict.fromkeys(("vae_path", "clip_path", "t5_path"))
    teachers: dict[str, Any] = dict.fromkeys(("unet", "vae", "lune", "sol"))
    teachers |= {"expert_input": "random", "expert_time": "reference", "resolution": 512}
    return write_run(
        tmp_path, images, tmp_path / "no encoders", model=model, experts=teachers,
        cache={"run": "never", "dtype": None, "latent_mode": "sample"},
        general={"resolution": 128, "enable_bucket": False, "batch_size": 2},
        train={"max_steps": 2, "mixed_precision": "no"},
    )  # fmt: skip


def test_a_run_trains_from_imported_caches_alone(
    config: Path, tmp_path: Path, server: ForkServer, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(CAPTIONS)
    columns = make_columns(
        len(names), latents=(16, 16, 16), text=(24, WIDTH), clip=WIDTH, times=TIMES, lune=TEACHER_WIDTH
    )
    prompts = [CAPTIONS[name] for name in names]
    source = write_shards(tmp_path / "published", columns, prompts, size=3)
    assert main(["import", str(config), str(source)]) == 0
    assert "experts: imported 4, up to date 0, failed 0\n" in capsys.readouterr().out
    result = server.run("train", [config], tmp_path).expect(0)
    for kind in ("latents", "text", "experts"):
        assert f"  {kind:<8} 4 up to date (4 of them imported), 0 to make\n" in result.out
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss/main"] > 0 and row["loss/lune"] > 0 and row["loss/sol"] > 0 for row in rows)
