"""[objective], and the parts from which families build theirs."""

from typing import Literal

from musubi_tuner.config.fields import Section, param
from musubi_tuner.config.when import is_, is_not, on


class ObjectiveSection(Section):
    """What is learned: times, loss, weights, and what is dropped on the way."""

    timestep_stratified: bool = param(
        False, "Stratified sampling: one time from each equal-probability slice per update."
    )
    ip_noise_gamma: float | None = param(
        None, "Input perturbation: extra noise of this strength that the model sees but does not predict; 0 = off.",
        ge=0, le=10, step=0.01
    )  # fmt: skip
    ip_noise_gamma_random_strength: bool = param(
        False, "Draw the strength between 0 and ip_noise_gamma, once per update.", when=on("objective.ip_noise_gamma")
    )
    ip_noise_per_sample: bool = param(
        False,
        "Draw the strength separately for each sample.",
        when=on("objective.ip_noise_gamma") & on("objective.ip_noise_gamma_random_strength"),
    )


_NORMAL = is_("objective.timestep_sampling", "logit_normal", "logsnr", "qinglong_flux") | (
    is_("objective.timestep_sampling", "sigma") & is_("objective.weighting_scheme", "logit_normal")
)


HUBER = is_not("objective.loss", "l2", "l1")
"""Where the element-wise loss has a threshold."""


class NoiseRecipe(Section):
    """What is done to the noise before it meets the image."""

    noise_offset: float | None = param(
        None,
        "Noise offset: add a random constant of this strength to each noise channel; 0 = off.",
        ge=0,
        le=1,
        step=0.01,
    )
    noise_offset_random_strength: bool = param(
        False, "Draw the strength between 0 and noise_offset, once per update.", when=on("objective.noise_offset")
    )
    adaptive_noise_scale: float | None = param(
        None,
        "Add this times the absolute mean of each latent channel to noise_offset; negative values reduce the offset.",
        ge=-1,
        le=1,
        neutral=0,
    )
    multires_noise_iterations: int | None = param(
        None,
        "Multi-resolution noise: number of noise layers added, from full size to coarser ones; 0 = off.",
        ge=0,
        le=10,
        unit="noises",
    )
    multires_noise_discount: float = param(
        0.3,
        "Weight of each layer relative to the previous one.",
        gt=0,
        lt=1,
        when=on("objective.multires_noise_iterations"),
        rule="V08",
    )


class NoiseLevels(Section):
    """Which noise levels are trained."""

    min_timestep: int = param(0, "Lowest noise level, in thousandths.", ge=0, le=999, unit="thousandths")
    max_timestep: int = param(1000, "Highest noise level, in thousandths.", ge=1, le=1000, unit="thousandths")
    preserve_distribution_shape: bool = param(
        False,
        "Truncate the distribution to min_timestep ... max_timestep instead of rescaling it to that range.",
        when=is_not("objective.min_timestep", 0) | is_not("objective.max_timestep", 1000),
    )


class LogitNormal(Section):
    """The normal under some densities of the training times."""

    logit_mean: float = param(0.0, "Mean of logit_normal and logsnr.", ge=-10, le=10, when=_NORMAL, rule="V18")
    logit_std: float = param(
        1.0, "Standard deviation of logit_normal and logsnr.", gt=0, le=10, when=_NORMAL, rule="V18"
    )


class ElementLoss(Section):
    """The loss of one element."""

    loss: Literal["l2", "l1", "huber", "smooth_l1", "pseudo_huber", "pseudo_smooth_l1"] = param(
        "l2",
        "Element-wise loss. pseudo_huber and pseudo_smooth_l1 are what sd-scripts calls huber and smooth_l1.",
        flat=("loss_type",),
        expert=True,
    )
    huber_delta: float = param(
        0.1,
        "Threshold at which the Huber losses change from quadratic to linear.",
        gt=0,
        le=10,
        when=HUBER,
        flat=("huber_c",),
        expert=True,
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = param(
        "constant",
        "Threshold by noise level: constant, or falling from 1 (clean image) to huber_delta (pure noise).",
        when=HUBER,
        expert=True,
    )
    huber_scale: float = param(
        1.0,
        "Multiplies the scheduled threshold.",
        gt=0,
        le=100,
        when=HUBER,
        expert=True,
    )


class MinSnr(Section):
    """The min-SNR weight of a loss."""

    min_snr_gamma: float | None = param(
        5.0, "Cap of the min-SNR weight; 0 = off.", ge=0, le=1000, when=is_not("objective.min_snr_form", "none")
    )
    min_snr_form: Literal["published", "x0", "vpred", "none"] = param(
        "published", "Formula of the min-SNR weight; see flow/weighting.py.", when=on("objective.min_snr_gamma")
    )
