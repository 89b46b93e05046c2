"""The demo from its run file to its score, in small; and every run file of the project."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from project import REPOSITORY, ForkServer, Result, metrics

from musubi_tuner.config import load_config
from musubi_tuner.config.load import load_steps

RUN_FILES = sorted(path for path in (REPOSITORY / "toml").glob("*.toml") if "[run]" in path.read_text(encoding="utf-8"))
SMALL = {
    "run.threads": 1,
    "demo.pictures": 96,
    "demo.score_prompts": 12,
    "train.max_steps": 30,
    "scheduler.warmup_steps": 5,
    "objective.lune_warmup_steps": 5,
    "objective.sol_warmup_steps": 5,
    "sample.every_steps": 30,
    "sample.steps": 4,
    "log.every_steps": 3,
}
"""Of everything a little; what the full demo learns is for the slow suite."""


@dataclass
class Demo:
    """A finished small demo: the folder it was started in, its options, and what it printed."""

    folder: Path
    options: list[str]
    result: Result

    @property
    def out(self) -> Path:
        return self.folder / "data" / "demo" / "run"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, python: Callable[..., Result]) -> Demo:
    """The demo of the repository, started in a folder of its own."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "toml").mkdir()
    shutil.copy(REPOSITORY / "toml" / "demo.toml", folder / "toml")
    options = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    result = python(REPOSITORY / "train.py", "toml/demo.toml", *options, cwd=folder)
    return Demo(folder, options, result.expect(0))


def test_the_demo_goes_from_nothing_to_a_score_in_one_command(demo: Demo) -> None:
    out = demo.result.out
    assert "demo: drawing 96 pictures" in out
    for job in ("latents", "text", "experts"):
        assert f"{job}: encoded 96, up to date 0, failed 0" in out
    assert "step 30/30" in out
    assert "score over 12 prompts with fresh noise:" in out
    assert re.search(r"colour +\d+\.\d%", out)


def test_the_demo_leaves_its_score_with_exactly_the_promised_keys(demo: Demo) -> None:
    accuracy = json.loads((demo.out / "accuracy.json").read_text(encoding="utf-8"))
    assert set(accuracy) == {"colour", "background", "position", "shape", "all", "unseen_all", "prompts", "seconds"}
    assert accuracy["prompts"] == 12 and accuracy["seconds"] > 0
    for name in ("colour", "background", "position", "shape", "all", "unseen_all"):
        assert 0 <= accuracy[name] <= 1
    assert accuracy["all"] <= min(accuracy[name] for name in ("colour", "background", "position", "shape"))


def test_the_demo_leaves_its_pictures(demo: Demo) -> None:
    with Image.open(demo.out / "contact_sheet.png") as sheet:
        assert sheet.width >= 12 * 64 and sheet.height >= 64
        assert len(sheet.convert("RGB").getcolors(1 << 24) or []) > 100  # not one flat colour
    with Image.open(demo.out / "loss.png") as plot:
        assert plot.width > 400 and plot.height > 300
    assert len(list((demo.out / "sample").glob("demo_00000030_*.png"))) == 4


def test_the_demo_leaves_a_checkpoint_and_a_release_that_load(demo: Demo) -> None:
    from musubi_tuner.models.tinyflux import from_pretrained

    assert (demo.out / "demo.safetensors").is_file() and (demo.out / "demo_ema.safetensors").is_file()
    model = from_pretrained(demo.out / "release", ema=True)
    assert model.config.hidden_size == 128


def test_the_loss_of_the_demo_falls(demo: Demo) -> None:
    losses = [row["loss/main"] for row in metrics(demo.out)]
    assert len(losses) == 10
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_the_demo_of_fluxflow_scores_each_of_its_steps(
    tmp_path: Path, python: Callable[..., Result], server: ForkServer
) -> None:
    (tmp_path / "toml").mkdir()
    shutil.copy(REPOSITORY / "toml" / "demo_fluxflow.toml", tmp_path / "toml")
    small = {
        "run.threads": 1,
        "demo.pictures": 64,
        "demo.score_prompts": 24,
        "scheduler.warmup_steps": 2,
        "sample.steps": 4,
    }
    small |= {f"steps.{name}.train.max_steps": updates for name, updates in (("vae", 12), ("gan", 3), ("flow", 6))}
    options = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    assert (
        "has no pictures and encoders yet"
        in server.run("train", ["toml/demo_fluxflow.toml", "--plan"], tmp_path).expect(0).out
    )
    said = python(REPOSITORY / "train.py", "toml/demo_fluxflow.toml", *options, cwd=tmp_path).expect(0).out
    assert said.count("reconstructions of 24 pictures that were never trained: PSNR ") == 3
    assert said.count("score over 24 prompts with fresh noise:") == 1
    out = tmp_path / "data" / "demo_fluxflow" / "run"
    vae, gan, flow = (
        json.loads((out / name / "accuracy.json").read_text(encoding="utf-8"))
        for name in ("01-vae", "02-gan", "03-flow")
    )
    assert set(vae) == set(gan) == {"reconstruction", "chance", "seconds"}
    assert vae["reconstruction"] != gan["reconstruction"] == flow["reconstruction"]
    assert flow["prompts"] == 24 and set(flow["shuffled"]) == set(flow["chance"]) == {
        "colour",
        "background",
        "position",
        "shape",
    }
    with Image.open(out / "01-vae" / "reconstructions.png") as sheet:
        assert sheet.width == 12 * (128 + 8) + 8 and sheet.height == 2 * (2 * 128 + 2 + 8) + 8
    assert (out / "03-flow" / "contact_sheet.png").is_file() and (out / "03-flow" / "loss.png").is_file()


def test_a_finished_demo_says_so(demo: Demo, server: ForkServer) -> None:
    before = (demo.out / "accuracy.json").stat().st_mtime_ns
    again = server.run("train", ["toml/demo.toml", *demo.options], demo.folder).expect(0)
    assert "this run is finished:" in again.out and "--fresh" in again.out
    assert "encoded" not in again.out and "drawing" not in again.out
    assert (demo.out / "accuracy.json").stat().st_mtime_ns == before


def test_a_demo_that_was_stopped_before_its_score_is_scored_by_the_same_command(demo: Demo, server: ForkServer) -> None:
    expected = json.loads((demo.out / "accuracy.json").read_text(encoding="utf-8"))
    for name in ("accuracy.json", "contact_sheet.png", "loss.png"):
        (demo.out / name).unlink()
    again = server.run("train", ["toml/demo.toml", *demo.options], demo.folder).expect(0)
    assert (demo.out / "accuracy.json").is_file(), again.out
    found = json.loads((demo.out / "accuracy.json").read_text(encoding="utf-8"))
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert (demo.out / "contact_sheet.png").is_file() and (demo.out / "loss.png").is_file()


def test_drawing_works_with_the_checkpoint_of_the_demo(demo: Demo, python: Callable[..., Result]) -> None:
    prompt = "a red circle on the left of a white background"
    command = [
        "-m",
        "musubi_tuner.tinyflux_generate_image",
        "toml/demo.toml",
        "--prompt",
        prompt,
        "--save_path",
        "drawn",
    ]
    result = python(*command, *demo.options, cwd=demo.folder).expect(0)
    (path,) = (demo.folder / "drawn").glob("demo_*.png")
    assert f"{path.relative_to(demo.folder)}: {prompt}" in result.out
    with Image.open(path) as picture:
        assert picture.size == (64, 64)


# Run files


def test_the_project_has_the_run_files_that_the_readme_names() -> None:
    assert {path.name for path in RUN_FILES} >= {
        "demo.toml",
        "tinyflux.toml",
        "tinyflux_lora.toml",
        "tinyflux_scratch.toml",
    }


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_every_run_file_loads_without_a_warning(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if path.name != "demo.toml":
        for name in ("images", "style", "output/fluxflow_pipeline/02-gan"):
            (tmp_path / "data" / name).mkdir(parents=True)
    for config in load_steps(path) or [load_config(path)]:
        assert [finding for finding in config.findings if finding.level == "warning"] == []
        assert config.datasets and (config.train.max_steps or config.train.max_epochs)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "toml").glob("*.toml")), ids=lambda path: path.name)
def test_every_key_of_a_run_file_is_explained(path: Path) -> None:
    """A comment on the line of the key, or, for a list over several lines, on its first."""
    bare, inside = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.match(r"[a-z_0-9]+ = ", line) and not inside and "#" not in line:
            bare.append(line)
        opened = re.match(r"[a-z_0-9]+ = \[ *(#.*)?$", line)
        inside = (inside or bool(opened)) and not line.startswith("]")
    assert bare == []


def test_without_an_argument_the_run_files_are_listed_and_the_demo_is_recommended(
    python: Callable[..., Result],
) -> None:
    result = python(REPOSITORY / "train.py", cwd=REPOSITORY).expect(0)
    for path in RUN_FILES:
        assert f"toml/{path.name}" in result.out
    assert "python train.py toml/demo.toml" in result.out
    assert "torch" not in result.err


def test_without_an_argument_elsewhere_the_message_says_where_to_go(
    tmp_path: Path, python: Callable[..., Result]
) -> None:
    result = python(REPOSITORY / "train.py", cwd=tmp_path).expect(0)
    assert "no run files in ./toml; run this in the project's folder" in result.out
