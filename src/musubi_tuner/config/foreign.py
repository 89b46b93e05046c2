"""Names of other trainers and what each is here: one table that run files, options, flat files, JSON and YAML read. Torch-free.

The names are those of the public argument lists of sd-scripts (kohya), musubi-tuner, ai-toolkit and the diffusers examples, and of plans
written for them. A name with a dot is the whole key of a typed file; without, it is known in every table. A name that is our own
everywhere is not listed: the schema has it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from musubi_tuner.config.when import is_on


@dataclass(frozen=True)
class Foreign:
    """What one name is here.

    Attributes:
        key: our setting, dotted; "" = none. convert: its value from theirs; raises ValueError saying what is expected.
        rule: the conversion, in words. refused: why it cannot be done, and the way out. harmless: why nothing is lost without it.
        off: values that mean "off" beside false, 0, "" and absent; they are accepted and left out.
        always: even a value that means "off" is converted.
    """

    key: str = ""
    convert: Callable[[Any], Any] | None = None
    rule: str = ""
    refused: str = ""
    harmless: str = ""
    off: tuple[Any, ...] = ()
    always: bool = False

    def is_neutral(self, value: Any) -> bool:
        """Whether the value asks for nothing."""
        if self.key or self.always:
            return False
        return not is_on(value) or any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in self.off
        )


def _one_of(table: Mapping[str, Any], *, lower: bool = True) -> Callable[[Any], Any]:
    """A word of theirs as one of ours."""

    def convert(value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError("a text")
        word = value.lower() if lower else value
        if word not in table:
            raise ValueError(f"one of {', '.join(str(each) for each in table if each)}")
        return table[word]

    return convert


def _inverse(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return not value


def _thousandths(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    return round(value * 1000) if 0 <= value <= 1 and isinstance(value, float) else round(value)


DTYPES = {
    "float": "float32", "fp32": "float32", "float32": "float32", "fp16": "float16", "float16": "float16",
    "bf16": "bfloat16", "bfloat16": "bfloat16", "auto": "auto",
}  # fmt: skip
OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "AdamW8bit", "adafactor": "Adafactor", "": "AdamW"}
SCHEDULERS = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear"}
LOSSES = {"l2": "l2", "mse": "l2", "huber": "huber"}

ALIASES: dict[str, str] = {
    "project_name": "run.name",
    "model_type": "model.arch",
    "architecture": "model.arch",
    "model_path": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "name_or_path": "model.path",
    "vae": "model.vae_path",
    "ae": "model.vae_path",
    "model.clip_l_path": "model.clip_path",
    "t5xxl_path": "model.t5_path",
    "t5xxl_max_token_length": "model.t5_max_tokens",
    "max_sequence_length": "model.t5_max_tokens",
    "apply_t5_attn_mask": "model.t5_attn_mask",
    "model.guidance": "objective.guidance_scale",
    "continue_from_lora": "adapter.init_from",
    "network_weights": "adapter.init_from",
    "resume_from_checkpoint": "resume.from",
    "epochs": "train.max_epochs",
    "num_train_epochs": "train.max_epochs",
    "unet_lr": "optimizer.lr",
    "dit_lr": "optimizer.lr",
    "optimizer.denoiser_lr": "optimizer.lr",
    "optimizer.loraplus_ratio": "adapter.loraplus_lr_ratio",
    "ip_noise_gamma_random": "objective.ip_noise_gamma_random_strength",
    "lr_num_warmup_steps": "scheduler.warmup_steps",
    "objective.loss_weighting": "objective.weighting_scheme",
    "flow_shift": "objective.discrete_flow_shift",
    "lune_warmup": "objective.lune_warmup_steps",
    "sol_warmup": "objective.sol_warmup_steps",
    "use_spatial_weighting": "objective.spatial_weighting",
    "cfg_dropout_prob": "objective.text_dropout",
    "train.accumulation": "train.grad_accum_steps",
    "train.precision": "train.mixed_precision",
    "train_batch_size": "general.batch_size",
    "dataset_repeats": "general.num_repeats",
    "caption_ext": "general.caption_extension",
    "memory.tf32": "run.allow_tf32",
    "tf32": "run.allow_tf32",
    "allow_tf32": "run.allow_tf32",
    "torch_compile": "memory.compile",
    "use_pinned_memory_for_block_swap": "memory.swap_pinned",
    "block_swap_ring_size": "memory.swap_ring",
    "vae_batch_size": "cache.latents_batch_size",
    "distributed.processes": "distributed.num_processes",
    "timeout_min": "distributed.timeout_minutes",
    "ddp_timeout": "distributed.timeout_minutes",
    "adapter.rank_from_weights": "adapter.rank_from_weights",
    "save.dir": "run.output_dir",
    "save.name": "run.name",
    "checkpointing_steps": "save.every_steps",
    "save_every": "save.every_steps",
    "checkpoints_total_limit": "save.keep_last_steps",
    "hub_repo": "hub.repo_id",
    "hub_private": "hub.private",
    "hub_token": "hub.token",
    "validation_prompt": "sample.prompts",
    "sample_every": "sample.every_steps",
    "sample.cfg": "sample.guidance",
    "sample_sampler": "sample.solver",
    "sample.sampler": "sample.solver",
    "validate_every_n_steps": "validation.every_steps",
    "validate_every_n_epochs": "validation.every_epochs",
    "target": "adapter.include",
}
"""Other name -> our key; the value is the same."""

CONVERTED: dict[str, Foreign] = {
    "text_encoder1": Foreign(
        refused="is T5 in FLUX.1 Kontext's scripts; write model.t5_path, and model.clip_path for CLIP-L"
    ),
    "optimizer_type": Foreign("optimizer.type", _one_of(OPTIMIZERS), "our name of it"),
    "lr_scheduler": Foreign("scheduler.type", _one_of(SCHEDULERS), "our name of it"),
    "vae_dtype": Foreign("model.vae_dtype", _one_of(DTYPES), "our name of it"),
    "save_precision": Foreign("save.dtype", _one_of(DTYPES), "our name of it"),
    "save.precision": Foreign("save.dtype", _one_of(DTYPES), "our name of it"),
    "loss_type": Foreign("objective.loss", _one_of(LOSSES), "our name of it"),
    "min_snr_gamma_enabled": Foreign(
        "objective.min_snr_gamma", lambda on: None if on else 0.0, "false turns it off", always=True
    ),
    "ip_noise_gamma_enabled": Foreign(
        "objective.ip_noise_gamma", lambda on: None if on else 0.0, "false turns it off", always=True
    ),
    "no_half_vae": Foreign(
        "model.vae_dtype", lambda on: "float32" if on else None, "the autoencoder in float32", always=True
    ),
    "t_min": Foreign("objective.min_timestep", _thousandths, "thousandths of the noise level"),
    "t_max": Foreign("objective.max_timestep", _thousandths, "thousandths of the noise level"),
    "num_timestep_buckets": Foreign(
        "objective.timestep_stratified",
        lambda count: bool(count and count >= 2),
        "the noise levels of every update are spread evenly, instead of those of an epoch over N slices",
    ),
    "flash_attn": Foreign("memory.attention", lambda on: "flash" if on else None, "kernel of attention", always=True),
    "xformers": Foreign("memory.attention", lambda on: "xformers" if on else None, "kernel of attention", always=True),
    "fp8_base": Foreign(
        "memory.base_storage", lambda on: "fp8" if on else None, "how frozen weights are stored", always=True
    ),
    "fp8_scaled": Foreign(
        "memory.base_storage", lambda on: "fp8_scaled" if on else None, "how frozen weights are stored", always=True
    ),
    "use_8bit_adam": Foreign(
        "optimizer.type", lambda on: "AdamW8bit" if on else None, "AdamW of bitsandbytes", always=True
    ),
    "skip_cache_check": Foreign("cache.verify", lambda on: "quick", "the quick check"),
    "log_with": Foreign(
        "log.tensorboard", _one_of({"tensorboard": True, "none": False}), "events in logs/ below the run's folder"
    ),
}
"""Names whose value becomes another."""

_ENCODERS = "trains a text encoder; only the denoiser learns here, from cached encodings"
_POOLED = "would change nothing: only CLIP's pooled vector and T5 are read"
_SD = "is for SD1.5, SDXL or SD3, which this program does not train"
_NOISE_PREDICTION = "is defined for noise or v-prediction; this model predicts a flow velocity"
_LATER = "is not built yet"

REFUSED: dict[str, str] = {
    "clip_g_path": _SD,
    "clip_g": _SD,
    "v2": _SD,
    "v_parameterization": _SD,
    "sdxl_bucket_optimization": _SD,
    "v_pred_like_loss": _NOISE_PREDICTION,
    "debiased_estimation_loss": _NOISE_PREDICTION,
    "debiased": _NOISE_PREDICTION,
    "scale_v_pred_loss_like_noise_pred": _NOISE_PREDICTION,
    "scale_v_as_eps": _NOISE_PREDICTION,
    "zero_terminal_snr": "has no meaning for a rectified flow, whose last step is pure noise already",
    "beta_schedule": "belongs to a diffusion with betas; this model is a rectified flow",
    "clip_skip": _POOLED,
    "weighted_captions": _POOLED,
    "text_encoder_lr": _ENCODERS,
    "text_encoder_lr1": _ENCODERS,
    "text_encoder_lr2": _ENCODERS,
    "train_text_encoder": _ENCODERS,
    "network_train_text_encoder_only": _ENCODERS,
    "train_t5xxl": _ENCODERS,
    **dict.fromkeys(
        ("fsdp", "fsdp2", "deepspeed", "zero_stage"),
        "is not built: every process holds the whole model; memory.base_storage and memory.blocks_to_swap save memory",
    ),
    **dict.fromkeys(
        ("fused_backward", "fused_backward_pass", "fused_optimizer_groups", "blockwise_fused_optimizers"),
        "is not built: gradients are clipped and checked together before the optimizer steps",
    ),
    **dict.fromkeys(
        ("full_bf16", "full_fp16", "full_half", "stochastic_rounding"),
        "is not built: what trains is held in float32; train.mixed_precision sets what is computed in",
    ),
    "sage_attn": 'has no backward pass and cannot train; memory.attention = "sdpa" or "flash"',
    "flash3": 'is not built; memory.attention = "flash" or "sdpa"',
    "face_crop_aug_range": "is not built: crops are central",
    "show_timesteps": "is not an option of training; docs/flow.md has the densities",
    "initial_step": "is not built: a state knows its update; resume.from names one",
    "initial_epoch": "is not built: a state knows its epoch; resume.from names one",
    "skip_until_initial_step": "is not needed: a state knows which items come next",
    "resume_from_huggingface": "is not built: give a local state folder as resume.from",
    "conditioning_data_dir": "is for control networks and masks; a folder of masks is mask_directory of the data set",
    "control_directory": "is for editing models; this architecture takes no control images",
    "conv_dim": "has nothing to act on: the denoiser has no convolutions",
    "conv_alpha": "has nothing to act on: the denoiser has no convolutions",
    "train_norm": _LATER,
}
"""Names that are refused unless they are off -> why, after the value."""

HARMLESS: dict[str, str] = {
    "cache_latents": "latents are always cached, on disk",
    "cache_latents_to_disk": "latents are always cached, on disk",
    "cache_text_encoder_outputs": "encodings are always cached, on disk",
    "cache_text_encoder_outputs_to_disk": "encodings are always cached, on disk",
    "cache.latents": "latents are always cached, on disk",
    "cache.text": "encodings are always cached, on disk",
    "network_train_unet_only": "only the denoiser is trained",
    "persistent_data_loader_workers": "workers are started for every epoch",
    "persistent_workers": "workers are started for every epoch",
    "dataset_size": "it is counted, and the plan shows it",
    "step_calculator": "it is computed, and the plan shows it",
    "highvram": "what fits is kept on the device",
    "lowvram": "what fits is kept on the device",
    "lowram": "what fits is kept on the device",
    "low_vram": "memory.blocks_to_swap says what leaves the device",
    "disable_mmap": "weights are copied out of the mapped file one by one",
    "disable_numpy_memmap": "weights are copied out of the mapped file one by one",
    "disable_mmap_load_safetensors": "weights are copied out of the mapped file one by one",
    "model.mmap": "weights are copied out of the mapped file one by one",
    "async_upload": "uploads never block the training",
    "log_config": "the resolved config is always written",
    "log.jsonl": "metrics.jsonl is always written",
    "split_attn": "the samples of a batch are equally long here, so nothing is gained",
    "split_attention": "the samples of a batch are equally long here, so nothing is gained",
    "ddp_gradient_as_bucket_view": "always on",
    "ddp_static_graph": "always as fast as it can be",
    "static_graph": "it is known",
    "block_swap_h2d_only": "frozen blocks are always streamed one way",
    "save_state_on_train_end": "the last state is always written",
    "state_on_end": "the last state is always written",
    "check_finite": "a loss that is not finite stops the run before anything is saved",
    "cache_info": "caches know what they hold",
    "output_config": "the resolved config is always written",
    "model_prediction_type": "the model says what it predicts",
    "prediction": "the model says what it predicts",
    "sdpa": "it is the default",
    "verbose": "the plan says what is trained",
    "training_finished_at": "written by the trainer",
    "enable_preview": "sample.every_steps says when pictures are drawn",
}
"""Names that change no number here -> why."""


def _table() -> dict[str, Foreign]:
    found = {name: Foreign(key) for name, key in ALIASES.items()}
    found |= CONVERTED
    found |= {name: Foreign(refused=why) for name, why in REFUSED.items()}
    return found | {name: Foreign(harmless=why, always=True) for name, why in HARMLESS.items()}


FOREIGN: Mapping[str, Foreign] = _table()
"""Other name -> what it is here."""
