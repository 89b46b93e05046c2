"""Teachers of a dataset: what it may change of [experts], and every contradiction with the run."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.config.datasets import NO_TEACHERS
from musubi_tuner.config.write import resolved_toml

Load = Callable[..., RunConfig]
Problems = Callable[..., list[str]]
WarningsOf = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def more(project: Path) -> None:
    """Two further folders of images."""
    for name in ("more", "third"):
        (project / name).mkdir()


def data(first: str = "", second: str = "", third: str = "") -> str:
    """Three datasets, each with its own line."""
    folders = (("images", first), ("more", second), ("third", third))
    return "\n".join(f'[[datasets]]\nimage_directory = "{folder}"\n{line}' for folder, line in folders)


def test_dataset_has_the_teachers_of_the_run_but_for_what_it_says(load: Load) -> None:
    config = load(experts="time_buckets = 5", data=data("", "experts = false", 'experts = {lune = "o/r:f", seed = 9}'))
    same, none, other = [config.experts_of(dataset) for dataset in config.datasets]
    assert same == config.experts
    assert (same.teachers, none.teachers, other.teachers) == (("lune", "sol"), (), ("lune", "sol"))
    assert config.datasets[1].experts == NO_TEACHERS
    assert (other.lune, other.seed, other.time_buckets, other.unet) == ("o/r:f", 9, 5, "unet.safetensors")


def test_table_of_its_own_is_read_too(load: Load) -> None:
    config = load(data=data("", "[datasets.experts]\nenable_sol = false\ntime_buckets = 3"))
    assert config.experts_of(config.datasets[1]).teachers == ("lune",)
    assert config.experts_of(config.datasets[2]).time_buckets == 10


def test_datasets_with_the_same_teachers_go_together(load: Load) -> None:
    # Written down but equal to the run's, so no difference.
    config = load(data=data("experts = {time_buckets = 3}", "experts = {time_buckets = 10}", ""))
    assert config.dataset_groups() == [[0], [1, 2]]
    limited = config.limited_to([0])
    assert (limited.experts.time_buckets, [dataset.name for dataset in limited.datasets]) == (3, ["datasets[0]"])
    assert limited.path == config.path
    assert (config.experts.time_buckets, len(config.datasets)) == (10, 3)


def test_resolved_file_keeps_the_teachers_of_datasets(load: Load, project: Path) -> None:
    config = load(data=data("experts = false", "experts = {time_buckets = 3, enable_sol = false}"))
    text = resolved_toml(config)
    assert tomllib.loads(text)["datasets"][1]["experts"] == {"time_buckets": 3, "enable_sol": False}
    (project / "again.toml").write_text(text, encoding="utf-8")
    again = load_config(project / "again.toml")
    assert [again.experts_of(d) for d in again.datasets] == [config.experts_of(d) for d in config.datasets]
    assert again.experts == config.experts


# Mistakes


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("true", "is True, expected false, for no teachers, or a table of keys that differ from [experts]"),
        ("3", "is 3, expected false, for no teachers, or a table of keys that differ from [experts]"),
        ("{time_bucket = 3}", "time_bucket: unknown key. Did you mean 'time_buckets'?"),
        ("{time_buckets = 0}", "time_buckets: is 0, expected a whole number at least 1 and at most 100"),
        ('{dtype = "float23"}', "dtype: is 'float23', expected one of auto, float32, bfloat16, float16. Did you mean 'float32'?"),
        ('{enable_lune = "yes"}', "enable_lune: is 'yes', expected true or false"),
    ],
)  # fmt: skip
def test_what_a_dataset_cannot_say(value: str, message: str, problems: Problems) -> None:
    dot = "." if message.split(":")[0] in ("time_bucket", "time_buckets", "dtype", "enable_lune") else ": "
    assert problems(data=data("", f"experts = {value}")) == [f"datasets[1].experts{dot}{message}"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_time", '"aligned"'),
        ("expert_input", '"random"'),
        ("sol_spatial_norm", '"max"'),
        ("sol_source", '"geometric"'),
    ],
)
def test_features_made_in_different_ways_are_not_mixed(key: str, value: str, problems: Problems) -> None:
    assert problems(data=data("", f"experts = {{{key} = {value}}}")) == [
        f"datasets[1].experts.{key}: must be the same for the whole run, because features made in different ways must "
        f"not be mixed; set experts.{key}"
    ]


def test_teachers_are_not_inherited_from_general(problems: Problems) -> None:
    assert problems(data="[general]\nexperts = false\n" + data()) == [
        "general.experts: belongs in [[datasets]], not in [general]; move it there"
    ]


def test_dataset_cannot_turn_on_a_teacher_that_the_run_does_not_learn_from(problems: Problems) -> None:
    (message,) = problems(experts="enable_sol = false", data=data("", "experts = {enable_sol = true}"))
    assert message.startswith(
        "datasets[1].experts.enable_sol: is true, but experts.enable_sol is false, and a data set"
    )


@pytest.mark.parametrize("off", ["experts = false", "experts = {enable_sol = false}"])
def test_teacher_that_no_dataset_has_is_refused(off: str, problems: Problems) -> None:
    found = problems(data=data(off, "experts = {enable_sol = false}", "experts = false"))
    expected = "is true, but every data set turns it off; set it to false, or leave it on in one"
    assert f"experts.enable_sol: {expected}" in found
    assert (f"experts.enable_lune: {expected}" in found) is False


def test_no_dataset_with_teachers_at_all(problems: Problems) -> None:
    found = problems(data=data(*["experts = false"] * 3))
    assert [message.partition(":")[0] for message in found] == ["experts.enable_lune", "experts.enable_sol"]


def test_family_without_teachers_refuses_the_key(write: Callable[..., Path], problems: Problems) -> None:
    found = problems(model='arch = "fd"', without=("experts.unet",), data=data("experts = false"), adapter="rank = 4")
    assert "datasets[0].experts.enable_lune: FLUX.1 has no teachers" in found


# Files


def test_teacher_without_a_unet_is_refused_only_where_a_dataset_wants_it(load: Load, problems: Problems) -> None:
    own = 'experts = {unet = "unet.safetensors"}'
    assert load(without=("experts.unet",), data=data(own, "experts = false", own)).experts.unet is None
    (message,) = problems(without=("experts.unet",), data=data(own, "experts = false"))
    assert message.startswith("experts.unet: is required to cache teacher features")


def test_teacher_that_sees_images_needs_its_autoencoder_in_every_dataset(load: Load, problems: Problems) -> None:
    sees, own = 'expert_input = "noised_image"', 'experts = {vae = "vae.safetensors"}'
    load(experts=sees, data=data(own, "experts = false", own))
    (message,) = problems(experts=sees, data=data(own, "experts = false"))
    assert message.startswith('experts.vae: is required by expert_input = "noised_image"')


def test_missing_file_of_a_dataset_is_named(problems: Problems) -> None:
    (message,) = problems(data=data("", 'experts = {sol = "sol.safetensors"}'))
    assert message.startswith("datasets[1].experts.sol: sol.safetensors: no such file or folder")


# What has no effect


@pytest.mark.parametrize(
    ("experts", "lines", "expected"),
    [
        ("", ("experts = {enable_lune = false, lune = 'unet.safetensors'}",),
         ["datasets[0].experts.lune: has no effect because enable_lune is false here"]),
        ("", ("experts = {enable_lune = false, enable_sol = false, seed = 3}",),
         ["datasets[0].experts.seed: has no effect because both teachers are off here"]),
        ('expert_input = "random"', ("experts = {vae = 'vae.safetensors'}",),
         ['datasets[0].experts.vae: has no effect because experts.expert_input is "random"']),
        ("enable_lune = false\nenable_sol = false", ("experts = false",),
         ["datasets[0].experts: has no effect because experts.enable_lune and enable_sol are false"]),
        ("time_buckets = 4", ("experts = {time_buckets = 3}", "experts = {time_buckets = 5}", "experts = false"),
         ["experts.time_buckets: has no effect because every data set with teachers has its own"]),
        ("lune = 'unet.safetensors'", ("experts = {lune = 'vae.safetensors'}", *["experts = {enable_lune = false}"] * 2),
         ["experts.lune: has no effect because every data set with teachers has its own"]),
        ("time_buckets = 4", ("experts = {time_buckets = 3}", "experts = {enable_sol = false}", "experts = false"), []),
    ],
)  # fmt: skip
def test_setting_that_nothing_reads_is_warned_of(
    experts: str, lines: tuple[str, ...], expected: list[str], warnings_of: WarningsOf
) -> None:
    assert warnings_of(experts=experts, data=data(*lines)) == expected
