"""[objective], and the parts from which families build theirs."""

from typing import Literal

from musubi_tuner.config.fields import Section, param
from musubi_tuner.config.when import is_, is_not, on


class ObjectiveSection(Section):
    """What is learned: times, loss, weights, and what is dropped on the way."""

    timestep_stratified: bool = param(False, "Spread the times of one update evenly over the density.")
    ip_noise_gamma: float | None = param(
        None, "Input perturbation: extra noise of this strength that the model sees and need not predict; 0 = off.",
        ge=0, le=10, step=0.01
    )  # fmt: skip
    ip_noise_gamma_random_strength: bool = param(
        False, "Draw the strength between 0 and ip_noise_gamma, once per update.", when=on("objective.ip_noise_gamma")
    )
    ip_noise_per_sample: bool = param(
        False,
        "Draw that strength for every sample on its own.",
        when=on("objective.ip_noise_gamma") & on("objective.ip_noise_gamma_random_strength"),
    )


_NORMAL = is_("objective.timestep_sampling", "logit_normal", "logsnr", "qinglong_flux") | (
    is_("objective.timestep_sampling", "sigma") & is_("objective.weighting_scheme", "logit_normal")
)


class NoiseRecipe(Section):
    """What is done to the noise before it meets the image."""

    noise_offset: float | None = param(
        None,
        "Noise offset: shift every channel of the noise by a random number of this size; 0 = off.",
        ge=0,
        le=1,
        step=0.01,
    )
    noise_offset_random_strength: bool = param(
        False, "Draw the strength between 0 and noise_offset, once per update.", when=on("objective.noise_offset")
    )
    adaptive_noise_scale: float | None = param(
        None,
        "Added to noise_offset, times how far the channel's mean is from 0; a negative number lessens it.",
        ge=-1,
        le=1,
        neutral=0,
    )
    multires_noise_iterations: int | None = param(
        None, "Multi-resolution noise: how many coarser noises are added; 0 = off.", ge=0, le=10, unit="noises"
    )
    multires_noise_discount: float = param(
        0.3,
        "What each coarser noise counts of the one before.",
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
        False, "Cut the density at min_timestep and max_timestep instead of squeezing it between them."
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
        "Element-wise loss; the last two are huber and smooth_l1 of sd-scripts. See flow/losses.py.",
        flat=("loss_type",),
        expert=True,
    )
    huber_delta: float = param(
        0.1,
        "Where huber turns from square to linear.",
        gt=0,
        le=10,
        when=is_not("objective.loss", "l2", "l1"),
        flat=("huber_c",),
        expert=True,
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = param(
        "constant",
        "How huber_delta depends on the noise level: not, or from 1 at the image to huber_delta at the noise.",
        when=is_not("objective.loss", "l2", "l1"),
        expert=True,
    )
    huber_scale: float = param(
        1.0,
        "Factor of the scheduled huber_delta.",
        gt=0,
        le=100,
        when=is_not("objective.loss", "l2", "l1"),
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
