"""Run files of several steps: what each begins with, which options reach it, and what is refused."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from musubi_tuner.config import load_config
from musubi_tuner.config.command_line import override_arguments, split_overrides
from musubi_tuner.config.load import load_steps
from musubi_tuner.config.pipeline import Until
from musubi_tuner.errors import ConfigError

LORA = {"type": "lora", "rank": 4}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def make(*steps: dict[str, Any], **tables: Any) -> Path:
        for name in ("cats", "dogs"):
            (tmp_path / name).mkdir(exist_ok=True)
        document = {
            "schema_version": 1,
            "run": {"name": "x", "output_dir": str(tmp_path / "out")},
            "model": {"arch": "tf", "init": "scratch"},
            "experts": {"expert_input": "random", "enable_lune": False, "enable_sol": False},
            "cache": {"run": "never"},
            "train": {"max_steps": 10},
            "scheduler": {"warmup_steps": 0},
            "datasets": [{"name": name, "image_directory": str(tmp_path / name)} for name in ("cats", "dogs")],
            **tables,
            "steps": list(steps),
        }
        path = tmp_path / "run.toml"
        path.write_text(tomli_w.dumps(document), encoding="utf-8")
        return path

    return make


def test_each_step_is_a_run_in_a_folder_of_its_own_that_begins_with_the_one_before(write: Any, tmp_path: Path) -> None:
    path = write(
        {"name": "warm", "use": ["cats"]},
        {"name": "on", "start": "previous_ema", "train": {"max_steps": 20}},
        {"name": "lora", "adapter": LORA, "use": ["dogs"]},
        {"name": "more", "adapter": LORA, "start": "previous_ema"},
        {"name": "anew", "start": "file"},
    )
    warm, on, lora, more, anew = load_steps(path)
    folders = ["01-warm", "02-on", "03-lora", "04-more", "05-anew"]
    assert [config.output_dir for config in (warm, on, lora, more, anew)] == [tmp_path / "out" / f for f in folders]
    assert [config.run.name for config in (warm, more)] == ["x", "x"]
    assert [[dataset.name for dataset in config.datasets] for config in (warm, on, lora)] == [
        ["cats"], ["cats", "dogs"], ["dogs"],
    ]  # fmt: skip
    assert (warm.model.init, warm.model.path) == ("scratch", None)
    assert (on.model.init, on.model.path, on.model.weights) == ("checkpoint", str(tmp_path / "out/01-warm"), "ema")
    assert (lora.model.path, lora.model.weights) == (str(tmp_path / "out/02-on"), "model")
    assert lora.adapter.init_from is None
    # The model below the second adapter is that below the first.
    assert (more.model.path, more.model.weights) == (str(tmp_path / "out/02-on"), "model")
    assert more.adapter.init_from == str(tmp_path / "out/03-lora/x_ema.safetensors")
    assert (anew.model.init, anew.adapter.init_from) == ("scratch", None)
    assert [config.train.max_steps for config in (warm, on)] == [10, 20]


def test_options_lie_over_the_file_before_the_steps_and_may_name_one(write: Any, tmp_path: Path) -> None:
    path = write({"name": "a"}, {"name": "b", "train": {"max_steps": 20}}, {"name": "c"})
    words = ["--max_steps", "7", "--set", "steps.c.optimizer.lr=0.5", "--set", f"run.output_dir={tmp_path / 'other'}"]
    _, overrides = split_overrides(words, set())
    steps = load_steps(path, overrides)
    assert [config.train.max_steps for config in steps] == [7, 20, 7]
    assert [config.optimizer.lr == 0.5 for config in steps] == [False, False, True]
    assert steps[1].output_dir == tmp_path / "other" / "02-b"
    # A child is told which step it works for.
    _, again = split_overrides(override_arguments({**overrides, "step": "c"}), set())
    assert load_config(path, again).output_dir == tmp_path / "other" / "03-c"
    assert load_config(path, again).optimizer.lr == 0.5


def test_a_file_without_steps_has_none_and_one_with_steps_needs_a_name(write: Any, tmp_path: Path) -> None:
    path = write({"name": "a"}, {"name": "b"})
    with pytest.raises(ConfigError, match=r"has steps \(a, b\), and this command needs one of them: --step NAME"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"has no step 'bb'.*Its steps: a, b"):
        load_config(path, {"step": "bb"})
    plain = tmp_path / "plain.toml"
    document = {key: value for key, value in tomllib.loads(path.read_text(encoding="utf-8")).items() if key != "steps"}
    plain.write_text(tomli_w.dumps(document), encoding="utf-8")
    assert load_steps(plain) == []
    with pytest.raises(ConfigError, match=r"has no \[\[steps\]\]"):
        load_config(plain, {"step": "a"})


def test_the_end_by_a_metric_is_read(write: Any) -> None:
    path = write({"name": "a", "until": {"metric": "loss/val", "below": 1, "patience": 2}})
    (config,) = load_steps(path)
    assert config.step is not None and config.step.until == Until("loss/val", 1.0, 0, 2)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([{"name": "a", "start": "previous"}], 'steps[0].start: is "previous", and no step comes before'),
        ([{"name": "a"}, {"name": "a"}], "steps[1].name: is 'a' twice"),
        ([{"name": "a/b"}], "steps[0].name: is 'a/b', expected a name that a folder can have"),
        ([{"name": "a"}, {"name": "b", "start": "previos"}], "steps[1].start: is 'previos', expected one of file, previous"),
        ([{"name": "a", "use": "cats"}], "steps[0].use: is 'cats', expected a list"),
        ([{"name": "a", "use": ["cat"]}], "use: 'cat': no data set has this name. Did you mean 'cats'?"),
        ([{"name": "a", "max_steps": 5}], "steps[0].max_steps: unknown key."),
        ([{"name": "a", "train": {"max_step": 5}}], "train.max_step: unknown key. Did you mean 'max_steps'?"),
        ([{"name": "a", "run": {"output_dir": "x"}}], "steps[0].run.output_dir: belongs to the file"),
        ([{"name": "a", "until": {"metric": "loss/main"}}], "steps[0].until: has no below"),
        ([{"name": "a", "until": {"metric": "l", "below": 1, "pateince": 2}}], "steps[0].until.pateince: unknown key. Did you mean 'patience'?"),
        ([{"name": "a", "until": {"metric": "l", "below": 1, "patience": 0}}], "steps[0].until.patience: is 0, expected a whole number"),
        ([{"name": "a", "until": {"metric": "l", "below": True}}], "steps[0].until.below: is True, expected a number"),
        ([{"name": "a", "model": {"init": "checkpoint", "path": "hub"}, "adapter": LORA}, {"name": "b"}],
         'start: is "previous", and step a trains an adapter'),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_the_step(steps: list[dict[str, Any]], expected: str, write: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_steps(write(*steps))
    assert expected in str(caught.value)


def test_mistakes_of_all_steps_come_together(write: Any) -> None:
    path = write({"name": "a", "train": {"max_steps": 0}}, {"name": "b", "optimizer": {"lr": "x"}})
    with pytest.raises(ConfigError) as caught:
        load_steps(path)
    assert "run.toml, step a: " in str(caught.value) and "run.toml, step b: " in str(caught.value)


def test_what_acts_in_another_step_is_no_finding_of_this_one(write: Any) -> None:
    off = {"enable_lune": False, "enable_sol": False}
    tables = {"experts": {"expert_input": "random", "unet": "owner/unet", "lune": "owner/lune", "sol": "owner/sol"}}
    first, second = load_steps(write({"name": "a", "experts": off}, {"name": "b"}, **tables))
    assert [finding.key for finding in first.findings + second.findings] == []
    first, second = load_steps(write({"name": "a", "experts": off}, {"name": "b", "experts": off}, **tables))
    assert "experts.lune" in [finding.key for finding in first.findings]
    assert second.findings == []
    (only,) = load_steps(write({"name": "a", "experts": {**off, "lune": "owner/lune"}}, **tables))
    assert "experts.lune" in [finding.key for finding in only.findings]
