"""The tables of a run file that are specific to FluxFlow. Torch-free."""

from typing import TYPE_CHECKING, Literal, cast

from musubi_tuner.config.fields import MOST, Section, param
from musubi_tuner.config.schema.model import AveragedCheckpoint, ModelSection, NewModel
from musubi_tuner.config.schema.objective import ObjectiveSection
from musubi_tuner.config.schema.roles import roles_section
from musubi_tuner.config.schema.sample import SampleSection
from musubi_tuner.config.when import is_, off, on

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig

TOKENIZER = "distilbert/distilbert-base-uncased"
"""Hub id of the published tokenizer."""
ROLES = ("vae", "flow", "text_encoder", "discriminator")
"""In the order of files and reports."""

_SCRATCH = is_("model.init", "scratch")
_VAE = on("objective.train_vae")
_GAN = _VAE & on("objective.gan_training")
_RECONSTRUCTS = _VAE & on("objective.train_reconstruction")
_FLOW = on("objective.train_diff") | on("objective.train_diff_full")
_ALONE = on("objective.train_diff") & off("objective.train_vae") & off("objective.train_diff_full")
"""The flow processor trains alone."""


class FluxFlowModel(AveragedCheckpoint, NewModel, ModelSection):
    """Which model is trained, and the frozen networks around it."""

    layout: Literal["ff-v2", "published"] = param(
        "ff-v2",
        "Shape of a new model where [model.geometry] does not say: mended, or as published.",
        when=_SCRATCH,
    )
    calibrate: bool = param(
        True,
        "Scale the layers of a new autoencoder on pictures of the data, so that signals neither die nor explode at the start.",
        when=_SCRATCH,
        expert=True,
    )
    bert_path: str | None = param(
        None,
        "Pretrained DistilBERT: a folder or a hub id; absent = that of the checkpoint, or a new one.",
        flat=("pretrained_bert_model",),
        path=True,
    )
    bert_tokenizer: str | None = param(
        None, "Its tokenizer: a folder or a hub id; absent = next to it, else that of distilbert-base-uncased.",
        flat=("tokenizer_name",), path=True,
    )  # fmt: skip
    text_max_tokens: int = param(128, "Text is padded or cut to this many tokens.", ge=2, le=512, unit="tokens")
    vgg_path: str | None = param(
        None,
        "VGG16 weights of LPIPS: a file, a folder or a hub id.",
        when=_RECONSTRUCTS & on("objective.use_lpips"),
        path=True,
    )
    lpips_path: str | None = param(
        None,
        "Linear weights of LPIPS: a file; absent = those of the installed package lpips.",
        when=_RECONSTRUCTS & on("objective.use_lpips"),
        path=True,
    )


class FluxFlowObjective(ObjectiveSection):
    """What is trained, and its losses."""

    train_vae: bool = param(False, "Train the autoencoder: compressor and expander.")
    train_diff: bool = param(
        False, "Train the flow processor: on cached latents, or with train_vae on those of the autoencoder that trains."
    )
    train_diff_full: bool = param(False, "Train the head of the text encoder with the flow processor.")
    train_language: bool = param(
        False, "Train the language model below that head too.", when=on("objective.train_diff_full")
    )
    train_reconstruction: bool = param(
        True, "With the losses of the reconstruction; false = against the discriminator alone.", when=_VAE
    )
    gan_training: bool = param(False, "Train the autoencoder against a discriminator.", when=_VAE)
    use_lpips: bool = param(False, "Add the perceptual loss LPIPS.", when=_RECONSTRUCTS)
    train_spade: bool = param(False, "The expander sees its latents at every scale (SPADE).", when=_VAE)
    kl_beta: float = param(1e-4, "Weight of the KL term after its warm-up.", ge=0, le=100, when=_VAE)
    kl_warmup_steps: int = param(
        5000, "Updates over which the weight of the KL term rises, counted in each step.", ge=0, le=MOST, unit="updates",
        when=_VAE & on("objective.kl_beta"), neutral=0,
    )  # fmt: skip
    kl_free_bits: float = param(
        0.0, "Least KL of every latent value; 0 = none.", ge=0, le=100, when=_VAE & on("objective.kl_beta")
    )
    kl_normalize: bool = param(
        True,
        "Mean of the KL over latent values; false = their sum, as before 0.4.0.",
        when=_VAE & on("objective.kl_beta"),
        expert=True,
    )
    frequency_alpha: float = param(
        0.5,
        "Weight of fine detail against the blurred picture in the reconstruction.",
        ge=0,
        le=100,
        when=_RECONSTRUCTS,
        expert=True,
    )
    mse_weight: float = param(
        0.1, "Weight of the squared error in the reconstruction.", ge=0, le=100, when=_RECONSTRUCTS
    )
    lambda_lpips: float = param(0.1, "Weight of LPIPS.", ge=0, le=100, when=_RECONSTRUCTS & on("objective.use_lpips"))
    color_weight: float = param(
        0.05, "Weight of the differences of channel means and spreads.", ge=0, le=100, when=_RECONSTRUCTS, expert=True
    )
    histogram_weight: float = param(
        0.02, "Weight of the differences of colour histograms.", ge=0, le=100, when=_RECONSTRUCTS, expert=True
    )
    contrast_weight: float = param(
        0.1, "Weight of the differences of contrast.", ge=0, le=100, when=_RECONSTRUCTS, expert=True
    )
    lambda_adv: float = param(0.5, "Weight of the adversarial loss.", ge=0, le=100, when=_GAN)
    gan_balance: Literal["fixed", "gradient"] = param(
        "fixed",
        "gradient multiplies lambda_adv by the ratio of the gradients of reconstruction and adversarial loss at the last layer.",
        when=_GAN & on("objective.train_reconstruction") & on("objective.lambda_adv"),
    )
    gan_start: int = param(
        0, "Updates before the discriminator and the adversarial loss begin.", ge=0, le=MOST, unit="updates", when=_GAN
    )
    r1_gamma: float = param(5.0, "Strength of the R1 penalty of the discriminator; 0 = off.", ge=0, le=1000, when=_GAN)
    r1_interval: int = param(
        16,
        "Compute it every so many updates.",
        ge=1,
        le=MOST,
        unit="updates",
        when=_GAN & on("objective.r1_gamma"),
        neutral=16,
    )
    instance_noise_std: float = param(0.01, "Noise on what the discriminator sees; 0 = none.", ge=0, le=1, when=_GAN)
    instance_noise_decay: float = param(
        0.9999,
        "Factor of this noise per update.",
        gt=0,
        le=1,
        when=_GAN & on("objective.instance_noise_std"),
        expert=True,
    )

    timestep_stratified: bool = param(
        False, "Stratified sampling: one time from each equal-probability slice per update.", when=_ALONE
    )
    ip_noise_gamma: float | None = param(
        None, "Input perturbation: extra noise of this strength that the model sees but does not predict; 0 = off.",
        ge=0, le=10, step=0.01, when=_ALONE,
    )  # fmt: skip
    timestep_sampling: Literal["uniform", "cosine_weighted"] = param(
        "uniform", "Density of the training times; cosine_weighted, as published, favours low noise.", when=_FLOW
    )
    beta_start: float = param(1e-4, "Smallest beta of the diffusion.", gt=0, lt=1, when=_FLOW, expert=True)
    beta_end: float = param(0.02, "Largest beta of the diffusion.", gt=0, lt=1, when=_FLOW, expert=True)
    beta_schedule: Literal["linear", "scaled_linear"] = param(
        "linear", "How beta rises: evenly, or its root does.", when=_FLOW, expert=True
    )
    zero_terminal_snr: bool = param(
        False, "Leave nothing of the picture at the last time, from which drawing starts.", when=_FLOW
    )
    min_snr_gamma: float | None = param(
        None, "Cap of the min-SNR weight of a v-prediction; 0 = off.", ge=0, le=1000, when=_FLOW
    )
    text_dropout: float = param(
        0.1,
        "Share of samples trained without text, for guidance.",
        flat=("cfg_dropout_prob",),
        ge=0,
        le=1,
        step=0.01,
        when=_FLOW,
    )


class FluxFlowSample(SampleSection):
    """Pictures drawn while training."""

    acts_when = on("sample.prompts") | on("objective.train_vae")

    reconstructions: int = param(
        4,
        "Pictures of the data that are shown beside what the autoencoder makes of them.",
        ge=1,
        le=64,
        when=on("objective.train_vae"),
        resume="free",
        unit="pictures",
    )
    solver: Literal["dpm++", "ddim"] = param(  # type: ignore[assignment]  # other solvers than those of flows
        "dpm++", "Solver of the sampling equation.", resume="free"
    )


SECTIONS: dict[str, type[Section]] = {
    "model": FluxFlowModel,
    "objective": FluxFlowObjective,
    "sample": FluxFlowSample,
    "roles": roles_section(*ROLES),
}


def model_of(config: "RunConfig") -> FluxFlowModel:
    """[model] of a run of this family."""
    return cast(FluxFlowModel, config.model)


def objective_of(config: "RunConfig") -> FluxFlowObjective:
    """[objective] of a run of this family."""
    return cast(FluxFlowObjective, config.objective)


def trains_language(config: "RunConfig") -> bool:
    """Whether the language model trains, so that texts reach the model as tokens."""
    objective = objective_of(config)
    return objective.train_diff_full and objective.train_language
