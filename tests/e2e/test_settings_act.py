"""What a run is told reaches what it does: accumulation, rates and weights in its log, states, recorded choices, masks.

Learning rates are so small that the weights stay what they were, so every number of the log can be computed again from the
start weights.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from project import GEOMETRY, Place, metrics
from safetensors import safe_open
from safetensors.torch import load_file

from musubi_tuner.assemble import load_trainee
from musubi_tuner.caching.reader import CachedDataset
from musubi_tuner.caching.status import needed_kinds
from musubi_tuner.config import load_config
from musubi_tuner.data.plan import plan_epoch, updates_of_epoch
from musubi_tuner.data.sources import scan
from musubi_tuner.training.task import make_draws
from steps import training_step

STILL: dict[str, Any] = {
    "model": {"geometry": {**GEOMETRY, "lune_dropout": 0.0}},
    "train": {"max_steps": 4, "grad_accum_steps": 4},
    "optimizer": {"lr": 1e-9},
    "scheduler": {"type": "linear", "warmup_steps": 2, "min_lr": 5e-10},
    "objective": {"lune_weight": 0.3, "lune_warmup_steps": 4, "sol_weight": 0.2, "sol_warmup_steps": 8},
    "log": {"every_steps": 2},
    "save": {"every_steps": 2, "keep_last_steps": 0, "best": True},
}
"""Two epochs of two updates: nine photographs make six micro-batches, so the second update of an epoch is short."""


class Setting(Place):
    def train(self, name: str, **changes: Any) -> tuple[Path, str]:
        """Train in a new folder; returns its run file and what was printed."""
        tables = {
            table: {**STILL.get(table, {}), **changes.get(table, {})} for table in {*STILL, *changes} - {"datasets"}
        }
        tables |= {"datasets": changes["datasets"]} if "datasets" in changes else {}
        config = self.write(name, **tables)
        self.server.run("latents", [config], config.parent).expect(0)  # only masks make some due
        return config, self.server.run("train", [config], config.parent).expect(0).out


@pytest.fixture(scope="module")
def setting(place: Place) -> Setting:
    return Setting(**vars(place))


@pytest.fixture(scope="module")
def still(setting: Setting) -> Path:
    """The run file of a finished run."""
    return setting.train("still")[0]


def computed_again(path: Path) -> list[dict[str, float]]:
    """Loss terms, gradient norm and samples of every update of a run that accumulates, by a plain loop over its start weights."""
    config = load_config(path)
    trainee = load_trainee(config, torch.device("cpu"))
    model, process = trainee.model.train(), config.spec.family.make_process(config, trainee.options)
    dataset = CachedDataset(config, scan(config.datasets, config.spec.code).items, needed_kinds(config))
    rows: list[dict[str, float]] = []
    for epoch in range(2):
        planned = plan_epoch(dataset.plan_items(), config.run.seed, epoch)
        for update in updates_of_epoch(planned, num_processes=1, grad_accum_steps=4, rank=0):
            model.zero_grad()
            sums: dict[str, float] = {}
            for batch in update.micro_batches:
                read = dataset.read(batch, epoch)
                draws = make_draws(process, tuple(read.tensors["latents"].shape[1:]), batch, config.run.seed, epoch)
                output = training_step(model, process, read, draws, len(rows))
                output.loss.backward()
                for name, value in output.terms.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            row = {f"loss/{name}": value / update.samples for name, value in sums.items()}
            rows.append({**row, "train/grad_norm": float(gradients.norm()) / update.samples, "samples": update.samples})
    return rows


def test_logged_numbers_are_those_of_the_updates(still: Path) -> None:
    updates, rows = computed_again(still), metrics(still.parent / "out")
    samples = [update["samples"] for update in updates]
    assert samples[0] + samples[1] == samples[2] + samples[3] == 9 and samples[0] > samples[1]
    rows = [row for row in rows if "train/lr" in row]
    assert [row["step"] for row in rows] == [2, 4]
    for row, first, second in zip(rows, updates[::2], updates[1::2], strict=True):
        for tag in ("loss/total", "loss/main", "loss/lune", "loss/sol", "train/grad_norm"):
            # float32 sums in another order; the weights moved by 1e-9 or so.
            assert row[tag] == pytest.approx((first[tag] + second[tag]) / 2, rel=1e-4), tag
    # Updates are counted from 0: rates of updates 1 and 3, weights of their warm-ups.
    assert [row["train/lr"] for row in rows] == pytest.approx([0.5e-9, 0.75e-9])
    assert [row["loss/lune_weight"] for row in rows] == pytest.approx([0.3 * 1 / 4, 0.3 * 3 / 4])
    assert [row["loss/sol_weight"] for row in rows] == pytest.approx([0.2 * 1 / 8, 0.2 * 3 / 8])
    assert [row["train/images"] for row in rows] == [9, 18]


def test_without_prompts_nothing_is_drawn(still: Path) -> None:
    assert not (still.parent / "out" / "sample").exists()


def test_choices_that_change_the_meaning_of_weights_are_recorded_with_them(still: Path) -> None:
    out = still.parent / "out"
    expected = {
        "expert_input": "noised_image",
        "expert_time": "aligned",
        "sol_spatial_norm": "max",
        "t5_attn_mask": False,
    }
    for name in ("photos", "photos_ema", "best", "photos-step00000002"):
        with safe_open(out / f"{name}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["options_json"]) == expected, name
    assert json.loads((out / "options.json").read_text(encoding="utf-8")) == expected


def test_states_are_written_only_where_they_are_wanted(still: Path, setting: Setting) -> None:
    out = still.parent / "out"
    assert sorted(path.name for path in out.glob("*-state")) == ["photos-state", "photos-step00000002-state"]
    entries = json.loads((out / "checkpoints.json").read_text(encoding="utf-8"))["checkpoints"]
    assert entries["best"]["state"] == "" and (out / "best.safetensors").is_file()
    config, _ = setting.train("no states", save={"state": False})
    assert list((config.parent / "out").glob("*-state")) == []
    assert (config.parent / "out" / "photos-step00000002.safetensors").is_file()


def test_a_deterministic_run_says_so_and_computes_the_same(still: Path, setting: Setting) -> None:
    config, printed = setting.train("deterministic", run={"deterministic": True})
    assert "kernels: repeatable ones only\n" in printed
    ours, plain = (load_file(path.parent / "out" / "photos.safetensors") for path in (config, still))
    assert all(torch.equal(ours[key], plain[key]) for key in plain)


def test_masks_of_files_change_the_loss(still: Path, setting: Setting) -> None:
    folder = setting.folder / "masks"
    folder.mkdir()
    for path in setting.photographs.iterdir():
        if path.suffix != ".txt":
            with Image.open(path) as image:
                # As large as the stored image, all background.
                Image.fromarray(np.zeros((image.height, image.width), dtype=np.uint8)).save(folder / f"{path.stem}.png")
    turned = folder / "rocket.png"
    with Image.open(turned) as mask:
        upright = mask.transpose(Image.Transpose.ROTATE_270)
    upright.save(turned)
    root = setting.folder / "masked"
    dataset = {
        "image_directory": str(setting.photographs),
        "cache_directory": str(root / "cache"),
        "mask_directory": str(folder),
    }
    config, printed = setting.train(
        "masked", datasets=[dataset], train={"masked_loss": True, "mask_foreground": 3.0, "mask_background": 0.25}
    )
    assert "masks    9 of 9 images, weights 0.25 to 3" in printed
    masked, plain = metrics(config.parent / "out"), metrics(still.parent / "out")
    for ours, theirs in zip(masked, plain, strict=True):
        if "loss/main" in ours:
            assert ours["loss/main"] == pytest.approx(0.25 * theirs["loss/main"], rel=1e-4)
            assert ours["loss/lune"] == pytest.approx(theirs["loss/lune"], rel=1e-4)
