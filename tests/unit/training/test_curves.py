"""Pictures of a run's numbers: which are made, what they show, and what is said of files that cannot be drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from musubi_tuner.errors import EXIT_OK, DataError
from musubi_tuner.plot_metrics import main
from musubi_tuner.training import curves
from musubi_tuner.training.curves import PLOTS, loss_tags, plot_run, points, read_rows, running_mean

pytestmark = pytest.mark.long

ALL = ["losses.png", "learning_rate.png", "gradient_norm.png", "training_by_noise.png", "loss_by_noise.png",
       "step_time.png"]  # fmt: skip


def make_rows(count: int = 300, validation: bool = True) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        clock = {"images_per_second": 10.0, "step_seconds": 0.2}
        loss = {"loss/total": 1.1 / step, "loss/main": 1 / step, "loss/lune": 0.5}
        # A line has the noise levels that its samples happened to have.
        noise = {f"loss/sigma_{sigma:.3f}": sigma / step for sigma in (0.25, 0.75) if step % 3 or sigma < 0.5}
        rows.append({"step": step, **loss, **noise, "train/lr": 1e-4, "train/grad_norm": 2.0 / step, "clock": clock})
        if step % 50 == 0:
            rows.append({"step": step, "epoch/loss": 1 / step, "epoch/step": step, "clock": {"seconds": 0.0}})
        if validation and step % 100 == 0:
            bins = {f"loss/val_sigma_{sigma:.3f}": sigma / step for sigma in (0.25, 0.75)}
            rows.append({"step": step, "loss/val": 0.5 / step, **bins, "clock": {"seconds": 1.0}})
    return rows


def write(folder: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


def coloured(path: Path) -> int:
    """Pixels that are neither white nor grey: those of curves."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((pixels.max(-1) - pixels.min(-1) > 40).sum())


@pytest.mark.parametrize("count", [100, 300])
def test_all_pictures_are_drawn(count: int, tmp_path: Path) -> None:
    made, missing = plot_run(write(tmp_path, make_rows(count)), tmp_path / "plots", "run")
    assert [path.name for path in made] == ALL == list(PLOTS)
    assert missing == []
    for path in made:
        with Image.open(path) as picture:
            assert picture.width > 800 and picture.height > 400
        assert coloured(path) > 200, path.name


def test_without_validation_there_is_no_picture_by_noise_level(tmp_path: Path) -> None:
    made, missing = plot_run(write(tmp_path, make_rows(50, validation=False)), tmp_path / "plots", "run")
    assert missing == ["loss_by_noise.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(path.name for path in made)


def test_one_line_and_values_that_are_not_finite_can_be_drawn(tmp_path: Path) -> None:
    rows = make_rows(1, validation=False)
    rows[0]["loss/main"] = float("nan")
    rows[0]["train/grad_norm"] = float("inf")
    made, _ = plot_run(write(tmp_path, rows), tmp_path / "plots", "run")
    assert len(made) == 5


def test_the_total_is_drawn_where_it_has_several_parts() -> None:
    assert loss_tags(make_rows(100)) == ["loss/total", "loss/main", "loss/lune", "epoch/loss", "loss/val"]
    assert loss_tags([{"step": 1, "loss/total": 1.0, "loss/main": 1.0}]) == ["loss/main"]


def test_points_are_taken_from_the_lines_that_have_them() -> None:
    steps, values = points(make_rows(200), "loss/val")
    assert (steps.tolist(), values.tolist()) == ([100, 200], [0.005, 0.0025])
    assert points(make_rows(3), "clock/step_seconds")[1].tolist() == [0.2, 0.2, 0.2]


def test_the_running_mean_is_that_of_a_plain_loop_and_skips_what_is_not_finite() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0, 9.0])
    expected = [np.nanmean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]
    assert running_mean(values, 3) == pytest.approx(expected)


def test_a_last_line_that_is_still_being_written_is_passed_over(tmp_path: Path) -> None:
    assert len(read_rows(write(tmp_path, make_rows(5), '{"step": 6, "loss/to'))) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give the output folder of a run"),
        ("", "holds no lines yet"),
        ('hello\n{"step": 1}\n', "line 1: is not a line of metrics ('hello')"),
    ],
)
def test_files_that_cannot_be_drawn_are_named(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_the_command_names_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", make_rows(20, validation=False))
    assert main([str(tmp_path / "run")]) == EXIT_OK
    printed = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "run" / "plots" / "losses.png") in printed
    assert printed[-1] == "not drawn, since the run has not logged such values: loss_by_noise.png"
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "elsewhere")]) == EXIT_OK
    assert (tmp_path / "elsewhere" / "step_time.png").is_file()


@pytest.mark.parametrize("name", ["nowhere", "a_file"])
def test_the_command_wants_a_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a_file").write_text("x")
    assert main([str(tmp_path / name)]) != EXIT_OK
    assert "give the output folder of a run, or its run file (.toml)" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", make_rows(3))
    (tmp_path / "taken").write_text("x")
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "taken")]) != EXIT_OK
    assert "choose another folder with --output" in capsys.readouterr().err


def test_every_rate_of_a_run_has_a_curve(tmp_path: Path) -> None:
    shown: dict[str, str] = {}

    def record(rows: Any, target: Path, title: str, *, tags: dict[str, str], **others: Any) -> bool:
        shown.update(tags)
        return True

    rows = [{"step": 1, "train/lr": 1e-3, "train/lr_x16": 1.6e-2}, {"step": 2, "train/lr": 1e-3, "train/lr_x0.5": 5e-4}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "_plot_one", record)
        assert PLOTS["learning_rate.png"](rows, tmp_path / "a.png", "run")
    assert shown == {
        "train/lr": "optimizer.lr and its schedule",
        "train/lr_x0.5": "parameters with 0.5 times that",
        "train/lr_x16": "parameters with 16 times that",
    }
    assert PLOTS["learning_rate.png"](rows, tmp_path / "a.png", "run") and (tmp_path / "a.png").stat().st_size > 0


def test_the_steps_of_a_file_are_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = []
    for number, name in enumerate(("warm-up", "distil"), start=1):
        folder = tmp_path / f"{number:02d}-{name}"
        folder.mkdir()
        rows = [{"step": step, "loss/total": 2.0 / (number + step), "train/lr": 1e-3 / number} for step in range(1, 9)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        steps.append({"name": name, "folder": folder.name})
    (tmp_path / "03-lora").mkdir()  # has not begun
    steps.append({"name": "lora", "folder": "03-lora"})
    (tmp_path / "steps.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'plots' / 'steps.png'}\n"
    with Image.open(tmp_path / "plots" / "steps.png") as picture:
        assert picture.size[0] > 900
