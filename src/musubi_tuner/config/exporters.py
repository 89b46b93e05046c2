"""Writing a run as an option file of another trainer, as far as it supports the settings. Torch-free."""

from typing import Any

import tomli_w

from musubi_tuner.adapter_types import ADAPTERS
from musubi_tuner.config.run_config import RunConfig
from musubi_tuner.config.when import is_on
from musubi_tuner.errors import ConfigError
from musubi_tuner.optimizers import OPTIMIZERS

_SHARED: dict[str, str] = {
    "run.name": "output_name", "run.output_dir": "output_dir", "run.seed": "seed", "adapter.rank": "network_dim",
    "adapter.dropout": "network_dropout", "adapter.init_from": "network_weights",
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
        "objective.ip_noise_gamma_random_strength": "ip_noise_gamma_random_strength",
        "train.prior_loss_weight": "prior_loss_weight", "train.masked_loss": "masked_loss",
        "memory.checkpoint_offload": "cpu_offload_checkpointing", "objective.huber_delta": "huber_c",
        "objective.huber_schedule": "huber_schedule", "objective.huber_scale": "huber_scale",
    },
}  # fmt: skip
PROGRAMS = tuple(_OWN)
"""Trainers that runs can be exported to."""
_PRECISIONS = {"float32": "float", "float16": "fp16", "bfloat16": "bf16"}
_LOSSES = {"l2": "l2", "l1": "l1", "pseudo_huber": "huber", "pseudo_smooth_l1": "smooth_l1"}
_DECIDED_HERE = ("train.mixed_precision", "memory.blocks_to_swap")
_COUNTS = ("_every_n_steps", "_every_n_epochs")
_SAID_BELOW = ("model.arch", "adapter.type", "model.init", "scheduler.warmup_ratio", "adapter.alpha", "optimizer.weight_decay",
               "optimizer.eps", "optimizer.betas", "optimizer.args",
               *(f"adapter.{name}" for name in ("lokr_factor", "lokr_decompose_both", "lokr_full", "block_size", "constraint", "rescaled", "rs_lora")))  # fmt: skip
"""Settings that the network module implies, or that become part of another option."""
_NOT_OF_THE_RESULT = ("cache.", "distributed.", "hub.", "log.", "resume.", "demo.", "run.", "schema_version")
"""Settings that are left out without a message: they do not change the result."""


def export(config: RunConfig, to: str) -> tuple[str, list[tuple[str, str]]]:
    """A run as the text of another trainer's option file, and what is left out: key and reason.

    Args:
        to: one of `PROGRAMS`.

    Raises:
        ConfigError: for a family that the other program does not train.
    """
    if not config.spec.other_names:
        raise ConfigError(f"{config.path}: {config.spec.title} is not supported by other trainers")
    if config.adapter.type == "none":
        raise ConfigError(f"{config.path}: trains the model itself, but only LoRA runs can be exported")
    names = {**_SHARED, **_OWN[to]}
    written: dict[str, Any] = {"network_module": "networks.lora_flux", **_lycoris(config)}
    lost: list[tuple[str, str]] = []
    for key in config.origins:
        value, name = config.get(key), names.get(key)
        if name is not None and value == "auto" and key in _DECIDED_HERE:
            lost.append((key, 'is "auto", which only this program supports; add a value for it'))
        elif key == "sample.prompts" and isinstance(value, list):
            lost.append((key, f"are in the run file; write them to a file and set {name} to its path"))
        elif key == "scheduler.type" and value == "plateau":
            lost.append((key, 'is "plateau", and schedules there do not see the loss; the rate is constant'))
            written[names[key]] = "constant"
        elif name is not None and value is not None and value != "auto" and not (name.endswith(_COUNTS) and value == 0):
            written[name] = value
        elif key == "memory.base_storage":
            _storage(value, to, written, lost)
        elif key == "objective.loss":
            _loss(value, to, written, lost)
        elif key == "save.dtype":
            written["save_precision"] = _PRECISIONS[value]
        elif key in _SAID_BELOW:
            continue
        elif key in config.set_keys() and is_on(value) and not key.startswith(_NOT_OF_THE_RESULT) and name is None:
            lost.append((key, f"is {value!r}, but there is no such option there"))
    rank = config.adapter.rank
    written["network_alpha"] = rank / 2 if config.adapter.alpha is None else config.adapter.alpha or float(rank)
    if config.scheduler.type in ("constant", "plateau") and (
        config.scheduler.warmup_steps or config.scheduler.warmup_ratio
    ):
        written["lr_scheduler"] = "constant_with_warmup"
    if config.scheduler.warmup_ratio:
        written["lr_warmup_steps"] = config.scheduler.warmup_ratio
    if to == "kohya" and config.adapter.exclude is None and config.spec.adapters.exclude:
        lost.append(
            (
                "adapter.exclude",
                "the layers that are left out by default here are adapted there; network_args can give them rank 0",
            )
        )
    if to == "kohya":
        written |= {"model_prediction_type": "raw", "network_train_unet_only": True}
        if written.get("timestep_sampling") not in _DENSITIES:
            lost.append(
                (
                    "objective.timestep_sampling",
                    f"is {written.pop('timestep_sampling', None)!r}, which sd-scripts does not have",
                )
            )
    optimizer, arguments = config.optimizer, [f"weight_decay={config.optimizer.weight_decay}"]
    record = OPTIMIZERS[optimizer.type]
    arguments += [f"eps={optimizer.eps}"] if record.eps else []
    arguments += ["betas=" + ",".join(str(beta) for beta in optimizer.betas)] if record.betas else []
    arguments += [f"{name}={value}" for name, value in {**record.given, **optimizer.args}.items()]
    written["optimizer_args"] = arguments
    if record.source.startswith("musubi_tuner"):
        lost.append(("optimizer.type", f'is "{written.pop("optimizer_type")}", which is put together here'))
    elif optimizer.type not in _OPTIMIZERS:
        written["optimizer_type"] = record.source.replace(":", ".")
    if "dataset_config" not in written:
        count = len(config.dataset_tables.get("datasets", []))
        written["dataset_config"] = "dataset.toml"
        lost.append(("datasets", f"write [general] and {count} [[datasets]] to dataset.toml"))
    return tomli_w.dumps(written), lost


_OPTIMIZERS = ("AdamW", "AdamW8bit", "Adafactor")
"""Optimizers that both programs know by these names; of others they take the class."""


def _lycoris(config: RunConfig) -> dict[str, Any]:
    """Options of a type of adapter that is no LoRA: that of LyCORIS and its arguments."""
    adapter, record = config.adapter, ADAPTERS[config.adapter.type]
    if (record.written_as or adapter.type) == "lora" and adapter.type != "dylora":
        return {}
    arguments = [f"algo={_ALGORITHMS.get(adapter.type, adapter.type)}"] + (
        ["dora_wd=True"] if adapter.type == "dora" else []
    )
    for name, option in _ADAPTER_ARGUMENTS.items():
        if name in record.uses and is_on(getattr(adapter, name)):
            arguments.append(f"{option}={getattr(adapter, name)}")
    return {"network_module": "lycoris.kohya", "network_args": arguments}


_ALGORITHMS = {"dora": "locon", "native": "full"}
_ADAPTER_ARGUMENTS = {
    "lokr_factor": "factor", "lokr_decompose_both": "decompose_both", "lokr_full": "full_matrix", "block_size": "block_size",
    "constraint": "constraint", "rescaled": "rescaled", "rs_lora": "rs_lora",
}  # fmt: skip
_DENSITIES = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")


def _storage(value: Any, to: str, written: dict[str, Any], lost: list[tuple[str, str]]) -> None:
    if value == "fp8" or (value == "fp8_scaled" and to == "musubi"):
        written |= {"fp8_base": True} | ({"fp8_scaled": True} if value == "fp8_scaled" else {})
    elif value != "none":
        lost.append(("memory.base_storage", f"is {value!r}, which {to} does not have"))


def _loss(value: Any, to: str, written: dict[str, Any], lost: list[tuple[str, str]]) -> None:
    if to == "kohya" and value in _LOSSES:
        written["loss_type"] = _LOSSES[value]
    elif value != "l2":
        lost.append(("objective.loss", f"is {value!r}, which {to} does not have"))
