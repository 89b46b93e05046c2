"""Keys, words and defaults of the published FluxFlow trainer, and what they are here; `trainer_settings` reads its files with them. Torch-free."""

from typing import Any

SECTIONS = ("data", "model", "training", "optimization", "output")
MODES = ("train_vae", "gan_training", "use_lpips", "train_spade", "train_diff", "train_diff_full")
GEOMETRY = ("vae_dim", "text_embedding_dim", "feature_maps_dim", "feature_maps_dim_disc")
SAME: dict[str, str] = {
    **{name: f"objective.{name}" for name in (*MODES, "train_reconstruction", "kl_beta", "kl_warmup_steps", "kl_free_bits", "lambda_adv",
       "lambda_lpips", "mse_weight", "r1_interval", "r1_gamma", "instance_noise_std", "instance_noise_decay")},
    "train_flow": "objective.train_diff",
    "cfg_dropout_prob": "objective.text_dropout",
    **{name: f"model.geometry.{name}" for name in GEOMETRY},
    "model_checkpoint": "model.path",
    "n_epochs": "train.max_epochs",
    "duration_epochs": "train.max_epochs",
    "max_steps": "train.max_steps",
    "training_steps": "train.grad_accum_steps",
    "workers": "train.loader_workers",
    "initial_clipping_norm": "train.max_grad_norm",
    "use_ema": "ema.enabled",
    "use_gradient_checkpointing": "memory.gradient_checkpointing",
    "seed": "run.seed",
    "output_path": "run.output_dir",
    "log_interval": "log.every_steps",
    "checkpoint_save_interval": "save.every_steps",
    "sample_captions": "sample.prompts",
    "img_size": "general.resolution",
    "batch_size": "general.batch_size",
}  # fmt: skip
"""Key there -> ours; the value is the same."""
HARMLESS = {
    "channels": "pictures have three channels", "preserve_lr": "a run that continues takes its rates from its state",
    "generate_diagrams": "fluxflow-train and fluxflow-graphs draw them", "training_states": "fluxflow-train and fluxflow-graphs write them",
    "log_level": "everything is printed",
    "log_file": "logs/console.log has what is printed", "mode": "steps run one after the other", "description": "is for people",
    "model_type": "the Bezier model is the only one",
    "optimizer_type": "is read with its table", "config": "is this file", "script": "is the program", "validate_pipeline": "write --plan", "freeze": "only the roles of a step move",
    "unfreeze": "only the roles of a step move", "freeze_vae": "only the roles of a step move", "freeze_flow": "only the roles of a step move",
    "freeze_text_encoder": "only the roles of a step move", "freeze_modules": "only the roles of a step move",
}  # fmt: skip
CHANGING = {
    "adaptive_weights": "it makes lambda_adv act hardly at all and can turn the sign of the adversarial loss; weights are fixed here",
    "test_image_address": "reconstructions are those of pictures of the data (sample.reconstructions)",
}  # fmt: skip
REFUSED = {
    "reduced_min_sizes": "several sizes of one folder are several [[datasets]] with a resolution and a cache_directory each",
}
OFF: tuple[Any, ...] = (False, None, [], "")
"""Values of refused and left-out keys that ask for nothing."""
SECRETS = ("webdataset_token", "tt2m_token")
STREAM = {"webdataset_url": "shards", "webdataset_image_key": "shard_image_key", "webdataset_label_key": "shard_label_key",
          "webdataset_caption_key": "shard_caption_key", "webdataset_size": "epoch_samples",
          "webdataset_samples_per_shard": "shard_samples", "dataloader_max_retries": "shard_retries",
          "dataloader_retry_delay": "shard_retry_delay"}  # fmt: skip
"""Key of a stream there -> ours, of a data set."""
COUNTS = ("epoch_samples", "shard_samples", "shard_retries")
URL = "hf://datasets/jackyhate/text-to-image-2M/data_512_2M/*.tar"
"""Its stream if none is named."""
ROLE_OF = {"vae": "vae", "vae_encoder": "vae", "flow": "flow", "flow_processor": "flow", "text_encoder": "text_encoder",
           "discriminator": "discriminator", "D_img": "discriminator"}  # fmt: skip
OPTIMIZERS = ("Lion", "AdamW", "Adam", "SGD", "RMSprop")
METRICS = {"loss/recon": ("loss_recon", "recon", "vae", "vae_loss", "recon_loss"), "loss/kl": ("loss_kl", "kl", "kl_loss"),
           "loss/gen": ("loss_gen", "generator", "g_loss", "generator_loss"), "loss/disc": ("loss_disc", "discriminator", "d_loss"),
           "loss/flow": ("loss_flow", "flow", "flow_loss"), "loss/lpips": ("lpips", "lpips_loss")}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "flow": {"type": "Lion", "lr": 5e-7, "betas": [0.9, 0.95], "weight_decay": 0.01},
    "vae": {"type": "AdamW", "lr": 5e-7, "betas": [0.9, 0.95], "weight_decay": 0.01},
    "text_encoder": {"type": "AdamW", "lr": 5e-8, "betas": [0.9, 0.99], "weight_decay": 0.01},
    "discriminator": {
        "type": "AdamW",
        "lr": 5e-7,
        "betas": [0.0, 0.9],
        "weight_decay": 0.001,
        "args": {"amsgrad": True},
    },
}
"""Optimizers of the source by role."""
ARGUMENTS = {"betas": ("Lion", "AdamW", "Adam"), "eps": ("AdamW", "Adam", "RMSprop"), "decoupled_weight_decay": ("Lion",),
             "amsgrad": ("AdamW", "Adam"), "momentum": ("SGD", "RMSprop"), "dampening": ("SGD",), "nesterov": ("SGD",),
             "alpha": ("RMSprop",), "centered": ("RMSprop",)}  # fmt: skip
"""Argument of the source's optimizers -> those that it builds with it."""
CURVES = {"CosineAnnealingLR": ("eta_min_factor", "T_max"), "LinearLR": ("start_factor", "end_factor", "total_iters"),
          "ConstantLR": ("factor", "total_iters"), "StepLR": ("step_size", "gamma"), "ExponentialLR": ("gamma",),
          "ReduceLROnPlateau": ("factor", "patience", "threshold", "mode")}  # fmt: skip
"""Its schedulers -> their keys."""
OF_VAE = ("kl_beta", "kl_warmup_steps", "kl_free_bits", "lambda_adv", "lambda_lpips", "mse_weight", "r1_interval", "r1_gamma",
          "instance_noise_std", "instance_noise_decay", "train_reconstruction", "use_lpips", "train_spade")  # fmt: skip
"""Keys of a step that act on its autoencoder."""
USUAL = {
    "train.max_epochs": 1,
    "general.batch_size": 2,
    "general.resolution": 1024,
    "log.every_steps": 10,
    "save.every_steps": 50,
}
"""Its values where a file says nothing."""
VGG = "timm/vgg16.tv_in1k"
"""The VGG16 weights that it downloads."""
SLOW = 0.9999
"""Decay of the source's average of flow and text encoder."""
WHOLE = "data"
"""Name of the data set of the whole file, where steps have others."""
PIECES = 10
"""Falls of a StepLR that are written out."""
