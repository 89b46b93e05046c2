"""Run files of several steps: what each begins with, which options reach it, and what is refused."""

import json
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
    assert (on.model.init, on.model.path, on.model.weights) == (
        "checkpoint",
        str(tmp_path / "out/01-warm:final"),
        "ema",
    )
    assert (lora.model.path, lora.model.weights) == (str(tmp_path / "out/02-on:final"), "model")
    assert lora.adapter.init_from is None
    # The model below the second adapter is that below the first.
    assert (more.model.path, more.model.weights) == (str(tmp_path / "out/02-on:final"), "model")
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


def test_an_option_for_one_step_reaches_those_that_start_from_it(write: Any, tmp_path: Path) -> None:
    path = write({"name": "a"}, {"name": "v1.5"}, {"name": "c"})
    _, overrides = split_overrides(["--set", "steps.v1.5.adapter.type=lora", "--set", "steps.c.start=file"], set())
    _, middle, last = load_steps(path, overrides)
    assert middle.adapter.type == "lora" and last.model.init == "scratch"
    with pytest.raises(ConfigError, match=r"step v1\.5 trains an adapter"):
        load_steps(path, {"steps.v1.5.adapter.type": "lora"})
    for option, expected in (
        ("steps.d.train.max_steps", "no step has this name. The steps are a, v1.5, c"),
        ("steps.a.run.output_dir", "run.output_dir: belongs in [run] of the file"),
        ("steps.a.name", "cannot be changed by an option"),
        ("steps.a", "names a step but no setting; write steps.a.section.key=..."),
        ("steps.a.train.max_step", "train.max_step: unknown key. Did you mean 'max_steps'?"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_steps(path, {option: "x"})
        assert expected in str(caught.value)


def test_an_option_for_the_file_does_not_replace_what_a_step_takes_over(write: Any, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    path = write({"name": "a"}, {"name": "b", "train": {"max_steps": 20}})
    given = {"model.init": "checkpoint", "model.path": str(tmp_path / "base"), "max_steps": 7}
    first, second = load_steps(path, given)
    assert first.model.path == str(tmp_path / "base") and first.origins["model.path"] == "cli"
    assert second.model.path == str(tmp_path / "out/01-a:final")
    said = {found.key: found.reason for found in second.findings}
    assert said["train.max_steps"].endswith("to change it there: --set steps.b.train.max_steps=...")
    assert said["model.path"].endswith(
        "is taken by step b from step a, so the option has no effect; to start from the file: --set steps.b.start=file"
    )
    first, second = load_steps(path, {"model.geometry.num_double_layers": 3})
    assert (first.model.geometry, second.model.geometry) == ({"num_double_layers": 3}, {})


def test_options_decide_what_a_step_can_start_from(write: Any) -> None:
    path = write(
        {"name": "a", "adapter": LORA}, {"name": "b"}, adapter={"type": "lora"}, model={"arch": "tf", "path": "hub"}
    )
    with pytest.raises(ConfigError, match="step a trains an adapter"):
        load_steps(path, {"adapter.type": "none"})
    path = write({"name": "a"}, {"name": "b", "start": "previous_ema"}, ema={"enabled": False})
    assert load_steps(path, {"ema.enabled": True})[1].model.weights == "ema"
    with pytest.raises(ConfigError, match="step a keeps no average"):
        load_steps(write({"name": "a"}, {"name": "b", "start": "previous_ema"}), {"ema.enabled": False})


def test_tables_inside_tables_are_laid_key_by_key(write: Any) -> None:
    geometry = {
        "model": {"arch": "tf", "init": "scratch", "geometry": {"num_double_layers": 2, "num_single_layers": 3}}
    }
    (step,) = load_steps(write({"name": "a", "model": {"geometry": {"num_double_layers": 1}}}, **geometry))
    assert step.model.geometry == {"num_double_layers": 1, "num_single_layers": 3}
    with pytest.raises(ConfigError, match=r"model\.geometry\.num_double_layers\.x: is inside"):
        load_steps(write({"name": "a"}, **geometry), {"model.geometry.num_double_layers.x": 3})


def test_warnings_of_a_step_and_of_its_own_data_sets_are_kept(write: Any, tmp_path: Path) -> None:
    data = [{"name": name, "image_directory": str(tmp_path / name)} for name in ("cats", "dogs")]
    data[1]["experts"] = {"enable_lune": False}  # type: ignore[assignment]
    (tmp_path / "a.safetensors").touch()
    adapter = {"type": "lora", "init_from": str(tmp_path / "a.safetensors"), "rank_from_weights": True}
    adapter |= {"targets": [{"pattern": "single_blocks.**", "rank": 2}]}
    steps = [{"name": "a", "use": ["cats"]}, {"name": "b", "use": ["dogs"], "start": "file", "adapter": adapter}]
    model = {"arch": "tf", "path": "hub"}
    first, second = load_steps(write(*steps, datasets=data, model=model))
    assert {"dogs.experts", "adapter.targets[0].rank"} <= {found.key for found in second.findings}
    assert "dogs.experts" not in {found.key for found in first.findings}


def test_a_step_waits_for_the_end_of_the_one_before(write: Any, tmp_path: Path) -> None:
    path = write({"name": "a"}, {"name": "b", "adapter": LORA}, {"name": "c", "adapter": LORA})

    def waits() -> list[str | None]:
        return [config.waits_for and config.waits_for.name for config in load_steps(path)]

    def checkpoints(folder: str, **listed: Any) -> None:
        (tmp_path / "out" / folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"checkpoints": listed})
        (tmp_path / "out" / folder / "checkpoints.json").write_text(text, encoding="utf-8")

    assert waits() == [None, "a", "b"]
    checkpoints("01-a", step_5={"step": 5})
    assert waits() == [None, "a", "b"]
    checkpoints("01-a", step_5={"step": 5}, final={"step": 10})
    assert waits() == [None, None, "b"]
    checkpoints("02-b", final={"step": 10})
    (tmp_path / "out" / "02-b" / "x.safetensors").touch()
    assert waits() == [None, None, None]


@pytest.mark.parametrize(("table", "value"), [("run", 3), ("model", "x"), ("adapter", 3), ("train", [])])
def test_a_value_in_the_place_of_a_table_is_named(table: str, value: Any, write: Any) -> None:
    with pytest.raises(ConfigError, match=f"{table}: is .*expected a table"):
        load_steps(write({"name": "a"}, {"name": "b", table: {}}, **{table: value}))


def test_steps_lie_over_a_table_under_its_other_name(write: Any) -> None:
    path = write({"name": "a", "distributed": {"num_processes": 2}}, accelerate={"num_processes": 3})
    assert load_steps(path)[0].distributed.num_processes == 2
    assert load_steps(path, {"steps.a.accelerate.num_processes": 4})[0].distributed.num_processes == 4
    assert load_steps(write()) == [] and load_config(write()).step is None


def test_two_data_sets_of_one_name_and_option_files_are_refused(write: Any, tmp_path: Path) -> None:
    data = [{"name": "cats", "image_directory": str(tmp_path / name)} for name in ("cats", "dogs")]
    with pytest.raises(ConfigError, match="use: 'cats': 2 data sets have this name"):
        load_steps(write({"name": "a", "use": ["cats"]}, datasets=data))
    option_file = tmp_path / "options.toml"
    option_file.write_text('dit = "x"\nnetwork_dim = 4\n[[steps]]\nname = "a"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="steps: need a run file"):
        load_steps(option_file)


def test_a_home_folder_is_found(write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _, second = load_steps(write({"name": "a"}, {"name": "b"}, run={"name": "x", "output_dir": "~/out"}))
    assert second.model.path == str(tmp_path / "out/01-a:final") and second.waits_for is not None


def test_a_file_without_steps_has_none_and_one_with_steps_needs_a_name(write: Any, tmp_path: Path) -> None:
    path = write({"name": "a"}, {"name": "b"})
    with pytest.raises(ConfigError, match=r"has steps \(a, b\), but this command needs one of them; add --step NAME"):
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
    path = write({"name": "a", "until": {"metric": "loss/main", "below": 1, "patience": 2}})
    (config,) = load_steps(path, {"steps.a.until.below": 2})
    assert config.step is not None and config.step.until == Until("loss/main", 2.0, 0, 2)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([{"name": "a", "start": "previous"}], 'steps[0].start: is "previous", but the first step has no previous step'),
        ([{"name": "a"}, {"name": "a"}], "steps[1].name: is 'a', which another step has too"),
        ([{"name": "a/b"}], "steps[0].name: is 'a/b', expected a text that is valid as a folder name"),
        ([{"name": "a"}, {"name": "b", "start": "previos"}], "steps[1].start: is 'previos', expected one of file, previous"),
        ([{"name": "a", "use": "cats"}], "steps[0].use: is 'cats', expected a list"),
        ([{"name": "a", "use": ["cat"]}], "use: 'cat': no data set has this name. Did you mean 'cats'?"),
        ([{"name": "a", "max_steps": 5}], "steps[0].max_steps: unknown key."),
        ([{"name": "a", "train": {"max_step": 5}}], "train.max_step: unknown key. Did you mean 'max_steps'?"),
        ([{"name": "a", "run": {"output_dir": "x"}}], "steps[0].run.output_dir: belongs in [run] of the file"),
        ([{"name": "a", "until": {"metric": "loss/main"}}], "steps[0].until: has no below"),
        ([{"name": "a", "until": {"metric": "l", "below": 1, "pateince": 2}}], "steps[0].until.pateince: unknown key. Did you mean 'patience'?"),
        ([{"name": "a", "until": {"metric": "l", "below": 1, "patience": 0}}], "steps[0].until.patience: is 0, expected a whole number, 1 or more"),
        ([{"name": "a", "until": {"metric": "l", "below": 1, "min_epochs": -1}}], "min_epochs: is -1, expected a whole number, 0 or more"),
        ([{"name": "a", "until": {"metric": " ", "below": 1}}], "steps[0].until.metric: is ' ', expected a tag of metrics.jsonl"),
        ([{"name": "a", "until": {"metric": "l", "below": float("nan")}}], "steps[0].until.below: is nan, expected a number"),
        ([{"name": "a", "until": {"metric": "loss/val", "below": 1}}], "until.metric: is 'loss/val', but nothing is validated"),
        ([{"name": "a\n"}], "steps[0].name: is 'a\\n', expected a text"),
        ([{"name": "a."}], "steps[0].name: is 'a.', expected a text"),
        ([{"name": "a=b"}], "steps[0].name: is 'a=b', expected a text"),
        ([{"name": "a "}], "steps[0].name: is 'a ', expected a text"),
        ([{"name": "a" * 101}], "expected a text that is valid as a folder name"),
        ([{"name": "a", "accelerate": {}, "distributed": {}}], "steps[0].accelerate: is another name of [distributed]"),
        ([{"name": "a", "ema": {"enabled": False}}, {"name": "b", "start": "previous_ema"}],
         "start: is \"previous_ema\", but step a keeps no average"),
        ([{"name": "a", "until": {"metric": "l", "below": True}}], "steps[0].until.below: is True, expected a number"),
        ([{"name": "a", "model": {"init": "checkpoint", "path": "hub"}, "adapter": LORA}, {"name": "b"}],
         'start: is "previous", but step a trains an adapter'),
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
