"""What the adapter files of a run say about it."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from musubi_tuner import __version__
from musubi_tuner.adapter_types import ADAPTERS
from musubi_tuner.adapters.attach import AdapterSet
from musubi_tuner.config import RunConfig, Steps
from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.config.write import resolved_toml
from musubi_tuner.training.schedulers import schedule_length


def adapter_metadata(
    config: RunConfig,
    adapters: AdapterSet,
    *,
    started: float,
    steps: Steps,
    step: int,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    kind: str,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """Header of an adapter file: the fields that sd-scripts and musubi-tuner write, and modelspec. All values are texts.

    Args:
        kind: of the weights in the file, ``model`` or ``ema``. options: of the model below the adapter; see `Trainee`.
    """
    adapter, train, spec = config.adapter, config.train, config.spec
    record = ADAPTERS[adapter.type]
    sizes = Counter((layer.rank, layer.scale * layer.rank) for _, layer in adapters.items())
    (rank, alpha), _ = sizes.most_common(1)[0]
    group = optimizer.param_groups[0]
    shown = ",".join(f"{key}={group[key]}" for key in ("betas", "eps", "weight_decay") if key in group)
    name = f"{type(optimizer).__module__}.{type(optimizer).__name__}({shown})"
    arguments = {
        key: value
        for key in ("preset", "kinds", "dropout", "rank_dropout", "module_dropout", "include", "exclude", "only",
                    "rank_patterns", "alpha_patterns", "loraplus_lr_ratio")
        if (value := getattr(adapter, key))
    }  # fmt: skip
    arguments |= {key: value for key in ("depth", "lr_scale") if (value := getattr(adapter, key)) != 1}
    lycoris = (record.written_as or adapter.type) != "lora"
    if adapter.type != "lora":
        arguments["algo"] = adapter.type
    arguments |= {
        key: value for key in ("train_norm", "rs_lora", "block_rank", "block_alpha") if (value := getattr(adapter, key))
    }
    if adapter.targets:
        arguments["targets"] = [{"pattern": target.pattern, **target.fields()} for target in adapter.targets]
    config_hash = hashlib.sha256(resolved_toml(config).encode("utf-8", "surrogateescape")).hexdigest()
    values: dict[str, Any] = {
        "session_id": int(started * 1000) % 2**32,
        "output_name": config.run.name,
        "training_started_at": started,
        "training_finished_at": time.time(),
        "learning_rate": config.optimizer.lr,
        "num_train_items": steps.images_per_epoch,
        "num_batches_per_epoch": steps.micro_batches,
        "num_epochs": steps.epochs,
        "gradient_checkpointing": config.memory.checkpoints,
        "gradient_checkpointing_cpu_offload": config.memory.checkpoint_offload,
        "gradient_accumulation_steps": train.grad_accum_steps,
        "max_train_steps": steps.total_updates,
        "lr_warmup_steps": config.scheduler.warmup_updates(schedule_length(config, steps.total_updates)),
        "lr_scheduler": config.scheduler.type,
        "base_model_version": spec.full_name,
        "network_module": "lycoris.kohya" if lycoris else spec.adapters.network_module,
        "network_dim": rank,
        "network_alpha": alpha,
        "network_args": json.dumps(arguments) if arguments else None,
        "network_dropout": adapter.dropout or None,
        "mixed_precision": train.mixed_precision,
        "seed": config.run.seed,
        "training_comment": config.save.comment,
        "optimizer": name,
        "max_grad_norm": train.max_grad_norm,
        **{name: value for name in _OBJECTIVE if (value := config.get(f"objective.{name}")) is not None},
        "fp8_base": config.memory.base_storage.startswith("fp8"),
        "full_fp16": False,
        "full_bf16": False,
        "blocks_to_swap": config.memory.blocks_to_swap,
        "config_sha256": config_hash,
        "sd_model_name": _base_name(config.model.path),
        "vae_name": _base_name(config.model.vae_path),
        "datasets": json.dumps([_describe(dataset) for dataset in config.datasets]),
        "steps": step,
        "epoch": epoch,
        "code_version": __version__,
    }
    optional = ("network_args", "training_comment", "vae_name", "sd_model_name")
    found = {f"ss_{key}": str(value) for key, value in values.items() if value is not None or key not in optional}
    side = config.datasets[0].resolution if config.datasets else (spec.sample_size, spec.sample_size)
    return {
        **found,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{spec.modelspec_architecture}/{record.written_as or adapter.type}",
        **({"modelspec.implementation": spec.modelspec_implementation} if spec.modelspec_implementation else {}),
        **{
            f"modelspec.{name}": text
            for name in ("author", "description", "license", "tags")
            if (text := getattr(config.save, name))
        },
        "modelspec.title": config.save.title or config.run.name,
        "modelspec.resolution": f"{side[0]}x{side[1]}",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime()),
        **({"options_json": json.dumps(dict(options))} if options else {}),
        "weights": kind,
    }


_OBJECTIVE = (
    "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "guidance_scale", "timestep_sampling", "sigmoid_scale",
    "discrete_flow_shift", "ip_noise_gamma", "ip_noise_gamma_random_strength",
)  # fmt: skip
"""Settings of [objective] in a header, as far as the family has them."""


def _base_name(text: str | None) -> str | None:
    return None if text is None else text.replace("\\", "/").rpartition("/")[2]


def _describe(dataset: DatasetConfig) -> dict[str, Any]:
    """A data set as the metadata of adapter files names it: base names only."""
    source = dataset.image_directory or dataset.image_jsonl_file
    return {
        "resolution": list(dataset.resolution),
        "caption_extension": dataset.caption_extension,
        "batch_size_per_device": dataset.batch_size,
        "num_repeats": dataset.num_repeats,
        "enable_bucket": dataset.enable_bucket,
        "bucket_no_upscale": dataset.bucket_no_upscale,
        "resize": dataset.resize,
        "image_directory": None if source is None else source.name,
    }
