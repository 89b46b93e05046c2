"""Children end with their parent and pass on how they ended; help and config errors come at once."""

import os
import resource
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from musubi_tuner.config import load_config
from musubi_tuner.config.command_line import override_arguments, secret_environment, split_overrides
from musubi_tuner.config.schema.hub import HubSection
from musubi_tuner.config.schema.run import RunSection
from musubi_tuner.errors import ConfigError, run_command
from musubi_tuner.runner.command import Runner, fresh_folder, list_run_files, main
from musubi_tuner.runner.processes import run_child, run_children
from musubi_tuner.stopping import REPEAT_SECONDS

pytestmark = pytest.mark.long

TRAIN = Path(__file__).parents[3] / "train.py"
PATIENCE = 30.0
"""Seconds to wait for a process to begin; only a broken test waits so long."""

HELD = "import time; time.sleep(60)"
"""Code of a process that does nothing until something ends it."""
PARENT = "import sys; from musubi_tuner.runner.processes import run_child; sys.exit(run_child(sys.argv[1:]))"
"""Code of a process that runs its arguments as a child and passes on the exit code."""


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Whether the condition came true in time."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# Exit codes


@pytest.mark.parametrize("code", [0, 1, 2, 7, 130])
def test_exit_code_of_a_child_is_passed_on(code: int) -> None:
    assert run_child(["-c", f"raise SystemExit({code})"]) == code


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGABRT"])
def test_child_that_died_of_a_signal_gives_128_and_its_number(name: str) -> None:
    code = f"import os, signal; os.kill(os.getpid(), signal.{name})"
    assert run_child(["-c", code]) == 128 + getattr(signal, name)


def test_child_has_the_environment_it_is_given() -> None:
    code = "import os; raise SystemExit(int(os.environ['A']) + int(os.environ['B']))"
    before = dict(os.environ)
    try:
        os.environ["A"], os.environ["B"] = "40", "1"
        assert run_child(["-c", code], {"B": "2"}) == 42
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_children_run_side_by_side_and_the_first_failure_ends_the_others() -> None:
    code = (
        "import os, time; time.sleep(0.2 if os.environ['N'] == '1' else 60); raise SystemExit(int(os.environ['N']) * 3)"
    )
    begun = time.monotonic()
    assert run_children(["-c", code], [{"N": "0"}, {"N": "1"}], patience=0.1) == 3
    assert time.monotonic() - begun < 30


def test_a_child_that_was_asked_to_stop_leaves_the_others_their_time() -> None:
    code = "import os, time; time.sleep(0.1 if os.environ['N'] == '1' else 1); raise SystemExit(130 if os.environ['N'] == '1' else 0)"
    begun = time.monotonic()
    assert run_children(["-c", code], [{"N": "0"}, {"N": "1"}], patience=0.0) == 130
    assert time.monotonic() - begun >= 1


def test_arguments_reach_the_child_unchanged() -> None:
    words = ["--set", "sample.negative_prompt=a b; \"c\" 'd' $HOME *", ""]
    code = f"import sys; raise SystemExit(0 if sys.argv[1:] == {words!r} else 1)"
    assert run_child(["-c", code, *words]) == 0


def test_signal_handlers_are_back_after_a_child() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run_child(["-c", ""])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# Signals and the end of the parent


class Family:
    """A process that runs a child through `run_child`, in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parent: subprocess.Popen[bytes] | None = None

    def start(self, code: str) -> int:
        """Run ``code`` as the child, after it wrote its process id; returns that."""
        ready = self.folder / "ready"
        begin = (
            "import os, pathlib; from musubi_tuner.parent import join_parent; join_parent(); "
            f"pathlib.Path({str(ready)!r}).with_suffix('.part').write_text(str(os.getpid())); "
        )
        end = f"\nos.rename({str(ready) + '.part'!r}, {str(ready)!r})\n"
        setup, _, body = code.partition("---")
        script = self.folder / "child.py"
        script.write_text(begin + "\n" + setup + end + body, encoding="utf-8")
        self.parent = subprocess.Popen([sys.executable, "-c", PARENT, str(script)])
        assert wait_for(ready.exists), "the child did not begin"
        return int(ready.read_text(encoding="utf-8"))

    def signal(self, number: int) -> None:
        assert self.parent is not None
        self.parent.send_signal(number)

    def exit_code(self) -> int:
        assert self.parent is not None
        return self.parent.wait(PATIENCE)

    def end(self) -> None:
        if self.parent is not None and self.parent.poll() is None:
            self.parent.kill()
            self.parent.wait()


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    family = Family(tmp_path)
    yield family
    family.end()


NOTES_SIGNALS = """
import signal, time
notes = pathlib.Path(__file__).with_name("notes")
def note(number, frame):
    with notes.open("a") as file:
        file.write(f"{number}\\n")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note)
---
"""
"""Beginning of a child that writes down the signals it gets and goes on."""
ENDS_SOON_AFTER = """
limit = time.monotonic() + 60
while not notes.exists() and time.monotonic() < limit:
    time.sleep(0.01)
time.sleep(0.3)  # a second signal would be noted in this time
raise SystemExit(5)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_reaches_the_child_once_and_the_parent_waits_for_it(number: int, family: Family) -> None:
    family.start(NOTES_SIGNALS + ENDS_SOON_AFTER)
    family.signal(number)
    assert family.exit_code() == 128 + number
    assert (family.folder / "notes").read_text(encoding="utf-8") == f"{int(number)}\n"


def test_second_signal_ends_a_child_that_does_not_listen(family: Family) -> None:
    child = family.start(NOTES_SIGNALS + "while True:\n    time.sleep(0.01)\n")
    family.signal(signal.SIGTERM)
    assert wait_for((family.folder / "notes").exists)
    assert is_alive(child)
    time.sleep(REPEAT_SECONDS + 0.1)  # until then it counts as a copy of the first
    family.signal(signal.SIGTERM)
    assert family.exit_code() == 128 + signal.SIGTERM
    assert not is_alive(child)


def test_ctrl_c_in_the_terminal_reaches_the_child_through_its_parent_only(family: Family) -> None:
    child = family.start("---" + HELD)
    assert family.parent is not None
    assert os.getpgid(child) == child
    assert os.getsid(child) != os.getsid(family.parent.pid)


def test_child_ends_when_its_parent_is_killed(family: Family) -> None:
    child = family.start("---" + HELD)
    assert is_alive(child)
    family.signal(signal.SIGKILL)
    assert family.exit_code() == -signal.SIGKILL
    assert wait_for(lambda: not is_alive(child), 5)


def test_child_that_computes_ends_too_when_its_parent_is_killed(family: Family) -> None:
    child = family.start("---\nwhile True:\n    pass\n")
    family.signal(signal.SIGKILL)
    family.exit_code()
    assert wait_for(lambda: not is_alive(child), 5)


def test_process_that_is_no_child_does_not_watch_its_input() -> None:
    code = "from musubi_tuner.parent import join_parent; join_parent(); import time; time.sleep(0.3)"
    environment = {name: value for name, value in os.environ.items() if name != "MUSUBI_PARENT_PIPE"}
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, env=environment)
    assert done.returncode == 0


# Overrides for children


ROUND_TRIPS: dict[str, list[Any]] = {
    "run.name": ["cat", "none", "true", "12", "a b"],
    "run.seed": [0, 4294967295],
    "run.threads": [None, 3],
    "optimizer.lr": [1e-4, 3.0e-07, 2.0, 1 / 3],
    "optimizer.betas": [[0.9, 0.95], [0.5, 1 / 3]],
    "optimizer.decay_all": [True, False],
    "optimizer.type": ["AdamW8bit"],
    "objective.min_snr_gamma": [None, 0.0, 5.0],
    "sample.prompts": [None, "prompts.txt", ["one"], ["a, b", 'c "d" \\ e', "f\ng", "Bär = #1", "--plan"], []],
    "sample.negative_prompt": [None, "", "blurry, a=b", "--fresh", "line\nbreak", " spaces ", "'quoted'", '"x"'],
    "resume.from": ["auto", "out/cat state"],
    "hub.token": ["hf_abc"],
    "model.geometry.hidden_size": [64],
    "model.geometry.axes_dims_rope": [[16, 24, 24]],
    "model.geometry.use_lune_expert": [False],
    "model.geometry.mlp_ratio": [2.5],
}


@pytest.mark.parametrize(
    ("key", "value"), [pytest.param(key, v, id=f"{key}={v!r}") for key, values in ROUND_TRIPS.items() for v in values]
)
def test_override_reaches_a_child_with_its_value_and_type(key: str, value: Any) -> None:
    words = override_arguments({key: value})
    os.environ.update(secret_environment({key: value}))
    passed, overrides = split_overrides(["run.toml", *words], set())
    assert passed == ["run.toml"]
    assert overrides == {key: value}
    assert type(overrides[key]) is type(value)


def test_all_overrides_reach_a_child_in_order() -> None:
    given = {key: values[0] for key, values in ROUND_TRIPS.items()}
    os.environ.update(secret_environment(given))
    _, overrides = split_overrides(override_arguments(given), set())
    assert overrides == given and list(overrides)[1:] == [key for key in given if key != "hub.token"]


@pytest.mark.parametrize(
    "key", sorted({"hub.token", "huggingface_token", "steps.one.hub.token", "steps.v1.5.huggingface_token"})
)
def test_a_secret_is_in_no_argument_of_a_child(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stages and of the processes that a launcher starts: everybody may list the arguments of processes."""
    started: list[tuple[Any, Any]] = []
    monkeypatch.setattr("musubi_tuner.runner.command.run_child", lambda *call: started.append(call))
    monkeypatch.setattr(
        "musubi_tuner.runner.command.run_children",
        lambda words, environments: started.extend((words, environment) for environment in environments),
    )
    config: Any = SimpleNamespace(
        path=Path("run.toml"),
        distributed=SimpleNamespace(num_processes=2, main_process_port=29500),
        run=RunSection(name="x", output_dir="o", device="cpu"),
        memory=SimpleNamespace(blocks_to_swap="auto"),
    )
    runner = Runner(config, Namespace(), {key: "hf_SECRETSECRET", "run.seed": 5})
    runner._stage(["-m", "musubi_tuner.caching", "text"])
    runner._launch(SimpleNamespace(path=config.path, memory=SimpleNamespace(blocks_to_swap=3)))
    assert len(started) == 3
    for words, environment in started:
        assert "run.seed=5" in words and not any("SECRET" in word for word in words)
        with monkeypatch.context() as child:
            for name, value in environment.items():
                child.setenv(name, value)
            begin = list(words).index("--set")
            given = split_overrides(words[begin:], set())[1]
            given.pop("memory.blocks_to_swap", None)  # what the plan chose, for the processes of a training
            assert given == {key: "hf_SECRETSECRET", "run.seed": 5}
            assert not any("SECRET" in value for value in os.environ.values())  # nor does it go further by itself


def test_no_error_shows_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text("schema_version = 1\n[hub]\ntoken = 'a secret of mine'\n", encoding="utf-8")

    def body() -> None:
        with pytest.raises(ConfigError):
            load_config(tmp_path / "run.toml")
        raise ConfigError("the server said: a secret of mine, hf_ABCDEFGHIJ and 'run' are wrong")

    assert run_command(body) == 2
    assert capsys.readouterr().err == "error: the server said: ***, *** and 'run' are wrong\n"


def test_a_token_is_in_no_text_of_its_section() -> None:
    assert "SECRET" not in repr(HubSection(repo_id="a/b", token="hf_SECRETSECRET"))


# Folders and lists


def test_new_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert fresh_folder(tmp_path / "run") == tmp_path / "run"


def test_fresh_folder_is_the_first_number_that_is_free(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert fresh_folder(tmp_path / "run") == tmp_path / "run-2"
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-3").write_text("a file counts too", encoding="utf-8")
    (tmp_path / "run-5").mkdir()
    assert fresh_folder(tmp_path / "run") == tmp_path / "run-4"
    assert not (tmp_path / "run-4").exists()
    (tmp_path / "run-4" / "logs").mkdir(parents=True)
    (tmp_path / "run-4" / "run.json").touch()  # a start that was refused
    assert fresh_folder(tmp_path / "run") == tmp_path / "run-4"


def test_run_files_are_listed_with_their_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toml").mkdir()
    (tmp_path / "toml" / "b.toml").write_text("#:schema run.schema.json\n# Trains cats.\n#\n[run]\n", encoding="utf-8")
    (tmp_path / "toml" / "a.toml").write_text("[run]\n", encoding="utf-8")
    (tmp_path / "toml" / "data.toml").write_text("# notes: data sets.\n[[datasets]]\n", encoding="utf-8")
    (tmp_path / "toml" / "notes.txt").write_text("# no run file\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert list_run_files() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: python train.py RUN_FILE [options]   (--help lists them)"
    assert [line.split() for line in lines[2:4]] == [["toml/a.toml"], ["toml/b.toml", "Trains", "cats."]]
    assert lines[-1].startswith("New here? `python train.py toml/demo.toml` ")
    assert "notes" not in "".join(lines)


def test_folder_without_run_files_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert "  no run files in ./toml; run this in the project's folder\n" in capsys.readouterr().out


# The start


CPU_SECONDS, SHARE = 0.5, 6
"""User and system time in which help or a config error is on the screen; or so many starts of Python that import pydantic, where
the machine is slow."""
HEAVY = {"torch", "accelerate", "transformers", "diffusers", "bitsandbytes", "safetensors", "numpy", "PIL"}


@pytest.fixture
def mistyped(tmp_path: Path) -> Path:
    """A run file whose only fault is a mistyped key."""
    for name in ("model", "vae", "clip", "t5", "unet"):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "images").mkdir()
    path = tmp_path / "run.toml"
    path.write_text(
        """schema_version = 1
[run]
name = "cat"
output_dir = "out"
[model]
arch = "tf"
path = "model.safetensors"
vae_path = "vae.safetensors"
clip_path = "clip.safetensors"
t5_path = "t5.safetensors"
[experts]
unet = "unet.safetensors"
[train]
max_steps = 10
max_grad_nrom = 1.0
[[datasets]]
image_directory = "images"
""",
        encoding="utf-8",
    )
    return path


def train(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, str(TRAIN), *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def is_at_once(*arguments: str) -> bool:
    """Whether a start takes little time, in one of five tries: others share the machine."""

    def seconds(begin: Callable[[], Any]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begin()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    def allowed() -> float:
        return SHARE * seconds(lambda: subprocess.run([sys.executable, "-c", "import argparse, pydantic"], check=True))

    return any(seconds(lambda: train(*arguments)) < max(CPU_SECONDS, allowed()) for _ in range(5))


def imported(*arguments: str) -> set[str]:
    """Packages that a start imports."""
    lines = train(*arguments, python=("-X", "importtime")).stderr.splitlines()
    names = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "musubi_tuner.runner.command" in names
    return {name.partition(".")[0] for name in names}


def test_help_ends_well_and_lists_every_setting() -> None:
    done = train("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: train.py")
    for text in ("--plan", "--fresh", "--cache_only", "--skip_cache", "--learning_rate", "--set sample.width=..."):
        assert text in done.stdout


def test_help_is_on_the_screen_at_once() -> None:
    assert is_at_once("--help")


def test_config_error_is_on_the_screen_at_once(mistyped: Path) -> None:
    assert is_at_once(str(mistyped))


def test_help_imports_nothing_heavy() -> None:
    assert imported("--help") & HEAVY == set()


def test_config_error_imports_nothing_heavy(mistyped: Path) -> None:
    assert imported(str(mistyped)) & HEAVY == set()


def test_mistyped_key_is_named_with_the_right_one(mistyped: Path) -> None:
    done = train(str(mistyped))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {mistyped}: 2 problems\n")
    assert "train.max_grad_nrom: unknown key. Did you mean 'max_grad_norm'?" in done.stderr
    assert "scheduler.warmup_steps: is 1000, longer than train.max_steps = 10" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.toml"], "error: none.toml: no such file; run `python train.py` to list the run files here\n"),
        (["run.toml", "--sead", "3"], "error: unknown option --sead. Did you mean 'seed'? See --help\n"),
        (["run.toml", "--seed"], "error: --seed: the value is missing\n"),
        (["run.toml", "--set", "run.seed"], "error: --set run.seed: expected --set section.key=value\n"),
    ],
)
def test_wrong_command_line_is_wrong_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err == message
