"""Writing a run as options of another trainer, as far as it knows them. Torch-free."""

from collections.abc import Callable
from typing import Any

import tomli_w

from musubi_tuner.config.importers.tools import DEFAULTS, GENERAL
from musubi_tuner.config.run_config import RunConfig
from musubi_tuner.config.when import is_on
from musubi_tuner.errors import ConfigError

_SHARED: dict[str, str] = {
    "run.name": "output_name", "run.output_dir": "output_dir", "run.seed": "seed", "adapter.rank": "network_dim",
    "adapter.alpha": "network_alpha", "adapter.dropout": "network_dropout", "adapter.init_from": "network_weights",
    "adapter.max_norm": "scale_weight_norms", "adapter.merge": "base_weights", "adapter.merge_multipliers": "base_weights_multiplier",
    "adapter.rank_from_weights": "dim_from_weights", "optimizer.lr": "learning_rate", "optimizer.type": "optimizer_type",
    "scheduler.type": "lr_scheduler", "scheduler.warmup_steps": "lr_warmup_steps", "train.max_steps": "max_train_steps",
    "train.max_epochs": "max_train_epochs", "train.grad_accum_steps": "gradient_accumulation_steps",
    "train.max_grad_norm": "max_grad_norm", "train.mixed_precision": "mixed_precision",
    "train.loader_workers": "max_data_loader_n_workers", "memory.gradient_checkpointing": "gradient_checkpointing",
    "memory.blocks_to_swap": "blocks_to_swap", "objective.timestep_sampling": "timestep_sampling",
    "objective.discrete_flow_shift": "discrete_flow_shift", "objective.sigmoid_scale": "sigmoid_scale",
    "objective.guidance_scale": "guidance_scale", "objective.weighting_scheme": "weighting_scheme",
    "objective.logit_mean": "logit_mean", "objective.logit_std": "logit_std", "objective.mode_scale": "mode_scale",
    "objective.min_timestep": "min_timestep", "objective.max_timestep": "max_timestep", "save.every_epochs": "save_every_n_epochs",
    "save.every_steps": "save_every_n_steps", "save.state": "save_state", "save.comment": "training_comment",
    "sample.prompts": "sample_prompts", "sample.every_steps": "sample_every_n_steps", "sample.every_epochs": "sample_every_n_epochs",
    "sample.at_first": "sample_at_first", "dataset_config": "dataset_config",
}  # fmt: skip
"""Our key -> option of both programs."""
_OWN: dict[str, dict[str, str]] = {
    "musubi": {
        "model.path": "dit", "model.vae_path": "vae", "model.clip_path": "text_encoder", "model.t5_path": "text_encoder2",
        "model.fp8_t5": "fp8_t5", "objective.preserve_distribution_shape": "preserve_distribution_shape",
        "memory.swap_pinned": "use_pinned_memory_for_block_swap", "memory.compile": "compile",
        "objective.ip_noise_gamma": "ip_noise_gamma",
    },
    "kohya": {
        "model.path": "pretrained_model_name_or_path", "model.vae_path": "ae", "model.clip_path": "clip_l",
        "model.t5_path": "t5xxl", "model.t5_max_tokens": "t5xxl_max_token_length", "objective.ip_noise_gamma": "ip_noise_gamma",
        "objective.ip_noise_gamma_random_strength": "ip_noise_gamma_random_strength", "objective.noise_offset": "noise_offset",
        "objective.noise_offset_random_strength": "noise_offset_random_strength",
        "objective.adaptive_noise_scale": "adaptive_noise_scale",
        "objective.multires_noise_iterations": "multires_noise_iterations",
        "objective.multires_noise_discount": "multires_noise_discount", "objective.min_snr_gamma": "min_snr_gamma",
        "train.prior_loss_weight": "prior_loss_weight", "train.masked_loss": "masked_loss",
        "memory.checkpoint_offload": "cpu_offload_checkpointing",
    },
}  # fmt: skip
_WORDS: dict[str, dict[Any, Any]] = {
    "save.dtype": {"float32": "float", "float16": "fp16", "bfloat16": "bf16"},
    "objective.loss": {"l2": "l2", "l1": "l1", "pseudo_huber": "huber", "pseudo_smooth_l1": "smooth_l1"},
}
_NOT_OF_THE_RESULT = ("cache.", "distributed.", "hub.", "log.", "resume.", "demo.", "run.", "schema_version")
"""Settings that are left out without a word: they say how this program works."""


def export(config: RunConfig, to: str) -> tuple[str, list[tuple[str, str]]]:
    """A run as the text of another trainer's option file, and what it cannot say: key and reason.

    Raises:
        ConfigError: for a family that the other program does not train.
    """
    if not config.spec.other_names:
        raise ConfigError(f"{config.path}: {config.spec.title} is not trained by other programs")
    if config.adapter.type == "none":
        raise ConfigError(f"{config.path}: trains the model itself; only LoRA runs can be exported")
    return EXPORTS[to](config, to)


def _options(config: RunConfig, to: str) -> tuple[str, list[tuple[str, str]]]:
    names = {**_SHARED, **_OWN[to]}
    written: dict[str, Any] = {"network_module": "networks.lora_flux"}
    lost = []
    for key in config.origins:
        value, name = config.get(key), names.get(key)
        default = DEFAULTS[to].get(key, config.spec.defaults.get(key))
        if key in ("model.arch", "adapter.type", "model.init") or not key:
            continue
        if key == "save.dtype":
            written["save_precision"] = _WORDS[key][value]
        elif key == "objective.loss" and to == "kohya":
            if value in _WORDS[key]:
                written["loss_type"] = _WORDS[key][value]
            else:
                lost.append((key, f"is {value!r}, which sd-scripts has not"))
        elif key == "memory.base_storage" and value in ("fp8", "fp8_scaled"):
            written |= {"fp8_base": True} | ({"fp8_scaled": True} if value == "fp8_scaled" and to == "musubi" else {})
        elif name is not None:
            if value is not None and (is_on(value) or is_on(default)):
                written[name] = value
        elif key in config.set_keys() and is_on(value) and not key.startswith(_NOT_OF_THE_RESULT):
            lost.append((key, f"is {value!r}, and there is no such option there"))
    if to == "kohya":
        written["model_prediction_type"] = "raw"
    arguments = [
        f"{name}={getattr(config.optimizer, name)}"
        for name in ("weight_decay", "eps")
        if config.optimizer.type != "Adafactor"
    ]
    if config.optimizer.type != "Adafactor":
        arguments.append("betas=" + ",".join(str(beta) for beta in config.optimizer.betas))
    written["optimizer_args"] = arguments
    tables = config.dataset_tables
    if "dataset_config" not in written and tables:
        general = {**{key: value for key, value in GENERAL[to].items() if value is None}, **tables.get("general", {})}
        written["dataset_config"] = "dataset.toml"
        lost.append(
            (
                "datasets",
                f"write them to dataset.toml: {len(tables.get('datasets', []))} data sets, [general] {general}",
            )
        )
    return tomli_w.dumps(written), lost


EXPORTS: dict[str, Callable[[RunConfig, str], tuple[str, list[tuple[str, str]]]]] = {
    "musubi": _options,
    "kohya": _options,
}
"""Programs that can be written for."""
