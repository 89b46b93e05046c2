"""Uploads arrive where others look for them, and no answer of the server, nor its silence, disturbs the training.

The hub is `hub_server`, on this machine.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import Hub, environment, serving
from musubi_tuner.config.schema import HubSection
from musubi_tuner.training.hub import HubUploader

TOKEN = "hf_SecretOfTheTest0123456789"
REPO = "someone/cats"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        for name, value in environment(server.url, str(tmp_path / "hub home")).items():
            monkeypatch.setenv(name, value)
        yield server


def settings(**values: Any) -> HubSection:
    return HubSection(**{"repo_id": REPO, "token": TOKEN, "timeout_seconds": 60, **values})


def run_folder(folder: Path) -> list[Path]:
    """Files of a checkpoint as the trainer hands them over."""
    contents = {
        "cat-step00000010.safetensors": b"weights" * 1000,
        "cat-step00000010_ema.safetensors": b"averages" * 1000,
        "config.json": b'{"hidden_size": 64}',
        "cat.config.toml": "name = 'Bär'".encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


@pytest.fixture
def everything(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Any:
    """All that a person could read: log records and what any process printed."""
    caplog.set_level(logging.DEBUG)

    def read() -> str:
        printed = capfd.readouterr()
        return "\n".join([*caplog.messages, printed.out, printed.err])

    return read


# Where files arrive


def test_checkpoint_and_release_arrive_in_order_at_their_places(hub: Hub, tmp_path: Path) -> None:
    files = run_folder(tmp_path)
    release = tmp_path / "release"
    release.mkdir()
    (release / "model.safetensors").write_bytes(b"final" * 1000)
    (release / "README.md").write_text("---\nlibrary_name: x\n---\n# cat\n", encoding="utf-8")
    uploader = HubUploader(settings(), "cat")
    uploader.upload("Checkpoint step 10", files)
    uploader.upload("Release", [], to_root={path.name: path for path in sorted(release.iterdir())})
    uploader.close()
    assert (uploader.uploaded, uploader.failed) == (2, 0)
    assert hub.commits == [
        ("Checkpoint step 10", {f"checkpoint_runs/cat/{path.name}": path.read_bytes() for path in files}),
        ("Release", {path.name: path.read_bytes() for path in release.iterdir()}),
    ]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert [(made["organization"], made["name"], made["visibility"]) for made in hub.created] == [
        ("someone", "cats", "private")
    ] * 2


def test_visibility_and_folder_are_those_of_the_config(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    uploader = HubUploader(settings(private=False, run_name="second try"), "cat")
    uploader.upload("Config", [tmp_path / "config.json"])
    uploader.close()
    (created,) = hub.created
    assert created.get("visibility", "public") == "public"
    assert hub.commits == [("Config", {"checkpoint_runs/second try/config.json": b"{}"})]


def test_token_of_the_environment_is_used_without_one_in_the_config(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    uploader = HubUploader(settings(token=None), "cat")
    uploader.upload("Config", [tmp_path / "config.json"])
    uploader.close()
    assert hub.tokens == {"Bearer hf_of_the_environment"}


def test_file_that_was_pruned_meanwhile_is_named_and_the_others_arrive(
    hub: Hub, tmp_path: Path, everything: Any
) -> None:
    files = run_folder(tmp_path)
    files[0].unlink()
    uploader = HubUploader(settings(), "cat")
    uploader.upload("Checkpoint step 10", files)
    uploader.close()
    (commit,) = hub.commits
    assert set(commit[1]) == {f"checkpoint_runs/cat/{path.name}" for path in files[1:]}
    assert files[0].name in everything()


# When the server does not play along


def test_hanging_server_is_given_up_while_training_goes_on_and_the_next_upload_arrives(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = run_folder(tmp_path)
    hub.silent = True
    uploader = HubUploader(settings(timeout_seconds=3), "cat")
    uploader.upload("Checkpoint step 10", files)
    # The server holds the request, and this thread is here: nothing waits for the upload.
    assert hub.asked.wait(60)
    assert (uploader.uploaded, uploader.failed) == (0, 0)
    hub.silent = False
    limit = time.monotonic() + 60
    while not uploader.failed and time.monotonic() < limit:
        time.sleep(0.02)
    uploader.settings = settings()
    uploader.upload("Checkpoint step 20", files[2:3])
    uploader.close()
    assert (uploader.uploaded, uploader.failed) == (1, 1)
    assert caplog.messages == ["hub: Checkpoint step 10: given up after 3 seconds (hub.timeout_seconds)"]
    assert [message for message, _ in hub.commits] == ["Checkpoint step 20"]


@pytest.mark.parametrize("status", [401, 500])
def test_refusal_is_reported_with_its_reason_and_never_raised(
    status: int, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.status = status
    uploader = HubUploader(settings(), "cat")
    uploader.upload("Checkpoint step 10", run_folder(tmp_path))
    uploader.close()
    assert (uploader.uploaded, uploader.failed) == (0, 1)
    assert len(caplog.messages) == 3
    for attempt, message in enumerate(caplog.messages, start=1):
        assert message.startswith(f"hub: Checkpoint step 10: attempt {attempt} of 3 failed: ")
        assert str(status) in message
        assert TOKEN not in message
    assert TOKEN not in "".join(capfd.readouterr())
    assert hub.commits == []


def test_unreachable_server_is_reported_and_never_raised(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nothing listens there
    uploader = HubUploader(settings(), "cat")
    uploader.upload("Checkpoint step 10", run_folder(tmp_path))
    uploader.close()
    assert (uploader.uploaded, uploader.failed) == (0, 1)
    assert "attempt 3 of 3 failed: " in caplog.messages[-1]


# The token


@pytest.mark.parametrize("status", [200, 401])
def test_token_is_not_printed_even_if_the_server_repeats_it(
    status: int, hub: Hub, tmp_path: Path, everything: Any
) -> None:
    hub.status = status
    uploader = HubUploader(settings(), "cat")
    uploader.upload("Config", [run_folder(tmp_path)[2]])
    uploader.close()
    assert hub.tokens == {f"Bearer {TOKEN}"}
    text = everything()
    assert "hub: Config" in text
    assert TOKEN not in text


def test_token_that_fits_in_no_header_is_not_printed_either(hub: Hub, tmp_path: Path, everything: Any) -> None:
    uploader = HubUploader(settings(token=f"{TOKEN}\x0b{TOKEN}"), "cat")
    uploader.upload("Config", [run_folder(tmp_path)[2]])
    uploader.close()
    assert uploader.failed == 1
    text = everything()
    assert "hub: Config" in text
    assert TOKEN not in text


def test_uploader_without_work_closes() -> None:
    uploader = HubUploader(settings(), "cat")
    uploader.close()
    assert (uploader.uploaded, uploader.failed) == (0, 0)
