"""Held-out images: measured alike at every time, by any number of processes, without a trace in the training."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from project import (
    GEOMETRY,
    Place,
    all_lines,
    content,
    copy_tree,
    differing,
    final_files,
    make_flux,
    metrics,
    run_tables,
    write_flux_run,
)

from musubi_tuner.config import load_config
from musubi_tuner.data.sources import scan
from musubi_tuner.data.split import hold_out
from musubi_tuner.weights.checkpoints import find_weights

SPLIT = {"split": 0.5, "seed": 2, "times": 4, "every_steps": 3, "every_epochs": 0}
"""Holds out about half of the photographs; which of them depends on the bytes that Pillow writes."""
STEPS = 10
"""Measured after 3, 6, 9 and at the end."""
TAGS = ["loss/val", *(f"loss/val_sigma_{sigma}" for sigma in ("0.125", "0.375", "0.625", "0.875"))]


class Setting(Place):
    def new(self, name: str, **changes: Any) -> Path:
        """A run file with its caches in a new folder."""
        train = {"max_steps": STEPS, "mixed_precision": "no", **changes.pop("train", {})}
        common: dict[str, Any] = {"train": train, "save": {"every_steps": 4}, "validation": SPLIT}
        return self.write(name, **{**common, **changes})

    def train(self, config: Path) -> Path:
        """Train to the end; returns the output folder."""
        self.server.run("train", [config], config.parent).expect(0)
        return config.parent / "out"


@pytest.fixture(scope="module")
def setting(place: Place) -> Setting:
    return Setting(**vars(place))


@pytest.fixture(scope="module")
def validated(setting: Setting) -> tuple[str, Path]:
    """What a run with held-out images printed, and its output folder."""
    config = setting.new("validated")
    return setting.server.run("train", [config], config.parent).expect(0).out, config.parent / "out"


def measured(folder: Path) -> list[dict[str, Any]]:
    return [row for row in all_lines(folder) if "loss/val" in row]


def best_of(folder: Path) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads((folder / "checkpoints.json").read_text(encoding="utf-8"))["checkpoints"]
    return entries["best"]


def best_files(folder: Path) -> list[Any]:
    return [content(folder / name) for name in ("best.safetensors", "best_ema.safetensors")]


def test_the_loss_and_its_bins_are_written_on_schedule_and_at_the_end(validated: tuple[str, Path]) -> None:
    printed, out = validated
    rows = measured(out)
    assert [row["step"] for row in rows] == [3, 6, 9, 10]
    for row in rows:
        assert list(row) == ["step", *TAGS]
        assert row["loss/val"] == pytest.approx(sum(row[tag] for tag in TAGS[1:]) / 4, rel=1e-12)
    assert len({row["loss/val"] for row in rows}) == 4
    assert "averaged weights" in printed and "4 noise levels" in printed


def test_the_bins_are_in_tensorboard(validated: tuple[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(validated[1] / "logs"))
    events.Reload()
    for tag in TAGS:
        assert [event.step for event in events.Scalars(tag)] == [3, 6, 9, 10]


def test_held_out_images_are_cached_and_not_trained(validated: tuple[str, Path]) -> None:
    printed, out = validated
    config = load_config(out.parent / "run.toml")
    kept, held = hold_out(scan(config.datasets, "tf").items, config.validation)
    assert 1 < len(held) < 8 and len(kept) + len(held) == 9
    assert f"{len(held)} image(s) held out, at 4 noise levels; {len(kept)} are trained" in printed
    assert f"data     9 images, {len(kept)} per epoch" in printed
    epoch_end = next(row for row in metrics(out) if row["train/epoch"] == 1)
    assert epoch_end["train/images"] == len(kept)


def test_best_is_the_checkpoint_of_the_lowest_validation_loss(validated: tuple[str, Path]) -> None:
    _, out = validated
    lowest = min(measured(out), key=lambda row: row["loss/val"])
    entry = best_of(out)
    assert (entry["kind"], entry["metric"], entry["state"]) == ("best", "loss/val", "")
    assert (entry["step"], entry["value"]) == (lowest["step"], lowest["loss/val"])
    assert find_weights(f"{out}:best") == out / "best.safetensors"
    assert find_weights(f"{out}:best", ema=True) == out / "best_ema.safetensors"
    assert content(out / "best.safetensors")[0]["__metadata__"]["step"] == str(lowest["step"])


def test_measuring_leaves_no_trace_in_the_training(setting: Setting, validated: tuple[str, Path]) -> None:
    rarely = setting.train(setting.new("rarely", validation={**SPLIT, "every_steps": 0}))
    assert [row["step"] for row in measured(rarely)] == [STEPS]
    assert metrics(rarely) == metrics(validated[1])
    assert differing(final_files(rarely), final_files(validated[1])) == []
    assert measured(rarely)[-1] == measured(validated[1])[-1]


@pytest.mark.parametrize("point", ["best.listed:2", "train.update:7", "state.renamed:2"])
def test_a_killed_run_continues_to_the_same_numbers_and_the_same_best(
    point: str, setting: Setting, validated: tuple[str, Path]
) -> None:
    config = setting.new(f"killed {point}")
    setting.server.run("train", [config], config.parent, MUSUBI_FAULT=point).expect(-signal.SIGKILL)
    out = setting.train(config)
    assert all_lines(out) == all_lines(validated[1])
    assert differing(final_files(out), final_files(validated[1])) == []
    assert best_of(out) == best_of(validated[1])
    assert best_files(out) == best_files(validated[1])


def test_another_split_is_refused(setting: Setting) -> None:
    config = setting.new("changed", train={"max_steps": 2})
    setting.train(config)
    again = setting.server.run("train", [config, "--max_steps=3", "--validation_split=0.4"], config.parent).expect(2)
    assert "validation.split was 0.5, now 0.4" in again.err


def test_two_processes_measure_what_one_measures(setting: Setting) -> None:
    alone = setting.train(setting.new("alone", train={"grad_accum_steps": 2, "max_steps": 4}))
    config = setting.new("together", train={"max_steps": 4}, distributed={"num_processes": 2})
    together = setting.train(config)
    assert [row["step"] for row in measured(together)] == [3, 4]
    for row, expected in zip(measured(together), measured(alone), strict=True):
        # The weights differ by the rounding of sums of gradients.
        assert row == pytest.approx(expected, rel=1e-5)
    assert best_of(together)["step"] == best_of(alone)["step"]


def test_without_validation_the_best_is_the_epoch_of_the_lowest_mean_loss(setting: Setting) -> None:
    changes: dict[str, Any] = {"validation": {}, "save": {"every_steps": 4, "best": True}}
    out = setting.train(setting.new("epochs", train={"max_steps": 12}, **changes))
    epochs = [row for row in all_lines(out) if "epoch/loss" in row]
    losses = [row["loss/total"] for row in metrics(out)]
    begun = 0
    for row in epochs:
        own = losses[begun : row["step"]]
        assert row["epoch/step"] == row["step"]
        assert row["epoch/loss"] == pytest.approx(sum(own) / len(own), rel=1e-12)
        begun = row["step"]
    assert len(epochs) == 2 and not measured(out)
    lowest = min(epochs, key=lambda row: row["epoch/loss"])
    entry = best_of(out)
    assert (entry["metric"], entry["step"], entry["value"]) == ("epoch/loss", lowest["step"], lowest["epoch/loss"])
    config = setting.new("epochs killed", train={"max_steps": 12}, **changes)
    setting.server.run("train", [config], config.parent, MUSUBI_FAULT="train.update:9").expect(-signal.SIGKILL)
    again = setting.train(config)
    assert all_lines(again) == all_lines(out)
    assert best_of(again) == entry and best_files(again) == best_files(out)


def test_with_blocks_in_main_memory_the_numbers_are_the_same(setting: Setting) -> None:
    geometry = {**GEOMETRY, "num_double_layers": 3, "num_single_layers": 4}
    tables = run_tables(setting.folder, setting.photographs, setting.encoders)
    common: dict[str, Any] = {"model": {**tables["model"], "geometry": geometry}, "train": {"max_steps": 4}}
    plain = setting.train(setting.new("deep", **common))
    swapped = setting.train(setting.new("swapped", **common, memory={"blocks_to_swap": 3}))
    assert all_lines(swapped) == all_lines(plain)
    assert best_files(swapped) == best_files(plain)


def test_with_frozen_blocks_streamed_the_numbers_are_the_same(setting: Setting, flux_caches: Path) -> None:
    base = make_flux(setting.folder / "deep.safetensors", depth=3, depth_single_blocks=4)
    common: dict[str, Any] = {"train": {"max_steps": 4}, "validation": SPLIT, "save": {"every_steps": 0}}
    found = []
    for name, memory in (("at home", {}), ("streamed", {"blocks_to_swap": 2})):
        folder = setting.folder / name
        copy_tree(flux_caches, folder / "cache")
        config = write_flux_run(folder, setting.photographs, setting.encoders, base, memory=memory, **common)
        printed = setting.server.run("train", [config], folder).expect(0).out
        assert ("swap: 2 blocks stay in main memory" in printed) == bool(memory)
        assert "fetched on the spot" not in printed
        found.append((all_lines(folder / "out"), content(folder / "out" / "best.safetensors")[1]))
    assert len([row for row in found[0][0] if "loss/val" in row]) == 2
    assert found[0] == found[1]


def test_trained_weights_can_be_measured_and_the_images_limited(setting: Setting, validated: tuple[str, Path]) -> None:
    own = {**SPLIT, "weights": "model", "max_images": 1}
    config = setting.new("own", validation=own, train={"max_steps": 3})
    printed = setting.server.run("train", [config], config.parent).expect(0).out
    assert "(trained weights, 1 image(s) at 4 noise levels" in printed and ", 1 of them measured" in printed
    (row,) = measured(config.parent / "out")
    assert row["loss/val"] != measured(validated[1])[0]["loss/val"]


def test_an_adapter_of_another_family_is_validated(setting: Setting, flux_caches: Path) -> None:
    folder = setting.folder / "adapter"
    base = make_flux(folder / "flux.safetensors")
    copy_tree(flux_caches, folder / "cache")
    config = write_flux_run(
        folder, setting.photographs, setting.encoders, base, train={"max_steps": 4}, validation=SPLIT,
        save={"every_steps": 0},
    )  # fmt: skip
    out = setting.train(config)
    assert [row["step"] for row in measured(out)] == [3, 4]
    assert list(measured(out)[0]) == ["step", *TAGS]
    assert best_of(out)["metric"] == "loss/val" and (out / "best.safetensors").is_file()
