"""Facts and defaults of the FluxFlow family. Torch-free."""

from typing import TYPE_CHECKING

from musubi_tuner.models.fluxflow.rules import FLUXFLOW
from musubi_tuner.models.fluxflow.settings import SECTIONS, objective_of
from musubi_tuner.models.spec import AdapterTargets, Latents, ModelSpec, TaskFacts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from musubi_tuner.config import RunConfig

SHOWN = tuple(f"sample.{key}" for key in ("reconstructions", "every_steps", "every_epochs", "at_first", "use_ema"))
"""Keys of [sample] that act where reconstructions are shown."""
RECOMPUTES = "memory.gradient_checkpointing"
_NO_ENCODERS = "FluxFlow has a text encoder of its own, in its checkpoint or at model.bert_path"


def task(config: "RunConfig") -> TaskFacts:
    """Facts of a run's task: what its objective trains."""
    objective = objective_of(config)
    flow = ("flow", "text_encoder") if objective.train_diff_full else ("flow",) if objective.train_diff else ()
    if not objective.train_vae:
        if not objective.train_diff_full:
            return TaskFacts(caches=("latents", "text"))
        return TaskFacts(roles=flow, caches=("latents", "text"), own=("objective.*", "sample.*", RECOMPUTES))
    judge = ("discriminator",) if objective.gan_training else ()
    return TaskFacts(roles=("vae", *judge, *flow), caches=(), pixels=True, own=("objective.*", *SHOWN, RECOMPUTES))


LINE = {"VAE": "recon", "LPIPS": "lpips", "KL": "kl", "Bezier": "", "ColorStats": "color", "Hist": "hist", "Contrast": "contrast",
        "G": "gen", "D": "disc", "Flow": "flow"}  # fmt: skip
"""Words of the published trainer's log -> loss. Its Bezier regulariser is gone, and the word is still there."""


def log_line(values: "Mapping[str, float]") -> str:
    """Losses as the published trainer prints them."""
    found = {word: values.get(f"loss/{loss}") if loss else 0.0 for word, loss in LINE.items()}
    if "loss/kl" not in values:
        del found["Bezier"]
    if "loss/main" in values:
        found["Flow"] = values["loss/main"]
    return " | ".join(f"{word}: {value:.4f}" for word, value in found.items() if value is not None)


def latents(config: "RunConfig") -> Latents:
    """Size of the latents: of the checkpoint, once it is there, or of a new model."""
    if config.waits_for:
        return Latents(SPEC.latent_channels, SPEC.vae_factor)
    from musubi_tuner.models.fluxflow.checkpoint import geometry_of

    geometry = geometry_of(config)
    return Latents(geometry.vae_dim, geometry.factor)


def ways_to_save(config: "RunConfig") -> list[str]:
    """In the order of the published guide, each with what it changes; those that are left."""
    objective, found = objective_of(config), []
    if any(dataset.batch_size > 1 for dataset in config.datasets):
        found.append("set batch_size = 1 and raise train.grad_accum_steps by as much (nothing but the time changes)")
    if objective.train_vae and objective.train_reconstruction and objective.use_lpips:
        found.append("set objective.use_lpips = false (no perceptual loss)")
    found.append("lower the resolution (coarser pictures)")
    if objective.train_vae and objective.train_reconstruction and objective.gan_training:
        found.append("set objective.train_reconstruction = false (against the discriminator alone)")
    if objective.train_vae and objective.train_spade:
        found.append("set objective.train_spade = false (the expander no longer sees its latents at every scale)")
    if config.model.init == "scratch":
        found.append("set model.geometry.vae_dim = 64 or 32 (another model)")
    if config.train.mixed_precision == "no":
        found.append('set train.mixed_precision = "bf16" (products in half precision)')
    if not config.memory.checkpoints and not config.spec.task(config).denoises:
        found.append("set memory.gradient_checkpointing = true (the same bits in more time)")
    return found


SPEC = ModelSpec(
    code="ff",
    full_name="fluxflow",
    title="FluxFlow",
    modelspec_architecture="fluxflow",
    pixel_step=16,
    vae_factor=16,
    latent_channels=128,
    latent_shift=False,
    latents=latents,
    sample_size=512,
    drops_text=True,
    defaults={
        "sample.steps": 20,
        "optimizer.betas": [0.9, 0.95],
        "ema.decay": 0.999,
        "save.every_epochs": 1,
    },
    dataset_defaults={
        "resolution": 1024,
        "enable_bucket": True,
        "bucket_no_upscale": False,
        "caption_extension": ".txt",
        "batch_size": 2,
        "num_repeats": 1,
        "missing_caption": "error",
        "recursive": False,
    },
    sections=SECTIONS,
    foreign_keys={
        **dict.fromkeys(
            ("clip_path", "t5_path", "clip_tokenizer", "t5_tokenizer", "t5_max_tokens", "fp8_t5"), _NO_ENCODERS
        ),
        "experts": "FluxFlow has no teachers",
    },
    rules=FLUXFLOW,
    geometry="musubi_tuner.models.fluxflow.geometry:FluxFlowConfig",
    task=task,
    package="musubi_tuner.models.fluxflow",
    has_published_trainer=True,
    log_line=log_line,
    ways_to_save=ways_to_save,
    frozen_networks="musubi_tuner.models.fluxflow.networks",
    block_lists=(),
    adapters=AdapterTargets(layers={}, network_module="networks.lora_fluxflow"),
)
