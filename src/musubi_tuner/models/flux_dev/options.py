"""Facts and defaults of the FLUX.1-dev family. Torch-free."""

from typing import Any

from musubi_tuner.models.flux_dev.rules import FLUX_DEV
from musubi_tuner.models.flux_dev.settings import SECTIONS
from musubi_tuner.models.spec import AdapterTargets, ModelSpec

PUBLISHED_AXES = (16, 56, 56)
"""Rotary widths of the published models, whose heads are 128 wide."""
DOUBLE_LAYERS = tuple(f"{stream}_{layer}" for stream in ("img", "txt")
                      for layer in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2"))  # fmt: skip
SINGLE_LAYERS = ("linear1", "linear2", "modulation.lin")


def _shift(value: Any) -> str:
    return (
        f'is TinyFlux\'s. For FLUX.1 write objective.discrete_flow_shift = {value} with timestep_sampling = "shift", or take '
        'timestep_sampling = "flux_shift"'
    )


_NO_TEACHERS = "FLUX.1 has no teachers"
_EMBEDDED = "the embedded guidance of FLUX.1 while training is objective.guidance_scale"

PRESETS: dict[str, dict[str, Any]] = {
    "attn-mlp": {},
    "attn-only": {"only": [r"double_blocks\.\d+\.(img|txt)_attn\..*"]},
    "double-only": {"only": [r"double_blocks\..*"]},
    "single-only": {"only": [r"single_blocks\..*"]},
    "full": {"exclude": []},
}
"""Choices of layers. Those of attn-mlp are adapted anyway; a single block has attention and MLP in the same layers."""

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
    other_names=("flux", "flux1", "flux.1", "flux-dev", "flux1-dev", "flux.1-dev"),
    scripts={
        "flux_train": "",
        "flux_kontext": "FLUX.1 Kontext, an editing model; here FLUX.1-dev is trained, without control images",
    },
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
    rules=FLUX_DEV,
    geometry="musubi_tuner.models.flux_dev.geometry:FluxConfig",
    package="musubi_tuner.models.flux_dev",
    block_lists=("double_blocks", "single_blocks"),
    adapters=AdapterTargets(
        layers={"double_blocks": DOUBLE_LAYERS, "single_blocks": SINGLE_LAYERS},
        blocks={"double_blocks": 19, "single_blocks": 38},
        norms={
            "double_blocks": tuple(f"{s}_attn.norm.{n}_norm" for s in ("img", "txt") for n in ("query", "key")),
            "single_blocks": ("norm.query_norm", "norm.key_norm"),
        },
        outside=(
            "img_in",
            "txt_in",
            "time_in.in_layer",
            "time_in.out_layer",
            "vector_in.in_layer",
            "vector_in.out_layer",
            "guidance_in.in_layer",
            "guidance_in.out_layer",
            "final_layer.linear",
            "final_layer.adaLN_modulation.1",
        ),
        exclude=(r".*(img_mod\.lin|txt_mod\.lin|modulation\.lin).*",),
        on_input=r"double_blocks\.\d+\.(img|txt)_mlp\.2",
        presets=PRESETS,
        network_module="networks.lora_flux",
    ),
    quantizable=r"(double|single)_blocks\.\d+\.(?!.*(norm|mod)).*",
    modulation=r"(double|single)_blocks\.\d+\..*(_mod|modulation)\.lin",
)
