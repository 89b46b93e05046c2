"""Every setting of a run file, declared once.

A class is a TOML table, a field is a key. The type, range, default and the one sentence of help written here make
the TOML check, the command line, `--help`, `docs/config.md` and the resolved config; nothing is declared twice.

A field's extra facts (see `param`):
    flat      names accepted on the command line as ``--name``, beside the key's own last part where that is unique
    resume    "fixed": a run that continues must keep the value; "free": it may change between starts
    secret    never printed, stored or logged
    families  applicability and default by family come from ``models/<family>/options.py``, not from here

An absent optional value means off. Torch-free.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

SCHEMA_VERSION = 1

Dtype = Literal["float32", "bfloat16", "float16"]
AutoDtype = Literal["auto", "float32", "bfloat16", "float16"]


def param(
    default: Any,
    help: str,
    *,
    flat: tuple[str, ...] = (),
    resume: Literal["fixed", "free"] = "fixed",
    secret: bool = False,
    path: bool = False,
    **constraints: Any,
) -> Any:
    """One setting: its default (``...`` = required), its sentence, and pydantic constraints such as ge and le."""
    extra: Any = {"flat": list(flat), "resume": resume, "secret": secret, "path": path}
    return Field(default, description=help, json_schema_extra=extra, repr=not secret, **constraints)


class Section(BaseModel):
    """Base of all tables: immutable, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunSection(Section):
    """What the run is called, where it writes, and what makes it repeatable."""

    name: str = param(
        ..., "Name of the run; every output file begins with it.", flat=("output_name",), pattern=r"^[\w.\- ]+$"
    )
    output_dir: str = param(..., "Folder for checkpoints, states, samples and logs.", path=True, resume="free")
    seed: int = param(42, "Seed of order, noise, times and dropout.", flat=("seed",), ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda", "mps"] = param(
        "auto", "Where to compute; auto takes a GPU if there is one.", resume="free"
    )
    threads: int | None = param(
        None, "CPU threads per process; absent = cores divided by processes.", ge=1, le=1024, resume="free"
    )
    allow_tf32: bool = param(
        True, "On NVIDIA GPUs, in training and drawing: multiply float32 matrices with inputs rounded to 10 mantissa bits, much "
        "faster. Caches are made without.",
        flat=("cuda_allow_tf32",), resume="free",
    )  # fmt: skip
    cudnn_benchmark: bool = param(
        True, "On GPUs: try convolution kernels and keep the fastest; only where all pictures have one size.",
        flat=("cuda_cudnn_benchmark",), resume="free",
    )  # fmt: skip
    deterministic: bool = param(
        False,
        "Use repeatable kernels only: slower, and an error where there is none; turns the two above off.",
        resume="free",
    )
    strict: bool = param(
        False, "Refuse to resume when library versions, CPU type, threads or processes changed.", resume="free"
    )


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


class CacheSection(Section):
    """The separate jobs that encode images and captions once."""

    run: Literal["auto", "always", "never"] = param(
        "auto",
        "auto encodes what is missing or stale, always encodes everything, never only reports.",
        resume="free",
    )
    skip_existing: Literal["fingerprint", "name"] = param(
        "fingerprint",
        "What counts as up to date: a matching fingerprint, or (unsafe) any file of the right name.",
        flat=("skip_existing",),
        resume="free",
    )
    verify: Literal["quick", "full"] = param(
        "quick",
        "quick believes a picture, mask or encoder whose size, times and inode are those of its hashing; full hashes all of them "
        "at each start.",
        resume="free",
    )
    dtype: AutoDtype = param(
        "auto", "Storage precision; auto = latents float32, text bfloat16, experts float32. float16 refuses overflow."
    )
    latent_mode: Literal["sample", "mean"] = param(
        "sample", "Take a seeded sample of the autoencoder's posterior, or its mean."
    )
    seed: int = param(0, "Seed of the posterior sample.", ge=0, lt=2**32)
    latents_batch_size: int = param(1, "Images encoded together.", ge=1, le=1024)
    text_batch_size: int = param(16, "Captions encoded together.", ge=1, le=4096)
    experts_batch_size: int = param(1, "Items per teacher batch; each goes through at every time bucket.", ge=1, le=256)
    workers: int = param(2, "Threads that read and resize images.", ge=0, le=64, resume="free")
    vae_tiling: bool = param(
        False, "Encode and decode large images in overlapping tiles (less memory, seams possible)."
    )
    nan_policy: Literal["error", "zero"] = param("error", "What to do with values that are not finite.")


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


class OptimizerSection(Section):
    """The update rule."""

    type: Literal["AdamW", "AdamW8bit", "Adafactor"] = param(
        "AdamW", "AdamW of torch, 8-bit AdamW of bitsandbytes, or Adafactor of transformers.", flat=("optimizer_type",)
    )
    lr: float = param(1e-4, "Learning rate after warm-up.", flat=("learning_rate",), ge=0, le=10)
    weight_decay: float = param(0.01, "Decoupled weight decay.", ge=0, le=10)
    betas: list[float] = param([0.9, 0.999], "Decay of the first and second moment.", min_length=2, max_length=2)
    eps: float = param(1e-8, "Added to the denominator.", gt=0, le=1)
    decay_all: bool = param(
        False, "Decay every parameter as published; otherwise norms, biases, gates and scalars are left alone."
    )


class SchedulerSection(Section):
    """The learning rate over updates."""

    type: Literal["cosine", "linear", "constant"] = param("cosine", "Shape after warm-up.", flat=("lr_scheduler",))
    warmup_steps: int = param(0, "Updates of warm-up from zero.", flat=("lr_warmup_steps",), ge=0)
    warmup_type: Literal["linear", "cosine"] = param("linear", "Shape of the warm-up.")
    min_lr: float = param(0.0, "Learning rate at the end of cosine and linear.", ge=0, le=10, resume="free")
    total_steps: int | None = param(
        None, "Updates until cosine and linear reach their end, where they stay; absent = as many as the run has, so a run that is "
        "made longer goes on at a higher rate; its former length here keeps the rate where it ended.", ge=1, resume="free",
    )  # fmt: skip


TimestepSampling = Literal[
    "logit_normal", "uniform", "sigma", "sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift",
    "logsnr", "qinglong_flux", "qinglong_qwen", "ideogram4_shift",
]  # fmt: skip


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


class TrainSection(Section):
    """Length, precision and batching."""

    max_steps: int | None = param(
        None, "Updates to train; or give max_epochs.", flat=("max_train_steps",), ge=1, resume="free"
    )
    max_epochs: int | None = param(
        None, "Passes over the data; with max_steps too, whichever ends first.", flat=("max_train_epochs",), ge=1,
        resume="free",
    )  # fmt: skip
    grad_accum_steps: int = param(
        1, "Micro-batches per update and process.", flat=("gradient_accumulation_steps",), ge=1, le=65536, resume="free"
    )
    masked_loss: bool = param(
        False, "Weigh the loss of each position by the image's mask; the datasets say where masks are."
    )
    mask_foreground: float = param(1.0, "Weight of the loss where the mask is white.", ge=0, le=100)
    mask_background: float = param(0.0, "Weight of the loss where the mask is black.", ge=0, le=100)
    mask_normalize: bool = param(
        False, "Divide the weights of a masked image by their mean, so that its loss keeps its scale."
    )
    max_grad_norm: float = param(1.0, "Gradients are scaled down to this norm; 0 = no clipping.", ge=0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = param(
        "bf16", "Precision of the computation; weights, losses and optimizer stay float32. auto = bf16 where the device has it, "
        "else no.",
    )  # fmt: skip
    on_nonfinite: Literal["stop", "skip"] = param(
        "stop",
        "A loss or gradient that is not finite stops the run, or skips the update; fp16 always skips.",
        resume="free",
    )
    max_skipped_updates: int = param(
        20, "Where updates are skipped: stop after this many in a row.", ge=1, resume="free"
    )
    loader_workers: int = param(
        0, "Processes that read cache files.", flat=("max_data_loader_n_workers",), ge=0, le=64, resume="free"
    )


class MemorySection(Section):
    """Trading time for memory."""

    gradient_checkpointing: bool = param(False, "Recompute each block in the backward pass.", resume="free")
    base_storage: Literal["none", "fp8", "fp8_scaled", "int8", "nf4"] = param(
        "none", "How the weights of a frozen model are stored; none = in the precision of the computation."
    )
    fp8_scale: Literal["tensor", "row", "block"] = param(
        "block", "What shares a scale in fp8_scaled: the tensor, a row, or 64 columns of a row."
    )
    fp8_modulation: bool = param(False, "Quantise the modulation layers of the blocks too: less memory, more error.")
    fp8_compute: bool = param(
        False, "Multiply in fp8 too, with base_storage fp8 or fp8_scaled and a scale per row; needs a GPU that can."
    )
    fp8_compute_backward: Literal["bf16", "fp8"] = param(
        "bf16", "With fp8_compute: precision in which the gradients of the inputs are multiplied."
    )
    blocks_to_swap: int | Literal["auto"] = param(
        0, "Blocks whose weights stay in main memory and are streamed to the device, with gradients and optimizer state where "
        "they train; 0 = none, auto = as few as the free memory asks for.", resume="free",
    )  # fmt: skip
    checkpoint_every: int = param(
        1, "With gradient_checkpointing: recompute every n-th block only; larger is faster and takes more memory.", ge=1,
        le=100, resume="free",
    )  # fmt: skip
    swap_policy: Literal["single_first", "balanced"] = param(
        "single_first",
        "Which blocks are swapped: as many single ones as possible first, or both kinds alike.",
        resume="free",
    )
    swap_ring: int = param(
        2, "Device buffers for streamed blocks, each as large as a block.", ge=1, le=16, resume="free"
    )
    swap_pinned: bool = param(
        True, "Pin the main memory of swapped blocks; false = copy through two small pinned buffers, which is slower.",
        resume="free",
    )  # fmt: skip
    checkpoint_offload: bool = param(
        False, "Checkpoint, and keep the inputs of the blocks in main memory.",
        flat=("gradient_checkpointing_cpu_offload",), resume="free",
    )  # fmt: skip
    attention: Literal["sdpa", "flash", "xformers"] = param(
        "sdpa",
        "Kernel of attention: torch's own, or that of the package flash-attn or xformers, on a GPU.",
        resume="free",
    )
    compile: bool = param(
        False, "Compile the blocks with torch.compile: minutes at the start, faster steps.", resume="free"
    )
    compile_backend: str = param("inductor", "Compiler; torch lists those it knows.", resume="free")
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = param(
        "default",
        "Effort of the compiler. Modes with CUDA graphs do not go with blocks that are compiled one by one.",
        resume="free",
    )
    compile_dynamic: Literal["auto", "true", "false"] = param(
        "auto", "Sizes in compiled code: auto = fixed at first and symbolic from the second bucket on.", resume="free"
    )
    compile_limit: int = param(
        32, "How often one kind of block may be compiled; more is an error.", flat=("compile_cache_size_limit",), ge=1,
        resume="free",
    )  # fmt: skip

    @property
    def checkpoints(self) -> bool:
        """Whether blocks are recomputed; keeping their inputs elsewhere implies it."""
        return self.gradient_checkpointing or self.checkpoint_offload

    @property
    def scale(self) -> Literal["tensor", "row", "block"]:
        """What shares a scale; products in fp8 take none by block."""
        return "row" if self.fp8_compute and self.fp8_scale == "block" else self.fp8_scale


class DistributedSection(Section):
    """How many processes train; also written [accelerate]."""

    num_processes: int = param(1, "Processes on this machine, one per GPU.", ge=1, le=1024, resume="free")
    main_process_port: int | None = param(None, "Port of the main process; absent = a free one.", ge=1, le=65535,
                                          resume="free")  # fmt: skip
    timeout_minutes: int = param(
        30, "How long a process waits for the others' gradients; while the main one draws or saves, they wait as long as it takes.",
        ge=1, resume="free",
    )  # fmt: skip


class EmaSection(Section):
    """A moving average of the weights, saved beside them and used for samples."""

    enabled: bool = param(True, "Keep the average.")
    decay: float = param(0.9999, "Share of the old average kept at every update.", ge=0, lt=1)
    warmup: bool | Literal["auto"] = param(
        "auto", "Start with less memory: min(decay, (1 + n) / (10 + n)) after n updates. auto = true with a checkpoint and for "
        'adapters, false for a new model and with init = "checkpoint"; a run that continues keeps what it began with.',
    )  # fmt: skip
    on_cpu: bool = param(
        False, "Keep the average in main memory: less memory on the device, one more copy of the weights per update.",
    )  # fmt: skip
    init: Literal["model", "checkpoint"] = param(
        "model", "Start the average as a copy of the model, or from the averaged weights of the checkpoint."
    )


class ValidationSection(Section):
    """The loss on images that are never trained, with the same noise and noise levels every time."""

    split: float = param(
        0.0, "Share of the pictures that are measured instead of trained, with their copies in all data sets; 0 = off.",
        flat=("validation_split",), ge=0, le=0.5,
    )  # fmt: skip
    seed: int = param(
        42, "Seed of the choice of these images and of their noise.", flat=("validation_seed",), ge=0, lt=2**32
    )
    every_steps: int | None = param(
        None, "Measure every so many updates, beside the end; 0 = off.", flat=("validate_every_n_steps",), ge=0,
        resume="free",
    )  # fmt: skip
    every_epochs: int | None = param(
        1, "Measure every so many epochs, beside the end; 0 = off.", flat=("validate_every_n_epochs",), ge=0,
        resume="free",
    )  # fmt: skip
    times: int = param(8, "Noise levels at which each image is measured, evenly spread over [0, 1].", ge=1, le=100)
    max_images: int | None = param(None, "Measure at most so many of the images taken out; absent = all.", ge=1)
    weights: Literal["ema", "model"] = param(
        "ema", "Measure the averaged weights, where ema.enabled keeps them, or those that train."
    )


class SaveSection(Section):
    """Checkpoints on the way; the final one is always written."""

    every_steps: int | None = param(
        5000, "Save every so many updates; 0 = off.", flat=("save_every_n_steps",), ge=0, resume="free"
    )
    every_epochs: int | None = param(
        None, "Save every so many epochs; 0 = off.", flat=("save_every_n_epochs",), ge=0, resume="free"
    )
    keep_last_steps: int | None = param(3, "Newest step checkpoints kept; 0 = all.", ge=0, resume="free")
    keep_last_epochs: int | None = param(3, "Newest epoch checkpoints kept; 0 = all.", ge=0, resume="free")
    dtype: Dtype = param("float32", "Precision of saved weights; states always hold float32.",
                         flat=("save_precision",), resume="free")  # fmt: skip
    keep_last_states: int | None = param(
        2, "Newest states kept, of all checkpoints together; weights stay without them; 0 = as long as their weights.", ge=0,
        resume="free",
    )  # fmt: skip
    state: bool = param(True, "Write a resumable state with every checkpoint.", flat=("save_state",), resume="free")
    best: bool | None = param(
        None, "Keep the weights of the lowest validation loss (without validation: of the lowest mean training loss of an epoch) "
        "as `best`; absent = with validation only.", resume="free",
    )  # fmt: skip
    release: bool = param(True, "End with a folder that from_pretrained loads.", resume="free")
    comment: str | None = param(None, "Remark stored in the metadata of adapter files.", flat=("training_comment",),
                                resume="free")  # fmt: skip


class SampleSection(Section):
    """Pictures drawn while training."""

    prompts: list[str] | str | None = param(
        None,
        "Prompts, or a prompt file (.txt, .toml, .json); absent = no samples.",
        flat=("sample_prompts",),
        resume="free",
    )
    every_steps: int | None = param(
        None, "Draw every so many updates; 0 = off.", flat=("sample_every_n_steps",), ge=0, resume="free"
    )
    every_epochs: int | None = param(
        None, "Draw every so many epochs; 0 = off.", flat=("sample_every_n_epochs",), ge=0, resume="free"
    )
    at_first: bool = param(False, "Draw once before the first update.", flat=("sample_at_first",), resume="free")
    width: int | None = param(None, "Pixels; absent = the family's default.", ge=16, le=8192, resume="free")
    height: int | None = param(None, "Pixels; absent = the family's default.", ge=16, le=8192, resume="free")
    steps: int = param(28, "Solver steps.", flat=("sample_steps",), ge=1, le=1000, resume="free")
    guidance: float = param(
        5.0, "Guidance: the embedded number where a model takes one, else classifier-free (1 = off).", ge=0, le=100,
        resume="free",
    )  # fmt: skip
    cfg_scale: float = param(
        1.0, "Classifier-free guidance against the negative prompt, for models with embedded guidance; 1 = off.", ge=1,
        le=100, resume="free",
    )  # fmt: skip
    shift: float | None = param(
        None, "Shift of the sampling times; absent = by picture size.", gt=0, le=100, resume="free"
    )
    negative_prompt: str | None = param(
        None, "What to avoid; absent = the trained null condition, which differs from an empty text.", resume="free"
    )
    solver: Literal["euler", "heun"] = param("euler", "Solver of the sampling equation.", resume="free")
    seed: int = param(42, "Image i is drawn from seed + i.", flat=("sample_seed",), ge=0, lt=2**32, resume="free")
    use_ema: bool = param(True, "Draw with the averaged weights.", resume="free")


class LogSection(Section):
    """What is written down while training."""

    every_steps: int = param(10, "Updates between log lines.", flat=("log_every",), ge=1, resume="free")
    tensorboard: bool = param(True, "Write TensorBoard events to `logs/`.", resume="free")
    noise_bins: int = param(
        8, "Equal slices of the noise level, for each of which the training loss is logged; 0 = off.", ge=0, le=100,
        resume="free",
    )  # fmt: skip


class HubSection(Section):
    """Upload of a run to a repository on the hub; never stops the training."""

    repo_id: str | None = param(None, "Repository `owner/name`; absent = no upload.", flat=("huggingface_repo_id",),
                                resume="free")  # fmt: skip
    run_name: str | None = param(None, "Folder below checkpoint_runs/; absent = the run's name.", resume="free")
    private: bool = param(True, "Visibility of a repository that has to be created.", resume="free")
    token: str | None = param(None, "Access token; better left to the HF_TOKEN variable.", flat=("huggingface_token",),
                              secret=True, resume="free")  # fmt: skip
    every_steps: int = param(
        0, "Upload the newest checkpoint every so many updates; 0 here and below = every checkpoint when it is saved. The final "
        "one is always uploaded.", flat=("upload_every_steps",), ge=0, resume="free",
    )  # fmt: skip
    every_epochs: int = param(
        0, "Upload the newest checkpoint every so many epochs.", flat=("upload_every_epochs",), ge=0, resume="free"
    )
    release: Literal["final", "best", "none"] = param(
        "final", "Checkpoint that `owner/name` loads, at the root of the repository: the final one, or the best so far whenever "
        "there is a better one.", resume="free",
    )  # fmt: skip
    upload_samples: bool = param(True, "Upload the pictures that are drawn, to samples/.", resume="free")
    upload_logs: bool = param(
        True,
        "Upload TensorBoard events and metrics.jsonl to logs/, with each checkpoint and at the end.",
        resume="free",
    )
    upload_state: bool = param(
        False,
        "Upload states with the checkpoints, to continue elsewhere: several times as much data.",
        flat=("save_state_to_huggingface",),
        resume="free",
    )
    timeout_seconds: int = param(
        600, "An upload that takes longer, its three attempts together, is given up.", ge=1, resume="free"
    )
    retry_seconds: float = param(
        5.0, "Pause before the second attempt; four times as long before the third.", ge=0, le=3600, resume="free"
    )
    finish_seconds: int = param(
        1800, "A run that ends waits so long for uploads that are left; then they are given up and named.", ge=0, resume="free"
    )  # fmt: skip


class ResumeSection(Section):
    """How a run continues."""

    from_: str = param(
        "auto",
        "auto = the newest good state of this run, or a new start; none = a new start; or the path of a state. The last two need an "
        "output_dir without later checkpoints.",
        flat=("resume",),
        alias="from",
        resume="free",
    )


class DemoSection(Section):
    """The built-in demo: makes its own pictures and encoders, and scores what the model draws."""

    folder: str = param(..., "Where the demo's pictures, captions and encoders are made.", path=True)
    pictures: int = param(1536, "Training pictures to draw.", ge=1, le=1_000_000)
    size: int = param(64, "Side of a picture in pixels.", ge=32, le=1024, multiple_of=16)
    held_out: int = param(24, "Combinations of shape, colour, place and background never trained.", ge=0, le=100)
    seed: int = param(0, "Seed of the pictures.", ge=0, lt=2**32)
    score_prompts: int = param(120, "Prompts scored at the end; half are held-out combinations.", ge=1, le=100_000,
                               resume="free")  # fmt: skip
    score_seed: int = param(1234, "Seed of the noise used for scoring.", ge=0, lt=2**32, resume="free")


class RunFile(Section):
    """A whole run file. `[general]` and `[[datasets]]` are checked by config/datasets.py."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    schema_version: Literal[1] = param(SCHEMA_VERSION, "Version of this format.")
    dataset_config: str | None = param(
        None, "TOML file with [general] and [[datasets]]; or write these tables here.", path=True
    )
    run: RunSection
    model: ModelSection
    experts: ExpertsSection = ExpertsSection()
    cache: CacheSection = CacheSection()
    adapter: AdapterSection = AdapterSection()
    optimizer: OptimizerSection = OptimizerSection()
    scheduler: SchedulerSection = SchedulerSection()
    objective: ObjectiveSection = ObjectiveSection()
    train: TrainSection = TrainSection()
    memory: MemorySection = MemorySection()
    distributed: DistributedSection = DistributedSection()
    ema: EmaSection = EmaSection()
    validation: ValidationSection = ValidationSection()
    save: SaveSection = SaveSection()
    sample: SampleSection = SampleSection()
    log: LogSection = LogSection()
    hub: HubSection = HubSection()
    resume: ResumeSection = ResumeSection()
    demo: DemoSection | None = None


AMBIGUOUS = {
    "resolution", "size", "width", "height", "steps", "warmup", "enabled", "run", "path", "weights", "unet", "release",
    "state", "private", "token", "folder", "pictures", "guidance", "loss", "workers", "geometry", "lune", "sol", "solver",
    "rank", "alpha", "include", "exclude", "split", "times", "best", "only", "merge", "comment", "shift", "dropout", "max_norm",
    "preset", "kinds", "depth", "targets", "lr_scale",
}  # fmt: skip
"""Last parts of keys that are no option names of their own: alone they would say too little, or mean something else."""

SECTION_ALIASES = {"accelerate": "distributed"}


@dataclass(frozen=True)
class Parameter:
    """One setting, as the generators of help, flags and documentation see it."""

    section: str
    name: str
    field: FieldInfo

    @property
    def key(self) -> str:
        """Dotted TOML path."""
        return f"{self.section}.{self.name}" if self.section else self.name

    def extra(self, name: str) -> Any:
        """A fact given to `param`."""
        assert isinstance(self.field.json_schema_extra, dict)
        return self.field.json_schema_extra[name]

    @property
    def help(self) -> str:
        """Its sentence."""
        return self.field.description or ""

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.field.is_required()

    @property
    def type_name(self) -> str:
        """Type as a person would write it: "int", "one of a, b", "list of float"."""
        return _type_name(self.field.annotation)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        choices = ", ".join(str(choice) for choice in get_args(annotation))
        return f"one of {choices}" if len(get_args(annotation)) > 1 else choices
    if get_origin(annotation) is list:
        item = get_args(annotation)[0]
        return "list of " + ("tables" if isinstance(item, type) and issubclass(item, Section) else _type_name(item))
    if get_origin(annotation) is dict:
        return "table"
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if parts:
        return " or ".join(_type_name(part) for part in parts)
    return {"str": "text", "bool": "true or false"}.get(annotation.__name__, annotation.__name__)


def section_classes() -> dict[str, type[Section]]:
    """TOML table name -> its class, in order."""
    tables: dict[str, type[Section]] = {}
    for name, field in RunFile.model_fields.items():
        classes = [c for c in (field.annotation, *get_args(field.annotation)) if isinstance(c, type)]
        for candidate in classes:
            if issubclass(candidate, Section):
                tables[name] = candidate
    return tables


def parameters() -> Iterator[Parameter]:
    """All settings in the order of the file."""
    tables = section_classes()
    for name, field in RunFile.model_fields.items():
        if name not in tables:
            yield Parameter("", name, field)
    for section, cls in tables.items():
        for name, field in cls.model_fields.items():
            yield Parameter(section, field.alias or name, field)


def flat_names() -> dict[str, Parameter]:
    """Command-line names -> settings: the flat aliases, and the last part of every key where it is unique."""
    everything = list(parameters())
    names: dict[str, Parameter] = {}
    for parameter in everything:
        for alias in parameter.extra("flat"):
            assert alias not in names, alias
            names[alias] = parameter
    counts: dict[str, int] = {}
    for parameter in everything:
        counts[parameter.name] = counts.get(parameter.name, 0) + 1
    for parameter in everything:
        if counts[parameter.name] == 1 and parameter.name not in AMBIGUOUS:
            names.setdefault(parameter.name, parameter)
    return names
