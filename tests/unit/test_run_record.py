"""What a run tells while it works and when it ends, and what it can be told."""

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner import run_record
from musubi_tuner.errors import ConfigError, Interrupted
from musubi_tuner.run_record import begin, end, finite_values, recorder, take_requests, tell


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder with a record that has begun."""
    monkeypatch.setenv("MUSUBI_STATE_HOME", str(tmp_path / "state"))
    run = tmp_path / "out"
    run.mkdir()
    begin(run, tmp_path / "run.toml", "run")
    yield run
    end(0, run_record.FINISHED)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_a_new_phase_is_told_at_once_and_progress_once_a_second(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("musubi_tuner.run_record.time.monotonic", lambda: now)
    tell(phase="text", done=0, total=9)
    assert (read(folder / "run.json")["phase"], read(folder / "run.json")["total"]) == ("text", 9)
    tell(phase="text", done=1, total=9)
    assert read(folder / "run.json")["done"] == 0
    now = 101.5
    tell(phase="text", done=7, total=9)
    assert read(folder / "run.json")["done"] == 7
    tell(phase="train", step=1, steps=10)
    found = read(folder / "run.json")
    assert (found["phase"], found["step"], found["steps"], found["done"]) == ("train", 1, 10, None)
    assert found["pid"] == os.getpid()


def test_a_run_keeps_its_id_and_a_pointer_finds_its_folder(folder: Path, tmp_path: Path) -> None:
    tell(phase="plan")
    first = read(folder / "run.json")["id"]
    end(1, run_record.FAILED, message="no")
    assert read(folder / "exit.json")["message"] == "no"
    begin(folder, tmp_path / "run.toml", "run")
    assert not (folder / "exit.json").exists()
    tell(phase="plan")
    assert read(folder / "run.json")["id"] == first
    (pointer,) = (tmp_path / "state" / "runs").iterdir()
    assert (pointer.stem, read(pointer)["folder"]) == (first, str(folder))


def test_a_child_goes_on_with_the_record_of_its_parent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(phase="plan")
    pid = read(folder / "run.json")["pid"]
    monkeypatch.setattr(run_record, "_recorder", None)  # as in a new process, which has the environment only
    tell(phase="latents", done=1, total=2)
    assert (read(folder / "run.json")["phase"], read(folder / "run.json")["pid"]) == ("latents", pid)


def test_the_end_has_the_last_step_of_a_child(folder: Path) -> None:
    tell(phase="train", step=3)
    (folder / "run.json").write_text(json.dumps({**read(folder / "run.json"), "step": 8}), encoding="utf-8")
    end(143, run_record.STOPPED, signum=15)
    found = read(folder / "exit.json")
    assert (found["code"], found["reason"], found["signal"], found["step"]) == (143, "stopped", 15, 8)
    assert read(folder / "run.json")["phase"] == "stopped"
    assert recorder() is None


def test_nothing_is_told_outside_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tell(phase="train", step=1)
    end(0, run_record.FINISHED)
    assert list(tmp_path.iterdir()) == []


def test_requests_are_taken_once_and_those_before_the_start_are_dropped(folder: Path, tmp_path: Path) -> None:
    (folder / "control" / "stop").touch()
    begin(folder, tmp_path / "run.toml", "run")
    current = recorder()
    assert current is not None and current.requests() == set()
    for name in ("save", "sample", "other"):
        (folder / "control" / name).touch()
    assert current.requests() == set()  # looked less than a second ago
    current._looked = -math.inf
    assert current.requests() == {"save", "sample"}
    assert take_requests(folder) == set() and (folder / "control" / "other").exists()


def test_the_log_has_finished_lines_and_no_states_of_a_bar(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_record.log_console()
    print("first")
    sys.stderr.write("\r10 %")
    sys.stderr.write("\r90 %")
    sys.stderr.write("\r100 %")
    sys.stderr.write("\nafter\n")
    print("half", end="")
    log = (folder / "logs" / "console.log").read_text(encoding="utf-8")
    assert log == "first\n100 %\nafter\n"
    assert capsys.readouterr().err == "\r10 %\r90 %\r100 %\nafter\n"


def test_what_is_not_finite_is_null_and_named() -> None:
    values = {"loss/total": math.nan, "train/grad_norm": math.inf, "train/lr": 0.1}
    line = json.loads(run_record.json_line(3, values, {"wall": 1.0}))
    assert line == {
        "step": 3, "loss/total": None, "train/grad_norm": None, "train/lr": 0.1,
        "not_finite": ["loss/total", "train/grad_norm"], "clock": {"wall": 1.0},
    }  # fmt: skip
    assert finite_values({"a": 1.0}) == {"a": 1.0}


def test_a_record_that_cannot_be_written_ends_no_run(folder: Path) -> None:
    current = recorder()
    assert current is not None
    current.folder = folder / "gone"
    tell(phase="train")


@pytest.mark.parametrize(
    ("outcome", "code", "reason", "signum", "message"),
    [
        (0, 0, "finished", None, None),
        (1, 1, "failed", None, None),
        (143, 143, "stopped", 15, None),  # of children
        (Interrupted(2, "stopped after step 3"), 130, "stopped", 2, None),
        (Interrupted(0, "stopped after step 3"), 0, "stopped", None, None),
        (KeyboardInterrupt(), 130, "stopped", 2, None),
        (ConfigError("run.toml: wrong"), 2, "failed", None, "run.toml: wrong"),
    ],
)
def test_exit_json_says_how_a_start_ended(
    outcome: Any, code: int, reason: str, signum: int | None, message: str | None, tmp_path: Path
) -> None:
    from types import SimpleNamespace

    from musubi_tuner.runner.command import run_recorded

    config: Any = SimpleNamespace(
        output_dir=tmp_path / "out", path=tmp_path / "run.toml", run=SimpleNamespace(name="run")
    )

    def body(can_write: bool) -> int:
        assert can_write
        with pytest.raises(ConfigError, match=r"process .* is training here"):
            run_recorded(config.output_dir, config, lambda _: 0, {})  # a second start
        if isinstance(outcome, BaseException):
            raise outcome
        return int(outcome)

    if isinstance(outcome, BaseException):
        with pytest.raises(type(outcome)):
            run_recorded(config.output_dir, config, body, {})
    else:
        assert run_recorded(config.output_dir, config, body, {}) == code
    found = read(tmp_path / "out" / "exit.json")
    assert [found[key] for key in ("code", "reason", "signal", "message")] == [code, reason, signum, message]
