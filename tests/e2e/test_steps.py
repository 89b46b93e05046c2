"""A run file of several steps, killed wherever: the same command again ends in the same bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from project import Place, Result, differing, final_files, metrics
from safetensors.torch import load_file

FOLDERS = ["01-warm", "02-distil", "03-lora"]
STEPS: list[dict[str, Any]] = [
    {"name": "warm", "experts": {"enable_lune": False, "enable_sol": False}, "train": {"max_steps": 3}},
    {"name": "distil", "start": "previous", "train": {"max_steps": 4}},
    {
        "name": "lora",
        "use": ["photographs"],
        "start": "previous_ema",
        "experts": {"enable_lune": False, "enable_sol": False},
        "adapter": {"type": "lora", "rank": 2},
        "train": {"max_steps": 3},
    },
]


def write(place: Place, name: str, steps: list[dict[str, Any]] = STEPS, **tables: Any) -> Path:
    """A file of three steps with its caches in a new folder."""
    data = {"image_directory": str(place.photographs), "cache_directory": str(place.folder / name / "cache")}
    settings: dict[str, Any] = {
        "datasets": [{"name": "photographs", **data}],
        "experts": {"expert_input": "noised_image", "expert_time": "aligned", "sol_spatial_norm": "max"},
        "scheduler": {"warmup_steps": 0},
        "save": {"every_steps": 2, "every_epochs": 0},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    return place.write(name, **{**settings, **tables}, steps=steps)


def ends(config: Path) -> dict[str, Any]:
    """Tensors of the end of every step."""
    return {
        f"{folder}/{name}": content
        for folder in FOLDERS
        for name, content in final_files(config.parent / "out" / folder).items()
    }


def tensors_only(files: dict[str, Any]) -> dict[str, Any]:
    return {name: content[1] for name, content in files.items()}


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> Path:
    config = write(place, "undisturbed")
    place.server.run("train", [config], config.parent).expect(0)
    return config


def test_three_steps_are_planned_and_trained_in_turn(undisturbed: Path, place: Place) -> None:
    out = undisturbed.parent / "out"
    listed = json.loads((out / "steps.json").read_text(encoding="utf-8"))["steps"]
    assert [(entry["folder"], entry["status"], entry["step"]) for entry in listed] == [
        ("01-warm", "finished", 3), ("02-distil", "finished", 4), ("03-lora", "finished", 3),
    ]  # fmt: skip
    assert "loss/lune" not in metrics(out / "01-warm")[0] and "loss/lune" in metrics(out / "02-distil")[0]
    assert any("lora" in key for key in load_file(out / "03-lora" / "photos.safetensors"))
    again = place.server.run("train", [undisturbed], undisturbed.parent).expect(0)
    assert again.out.count("this run is finished") == 3
    end = json.loads((out / "exit.json").read_text(encoding="utf-8"))
    assert (end["reason"], end["code"]) == ("finished", 0)
    planned = write(place, "planned")
    plan = place.server.run("train", [planned, "--plan"], undisturbed.parent).expect(0)
    second = plan.out[plan.out.index("step 2 of 3: distil") : plan.out.index("step 3 of 3: lora")]
    assert "experts  are planned and cached when step warm is finished" in second
    assert "memory   is estimated when step warm is finished" in second and "train    4 updates" in second
    for words, expected in (
        (["--step", "distil"], "step distil starts from step warm, which is not finished; run that first: --step warm"),
        (["--step", "distill"], "has no step 'distill'. Did you mean 'distil'?"),
    ):
        assert expected in place.server.run("train", [planned, *words], planned.parent).expect(2).err
    launched = place.server.run("train", [planned, "--fresh"], planned.parent, ACCELERATE_MIXED_PRECISION="no")
    assert "--fresh: does not work under a launcher" in launched.expect(2).err


def test_steps_are_not_put_before_one_that_has_begun(undisturbed: Path, place: Place) -> None:
    text = undisturbed.read_text(encoding="utf-8")
    edited = undisturbed.with_name("edited.toml")
    edited.write_text(
        text.replace('name = "lora"', 'name = "before"', 1) + '[[steps]]\nname = "lora"\nadapter.type = "lora"\n',
        encoding="utf-8",
    )
    result = place.server.run("train", [edited], undisturbed.parent).expect(2)
    assert "step 03-lora has begun, and the file no longer has it there" in result.err


@pytest.mark.parametrize(
    "point",
    [
        "file.written:1",
        "train.update:2",
        "step.finished:1",
        "train.update:5",
        "state.model:5",
        "step.finished:2",
        "train.update:7",
    ],
)
def test_a_file_killed_in_a_step_or_between_two_ends_in_the_same_bits(
    point: str, undisturbed: Path, place: Place
) -> None:
    config = write(place, f"killed {point.replace(':', ' ')}")
    place.server.run("train", [config], config.parent, MUSUBI_FAULT=point).expect(-9)
    place.server.run("train", [config], config.parent).expect(0)
    assert differing(tensors_only(ends(config)), tensors_only(ends(undisturbed))) == []
    assert not list((config.parent / "out").rglob(".tmp-*"))


def test_an_edited_finished_step_is_refused_with_its_key(undisturbed: Path, place: Place) -> None:
    result = place.server.run("train", [undisturbed, "--set", "steps.distil.optimizer.lr=0.5"], undisturbed.parent)
    result.expect(2)
    assert "out/02-distil: has a finished run with another config" in result.err
    assert "optimizer.lr was 0.003, now 0.5" in result.err


def test_a_metric_ends_a_step_before_its_budget_and_says_why(place: Place) -> None:
    steps = [
        {"name": "short", "until": {"metric": "loss/main", "below": 1e9, "patience": 2}, "train": {"max_steps": 60}},
    ]
    config = write(place, "until", steps, experts={"enable_lune": False, "enable_sol": False})
    result = place.server.run("train", [config], config.parent).expect(0)
    assert "step 21: this step of the file ends here: the mean of the last 20 values of loss/main is" in result.out
    assert metrics(config.parent / "out" / "01-short")[-1]["step"] == 21
    assert (config.parent / "out" / "01-short" / "photos.safetensors").is_file()
    again = place.server.run("train", [config], config.parent).expect(0)
    assert "this run is finished" in again.out


def test_one_step_and_a_cache_job_of_one(place: Place, python: Callable[..., Result]) -> None:
    config = write(place, "one")
    done = place.server.run("train", [config, "--step", "warm"], config.parent).expect(0)
    assert "finished: 3 updates" in done.out
    assert not (config.parent / "out" / "02-distil").exists()
    refused = place.server.run("latents", [config], config.parent)
    refused.expect(2)
    assert "has steps (warm, distil, lora), but this command needs one of them; add --step NAME" in refused.err
    place.server.run("latents", [config, "--step", "warm", "--dry_run"], config.parent).expect(0)
    listed = json.loads((config.parent / "out" / "steps.json").read_text(encoding="utf-8"))["steps"]
    assert [(entry["status"], entry["step"]) for entry in listed] == [
        ("finished", 3),
        ("waiting", None),
        ("waiting", None),
    ]
    begun = place.server.run("train", [config, "--step", "warm", "--fresh"], config.parent).expect(0)
    assert "finished: 3 updates" in begun.out and (config.parent / "out-2" / "01-warm" / "photos.safetensors").is_file()
