"""Which checkpoints of a run folder are uploaded, and how often."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from musubi_tuner.training import uploads
from musubi_tuner.training.checkpoint import CheckpointList, Entry
from musubi_tuner.training.uploads import RunUploads


class Uploader:
    """Notes what it is given."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.commits: list[str] = []

    def upload(self, kind: str, message: str, files: Any, **options: Any) -> None:
        self.commits.append(message)


@pytest.fixture
def of_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunUploads:
    """A finished run that goes on from an imported state: its last checkpoint has three names, its first only a state."""
    last = Entry(8, 2, "final", "t.safetensors")
    checkpoints = CheckpointList(tmp_path, "t")
    checkpoints.entries = {
        "step_5": Entry(5, 1, "step", state="t-step00000005-state"),
        "step_6": Entry(6, 1, "step", "t-step00000006.safetensors"),
        "best": Entry(6, 1, "best", "best.safetensors"),
        "step_8": last,
        "epoch_2": last,
        "final": last,
    }
    checkpoints.write()
    monkeypatch.setattr(uploads, "HubUploader", Uploader)
    hub = SimpleNamespace(upload_state=True, upload_logs=True, upload_samples=True, release="none", run_name=None)
    config: Any = SimpleNamespace(
        output_dir=tmp_path, log_folder=tmp_path / "logs", hub=hub, run=SimpleNamespace(name="t")
    )
    return RunUploads(config)


def commits(of: RunUploads) -> list[str]:
    uploader: Any = of.uploader
    return uploader.commits


def test_a_checkpoint_of_several_names_goes_up_once_and_one_without_weights_not_at_all(of_run: RunUploads) -> None:
    of_run.everything()
    assert commits(of_run) == ["Checkpoint step 6", "Checkpoint step 8"]


def test_the_newest_goes_up_once_under_any_of_its_names(of_run: RunUploads) -> None:
    of_run.checkpoint(CheckpointList.read(of_run.folder, "t").entries["step_8"])
    of_run.newest()
    assert commits(of_run) == ["Checkpoint step 8"]


def test_a_state_alone_is_no_checkpoint_to_upload(of_run: RunUploads) -> None:
    checkpoints = CheckpointList.read(of_run.folder, "t")
    checkpoints.entries = {"step_5": checkpoints.entries["step_5"]}
    checkpoints.write()
    of_run.newest()
    assert commits(of_run) == []
