"""Names of other trainers and what each means here: one table for run files, options, flat files, JSON and YAML. Torch-free.

The names are those of the public argument lists of sd-scripts (kohya), musubi-tuner, ai-toolkit and the diffusers examples, and of JSON
training plans. A name with a dot is the whole key of a typed file; without, it is known in every table. A name that is our own
everywhere is not listed: the schema has it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from musubi_tuner.adapter_types import BY_NAME as ADAPTER_NAMES
from musubi_tuner.config.when import is_on
from musubi_tuner.optimizers import OPTIMIZERS, named
from musubi_tuner.schedules import BY_NAME as SCHEDULES_BY_NAME


@dataclass(frozen=True)
class Foreign:
    """What one name means here.

    Attributes:
        key: our setting, dotted; "" = none. convert: its value from theirs; raises ValueError saying what is expected.
        rule: the conversion, in words. refused: why it cannot be done, and the way out. harmless: why nothing is lost without it.
        off: values that mean "off" beside false, 0, "" and absent; they are accepted and left out.
        always: even a value that means "off" is converted.
        choices: word of theirs -> setting and value, where the words mean different settings; ``key`` is then one of these.
        wins: it takes precedence over other names of the same setting.
        secret: its value is never shown.
    """

    key: str = ""
    convert: Callable[[Any], Any] | None = None
    rule: str = ""
    refused: str = ""
    harmless: str = ""
    off: tuple[Any, ...] = ()
    always: bool = False
    choices: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    wins: bool = False
    secret: bool = False

    def is_neutral(self, value: Any) -> bool:
        """Whether the value asks for nothing."""
        if self.key or self.always:
            return False
        return not is_on(value) or any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in self.off
        )


def _one_of(table: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Maps a word of another trainer to ours."""

    def convert(value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError("a text")
        if value.lower() not in table:
            raise ValueError(f"one of {', '.join(str(each) for each in table if each)}")
        return table[value.lower()]

    return convert


def _thousandths(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("a number from 0 to 1, or a whole number of thousandths")
    return round(value * 1000) if 0 <= value <= 1 else round(value)


def _switch(on: Any, off: Any = None) -> Callable[[Any], Any]:
    """What true and false stand for; None = no setting."""

    def convert(value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return on if value else off

    return convert


def _always_true(value: Any) -> None:
    if value is not True:
        raise ValueError("true: picture i is always drawn from seed + i, or from the seed of its prompt (--d)")


def _several(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number")
    return value >= 2


DTYPES = {
    "float": "float32", "fp32": "float32", "float32": "float32", "fp16": "float16", "float16": "float16",
    "bf16": "bfloat16", "bfloat16": "bfloat16", "auto": "auto",
}  # fmt: skip


def _optimizer(value: Any) -> Any:
    """An optimizer in any spelling, or by the path of its class."""
    if not isinstance(value, str):
        raise ValueError("a text")
    name = named(value)
    if name is None:
        raise ValueError(f"one of {', '.join(OPTIMIZERS)}")
    return name


LOSSES = {"l2": "l2", "mse": "l2", "l1": "l1", "mae": "l1"} | {
    name: name for name in ("huber", "smooth_l1", "pseudo_huber", "pseudo_smooth_l1")
}

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
    "warmup_min": "general.token_warmup_min",
    "warmup_step": "general.token_warmup_step",
    "caption_extention": "general.caption_extension",
    "cpu_offload_checkpointing": "memory.checkpoint_offload",
    "image_dir": "datasets.image_directory",
    "train_data_dir": "datasets.image_directory",
    "dataset_dir": "datasets.image_directory",
    "save_last_n_epochs": "save.keep_last_epochs",
    "save_last_n_epochs_state": "save.keep_last_states",
    "dit_dtype": "train.mixed_precision",
    "num_workers": "cache.workers",
    "loraplus_unet_lr_ratio": "adapter.loraplus_lr_ratio",
    "tokenizer_max_length": "model.t5_max_tokens",
    "memory.tf32": "run.allow_tf32",
    "tf32": "run.allow_tf32",
    "allow_tf32": "run.allow_tf32",
    "torch_compile": "memory.compile",
    "use_pinned_memory_for_block_swap": "memory.swap_pinned",
    "block_swap_ring_size": "memory.swap_ring",
    "vae_batch_size": "cache.latents_batch_size",
    "text_encoder_batch_size": "cache.text_batch_size",
    "distributed.processes": "distributed.num_processes",
    "fsdp2": "distributed.fsdp",
    "use_fsdp": "distributed.fsdp",
    "timeout_min": "distributed.timeout_minutes",
    "ddp_timeout": "distributed.timeout_minutes",
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
    "validate_every_n_steps": "validation.every_steps",
    "validate_every_n_epochs": "validation.every_epochs",
    "adapter.target": "adapter.include",
}
"""Other name -> our key; the value is the same."""

_TRACKERS: dict[str, tuple[str, Any]] = {
    "none": ("log.tensorboard", False), "tensorboard": ("log.tensorboard", True), "wandb": ("log.wandb", True), "all": ("log.wandb", True),
}  # fmt: skip
"""TensorBoard is on by itself."""
_OTHER_ADAPTERS = "is an option of LyCORIS that is not supported"
_WHOLE_MODEL = (
    "is not supported: distributed.fsdp shards the model across processes for full training, memory.base_storage and "
    "memory.blocks_to_swap save memory in each"
)
_ENCODERS = "trains a text encoder; here only the denoiser is trained, on cached encodings"
_POOLED = "would change nothing: only CLIP's pooled vector and T5 are used"
_SD = "is for SD1.5, SDXL or SD3, which this program does not train"
_NOISE_PREDICTION = "is defined for noise or v-prediction; this model predicts a flow velocity"
_LATER = "is not supported yet"


CONVERTED: dict[str, Foreign] = {
    "sample_sampler": Foreign(
        "sample.solver", _one_of({"euler": "euler", "heun": "heun", "flowmatch": "euler"}), "renamed"
    ),
    "sample.sampler": Foreign("sample.solver", _one_of({"euler": "euler", "heun": "heun"}), "renamed"),
    "save_last_n_steps": Foreign(refused="counts updates in sd-scripts; save.keep_last_steps counts checkpoints"),
    "save_last_n_steps_state": Foreign(refused="counts updates in sd-scripts; save.keep_last_states counts states"),
    "text_encoder_dtype": Foreign("model.text_dtype", _one_of(DTYPES), "renamed"),
    "lora_type": Foreign(
        "adapter.type", _one_of({**ADAPTER_NAMES, "native": "none", "none": "none", "": "lora"}), "renamed"
    ),
    "reg_data_dir": Foreign(refused="is written as [[datasets]] with image_directory and is_reg = true"),
    "algo": Foreign("adapter.type", _one_of(ADAPTER_NAMES), "type of adapter"),
    "multinoise": Foreign("objective.multires_noise_iterations", _switch(6), "six noise layers", always=True),
    "lr_scheduler_min_lr_ratio": Foreign(
        refused="is a fraction of the learning rate; scheduler.min_lr is the learning rate itself", off=(0,)
    ),
    "max_token_length": Foreign(refused=_POOLED, off=(75, 77)),
    "clip_max_tokens": Foreign(refused=_POOLED, off=(77,)),
    "network_multiplier": Foreign(
        refused="is not supported: all data sets have the same weight; use num_repeats", off=(1,)
    ),
    "network_reg_dims": Foreign(
        refused="is written as adapter.rank_patterns: regular expression of module paths -> rank"
    ),
    "network_reg_lrs": Foreign(
        refused="is written as [[adapter.targets]] with lr_scale, a factor of the learning rate"
    ),
    "train_blocks": Foreign(refused='is written as adapter.only: ["double_blocks"] or ["single_blocks"]', off=("all",)),
    "save_model_as": Foreign(
        refused="is not supported: weights are saved as safetensors; convert_lora writes the names of other programs",
        off=("safetensors",),
    ),
    "save.format": Foreign(
        refused="is not supported: weights are saved as safetensors; convert_lora writes the names of other programs",
        off=("safetensors",),
    ),
    "dynamo_backend": Foreign(
        refused="is written as memory.compile and memory.compile_backend", off=("NO", "no", "inductor")
    ),
    "zero_stage": Foreign(refused=_WHOLE_MODEL, off=(2,)),
    "split_qkv": Foreign(refused="is not supported: q, k and v are one layer and have one adapter"),
    "text_encoder1": Foreign(
        refused="is T5 in Kontext scripts; use model.t5_path for T5 and model.clip_path for CLIP-L"
    ),
    "optimizer_type": Foreign("optimizer.type", _optimizer, "renamed"),
    "lr_scheduler": Foreign("scheduler.type", _one_of(SCHEDULES_BY_NAME), "renamed"),
    "vae_dtype": Foreign("model.vae_dtype", _one_of(DTYPES), "renamed"),
    "save_precision": Foreign("save.dtype", _one_of(DTYPES), "renamed"),
    "save.precision": Foreign("save.dtype", _one_of(DTYPES), "renamed"),
    "loss_type": Foreign("objective.loss", _one_of(LOSSES), "renamed"),
    "min_snr_gamma_enabled": Foreign(
        "objective.min_snr_gamma", _switch(None, 0.0), "false turns it off", always=True, wins=True
    ),
    "ip_noise_gamma_enabled": Foreign(
        "objective.ip_noise_gamma", _switch(None, 0.0), "false turns it off", always=True, wins=True
    ),
    "walk_seed": Foreign("sample.seed", _always_true, "picture i is drawn from seed + i", always=True),
    "huggingface_repo_type": Foreign(
        refused="is not supported: uploads always go to a model repository", off=("model",)
    ),
    "model_prediction_type": Foreign(
        refused="weights the loss otherwise, which is not supported: the velocity is predicted as it is (raw)",
        off=("raw",),
    ),
    "no_half_vae": Foreign("model.vae_dtype", _switch("float32"), "the autoencoder in float32", always=True),
    "t_min": Foreign("objective.min_timestep", _thousandths, "thousandths of the noise level"),
    "t_max": Foreign("objective.max_timestep", _thousandths, "thousandths of the noise level"),
    "num_timestep_buckets": Foreign(
        "objective.timestep_stratified",
        _several,
        "noise levels are spread evenly within each update, instead of over N slices per epoch",
    ),
    "flash_attn": Foreign("memory.attention", _switch("flash"), "attention kernel", always=True),
    "xformers": Foreign("memory.attention", _switch("xformers"), "attention kernel", always=True),
    "fp8_base": Foreign("memory.base_storage", _switch("fp8"), "how frozen weights are stored", always=True),
    "fp8_base_unet": Foreign("memory.base_storage", _switch("fp8"), "how frozen weights are stored", always=True),
    "huggingface_repo_visibility": Foreign("hub.private", _one_of({"private": True, "public": False}), "renamed"),
    "fp8_scaled": Foreign(
        "memory.base_storage", _switch("fp8_scaled"), "how frozen weights are stored", always=True, wins=True
    ),
    "constrain": Foreign("adapter.constraint", lambda value: float(value), "renamed"),
    "optimizer.class": Foreign("optimizer.type", _optimizer, "the class by its name"),
    "use_lion_optimizer": Foreign("optimizer.type", _switch("Lion"), "Lion", always=True),
    "use_8bit_adam": Foreign("optimizer.type", _switch("AdamW8bit"), "AdamW of bitsandbytes", always=True),
    "skip_cache_check": Foreign("cache.verify", _switch("quick"), "the quick check"),
    "log_with": Foreign("log.wandb", choices=_TRACKERS, always=True),
    "log.with": Foreign("log.wandb", choices=_TRACKERS, always=True),
}
"""Names whose value becomes another."""

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
    "zero_terminal_snr": "has no meaning for a rectified flow, which already ends in pure noise",
    "beta_schedule": "is for diffusion with betas; this model is a rectified flow",
    "lr_scheduler_type": "names a class; use scheduler.type",
    "lr_scheduler_args": "is for a scheduler class; use the settings of [scheduler]",
    "scheduler.class": "names a class; use scheduler.type",
    "scheduler.args": "is for a scheduler class; use the settings of [scheduler]",
    "optimizer_args": "is written as optimizer.args, a table, and as optimizer.weight_decay, betas and eps",
    "network_args": "is written as keys of [adapter]",
    "network_module": "is written as adapter.type",
    "self_attn_lr": "is written as optimizer.group_lr: pattern of parameter names -> learning rate",
    "mlp_lr": "is written as optimizer.group_lr: pattern of parameter names -> learning rate",
    "mod_lr": "is written as optimizer.group_lr: pattern of parameter names -> learning rate",
    "kahan_summation": "is not needed: trained weights are float32",
    "save_n_epoch_ratio": "is written as save.every_epochs: the number of epochs divided by the number of files",
    "min_files": "is written as save.every_epochs: the number of epochs divided by the number of files",
    "in_dims": "is written as [[adapter.targets]] with a rank",
    "train_double_block_indices": "is written as adapter.only",
    "train_single_block_indices": "is written as adapter.only",
    "ggpo_beta": _LATER,
    "ggpo_sigma": _LATER,
    **dict.fromkeys(
        (
            "img_attn_dim",
            "txt_attn_dim",
            "img_mlp_dim",
            "txt_mlp_dim",
            "img_mod_dim",
            "txt_mod_dim",
            "single_dim",
            "single_mod_dim",
        ),
        "is written as [[adapter.targets]] with a pattern of layers and a rank",
    ),
    **dict.fromkeys(
        (
            "use_tucker",
            "use_scalar",
            "bypass_mode",
            "unbalanced_factorization",
            "use_cp",
            "use_conv_cp",
        ),
        _OTHER_ADAPTERS,
    ),
    "no_metadata": "is not supported: metadata is always written",
    **dict.fromkeys(
        (
            "metadata_usage_hint",
            "metadata_thumbnail",
            "metadata_merged_from",
            "metadata_trigger_phrase",
            "metadata_preprocessor",
            "metadata_is_negative_embedding",
            "metadata_reso",
            "metadata_arch",
        ),
        "is not written; save.comment stores a text in the metadata",
    ),
    "max_validation_steps": "counts batches; validation.max_images counts images",
    "max_batches": "counts batches; validation.max_images counts images",
    "loraplus_text_encoder_lr_ratio": _ENCODERS,
    "compile_fullgraph": "is not supported: code that cannot be compiled runs uncompiled",
    "dynamo_mode": "is written as memory.compile_mode",
    "dynamo_fullgraph": "is not supported: code that cannot be compiled runs uncompiled",
    "dynamo_dynamic": "is written as memory.compile_dynamic",
    "config_file": "names another file of settings; write them into the run file",
    **dict.fromkeys(
        (
            "fp8_llm",
            "fp8_te",
            "fp8_text_encoder",
            "dit_in_channels",
            "model_version",
            "img_in_txt_in_offloading",
            "vae_chunk_size",
            "vae_spatial_tile_sample_min_size",
        ),
        "is for another architecture of musubi-tuner",
    ),
    "debug_mode": "is not supported: train.py --plan shows the data sets and buckets",
    "keep_cache": "is not needed: cache jobs never delete files",
    "in_json": 'is a metadata file of sd-scripts; use image_jsonl_file with one {"image_path", "caption"} per line',
    "metadata_file": 'is a metadata file of sd-scripts; use image_jsonl_file with one {"image_path", "caption"} per line',
    "bert_path": "is a text encoder that no model family here uses",
    "variant": "is read from the checkpoint",
    "controlnet_model_name_or_path": "is for ControlNet, which is not trained here",
    "train_inpainting": "is for inpainting models, which are not trained here",
    "dataset_class": "would run code from the file; caption_transform takes a function",
    "tokenizer_cache_dir": "is set through the environment variable HF_HOME",
    "double_blocks_to_swap": "is written as memory.blocks_to_swap, with memory.swap_policy",
    "single_blocks_to_swap": "is written as memory.blocks_to_swap",
    "skip_image_resolution": "is not supported; remove these pictures from the folder instead",
    "custom_attributes": "is not used",
    "huggingface_path_in_repo": "is written as hub.run_name",
    "log_tracker_config": "is a file there; its table [wandb] is written as [log.tracker]",
    "clip_skip": _POOLED,
    "weighted_captions": _POOLED,
    "text_encoder_lr": _ENCODERS,
    "text_encoder_lr1": _ENCODERS,
    "text_encoder_lr2": _ENCODERS,
    "train_text_encoder": _ENCODERS,
    "network_train_text_encoder_only": _ENCODERS,
    "train_t5xxl": _ENCODERS,
    "deepspeed": _WHOLE_MODEL,
    **dict.fromkeys(
        ("fused_optimizer_groups", "blockwise_fused_optimizers"),
        "is written as optimizer.fused_backward, which steps each parameter by itself",
    ),
    "full_fp16": "is not supported: float16 weights lose small steps; train.full_half holds them in bfloat16",
    "sage_attn": 'has no backward pass and cannot train; use memory.attention = "sdpa" or "flash"',
    "flash3": 'is not supported; use memory.attention = "flash" or "sdpa"',
    "face_crop_aug_range": "is not supported: crops are at the centre, or random with random_crop",
    "show_timesteps": "is not supported; docs/parameters.md lists the densities under objective.timestep_sampling",
    "initial_step": "is not supported: a state stores its update; set resume.from to a state",
    "initial_epoch": "is not supported: a state stores its epoch; set resume.from to a state",
    "skip_until_initial_step": "is not needed: a state stores its position in the data",
    "resume_from_huggingface": "is not supported; set resume.from to a local state folder",
    "conditioning_data_dir": "is for ControlNet or masks; for masks set mask_directory in [[datasets]]",
    "control_directory": "is for editing models; this architecture takes no control images",
    "dora_wd": 'is written as adapter.type = "dora"',
    "weight_decompose": 'is written as adapter.type = "dora"',
}
"""Names that are refused unless they are off -> why; in a message this follows "is VALUE, which"."""

HARMLESS: dict[str, str] = {
    "cache_latents": "latents are always cached, on disk",
    "cache_latents_to_disk": "latents are always cached, on disk",
    "cache_text_encoder_outputs": "encodings are always cached, on disk",
    "cache_text_encoder_outputs_to_disk": "encodings are always cached, on disk",
    "cache.latents": "latents are always cached, on disk",
    "cache.text": "encodings are always cached, on disk",
    "network_train_unet_only": "only the denoiser is trained",
    "persistent_data_loader_workers": "workers are started anew for every epoch",
    "persistent_workers": "workers are started anew for every epoch",
    "dataset_size": "images are counted, and the plan shows the number",
    "step_calculator": "the plan shows the number of steps",
    "highvram": "[memory] sets what leaves the device",
    "lowvram": "[memory] sets what leaves the device",
    "lowram": "[memory] sets what leaves the device",
    "low_vram": "memory.blocks_to_swap sets what leaves the device",
    "disable_mmap": "weights are copied out of the mapped file one by one",
    "disable_numpy_memmap": "weights are copied out of the mapped file one by one",
    "disable_mmap_load_safetensors": "weights are copied out of the mapped file one by one",
    "model.mmap": "weights are copied out of the mapped file one by one",
    "async_upload": "uploads never block training",
    "log.jsonl": "metrics.jsonl is always written",
    "split_attn": "all samples of a batch have the same length, so nothing is gained",
    "split_attention": "all samples of a batch have the same length, so nothing is gained",
    "ddp_gradient_as_bucket_view": "it is always on",
    "ddp_static_graph": "it only affects speed",
    "static_graph": "it only affects speed",
    "block_swap_h2d_only": "frozen blocks are always copied in one direction only",
    "save_state_on_train_end": "with save.state, a state is written at the end too",
    "state_on_end": "with save.state, a state is written at the end too",
    "check_finite": "losses and gradients are always checked; train.on_nonfinite sets what happens",
    "max_repeats": "num_repeats is used instead",
    "debug_dataset": "train.py --plan shows the data sets and buckets",
    "mem_eff_attn": "memory.attention selects the kernel",
    "mem_eff_save": "weights are written one by one",
    "use_safetensors": "weights are always saved as safetensors",
    "console_log_level": "logs/console.log has everything",
    "console_log_file": "logs/console.log has everything",
    "console_log_simple": "logs/console.log has everything",
    "skip_latents_validity_check": "caches are checked by their fingerprint",
    "save.metadata": "metadata is always written",
    "split_mode": "memory.blocks_to_swap sets what leaves the device",
    "fp16_master_weights_and_gradients": "trained weights are always float32",
    "offload_optimizer_device": "memory.blocks_to_swap sets what leaves the device",
    "offload_optimizer_nvme_path": "nothing is offloaded to disk",
    "offload_param_device": "memory.blocks_to_swap sets what leaves the device",
    "offload_param_nvme_path": "nothing is offloaded to disk",
    "zero3_init_flag": "every process holds the whole model",
    "zero3_save_16bit_model": "every process holds the whole model",
    "disable_conv_cp": "the denoiser has no convolutions",
    "wd_on_output": "it is for DoRA, which is not supported yet",
    "console_width": "train.py --plan shows the data sets and buckets",
    "console_back": "train.py --plan shows the data sets and buckets",
    "console_num_images": "train.py --plan shows the data sets and buckets",
    "disable_cudnn_backend": "run.cudnn_benchmark is used instead",
    "skip_corrupted_cache": "broken caches are rebuilt",
    "cache_info": "cache files record what they hold",
    "output_config": "the resolved config is always written",
    "prediction": "the model family determines what is predicted",
    "sdpa": "it is the default",
    "verbose": "the plan shows what is trained",
    "training_finished_at": "it is a record, not a setting",
    "enable_preview": "sample.every_steps and every_epochs set when samples are drawn",
}
"""Names that do not change the result here -> why."""


def _table() -> dict[str, Foreign]:
    found = {name: Foreign(key) for name, key in ALIASES.items()}
    found |= {name: Foreign(refused=why) for name, why in REFUSED.items()}
    found |= {name: Foreign(harmless=why, always=True) for name, why in HARMLESS.items()}
    return found | CONVERTED


FOREIGN: Mapping[str, Foreign] = _table()
"""Other name -> what it means here."""


def wins(name: str) -> bool:
    """Whether a name, with or without its table, takes precedence over other names of the same setting."""
    entry = FOREIGN.get(name.rpartition(".")[2])
    return entry is not None and entry.wins
