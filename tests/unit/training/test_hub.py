"""Uploads arrive where others look for them, and no answer of the server, nor its silence, disturbs the training.

The hub is `hub_server`, on this machine.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import Hub, environment, serving
from musubi_tuner.config.schema.hub import HubSection
from musubi_tuner.files import replace_file
from musubi_tuner.training.hub import HubUploader

pytestmark = pytest.mark.long

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
    return HubSection(**{"repo_id": REPO, "token": TOKEN, "timeout_seconds": 60, "retry_seconds": 0.0, **values})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the files of one checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    contents = {
        "cat-step00000010.safetensors": b"weights" * 1000,
        "cat-step00000010_ema.safetensors": b"averages" * 1000,
        "config.json": b'{"hidden_size": 64}',
        "cat.config.toml": "name = 'Bär'".encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def files_of(folder: Path, pattern: str = "[!.]*") -> dict[str, Path | str]:
    """Place in the repository -> file, of the files of a run folder."""
    return {f"checkpoint_runs/cat/{path.name}": path for path in sorted(folder.glob(pattern)) if path.is_file()}


def wait_until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def counts(uploader: HubUploader) -> tuple[int, int]:
    return len(uploader.uploaded), len(uploader.failed)


@pytest.fixture
def busy(hub: Hub, run: Path) -> Iterator[HubUploader]:
    """An uploader whose first commit the server has not answered yet; what comes next waits until its gate opens."""
    uploader = HubUploader(settings(), run)
    hub.gate.clear()
    uploader.upload("checkpoint", "Checkpoint step 10", files_of(run))
    assert hub.asked.wait(60)
    yield uploader
    hub.gate.set()
    uploader.close()
    assert not list(run.glob(".tmp-*"))


def finish(hub: Hub, uploader: HubUploader) -> list[tuple[str, dict[str, bytes]]]:
    """Let the server answer, and return its commits."""
    hub.gate.set()
    uploader.close()
    return hub.commits


@pytest.fixture
def everything(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Any:
    """All that a person could read: log records and what any process printed."""
    caplog.set_level(logging.DEBUG)

    def read() -> str:
        printed = capfd.readouterr()
        return "\n".join([*caplog.messages, printed.out, printed.err])

    return read


# Where files arrive


def test_commits_arrive_in_order_at_their_places_in_a_private_repository(hub: Hub, run: Path) -> None:
    uploader = HubUploader(settings(), run)
    uploader.upload("checkpoint", "Checkpoint step 10", files_of(run))
    card = "---\nlibrary_name: x\n---\n# cat\n"
    root = {"model.safetensors": run / "cat-step00000010.safetensors", "README.md": card}
    uploader.upload("release", "Release step 10", root)
    wait_until(lambda: uploader.left == 0)
    assert not list(run.glob(".tmp-*/*"))  # a pruned file takes up no space once it is uploaded
    uploader.close()
    assert counts(uploader) == (2, 0)
    assert hub.commits == [
        ("Checkpoint step 10", {name: Path(path).read_bytes() for name, path in files_of(run).items()}),
        ("Release step 10", {"model.safetensors": b"weights" * 1000, "README.md": card.encode()}),
    ]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert [(made["organization"], made["name"], made["visibility"]) for made in hub.created] == [
        ("someone", "cats", "private")
    ] * 2
    assert not list(run.glob(".tmp-*"))


def test_visibility_is_that_of_the_config(hub: Hub, run: Path) -> None:
    uploader = HubUploader(settings(private=False), run)
    uploader.upload("checkpoint", "Config", files_of(run, "config.json"))
    uploader.close()
    (created,) = hub.created
    assert created.get("visibility", "public") == "public"


def test_token_of_the_environment_is_used_without_one_in_the_config(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    uploader = HubUploader(settings(token=None), run)
    uploader.upload("checkpoint", "Config", files_of(run, "config.json"))
    uploader.close()
    assert hub.tokens == {"Bearer hf_of_the_environment"}


# What happens to files that wait


def test_files_that_are_pruned_or_replaced_while_they_wait_go_up_as_they_were(
    hub: Hub, busy: HubUploader, run: Path
) -> None:
    expected = {name: Path(path).read_bytes() for name, path in files_of(run).items()}
    busy.upload("checkpoint", "Checkpoint step 20", files_of(run))
    for path in run.glob("*.safetensors"):
        path.unlink()
    replace_file(run / "config.json", lambda path: path.write_bytes(b"{}"))
    assert finish(hub, busy)[1] == ("Checkpoint step 20", expected)


def test_without_links_a_pruned_file_is_named_and_the_others_arrive(
    hub: Hub, busy: HubUploader, run: Path, everything: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError("this file system has no links")

    monkeypatch.setattr(os, "link", no_links)
    files = files_of(run)
    busy.upload("checkpoint", "Checkpoint step 20", files)
    gone = "checkpoint_runs/cat/cat-step00000010.safetensors"
    (run / "cat-step00000010.safetensors").unlink()
    message, arrived = finish(hub, busy)[1]
    assert message == "Checkpoint step 20" and set(arrived) == set(files) - {gone}
    assert f"{gone} was removed before its turn and is left out" in everything()


def test_a_commit_of_which_nothing_is_left_fails_and_is_named(hub: Hub, run: Path) -> None:
    uploader = HubUploader(settings(), run)
    uploader.upload("checkpoint", "Checkpoint step 10", {"model.safetensors": run / "never written.safetensors"})
    uploader.close()
    assert [commit.reason for commit in uploader.failed] == ["its files were removed before its turn"]
    assert hub.commits == []


def test_growing_files_go_up_as_they_are_when_their_turn_comes(hub: Hub, busy: HubUploader, run: Path) -> None:
    log = run / "metrics.jsonl"
    log.write_text("1\n", encoding="utf-8")
    busy.upload("logs", "Logs step 10", {"logs/metrics.jsonl": log}, growing=True)
    log.write_text("1\n2\n", encoding="utf-8")
    assert finish(hub, busy)[1] == ("Logs step 10", {"logs/metrics.jsonl": b"1\n2\n"})


def test_what_is_written_to_a_growing_file_during_its_upload_is_left_out(hub: Hub, run: Path) -> None:
    log = run / "metrics.jsonl"
    log.write_text("1\n", encoding="utf-8")
    uploader = HubUploader(settings(), run)
    hub.gate.clear()
    uploader.upload("logs", "Logs step 10", {"logs/metrics.jsonl": log}, growing=True)
    assert hub.asked.wait(60)
    log.write_text("1\n2\n", encoding="utf-8")
    assert finish(hub, uploader) == [("Logs step 10", {"logs/metrics.jsonl": b"1\n"})]


def test_a_folder_that_cannot_be_written_to_fails_the_upload_and_nothing_else(
    hub: Hub, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uploader = HubUploader(settings(), run / "config.json")  # a file, in which no folder can be made
    uploader.upload("checkpoint", "Checkpoint step 10", files_of(run))
    uploader.close()
    assert counts(uploader) == (0, 1)
    assert caplog.messages[0].startswith("hub: Checkpoint step 10 is not uploaded: its files cannot be held (")


# The queue


def test_of_checkpoints_that_wait_the_oldest_gives_way(hub: Hub, busy: HubUploader, run: Path) -> None:
    for step in (20, 30, 40, 50):
        busy.upload("checkpoint", f"Checkpoint step {step}", files_of(run))
    assert busy.left == 3
    assert [message for message, _ in finish(hub, busy)] == [f"Checkpoint step {step}" for step in (10, 40, 50)]
    assert [commit.message for commit in busy.failed] == ["Checkpoint step 20", "Checkpoint step 30"]
    assert "newer ones were saved before its turn" in busy.failed[0].reason


def test_samples_that_wait_go_up_together(hub: Hub, busy: HubUploader) -> None:
    for step in (1, 2, 3):
        busy.upload(
            "samples", f"Samples step {step}", {f"samples/{step}.txt": str(step), "samples/last.txt": str(step)}
        )
    assert busy.left == 2
    expected = {"samples/1.txt": b"1", "samples/2.txt": b"2", "samples/3.txt": b"3", "samples/last.txt": b"3"}
    assert finish(hub, busy)[1:] == [("Samples step 3", expected)]


@pytest.mark.parametrize("waits", [True, False])
def test_samples_that_failed_go_up_with_the_next(waits: bool, hub: Hub, run: Path) -> None:
    """The next ones wait while the first fail, or come later."""
    uploader = HubUploader(settings(), run)
    hub.troubles = [404]
    hub.gate.clear()
    uploader.upload("samples", "Samples step 1", {"samples/1.txt": "1"})
    assert hub.asked.wait(60)
    if not waits:
        hub.gate.set()
        wait_until(lambda: uploader.failed)
    uploader.upload("samples", "Samples step 2", {"samples/2.txt": "2"})
    commits = finish(hub, uploader)
    assert commits == [("Samples step 2", {"samples/1.txt": b"1", "samples/2.txt": b"2"})]
    assert counts(uploader) == (1, 0)


def test_a_patient_uploader_drops_nothing(hub: Hub, run: Path) -> None:
    uploader = HubUploader(settings(finish_seconds=0), run, patient=True)
    hub.gate.clear()
    for step in range(4):
        uploader.upload("checkpoint", f"Checkpoint step {step}", files_of(run, "config.json"))
    assert uploader.left == 4 and not uploader.failed
    hub.gate.set()
    uploader.close()
    assert len(hub.commits) == 4


# When the server does not play along


def test_hanging_server_is_given_up_while_training_goes_on_and_the_next_upload_arrives(
    hub: Hub, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.silent = True
    uploader = HubUploader(settings(timeout_seconds=10), run)
    uploader.upload("checkpoint", "Checkpoint step 10", files_of(run))
    # The server holds the request, and this thread is here: nothing waits for the upload.
    assert hub.asked.wait(60)
    assert counts(uploader) == (0, 0)
    hub.silent = False
    wait_until(lambda: uploader.failed)
    uploader.settings = settings()
    uploader.upload("checkpoint", "Checkpoint step 20", files_of(run, "config.json"))
    uploader.close()
    assert counts(uploader) == (1, 1)
    assert caplog.messages == [
        "hub: Checkpoint step 10 is not uploaded: given up after 10 seconds (hub.timeout_seconds)"
    ]
    assert [message for message, _ in hub.commits] == ["Checkpoint step 20"]


def test_the_end_of_a_run_waits_no_longer_than_its_limit(hub: Hub, run: Path) -> None:
    hub.silent = True
    uploader = HubUploader(settings(finish_seconds=1, timeout_seconds=600), run)
    uploader.upload("checkpoint", "Checkpoint step 10", files_of(run))
    uploader.upload("logs", "Logs", {"logs/metrics.jsonl": run / "config.json"}, growing=True)
    assert hub.asked.wait(60)
    child = uploader._child
    assert child is not None and os.getpgid(child.pid) == child.pid  # a Ctrl-C in the terminal does not reach it
    begun = time.monotonic()
    uploader.close()
    assert 1 <= time.monotonic() - begun < 20
    assert {commit.message for commit in uploader.failed} == {"Checkpoint step 10", "Logs"}
    assert all("hub.finish_seconds" in commit.reason for commit in uploader.failed)
    assert child.returncode is not None
    assert not list(run.glob(".tmp-*"))


def test_a_passing_trouble_is_overcome_by_another_attempt_after_a_longer_pause(
    hub: Hub, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float | None] = []

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout)
            return False

    hub.troubles = [500, 408]
    uploader = HubUploader(settings(retry_seconds=5), run)
    uploader._given_up = Clock()
    uploader.upload("checkpoint", "Checkpoint step 10", files_of(run))
    uploader.close()
    assert pauses == [5, 20]
    assert counts(uploader) == (1, 0)
    assert [message.partition(" failed: ")[0] for message in caplog.messages] == [
        "hub: Checkpoint step 10: attempt 1 of 3",
        "hub: Checkpoint step 10: attempt 2 of 3",
    ]


def test_server_error_is_reported_with_its_reason_after_three_attempts_and_never_raised(
    hub: Hub, run: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.status = 500
    uploader = HubUploader(settings(), run)
    uploader.upload("checkpoint", "Checkpoint step 10", files_of(run))
    uploader.close()
    assert counts(uploader) == (0, 1)
    assert len(caplog.messages) == 4
    for attempt, message in enumerate(caplog.messages[:3], start=1):
        assert message.startswith(f"hub: Checkpoint step 10: attempt {attempt} of 3 failed: ")
        assert "500" in message
    assert "500" in uploader.failed[0].reason
    assert TOKEN not in "".join([*caplog.messages, *capfd.readouterr()])
    assert hub.commits == []


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "put a token with write access into HF_TOKEN"), (400, "Bad request")]
)
def test_refusal_is_not_repeated(status: int, advice: str, hub: Hub, run: Path) -> None:
    hub.troubles = [status]
    uploader = HubUploader(settings(), run)
    uploader.upload("checkpoint", "Checkpoint step 10", files_of(run))
    uploader.close()
    (commit,) = uploader.failed
    assert advice in commit.reason
    assert TOKEN not in commit.reason
    assert hub.commits == []


def test_unreachable_server_is_reported_and_never_raised(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nothing listens there
    uploader = HubUploader(settings(), run)
    uploader.upload("checkpoint", "Checkpoint step 10", files_of(run))
    uploader.close()
    assert counts(uploader) == (0, 1)
    assert "attempt 3 of 3 failed: " in caplog.messages[-2]


def test_offline_mode_is_named(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    uploader = HubUploader(settings(), run)
    uploader.upload("checkpoint", "Checkpoint step 10", files_of(run))
    uploader.close()
    assert uploader.failed[0].reason.endswith("(HF_HUB_OFFLINE is set)")


KILLED = """
import sys
from pathlib import Path
from musubi_tuner.config.schema.hub import HubSection
from musubi_tuner.files import replace_file
from musubi_tuner.training.hub import HubUploader
uploader = HubUploader(HubSection(repo_id="someone/cats"), Path(sys.argv[1]))
uploader.upload("checkpoint", "Checkpoint", {"README.md": "text"})
while not uploader._child:
    pass
print(uploader._child.pid, flush=True)
input()
"""


def test_an_upload_ends_with_the_program_that_started_it(hub: Hub, run: Path) -> None:
    hub.silent = True
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        upload = int(program.stdout.readline())
        assert hub.asked.wait(60)
        os.kill(upload, 0)
        program.kill()
    wait_until(lambda: not is_running(upload))


def is_running(process: int) -> bool:
    """Whether a process computes; one that nobody has collected yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# The token


@pytest.mark.parametrize("status", [200, 401])
def test_token_is_not_printed_even_if_the_server_repeats_it(status: int, hub: Hub, run: Path, everything: Any) -> None:
    hub.status = status
    uploader = HubUploader(settings(), run)
    uploader.upload("checkpoint", "Config", files_of(run, "config.json"))
    uploader.close()
    assert hub.tokens == {f"Bearer {TOKEN}"}
    text = everything()
    assert "hub: Config" in text
    assert TOKEN not in text


def test_token_that_fits_in_no_header_is_not_printed_either(hub: Hub, run: Path, everything: Any) -> None:
    uploader = HubUploader(settings(token=f"{TOKEN}\x0b{TOKEN}"), run)
    uploader.upload("checkpoint", "Config", files_of(run, "config.json"))
    uploader.close()
    assert counts(uploader) == (0, 1)
    text = everything()
    assert "hub: Config" in text
    assert TOKEN not in text


def test_uploader_without_work_closes(run: Path) -> None:
    uploader = HubUploader(settings(), run)
    uploader.close()
    assert counts(uploader) == (0, 0)
