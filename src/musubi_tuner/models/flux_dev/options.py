"""Facts, defaults and rules of the FLUX.1-dev family. Torch-free."""

from typing import TYPE_CHECKING, Any

from musubi_tuner.config.diagnostics import Diagnostic
from musubi_tuner.config.swap import check_swap
from musubi_tuner.models.flux_dev.settings import SECTIONS, objective_of
from musubi_tuner.models.spec import AdapterTargets, ModelSpec

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig

PUBLISHED_AXES = (16, 56, 56)
"""Rotary widths of the published models, whose heads are 128 wide."""
SCALED_MODES = ("sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift", "qinglong_flux",
                "qinglong_qwen")  # fmt: skip
"""Modes with a sigmoid under them, which `sigmoid_scale` spreads."""
PUBLISHED_BLOCKS = {"double_blocks": 19, "single_blocks": 38}
DOUBLE_LAYERS = tuple(f"{stream}_{layer}" for stream in ("img", "txt")
                      for layer in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2"))  # fmt: skip
SINGLE_LAYERS = ("linear1", "linear2", "modulation.lin")


def _shift(value: Any) -> str:
    return (
        f'is TinyFlux\'s. For FLUX.1 write objective.discrete_flow_shift = {value} with timestep_sampling = "shift", or take '
        'timestep_sampling = "flux_shift"'
    )


def check(config: "RunConfig") -> list[Diagnostic]:
    """Static rules of this family."""
    found: list[Diagnostic] = []
    objective, model = objective_of(config), config.model

    def error(key: str, message: str) -> None:
        found.append(Diagnostic("error", key, message))

    if model.init == "scratch":
        error("model.init", 'is "scratch"; FLUX.1 is trained through an adapter on a checkpoint, so give model.path')
    if config.adapter.type == "none":
        error("adapter.type", 'is "none"; full training of FLUX.1 is not supported (11.9 B parameters with optimizer state): '
              'use "lora"')  # fmt: skip
    found += check_swap(config.memory, PUBLISHED_BLOCKS)
    mode, written = objective.timestep_sampling, set(config.set_keys())
    without_effect = {
        "objective.sigmoid_scale": mode not in SCALED_MODES,
        "objective.discrete_flow_shift": mode not in ("shift", "sigma"),
        "objective.sigma_compat": mode != "sigma",
        "objective.logit_mean": not _uses_logit(config),
        "objective.logit_std": not _uses_logit(config),
        "objective.mode_scale": not (mode == "sigma" and objective.weighting_scheme == "mode"),
    }
    for key, idle in without_effect.items():
        if idle and key in written:
            found.append(Diagnostic("warning", key, f'has no effect with timestep_sampling = "{mode}"'))
    if (
        objective.weighting_scheme in ("logit_normal", "mode")
        and mode != "sigma"
        and ("objective.weighting_scheme" in written)
    ):
        found.append(
            Diagnostic("warning", "objective.weighting_scheme", f'"{objective.weighting_scheme}" only shapes the draws of '
                       'timestep_sampling = "sigma", and weighs all losses alike')
        )  # fmt: skip
    if objective.min_timestep >= objective.max_timestep:
        error(
            "objective.min_timestep", f"is {objective.min_timestep}, not below max_timestep = {objective.max_timestep}"
        )
    if objective.preserve_distribution_shape and mode in ("uniform", "sigma"):
        error("objective.preserve_distribution_shape", f'does not apply to timestep_sampling = "{mode}"')
    return found


def _uses_logit(config: "RunConfig") -> bool:
    objective = objective_of(config)
    shaped = objective.timestep_sampling == "sigma" and objective.weighting_scheme == "logit_normal"
    return shaped or objective.timestep_sampling in ("logsnr", "qinglong_flux")


_NO_TEACHERS = "FLUX.1 has no teachers"
_EMBEDDED = "the embedded guidance of FLUX.1 while training is objective.guidance_scale"

SPEC = ModelSpec(
    code="fd",
    full_name="flux_dev",
    title="FLUX.1-dev",
    modelspec_architecture="Flux.1-dev",
    modelspec_implementation="https://github.com/black-forest-labs/flux",
    pixel_step=16,
    vae_factor=8,
    latent_channels=16,
    latent_shift=True,
    sample_size=1024,
    t5_tokenizer="google/t5-v1_1-xxl",
    clip_tokenizer="openai/clip-vit-large-patch14",
    t5_preset="xxl",
    t5_attention_mask=False,
    guidance_embedded=True,
    defaults={
        "model.t5_max_tokens": 512,
        "adapter.type": "lora",
        "optimizer.type": "AdamW",
        "scheduler.type": "constant",
        "objective.min_snr_gamma": 0.0,
        "objective.min_snr_form": "x0",
        "ema.enabled": False,
        "sample.steps": 20,
        "sample.guidance": 3.5,
        "save.every_steps": 500,
    },
    dataset_defaults={
        "resolution": 1024,
        "enable_bucket": True,
        "bucket_no_upscale": False,
        "caption_extension": ".txt",
        "batch_size": 1,
        "num_repeats": 1,
        "missing_caption": "error",
        "recursive": False,
    },
    sections=SECTIONS,
    foreign_keys={
        "experts": _NO_TEACHERS,
        "experts_batch_size": _NO_TEACHERS,
        "objective.shift": _shift,
        "text_dropout": "FLUX.1 is distilled for its embedded guidance and has no trained null condition",
        **dict.fromkeys(("guidance_min", "guidance_max", "guidance_dropout"), _EMBEDDED),
        "model.geometry": "the shape of FLUX.1 is read from the checkpoint",
        **dict.fromkeys(("model.weights", "model.ema_file"), "checkpoints of FLUX.1 hold no averaged weights"),
        "t5_attn_mask": "FLUX.1 is trained with padding visible",
    },
    check=check,
    geometry="musubi_tuner.models.flux_dev.geometry:FluxConfig",
    package="musubi_tuner.models.flux_dev",
    block_lists=("double_blocks", "single_blocks"),
    adapters=AdapterTargets(
        layers={"double_blocks": DOUBLE_LAYERS, "single_blocks": SINGLE_LAYERS},
        exclude=(r".*(img_mod\.lin|txt_mod\.lin|modulation\.lin).*",),
        network_module="networks.lora_flux",
    ),
    quantizable=r"(double|single)_blocks\.\d+\.(?!.*(norm|mod)).*",
    modulation=r"(double|single)_blocks\.\d+\..*(_mod|modulation)\.lin",
)
