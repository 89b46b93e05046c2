"""Defaults of other trainers, and how their files are told apart. Torch-free.

The names are those of the public argument lists; `config.foreign` has what each means here.
"""

from collections.abc import Mapping
from typing import Any

from musubi_tuner.models.registry import MODELS

MUSUBI: dict[str, Any] = {
    "adapter.rank": 4,
    "adapter.alpha": 1.0,
    "optimizer.lr": 2e-6,
    "scheduler.type": "constant",
    "objective.timestep_sampling": "sigma",
    "objective.discrete_flow_shift": 1.0,
    "objective.timestep_offset": 0.001,
    "objective.guidance_scale": 1.0,
    "objective.weighting_scheme": "none",
    "train.mixed_precision": "no",
    "run.allow_tf32": False,
    "run.cudnn_benchmark": False,
    "ema.warmup": False,
    "save.dtype": "float32",
    "save.every_steps": 0,
    "save.keep_last_steps": 0,
    "save.keep_last_epochs": 0,
    "save.keep_last_states": 0,
    "memory.swap_pinned": False,
    "sample.width": 256,
    "sample.height": 256,
}
"""By our key; written where the family's default differs."""
KOHYA: dict[str, Any] = {
    **{
        key: value
        for key, value in MUSUBI.items()
        if key not in ("objective.timestep_offset", "sample.width", "sample.height")
    },
    "objective.discrete_flow_shift": 3.0,
    "adapter.exclude": [],
    "objective.guidance_scale": 3.5,
    "sample.width": 512,
    "sample.height": 512,
    "sample.steps": 20,
}
DEFAULTS: dict[str, dict[str, Any]] = {"musubi": MUSUBI, "kohya": KOHYA, "plan": {}}
GENERAL: dict[str, dict[str, Any]] = {
    "musubi": {"resolution": [960, 544], "enable_bucket": False},
    "kohya": {"caption_extension": ".caption", "enable_bucket": False},
    "plan": {},
}
"""The same for [general]."""
TITLES = {
    "musubi": "musubi-tuner",
    "kohya": "sd-scripts (kohya)",
    "plan": "a JSON training plan",
    "ai-toolkit": "ai-toolkit",
}

_ONLY = {
    "musubi": frozenset(
        [
            "dit",
            "architecture",
            "script",
            "text_encoder",
            "text_encoder1",
            "text_encoder2",
            "vae_dtype",
            "fp8_scaled",
            "fp8_t5",
            "flash_attn",
            "flash3",
            "sage_attn",
            "split_attn",
            "preserve_distribution_shape",
            "num_timestep_buckets",
            "compile",
            "compile_mode",
            "use_pinned_memory_for_block_swap",
            "block_swap_ring_size",
            "block_swap_h2d_only",
            "gradient_checkpointing_cpu_offload",
            "disable_numpy_memmap",
            "show_timesteps",
            "compile_backend",
            "compile_dynamic",
            "compile_cache_size_limit",
            "cuda_allow_tf32",
            "cuda_cudnn_benchmark",
        ]
    ),
    "kohya": frozenset(
        [
            "pretrained_model_name_or_path",
            "train_data_dir",
            "reg_data_dir",
            "in_json",
            "ae",
            "clip_l",
            "t5xxl",
            "train_batch_size",
            "resolution",
            "enable_bucket",
            "cache_latents",
            "cache_latents_to_disk",
            "cache_text_encoder_outputs",
            "cache_text_encoder_outputs_to_disk",
            "caption_extension",
            "model_prediction_type",
            "apply_t5_attn_mask",
            "t5xxl_max_token_length",
            "network_train_unet_only",
            "unet_lr",
            "text_encoder_lr",
            "clip_skip",
            "shuffle_caption",
            "keep_tokens",
            "min_bucket_reso",
            "max_bucket_reso",
            "bucket_reso_steps",
            "highvram",
            "lowram",
            "xformers",
            "no_half_vae",
            "save_model_as",
            "noise_offset",
            "min_snr_gamma",
            "loss_type",
            "huber_schedule",
            "huber_c",
            "prior_loss_weight",
            "v2",
            "max_token_length",
            "caption_dropout_rate",
            "full_bf16",
            "full_fp16",
            "fused_backward_pass",
            "disable_mmap_load_safetensors",
            "sample_sampler",
            "fp8_base_unet",
            "cpu_offload_checkpointing",
            "mem_eff_save",
        ]
    ),
    "plan": frozenset(
        [
            "project_name",
            "lora_type",
            "model_type",
            "clip_l_path",
            "clip_g_path",
            "t5xxl_path",
            "vae_path",
            "model_path",
            "dataset_dir",
            "epochs",
            "lr_scheduler_number",
            "lr_warmup_ratio",
            "lr_power",
            "min_snr_gamma_enabled",
            "ip_noise_gamma_enabled",
            "multinoise",
            "sdxl_bucket_optimization",
            "wandb_key",
            "continue_from_lora",
        ]
    ),
}
"""Names that only one trainer has."""
_COMMON = frozenset(
    [
        "network_module",
        "network_dim",
        "network_args",
        "dataset_config",
        "learning_rate",
        "max_train_steps",
        "optimizer_type",
    ]
)


def recognise(document: Mapping[str, Any]) -> str | None:
    """Which tool a document is for: musubi, kohya, plan, ai-toolkit, or None. Keys of tables count too, one level deep."""
    config = document.get("config")
    if "job" in document or (isinstance(config, Mapping) and "process" in config):
        return "ai-toolkit"
    names = set(document) | {key for table in document.values() if isinstance(table, Mapping) for key in table}
    script = str(document.get("script", ""))
    counts = {tool: len(names & only) for tool, only in _ONLY.items()}
    if "pretrained_model_name_or_path" in names:
        counts["kohya"] += 10
    if "dit" in names or any(script.startswith(MODELS[code].full_name) for code in MODELS):
        counts["musubi"] += 10
    if {"project_name", "lora_type"} <= names:
        counts["plan"] += 10
    best = max(counts, key=lambda tool: counts[tool])
    if counts[best]:
        return best
    return "musubi" if len(names & _COMMON) > 1 or {"network_module", "dataset_config"} & names else None


def is_typed(document: Mapping[str, Any]) -> bool:
    """Whether a document is a run file, and not options of another trainer in tables whose names are not used."""
    if "schema_version" in document or isinstance(document.get("run"), Mapping):
        return True
    model = document.get("model")
    if not isinstance(model, Mapping):
        return "model" in document
    return "arch" in model or recognise(document) is None
