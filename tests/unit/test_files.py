"""Text in the encodings that people's editors write, names that are no UTF-8, and the locks of folders."""

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner import files
from musubi_tuner.errors import ConfigError, DataError, UserError
from musubi_tuner.files import encodable, folder_lock, json_text, read_json, read_text, write_json, write_text

# Text


@pytest.mark.parametrize(
    "data",
    [
        "été\nb".encode(),
        "été\nb".encode("utf-8-sig"),
        "\ufeff\ufeffété\nb".encode(),
        "été\r\nb".encode("utf-8-sig"),
        "été\r\ufeffb".encode(),  # two files with a mark each, put together
    ],
)
def test_marks_and_line_ends_do_not_matter(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt") == "été\nb"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("a = 1".encode("utf-16"), "UTF-16 text"),
        (b"\xfe\xff" + "a = 1".encode("utf-16-be"), "UTF-16 text"),
        ("a = 1".encode("utf-32"), "UTF-32 text"),
        ("a = 1".encode("utf-16-le"), "UTF-16 text without a byte order mark"),
        ("a = 1".encode("utf-16-be"), "UTF-16 text without a byte order mark"),
        ("a\nb\nun café".encode("cp1252"), "line 3 holds the byte E9, 'é' in Windows code page 1252"),
        (b"a\x81", "line 1 holds the byte 81"),
    ],
)
@pytest.mark.parametrize("kind", [ConfigError, DataError])
def test_another_encoding_is_named_with_the_way_out(
    data: bytes, found: str, kind: type[UserError], tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(kind) as caught:
        read_text(path, kind)
    assert str(caught.value).startswith(f"{path}: is ") and found in str(caught.value)
    assert "convert it to UTF-8" in str(caught.value)


def test_text_of_one_byte_and_of_none_is_text(tmp_path: Path) -> None:
    for data in (b"", b"a"):
        (tmp_path / "a.txt").write_bytes(data)
        assert read_text(tmp_path / "a.txt") == data.decode()


def test_json_has_its_mark_too_and_its_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": "é"}', encoding="utf-8-sig")
    assert read_json(path) == {"a": "é"}
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json: not a JSON file"):
        read_json(path)


ODD = os.fsdecode(b"caf\xe9 ") + "猫"
"""A file name whose first part is no UTF-8."""


def test_what_has_no_utf8_is_written_anyway(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", ODD)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "caf\ufffd 猫"
    write_json(tmp_path / "a.json", {ODD: 1, "é": 2})
    assert read_json(tmp_path / "a.json") == {ODD: 1, "é": 2}
    assert json_text(["é"]) == '["é"]' and json.loads(json_text([ODD])) == [ODD]


def test_bytes_that_are_letters_after_all_become_them() -> None:
    assert encodable("é".encode().decode("ascii", "surrogateescape")) == "é"
    assert encodable("é") == "é"
    assert encodable("\ud83d") == "?"


# Locks


def refuse(holder: str) -> Exception:
    return RuntimeError(f"{holder} is here")


def no_locks(monkeypatch: pytest.MonkeyPatch, *names: str, number: int = errno.ENOLCK) -> None:
    """Let calls of the kernel answer as file systems without such locks do."""

    def answer(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    for name in names:
        monkeypatch.setattr(fcntl, name, answer)


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """Start another process that holds the folder until the test ends; with flock or without."""
    started = []

    def hold(without_flock: bool = False) -> subprocess.Popen[str]:
        code = (
            "import fcntl, sys; from pathlib import Path; from musubi_tuner.files import folder_lock\n"
            "def answer(*arguments): raise OSError(95, 'no')\n"
            f"if {without_flock}: fcntl.flock = answer\n"
            "with folder_lock(Path(sys.argv[1]), RuntimeError):\n    print('held', flush=True); sys.stdin.read()"
        )
        words = [sys.executable, "-c", code, str(tmp_path)]
        started.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_the_holder_is_named_by_process_and_machine(tmp_path: Path, other: Any) -> None:
    holder = other()
    with pytest.raises(RuntimeError) as caught, folder_lock(tmp_path, refuse):
        pass
    assert str(caught.value) == f"process {holder.pid} on {platform.node()} is here"
    holder.kill()
    holder.wait()
    with folder_lock(tmp_path, refuse) as can_write:
        assert can_write


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_a_file_system_without_flock_is_not_busy(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_locks(monkeypatch, "flock", number=number)
    with folder_lock(tmp_path, refuse) as can_write:
        assert can_write and not caplog.text


def test_without_flock_the_locks_of_posix_hold(tmp_path: Path, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(monkeypatch, "flock")
    holder = other(without_flock=True)
    with pytest.raises(RuntimeError, match=f"process {holder.pid} on "), folder_lock(tmp_path, refuse):
        pass


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES])
def test_busy_is_busy(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(monkeypatch, "flock", number=number)
    with pytest.raises(RuntimeError, match="another process is here"), folder_lock(tmp_path, refuse):
        pass


def test_without_any_lock_it_goes_on_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "_warned", set())
    no_locks(monkeypatch, "flock", "lockf")
    for name in ("a", "b"):
        with folder_lock(tmp_path / name, refuse):
            pass
    assert caplog.text.count("has no locks") == 1 and os.strerror(errno.ENOLCK) in caplog.text


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say when a process started")
def test_without_any_lock_a_living_process_of_this_machine_is_refused_and_a_dead_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_locks(monkeypatch, "flock", "lockf")
    lives = f"process {os.getppid()} on here\n{files._started(os.getppid())}\n"
    (tmp_path / ".lock").write_text(lives, encoding="utf-8")
    with pytest.raises(RuntimeError, match=f"process {os.getppid()} on here is here"), folder_lock(tmp_path, refuse):
        pass
    # What a crash leaves, and a number that another process has by now, hold nobody up.
    for left in (
        lives.replace("\n", "\n0", 1),
        "process 999999999 on here\nx 1\n",
        f"process {os.getppid()}",
        "\xff",
        "",
    ):
        (tmp_path / ".lock").write_bytes(left.encode("latin-1"))
        with folder_lock(tmp_path, refuse):
            pass


def test_a_lock_that_is_released_names_nobody(tmp_path: Path) -> None:
    with folder_lock(tmp_path, refuse):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text(encoding="utf-8")
    assert (tmp_path / ".lock").read_bytes() == b""


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_folder_that_cannot_be_written_to_needs_no_lock_to_be_read(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number), str(arguments[0]))

    monkeypatch.setattr(os, "open", answer)
    with folder_lock(tmp_path, refuse, must_write=False) as can_write:
        assert not can_write
    with pytest.raises(OSError, match=os.strerror(number)), folder_lock(tmp_path, refuse):
        pass


def test_a_full_disk_still_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", answer)
    with folder_lock(tmp_path, refuse) as can_write:
        assert can_write
