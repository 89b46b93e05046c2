"""Metric lines of a resumed run equal those of an undisturbed one but for the clock, and say what a person reads."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.training.metrics import FILE, Metrics
from musubi_tuner.training.trackers import TensorBoard
from musubi_tuner.units import format_seconds

VALUES = {
    "loss/total": 0.51234,
    "loss/main": 0.5,
    "loss/lune": 0.1,
    "loss/sol": 0.02,
    "train/lr": 0.00012,
    "train/grad_norm": 1.5,
    "train/epoch": 0.25,
    "train/images": 40,
    "train/skipped": 0,
}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.9, "0s"),
        (42, "42s"),
        (59.99, "59s"),
        (60, "1m00s"),
        (185, "3m05s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (7659, "2h07m"),
        (86399, "23h59m"),
        (86400, "1d00h"),
        (273600, "3d04h"),
        (8_640_000, "100d00h"),
    ],
)
def test_seconds_are_written_with_their_two_largest_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


class Writers:
    """Makes writers in one folder, and closes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[Metrics] = []

    def __call__(self, *, step: int = 0, total: int = 100, length: int = 0, tensorboard: bool = False) -> Metrics:
        trackers = [TensorBoard(self.folder / "logs", step)] if tensorboard else []
        self.made.append(Metrics(self.folder, step=step, total=total, length=length, trackers=trackers))
        return self.made[-1]

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / FILE).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def metrics(tmp_path: Path) -> Iterator[Writers]:
    writers = Writers(tmp_path)
    yield writers
    for writer in writers.made:
        writer.close()


def log(writer: Metrics, *steps: int, peak_gib: float | None = None) -> None:
    for step in steps:
        writer.advance(4)
        writer.log(step, {**VALUES, "train/images": 4 * step}, peak_gib=peak_gib)


# The file


def test_line_holds_step_values_and_clock(metrics: Writers) -> None:
    log(metrics(), 10)
    (line,) = metrics.lines()
    clock = line.pop("clock")
    assert line == {"step": 10, **VALUES}
    assert set(clock) == {"images_per_second", "step_seconds", "seconds_left", "wall", "start"}


def test_values_are_written_without_loss(metrics: Writers) -> None:
    writer = metrics()
    writer.log(1, {**VALUES, "loss/total": 0.1 + 0.2}, peak_gib=None)
    assert metrics.lines()[0]["loss/total"] == 0.1 + 0.2


def test_everything_but_the_clock_is_the_same_at_another_time(metrics: Writers, tmp_path: Path) -> None:
    log(metrics(), 1, 2)
    other = Writers(tmp_path / "other")
    other.folder.mkdir()
    writer = other()
    time.sleep(0.02)
    log(writer, 1, 2)
    writer.close()
    first, second = metrics.lines(), other.lines()
    assert [line.pop("clock")["wall"] for line in first] != [line.pop("clock")["wall"] for line in second]
    assert first == second


def test_peak_memory_belongs_to_the_clock(metrics: Writers) -> None:
    log(metrics(), 1, peak_gib=2.34567)
    line = metrics.lines()[0]
    assert line["clock"]["peak_gib"] == 2.346
    assert "peak_gib" not in line


def test_rate_counts_the_images_since_the_last_line(metrics: Writers) -> None:
    writer = metrics()
    begun = time.perf_counter()
    writer.advance(1000)
    writer.log(1, VALUES, peak_gib=None)
    elapsed = time.perf_counter() - begun
    writer.log(2, VALUES, peak_gib=None)
    first, second = (line["clock"] for line in metrics.lines())
    # The clock of the writer began before ours, by no more than making it takes.
    assert first["images_per_second"] > 0
    assert second["images_per_second"] == 0.0
    assert first["images_per_second"] > 1000 / (elapsed + 5)


def test_time_left_is_that_of_the_updates_left(metrics: Writers) -> None:
    writer = metrics(step=90, total=100)
    time.sleep(0.05)
    writer.log(95, VALUES, peak_gib=None)
    writer.log(100, VALUES, peak_gib=None)
    first, second = (line["clock"]["seconds_left"] for line in metrics.lines())
    # Five updates took 0.05 s and a little, and five are left; the last line has none left.
    assert 0.0 < first < 5
    assert second == 0.0


def test_what_is_measured_between_updates_has_a_line_of_its_own_and_is_not_counted_as_their_time(
    metrics: Writers,
) -> None:
    writer = metrics()
    time.sleep(0.6)
    writer.measured(1, {"loss/val": 0.1 + 0.2}, 0.6)
    writer.log(1, VALUES, peak_gib=None)
    first, second = metrics.lines()
    assert first.pop("clock")["seconds"] == 0.6
    assert first == {"step": 1, "loss/val": 0.1 + 0.2}
    assert second["clock"]["step_seconds"] < 0.5


# Resuming


def test_lines_after_the_state_are_cut_off(metrics: Writers) -> None:
    writer = metrics()
    log(writer, 1, 2)
    length = writer.length
    log(writer, 3, 4)
    writer.close()
    resumed = metrics(step=2, length=length)
    assert resumed.length == length
    log(resumed, 3)
    assert [line["step"] for line in metrics.lines()] == [1, 2, 3]


def test_half_a_line_is_cut_off(metrics: Writers) -> None:
    writer = metrics()
    log(writer, 1)
    length = writer.length
    with writer.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "loss/to')
    log(metrics(step=1, length=length), 2)
    assert [line["step"] for line in metrics.lines()] == [1, 2]


def test_new_start_empties_the_file(metrics: Writers) -> None:
    log(metrics(), 1, 2)
    assert metrics().length == 0


def test_file_shorter_than_the_state_says_is_not_filled_up(metrics: Writers) -> None:
    writer = metrics()
    log(writer, 1)
    assert metrics(step=50, length=10_000).length == writer.length
    assert [line["step"] for line in metrics.lines()] == [1]


def test_length_is_the_size_of_the_file(metrics: Writers) -> None:
    writer = metrics()
    log(writer, 1, 2)
    writer.flush()
    assert writer.length == len((metrics.folder / FILE).read_bytes()) > 0


# The console


def test_console_line_says_what_a_person_reads(metrics: Writers, capsys: pytest.CaptureFixture[str]) -> None:
    log(metrics(total=1500), 10)
    (line,) = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"(.*)  (\d+\.\d) images/s  (\w+) left", line)
    assert found, line
    assert found[1] == "step 10/1500  loss 0.5123  lune 0.1000  sol 0.0200  lr 1.20e-04  grad norm 1.500"


def test_console_line_ends_with_the_peak_memory_of_a_gpu(metrics: Writers, capsys: pytest.CaptureFixture[str]) -> None:
    log(metrics(), 10, peak_gib=2.34567)
    assert capsys.readouterr().out.endswith(" left  2.3 GiB\n")


def test_message_is_a_line_of_its_own(metrics: Writers, capsys: pytest.CaptureFixture[str]) -> None:
    metrics().say("step 5: saved run.safetensors")
    assert capsys.readouterr().out == "step 5: saved run.safetensors\n"


# TensorBoard


def test_tensorboard_has_the_tags_and_values_of_the_file(metrics: Writers) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = metrics(tensorboard=True)
    log(writer, 1, 2)
    writer.close()
    events = EventAccumulator(str(metrics.folder / "logs"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*VALUES, "train/images_per_second"}
    for tag in VALUES:
        expected = [(line["step"], line[tag]) for line in metrics.lines()]
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        # Event files hold float32.
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.parametrize("step", [0, 2])
def test_tensorboard_forgets_what_came_after_the_state(step: int, metrics: Writers) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = metrics(tensorboard=True)
    for number in range(1, 4):
        writer.log(number, {**VALUES, "loss/total": 9.0}, peak_gib=None)
    writer.close()
    (events_file,) = (metrics.folder / "logs").iterdir()
    # Event files are read in the order of their names, which hold the second of their making.
    events_file.rename(events_file.with_name(events_file.name.replace("tfevents.", "tfevents.0")))
    resumed = metrics(step=step, tensorboard=True)
    resumed.log(step + 1, {**VALUES, "loss/total": 0.25}, peak_gib=None)
    resumed.close()
    events = EventAccumulator(str(metrics.folder / "logs"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss/total")]
    assert found == [*((number, 9.0) for number in range(1, step + 1)), (step + 1, 0.25)]


def test_no_event_files_without_tensorboard(metrics: Writers) -> None:
    log(metrics(), 1)
    assert [path.name for path in metrics.folder.iterdir()] == [FILE]


def test_progress_counts_where_no_bar_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("musubi_tuner.training.metrics.tell", lambda **values: told.append(values))
    metrics = Metrics(tmp_path, step=5, total=9, length=0)
    metrics.bar.disable = True  # as in a log file
    for _ in range(2):
        metrics.advance(4)
    assert [(values["step"], values["done"], values["steps"]) for values in told] == [(6, 6, 9), (7, 7, 9)]
