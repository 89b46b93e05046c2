"""Every form of a source on the hub leads to the right file, with its config, and says which; what fails is explained.

Sources are resolved in child processes: huggingface_hub reads its environment when it is imported. They are forks of one process
that has imported everything else.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import Hub, environment, serving

pytestmark = pytest.mark.long

SERVER = """
import json, logging, os, sys, traceback
from musubi_tuner.errors import CheckpointError
from musubi_tuner.weights.checkpoints import locate_weights
from musubi_tuner.models.tinyflux.options import HUB_ID, OTHER_HUB_ID

def answer(asked):
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for source, options in asked:
        try:
            found = locate_weights(source, published=(HUB_ID, OTHER_HUB_ID), **options)
            config = found.config.read_text() if found.config else None
            print(json.dumps([found.path.read_text(), found.origin, config]))
        except CheckpointError as error:
            print(json.dumps(str(error)))

assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    asked, folder, variables = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        os.chdir(folder)
        os.environ.update(variables)
        for number, name in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        try:
            answer(asked)
            sys.stdout.flush()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Resolve = Callable[..., Any]
PUBLISHED = "AbstractPhil/tinyflux-deep"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator["subprocess.Popen[str]"]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SERVER], env=kept, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


@pytest.fixture
def resolve(hub: Hub, tmp_path: Path, server: "subprocess.Popen[str]") -> Resolve:
    """Resolve sources, each a text or a text with options; returns [content, origin, config] or the error of each."""

    def run(*sources: str | tuple[str, dict[str, Any]], **variables: str) -> list[Any]:
        asked = [(source, {}) if isinstance(source, str) else source for source in sources]
        own = {**environment(hub.url, str(tmp_path / "hub home")), **variables}
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps([asked, str(tmp_path), own]) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        out, err = ((tmp_path / name).read_text(encoding="utf-8") for name in (".out", ".err"))
        assert code == "0\n", err
        run.err = err  # type: ignore[attr-defined]
        return [json.loads(line) for line in out.splitlines()]

    return run


def files(*names: str) -> dict[str, bytes]:
    """A repository whose files hold their own names."""
    return {name: name.encode() for name in names}


def contents(found: list[Any]) -> list[str]:
    return [entry if isinstance(entry, str) else entry[0] for entry in found]


def test_repository_gives_its_model_and_its_average(hub: Hub, resolve: Resolve) -> None:
    hub.repositories["a/b"] = files("README.md", "config.json", "ema.safetensors", "model.safetensors", "model.pt")
    found = resolve("a/b", ("a/b", {"ema": True}), ("a/b", {"revision": "main"}))
    assert found == [
        ["model.safetensors", "a/b (revision main): model.safetensors", "config.json"],
        ["ema.safetensors", "a/b (revision main): ema.safetensors", "config.json"],
        ["model.safetensors", "a/b (revision main): model.safetensors", "config.json"],
    ]
    assert sorted(hub.downloads) == ["config.json", "ema.safetensors", "model.safetensors"]


def test_what_goes_with_weights_and_adapters_comes_along(hub: Hub, resolve: Resolve) -> None:
    hub.repositories["a/b"] = files(
        "config.json", "options.json", "lora/adapter_model.safetensors", "model.safetensors"
    )
    hub.repositories["a/b"] |= files("lora/adapter_config.json", "more/pytorch_lora_weights.safetensors")
    names = ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
    found = resolve(*(("a/b" + folder, {"first": names}) for folder in ("", ":lora", ":more")))
    assert contents(found) == [
        "model.safetensors",
        "lora/adapter_model.safetensors",
        "more/pytorch_lora_weights.safetensors",
    ]
    assert {"options.json", "lora/adapter_config.json"} <= set(hub.downloads)
    assert resolve.err == ""  # type: ignore[attr-defined]


def test_other_names_of_the_average_are_found_and_named(hub: Hub, resolve: Resolve) -> None:
    hub.repositories["a/b"] = files("model.safetensors", "model_ema.safetensors")
    hub.repositories["a/c"] = files("model.safetensors", "cat.safetensors", "cat_ema.safetensors")
    found = resolve(("a/b", {"ema": True}), ("a/c", {"ema": True}))
    assert contents(found) == ["model_ema.safetensors", "cat_ema.safetensors"]
    assert resolve.err.splitlines() == [  # type: ignore[attr-defined]
        "a/b (revision main) has no ema.safetensors; using model_ema.safetensors",
        "a/c (revision main) has no ema.safetensors; using cat_ema.safetensors",
    ]


def test_explicit_average_is_a_file_of_the_repository_with_or_without_the_flag(hub: Hub, resolve: Resolve) -> None:
    hub.repositories["a/b"] = files("model.safetensors", "ema.safetensors", "old/slow.safetensors", "old/model.pt")
    found = resolve(
        ("a/b", {"ema_file": "old/slow.safetensors"}),
        ("a/b", {"ema_file": "old/slow.safetensors", "ema": True}),
        ("a/b:old", {"ema_file": "slow.safetensors"}),
        ("a/b:old/model", {"ema_file": "slow.safetensors"}),
        ("a/b", {"ema_file": "gone.safetensors"}),
    )
    assert contents(found)[:4] == ["old/slow.safetensors"] * 4
    assert found[4] == "a/b (revision main): gone.safetensors: file not found"


def test_subfolder_is_searched_like_a_folder_here(hub: Hub, resolve: Resolve) -> None:
    hub.repositories["a/b"] = files(
        "config.json", "model.safetensors", "one/config.json", "one/weights.pt", "one/weights.safetensors",
        "two/step_900.safetensors", "two/step_1000.safetensors", "two/step_1000_ema.safetensors", "three/final.pt",
        "four/cat.config.toml", "four/cat-step00000100.safetensors", "four/cat-step00000020.safetensors",
        "five/notes.txt",
    )  # fmt: skip
    found = resolve("a/b:one", "a/b:two", ("a/b:two", {"ema": True}), "a/b:three/", "a/b:four", "a/b:five", "a/b:six")
    assert [entry[0] for entry in found[:5]] == [
        "one/weights.safetensors",
        "two/step_1000.safetensors",
        "two/step_1000_ema.safetensors",
        "three/final.pt",
        "four/cat-step00000100.safetensors",
    ]
    assert [entry[2] for entry in found[:2]] == ["one/config.json", "config.json"]  # beside it, else at the root
    assert found[5].startswith("a/b (revision main): five: holds no weights; looked for model.safetensors, ")
    assert found[5].endswith("found notes.txt")
    assert found[6] == (
        "a/b (revision main): has no file or folder six; it holds config.json, five, four, model.safetensors, one, "
        "three, two"
    )


def test_tail_that_names_a_file_is_that_file_or_its_average(hub: Hub, resolve: Resolve) -> None:
    hub.repositories["a/b"] = files(
        "runs/x/cat.safetensors", "runs/x/cat_ema.safetensors", "runs/x/dog.pt", "config.json"
    )
    found = resolve(
        "a/b:runs/x/cat.safetensors",
        "a/b:runs/x/cat",
        ("a/b:runs/x/cat", {"ema": True}),
        ("a/b:runs/x/cat.safetensors", {"ema": True}),
        "a/b:runs/x/dog",
        ("a/b:runs/x/dog", {"ema": True}),
    )
    cat, average = "runs/x/cat.safetensors", "runs/x/cat_ema.safetensors"
    assert contents(found)[:5] == [cat, cat, average, average, "runs/x/dog.pt"]
    assert {entry[2] for entry in found[:5]} == {"config.json"}
    assert found[5] == (
        "a/b (revision main): runs/x/dog_ema.pt: no averaged weights beside dog.pt; take the model weights instead"
    )


def test_targets_of_the_older_trainer_are_files_of_the_published_repository(hub: Hub, resolve: Resolve) -> None:
    hub.repositories[PUBLISHED] = files(
        "model.safetensors", "config.json", "checkpoints/step_900.safetensors", "checkpoints/step_1000.safetensors",
        "checkpoints/step_1000_ema.safetensors", "checkpoint_runs/v4_init/a_v4_init.safetensors",
    )  # fmt: skip
    found = resolve(
        "hub", "hub:step_900", ("hub:step_1000", {"ema": True}), "hub:checkpoint_runs/v4_init/a_v4_init", "hub:latest"
    )
    assert contents(found) == [
        "model.safetensors",
        "checkpoints/step_900.safetensors",
        "checkpoints/step_1000_ema.safetensors",
        "checkpoint_runs/v4_init/a_v4_init.safetensors",
        "checkpoints/step_1000.safetensors",
    ]


def test_run_folder_on_the_hub_is_read_through_its_list(hub: Hub, resolve: Resolve) -> None:
    entries = {"step_5": {"model": "cat-step00000005.safetensors"}, "final": {"model": "cat.safetensors"}}
    listing = json.dumps({"checkpoints": entries}).encode()
    names = ("run/cat-step00000005.safetensors", "run/cat.safetensors")
    hub.repositories["a/b"] = {**files(*names), "run/checkpoints.json": listing}
    assert contents(resolve("a/b:run", "a/b:run/step_5", "a/b:run/latest", "a/b:run/step_6")) == [
        names[1],
        names[0],
        names[1],
        "a/b (revision main): run: no checkpoint 'step_6'; it has step_5, final",
    ]


def test_what_cannot_be_read_is_explained(hub: Hub, resolve: Resolve) -> None:
    hub.repositories["a/b"] = hub.repositories["a/gated"] = files("model.safetensors")
    hub.gated.add("a/gated")
    token = "no such repository on the hub, or it is private (put your token into HF_TOKEN)."
    assert resolve(("a/b", {"revision": "other"}), "a/gated", "a/none", PUBLISHED, "hub") == [
        "a/b (revision other): no such revision on the hub",
        "a/gated (revision main): access is gated. Accept the licence at https://huggingface.co/a/gated and put your token "
        "into HF_TOKEN",
        f"a/none (revision main): {token}",
        f"{PUBLISHED} (revision main): {token} Did you mean AbstractPhil/tiny-flux-deep?",
        f"{PUBLISHED} (revision main): {token} Did you mean AbstractPhil/tiny-flux-deep?",
    ]


def test_downloaded_files_are_found_again_without_a_connection(hub: Hub, resolve: Resolve) -> None:
    hub.repositories["a/b"] = files("model.safetensors", "ema.safetensors", "config.json")
    online = resolve("a/b")
    hub.downloads.clear()
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}):
        again = resolve("a/b", ("a/b", {"ema": True}), "a/other", **variables)
        assert again[0] == online[0]
        assert again[1].startswith("a/b (revision main): holds no averaged weights; looked for ema.safetensors, ")
        assert again[2] == (
            "a/other (revision main): is not in the local cache and the hub cannot be reached. Connect once, or download the "
            "files and give their folder"
        )
    assert not hub.downloads


def test_local_forms_never_ask_the_hub(resolve: Resolve) -> None:
    assert resolve("best", "none", "./a/b", "/a/b") == [
        "best: names a checkpoint of a run; write its folder too, as in folder:best",
        'none: names no weights; a new model is made with model.init = "scratch"',
        "./a/b: file not found, and not a hub id of the form owner/name",
        "/a/b: file not found, and not a hub id of the form owner/name",
    ]
