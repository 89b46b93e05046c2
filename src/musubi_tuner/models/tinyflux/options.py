"""Facts, defaults and rules of the TinyFlux family. Torch-free."""

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean
from musubi_tuner.config.swap import check_swap
from musubi_tuner.models.spec import AdapterTargets, ModelSpec
from musubi_tuner.models.tinyflux.geometry import ModelOptions, TinyFluxConfig

if TYPE_CHECKING:
    from musubi_tuner.config import RunConfig

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
        value = getattr(config.experts, key)
        resolved[key] = value if value != "auto" else (checkpoint or {}).get(key, base[key])
    return resolved


def written_options(config: "RunConfig") -> dict[str, Any]:
    """The model options that a run file sets; see `geometry.ModelOptions`."""
    found = {field.name: getattr(config.model, field.name) for field in fields(ModelOptions)}
    return {name: value for name, value in found.items() if value is not None}


def written_guidance(config: "RunConfig") -> list[str]:
    """Keys of embedded guidance that a person wrote."""
    return [
        key for key in config.set_keys() if key.startswith("objective.guidance_") and key != "objective.guidance_scale"
    ]


def no_guidance(key: str, reason: str) -> Diagnostic:
    """A warning that a key of embedded guidance does nothing."""
    return Diagnostic("warning", key, f"has no effect because {reason}")


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
    "progressive": {
        "kinds": PUBLISHED_KINDS,
        "alpha": 16.0,
        "targets": _by_block("double_blocks", 15, 16, 14) + _by_block("single_blocks", 25, 24, 24),
    },
}
"""Published choices of layers and ranks, for the published 15 double and 25 single blocks."""


DISTILLING = ("lune_weight", "lune_warmup_steps", "lune_mode", "sol_weight", "sol_stats_weight", "sol_spatial_weight",
              "sol_warmup_steps")  # fmt: skip
"""Settings of [objective] that concern nothing but what the predictors learn from teachers."""


def check(config: "RunConfig") -> list[Diagnostic]:
    """Static rules of this family."""
    found: list[Diagnostic] = []
    experts, model = config.experts, config.model
    if config.objective.timestep_stratified and config.objective.timestep_sampling != "uniform":
        found.append(Diagnostic("error", "objective.timestep_stratified", 'needs timestep_sampling = "uniform"'))
    objective = config.objective
    if objective.guidance_min > objective.guidance_max:
        found.append(
            Diagnostic(
                "error",
                "objective.guidance_min",
                f"is {objective.guidance_min}, above guidance_max = {objective.guidance_max}",
            )
        )
    if config.sample.guidance < 1:
        found.append(
            Diagnostic("error", "sample.guidance", f"is {config.sample.guidance}, expected at least 1 (= off)")
        )
    every = [config.experts_of(dataset) for dataset in config.datasets] or [experts]
    used = [own for own in every if own.extracted]
    if any(own.unet is None for own in used) and config.cache.run != "never":
        found.append(
            Diagnostic(
                "error",
                "experts.unet",
                "is needed to cache teacher features; give the SD1.5 U-Net, or set enable_lune = false and "
                "enable_sol = false to train without teachers",
            )
        )
    if resolve_experts(config)["expert_input"] == "noised_image" and any(own.vae is None for own in used):
        found.append(
            Diagnostic(
                "error",
                "experts.vae",
                'is needed by expert_input = "noised_image" (the default for a new model); give the SD1.5 autoencoder, '
                'or set expert_input = "random"',
            )
        )
    if model.init == "scratch" and config.adapter.type != "none":
        found.append(
            Diagnostic(
                "error",
                "model.init",
                f'is "scratch", but adapter.type = "{config.adapter.type}" trains beside a frozen model, which would stay random; '
                "give model.path",
            )
        )
    if model.init == "scratch":
        known = TinyFluxConfig.shape_fields()
        for key in model.geometry:
            if key not in known:
                found.append(Diagnostic("error", f"model.geometry.{key}", f"unknown key.{did_you_mean(key, known)}"))
        if not any(key not in known for key in model.geometry):
            try:
                geometry = TinyFluxConfig.from_dict(model.geometry)
            except (TypeError, ValueError) as error:
                found.append(Diagnostic("error", "model.geometry", str(error)))
            else:
                found += check_swap(
                    config.memory,
                    {"double_blocks": geometry.num_double_layers, "single_blocks": geometry.num_single_layers},
                )
                if not geometry.guidance_embeds:
                    found += [
                        no_guidance(key, "model.geometry.guidance_embeds is false") for key in written_guidance(config)
                    ]
                if model.temperature_per_head is not None and not geometry.use_sol_prior:
                    reason = "has no effect because model.geometry.use_sol_prior is false"
                    found.append(Diagnostic("warning", "model.temperature_per_head", reason))
                for enabled, built, name in (
                    (experts.enable_lune, geometry.use_lune_expert, "lune"),
                    (experts.enable_sol, geometry.use_sol_prior, "sol"),
                ):
                    if enabled and not built:
                        switch = {"lune": "use_lune_expert", "sol": "use_sol_prior"}[name]
                        found.append(
                            Diagnostic(
                                "error",
                                f"experts.enable_{name}",
                                f"is true, but model.geometry.{switch} is false; the model could not use the features",
                            )
                        )
    if config.objective.spatial_weighting and not experts.enable_sol:
        found.append(
            Diagnostic("error", "objective.spatial_weighting", "needs Sol's map, but experts.enable_sol is false")
        )
    for name, enabled in (("lune", experts.enable_lune), ("sol", experts.enable_sol)):
        if not enabled:
            found += [
                Diagnostic("warning", key, f"has no effect because experts.enable_{name} is false")
                for key in config.set_keys()
                if key.startswith(f"objective.{name}_") or key in (f"experts.{name}", f"experts.{name}_source")
            ]
    if config.adapter.type != "none":
        idle = {f"objective.{name}" for name in DISTILLING}
        if not config.objective.spatial_weighting:  # which counts for the samples that are distilled
            idle.add("objective.distill_on_dropped")
        reason = "has no effect because the predictors below an adapter are frozen: teachers are fed, not distilled"
        found += [Diagnostic("warning", key, reason) for key in config.set_keys() if key in idle]
    if config.objective.missing_teacher == "zeros" and len({own.teachers for own in every}) < 2:
        reason = "has no effect because all data sets have the same teachers"
        found.append(Diagnostic("warning", "objective.missing_teacher", reason))
    return found + _geometric_sol(config)


def _geometric_sol(config: "RunConfig") -> list[Diagnostic]:
    """What `experts.sol_source` = "geometric" means, and what it leaves without effect."""
    experts = config.experts
    if not experts.enable_sol or experts.sol_source == "extracted":
        return []
    found = [
        Diagnostic(
            "warning",
            "experts.sol_source",
            'is "geometric": Sol is then a formula of the time alone, the same for every picture, which its author calls '
            'wrong; write "extracted" for the teacher\'s attention',
        )
    ]
    idle = ["sol"]
    if not experts.extracted:
        idle += ["unet", "vae", "expert_input", "expert_time", "resolution", "seed", "dtype", "times_per_forward"]
    return found + [
        Diagnostic("warning", key, 'has no effect because experts.sol_source is "geometric"')
        for key in (f"experts.{name}" for name in idle)
        if key in config.set_keys()
    ]


SPEC = ModelSpec(
    code="tf",
    full_name="tinyflux",
    title="TinyFlux-Deep",
    modelspec_architecture="TinyFlux",
    pixel_step=16,
    vae_factor=8,
    latent_channels=16,
    latent_shift=False,
    sample_size=512,
    hub_id=HUB_ID,
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
    choices={"objective.timestep_sampling": ("logit_normal", "uniform")},
    not_applicable={
        "objective.discrete_flow_shift": _flux_shift_key,
        "objective.sigmoid_scale": "its times are logit-normal: objective.logit_std is their spread",
        "objective.weighting_scheme": "its losses are weighed by objective.min_snr_gamma",
        "objective.mode_scale": "its times are logit-normal or uniform",
        "objective.m*_timestep": "its times cover [0, 1]",
        "objective.preserve_distribution_shape": "its times cover [0, 1]",
        "objective.sigma_compat": "its times are logit-normal or uniform",
        "objective.timestep_offset": "it takes the exact time",
        "objective.guidance_scale": "it embeds no guidance; objective.text_dropout trains classifier-free guidance",
        "sample.cfg_scale": "its classifier-free guidance is sample.guidance",
        "sample.shift": "it samples with objective.shift, the times it was trained on",
        "model.allow_schnell": "schnell is a FLUX.1 model",
        "model.keep_dtype": "it is small and trains in float32",
    },
    foreign_keys={
        "discrete_flow_shift": _flux_shift_key,
        "flux_shift": _flux_shift_key,
        "extensions": lambda _: "is not built: whole blocks beside the model's, which the published model never ran",
        "layer_specs": lambda _: "is written as [[adapter.targets]], with the path of the layer as pattern",
        "defaults": lambda _: "is written in [adapter] itself: rank, alpha, lr_scale, depth, dropout",
        **{f"include_{kind}": _kind_key(kind) for kind in PUBLISHED_KINDS},
    },
    check=check,
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
        kinds=KINDS,
        usual=("single_attn", "single_mlp"),
        presets=PRESETS,
        network_module="networks.lora_tinyflux",
    ),
    quantizable=r"(double|single)_blocks\.\d+\.(?!.*norm).*",
    modulation=r"(double|single)_blocks\.\d+\..*norm1?\.linear",
)
