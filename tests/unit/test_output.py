"""Output fails for no letter and for no reader. Children without torch start in a tenth of a second."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from musubi_tuner.errors import run_command
from musubi_tuner.output import LastingOutput, _lasting, secure_output

NAMES = "été 猫 😀 " + os.fsdecode(b"caf\xe9")
COMMAND = (
    "import logging, os, sys, warnings\n"
    "from musubi_tuner.errors import UserError, run_command\n"
    f"name = {NAMES!a}\n"
    "def body():\n"
    "    print(name, flush=True); logging.getLogger('x').warning(name); warnings.warn(name)\n"
    "    print(name, file=sys.stdout)\n"
    "    open('done', 'w').close()\n"
    "    raise UserError(name)\n"
    "sys.exit(run_command(body))\n"
)


def run(cwd: Path, redirections: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The command above in a shell, so that its streams can be closed."""
    words = {**os.environ, **environment, "CODE": COMMAND, "PYTHON": sys.executable}
    line = f'"$PYTHON" -c "$CODE" {redirections}'
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=words, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "cp1252"}, "été \\u732b \\U0001f600 caf\\udce9".encode("cp1252")),
        ({"PYTHONIOENCODING": "ascii:replace"}, b"?t? ? ? caf?"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""},
         rb"\xe9t\xe9 \u732b \U0001f600 caf\udce9"),
        ({"PYTHONIOENCODING": "utf-8"}, "été 猫 😀 caf\\udce9".encode()),
    ],
)  # fmt: skip
def test_no_letter_ends_a_command(environment: dict[str, str], shown: bytes, tmp_path: Path) -> None:
    done = run(tmp_path, **environment)
    assert done.returncode == 1 and b"UnicodeEncodeError" not in done.stdout + done.stderr
    assert done.stdout.splitlines() == [shown, shown]
    assert b"\nerror: " in done.stderr


def test_children_that_are_no_commands_of_ours_write_every_letter_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("", "cp1252", "ascii:replace"):
        monkeypatch.setenv("PYTHONIOENCODING", given)
        secure_output()
        encoding, _, handler = os.environ["PYTHONIOENCODING"].partition(":")
        assert encoding == given.partition(":")[0]
        assert handler == ("replace" if given.endswith("replace") else "backslashreplace")
    code = "print(chr(0x732b))"
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    secure_output()
    assert subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, timeout=60).stdout == b"\\u732b\n"


@pytest.mark.parametrize(
    "redirections",
    ["<&- >&- 2>&-", "| true", "2>&1 | true", pytest.param(">/dev/full", id="full disk")],
)
def test_work_goes_on_without_a_reader(redirections: str, tmp_path: Path) -> None:
    done = run(tmp_path, f"{redirections}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 1  # of the error at the end of the body
    assert (tmp_path / "done").exists()
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    if redirections in ("| true", ">/dev/full"):
        assert done.stderr.count(b"warning: standard output cannot be written") == 1


def test_a_closed_stream_leaves_its_number_to_nobody(tmp_path: Path) -> None:
    """A file under number 1 would be written to by every library that prints."""
    code = (
        "import os, sys; from musubi_tuner.errors import run_command\n"
        "def body():\n"
        "    with open('precious', 'w') as file:\n"
        "        print('text'); os.write(1, b'of a library'); file.write(str(file.fileno()))\n"
        "run_command(body)\n"
    )
    subprocess.run(["bash", "-c", '"$0" -c "$1" >&- 2>&- <&-', sys.executable, code], cwd=tmp_path, timeout=60)
    assert int((tmp_path / "precious").read_text()) > 2


def test_what_cannot_be_written_is_dropped_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = io.TextIOWrapper(
        io.BufferedWriter(LastingOutput(writer, "the log")), encoding="utf-8", line_buffering=True
    )
    for _ in range(3):
        print("x" * 100_000, file=stream)
    assert capsys.readouterr().err == "warning: the log cannot be written (Broken pipe); continuing without it\n"
    os.close(writer)


def test_a_slow_reader_gets_everything() -> None:
    code = "import sys, time; time.sleep(0.3); sys.stdout.write(str(len(sys.stdin.read())))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as slow:
        assert slow.stdin is not None
        number = slow.stdin.fileno()
        os.set_blocking(number, False)
        with io.BufferedWriter(LastingOutput(number, "the pipe")) as stream:
            stream.write(b"x" * 1_000_000)
        slow.stdin.close()
        assert slow.stdout is not None and slow.stdout.read() == "1000000"


def test_streams_of_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", theirs)
    secure_output()
    assert sys.stdout is theirs
    print(NAMES, flush=True)
    text = io.StringIO()
    assert _lasting(text, 1, "standard output") is text  # type: ignore[arg-type]  # as a notebook may have it


def test_a_name_that_the_system_cannot_express_is_an_error_with_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: Path("données").name.encode("ascii") and None) == 1
    assert "ascii cannot express" in (said := capsys.readouterr().err) and "LC_ALL=C.UTF-8" in said


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals that hang up")
def test_a_terminal_that_goes_away_ends_a_command_in_order_and_nohup_does_not(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from musubi_tuner.errors import run_command\n"
        "from musubi_tuner.stopping import exit_on_terminate\n"
        "def body():\n"
        "    exit_on_terminate()\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGHUP)  # the second one, from the shell, hurries nobody\n"
        "        open('tidied', 'w').close()\n"
        "sys.exit(run_command(body))\n"
    )
    for nohup, expected in ((False, 129), (True, 0)):
        before = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if nohup else None
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, preexec_fn=before, timeout=60)
        assert done.returncode == expected
        (tmp_path / "tidied").unlink()
