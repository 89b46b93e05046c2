"""What is trained: [adapter], and the parts from which families build their [model], [experts] and [objective].

A family's own tables are classes in ``models/<family>/settings.py`` (see `ModelSpec.sections`). What a family does not have does not exist
there. The framework itself reads `ModelSection`, `ExpertsSection` and `ObjectiveSection` only.
"""

from typing import Any, Literal

from pydantic import create_model

from musubi_tuner.config.fields import AutoDtype, Section, param


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
    revision: str | None = param(None, "Branch, tag or commit of a hub id in model.path; absent = main.")
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
    vae_dtype: AutoDtype = param("auto", "Precision of the autoencoder; auto = float32.")
    text_dtype: AutoDtype = param("auto", "Precision of the text encoders; auto = bfloat16 on a GPU, float32 on a CPU.")


class NewModel(Section):
    """The shape of a model that starts from random weights."""

    geometry: dict[str, Any] = param({}, "Shape of a new model: the fields of its config.json.")


class AveragedCheckpoint(Section):
    """Which weights of a checkpoint that holds an average too."""

    weights: Literal["model", "ema"] = param("model", "Which weights of the checkpoint to start from.")
    ema_file: str | None = param(
        None,
        "Exact name of the averaged weights, beside the checkpoint or in its repository, or a whole path: the run starts "
        'from them, or its average does with ema.init = "checkpoint"; absent = the usual names.',
    )


class HiddenPadding(Section):
    """Whether the model sees the padding of its text."""

    t5_attn_mask: bool = param(False, "Hide padding tokens from pooling and attention; the published model does not.")


class ExpertsSection(Section):
    """[experts] of a family without teachers: empty."""

    @property
    def extracted(self) -> list[str]:
        """Names of the teachers that are run while caching."""
        return []

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers that are on; their names begin those of their tensors."""
        return ()


class Sd15Teachers(ExpertsSection):
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
        """See `ExpertsSection`; a Sol of geometry is computed, not extracted."""
        sol = self.enable_sol and self.sol_source == "extracted"
        return [name for name, runs in (("lune", self.enable_lune), ("sol", sol)) if runs]

    @property
    def teachers(self) -> tuple[str, ...]:
        """See `ExpertsSection`."""
        return tuple(name for name, on in (("lune", self.enable_lune), ("sol", self.enable_sol)) if on)


class AdapterTarget(Section):
    """Settings of the layers that a pattern matches; absent ones do not change."""

    pattern: str = param(..., "Whole module path: `*` is one part, `**` any number, [2-5] a range, [2,4] a list.")
    rank: int | None = param(None, "Width of the matrices.", ge=1, le=1024)
    alpha: float | None = param(None, "The adapter is scaled by alpha / rank; 0 = the rank.", ge=0)
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
        "A published choice of kinds, rank, alpha and targets; keys set here override it. Names differ by family.",
    )
    kinds: list[str] | None = param(
        None, "Kinds of layers that are adapted, by the names that the family gives them; absent = the usual ones."
    )
    rank: int = param(16, "Width of the matrices.", flat=("network_dim",), ge=1, le=1024)
    alpha: float | None = param(
        None,
        "The adapter is scaled by alpha / rank; absent = half the rank, 0 = the rank.",
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
        [], "Regular expressions of module paths that are adapted even if excluded.", flat=("include_patterns",)
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
    loraplus_lr_ratio: float | None = param(
        None, "LoRA+: learning rate of the up matrices, as a multiple.", gt=0, le=1000
    )
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

    timestep_stratified: bool = param(False, "Spread the times of one update evenly over the density.")
    ip_noise_gamma: float | None = param(
        None, "Input perturbation: extra noise of this strength that the model sees and need not predict; 0 = off.",
        ge=0, le=10,
    )  # fmt: skip
    ip_noise_gamma_random_strength: bool = param(
        False, "Draw the strength between 0 and ip_noise_gamma, once per update."
    )
    ip_noise_per_sample: bool = param(False, "Draw that strength for every sample on its own.")


class LogitNormal(Section):
    """The normal under some densities of the training times."""

    logit_mean: float = param(0.0, "Mean of logit_normal and logsnr.", ge=-10, le=10)
    logit_std: float = param(1.0, "Standard deviation of logit_normal and logsnr.", gt=0, le=10)


class ElementLoss(Section):
    """The loss of one element."""

    loss: Literal["l2", "huber"] = param("l2", "Element-wise loss.", flat=("loss_type",))
    huber_delta: float = param(0.1, "Where huber turns from square to linear.", gt=0, le=10)


class MinSnr(Section):
    """The min-SNR weight of a loss."""

    min_snr_gamma: float | None = param(5.0, "Cap of the min-SNR weight; 0 = off.", ge=0, le=1000)
    min_snr_form: Literal["published", "x0", "vpred", "none"] = param(
        "published", "Formula of the min-SNR weight; see flow/weighting.py."
    )


class RoleSection(Section):
    """How one role is trained: keys that override the tables of the same name."""

    optimizer: dict[str, Any] = param({}, "Keys of [optimizer] that differ.")
    scheduler: dict[str, Any] = param({}, "Keys of [scheduler] that differ.")
    ema: dict[str, Any] = param({}, "Keys of [ema] that differ.")
    max_grad_norm: float | None = param(None, "As train.max_grad_norm.", ge=0)


class RolesSection(Section):
    """[roles] of a family with one role: empty."""


def roles_section(*names: str) -> type[RolesSection]:
    """[roles] of a family whose modules train on their own, under these names."""
    text = "Keys of [optimizer], [scheduler] and [ema], and max_grad_norm, that differ for this role."
    tables: Any = {name: (RoleSection, param(RoleSection(), text)) for name in names}
    kept = param([], "Roles that are not trained.")
    doc = (
        "How each role is trained: [roles.<role>.optimizer], .scheduler and .ema override the tables of the same name."
    )
    role: Any = Literal[names]
    return create_model("RolesSection", __base__=RolesSection, __doc__=doc, freeze=(list[role], kept), **tables)
