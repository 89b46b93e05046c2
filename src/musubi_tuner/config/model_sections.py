"""What is trained: the tables [model], [experts], [adapter] and [objective]."""

from typing import Any, Literal

from musubi_tuner.config.fields import AutoDtype, Section, param

TimestepSampling = Literal[
    "logit_normal", "uniform", "sigma", "sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift",
    "logsnr", "qinglong_flux", "qinglong_qwen", "ideogram4_shift",
]  # fmt: skip


class ModelSection(Section):
    """Which model is trained, and the frozen networks around it."""

    arch: str = param(..., "Code or full name of the model family.", flat=("architecture",))
    init: Literal["checkpoint", "scratch"] = param(
        "checkpoint", "Start from `path`, or from random weights of the shape in [model.geometry]."
    )
    path: str | None = param(
        None,
        "Checkpoint: a file, a folder, `folder:name` (final, best, latest, step_N, epoch_N), or on the hub "
        "`owner/repo[:subfolder or file]`; `hub` stands for the published repository.",
        flat=("dit",),
        path=True,
    )
    weights: Literal["model", "ema"] = param("model", "Which weights of the checkpoint to start from.")
    ema_file: str | None = param(
        None,
        "Exact name of the averaged weights, beside the checkpoint or in its repository, or a whole path: the run starts "
        'from them, or its average does with ema.init = "checkpoint"; absent = the usual names.',
    )
    upgrade_neutral: bool = param(
        True, "Parts that an older checkpoint lacks start so that it computes what it did, as far as they can."
    )
    revision: str | None = param(None, "Branch, tag or commit of a hub id in model.path; absent = main.")
    geometry: dict[str, Any] = param({}, "Shape of a new model: the fields of its config.json.")
    init_scheme: Literal["reference", "adaln_zero"] = param(
        "reference",
        "Start values of a new model: as published, or with zero modulation so that blocks begin as identity.",
    )
    rope_freqs: Literal["checkpoint", "exact"] = param(
        "checkpoint", "Rotary frequencies as stored in the checkpoint, or computed again in float32."
    )
    text_positions: Literal["zero", "index"] | None = param(
        None,
        "Position of text tokens in attention: none, as published, or their number; only a new model may choose; absent = as "
        "in the checkpoint, and none in a new model.",
    )
    temperature_per_head: bool | None = param(
        None,
        "Give each attention head its own temperature of Sol instead of their mean; only a new model may choose; absent = as "
        "in the checkpoint, and false in a new model.",
    )
    timestep_scale: float | None = param(
        None,
        "Factor of the time inside its embedding, 1 as published; more tells close times better apart; only a new model may "
        "choose; absent = as in the checkpoint, and 1 in a new model.",
        gt=0,
        le=1e6,
    )
    vae_path: str | None = param(None, "Autoencoder: a file, a folder or a hub id.", flat=("vae", "ae"), path=True)
    clip_path: str | None = param(
        None,
        "CLIP-L text model: a file, a folder or a hub id.",
        flat=("clip_l_path", "text_encoder", "clip_l", "text_encoder_clip"),
        path=True,
    )
    t5_path: str | None = param(
        None,
        "T5 encoder: a file, a folder or a hub id.",
        flat=("text_encoder2", "t5xxl", "text_encoder_t5"),
        path=True,
    )
    clip_tokenizer: str | None = param(
        None, "CLIP tokenizer folder or hub id; absent = beside the encoder, then its published id.",
        flat=("tokenizer_clip",), path=True,
    )  # fmt: skip
    t5_tokenizer: str | None = param(
        None, "T5 tokenizer folder or hub id; absent = beside the encoder, then its published id.",
        flat=("tokenizer_t5",), path=True,
    )  # fmt: skip
    t5_max_tokens: int = param(
        128, "Text is padded or cut to this many T5 tokens.", flat=("t5_max_length",), ge=1, le=512
    )
    fp8_t5: bool = param(False, "Hold the Linear weights of T5 in float8 while encoding; half the memory, small error.")
    clip_act: Literal["quick_gelu", "gelu"] = param(
        "quick_gelu", "Activation of a CLIP-L file without config; gelu reproduces caches of musubi-tuner."
    )
    keep_dtype: bool = param(
        False, "Keep frozen weights in the precision of their file instead of that of the computation."
    )
    allow_schnell: bool = param(
        False, "Train on a model without guidance embedding, whose distillation training undoes."
    )
    t5_attn_mask: bool = param(False, "Hide padding tokens from pooling and attention; the published model does not.")
    vae_dtype: AutoDtype = param("auto", "Precision of the autoencoder; auto = float32.")
    text_dtype: AutoDtype = param("auto", "Precision of the text encoders; auto = bfloat16 on a GPU, float32 on a CPU.")


class ExpertsSection(Section):
    """The SD1.5 teachers whose features are distilled, used while caching only; `experts` of a dataset says what differs."""

    enable_lune: bool = param(True, "Cache and distil Lune, the pooled mid-block features.")
    enable_sol: bool = param(True, "Cache and distil Sol, the attention statistics and map.")
    unet: str | None = param(
        None, "SD1.5 U-Net: a folder, a file (also a whole original checkpoint) or a hub id.", path=True
    )
    vae: str | None = param(None, 'SD1.5 autoencoder, needed by `expert_input = "noised_image"`.', path=True)
    lune: str | None = param(
        None, "Lune weights laid over the U-Net: a path or `owner/repo:file`; absent = the U-Net as it is.", path=True
    )
    sol: str | None = param(
        None, "Sol weights laid over the U-Net: a path or `owner/repo:file`; absent = the U-Net as it is.", path=True
    )
    sol_source: Literal["extracted", "geometric"] = param(
        "extracted",
        "Where Sol comes from: extracted from the teacher's attention, or geometric, a formula of the time alone that its "
        "author calls wrong (caches of v4.1 hold it).",
    )
    expert_input: Literal["auto", "random", "noised_image"] = param(
        "auto",
        "What the teacher sees: noise only (published) or the noised image. auto = as the checkpoint was trained, "
        "published with a checkpoint that does not say, noised_image for a new model.",
    )
    expert_time: Literal["auto", "reference", "aligned"] = param(
        "auto",
        "Teacher time for a data fraction t: reference 1000 t (published), aligned 1000 (1 - t), SD's own direction. "
        "auto as for expert_input.",
    )
    sol_spatial_norm: Literal["auto", "sum", "mean", "max"] = param(
        "auto",
        "Scale of the Sol map in training: sums to 1 (published), mean 1, or maximum 1. auto as for expert_input.",
    )
    resolution: int = param(512, "Area of the teacher's picture is about this squared.", ge=64, le=2048, multiple_of=64)
    time_buckets: int = param(10, "Number of evenly spaced times per item.", ge=1, le=100)
    seed: int = param(42, "Seed of the teacher's noise.", ge=0, lt=2**32)
    dtype: AutoDtype = param("auto", "Precision of the teachers; auto = float16 on a GPU, float32 on a CPU.")
    times_per_forward: int | Literal["auto"] = param(
        "auto",
        "Times of an item that go through a teacher together; auto = all, halved whenever the memory of the GPU is too small. "
        "Changes results by rounding only.",
        resume="free",
    )

    @property
    def extracted(self) -> list[str]:
        """Names of the teachers that are run while caching."""
        sol = self.enable_sol and self.sol_source == "extracted"
        return [name for name, runs in (("lune", self.enable_lune), ("sol", sol)) if runs]

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers that are on; their names begin those of their tensors."""
        return tuple(name for name, on in (("lune", self.enable_lune), ("sol", self.enable_sol)) if on)


class AdapterTarget(Section):
    """What holds for the layers that a pattern matches; what is absent stays as it is."""

    pattern: str = param(..., "Whole module path: `*` is one part, `**` any number, [2-5] a range, [2,4] a list.")
    rank: int | None = param(None, "Width of the matrices.", ge=1, le=1024)
    alpha: float | None = param(None, "The change counts alpha / rank times; 0 = the rank.", ge=0)
    lr_scale: float | None = param(None, "Factor of the learning rate.", ge=0, le=1000)
    depth: int | None = param(None, "Parallel pairs of matrices.", ge=1, le=64)
    dropout: float | None = param(None, "Share of rank activations dropped.", ge=0, lt=1)
    enabled: bool | None = param(None, "true adapts layers of other kinds too, false leaves layers alone.")
    weight_decay: float | None = param(None, "Weight decay; absent = that of the optimizer.", ge=0, le=10)

    def fields(self) -> dict[str, Any]:
        """What it sets."""
        return self.model_dump(exclude_none=True, exclude={"pattern"})


class AdapterSection(Section):
    """A small set of extra weights that is trained instead of the model, which stays frozen."""

    type: Literal["none", "lora"] = param("none", "none trains the model itself; lora adds low-rank matrices.")
    preset: str | None = param(
        None,
        "A published choice of kinds, rank, alpha and targets, under what is set here; families differ in their names.",
    )
    kinds: list[str] | None = param(
        None, "Kinds of layers that are adapted, by the names that the family gives them; absent = the usual ones."
    )
    rank: int = param(16, "Width of the matrices.", flat=("network_dim",), ge=1, le=1024)
    alpha: float | None = param(
        None,
        "The change counts alpha / rank times; absent = half the rank, 0 = the rank.",
        flat=("network_alpha",),
        ge=0,
    )
    depth: int = param(
        1, "Parallel pairs of matrices per layer: the same as one pair so many times as wide.", ge=1, le=64
    )
    lr_scale: float = param(1.0, "Factor of the learning rate.", ge=0, le=1000)
    dropout: float = param(0.0, "Share of rank activations dropped.", flat=("network_dropout",), ge=0, lt=1)
    rank_dropout: float = param(0.0, "Share of ranks dropped, per sample.", ge=0, lt=1)
    module_dropout: float = param(0.0, "Share of adapters skipped, per micro-batch.", ge=0, lt=1)
    include: list[str] = param(
        [], "Regular expressions of module paths that are adapted although excluded.", flat=("include_patterns",)
    )
    exclude: list[str] | None = param(
        None, "Regular expressions of module paths left alone; replaces the family's list.", flat=("exclude_patterns",)
    )
    keep_default_excludes: bool = param(False, "Add exclude to the family's list instead of replacing it.")
    only: list[str] = param([], "Adapt only module paths that match one of these.", flat=("only_patterns",))
    rank_patterns: dict[str, int] = param({}, "Regular expression of module paths -> rank; the first match counts.")
    alpha_patterns: dict[str, float] = param({}, "Regular expression of module paths -> alpha; the first match counts.")
    targets: list[AdapterTarget] = param(
        [],
        "Tables with a pattern of module paths and rank, alpha, lr_scale, depth, dropout, enabled or weight_decay of these "
        "layers; later ones win.",
    )
    loraplus_lr_ratio: float | None = param(None, "LoRA+: the up matrices learn so many times faster.", gt=0, le=1000)
    max_norm: float | None = param(
        None, "After every update, changes above this norm are scaled down to it.", flat=("scale_weight_norms",), gt=0
    )
    init_from: str | None = param(None, "Adapter file to start from.", flat=("network_weights",), path=True)
    rank_from_weights: bool = param(
        False, "Take rank and alpha of every module from init_from.", flat=("dim_from_weights",)
    )
    merge: list[str] = param([], "Adapter files merged into the model before training.", flat=("base_weights",))
    merge_multipliers: list[float] = param(
        [], "One factor per merged file; absent = 1.", flat=("base_weights_multiplier",)
    )
    merge_ignore_unmatched: bool = param(
        False,
        "Skip keys of merged files that belong to no layer, instead of stopping.",
        flat=("ignore_unmatched_lora_keys",),
    )


class ObjectiveSection(Section):
    """What is learned: times, loss, weights, and what is dropped on the way."""

    timestep_sampling: TimestepSampling = param(
        "logit_normal", "Density of the training times; each family knows some of these."
    )
    sigmoid_scale: float = param(1.0, "Spread of the normal under the sigmoid and shift densities.", gt=0, le=100)
    discrete_flow_shift: float = param(
        1.0, "Factor of timestep_sampling = shift (and sigma); above 1 towards noise.", gt=0, le=100
    )
    min_timestep: int = param(0, "Lowest noise level, in thousandths.", ge=0, le=999)
    max_timestep: int = param(1000, "Highest noise level, in thousandths.", ge=1, le=1000)
    preserve_distribution_shape: bool = param(
        False, "Cut the density at min_timestep and max_timestep instead of squeezing it between them."
    )
    weighting_scheme: Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"] = param(
        "none",
        "Loss weight by noise level; logit_normal and mode shape the draws of timestep_sampling = sigma instead.",
    )
    mode_scale: float = param(1.29, "Strength of weighting_scheme = mode.", ge=-10, le=10)
    sigma_compat: Literal["exact", "upstream"] = param(
        "exact", "upstream draws timestep_sampling = sigma as musubi-tuner does: without shift, range by table index."
    )
    timestep_offset: float = param(
        0.0, "Added to the noise level that the model is told; 0.001 reproduces musubi-tuner.", ge=0, le=0.1
    )
    guidance_scale: float = param(1.0, "Embedded guidance while training.", ge=0, le=100)
    ip_noise_gamma: float | None = param(
        None, "Input perturbation: extra noise of this strength that the model sees and need not predict; 0 = off.",
        ge=0, le=10,
    )  # fmt: skip
    ip_noise_gamma_random_strength: bool = param(
        False, "Draw the strength between 0 and ip_noise_gamma, once per update."
    )
    ip_noise_per_sample: bool = param(False, "Draw that strength for every sample on its own.")
    logit_mean: float = param(0.0, "Mean of logit_normal and logsnr.", ge=-10, le=10)
    logit_std: float = param(1.0, "Standard deviation of logit_normal and logsnr.", gt=0, le=10)
    shift: float = param(
        3.0,
        "Bends training and sampling times; above 1 towards the end the family states in docs.",
        flat=("shift",),
        gt=0,
        le=100,
    )
    timestep_stratified: bool = param(False, "Spread the times of one update evenly over the density.")
    loss: Literal["l2", "huber"] = param("l2", "Element-wise loss.", flat=("loss_type",))
    huber_delta: float = param(0.1, "Where huber turns from square to linear.", gt=0, le=10)
    min_snr_gamma: float | None = param(5.0, "Cap of the min-SNR weight; 0 = off.", ge=0, le=1000)
    min_snr_form: Literal["published", "x0", "vpred", "none"] = param(
        "published", "Formula of the min-SNR weight; see flow/weighting.py."
    )
    precision: Literal["float32", "bfloat16"] = param(
        "float32",
        "Times, noise, noisy latents, targets and losses; bfloat16 rounds each, as published: times above 0.998 become 1.",
    )
    spatial_weighting: bool = param(False, "Weigh the loss by Sol's importance map.")
    text_dropout: float = param(0.1, "Share of samples trained without text, for guidance.", ge=0, le=1)
    guidance_min: float = param(
        1.0,
        "For models that embed guidance: smallest number drawn in training. Pictures are drawn with the middle.",
        ge=0,
        le=100,
    )
    guidance_max: float = param(5.0, "For models that embed guidance: largest number drawn in training.", ge=0, le=100)
    guidance_dropout: float = param(
        0.0,
        "For models that embed guidance: share of samples trained without it; 0.1 in models before v4.2.",
        ge=0,
        le=1,
    )
    lune_weight: float = param(0.1, "Weight of the Lune distillation loss.", ge=0, le=100)
    lune_warmup_steps: int = param(1000, "Updates until the Lune weight is reached.", ge=0)
    lune_mode: Literal["cosine", "huber", "soft", "hard", "mse"] = param(
        "cosine", "Distance between predicted and real Lune features."
    )
    lune_teacher_dropout: float = param(0.1, "Share of samples that use the predictor instead of Lune.", ge=0, le=1)
    sol_weight: float = param(0.05, "Weight of the Sol distillation loss.", ge=0, le=100)
    sol_stats_weight: float = param(1.0, "Share of the attention statistics in the Sol loss.", ge=0, le=100)
    sol_spatial_weight: float = param(1.0, "Share of the attention map in the Sol loss.", ge=0, le=100)
    sol_warmup_steps: int = param(2000, "Updates until the Sol weight is reached.", ge=0)
    sol_teacher_dropout: float = param(0.1, "Share of samples that use the predictor instead of Sol.", ge=0, le=1)
    teacher_dropout_mode: Literal["sample", "batch"] = param(
        "sample", "One coin per sample, or one per micro-batch as published."
    )
    missing_teacher: Literal["predict", "zeros"] = param(
        "predict",
        "Samples of a data set without a teacher that others have: the model's own guess, or zeros as features and as what is "
        "to be learned, as published.",
    )
    distill_on_dropped: bool = param(True, "Samples whose teacher is dropped still pay the distillation loss.")
    drop_experts_with_text: bool = param(
        True, "Samples without text also lose the teacher features, which were made from the text."
    )
