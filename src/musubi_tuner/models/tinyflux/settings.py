"""The tables of a run file that are specific to TinyFlux. Torch-free."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, cast

from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.config.diagnostics import Diagnostic, warning
from musubi_tuner.config.fields import MOST, Section, param
from musubi_tuner.config.schema.cache import CacheSection
from musubi_tuner.config.schema.experts import Sd15Teachers
from musubi_tuner.config.schema.model import AveragedCheckpoint, ClipAndT5, HiddenPadding, ModelSection, NewModel
from musubi_tuner.config.schema.objective import (
    HUBER,
    ElementLoss,
    LogitNormal,
    MinSnr,
    NoiseLevels,
    NoiseRecipe,
    ObjectiveSection,
)
from musubi_tuner.config.when import is_, on
from musubi_tuner.models.tinyflux.geometry import ModelOptions

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig


class TinyFluxModel(HiddenPadding, AveragedCheckpoint, NewModel, ClipAndT5, ModelSection):
    """Which model is trained, and the frozen networks around it."""

    init_scheme: Literal["reference", "adaln_zero"] = param(
        "reference",
        "Start values of a new model: as published, or with zero modulation, so that blocks begin as the identity.",
        when=is_("model.init", "scratch"),
        expert=True,
    )
    upgrade_neutral: bool = param(
        True,
        "Initialise parts that an older checkpoint lacks so that its outputs change as little as possible.",
        when=is_("model.init", "checkpoint"),
        expert=True,
    )
    rope_freqs: Literal["checkpoint", "exact"] = param(
        "checkpoint",
        "Rotary frequencies as stored in the checkpoint, or recomputed in float32.",
        when=is_("model.init", "checkpoint"),
        expert=True,
    )
    text_positions: Literal["zero", "index"] | None = param(
        None,
        "Position of text tokens in attention: none, as published, or their number; only a new model may choose; absent = as "
        "in the checkpoint, and none in a new model.",
        expert=True,
    )
    temperature_per_head: bool | None = param(
        None,
        "Give each attention head its own temperature of Sol instead of their mean; only a new model may choose; absent = as "
        "in the checkpoint, and false in a new model.",
        expert=True,
    )
    timestep_scale: float | None = param(
        None,
        "Factor of the time inside its embedding, 1 as published; larger values separate close times better; only a new model may "
        "choose; absent = as in the checkpoint, and 1 in a new model.",
        gt=0,
        le=1e6,
        expert=True,
    )


_TEACHERS = on("experts.enable_lune") | on("experts.enable_sol")
_LEARNS_LUNE = on("experts.enable_lune") & is_("adapter.type", "none")
_LEARNS_SOL = on("experts.enable_sol") & is_("adapter.type", "none")
_EMBEDDED = is_("model.init", "checkpoint") | on("model.geometry.guidance_embeds")


class TinyFluxObjective(MinSnr, ElementLoss, LogitNormal, NoiseLevels, NoiseRecipe, ObjectiveSection):
    """What is learned: times, loss, weights, and what is dropped on the way."""

    huber_delta: float = param(
        0.1,
        "Threshold at which the Huber losses change from quadratic to linear, in the loss and in lune_mode.",
        gt=0,
        le=10,
        expert=True,
        flat=("huber_c",),
        when=HUBER | (is_("objective.lune_mode", "huber") & _LEARNS_LUNE),
    )
    timestep_sampling: Literal["logit_normal", "uniform"] = param("logit_normal", "Density of the training times.")
    shift: float = param(
        3.0,
        "Shift of training and sampling times; above 1 towards clean images.",
        flat=("shift",),
        gt=0,
        le=100,
    )
    weighting_scheme: Literal["none", "cosmap", "sigma_sqrt"] = param(
        "none", "Loss weight by noise level, multiplied with the min-SNR weight; see flow/noise_levels.py."
    )
    precision: Literal["float32", "bfloat16"] = param(
        "float32",
        "Times, noise, noisy latents, targets and losses; bfloat16 rounds each, as published: times above 0.998 become 1.",
        expert=True,
    )
    spatial_weighting: bool = param(False, "Weight the loss by Sol's importance map.")
    text_dropout: float = param(0.1, "Share of samples trained without text, for guidance.", ge=0, le=1, step=0.01)
    guidance_min: float = param(
        1.0,
        "For models that embed guidance: smallest guidance in training. Samples use the mean of minimum and maximum.",
        ge=0,
        le=100,
        when=_EMBEDDED,
    )
    guidance_max: float = param(
        5.0, "For models that embed guidance: largest guidance in training.", ge=0, le=100, when=_EMBEDDED
    )
    guidance_dropout: float = param(
        0.0,
        "For models that embed guidance: share of samples trained without it; 0.1 in models before v4.2.",
        ge=0,
        le=1,
        when=_EMBEDDED,
    )
    lune_weight: float = param(
        0.1,
        "Weight of the Lune distillation loss.",
        ge=0,
        le=100,
        when=_LEARNS_LUNE,
    )
    lune_warmup_steps: int = param(
        1000,
        "Updates until the Lune weight is reached.",
        ge=0,
        le=MOST,
        unit="updates",
        when=_LEARNS_LUNE,
    )
    lune_mode: Literal["cosine", "huber", "soft", "hard", "mse"] = param(
        "cosine",
        "Distance between predicted and real Lune features.",
        when=_LEARNS_LUNE,
    )
    lune_teacher_dropout: float = param(
        0.1, "Share of samples that use the predictor instead of Lune.", ge=0, le=1, when=on("experts.enable_lune")
    )
    sol_weight: float = param(
        0.05,
        "Weight of the Sol distillation loss.",
        ge=0,
        le=100,
        when=_LEARNS_SOL,
    )
    sol_stats_weight: float = param(
        1.0,
        "Share of the attention statistics in the Sol loss.",
        ge=0,
        le=100,
        when=_LEARNS_SOL,
    )
    sol_spatial_weight: float = param(
        1.0,
        "Share of the attention map in the Sol loss.",
        ge=0,
        le=100,
        when=_LEARNS_SOL,
    )
    sol_warmup_steps: int = param(
        2000,
        "Updates until the Sol weight is reached.",
        ge=0,
        le=MOST,
        unit="updates",
        when=_LEARNS_SOL,
    )
    sol_teacher_dropout: float = param(
        0.1, "Share of samples that use the predictor instead of Sol.", ge=0, le=1, when=on("experts.enable_sol")
    )
    teacher_dropout_mode: Literal["sample", "batch"] = param(
        "sample",
        "One coin per sample, or one per micro-batch as published.",
        when=_TEACHERS,
        expert=True,
    )
    missing_teacher: Literal["predict", "zeros"] = param(
        "predict",
        "For samples of a data set without a teacher that others have: the model's own prediction as features, or zeros as features and as "
        "distillation target, as published.",
        expert=True,
    )
    distill_on_dropped: bool = param(
        True,
        "Samples whose teacher is dropped still count in the distillation loss.",
        when=_TEACHERS & (is_("adapter.type", "none") | on("objective.spatial_weighting")),
        expert=True,
    )
    drop_experts_with_text: bool = param(
        True,
        "Samples without text also lose the teacher features, which were made from the text.",
        when=_TEACHERS,
        expert=True,
    )


class TinyFluxCache(CacheSection):
    """The separate jobs that encode images and captions once."""

    experts_batch_size: int = param(
        1,
        "Images per teacher batch; each is processed at every time bucket.",
        ge=1,
        le=256,
        unit="images",
        when=_TEACHERS,
    )


SECTIONS: dict[str, type[Section]] = {
    "model": TinyFluxModel,
    "experts": Sd15Teachers,
    "cache": TinyFluxCache,
    "objective": TinyFluxObjective,
}


def model_of(config: "RunConfig") -> TinyFluxModel:
    """[model] of a run of this family."""
    return cast(TinyFluxModel, config.model)


def objective_of(config: "RunConfig") -> TinyFluxObjective:
    """[objective] of a run of this family."""
    return cast(TinyFluxObjective, config.objective)


def teachers_of(config: "RunConfig", dataset: DatasetConfig) -> Sd15Teachers:
    """[experts] as it applies to the images of a data set."""
    return cast(Sd15Teachers, config.experts_of(dataset))


def resolve_experts(config: "RunConfig", checkpoint: dict[str, Any] | None = None) -> dict[str, str]:
    """What ``auto`` means for expert_input, expert_time and sol_spatial_norm.

    Args:
        checkpoint: options recorded in the checkpoint that training starts from, if it has any.

    Returns:
        The three keys with their final values: as set, else as the checkpoint records, else the published
        ones when a checkpoint is continued, else the corrected ones.
    """
    published = {"expert_input": "random", "expert_time": "reference", "sol_spatial_norm": "sum"}
    corrected = {"expert_input": "noised_image", "expert_time": "aligned", "sol_spatial_norm": "max"}
    base = corrected if config.model.init == "scratch" else published
    resolved = {}
    for key in base:
        value = getattr(config.sd15, key)
        resolved[key] = value if value != "auto" else (checkpoint or {}).get(key, base[key])
    return resolved


def written_options(config: "RunConfig") -> dict[str, Any]:
    """The model options that a run file sets; see `geometry.ModelOptions`."""
    found = {field.name: getattr(config.model, field.name) for field in fields(ModelOptions)}
    return {name: value for name, value in found.items() if value is not None}


def written_guidance(config: "RunConfig") -> list[str]:
    """Keys of embedded guidance that a person wrote."""
    return [key for key in config.set_keys() if key.startswith("objective.guidance_")]


def no_guidance(key: str, reason: str) -> Diagnostic:
    """A warning that a key of embedded guidance has no effect."""
    return warning("NA03", key, f"has no effect because {reason}", "model.geometry")
