"""What a name comes to that is not a setting's own: every name of other trainers has an answer, every slip its original."""

import random
import string
import sys
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.config.command_line import override_arguments, split_overrides
from musubi_tuner.config.diagnostics import InvalidConfig, closest, distance
from musubi_tuner.config.explain_key import explain_key
from musubi_tuner.config.foreign import FOREIGN
from musubi_tuner.config.load import load_steps
from musubi_tuner.config.names import answer, shown
from musubi_tuner.config.schema import flat_names, item_parameters, parameters
from musubi_tuner.errors import ConfigError
from musubi_tuner.models.registry import MODELS

sys.path.append(str(Path(__file__).parent))

from names_of_others import PLAN

KEYS = {parameter.key for parameter in (*parameters(), *item_parameters())}
LAST = {key.rpartition(".")[2] for key in KEYS}


@pytest.mark.parametrize("name", PLAN)
def test_every_name_of_a_plan_has_an_answer(name: str) -> None:
    """A setting, another name of one, a reason why there is none, or why none is needed: never a guess."""
    assert name in LAST or name in flat_names() or name in FOREIGN
    assert "Did you mean" not in explain_key(name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in PLAN if name not in LAST])
@pytest.mark.parametrize("arch", ["tf", "fd"])
def test_no_name_of_a_plan_is_answered_by_likeness_in_a_run_file(name: str, arch: str, write: Any) -> None:
    changes = {"model": f'arch = "{arch}"'} | ({"without": ("experts.unet",)} if arch == "fd" else {})
    try:
        found = load_config(write(train=f"{name} = true", **changes)).findings
    except InvalidConfig as problem:
        found = problem.findings
    about = [finding for finding in found if finding.key in (f"train.{name}", name)]
    other = [finding for finding in found if f"train.{name}" in finding.keys or "is True" in finding.reason]
    assert about or other, found
    assert not any("Did you mean" in finding.reason for finding in about)


def test_keys_that_the_table_leads_to_exist() -> None:
    known = KEYS | {"model.arch"}
    assert {entry.key for entry in FOREIGN.values() if entry.key} <= known


def test_names_of_the_table_are_not_keys_of_ours_with_another_meaning() -> None:
    for name in FOREIGN:
        own = flat_names().get(name)
        if "." not in name and own is not None and FOREIGN[name].key:
            assert FOREIGN[name].key == own.key, name


def slips(word: str, source: random.Random) -> list[str]:
    """One slip of each kind in a word: a letter left out, added, changed, swapped with its neighbour."""
    at = source.randrange(len(word))
    letter = source.choice(
        string.ascii_lowercase.replace(word[at], "") if word[at] in string.ascii_lowercase else "abc"
    )
    found = [word[:at] + word[at + 1 :], word[:at] + letter + word[at:], word[:at] + letter + word[at + 1 :]]
    if at + 1 < len(word) and word[at] != word[at + 1]:
        found.append(word[:at] + word[at + 1] + word[at] + word[at + 2 :])
    return [slip for slip in found if len(slip) > 1]


@pytest.mark.parametrize("code", list(MODELS))
def test_a_slip_in_any_key_is_answered_with_the_original(code: str) -> None:
    source, missed = random.Random(0), []
    by_table: dict[str, list[str]] = {}
    for parameter in parameters(MODELS[code]):
        by_table.setdefault(parameter.section, []).append(parameter.name)
    for names in by_table.values():
        for name in names:
            for slip in slips(name, source):
                if slip not in names and slip not in FOREIGN and name not in closest(slip, names):
                    missed.append((name, slip, closest(slip, names)))
    assert missed == []


@pytest.mark.parametrize(
    ("first", "second", "slips"),
    [("lr", "lr", 0), ("lr", "rl", 1), ("alpha", "alhpa", 1), ("a", "", 1), ("seed", "sead", 1), ("ca", "abc", 3)],
)
def test_distances_count_a_swap_as_one_slip(first: str, second: str, slips: int) -> None:
    assert distance(first, second) == distance(second, first) == slips


# In a run file and as options


def test_another_name_is_read_as_the_setting_and_said(load: Any) -> None:
    config = load(
        adapter='type = "lora"\nnetwork_dim = 8\nnetwork_alpha = 4',
        ema="enabled = false",
        train='train_batch_size = 3\ncaption_extention = ".caption"',
    )
    assert (config.adapter.rank, config.adapter.alpha, config.datasets[0].batch_size) == (8, 4.0, 3)
    assert config.datasets[0].caption_extension == ".caption"
    said = {finding.key: finding.reason for finding in config.findings}
    assert said["adapter.network_dim"] == "is read as adapter.rank = 8"
    assert said["train.train_batch_size"] == "is read as general.batch_size = 3"


def test_one_value_in_two_spellings(load: Any, problems: Any) -> None:
    assert [
        found.code for found in load(optimizer="lr = 1e-4\nlearning_rate = 1e-4").findings if found.level == "warning"
    ] == ["U05"]
    assert problems(optimizer="lr = 1e-4\nlearning_rate = 2e-4") == [
        "optimizer.learning_rate: is 0.0002, but optimizer.lr, another name of it, is 0.0001; keep one"
    ]


@pytest.mark.parametrize(
    "line",
    ["clip_skip = 1", "clip_skip = 0", "zero_terminal_snr = false", "v2 = false", "fp8_base = false", "factor = -1"],
)
def test_neutral_values_are_accepted(line: str, load: Any, problems: Any) -> None:
    if line == "clip_skip = 1":
        assert "clip_skip" in problems(train=line)[0]
    else:
        assert not [found for found in load(train=line).findings if found.level != "info"]


def test_a_neutral_setting_of_another_family_is_accepted(load: Any, problems: Any) -> None:
    fd = {"model": 'arch = "fd"', "without": ("experts.unet",)}
    assert not [found for found in load(**fd, objective="spatial_weighting = false").findings if found.level != "info"]
    assert "TinyFlux" in problems(**fd, objective="spatial_weighting = true")[0]


def test_options_by_other_names(load: Any, problems: Any) -> None:
    assert load({"train_batch_size": 2}).datasets[0].batch_size == 2
    assert load({"general.num_repeats": 4}).datasets[0].num_repeats == 4
    assert "only CLIP's pooled vector" in problems({"clip_skip": 2})[0]


def test_conversions_say_what_they_expect() -> None:
    assert answer("optimizer_type", "adamw8bit", None).value == "AdamW8bit"  # type: ignore[union-attr]
    assert "expected one of" in answer("optimizer_type", "sophia", None).refused  # type: ignore[union-attr]
    assert answer("nothing_like_it", 1, None) is None


def test_explaining_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    text = explain_key("network_dim")
    assert text.startswith("adapter.rank\n") and "also     network_dim" in text
    assert "is refused unless it is off" in explain_key("clip_skip")
    assert "another name of general.batch_size" in explain_key("train_batch_size")
    with pytest.raises(ConfigError, match=r"Did you mean 'optimizer\.lr'"):
        explain_key("optimizer.lt")


def test_a_config_from_a_document(load: Any) -> None:
    from musubi_tuner.config import load_document

    config: RunConfig = load()
    again = load_document(
        {
            "run": {"name": "cat", "output_dir": "out"},
            "model": {"arch": "tf", "path": "model.safetensors", "vae_path": "vae.safetensors", "clip_path": "clip.safetensors",
                      "t5_path": "t5.safetensors"},
            "experts": {"unet": "unet.safetensors"}, "train": {"max_steps": 2000}, "datasets": [{"image_directory": "images"}],
        }
    )  # fmt: skip
    assert again.model_dump() == config.model_dump() and again.datasets == config.datasets


def test_the_page_of_names_is_up_to_date() -> None:
    from plan_coverage import page

    written = Path(__file__).parents[3] / "docs" / "plan_coverage.md"
    assert page() == written.read_text(encoding="utf-8"), (
        "run: python tests/unit/config/plan_coverage.py > docs/plan_coverage.md"
    )


# What a review found


@pytest.mark.parametrize("line", ['huggingface_token = "SEC"', 'hub_token = "SEC"', 'hub_token = "SEC"\ntoken = "SEK"'])
def test_secrets_under_other_names_are_never_shown(line: str, write: Any) -> None:
    try:
        text = " ".join(str(found) for found in load_config(write(hub=f'repo_id = "me/x"\n{line}')).findings)
    except InvalidConfig as problem:
        text = str(problem)
    assert "SEC" not in text and "SEK" not in text
    assert shown("wandb_key", "SEC") == shown("log.wandb_api_key", "SEC") == "***"
    assert not override_arguments({"hub_token": "SEC", "wandb_key": "SEC", "steps.a.hub.token": "SEC"})


def test_a_wrong_value_is_an_error_although_something_else_was_said_of_its_key(write: Any) -> None:
    path = write(
        top="", data='[[datasets]]\nimage_directory = "images"\n[[steps]]\nname = "one"\noptimizer = {lr = "abc"}'
    )
    with pytest.raises(InvalidConfig, match="optimizer"):
        load_config(path, {"step": "one", "optimizer.lr": 0.01})


@pytest.mark.parametrize("key", ["sampel.seed", "validaton.seed", "emma.lr"])
def test_a_slip_in_the_name_of_a_table_sets_nothing_else(key: str, problems: Any) -> None:
    assert problems({key: 3})[0].startswith(f"{key}: unknown key")


def test_whole_keys_of_the_spec_are_known_in_files(load: Any) -> None:
    assert load(sample='prompts = ["x"]\nsampler = "heun"').sample.solver == "heun"
    assert load(save='precision = "fp16"').save.dtype == "float16"


@pytest.mark.parametrize("value", ["false", "no", 1])
def test_a_switch_takes_true_and_false_only(value: Any) -> None:
    found = answer("fp8_scaled", value, None)
    assert found is not None and found.refused.endswith("expected true or false")


def test_pairs_of_switches_go_together(load: Any) -> None:
    lora = {"adapter": 'type = "lora"', "ema": "enabled = false"}
    for pair in ("fp8_base = true\nfp8_scaled = true", "fp8_scaled = true\nfp8_base = true"):
        assert load(**lora, memory=pair).memory.base_storage == "fp8_scaled"
    for pair in (
        "min_snr_gamma = 5\nmin_snr_gamma_enabled = false",
        "min_snr_gamma_enabled = false\nmin_snr_gamma = 5",
    ):
        assert load(objective=pair).get("objective.min_snr_gamma") == 0


def test_strict_steps_are_judged_together(write: Any) -> None:
    steps = '[[steps]]\nname = "a"\n[[steps]]\nname = "b"\nsample = {prompts = ["x"]}'
    path = write(run="strict = true", sample="steps = 30", data=f'[[datasets]]\nimage_directory = "images"\n{steps}')
    assert [config.step.name for config in load_steps(path) if config.step] == ["a", "b"]


def test_options_by_other_names_reach_steps(write: Any) -> None:
    data = '[[datasets]]\nimage_directory = "images"\n[[steps]]\nname = "one"\ntrain = {epochs = 5}'
    path = write(data=data)
    assert load_config(path, {"step": "one", "epochs": 3}).train.max_epochs == 5
    assert load_config(path, {"step": "one", "steps.one.train.epochs": 3}).train.max_epochs == 3


def test_items_that_every_data_set_has_for_itself_are_no_options(load: Any) -> None:
    data = '[[datasets]]\nimage_directory = "images"\nbatch_size = 2'
    assert [found.key for found in load({"batch_size": 8}, data=data).findings] == ["general.batch_size"]


def test_options_of_other_trainers_on_the_command_line() -> None:
    _, found = split_overrides(["--train_batch_size", "2", "--fp8_base", "--clip_skip=2"], set())
    assert found == {"train_batch_size": 2, "fp8_base": True, "clip_skip": 2}
