"""Names in option files that have a meaning of their own there; `config.foreign` has those that mean the same everywhere. Torch-free."""

from musubi_tuner.adapter_types import BY_NAME

OWN_TABLES = ("accelerate", "cache")
LAYERS = ("preset", "train_double_block_indices", "train_single_block_indices", "network_reg_dims", "network_reg_lrs")
"""Network arguments that choose layers in another way."""
LEFT_TO_PEOPLE = frozenset(
    [
        "clip_skip",
        "weighted_captions",
        "clip_g_path",
        "clip_g",
        "v2",
        "v_parameterization",
        "sdxl_bucket_optimization",
        "v_pred_like_loss",
        "zero_terminal_snr",
        "debiased_estimation_loss",
        "scale_v_pred_loss_like_noise_pred",
        "max_token_length",
        "apply_t5_attn_mask",
        "max_validation_steps",
        "sample_sampler",
        "face_crop_aug_range",
        "text_encoder_lr",
        "conv_dim",
        "conv_alpha",
        "text_encoder_lr1",
        "text_encoder_lr2",
        "show_timesteps",
        "save_model_as",
        "no_metadata",
    ]
)
"""Names that a run file must not have, but that files of other trainers often have: they are left out with a warning."""
NETWORK_ARGS = {"exclude_patterns": "adapter.exclude", "include_patterns": "adapter.include",
                "rank_dropout": "adapter.rank_dropout", "module_dropout": "adapter.module_dropout",
                "loraplus_lr_ratio": "adapter.loraplus_lr_ratio", "factor": "adapter.lokr_factor",
                "decompose_both": "adapter.lokr_decompose_both", "full_matrix": "adapter.lokr_full", "block_size": "adapter.block_size",
                "constraint": "adapter.constraint", "constrain": "adapter.constraint", "rescaled": "adapter.rescaled",
                "rs_lora": "adapter.rs_lora", "train_norm": "adapter.train_norm", "block_dims": "adapter.block_rank",
                "block_alphas": "adapter.block_alpha", "dropout": "adapter.dropout"}  # fmt: skip
DIMS = {
    "img_attn_dim": r".*\.img_attn\..*", "txt_attn_dim": r".*\.txt_attn\..*", "img_mlp_dim": r".*\.img_mlp\..*", "txt_mlp_dim": r".*\.txt_mlp\..*",
    "img_mod_dim": r".*\.img_mod\..*", "txt_mod_dim": r".*\.txt_mod\..*", "single_dim": r"single_blocks\.\d+\.linear[12]",
    "single_mod_dim": r".*\.modulation\..*",
}  # fmt: skip
"""Ranks of kinds of layers in sd-scripts -> the paths of these layers; 0 = none."""
OPTIMIZER_ARGS = {"betas": "optimizer.betas", "weight_decay": "optimizer.weight_decay", "eps": "optimizer.eps"}
PLAIN = {"vae": "model.vae_path", "text_encoder": "model.clip_path", "text_encoder2": "model.t5_path"}
"""Source key -> ours; takes precedence over `config.foreign`."""
LAUNCHER = ("config_file", "gpu_ids", "machine_rank", "main_process_ip", "use_deepspeed", "use_fsdp", "gradient_accumulation_steps",
            "same_network", "rdzv_backend", "cpu", "module", "debug", "tpu")  # fmt: skip
"""Options of accelerate launch that are not imported."""
ACCELERATE = {"num_processes": "distributed.num_processes", "num_cpu_threads_per_process": "run.threads",
              "main_process_port": "distributed.main_process_port"}  # fmt: skip
IGNORED_THERE = {
    "min_snr_gamma": "objective.min_snr_gamma", "noise_offset": "objective.noise_offset",
    "noise_offset_random_strength": "objective.noise_offset_random_strength",
    "adaptive_noise_scale": "objective.adaptive_noise_scale", "multires_noise_iterations": "objective.multires_noise_iterations",
    "multires_noise_discount": "objective.multires_noise_discount",
}  # fmt: skip
"""Options that sd-scripts accepts but does not use for flow models -> our settings."""
ADAPTER_WORDS = {**BY_NAME, "native": "none", "none": "none", "full": "none"}
