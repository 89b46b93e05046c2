"""Facts and defaults of the TinyFlux family. Torch-free."""

from collections.abc import Callable
from typing import Any

from musubi_tuner.models.spec import AdapterTargets, ModelSpec
from musubi_tuner.models.tinyflux.rules import TINYFLUX
from musubi_tuner.models.tinyflux.settings import SECTIONS

HUB_ID = "AbstractPhil/tinyflux-deep"
OTHER_HUB_ID = "AbstractPhil/tiny-flux-deep"
"""Spelling used elsewhere; suggested when the first is not found."""


def _kind_key(kind: str) -> Callable[[Any], str]:
    return lambda value: f'is written as adapter.kinds, a list that {"holds" if value else "lacks"} "{kind}"'


def _flux_shift_key(value: Any) -> str:
    equivalent = (
        f"objective.shift = {1 / value:.6g}" if isinstance(value, int | float) and value > 0 else "objective.shift"
    )
    return (
        "is FLUX's shift, which pushes towards noise; TinyFlux counts time from noise to data, where the same factor "
        f"pushes the other way. Write {equivalent} instead"
    )


KINDS = {
    "double_attn": "double_blocks.*.attn.*",
    "single_attn": "single_blocks.*.attn.*",
    "single_mlp": "single_blocks.*.mlp.*",
    "double_mlp": "double_blocks.*.[img_mlp,txt_mlp].*",
    "modulation": "**.[norm,img_norm1,txt_norm1].linear",
}
"""Layers that a LoRA may adapt; the published trainer knows the first three."""
PUBLISHED_KINDS = ["double_attn", "single_attn", "single_mlp"]


def _by_block(blocks: str, count: int, step: int, last: int) -> list[dict[str, Any]]:
    """Ranks that rise with the number of a block, from 8."""
    return [{"pattern": f"{blocks}.[{index}].**", "rank": 8 + step * index // last} for index in range(count)]


PRESETS: dict[str, dict[str, Any]] = {
    "minimal": {"kinds": ["single_attn"], "rank": 8, "alpha": 8.0},
    "standard": {"kinds": ["single_attn", "single_mlp"], "rank": 16, "alpha": 16.0},
    "character": {
        "kinds": ["single_attn", "single_mlp"],
        "alpha": 16.0,
        "targets": [
            {"pattern": "single_blocks.[0-9].**", "rank": 8, "lr_scale": 0.5},
            {"pattern": "single_blocks.[10-19].**", "rank": 16},
            {"pattern": "single_blocks.[20-24].**", "rank": 32, "lr_scale": 1.5},
        ],
    },
    "concept": {"kinds": ["double_attn"], "rank": 32, "alpha": 16.0},
    "full": {"kinds": PUBLISHED_KINDS, "rank": 16, "alpha": 16.0},
    "attn-mlp": {"kinds": ["double_attn", "single_attn", "double_mlp", "single_mlp"]},
    "attn-only": {"kinds": ["double_attn", "single_attn"]},
    "double-only": {"kinds": ["double_attn", "double_mlp"]},
    "single-only": {"kinds": ["single_attn", "single_mlp"]},
    "progressive": {
        "kinds": PUBLISHED_KINDS,
        "alpha": 16.0,
        "targets": _by_block("double_blocks", 15, 16, 14) + _by_block("single_blocks", 25, 24, 24),
    },
}
"""Published choices of layers and ranks, for the published 15 double and 25 single blocks."""


SPEC = ModelSpec(
    code="tf",
    full_name="tinyflux",
    title="TinyFlux-Deep",
    modelspec_architecture="TinyFlux",
    pixel_step=16,
    finest_step=8,
    vae_factor=8,
    latent_channels=16,
    latent_shift=False,
    sample_size=512,
    hub_id=HUB_ID,
    drops_text=True,
    t5_tokenizer="google/flan-t5-base",
    clip_tokenizer="openai/clip-vit-large-patch14",
    expert_keys=("lune_features", "sol_stats", "sol_spatial"),
    defaults={
        "adapter.alpha": 16.0,
        "optimizer.betas": [0.9, 0.95],
        "scheduler.warmup_steps": 1000,
        "log.every_steps": 100,
        "train.mask_foreground": 2.0,
        "train.mask_background": 0.5,
        "sample.every_steps": 2000,
        "save.every_epochs": 1,
    },
    dataset_defaults={
        "resolution": 512,
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
        "discrete_flow_shift": _flux_shift_key,
        "flux_shift": _flux_shift_key,
        "sigmoid_scale": "TinyFlux's times are logit-normal; objective.logit_std is their spread",
        "guidance_scale": "TinyFlux embeds no guidance; objective.text_dropout trains classifier-free guidance",
        "sample.cfg_scale": "TinyFlux's classifier-free guidance is sample.guidance",
        "sample.shift": "TinyFlux draws with objective.shift, the times that it was trained on",
        "keep_dtype": "TinyFlux is small and trains in float32",
        "adapter.extensions": "is not supported: whole blocks beside the model's, which the published model never ran",
        "adapter.layer_specs": "is written as [[adapter.targets]], with the path of the layer as pattern",
        "adapter.defaults": "is written in [adapter] itself: rank, alpha, lr_scale, depth, dropout",
        **{f"include_{kind}": _kind_key(kind) for kind in PUBLISHED_KINDS},
    },
    rules=TINYFLUX,
    geometry="musubi_tuner.models.tinyflux.geometry:TinyFluxConfig",
    package="musubi_tuner.models.tinyflux",
    has_published_trainer=True,
    block_lists=("double_blocks", "single_blocks"),
    adapters=AdapterTargets(
        layers={
            "double_blocks": (
                "attn.txt_qkv",
                "attn.img_qkv",
                "attn.txt_out",
                "attn.img_out",
                "img_mlp.fc1",
                "img_mlp.fc2",
                "txt_mlp.fc1",
                "txt_mlp.fc2",
                "img_norm1.linear",
                "txt_norm1.linear",
            ),
            "single_blocks": ("attn.qkv", "attn.out_proj", "mlp.fc1", "mlp.fc2", "norm.linear"),
        },
        blocks={"double_blocks": 15, "single_blocks": 25},
        norms={
            "double_blocks": ("img_norm1.norm", "txt_norm1.norm", "img_norm2", "txt_norm2"),
            "single_blocks": ("norm.norm", "norm2"),
        },
        outside=("img_in", "txt_in", "final_linear"),
        on_input=r".*mlp\.fc2",
        kinds=KINDS,
        usual=("single_attn", "single_mlp"),
        presets=PRESETS,
        network_module="networks.lora_tinyflux",
    ),
    quantizable=r"(double|single)_blocks\.\d+\.(?!.*norm).*",
    modulation=r"(double|single)_blocks\.\d+\..*norm1?\.linear",
)
