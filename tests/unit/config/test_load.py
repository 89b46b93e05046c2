"""Reading a run file: what is accepted, where values come from, and what is said about mistakes."""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import ValidationError

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.config.command_line import split_overrides
from musubi_tuner.config.diagnostics import Diagnostic
from musubi_tuner.config.fields import Section
from musubi_tuner.config.load import parse_value
from musubi_tuner.config.other_words import plain_words
from musubi_tuner.config.paths import is_hub_id, locate
from musubi_tuner.config.prompts import read_prompts
from musubi_tuner.config.schema import flat_names, parameters, section_classes
from musubi_tuner.config.write import resolved_toml
from musubi_tuner.errors import ConfigError
from musubi_tuner.models.registry import MODELS

ROOT = Path(__file__).parents[3]

Write = Callable[..., Path]
Load = Callable[..., RunConfig]
Problems = Callable[..., list[str]]


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


def refusal_of(content: str, folder: Path) -> str:
    path = folder / "run.toml"
    path.write_text(content, encoding="utf-8")
    return refusal(path)


# A good file


def test_good_file_loads_without_findings(load: Load, project: Path) -> None:
    config = load()
    assert config.findings == []
    assert config.path == project / "run.toml"
    assert (config.run.name, config.train.max_steps, config.spec.code) == ("cat", 2000, "tf")
    assert [dataset.name for dataset in config.datasets] == ["datasets[0]"]


def test_full_name_of_a_family_finds_it_too(load: Load) -> None:
    assert load(model='arch = "tinyflux"').spec.code == "tf"


def test_config_cannot_be_changed(load: Load) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().train.max_steps = 3


def test_whole_number_is_accepted_for_a_number(load: Load) -> None:
    lr = load(optimizer="lr = 1").optimizer.lr
    assert lr == 1.0
    assert isinstance(lr, float)


def test_dataset_tables_may_come_from_a_file(load: Load, project: Path) -> None:
    (project / "data.toml").write_text('[[datasets]]\nimage_directory = "images"\nbatch_size = 3\n', encoding="utf-8")
    config = load(top='dataset_config = "data.toml"', data="")
    assert [dataset.batch_size for dataset in config.datasets] == [3]


def test_accelerate_is_another_name_of_distributed(load: Load) -> None:
    config = load(accelerate="num_processes = 2")
    assert config.distributed.num_processes == 2
    assert config.origins["distributed.num_processes"] == "file"


def test_every_default_satisfies_its_own_limits() -> None:
    for spec in map(MODELS.__getitem__, MODELS):
        classes = section_classes(spec)
        for parameter in parameters(spec):
            if parameter.section and not parameter.required:
                value = parameter.field.get_default(call_default_factory=True)
                required = {p.name: "x" for p in parameters(spec) if p.section == parameter.section and p.required}
                section = classes[parameter.section].model_validate({**required, parameter.name: value})
                plain = value.model_dump(by_alias=True) if isinstance(value, Section) else value
                assert section.model_dump(by_alias=True)[parameter.name] == plain, parameter.key


def test_every_setting_has_one_sentence_of_help() -> None:
    for parameter in parameters():
        assert parameter.help.endswith("."), parameter.key


# Origins and overrides


def test_origins_tell_default_family_file_and_command_line_apart(load: Load) -> None:
    config = load({"run.seed": 5}, optimizer="lr = 0.5")
    assert {key: config.origins[key] for key in ("run.seed", "optimizer.lr", "optimizer.betas", "ema.decay")} == {
        "run.seed": "cli",
        "optimizer.lr": "file",
        "optimizer.betas": "arch",
        "ema.decay": "default",
    }
    assert {"run.seed", "optimizer.lr"} <= set(config.set_keys())
    assert not {"optimizer.betas", "ema.decay"} & set(config.set_keys())


def test_every_setting_has_an_origin_and_a_value(load: Load) -> None:
    config = load(demo='folder = "demo"')
    values = config.model_dump(by_alias=True)
    for parameter in parameters(config.spec):
        assert config.origins[parameter.key] in ("default", "arch", "file", "cli")
        table = values[parameter.section] if parameter.section else values
        assert config.get(parameter.key) == table[parameter.name]


def test_value_of_an_absent_table_is_none(load: Load) -> None:
    assert load().get("demo.folder") is None


def test_family_default_is_used_and_the_file_wins_over_it(load: Load) -> None:
    assert load().optimizer.betas == [0.9, 0.95]
    assert load(optimizer="betas = [0.8, 0.9]").optimizer.betas == [0.8, 0.9]


def test_command_line_wins_over_the_file_by_dotted_key_and_by_flat_name(load: Load) -> None:
    assert load({"train.max_steps": 3000}).train.max_steps == 3000
    assert load({"max_train_steps": 3000}).train.max_steps == 3000
    assert load({"max_steps": 3000}).origins["train.max_steps"] == "cli"


def test_override_of_a_renamed_field_reaches_it(load: Load) -> None:
    config = load({"resume": "none"})
    assert config.resume.from_ == "none"
    assert config.get("resume.from") == "none"


def test_override_may_set_one_field_of_the_geometry(load: Load) -> None:
    config = load(
        {"model.geometry.num_double_layers": 2, "experts.vae": "vae.safetensors"},
        model='init = "scratch"\ngeometry = {num_single_layers = 3}',
        without=("model.path",),
    )
    assert config.model.geometry == {"num_single_layers": 3, "num_double_layers": 2}
    assert config.origins["model.geometry"] == "cli"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("max_train_stepz", "max_train_stepz: unknown key. Did you mean 'max_train_steps'?"),
        ("train.max_step", "train.max_step: unknown key. Did you mean 'train.max_steps'?"),
        ("zzz", "zzz: unknown key."),
    ],
)
def test_unknown_override_is_named(key: str, message: str, problems: Problems) -> None:
    assert problems({key: 7}) == [message]


def test_override_of_a_wrong_type_is_named(problems: Problems) -> None:
    assert problems({"max_train_steps": "seven"}) == [
        "train.max_steps: is 'seven', expected a whole number at least 1 and at most 1000000000"
    ]


@pytest.mark.parametrize("line", ["geometry = 4", "geometry = []"])
def test_override_of_a_geometry_that_is_no_table(line: str, problems: Problems) -> None:
    found = problems({"model.geometry.hidden_size": 64}, model=line)
    assert [text.partition(":")[0] for text in found] == ["model.geometry"]


def test_override_of_a_section_that_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("run = 3\nmodel = 4\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="model: is 4, expected a table"):
        load_config(path, {"model.geometry.hidden_size": 64, "run.seed": 1})


def setting(key: str) -> Any:
    return next(parameter for parameter in parameters() if parameter.key == key)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.max_steps", "10", 10),
        ("train.max_steps", "none", None),
        ("train.max_steps", "ten", "ten"),
        ("optimizer.lr", "1e-4", 1e-4),
        ("optimizer.betas", "[0.9, 0.99]", [0.9, 0.99]),
        ("ema.enabled", "false", False),
        ("ema.enabled", "False", "False"),
        ("run.name", "7", "7"),
        ("optimizer.type", "AdamW", "AdamW"),
        ("sample.prompts", "prompts.txt", "prompts.txt"),
        ("sample.prompts", '["a cat", "a dog"]', ["a cat", "a dog"]),
        ("schema_version", "1", 1),
    ],
)
def test_command_line_text_is_read_as_the_type_of_its_setting(key: str, text: str, value: Any) -> None:
    parsed = parse_value(setting(key), text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_flat_name_belongs_to_one_setting_only() -> None:
    names = flat_names()
    assert names["max_train_steps"].key == "train.max_steps"
    assert names["learning_rate"].key == "optimizer.lr"
    # Several tables have a key called seed, and claim it for the run's; nobody claims every_steps.
    assert names["seed"].key == "run.seed"
    assert names["sample_seed"].key == "sample.seed"
    assert "every_steps" not in names


def test_flat_resolution_is_not_the_one_of_the_teachers() -> None:
    assert "experts.resolution" not in [setting.key for name, setting in flat_names().items() if name == "resolution"]


# Mistakes in keys


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        ("train", "max_stepz = 3", "train.max_stepz: unknown key. Did you mean 'max_steps'?"),
        ("train", "betas = [0.9, 0.9]", "train.betas: unknown key. It is written [optimizer] betas."),
        ("train", "qqq = 3", "train.qqq: unknown key."),
        ("demo", 'folder = "d"\nsiz = 64', "demo.siz: unknown key. Did you mean 'size'?"),
    ],
)
def test_unknown_key_of_a_section(table: str, line: str, message: str, problems: Problems) -> None:
    assert problems(**{table: line}) == [message]


def test_the_name_of_an_optimizer_is_read_in_any_spelling(load: Callable[..., RunConfig], problems: Problems) -> None:
    for name in ("prodigy", "PRODIGY", "prodigyopt.Prodigy"):
        assert load(optimizer=f'type = "{name}"').optimizer.type == "Prodigy"
    (said,) = problems(optimizer='type = "prodgy"')
    assert said.startswith("optimizer.type: is 'prodgy', expected one of AdamW, ") and said.endswith(
        "Did you mean 'Prodigy'?"
    )


@pytest.mark.parametrize("key", ["batch_size", "num_repeats", "resolution", "caption_extension"])
def test_key_about_items_is_sent_to_the_dataset_tables(key: str, problems: Problems) -> None:
    (message,) = problems(train=f"{key} = 4")
    assert "Did you mean" not in message
    assert "[general]" in message


def test_an_option_about_items_that_every_data_set_overrides_is_named_and_the_data_sets_stay(load: Load) -> None:
    data = '[[datasets]]\nimage_directory = "images"\nbatch_size = 3\n'
    config = load({"batch_size": 2}, data=data)
    assert [dataset.batch_size for dataset in config.datasets] == [3]
    assert [(found.code, found.key) for found in config.findings] == [("NA03", "general.batch_size")]


def test_an_option_about_items_beside_a_general_that_is_no_table(problems: Problems) -> None:
    data = '[[datasets]]\nimage_directory = "images"\n'
    assert problems({"batch_size": 2}, top="general = 5", data=data) == ["general: is 5, expected a table"]


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ("tran = {max_steps = 3}", "tran: unknown table. Did you mean 'train'?"),
        ("qqq = 3", "qqq: unknown key."),
    ],
)
def test_unknown_name_at_the_top(top: str, message: str, problems: Problems) -> None:
    assert problems(top=top) == [message]


@pytest.mark.long
def test_letter_doubled_in_any_key_is_recognised(write: Write) -> None:
    unrecognised = []
    for parameter in parameters(MODELS["tf"]):
        name = parameter.name
        if not parameter.section or parameter.section == "demo" or len(name) < 4:
            continue
        middle = len(name) // 2
        mistyped = name[: middle + 1] + name[middle:]
        message = refusal(write(**{parameter.section: f"{mistyped} = 1"}))
        if f"{parameter.section}.{mistyped}: unknown key. Did you mean '{name}'?" not in message:
            unrecognised.append(parameter.key)
    assert unrecognised == []


def test_a_key_of_another_family_is_reported_with_what_else_is_wrong(problems: Problems) -> None:
    found = problems(
        model='arch = "fd"\nrope_freqs = "exact"',
        objective="min_timestep = 9\nmax_timestep = 3",
        without=("experts.unet",),
    )
    assert "model.rope_freqs: is a setting of TinyFlux-Deep; FLUX.1-dev does not have it" in found
    assert "objective.min_timestep: is 9, expected a value below max_timestep = 3" in found


def test_both_names_of_one_section_are_one_error(problems: Problems) -> None:
    assert problems(accelerate="num_processes = 2", distributed="num_processes = 2") == [
        "accelerate: is another name of [distributed]; keep one"
    ]


def test_mistyped_key_under_the_other_name_of_a_section(problems: Problems) -> None:
    assert problems(accelerate="num_processs = 2") == [
        "distributed.num_processs: unknown key. Did you mean 'num_processes'?"
    ]


@pytest.mark.parametrize("line", ["discrete_flow_shift = 3", "discrete_flow_shift = 3.0", "flux_shift = 3"])
@pytest.mark.parametrize("table", ["objective", "train", "sample"])
def test_shift_of_flux_prints_the_equivalent_of_the_family(table: str, line: str, problems: Problems) -> None:
    assert problems(**{table: line}) == [
        f"{table}.{line.partition(' ')[0]}: is FLUX's shift, which pushes towards noise; TinyFlux counts time "
        "from noise to data, where the same factor pushes the other way. Write objective.shift = 0.333333 instead"
    ]


def test_shift_of_flux_at_the_top_or_on_the_command_line_prints_the_equivalent_too(problems: Problems) -> None:
    given = ((problems(top="discrete_flow_shift = 3"), ""), (problems({"discrete_flow_shift": 3}), "objective."))
    for found, section in given:
        assert len(found) == 1
        assert found[0].startswith(f"{section}discrete_flow_shift: is FLUX's shift")
        assert found[0].endswith("Write objective.shift = 0.333333 instead")


def test_shift_of_flux_without_an_equivalent_names_the_key_only(problems: Problems) -> None:
    (message,) = problems(train="discrete_flow_shift = 0")
    assert message.endswith("Write objective.shift instead")


# Mistakes in values


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        ("run", 'seed = "4"', "run.seed: is '4', expected a whole number at least 0 and below 4294967296"),
        ("run", "seed = true", "run.seed: is True, expected a whole number at least 0 and below 4294967296"),
        ("run", "seed = 4.0", "run.seed: is 4.0, expected a whole number at least 0 and below 4294967296"),
        ("run", "seed = -1", "run.seed: is -1, expected a whole number at least 0 and below 4294967296"),
        ("run", "name = 3", "run.name: is 3, expected a text of at most 100 letters, digits, dots, spaces, - and _, not of dots alone"),
        ("run", 'name = "a/b"', "run.name: is 'a/b', expected a text of at most 100 letters, digits, dots, spaces, - and _, not of dots alone"),
        ("run", 'name = ".."', "run.name: is '..', expected a text of at most 100 letters, digits, dots, spaces, - and _, not of dots alone"),
        ("run", 'output_dir = ""', "run.output_dir: is '', expected a path"),
        ("model", 'path = ""', "model.path: is '', expected a path"),
        ("train", "max_grad_norm = inf", "train.max_grad_norm: is inf, expected a finite number at least 0"),
        ("adapter", 'type = "lora"\nalpha_patterns = {a = nan}', "adapter.alpha_patterns: is nan, expected a finite number"),
        ("run", 'strict = "yes"', "run.strict: is 'yes', expected true or false"),
        ("run", "strict = 1", "run.strict: is 1, expected true or false"),
        ("optimizer", "lr = true", "optimizer.lr: is True, expected a number at least 0 and at most 10"),
        ("optimizer", 'lr = "1e-4"', "optimizer.lr: is '1e-4', expected a number at least 0 and at most 10"),
        ("optimizer", "lr = nan", "optimizer.lr: is nan, expected a finite number at least 0 and at most 10"),
        ("optimizer", "lr = inf", "optimizer.lr: is inf, expected a finite number at least 0 and at most 10"),
        ("objective", "shift = 0", "objective.shift: is 0, expected a number above 0 and at most 100"),
        ("objective", "shift = nan", "objective.shift: is nan, expected a finite number above 0 and at most 100"),
        ("scheduler", 'type = "piecewise_constant"\nrules = "1:20,0.1:10,0.01"', "scheduler.rules: is '1:20,0.1:10,0.01', expected updates that increase from piece to piece"),
        ("ema", "decay = 1.0", "ema.decay: is 1.0, expected a number at least 0 and below 1"),
        ("experts", "resolution = 500", "experts.resolution: is 500, expected a whole number at least 64 and at most "
                                        "2048 and a multiple of 64"),
        ("train", "max_steps = 0", "train.max_steps: is 0, expected a whole number at least 1 and at most 1000000000"),
        ("model", "geometry = 4", "model.geometry: is 4, expected table"),
        ("optimizer", "betas = [0.9]", "optimizer.betas: is [0.9], expected list of float length at least 2 and length "
                                       "at most 3"),
        ("optimizer", 'betas = ["a", 0.9]', "optimizer.betas: is 'a', expected list of float length at least 2 and "
                                            "length at most 3"),
        ("hub", "token = 3", "hub.token: is ***, expected a text"),
        ("objective", 'loss = "l0"', "objective.loss: is 'l0', expected one of l2, l1, huber, smooth_l1, pseudo_huber, pseudo_smooth_l1."),
        ("objective", "loss = 2", "objective.loss: is 2, expected one of l2, l1, huber, smooth_l1, pseudo_huber, pseudo_smooth_l1"),
        ("sample", "prompts = 3", "sample.prompts: is 3, expected list of text or text"),
        ("sample", 'prompts = ["a", 3]', "sample.prompts: is 3, expected list of text or text"),
    ],
)  # fmt: skip
def test_wrong_value(table: str, line: str, message: str, problems: Problems) -> None:
    assert problems(**{table: line}) == [message]


@pytest.mark.parametrize(
    ("table", "key"),
    [("model", "path"), ("model", "vae_path"), ("adapter", "init_from"), ("sample", "prompts"), ("resume", "from")],
)
@pytest.mark.parametrize("value", ["a cat, " * 60, "~nobody-of-this-name/m"])
def test_a_text_that_no_file_can_be_called_is_found_under_its_key(
    table: str, key: str, value: str, problems: Problems
) -> None:
    own = 'type = "lora"\n' if table == "adapter" else ""
    found = problems(**{table: f'{own}{key} = "{value}"'})
    assert found[0].startswith(f"{table}.{key}: ") and len(found) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a = " + "9" * 5000, "not valid TOML: a number has too many digits"),
        ("a = " + "[" * 3000 + "]" * 3000, "not valid TOML: nested too deeply"),
        (".".join("a" * 3000) + " = 1", "is nested more than 50 levels deep"),
        ('a = "\\u0000"', "a text has a NUL character"),
    ],
)
def test_what_no_config_holds_is_refused(content: str, message: str, tmp_path: Path) -> None:
    assert message in refusal_of(content, tmp_path)


def test_a_file_of_another_trainer_is_not_called_broken_toml(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("job: extension\n")
    assert f"python -m musubi_tuner.config import {path}" in refusal(path)


def test_a_list_of_data_sets_with_something_else_in_it(problems: Problems) -> None:
    found = problems(top='datasets = [{image_directory = "images", shuffle_caption = true}, 5]', data="")
    assert found[0] == "datasets[1]: is 5, expected a table"


def test_secret_value_is_never_printed(problems: Problems) -> None:
    for line in ('token = ["hf_abc"]', 'tokn = "hf_abc"'):
        assert not any("hf_abc" in message for message in problems(hub=line))
    of_data_set = problems(data='[[datasets]]\nimage_directory = "images"\nhub_token = "hf_abc"\nwandb_key = "abc123"')
    assert len(of_data_set) == 2 and not any("abc" in message for message in of_data_set)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("run.name", "run.name: is required. Name of the run; names of output files begin with it."),
        ("run.output_dir", "run.output_dir: is required. Folder for checkpoints, states, samples and logs."),
        ("model.arch", "model.arch: is required. Code or full name of the model family."),
    ],
)
def test_missing_required_key(remove: str, message: str, problems: Problems) -> None:
    assert problems(without=(remove,)) == [message]


def test_missing_required_table(tmp_path: Path) -> None:
    message = refusal_of('schema_version = 1\n[model]\narch = "tf"\n', tmp_path)
    assert "\n  run: is required." in message


def test_section_that_is_no_table(tmp_path: Path) -> None:
    message = refusal_of("run = 3\nmodel = 4\n", tmp_path)
    assert message.endswith("2 problems\n  run: is 3, expected a table\n  model: is 4, expected a table")


@pytest.mark.parametrize("version", ["2", '"1"', "0", "true"])
def test_other_schema_version_is_refused(version: str, tmp_path: Path) -> None:
    message = refusal_of(f'schema_version = {version}\n[run]\nname = "a"\n[model]\narch = "tf"\n', tmp_path)
    assert "schema_version: is " in message
    assert "Did you mean" not in message


# The family


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            "tinyfluxx",
            "'tinyfluxx': is not a model family. Did you mean 'tinyflux'? Supported: tf, tinyflux, fd, flux_dev, ff, fluxflow",
        ),
        (
            "sdxl",
            "'sdxl': is one of the U-Net models, which this program does not train. Supported: tf, tinyflux, fd, flux_dev, ff, fluxflow",
        ),
    ],
)
def test_unknown_family(arch: str, message: str, problems: Problems) -> None:
    assert problems(model=f'arch = "{arch}"') == [f"model.arch: {message}"]


@pytest.mark.parametrize(("arch", "reason"), [("flux_dev", "FLUX.1"), ("fluxflow", "FluxFlow")])
def test_full_name_of_a_family_gives_its_reasons_too(arch: str, reason: str, problems: Problems) -> None:
    assert reason in "\n".join(problems(model=f'arch = "{arch}"'))


def test_family_that_is_no_text(problems: Problems) -> None:
    assert problems(model="arch = 3") == ["model.arch: is 3, expected a text"]


# Several problems


def test_all_problems_are_reported_together_with_those_of_the_datasets(problems: Problems) -> None:
    found = problems(
        run='seed = "a"',
        train="max_stepz = 3",
        top="qqq = 1",
        data='[general]\nbatch_size = true\n[[datasets]]\nimage_directry = "images"\n',
    )
    assert sorted(found) == [
        "datasets[0].image_directry: unknown key. Did you mean 'image_directory'?",
        "datasets[0]: has no images; set image_directory, image_jsonl_file, shards or dataset_name (or precached, for caches without them)",
        "general.batch_size: is True, expected a whole number at least 1 and at most 4096",
        "qqq: unknown key.",
        "run.seed: is 'a', expected a whole number at least 0 and below 4294967296",
        "train.max_stepz: unknown key. Did you mean 'max_steps'?",
    ]


def test_problems_between_settings_are_reported_with_those_of_the_datasets(problems: Problems) -> None:
    found = problems(without=("model.path",), data="[[datasets]]\n")
    assert found == [
        "datasets[0]: has no images; set image_directory, image_jsonl_file, shards or dataset_name (or precached, for caches without them)",
        'model.path: is required; or set init = "scratch" to train a new model',
    ]


# Files that cannot be read


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "gone.toml"
    assert refusal(path) == f"{path}: no such file; run `python train.py` to list the run files here"


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: is a folder, expected a TOML file"


def test_marks_of_windows_editors_are_read_over(load: Load, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run file, the data set file and prompt files of every kind."""
    load()
    text = (project / "run.toml").read_text(encoding="utf-8")
    document = tomllib.loads(text)
    tables = {key: document.pop(key) for key in ("general", "datasets") if key in document}
    (project / "data.toml").write_text(tomli_w.dumps(tables), encoding="utf-8-sig")
    document["dataset_config"] = str(project / "data.toml")
    (project / "run.toml").write_text(tomli_w.dumps(document), encoding="utf-8-sig")
    assert len(load_config(project / "run.toml").datasets) == len(tables["datasets"])
    prompts = {
        "p.txt": "un café\r\n",
        "p.json": '["un café"]',
        "p.toml": "[prompt]\n[[prompt.subset]]\nprompt = 'un café'\n",
    }
    for name, content in prompts.items():
        (project / name).write_text(content, encoding="utf-8-sig")
        assert [prompt.text for prompt in read_prompts(project / name)] == ["un café"]
        (project / name).write_text(content, encoding="utf-16")
        with pytest.raises(ConfigError, match=rf"{name}: is UTF-16 text; convert it to UTF-8"):
            read_prompts(project / name)


def test_a_path_with_eaten_backslashes_is_named(tmp_path: Path) -> None:
    said = refusal_of('schema_version = 1\n[[datasets]]\nimage_directory = "C:\\temp\\new"\n', tmp_path)
    assert r"'C:\temp\new' was written as a path" in said and "single quotes" in said


def test_quotes_of_a_word_processor_are_named(tmp_path: Path) -> None:
    assert "straight quotes" in refusal_of("schema_version = 1\n[run]\nname = \u201ccat\u201d\n", tmp_path)


def test_an_output_folder_that_libraries_cannot_read_is_refused(load: Load, project: Path) -> None:
    load()
    with pytest.raises(ConfigError, match=r"run\.output_dir.*'out\\udce9', which is not valid UTF-8"):
        load_config(project / "run.toml", {"run.output_dir": os.fsdecode(b"out\xe9")})


def test_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"# ok\n\xff\xfe")
    said = refusal(path)
    assert f"{path}: is not UTF-8 text: line 2 holds the byte FF" in said and "convert it to UTF-8" in said


def test_file_that_is_not_toml_names_the_line(tmp_path: Path) -> None:
    message = refusal_of("[run]\nname =\n", tmp_path)
    assert message == f"{tmp_path / 'run.toml'}: not valid TOML: Invalid value (at line 2, column 7)"


@pytest.mark.parametrize("path", ["C:\\models\\tf", "C:\\users\\me", "D:\\x"])
def test_windows_path_in_double_quotes_gets_advice(path: str, tmp_path: Path) -> None:
    message = refusal_of(f'[model]\npath = "{path}"\n', tmp_path)
    assert "not valid TOML: " in message
    assert message.endswith("; in double quotes a backslash begins an escape: write Windows paths in 'single quotes'")


def test_windows_path_in_single_quotes_is_read(load: Load) -> None:
    assert load(cache='run = "never"', model="vae_path = 'a/b'").model.vae_path == "a/b"


def test_nesting_without_end_is_not_toml(tmp_path: Path) -> None:
    message = refusal_of("a = " + "[" * 100_000, tmp_path)
    assert message == f"{tmp_path / 'run.toml'}: not valid TOML: nested too deeply"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("max_train_steps = 100", "It is not an option file of musubi-tuner or sd-scripts either"),
        ("job = 'extension'", "It is a file of ai-toolkit; convert it with python -m musubi_tuner.config import"),
    ],
)
def test_other_option_files_are_refused(line: str, what: str, tmp_path: Path) -> None:
    refusal = refusal_of(f"{line}\n", tmp_path)
    head = f"{tmp_path / 'run.toml'}: has no schema_version, [run] or [model], so it is not a run file. {what}"
    assert refusal.startswith(head) and refusal.endswith("; see toml/tinyflux.toml for an example")


# dataset_config


def test_dataset_config_and_own_tables_exclude_each_other(problems: Problems) -> None:
    assert problems(top='dataset_config = "data.toml"') == [
        "dataset_config: is set, but the run file has its own [general] or [[datasets]]; keep one"
    ]


def test_dataset_config_that_is_missing_is_the_only_problem(problems: Problems, project: Path) -> None:
    (message,) = problems(top='dataset_config = "data.toml"', data="")
    assert message.startswith("dataset_config: data.toml: no such file")


def test_dataset_config_that_is_not_toml_names_the_line(problems: Problems, project: Path) -> None:
    (project / "data.toml").write_text("[[datasets]\n", encoding="utf-8")
    assert problems(top='dataset_config = "data.toml"', data="")[0].startswith(
        "dataset_config: data.toml: not valid TOML: "
    )


def test_unknown_table_of_a_dataset_config(problems: Problems, project: Path) -> None:
    (project / "data.toml").write_text('[generall]\n[[datasets]]\nimage_directory = "images"\n', encoding="utf-8")
    assert problems(top='dataset_config = "data.toml"', data="") == [
        "data.toml: generall: unknown table or key. Did you mean 'general'?"
    ]


def test_dataset_config_that_is_no_text(problems: Problems) -> None:
    assert problems(top="dataset_config = 3") == ["dataset_config: is 3, expected a text"]


# Paths


def test_relative_path_means_the_current_directory_then_the_project(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "project" / "toml").mkdir(parents=True)
    (tmp_path / "project" / "only_there").touch()
    monkeypatch.chdir(tmp_path / "here")
    config_path = tmp_path / "project" / "toml" / "run.toml"
    assert locate("only_there", config_path) == tmp_path / "project" / "only_there"
    (tmp_path / "here" / "only_there").touch()
    assert locate("only_there", config_path) == Path("only_there")
    assert locate("nowhere", config_path) == Path("nowhere")
    assert locate(str(tmp_path / "gone"), config_path) == tmp_path / "gone"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", True),
        ("owner/name:sub/folder", True),
        ("owner/name:file.safetensors", True),
        ("owner/name.safetensors", False),
        ("a/b/c", False),
        ("./owner/name", False),
        ("/owner/name", False),
        ("name", False),
        ("C:\\models\\x", False),
    ],
)
def test_hub_id_is_told_from_a_path(text: str, expected: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(text) is expected


def test_existing_path_is_no_hub_id(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    assert not is_hub_id("owner/name")


# No torch

HEAVY = {
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "diffusers",
    "accelerate",
    "huggingface_hub",
    "PIL",
    "matplotlib",
}


@pytest.mark.parametrize(
    "code",
    ["import musubi_tuner.config", "from musubi_tuner.config import load_config; load_config('run.toml')"],
    ids=["import", "load"],
)
def test_config_needs_no_heavy_library(code: str, write: Write) -> None:
    folder = write().parent
    report = f"import sys; {code}; print(sorted({{name.partition('.')[0] for name in sys.modules}} & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", report], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Adapters by layer

LORA = 'type = "lora"\n'


def test_preset_lies_between_the_family_and_the_file(load: Callable[..., RunConfig]) -> None:
    assert load(adapter=LORA).adapter.alpha == 16.0
    config = load(adapter=LORA + 'preset = "minimal"\nrank = 12')
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.kinds) == (12, 8.0, ["single_attn"])
    assert [config.origins[f"adapter.{key}"] for key in ("rank", "alpha", "kinds")] == ["file", "preset", "preset"]
    assert len(load(adapter=LORA + 'preset = "character"').adapter.targets) == 3
    assert load(adapter=LORA + 'preset = "character"\ntargets = []').adapter.targets == []


@pytest.mark.parametrize("name", ["demo", "tinyflux", "tinyflux_lora", "tinyflux_scratch", "flux_dev"])
def test_resolved_config_of_a_run_file_is_the_same_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "toml", tmp_path / "toml")
    (tmp_path / "data" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = load_config(tmp_path / "toml" / f"{name}.toml")
    (tmp_path / "again.toml").write_text(resolved_toml(config), encoding="utf-8")
    again = load_config(tmp_path / "again.toml")
    keys = [parameter.key for parameter in parameters() if parameter.key != "dataset_config"]
    assert len(keys) > 150
    assert {key: again.get(key) for key in keys} == {key: config.get(key) for key in keys}
    assert again.datasets == config.datasets
    assert set(again.findings) <= set(config.findings)  # nothing that a person did not write


@pytest.mark.parametrize(
    "key",
    ["objective.min_snr_gamma", "validation.every_epochs", "save.every_steps", "save.keep_last_steps",
     "save.keep_last_epochs", "save.keep_last_states"],
)  # fmt: skip
def test_a_setting_that_is_off_stays_off_when_the_resolved_config_is_given_back(key: str, load: Load) -> None:
    config = load({key: None}, validation="split = 0.1")
    config.path.write_text(resolved_toml(config), encoding="utf-8")
    assert not config.get(key) and not load_config(config.path).get(key)


def test_the_resolved_config_of_a_preset_raises_no_warning(load: Load) -> None:
    config = load(adapter=LORA + 'preset = "character"', ema="enabled = false")
    config.path.write_text(resolved_toml(config), encoding="utf-8")
    again = load_config(config.path)
    assert again.findings == [] and again.adapter == config.adapter


def test_targets_survive_being_written_and_read(load: Callable[..., RunConfig], project: Path) -> None:
    config = load(
        adapter=LORA + 'targets = [{pattern = "single_blocks.**", rank = 4, lr_scale = 0.5, enabled = true},\n'
        '  {pattern = "**.qkv", alpha = 2, weight_decay = 0.0}]\n[adapter.rank_patterns]\n".*fc1" = 3'
    )
    (project / "again.toml").write_text(resolved_toml(config), encoding="utf-8")
    assert load_config(project / "again.toml").adapter == config.adapter
    assert config.adapter.targets[1].fields() == {"alpha": 2.0, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('preset = "caracter"', "adapter.preset: has 'caracter', expected one of minimal, standard, character, concept, "
         "full, attn-mlp, attn-only, double-only, single-only, progressive. Did you mean 'character'?"),
        ('kinds = ["single_mpl"]', "adapter.kinds: has 'single_mpl', expected one of double_attn, single_attn, single_mlp, "
         "double_mlp, modulation. Did you mean 'single_mlp'?"),
        ("kinds = []", "adapter.kinds: is empty, so no layer would be adapted; name a kind, or remove the key"),
        ('targets = [{pattern = "a.[1", rank = 2}]',
         "adapter.targets[0].pattern: 'a.[1': a bracket is not closed; expected [2], [2-5] or [2,4,7]"),
        ('targets = [{pattern = "a"}]', "adapter.targets[0]: sets nothing for 'a'; set rank, for example"),
        ("targets = [{rank = 2}]", "adapter.targets[0]: has no pattern"),
        ('targets = [{pattern = "a", rank = 0}]',
         "adapter.targets[0].rank: is 0, expected a whole number at least 1 and at most 1024"),
        ('targets = [{pattern = "a", rang = 1}]', "adapter.targets[0].rang: unknown key. Did you mean 'rank'?"),
    ],
)  # fmt: skip
def test_mistakes_in_layers_of_an_adapter(lines: str, message: str, problems: Callable[..., list[str]]) -> None:
    assert problems(adapter=LORA + lines) == [message]


def test_kinds_of_a_family_without_any(problems: Callable[..., list[str]]) -> None:
    (message,) = [
        text for text in problems(adapter=LORA + 'kinds = ["single_attn"]', model='arch = "fd"') if "adapter" in text
    ]
    assert message == "adapter.kinds: does not apply to FLUX.1-dev, which has none; remove it"


def test_sizes_beside_those_of_a_file_are_warned_of(load: Callable[..., RunConfig], project: Path) -> None:
    (project / "a.safetensors").touch()
    config = load(
        adapter=LORA + 'init_from = "a.safetensors"\nrank_from_weights = true\nkinds = ["single_attn"]\ndepth = 2\n'
        'targets = [{pattern = "**", rank = 2, lr_scale = 2.0}]'
    )
    reason = "has no effect because adapter.rank_from_weights is true"
    assert [str(finding.reason) for finding in config.findings] == [reason] * 3
    assert {finding.key for finding in config.findings} == {"adapter.kinds", "adapter.depth", "adapter.targets[0].rank"}


# Values that may be written in another way


@pytest.mark.parametrize(
    ("written", "steps", "ratio"),
    [
        ("warmup_ratio = 0.05", 1000, 0.05),
        ('warmup_steps = "5%"', 1000, 0.05),
        ('warmup_steps = " 7 % "', 1000, 0.07),
        ('warmup_steps = "0.5%"', 1000, 0.005),
        ("warmup_steps = 0.05", 1000, 0.05),
        ('warmup_steps = "5%"\nwarmup_ratio = 0.05', 1000, 0.05),
        ('warmup_steps = "0%"', 0, None),
        ("warmup_steps = 0.0\nwarmup_ratio = 0.1", 0, 0.1),
        ("warmup_steps = 50", 50, None),
    ],
)
def test_a_warm_up_may_be_written_as_a_share(written: str, steps: int, ratio: float | None, write: Write) -> None:
    """It is the ratio, beside which the 1000 updates of the family have no effect."""
    config = load_config(write(scheduler=written))
    assert (config.scheduler.warmup_steps, config.scheduler.warmup_ratio) == (steps, ratio)
    assert config.scheduler.warmup_updates(200) == (int(ratio * 200) if ratio else steps)
    assert ratio is None or config.origins["scheduler.warmup_ratio"] == "file"
    # The resolved file says what it means, and means the same; beside the ratio there is no count, which would be refused.
    Path("again.toml").write_text(resolved_toml(config), encoding="utf-8")
    assert load_config("again.toml").scheduler == config.scheduler


@pytest.mark.parametrize("written", ['"100%"', '"5"', '"some"', "1.0", "-0.1", "1.5", '"-5%"', "true"])
def test_a_warm_up_that_is_no_share_is_refused_with_what_is_expected(written: str, write: Write) -> None:
    with pytest.raises(ConfigError, match=r'expected a whole number at least 0 .*, or a share such as 0\.05 or "5%"'):
        load_config(write(scheduler=f"warmup_steps = {written}"))


def test_a_share_of_an_option_replaces_the_count_of_the_file(write: Write) -> None:
    path = write(scheduler="warmup_steps = 300")
    for word in ("--lr_warmup_steps=5%", "--warmup_steps=0.05", "--set=scheduler.warmup_steps=5%"):
        words = word.split("=", 1) if word.startswith("--set") else [word]
        _, overrides = split_overrides(words, set())
        config = load_config(path, overrides)
        assert config.scheduler.warmup_ratio == 0.05
        assert config.origins["scheduler.warmup_ratio"] == "cli"


def test_tables_of_roles_may_be_written_in_the_same_ways() -> None:
    values: dict[str, Any] = {
        "roles": {"vae": {"scheduler": {"type": "wsd", "warmup_steps": "5%", "warmup_ratio": 0.1}}, "freeze": []}
    }
    problems: list[Diagnostic] = []
    plain_words(values, {}, problems)
    assert values["roles"]["vae"]["scheduler"] == {"type": "warmup_stable_decay", "warmup_ratio": 0.05}
    assert [(each.code, each.keys) for each in problems] == [
        ("NA04", ("roles.vae.scheduler.type",)),
        ("V27", ("roles.vae.scheduler.warmup_steps", "roles.vae.scheduler.warmup_ratio")),
    ]


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("wsd", "warmup_stable_decay"),
        ("ReduceLROnPlateau", "plateau"),
        ("reduce_lr_on_plateau", "plateau"),
        ("Cosine", "cosine"),
    ],
)
def test_a_schedule_may_be_called_as_in_another_trainer(word: str, name: str, write: Write) -> None:
    for config in (
        load_config(write(scheduler=f'type = "{word}"')),
        load_config(write(), split_overrides(["--lr_scheduler", word], set())[1]),
    ):
        assert config.scheduler.type == name
        assert f'scheduler.type: is read as "{name}", which "{word}" is called here' in [
            str(f) for f in config.findings
        ]


def test_a_type_without_warm_up_is_not_asked_for_room_for_it(write: Write) -> None:
    """The family's 1000 updates of warm-up are longer than the run, and have no effect."""
    with pytest.raises(ConfigError, match=r"scheduler\.warmup_steps: is 1000, longer than"):
        load_config(write(train="max_steps = 100"))
    for kind in ("piecewise_constant", "adafactor"):
        more = {"optimizer": 'type = "Adafactor"'} if kind == "adafactor" else {}
        rules = '\nrules = "1:10,0.1"' if kind == "piecewise_constant" else ""
        found = load_config(write(train="max_steps = 100", scheduler=f'type = "{kind}"{rules}', **more)).findings
        assert not [each for each in found if each.key.startswith("scheduler.")]
