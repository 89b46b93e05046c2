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


class LogitNormal(Section):
    """The normal under some densities of the training times."""

    logit_mean: float = param(0.0, "Mean of logit_normal and logsnr.", ge=-10, le=10, when=_NORMAL, rule="V18")
    logit_std: float = param(
        1.0, "Standard deviation of logit_normal and logsnr.", gt=0, le=10, when=_NORMAL, rule="V18"
    )


class ElementLoss(Section):
    """The loss of one element."""

    loss: Literal["l2", "huber"] = param("l2", "Element-wise loss.", flat=("loss_type",), expert=True)
    huber_delta: float = param(
        0.1, "Where huber turns from square to linear.", gt=0, le=10, when=is_("objective.loss", "huber"), expert=True
    )


class MinSnr(Section):
    """The min-SNR weight of a loss."""

    min_snr_gamma: float | None = param(
        5.0, "Cap of the min-SNR weight; 0 = off.", ge=0, le=1000, when=is_not("objective.min_snr_form", "none")
    )
    min_snr_form: Literal["published", "x0", "vpred", "none"] = param(
        "published", "Formula of the min-SNR weight; see flow/weighting.py.", when=on("objective.min_snr_gamma")
    )
