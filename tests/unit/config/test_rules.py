"""Rules between settings: what must be given together, what excludes each other, and what has no effect."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.config import RunConfig, load_config, validate
from musubi_tuner.config.diagnostics import error, format_problems
from musubi_tuner.config.rules.files import unwritable
from musubi_tuner.models.tinyflux.settings import resolve_experts

Load = Callable[..., RunConfig]
Problems = Callable[..., list[str]]
WarningsOf = Callable[..., list[str]]

SCRATCH = 'init = "scratch"'
NEW_MODEL = {"without": ("model.path",), "experts": 'vae = "vae.safetensors"', "ema": "warmup = true"}
"""What a new model needs beside ``init``: no checkpoint, and the teachers' autoencoder."""
FD = {"model": 'arch = "fd"', "without": ("experts.unet",)}


def test_validating_a_good_config_finds_nothing(load: Load) -> None:
    assert validate(load()) == []


def test_diagnostic_begins_with_its_key() -> None:
    assert str(error("U03", "run.name", "is wrong")) == "run.name: is wrong"
    assert str(error("U03", "", "is wrong")) == "is wrong"


def test_problems_are_counted_and_indented() -> None:
    one, two = error("U03", "a", "x"), error("U03", "b", "y")
    assert format_problems("f.toml", [one]) == "f.toml: 1 problem\n  a: x"
    assert format_problems("f.toml", [one, two]) == "f.toml: 2 problems\n  a: x\n  b: y"


# Settings that require or exclude each other


def test_checkpoint_needs_a_path(problems: Problems) -> None:
    assert problems(without=("model.path",)) == [
        'model.path: is required; or set init = "scratch" to train a new model'
    ]


def test_new_model_excludes_a_path(problems: Problems) -> None:
    assert problems(model=SCRATCH, experts='vae = "vae.safetensors"') == [
        'model.path: is set, but init = "scratch" starts from random weights; remove one'
    ]


def test_checkpoint_excludes_a_geometry(problems: Problems) -> None:
    assert problems(model="geometry = {num_double_layers = 2}") == [
        'model.geometry: is read from the checkpoint; remove the table, or set init = "scratch"'
    ]


def test_budget_is_required(problems: Problems) -> None:
    assert problems(without=("train.max_steps",)) == [
        "train.max_steps: is missing, and so is max_epochs; set one of them"
    ]


def test_epochs_are_a_budget(load: Load) -> None:
    assert load(train="max_epochs = 3", without=("train.max_steps",)).train.max_steps is None


def test_adapter_of_random_weights(problems: Problems) -> None:
    vae = 'vae = "vae.safetensors"'
    assert problems(model=SCRATCH, without=("model.path",), experts=vae, adapter='type = "lora"') == [
        'model.init: is "scratch", but with adapter.type = "lora" the model is frozen and would stay random; set model.path'
    ]


def test_warmup_longer_than_the_run(problems: Problems, load: Load) -> None:
    assert problems(scheduler="warmup_steps = 2001") == [
        "scheduler.warmup_steps: is 2001, longer than train.max_steps = 2000; the learning rate would never be reached; make it shorter"
    ]
    assert load(scheduler="warmup_steps = 2000").scheduler.warmup_steps == 2000


def test_schedule_that_is_all_warmup(problems: Problems, load: Load) -> None:
    assert problems(scheduler="warmup_steps = 300\ntotal_steps = 300") == [
        "scheduler.total_steps: is 300, not longer than scheduler.warmup_steps = 300; make it longer"
    ]
    assert load(scheduler="warmup_steps = 300\ntotal_steps = 301").scheduler.total_steps == 301


def test_least_learning_rate_above_the_learning_rate(problems: Problems) -> None:
    assert problems(optimizer="lr = 1e-4", scheduler="min_lr = 0.001") == [
        "scheduler.min_lr: is 0.001, above optimizer.lr = 0.0001; lower it"
    ]


@pytest.mark.parametrize("beta", ["1.0", "-0.1"])
def test_betas_lie_below_one(beta: str, problems: Problems) -> None:
    assert problems(optimizer=f"betas = [0.9, {beta}]") == [
        f"optimizer.betas: value 1 is {beta}, expected at least 0 and below 1"
    ]


def test_fp16_needs_a_gpu(problems: Problems) -> None:
    assert problems(run='device = "cpu"', train='mixed_precision = "fp16"') == [
        'train.mixed_precision: "fp16" needs a GPU; use "bf16" or "no" on a CPU'
    ]


def test_several_processes_do_not_run_on_mps(problems: Problems) -> None:
    assert problems(run='device = "mps"', distributed="num_processes = 2") == [
        "distributed.num_processes: several processes are not supported on mps; set it to 1"
    ]


def test_half_precision_caches_in_a_float32_run(warnings_of: WarningsOf) -> None:
    assert warnings_of(cache='dtype = "float16"', train='mixed_precision = "no"') == [
        'cache.dtype: is "float16", which loses precision in a float32 run; write "auto"'
    ]


def test_prompts_that_are_never_drawn(warnings_of: WarningsOf) -> None:
    assert warnings_of(sample='prompts = ["a cat"]\nevery_steps = 0') == [
        "sample.prompts: are set, but no sampling interval is; set sample.every_steps, every_epochs or at_first"
    ]


@pytest.mark.parametrize(
    "when", ["every_steps = 10", "every_steps = 0\nevery_epochs = 1", "every_steps = 0\nat_first = true"]
)
def test_prompts_that_are_drawn(when: str, warnings_of: WarningsOf) -> None:
    assert warnings_of(sample=f'prompts = ["a cat"]\n{when}') == []


def test_sides_of_samples_are_multiples_of_the_step(problems: Problems) -> None:
    assert problems(sample='prompts = ["a cat"]\nwidth = 500\nheight = 24') == [
        "sample.width: is 500, expected a multiple of 16: 496 or 512",
        "sample.height: is 24, expected a multiple of 16: 16 or 32",
    ]


@pytest.mark.parametrize("repo", ["cat", "a/b/c", "owner/cat:folder", "./owner"])
def test_upload_needs_a_repository_id(repo: str, problems: Problems) -> None:
    assert problems(hub=f'repo_id = "{repo}"') == [f"hub.repo_id: is '{repo}', expected owner/name"]


def test_repository_id_may_be_the_name_of_a_local_folder_too(load: Load, project: Path) -> None:
    (project / "owner" / "cat").mkdir(parents=True)
    assert load(hub='repo_id = "owner/cat"').hub.repo_id == "owner/cat"


@pytest.mark.parametrize(
    ("tables", "kept"),
    [({}, False), ({"save": "best = true"}, True), ({"validation": "split = 0.1"}, True),
     ({"validation": "split = 0.1", "save": "best = false"}, False)],
)  # fmt: skip
def test_the_best_is_the_release_only_where_it_is_kept(
    tables: dict[str, str], kept: bool, problems: Problems, load: Load
) -> None:
    hub = REPOSITORY + 'release = "best"'
    if kept:
        assert load(hub=hub, **tables).hub.release == "best"
    else:
        refusal = 'hub.release: is "best", but no best checkpoint is kept; set save.best = true or validation.split'
        assert problems(hub=hub, **tables) == [refusal]


# Settings without effect


def no_effect(key: str, reason: str) -> str:
    return f"{key}: has no effect because {reason}"


UNIFORM = 'objective.timestep_sampling is "uniform"'
NO_PROMPTS, NO_REPO, NOT_SAVED = (
    "sample.prompts is absent",
    "hub.repo_id is absent",
    "save.every_steps is 0 and save.every_epochs is 0",
)
NO_EMBEDDING = 'model.init is "scratch" and model.geometry.guidance_embeds is absent'
NO_SPLIT = "validation.split is 0.0"
NO_HUBER = 'objective.loss is "l2" and objective.lune_mode is "cosine"'
NO_WARMUP, ONE_PROCESS = (
    "scheduler.warmup_steps is 0 and scheduler.warmup_ratio is absent",
    "distributed.num_processes is 1",
)
EMA_OFF = "ema.enabled is false"
NO_UPLOAD = {"run_name": '"x"', "token": '"t"', "every_steps": "5", "every_epochs": "1", "release": '"best"',
             "upload_samples": "true", "upload_logs": "true", "upload_state": "true", "timeout_seconds": "5",
             "retry_seconds": "1.0", "finish_seconds": "5"}  # fmt: skip
REPOSITORY = 'repo_id = "owner/cat"\n'
SHORT = {"train": "max_steps = 999", "scheduler": "warmup_steps = 9"}
NO_SAVE_LINES = "every_steps = 0\nevery_epochs = 0\nkeep_last_steps = 2\nkeep_last_epochs = 2"


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"objective": 'timestep_sampling = "uniform"\nlogit_mean = 0.1\nlogit_std = 2.0'},
         {"objective.logit_mean": UNIFORM, "objective.logit_std": UNIFORM}),
        ({"objective": "huber_delta = 0.2"}, {"objective.huber_delta": NO_HUBER}),
        ({"objective": 'min_snr_gamma = 0\nmin_snr_form = "x0"'}, {"objective.min_snr_form": "objective.min_snr_gamma is 0.0"}),
        ({"objective": 'min_snr_gamma = 3\nmin_snr_form = "none"'}, {"objective.min_snr_gamma": 'objective.min_snr_form is "none"'}),
        ({"ema": "enabled = false\ndecay = 0.9\nwarmup = true\non_cpu = true"},
         {"ema.decay": EMA_OFF, "ema.on_cpu": EMA_OFF, "ema.warmup": EMA_OFF}),
        ({"scheduler": 'warmup_steps = 0\nwarmup_type = "cosine"'}, {"scheduler.warmup_type": NO_WARMUP}),
        ({"scheduler": 'type = "constant"\nmin_lr = 1e-6\ntotal_steps = 9'},
         {"scheduler.min_lr": 'scheduler.type is "constant"',
          "scheduler.total_steps": 'scheduler.type is "constant" and scheduler.warmup_ratio is absent'}),
        ({"save": "state = false\nkeep_last_states = 3"}, {"save.keep_last_states": "save.state is false"}),
        ({"objective": 'missing_teacher = "zeros"'},
         {"objective.missing_teacher": "all data sets have the same teachers"}),
        ({"optimizer": 'type = "Adafactor"\nbetas = [0.9, 0.9]\neps = 1e-6'},
         dict.fromkeys(("optimizer.betas", "optimizer.eps"), 'optimizer.type is "Adafactor"')),
        ({"sample": "every_steps = 5\nsteps = 3\nguidance = 2.0"},
         {"sample.every_steps": NO_PROMPTS, "sample.steps": NO_PROMPTS, "sample.guidance": NO_PROMPTS}),
        ({"hub": "\n".join(f"{key} = {value}" for key, value in NO_UPLOAD.items())},
         {f"hub.{key}": NO_REPO for key in NO_UPLOAD}),
        ({"hub": REPOSITORY + "upload_samples = true"}, {"hub.upload_samples": NO_PROMPTS}),
        ({"hub": REPOSITORY + "every_steps = 5\nevery_epochs = 1", "save": "every_steps = 0\nevery_epochs = 0",
          **SHORT}, {"hub.every_steps": NOT_SAVED, "hub.every_epochs": NOT_SAVED}),
        ({"distributed": "main_process_port = 29500"}, {"distributed.main_process_port": ONE_PROCESS}),
        ({"save": NO_SAVE_LINES, **SHORT},
         {"save.keep_last_steps": "save.every_steps is 0", "save.keep_last_epochs": "save.every_epochs is 0"}),
        ({"run": 'device = "cpu"\nallow_tf32 = true\ncudnn_benchmark = true'},
         {"run.allow_tf32": 'run.device is "cpu"', "run.cudnn_benchmark": 'run.device is "cpu"'}),
        ({"run": "deterministic = true\nallow_tf32 = true"}, {"run.allow_tf32": "run.deterministic is true"}),
        ({"save": 'comment = "my cat"'}, {"save.comment": 'adapter.type is "none"'}),
        ({"validation": 'seed = 1\ntimes = 4\nevery_steps = 5\nweights = "ema"'},
         dict.fromkeys(("validation.seed", "validation.times", "validation.every_steps", "validation.weights"), NO_SPLIT)),
        ({"validation": 'split = 0.1\nweights = "ema"', "ema": "enabled = false"},
         {"validation.weights": EMA_OFF}),
    ],
)  # fmt: skip
def test_setting_without_effect(tables: dict[str, str], expected: dict[str, str], warnings_of: WarningsOf) -> None:
    assert sorted(warnings_of(**tables)) == sorted(no_effect(key, reason) for key, reason in expected.items())


@pytest.mark.parametrize(
    "tables",
    [
        {"objective": 'loss = "huber"\nhuber_delta = 0.2'},
        {"objective": 'lune_mode = "huber"\nhuber_delta = 0.2'},
        {"hub": REPOSITORY + "upload_samples = false\nevery_steps = 0", "save": "every_steps = 0"},
        {
            "hub": REPOSITORY + "upload_samples = true\nevery_epochs = 2",
            "sample": 'prompts = ["a cat"]\nevery_steps = 5',
        },
        {"objective": "min_snr_gamma = 0"},
        {"objective": 'min_snr_form = "none"'},
        {"objective": 'min_snr_gamma = 0\nmin_snr_form = "none"'},
        {"ema": "enabled = false"},
        {"scheduler": "warmup_steps = 0"},
        {"scheduler": 'type = "constant"'},
        {"scheduler": 'type = "constant"\nwarmup_ratio = 0.1\ntotal_steps = 100'},
        {**FD, "objective": "preserve_distribution_shape = true\nmax_timestep = 900"},
        {"optimizer": 'type = "Adafactor"'},
        {"save": "every_steps = 0\nevery_epochs = 0", **SHORT},
        {"distributed": "num_processes = 2\nmain_process_port = 29500"},
        {"validation": 'split = 0.1\nseed = 1\ntimes = 4\nweights = "model"', "ema": "enabled = false"},
        {"validation": "split = 0.0"},
        {"train": 'mixed_precision = "fp16"\nmax_skipped_updates = 3'},
        {"adapter": 'type = "lora"\npreset = "standard"\nkinds = ["single_attn"]'},
    ],
)
def test_setting_with_an_effect_and_switching_off_are_not_warned_of(
    tables: dict[str, str], warnings_of: WarningsOf
) -> None:
    assert warnings_of(**tables) == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": 'init_scheme = "adaln_zero"'}, "model.init_scheme"),
        ({**NEW_MODEL, "model": f'{SCRATCH}\nrope_freqs = "exact"'}, "model.rope_freqs"),
        ({**NEW_MODEL, "model": f'{SCRATCH}\nweights = "ema"'}, "model.weights"),
        ({**NEW_MODEL, "model": f'{SCRATCH}\nrevision = "v1"'}, "model.revision"),
        ({"train": "max_skipped_updates = 3"}, "train.max_skipped_updates"),
        ({"cache": 'run = "always"\nskip_existing = "name"'}, "cache.skip_existing"),
        ({**FD, "objective": "preserve_distribution_shape = true"}, "objective.preserve_distribution_shape"),
        ({"ema": "enabled = false", "sample": 'prompts = ["a cat"]\nuse_ema = true'}, "sample.use_ema"),
        ({"save": "every_steps = 0\nkeep_last_steps = 2"}, "save.keep_last_steps"),
        ({"save": "every_epochs = 0\nkeep_last_epochs = 2"}, "save.keep_last_epochs"),
        ({"experts": 'enable_lune = false\nenable_sol = false\nexpert_time = "aligned"'}, "experts.expert_time"),
        (
            {"experts": "enable_lune = false\nenable_sol = false", "cache": "experts_batch_size = 2"},
            "cache.experts_batch_size",
        ),
        (
            {"experts": "enable_lune = false\nenable_sol = false", "objective": 'teacher_dropout_mode = "batch"'},
            "objective.teacher_dropout_mode",
        ),
        ({"experts": 'expert_input = "random"\nvae = "owner/name:vae"'}, "experts.vae"),
        (
            {"adapter": 'type = "lora"\npreset = "standard"\nkinds = ["single_attn"]\nrank = 4\nalpha = 4'},
            "adapter.preset",
        ),
    ],
)
def test_setting_that_nothing_reads_is_warned_of(changes: dict[str, str], key: str, warnings_of: WarningsOf) -> None:
    (message,) = warnings_of(**changes)
    assert message.startswith(f"{key}: has no effect because ")


@pytest.mark.parametrize(
    ("tables", "kept"),
    [
        ({}, False),
        ({"validation": "split = 0.1"}, True),
        ({"validation": "split = 0.1", "save": "best = false"}, False),
        ({"save": "best = true"}, True),
    ],
)
def test_the_best_is_kept_where_it_is_asked_for_or_validated(
    tables: dict[str, str], kept: bool, write: Callable[..., Path]
) -> None:
    assert load_config(write(**tables)).keeps_best is kept


def test_default_of_the_family_is_not_blamed_on_the_user(warnings_of: WarningsOf) -> None:
    # The family sets sample.every_steps, save.every_epochs and betas; none of them was written here.
    assert warnings_of(optimizer='type = "Adafactor"', save="every_steps = 0") == []


def test_override_without_effect_is_warned_of(load: Load) -> None:
    assert [str(finding) for finding in load({"objective.huber_delta": 0.2}).findings] == [
        no_effect("objective.huber_delta", NO_HUBER)
    ]


# Rules of the family


def test_teachers_need_their_unet(problems: Problems) -> None:
    assert problems(without=("experts.unet",)) == [
        "experts.unet: is required to cache teacher features; name the SD1.5 U-Net, or set enable_lune = false and "
        "enable_sol = false to train without teachers"
    ]


def test_without_teachers_no_unet_is_needed(load: Load) -> None:
    config = load(without=("experts.unet",), experts="enable_lune = false\nenable_sol = false")
    assert config.findings == []


def test_with_finished_caches_no_unet_is_needed(load: Load) -> None:
    assert load(without=("experts.unet",), cache='run = "never"').findings == []


@pytest.mark.parametrize(
    "changes",
    [{"experts": 'expert_input = "noised_image"'}, {"model": SCRATCH, "without": ("model.path",)}],
    ids=["asked for", "new model"],
)
def test_noised_image_needs_the_autoencoder_of_the_teachers(changes: dict[str, str], problems: Problems) -> None:
    assert problems(**changes) == [
        'experts.vae: is required by expert_input = "noised_image" (the default for a new model); name the SD1.5 '
        'autoencoder, or set expert_input = "random"'
    ]


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ("{hidden_sise = 3}", "model.geometry.hidden_sise: unknown key. Did you mean 'hidden_size'?"),
        ("{_metadata = {}}", "model.geometry._metadata: unknown key."),
        (
            "{hidden_size = 3}",
            "model.geometry: hidden_size 3 is not num_attention_heads 4 x attention_head_dim 128 = 512",
        ),
        ("{sol_geometric_weight = 2.0}", "model.geometry: sol_geometric_weight is 2.0, it must lie in [0, 1]"),
    ],
)
def test_geometry_of_a_new_model_is_checked(geometry: str, message: str, problems: Problems) -> None:
    assert problems(**NEW_MODEL, model=f"{SCRATCH}\ngeometry = {geometry}") == [message]


@pytest.mark.parametrize(
    ("count", "geometry", "limit"),
    [(37, "{}", "36 of 15 double_blocks + 25 single_blocks"), (2, "{num_double_layers = 1, num_single_layers = 3}",
     "1 of 1 double_blocks + 3 single_blocks")],
)  # fmt: skip
def test_more_swapped_blocks_than_a_new_model_has(
    count: int, geometry: str, limit: str, load: Load, problems: Problems
) -> None:
    model = f"{SCRATCH}\ngeometry = {geometry}"
    assert load(**NEW_MODEL, model=model, memory=f"blocks_to_swap = {count - 1}").memory.blocks_to_swap == count - 1
    assert problems(**NEW_MODEL, model=model, memory=f"blocks_to_swap = {count}") == [
        f"memory.blocks_to_swap: is {count}, at most {limit} can be swapped (single_first; 2 of each list stay)"
    ]


@pytest.mark.parametrize(
    ("section", "setting", "reason"),
    [("distributed", "deepspeed = true", "distributed.fsdp shards the model across processes for full training"),
     ("train", "full_fp16 = true", "float16 weights lose small steps; train.full_half holds them in bfloat16")],
)  # fmt: skip
def test_settings_of_other_trainers_are_refused_by_name(
    section: str, setting: str, reason: str, problems: Problems
) -> None:
    (found,) = problems(**{section: setting})
    assert found.startswith(f"{section}.{setting.split()[0]}: is true, which is not supported: {reason}")


def test_guidance_that_is_not_embedded(problems: Problems, warnings_of: WarningsOf, load: Load) -> None:
    assert problems(objective="guidance_min = 6") == ["objective.guidance_min: is 6.0, above guidance_max = 5.0"]
    dropout = {**NEW_MODEL, "objective": "guidance_dropout = 0.1"}
    assert warnings_of(model=SCRATCH, **{k: v for k, v in dropout.items() if k != "model"}) == [
        no_effect("objective.guidance_dropout", NO_EMBEDDING)
    ]
    with_it = {**dropout, "model": f"{SCRATCH}\ngeometry = {{guidance_embeds = true}}"}
    assert load(**with_it).findings == []


@pytest.mark.parametrize("entry", ['hidden_size = "512"', "axes_dims_rope = 128", 'use_sol_prior = "no"'])
def test_geometry_value_of_a_wrong_type_names_its_field(entry: str, problems: Problems) -> None:
    (message,) = problems(**NEW_MODEL, model=f"{SCRATCH}\ngeometry = {{{entry}}}")
    assert message.startswith("model.geometry")
    assert entry.partition(" ")[0] in message


def test_teacher_without_its_part_of_the_model(problems: Problems) -> None:
    geometry = "{use_lune_expert = false, use_sol_prior = false}"
    assert problems(**NEW_MODEL, model=f"{SCRATCH}\ngeometry = {geometry}") == [
        f"experts.{teacher}: is true, but model.geometry.{part} is false, so the model cannot use the features; change one"
        for teacher, part in (("enable_lune", "use_lune_expert"), ("enable_sol", "use_sol_prior"))
    ]


def test_spatial_weighting_needs_sol(problems: Problems) -> None:
    assert problems(experts="enable_sol = false", objective="spatial_weighting = true") == [
        "objective.spatial_weighting: needs Sol's map, but experts.enable_sol is false; change one"
    ]


def test_settings_of_a_teacher_that_is_off(warnings_of: WarningsOf) -> None:
    found = warnings_of(
        experts='enable_lune = false\nenable_sol = false\nlune = "unet.safetensors"',
        objective='lune_weight = 0.3\nlune_mode = "huber"\nsol_warmup_steps = 5\nhuber_delta = 0.2',
    )
    lune, sol = "experts.enable_lune is false", "experts.enable_sol is false"
    assert sorted(found) == sorted(
        [
            no_effect("experts.lune", lune),
            no_effect("objective.lune_weight", lune),
            no_effect("objective.lune_mode", lune),
            no_effect("objective.sol_warmup_steps", sol),
            no_effect("objective.huber_delta", 'objective.loss is "l2" and experts.enable_lune is false'),
        ]
    )


WRONG = (
    'experts.sol_source: is "geometric": Sol is then a formula of the time alone, the same for every picture, which its author '
    'calls wrong; write "extracted" for the teacher\'s attention'
)


def test_the_geometric_sol_is_warned_of_with_what_it_leaves_idle(warnings_of: WarningsOf) -> None:
    geometric = 'experts.sol_source is "geometric"'
    alone = f"experts.enable_lune is false and {geometric}"
    found = warnings_of(experts='sol_source = "geometric"\nsol = "unet.safetensors"\nseed = 3')
    assert sorted(found) == sorted([WRONG, no_effect("experts.sol", geometric)])
    found = warnings_of(experts='sol_source = "geometric"\nenable_lune = false\nseed = 3\ntime_buckets = 4')
    assert sorted(found) == sorted([WRONG, no_effect("experts.unet", alone), no_effect("experts.seed", alone)])
    off = warnings_of(experts='sol_source = "geometric"\nenable_sol = false')
    assert off == [no_effect("experts.sol_source", "experts.enable_sol is false")]


def test_the_geometric_sol_alone_needs_no_unet(load: Load) -> None:
    config = load(without=("experts.unet",), experts='sol_source = "geometric"\nenable_lune = false')
    assert [str(finding) for finding in config.findings] == [WRONG]
    assert config.experts.extracted == []


@pytest.mark.parametrize("value", [0, -3])
def test_times_per_forward_is_a_positive_number_or_auto(value: int, problems: Problems, load: Load) -> None:
    assert problems(experts=f"times_per_forward = {value}") == [
        f'experts.times_per_forward: is {value}, expected 1 or more, or "auto"'
    ]
    assert load(experts="times_per_forward = 1").experts.times_per_forward == 1
    assert load(experts='times_per_forward = "auto"').findings == []


PUBLISHED = {"expert_input": "random", "expert_time": "reference", "sol_spatial_norm": "sum"}
CORRECTED = {"expert_input": "noised_image", "expert_time": "aligned", "sol_spatial_norm": "max"}


def test_auto_teachers_are_published_with_a_checkpoint_and_corrected_for_a_new_model(load: Load) -> None:
    assert resolve_experts(load()) == PUBLISHED
    assert resolve_experts(load(**NEW_MODEL, model=SCRATCH)) == CORRECTED


def test_auto_teachers_follow_the_record_of_the_checkpoint_and_a_setting_wins(load: Load) -> None:
    config = load(experts='sol_spatial_norm = "mean"')
    assert resolve_experts(config, CORRECTED) == {**CORRECTED, "sol_spatial_norm": "mean"}


# Memory

LORA = 'type = "lora"'


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"memory": "fp8_compute = true", "adapter": LORA, "train": 'mixed_precision = "bf16"'},
         'memory.fp8_compute: needs memory.base_storage = "fp8_scaled" or "fp8", but it is "none"'),
        ({"memory": 'fp8_compute = true\nbase_storage = "fp8_scaled"', "adapter": LORA, "train": 'mixed_precision = "no"'},
         'memory.fp8_compute: computes in bf16, but train.mixed_precision is "no"; set that to "bf16"'),
        ({"memory": 'fp8_compute = true\nbase_storage = "fp8_scaled"', "adapter": LORA, "train": 'mixed_precision = "bf16"',
          "run": 'device = "cpu"'},
         'memory.fp8_compute: needs a GPU that multiplies float8 numbers, but run.device is "cpu"'),
        ({"memory": 'attention = "flash"', "run": 'device = "cpu"', "train": 'mixed_precision = "bf16"'},
         'memory.attention: "flash" runs on GPUs only, but run.device is "cpu"'),
        ({"memory": 'attention = "flash"', "train": 'mixed_precision = "no"'},
         'memory.attention: "flash" computes in bf16 or fp16, but train.mixed_precision is "no"'),
        ({"memory": 'attention = "xformers"', "model": "t5_attn_mask = true"},
         'memory.attention: "xformers" does not support masks, but model.t5_attn_mask is true'),
        ({"memory": 'attention = "sage"'}, "memory.attention: is 'sage'"),
        ({"memory": "compile = true\nblocks_to_swap = 2"},
         "memory.compile: cannot be combined with memory.blocks_to_swap while the model itself trains"),
        ({"memory": "compile = true\nblocks_to_swap = 2", "adapter": LORA},
         "memory.compile: with memory.blocks_to_swap needs memory.gradient_checkpointing = true"),
        ({"memory": "compile = true\nblocks_to_swap = 2\ngradient_checkpointing = true\ncheckpoint_every = 2", "adapter": LORA},
         "memory.compile: with memory.blocks_to_swap needs memory.checkpoint_every = 1, but it is 2"),
        ({"memory": 'compile = true\nblocks_to_swap = "auto"\ncheckpoint_offload = true\ncheckpoint_every = 3', "adapter": LORA},
         "memory.compile: with memory.blocks_to_swap needs memory.checkpoint_every = 1, but it is 3"),
        ({"memory": 'compile = true\ncompile_mode = "reduce-overhead"'}, "memory.compile_mode: is 'reduce-overhead'"),
        ({"memory": 'compile = true\ncompile_backend = "eager"\ncompile_mode = "max-autotune-no-cudagraphs"'},
         'memory.compile_mode: is for compile_backend = "inductor", but that is "eager"'),
        ({"memory": 'base_storage = "int8"'},
         'memory.base_storage: is "int8", which is for frozen models, but this run trains the model itself; write "none", or train an'),
        ({"memory": "blocks_to_swap = -1"}, 'memory.blocks_to_swap: is -1, expected 0 or more, or "auto"'),
        ({"memory": "blocks_to_swap = 2", "run": 'device = "mps"'}, "memory.blocks_to_swap: is not supported on mps"),
        ({"memory": "checkpoint_offload = true\nblocks_to_swap = 2"},
         "memory.checkpoint_offload: cannot be combined with memory.blocks_to_swap while the model itself trains"),
        ({"memory": "checkpoint_offload = true\ngradient_checkpointing = false"},
         "memory.checkpoint_offload: recomputes blocks, but memory.gradient_checkpointing is false; remove one"),
        ({"memory": "checkpoint_offload = true", "run": 'device = "mps"'},
         "memory.checkpoint_offload: is not supported on mps"),
    ],
    ids=str,
)  # fmt: skip
def test_memory_settings_that_exclude_each_other(tables: dict[str, str], expected: str, problems: Problems) -> None:
    found = problems(**tables)
    assert any(message.startswith(expected) for message in found), found


@pytest.mark.parametrize(
    "tables",
    [
        {"memory": "checkpoint_offload = true\nblocks_to_swap = 2", "adapter": LORA},
        {"memory": "compile = true\nblocks_to_swap = 2\ncheckpoint_offload = true", "adapter": LORA},
        {"memory": "compile = true\ngradient_checkpointing = true\ncheckpoint_every = 2", "adapter": LORA},
        {"memory": 'compile = true\ncompile_mode = "max-autotune-no-cudagraphs"'},
        {"memory": "checkpoint_offload = true\ncheckpoint_every = 2"},
        {"memory": 'fp8_compute = true\nbase_storage = "fp8"', "adapter": LORA, "train": 'mixed_precision = "bf16"'},
    ],
    ids=str,
)
def test_memory_settings_that_go_together(tables: dict[str, str], load: Load) -> None:
    assert load(**tables).findings == []


def test_compile_settings_without_compile(warnings_of: WarningsOf) -> None:
    assert warnings_of(memory='compile_dynamic = "true"\nfp8_compute_backward = "fp8"') == [
        no_effect("memory.fp8_compute_backward", "memory.fp8_compute is false"),
        no_effect("memory.compile_dynamic", "memory.compile is false"),
    ]


def test_scales_by_block_cannot_be_multiplied(warnings_of: WarningsOf, load: Load) -> None:
    memory = 'fp8_compute = true\nbase_storage = "fp8_scaled"'
    tables = {"adapter": LORA, "train": 'mixed_precision = "bf16"'}
    assert load(memory=memory, **tables).memory.scale == "row"
    assert load(memory='base_storage = "fp8_scaled"', adapter=LORA).memory.scale == "block"
    assert warnings_of(memory=memory + '\nfp8_scale = "block"', **tables) == [
        'memory.fp8_scale: is "block", which fp8 multiplication does not support; a scale per row is used instead'
    ]


# Files


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("model", "path"),
        ("model", "vae_path"),
        ("model", "clip_path"),
        ("model", "t5_path"),
        ("model", "clip_tokenizer"),
        ("model", "t5_tokenizer"),
        ("experts", "unet"),
        ("experts", "vae"),
        ("experts", "lune"),
        ("experts", "sol"),
    ],
)
def test_missing_file_is_named_with_its_key(table: str, name: str, problems: Problems, project: Path) -> None:
    assert problems(**{table: f'{name} = "gone.safetensors"'}) == [
        f"{table}.{name}: gone.safetensors: no such file or folder (looked in {project} and the project)"
    ]


def test_hub_id_is_not_looked_for_on_the_disk(load: Load) -> None:
    assert load(model='path = "owner/name"\nvae_path = "owner/name:vae"').findings == []


def test_encoders_are_needed_for_caching(problems: Problems, load: Load) -> None:
    without = ("model.vae_path", "model.clip_path", "model.t5_path")
    assert problems(without=without) == [
        "model.vae_path: is needed to encode images",
        "model.clip_path: is needed to encode captions",
        "model.t5_path: is needed to encode captions",
    ]
    assert load(without=without, cache='run = "never"').findings == []


def test_missing_prompt_file(problems: Problems, project: Path, load: Load) -> None:
    assert problems(sample='prompts = "prompts.txt"') == [
        "sample.prompts: prompts.txt: no such file; give a prompt file, or a list of prompts"
    ]
    (project / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    assert load(sample='prompts = "prompts.txt"').sample.prompts == "prompts.txt"


def test_missing_images_and_listing(problems: Problems) -> None:
    data = (
        '[[datasets]]\nimage_directory = "gone"\n'
        '[[datasets]]\nimage_jsonl_file = "gone.jsonl"\ncache_directory = "cache"\n'
    )
    assert problems(data=data) == [
        "datasets[0].image_directory: gone: no such folder",
        "datasets[1].image_jsonl_file: gone.jsonl: no such file",
    ]


def test_files_that_the_demo_will_make_need_not_exist_yet(load: Load) -> None:
    model = "\n".join(f'{name} = "demo/{name}"' for name in ("path", "vae_path", "clip_path", "t5_path"))
    data = '[[datasets]]\nimage_directory = "demo/images"\n'
    assert load(model=model, demo='folder = "demo"', data=data).findings == []


def test_output_folder_below_a_file(problems: Problems, project: Path) -> None:
    (project / "out").touch()
    assert problems(run='output_dir = "out/cat"') == [f"run.output_dir: {project / 'out'} is a file, expected a folder"]


def test_output_folder_need_not_exist(load: Load, project: Path) -> None:
    assert load(run='output_dir = "not/yet/there"').findings == []
    assert not (project / "not").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert unwritable(tmp_path / "new") == f"{tmp_path}: no permission to write; choose another folder"
    finally:
        tmp_path.chmod(0o700)


# Masks


def test_weights_of_masks_are_those_of_the_family(load: Load) -> None:
    train = load().train
    assert (train.mask_foreground, train.mask_background) == (2.0, 0.5)
    assert (type(train)().mask_foreground, type(train)().mask_background) == (1.0, 0.0)


@pytest.mark.parametrize("line", ["mask_foreground = 3", "mask_background = 0.1", "mask_normalize = true"])
def test_weights_of_masks_have_no_effect_without_the_masked_loss(line: str, warnings_of: WarningsOf) -> None:
    key = f"train.{line.partition(' ')[0]}"
    line = line.replace("= 3", "= 3.0")
    assert warnings_of(train=line) == [f"{key}: has no effect because train.masked_loss is false"]
    assert warnings_of(train=f"masked_loss = true\n{line}") == []


def test_verification_has_no_effect_where_names_are_enough(warnings_of: WarningsOf) -> None:
    expected = ['cache.verify: has no effect because cache.skip_existing is "name"']
    assert warnings_of(cache='verify = "full"\nskip_existing = "name"') == expected
    assert warnings_of(cache='verify = "full"') == []


def test_rates_of_patterns_need_a_rate_that_they_follow(problems: Problems) -> None:
    (said,) = problems(optimizer='lr = 0\ngroup_lr = {"single_blocks.*" = 1e-4}')
    assert said.startswith(
        "optimizer.group_lr: gives rates that follow optimizer.lr, which is 0; set that, and end with"
    )


def test_masks_that_leave_nothing_to_learn_are_refused(problems: Problems) -> None:
    assert problems(train="masked_loss = true\nmask_foreground = 0.0\nmask_background = 0.0") == [
        "train.mask_foreground: and mask_background are both 0, so masked images would not be trained; set one of them"
    ]


def test_checkpoint_of_a_run_folder_and_the_published_repository_are_accepted(
    load: Callable[..., RunConfig], project: Path
) -> None:
    (project / "older").mkdir()
    for path in ("older:latest", str(project / "older:step_5"), "hub", "hub:step_5", "owner/name:sub/file"):
        assert load(model=f'path = "{path}"').model.path == path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", 'model.path: none: for a new model write model.init = "scratch"'),
        ("best", "model.path: best: write the folder too, as in folder:best"),
        (
            "latest",
            'model.path: latest: an interrupted run continues by itself (resume.from = "auto"); for another run write '
            "folder:latest",
        ),
    ],
)
def test_load_targets_that_mean_something_else_here_say_what(
    path: str, message: str, problems: Callable[..., list[str]]
) -> None:
    assert message in problems(model=f'path = "{path}"')


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"model": 'init = "scratch"', "without": ("model.path",)},
            'ema.init: is "checkpoint", but model.init is "scratch"; write ema.init = "model"',
        ),
        (
            {"adapter": 'type = "lora"'},
            'ema.init: is "checkpoint", but the average of an adapter starts with it; write ema.init = "model"',
        ),
        (
            {"ema": 'init = "checkpoint"\nwarmup = true'},
            'ema.warmup: would soon overwrite the average that ema.init = "checkpoint" starts from; write ema.warmup = false',
        ),
    ],
)
def test_average_of_a_checkpoint_needs_one_that_is_kept(
    tables: dict[str, Any], message: str, problems: Callable[..., list[str]]
) -> None:
    assert message in problems(**{"ema": 'init = "checkpoint"', **tables})


# Options of new models


def test_options_of_the_model_are_no_fields_of_its_geometry(problems: Problems) -> None:
    found = problems(model=SCRATCH + '\ngeometry = {text_positions = "index"}', **NEW_MODEL)
    assert found == ["model.geometry.text_positions: unknown key."]


def test_a_temperature_per_head_needs_sol(warnings_of: WarningsOf) -> None:
    model = SCRATCH + "\ntemperature_per_head = true\ngeometry = {use_sol_prior = false}"
    experts = 'vae = "vae.safetensors"\nenable_sol = false'
    found = warnings_of(model=model, without=("model.path",), experts=experts, ema="warmup = true")
    assert found == ["model.temperature_per_head: has no effect because model.geometry.use_sol_prior is false"]


@pytest.mark.parametrize("line", ['text_positions = "index"', "temperature_per_head = true", "timestep_scale = 2.0"])
def test_other_families_have_no_such_options(line: str, problems: Problems) -> None:
    found = problems(model=f'arch = "fd"\n{line}', without=("experts.unet",))
    assert [text.split(":")[0] for text in found] == [f"model.{line.split()[0]}"]
    assert found[0].endswith("is a setting of TinyFlux-Deep; FLUX.1-dev does not have it")


@pytest.mark.parametrize("value", ["0.0", "-1.0"])
def test_the_time_scale_is_positive(value: str, problems: Problems) -> None:
    (found,) = problems(model=f"timestep_scale = {value}")
    assert found.startswith("model.timestep_scale:")


def test_distillation_below_an_adapter_has_no_effect(warnings_of: WarningsOf) -> None:
    teachers = {
        "experts": 'expert_input = "random"',
        "adapter": 'type = "lora"',
        "ema": "enabled = false",
    }
    keys = ["lune_weight = 5.0", 'lune_mode = "hard"', "sol_warmup_steps = 3", "distill_on_dropped = false"]
    found = warnings_of(**teachers, objective="\n".join([*keys, "lune_teacher_dropout = 0.2"]))
    assert sorted(found) == sorted(
        no_effect(f"objective.{key.split()[0]}", 'adapter.type is "lora"') for key in keys[:-1]
    )
    # It decides for which samples Sol's map weighs the main loss.
    weighted = warnings_of(**teachers, objective="distill_on_dropped = false\nspatial_weighting = true")
    assert weighted == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [("extensions = {single_blocks = 2}", "extensions: is not supported: whole blocks beside the model's"),
     ("layer_specs = {}", "layer_specs: is written as [[adapter.targets]], with the path of the layer as pattern"),
     ("defaults = {rank = 4}", "defaults: is written in [adapter] itself"),
     ("include_double_attn = true", 'include_double_attn: is written as adapter.kinds, a list that holds "double_attn"'),
     ("include_single_mlp = false", 'include_single_mlp: is written as adapter.kinds, a list that lacks "single_mlp"')],
)  # fmt: skip
def test_settings_of_the_published_lora_trainer_are_told_where_they_go(
    setting: str, message: str, problems: Problems
) -> None:
    (found,) = problems(adapter=f'type = "lora"\n{setting}', ema="enabled = false")
    assert found.startswith(f"adapter.{message}")


@pytest.mark.parametrize(
    ("changes", "warms"),
    [
        ({}, True),
        ({**NEW_MODEL, "model": SCRATCH, "ema": ""}, False),
        ({"ema": 'init = "checkpoint"'}, False),
        ({"adapter": 'type = "lora"'}, True),
        ({"ema": "warmup = false"}, False),
        ({**NEW_MODEL, "model": SCRATCH, "ema": "warmup = true"}, True),
    ],
)
def test_a_new_average_is_warmed_up_where_it_starts_as_weights_that_were_trained(
    changes: dict[str, Any], warms: bool, load: Load
) -> None:
    config = load(**changes)
    assert config.warms_average == warms
    assert config.ema.warmup == ("auto" if "warmup" not in changes.get("ema", "") else warms)
