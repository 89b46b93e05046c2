"""The tables of a run file that are specific to FLUX.1-dev. Torch-free."""

from typing import TYPE_CHECKING, Literal, cast

from musubi_tuner.config.fields import Section, param
from musubi_tuner.config.schema.model import ClipAndT5, ModelSection
from musubi_tuner.config.schema.objective import (
    ElementLoss,
    LogitNormal,
    MinSnr,
    NoiseLevels,
    NoiseRecipe,
    ObjectiveSection,
)
from musubi_tuner.config.schema.sample import SampleSection
from musubi_tuner.config.when import is_

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig

TimestepSampling = Literal[
    "sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift", "logsnr",
    "qinglong_flux", "qinglong_qwen", "ideogram4_shift",
]  # fmt: skip

SIGMOID_DENSITIES = ("sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift", "qinglong_flux",
                     "qinglong_qwen")  # fmt: skip
"""Densities based on a sigmoid, whose spread is `sigmoid_scale`."""


class FluxModel(ClipAndT5, ModelSection):
    """Which model is trained, and the frozen networks around it."""

    keep_dtype: bool = param(
        False, "Keep frozen weights in the precision of their file instead of that of the computation.", expert=True
    )
    allow_schnell: bool = param(
        False, "Train on a model without guidance embedding (schnell); training undoes its distillation.", expert=True
    )


class FluxObjective(MinSnr, ElementLoss, LogitNormal, NoiseLevels, NoiseRecipe, ObjectiveSection):
    """What is learned: times, loss and weights."""

    timestep_sampling: TimestepSampling = param("flux_shift", "Density of the training times.")
    sigmoid_scale: float = param(
        1.0,
        "Spread of the normal under the sigmoid and shift densities.",
        gt=0,
        le=100,
        when=is_("objective.timestep_sampling", *SIGMOID_DENSITIES),
        rule="V18",
    )
    discrete_flow_shift: float = param(
        1.0,
        "Factor of timestep_sampling = shift (and sigma); above 1 towards noise.",
        gt=0,
        le=100,
        when=is_("objective.timestep_sampling", "shift")
        | (is_("objective.timestep_sampling", "sigma") & is_("objective.sigma_compat", "exact")),
        rule="V18",
    )
    weighting_scheme: Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"] = param(
        "none",
        "Loss weight by noise level; logit_normal and mode shape the draws of timestep_sampling = sigma instead.",
    )
    mode_scale: float = param(
        1.29,
        "Strength of weighting_scheme = mode.",
        ge=-10,
        le=10,
        when=is_("objective.timestep_sampling", "sigma") & is_("objective.weighting_scheme", "mode"),
        rule="V18",
    )
    sigma_compat: Literal["exact", "upstream"] = param(
        "exact",
        "upstream draws timestep_sampling = sigma as musubi-tuner does: without shift, range by table index.",
        when=is_("objective.timestep_sampling", "sigma"),
        rule="V18",
        expert=True,
    )
    timestep_offset: float = param(
        0.0,
        "Added to the noise level that the model gets as input; 0.001 reproduces musubi-tuner.",
        ge=0,
        le=0.1,
        expert=True,
    )
    guidance_scale: float = param(1.0, "Embedded guidance while training.", ge=0, le=100)


class FluxSample(SampleSection):
    """Pictures drawn while training."""

    cfg_scale: float = param(
        1.0, "Classifier-free guidance with the negative prompt, in addition to the embedded guidance; 1 = off.", ge=1, le=100,
        resume="free",
    )  # fmt: skip
    shift: float | None = param(
        None, "Shift of the sampling times; absent = by picture size.", gt=0, le=100, resume="free"
    )


SECTIONS: dict[str, type[Section]] = {"model": FluxModel, "objective": FluxObjective, "sample": FluxSample}


def model_of(config: "RunConfig") -> FluxModel:
    """[model] of a run of this family."""
    return cast(FluxModel, config.model)


def objective_of(config: "RunConfig") -> FluxObjective:
    """[objective] of a run of this family."""
    return cast(FluxObjective, config.objective)
