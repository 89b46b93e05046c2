"""A run uploads its checkpoints, pictures, logs and release, and no trouble of the hub changes what it trains.

The hub is `hub_server`, on this machine.
"""

import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from project import REPOSITORY, Place, Result, copy_tree, differing, final_files, metrics

from hub_server import Hub, environment, serving
from musubi_tuner.config import load_config
from musubi_tuner.training.uploads import RunUploads
from musubi_tuner.upload_run import main as upload_run

REPO = "someone/photos"
STEPS = 12
RUN = "checkpoint_runs/photos/"
CONFIGS = {f"{RUN}config.json", f"{RUN}options.json", f"{RUN}photos.config.toml"}
RELEASE = {"model.safetensors", "ema.safetensors", "config.json", "options.json", "README.md"}
SAMPLE = {"prompts": ["a cat on the moon"], "every_steps": 6, "width": 64, "height": 64, "steps": 1}
PICTURES = {f"samples/{name}" for step in (6, 12)
            for name in (f"photos_{step:08d}_00.png", f"samples_step_{step}.png", f"prompts_step_{step}.txt")}  # fmt: skip
NOTHING_ELSE = {"release": "none", "upload_samples": False, "upload_logs": False}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


class Setting(Place):
    def new(self, name: str, hub: dict[str, Any] | None, **changes: Any) -> Path:
        """A run file with its caches in a new folder."""
        tables: dict[str, Any] = {"train": {"max_steps": STEPS}, "save": {"every_steps": 5, "keep_last_steps": 1}}
        if hub is not None:
            tables["hub"] = {"repo_id": REPO, "retry_seconds": 0.0, **hub}
        return self.write(name, **{**tables, **changes})

    def variables(self, hub: Hub) -> dict[str, str]:
        return {**environment(hub.url, str(self.folder / "hub home")), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test"}

    def train(self, config: Path, hub: Hub, *options: str, **variables: str) -> Result:
        return self.server.run("train", [config, *options], config.parent, **self.variables(hub), **variables)


@pytest.fixture(scope="module")
def setting(place: Place) -> Setting:
    return Setting(**vars(place))


@pytest.fixture(scope="module")
def alone(setting: Setting) -> Path:
    """Output of a run that uploads nothing."""
    config = setting.new("alone", None)
    setting.server.run("train", [config], config.parent).expect(0)
    return config.parent / "out"


def assert_same_training(out: Path, alone: Path) -> None:
    assert metrics(out) == metrics(alone)
    assert differing(final_files(out), final_files(alone)) == []
    assert not list(out.rglob(".tmp-*"))


def messages(hub: Hub, kind: str = "Checkpoint") -> list[str]:
    return [message for message, _ in hub.commits if message.startswith(kind)]


def uploaded(hub: Hub) -> dict[str, bytes]:
    """The repository as the commits left it."""
    return {name: content for _, files in hub.commits for name, content in files.items()}


def checkpoint(stem: str) -> set[str]:
    return {f"{RUN}{stem}.safetensors", f"{RUN}{stem}_ema.safetensors"}


def local(name: str, out: Path) -> Path:
    """The file of a run folder that belongs at a place in the repository."""
    if name.startswith(RUN):
        return out / name.removeprefix(RUN)
    if name.startswith("samples/"):
        return out / "sample" / name.removeprefix("samples/")
    if name == "logs/metrics.jsonl":
        return out / "metrics.jsonl"
    return out / name if name.startswith("logs/") else out / "release" / name


@pytest.fixture(scope="module")
def complete(setting: Setting) -> Iterator[tuple[Path, str, Hub]]:
    """A run that uploaded all it may: its run file, what it printed, and the hub."""
    with serving() as hub:
        config = setting.new("complete", {}, sample=SAMPLE)
        result = setting.train(config, hub).expect(0)
        yield config, result.out, hub


def test_checkpoints_samples_logs_and_release_arrive_at_their_places(complete: tuple[Path, str, Hub]) -> None:
    config, printed, hub = complete
    out, files = config.parent / "out", uploaded(hub)
    events = {f"logs/{path.name}" for path in (out / "logs").glob("*tfevents*")}
    expected = CONFIGS | RELEASE | PICTURES | events | {"logs/metrics.jsonl"}
    expected |= checkpoint("photos-step00000005") | checkpoint("photos-step00000010") | checkpoint("photos")
    assert set(files) == expected
    pruned = checkpoint("photos-step00000005")
    for name in expected - pruned:
        assert files[name] == local(name, out).read_bytes(), name
    assert not any(local(name, out).exists() for name in pruned)
    assert messages(hub) == ["Checkpoint step 5", "Checkpoint step 10", "Checkpoint step 12"]
    assert messages(hub, "Release") == ["Release step 12"]
    assert hub.created[0]["visibility"] == "private"
    assert "hub: uploaded to someone/photos: 3 checkpoint(s), 6 sample file(s), logs, the release step 12" in printed


def test_uploading_leaves_no_trace_in_the_training(complete: tuple[Path, str, Hub], alone: Path) -> None:
    assert_same_training(complete[0].parent / "out", alone)


def test_the_command_uploads_what_the_folder_of_a_run_holds(
    complete: tuple[Path, str, Hub],
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, _, first = complete
    out = config.parent / "out"
    with serving() as hub:
        for name, value in setting.variables(hub).items():
            monkeypatch.setenv(name, value)
        assert upload_run([str(config), "--repo_id", "other/photos"]) == 0
        assert uploaded(hub) == {
            name: local(name, out).read_bytes()
            for name in uploaded(first)
            if name not in checkpoint("photos-step00000005")
        }
        hub.status = 401
        assert upload_run([str(config), "--upload_samples", "false", "--set", "hub.release=none"]) == 1
    assert caplog.text.count("Checkpoint step 12 is not uploaded: ") == 1
    (summary,) = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: hub: not uploaded, ")
    )
    assert "Checkpoint step 12" in summary


def assert_named(result: Result, commit: str, reason: str) -> None:
    lines = [*result.out.splitlines(), *result.err.splitlines()]
    (line,) = (line for line in lines if f"hub: {commit} is not uploaded: " in line)
    assert reason in line
    (summary,) = (line for line in lines if line.startswith("warning: hub: not uploaded, as said above: "))
    assert commit in summary


def test_errors_of_the_hub_neither_stop_nor_change_the_training(hub: Hub, setting: Setting, alone: Path) -> None:
    """One checkpoint meets a wrong token, the next a broken server, three times; then all is well."""
    hub.troubles = [401, 500, 500, 500]
    config = setting.new("errors", {"upload_logs": False})
    options = ["--set", "sample.seed=3", "--huggingface_token", "hf_secret_of_the_line"]
    result = setting.train(config, hub, *options).expect(0)
    assert hub.tokens == {"Bearer hf_secret_of_the_line"}
    assert_same_training(config.parent / "out", alone)
    assert [message for message, _ in hub.commits] == ["Checkpoint step 12", "Release step 12"]
    assert_named(result, "Checkpoint step 5", "put a token with write access into HF_TOKEN")
    assert_named(result, "Checkpoint step 10", "500")
    assert "hub: uploaded to someone/photos: 1 checkpoint(s), the release step 12" in result.out
    command = ["python", "-m", "musubi_tuner.upload_run", str(config), *options[:2]]
    assert f"to upload what this run's folder holds: {shlex.join(command)}\n" in result.out
    assert "hf_secret" not in result.out + result.err


def test_silence_of_the_hub_neither_stops_nor_changes_the_training(hub: Hub, setting: Setting, alone: Path) -> None:
    hub.silent = True
    config = setting.new("silence", {"finish_seconds": 5})
    result = setting.train(config, hub).expect(0)
    assert_same_training(config.parent / "out", alone)
    assert hub.commits == []
    for commit in ("Checkpoint step 12", "Release step 12", "Logs"):
        assert_named(result, commit, "hub.finish_seconds")
    assert "hub: uploaded" not in result.out


def test_a_killed_run_continues_and_uploads_the_rest(hub: Hub, setting: Setting, alone: Path) -> None:
    config = setting.new("killed", {"upload_logs": False})
    hub.silent = True
    setting.train(config, hub, MUSUBI_FAULT="train.update:7").expect(-signal.SIGKILL)
    out = config.parent / "out"
    assert list(out.glob(".tmp-*"))
    hub.silent = False
    setting.train(config, hub).expect(0)
    assert_same_training(out, alone)
    assert messages(hub) == ["Checkpoint step 10", "Checkpoint step 12"]
    assert uploaded(hub)["model.safetensors"] == (out / "photos.safetensors").read_bytes()


def test_on_a_schedule_of_its_own_the_newest_checkpoint_is_uploaded_once(hub: Hub, setting: Setting) -> None:
    """Saved at 5, 10 and the end; due after the epoch that ends at 6, at 11, and at the end."""
    config = setting.new("schedule", {"every_steps": 11, "every_epochs": 1, **NOTHING_ELSE, "upload_state": True})
    setting.train(config, hub).expect(0)
    out = config.parent / "out"
    assert [row["step"] for row in metrics(out) if row["train/epoch"] % 1 == 0] == [6, STEPS]
    assert [message for message, _ in hub.commits] == [f"Checkpoint step {step}" for step in (5, 10, STEPS)]
    state = {path.name: path.read_bytes() for path in (out / "photos-state").iterdir()}
    assert {"model.safetensors", "optimizer.safetensors", "manifest.json"} <= set(state)
    files = uploaded(hub)
    assert {name.rpartition("/")[2]: files[name] for name in files if name.startswith(f"{RUN}photos-state/")} == state


def test_logs_go_up_with_each_checkpoint_and_a_checkpoint_goes_up_once(
    hub: Hub, setting: Setting, alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.silent = True
    for name, value in setting.variables(hub).items():
        monkeypatch.setenv(name, value)
    config = setting.new("by hand", {"finish_seconds": 0})
    copy_tree(alone, config.parent / "out")
    uploads = RunUploads(load_config(config))
    uploads.newest()
    uploads.newest()
    assert hub.asked.wait(60)
    assert uploads.uploader.left == 2
    uploads.finish()
    assert [commit.message for commit in uploads.uploader.failed] == ["Logs", "Checkpoint step 12"]
    assert capsys.readouterr().out.startswith("hub: waiting for 2 upload(s), at most 0 s (hub.finish_seconds)\n")


def test_the_best_checkpoint_is_the_release(hub: Hub, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best epoch of a run that ends early in its second is the first, which ends at 6."""
    changes: dict[str, Any] = {"train": {"max_steps": 8}, "save": {"every_steps": 0, "best": True}}
    config = setting.new("best", {"release": "best", "upload_logs": False}, **changes)
    setting.train(config, hub).expect(0)
    assert [message for message, _ in hub.commits] == ["Release step 6", "Checkpoint step 8"]
    out, (_, files) = config.parent / "out", hub.commits[0]
    assert set(files) == RELEASE
    assert files["model.safetensors"] == (out / "best.safetensors").read_bytes()
    assert files["ema.safetensors"] == (out / "best_ema.safetensors").read_bytes()
    for name in ("config.json", "options.json"):
        assert files[name] == (out / name).read_bytes()
    assert "trained for 6 updates" in files["README.md"].decode()
    # What this start of the program did not upload, since an earlier one found it, goes up at the end.
    for name, value in setting.variables(hub).items():
        monkeypatch.setenv(name, value)
    assert upload_run([str(config)]) == 0
    assert [message for message, _ in hub.commits[2:]] == ["Checkpoint step 8", "Release step 6"]


@pytest.mark.slow
def test_of_two_processes_the_main_one_uploads(hub: Hub, setting: Setting, python: Callable[..., Result]) -> None:
    config = setting.new(
        "two",
        {},
        train={"max_steps": 4},
        save={"every_steps": 2},
        distributed={"num_processes": 2},
        log={"tensorboard": False},
    )
    result = python(REPOSITORY / "train.py", config, cwd=config.parent, **setting.variables(hub)).expect(0)
    assert messages(hub) == ["Checkpoint step 2", "Checkpoint step 4"]
    assert messages(hub, "Release") == ["Release step 4"]
    assert result.out.count("hub: uploaded to") == 1
    out = config.parent / "out"
    assert uploaded(hub)["model.safetensors"] == (out / "photos.safetensors").read_bytes()
    assert not list(out.rglob(".tmp-*"))
