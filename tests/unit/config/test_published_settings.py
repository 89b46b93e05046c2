"""Settings of the published TinyFlux trainer: every field ends in exactly one list, and its default is what the run does."""

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.config.__main__ import main
from musubi_tuner.config.importers import Imported, import_published

TABLE: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "learning_rate": (1e-4, {"optimizer.lr": 1e-4}),
    "weight_decay": (0.01, {"optimizer.weight_decay": 0.01, "optimizer.decay_all": True}),
    "betas": ([0.9, 0.95], {"optimizer.betas": [0.9, 0.95]}),
    "grad_clip": (1.0, {"train.max_grad_norm": 1.0}),
    "optimizer": ("adamw", {"optimizer.type": "AdamW"}),
    "warmup_steps": (1000, {"scheduler.warmup_steps": 1000}),
    "total_steps": (100000, {"train.max_steps": 100000}),
    "max_epochs": (None, {"train.max_epochs": None}),
    "lr_scheduler": ("cosine", {"scheduler.type": "cosine"}),
    "min_lr": (0.0, {"scheduler.min_lr": 0.0}),
    "warmup_type": ("linear", {"scheduler.warmup_type": "linear"}),
    "gradient_accumulation": (1, {"train.grad_accum_steps": 1}),
    "gradient_checkpointing": (False, {"memory.gradient_checkpointing": False}),
    "compile_mode": (None, {"memory.compile": False}),
    "ema_decay": (0.9999, {"ema.decay": 0.9999, "ema.enabled": True, "ema.warmup": False}),
    "shift": (3.0, {"objective.shift": 3.0}),
    "use_snr_weighting": (True, {"objective.min_snr_form": "published"}),
    "snr_gamma": (5.0, {"objective.min_snr_gamma": 5.0}),
    "use_huber_loss": (False, {"objective.loss": "l2"}),
    "huber_delta": (0.1, {"objective.huber_delta": 0.1}),
    "logit_normal_sampling": (
        True,
        {"objective.timestep_sampling": "logit_normal", "objective.timestep_stratified": False},
    ),
    "logit_mean": (0.0, {"objective.logit_mean": 0.0}),
    "logit_std": (1.0, {"objective.logit_std": 1.0}),
    "enable_lune": (True, {"experts.enable_lune": True}),
    "lune_weight": (0.1, {"objective.lune_weight": 0.1}),
    "lune_warmup_steps": (1000, {"objective.lune_warmup_steps": 1000}),
    "lune_dropout": (0.1, {"objective.lune_teacher_dropout": 0.1}),
    "lune_mode": ("cosine", {"objective.lune_mode": "cosine"}),
    "enable_sol": (True, {"experts.enable_sol": True}),
    "sol_weight": (0.05, {"objective.sol_weight": 0.05}),
    "sol_warmup_steps": (2000, {"objective.sol_warmup_steps": 2000}),
    "sol_dropout": (
        0.1,
        {
            "objective.sol_teacher_dropout": 0.1,
            "objective.teacher_dropout_mode": "batch",
            "objective.distill_on_dropped": False,
        },
    ),
    "use_spatial_weighting": (False, {"objective.spatial_weighting": False}),
    "text_dropout": (0.0, {"objective.text_dropout": 0.0, "objective.drop_experts_with_text": False}),
    "checkpoint_dir": ("checkpoints", {"run.output_dir": "checkpoints/tinyflux"}),
    "save_every_steps": (5000, {"save.every_steps": 5000}),
    "keep_last_n_steps": (3, {"save.keep_last_steps": 3}),
    "save_every_epochs": (1, {"save.every_epochs": 1, "save.best": True}),
    "keep_last_n_epochs": (3, {"save.keep_last_epochs": 3}),
    "log_every": (100, {"log.every_steps": 100}),
    "tensorboard_dir": (None, {"log.tensorboard": False}),
    "sample_every": (2000, {"sample.every_steps": 2000}),
    "sample_prompts": (None, {"sample.prompts": None}),
    "sample_dir": ("samples", {}),
    "dtype": ("torch.bfloat16", {"train.mixed_precision": "bf16"}),
    "hf_repo_id": (None, {"hub.repo_id": None}),
    "hf_run_name": (None, {"hub.run_name": None}),
    "upload_every_steps": (0, {}),
    "upload_every_epochs": (0, {}),
}
"""Field -> its published default, and what it is in a run of ours."""
DEFAULTS = {field: default for field, (default, _) in TABLE.items()}
EXPECTED = {key: value for _, ours in TABLE.values() for key, value in ours.items()}
TEACHER_WAYS = {"experts.expert_input": "random", "experts.expert_time": "reference", "experts.sol_spatial_norm": "sum"}


@pytest.fixture
def as_run(project: Path) -> Callable[..., RunConfig]:
    """Write settings as json, translate them with the command, and load the run file that it writes."""
    data = project / "data.toml"
    data.write_text('[[datasets]]\nimage_directory = "images"\n', encoding="utf-8")

    def run(document: dict[str, Any]) -> RunConfig:
        source, target = project / "training_config.json", project / "made.toml"
        source.write_text(json.dumps(document, indent=2), encoding="utf-8")
        target.unlink(missing_ok=True)
        assert main(["import", str(source), "-o", str(target), "--dataset_config", str(data)]) == 0
        return load_config(target)

    return run


def imported(**changes: Any) -> Imported:
    found = import_published({**DEFAULTS, **changes})
    assert found is not None
    return found


def values(**changes: Any) -> dict[str, Any]:
    """What the run file would hold, by dotted key."""
    document = imported(**changes).document
    return {
        f"{section}.{key}": value
        for section, table in document.items()
        if isinstance(table, dict)
        for key, value in table.items()
    }


@pytest.mark.parametrize("document", [DEFAULTS, {"learning_rate": 1e-4, "optimizer": "adamw"}], ids=["whole", "short"])
def test_defaults_are_a_run_with_the_values_of_the_table(
    document: dict[str, Any], as_run: Callable[..., RunConfig]
) -> None:
    config = as_run(document)
    assert {key: config.get(key) for key in EXPECTED} == EXPECTED
    assert {key: config.get(key) for key in TEACHER_WAYS} == TEACHER_WAYS
    assert config.spec.code == "tf" and config.model.path == "hub"
    assert config.findings == []  # nothing in it is without effect


def test_every_field_is_in_exactly_one_list() -> None:
    report = imported().report
    assert sorted(report.keys()) == sorted(TABLE)
    assert report.unknown == report.refused == report.needs_you == report.dropped_changes_result == []


def test_what_a_short_file_leaves_out_is_listed_where_it_differs_from_ours() -> None:
    found = import_published({"learning_rate": 3e-4, "total_steps": 500})
    assert found is not None
    assert sorted(found.report.keys()) == ["learning_rate", "total_steps"]
    listed = dict(found.report.defaulted)
    assert listed["objective.text_dropout"] == 0.0 and listed["optimizer.decay_all"] is True
    assert "objective.shift" not in listed and "shift" not in found.document["objective"]
    assert found.document["train"] == {"max_steps": 500}


def test_a_run_that_ends_by_epochs_keeps_the_length_of_its_schedule() -> None:
    found = imported(max_epochs=2, total_steps=5000)
    assert found.document["train"]["max_epochs"] == 2
    assert found.document["scheduler"]["total_steps"] == 5000
    assert ("scheduler.total_steps", 5000) in found.report.defaulted
    assert "total_steps" not in imported(total_steps=5000).document["scheduler"]
    assert "scheduler.total_steps" not in values(max_epochs=2, lr_scheduler="constant")


def test_it_is_said_what_bfloat16_does_not_round_here() -> None:
    (rule,) = [rule for source, *_, rule in imported(dtype="torch.bfloat16").report.converted if source == "dtype"]
    assert rule == 'of the computation; objective.precision = "bfloat16" rounds times, noise and losses too'


@pytest.mark.parametrize(
    ("field", "value", "key", "ours"),
    [
        ("learning_rate", 3e-4, "optimizer.lr", 3e-4),
        ("weight_decay", 0, "optimizer.weight_decay", 0.0),
        ("betas", [0.9, 0.99], "optimizer.betas", [0.9, 0.99]),
        ("betas", [0, 0.99], "optimizer.betas", [0.0, 0.99]),
        ("grad_clip", 0.5, "train.max_grad_norm", 0.5),
        ("optimizer", "adamw_8bit", "optimizer.type", "AdamW8bit"),
        ("optimizer", "adafactor", "optimizer.type", "Adafactor"),
        ("warmup_steps", 10, "scheduler.warmup_steps", 10),
        ("total_steps", 5000, "train.max_steps", 5000),
        ("max_epochs", 7, "train.max_epochs", 7),
        ("lr_scheduler", "linear", "scheduler.type", "linear"),
        ("min_lr", 1e-6, "scheduler.min_lr", 1e-6),
        ("warmup_type", "cosine", "scheduler.warmup_type", "cosine"),
        ("gradient_accumulation", 4, "train.grad_accum_steps", 4),
        ("gradient_checkpointing", True, "memory.gradient_checkpointing", True),
        ("compile_mode", "max-autotune", "memory.compile_mode", "max-autotune-no-cudagraphs"),
        ("compile_mode", "reduce-overhead", "memory.compile_mode", "default"),
        ("compile_mode", "max-autotune", "memory.compile", True),
        ("ema_decay", 0.99, "ema.decay", 0.99),
        ("shift", 1, "objective.shift", 1.0),
        ("use_snr_weighting", False, "objective.min_snr_form", "none"),
        ("snr_gamma", 3.0, "objective.min_snr_gamma", 3.0),
        ("use_huber_loss", True, "objective.loss", "huber"),
        ("logit_normal_sampling", False, "objective.timestep_sampling", "uniform"),
        ("logit_mean", 0.5, "objective.logit_mean", 0.5),
        ("logit_std", 2.0, "objective.logit_std", 2.0),
        ("enable_lune", False, "experts.enable_lune", False),
        ("lune_weight", 0.2, "objective.lune_weight", 0.2),
        ("lune_warmup_steps", 5, "objective.lune_warmup_steps", 5),
        ("lune_dropout", 0.3, "objective.lune_teacher_dropout", 0.3),
        ("lune_mode", "soft", "objective.lune_mode", "soft"),
        ("lune_mode", "l1", "objective.lune_mode", "hard"),
        ("enable_sol", False, "experts.enable_sol", False),
        ("sol_weight", 0.2, "objective.sol_weight", 0.2),
        ("sol_warmup_steps", 5, "objective.sol_warmup_steps", 5),
        ("sol_dropout", 0.3, "objective.sol_teacher_dropout", 0.3),
        ("use_spatial_weighting", True, "objective.spatial_weighting", True),
        ("text_dropout", 0.1, "objective.text_dropout", 0.1),
        ("checkpoint_dir", "/data/a/", "run.output_dir", "/data/a/tinyflux"),
        ("save_every_steps", 0, "save.every_steps", 0),
        ("keep_last_n_steps", 9, "save.keep_last_steps", 9),
        ("keep_last_n_steps", 0, "save.keep_last_steps", 0),
        ("keep_last_n_steps", -1, "save.keep_last_steps", 0),
        ("save_every_epochs", 2, "save.every_epochs", 2),
        ("keep_last_n_epochs", None, "save.keep_last_epochs", 0),
        ("log_every", 10, "log.every_steps", 10),
        ("tensorboard_dir", "runs", "log.tensorboard", True),
        ("sample_prompts", ["a cat"], "sample.prompts", ["a cat"]),
        ("dtype", "torch.float32", "train.mixed_precision", "no"),
        ("dtype", "torch.float16", "train.mixed_precision", "fp16"),
        ("dtype", "bfloat16", "train.mixed_precision", "bf16"),
        ("timestep_stratified", True, "objective.timestep_stratified", True),
        ("teacher_dropout_mode", "sample", "objective.teacher_dropout_mode", "sample"),
        ("distill_on_dropped", True, "objective.distill_on_dropped", True),
        ("allow_tf32", False, "run.allow_tf32", False),
        ("cudnn_benchmark", False, "run.cudnn_benchmark", False),
        ("matmul_precision", "highest", "run.allow_tf32", False),
        ("seed", 7, "run.seed", 7),
        ("ema_warmup", True, "ema.warmup", True),
        ("rope_freqs", "exact", "model.rope_freqs", "exact"),
        ("sol_spatial_norm", "max", "experts.sol_spatial_norm", "max"),
        ("expert_input", "noised_image", "experts.expert_input", "noised_image"),
        ("expert_time", "aligned", "experts.expert_time", "aligned"),
        ("snr_mode", "velocity", "objective.min_snr_form", "vpred"),
        ("snr_mode", "reference", "objective.min_snr_form", "published"),
    ],
)
def test_a_field_is_one_setting(field: str, value: Any, key: str, ours: Any) -> None:
    found = values(**{field: value})
    assert found[key] == ours and type(found[key]) is type(ours)
    assert sorted(imported(**{field: value}).report.keys()) == sorted({*TABLE, field})


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"use_masked_loss": True, "fg_loss_weight": 3, "bg_loss_weight": 1.0},
         {"train.masked_loss": True, "train.mask_foreground": 3.0, "train.mask_background": 1.0}),
        ({"guidance_embeds": True, "guidance_dropout": 0.1, "guidance_min": 1.0, "guidance_max": 4.0},
         {"objective.guidance_dropout": 0.1, "objective.guidance_min": 1.0, "objective.guidance_max": 4.0}),
        ({"use_huber_loss": True, "huber_delta": 0.2}, {"objective.loss": "huber", "objective.huber_delta": 0.2}),
        ({"lune_mode": "huber", "huber_delta": 0.2}, {"objective.loss": "l2", "objective.huber_delta": 0.1}),
        ({"lune_mode": "huber", "huber_delta": 0.2, "use_huber_loss": True},
         {"objective.loss": "huber", "objective.huber_delta": 0.2}),
        ({"hf_repo_id": "me/mine", "hf_run_name": "first", "upload_every_epochs": 1},
         {"hub.repo_id": "me/mine", "hub.run_name": "first"}),
        ({"sample_prompts": ["a"], "sample_every": 50}, {"sample.prompts": ["a"], "sample.every_steps": 50}),
        ({"lr_scheduler": "linear", "warmup_type": "cosine"}, {"scheduler.warmup_type": "linear"}),
        ({"matmul_precision": "high", "allow_tf32": True}, {"run.allow_tf32": True}),
        ({"matmul_precision": "highest", "allow_tf32": True}, {"run.allow_tf32": False}),
    ],
)  # fmt: skip
def test_fields_that_go_together(changes: dict[str, Any], keys: dict[str, Any]) -> None:
    found = values(**changes)
    assert {key: found[key] for key in keys} == keys
    assert sorted(imported(**changes).report.keys()) == sorted({*TABLE, *changes})


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"enable_lune": False}, ["objective.lune_weight", "objective.lune_mode", "experts.lune"]),
        ({"enable_sol": False, "use_spatial_weighting": True},
         ["objective.sol_weight", "objective.spatial_weighting", "experts.sol"]),
        ({"enable_lune": False, "enable_sol": False, "teacher_dropout_mode": "sample"},
         ["objective.teacher_dropout_mode", "experts.expert_input", "experts.unet"]),
        ({"use_snr_weighting": False, "snr_mode": "velocity"}, ["objective.min_snr_gamma"]),
        ({"snr_mode": "none"}, ["objective.min_snr_gamma"]),
        ({"logit_normal_sampling": False}, ["objective.logit_mean", "objective.logit_std"]),
        ({"lr_scheduler": "constant"}, ["scheduler.min_lr"]),
        ({"optimizer": "adafactor"}, ["optimizer.betas"]),
        ({"warmup_steps": 0}, ["scheduler.warmup_type"]),
        ({"fg_loss_weight": 3.0}, ["train.mask_foreground"]),
        ({"hf_repo_id": "me/mine"}, ["hub.repo_id"]),
        ({"hf_run_name": "first", "upload_every_epochs": 1, "upload_logs": True}, ["hub.run_name", "hub.every_epochs"]),
        ({"guidance_embeds": False, "guidance_dropout": 0.1}, ["objective.guidance_dropout"]),
    ],
)  # fmt: skip
def test_fields_without_effect_are_left_out_and_the_run_has_none_either(
    changes: dict[str, Any], gone: list[str], as_run: Callable[..., RunConfig]
) -> None:
    assert set(gone).isdisjoint(values(**changes))
    assert sorted(imported(**changes).report.keys()) == sorted({*TABLE, *changes})
    assert {found.code for found in as_run({**DEFAULTS, **changes}).findings} <= {"V33"}  # clipped twice, as there


def test_keeping_no_file_is_said_to_keep_all() -> None:
    converted = imported(keep_last_n_steps=0).report.converted
    rule = "all are kept; that trainer deletes even the newest"
    assert ("keep_last_n_steps", 0, "save.keep_last_steps", 0, rule) in converted


def test_settings_of_uploads() -> None:
    """The intervals are of two keys of [hub]; a version without them says that they are lost."""
    given = {"hf_repo_id": "me/mine", "upload_every_steps": 100, "upload_every_epochs": 2, "upload_logs": True,
             "upload_samples": True}  # fmt: skip
    found = imported(**given)
    targets = {"upload_every_steps": "hub.every_steps", "upload_every_epochs": "hub.every_epochs",
               "upload_logs": "hub.upload_logs", "upload_samples": "hub.upload_samples"}  # fmt: skip
    lost = {field for field, _ in found.report.dropped_changes_result}
    kept = {(field, key, value) for field, key, value in found.report.carried if key.startswith("hub.")}
    assert kept == {(f, k, given[f]) for f, k in {**targets, "hf_repo_id": "hub.repo_id"}.items() if f not in lost}
    assert lost <= set(targets)
    assert sorted(found.report.keys()) == sorted({*TABLE, *given})


def test_unknown_fields_are_warned_of_and_left_out(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = project / "settings.json", project / "run.toml"
    source.write_text(json.dumps({**DEFAULTS, "learning_rat": 1.0}), encoding="utf-8")
    assert main(["import", str(source), "-o", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "warning    learning_rat: is left out: unknown key. Did you mean 'learning_rate'?" in printed
    assert "info       keep_last_n_steps" not in printed
    assert "note       the source file has no data sets" in printed
    assert "carried    learning_rate -> optimizer.lr = 0.0001" in printed
    assert "learning_rat" not in tomllib.loads(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer": "lion"}, "optimizer: is 'lion', expected one of adamw, adamw_8bit, adafactor"),
        ({"use_huber_loss": "yes"}, "use_huber_loss: is 'yes', expected one of true, false"),
        ({"use_huber_loss": 1}, "use_huber_loss: is 1, expected one of true, false"),
        ({"dtype": "torch.float64"}, "dtype: is 'torch.float64', expected one of torch.bfloat16, "),
        ({"checkpoint_dir": None}, "checkpoint_dir: is None, expected a text"),
        ({"shift": None}, "shift: is null, and a run file has no null"),
        ({"sample_prompts": ["a cat", None]}, 'sample_prompts: is ["a cat", null], and a run file has no null'),
    ],
)
def test_values_that_no_run_can_have(
    changes: dict[str, Any], expected: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = project / "settings.json", project / "run.toml"
    source.write_text(json.dumps({**DEFAULTS, **changes}), encoding="utf-8")
    assert main(["import", str(source), "-o", str(target)]) == 1
    printed = capsys.readouterr().out
    assert f"error      {expected}" in printed and "written; errors above to fix: 1" in printed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"hidden_size": 512, "num_double_layers": 15, "lune_dropout": 0.1}', "is not the training_config.json"),
        ("[1]", "is not the training_config.json"),
        ("{", "not valid JSON"),
        (None, "no such file"),
    ],
)
def test_other_json_files(text: str | None, expected: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = project / "other.json"
    if text is not None:
        source.write_text(text, encoding="utf-8")
    assert main(["import", str(source), "-o", "run.toml"]) == 2
    assert f"error: {source}: {expected}" in capsys.readouterr().err
