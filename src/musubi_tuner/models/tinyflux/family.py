"""What the trainer, the sampler and the cache jobs ask of the TinyFlux family."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from musubi_tuner.config import RunConfig
from musubi_tuner.config.paths import is_hub_id, is_published
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.flow import MaskSettings
from musubi_tuner.memory.storage import Storing, freeze_layers, merge_layers
from musubi_tuner.models.family import ModelOutline, Trainee
from musubi_tuner.models.tinyflux.conditioning import concatenate, null_inputs, text_inputs
from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig
from musubi_tuner.models.tinyflux.model import TinyFluxDeep, initialize
from musubi_tuner.models.tinyflux.process import TeacherSettings, TinyFluxProcess
from musubi_tuner.models.tinyflux.settings import (
    model_of,
    no_guidance,
    objective_of,
    resolve_experts,
    teachers_of,
    written_guidance,
    written_options,
)
from musubi_tuner.models.tinyflux.state_dict import (
    build,
    checkpoint_geometry,
    load_checkpoint,
    load_model,
    load_to_merge,
    options_of,
)
from musubi_tuner.models.tinyflux.upgrade import remap, shapes, summary
from musubi_tuner.weights.checkpoints import WeightFile, check_keys, sample_identity
from musubi_tuner.weights.hub import LOCAL_ONLY

__all__ = [
    "check_caches",
    "checkpoint_options",
    "concatenate",
    "diffusers_modules",
    "load_checkpoint",
    "load_for_run",
    "load_for_training",
    "load_to_merge",
    "make_process",
    "null_inputs",
    "open_base",
    "options_of",
    "outline_model",
    "text_inputs",
]

logger = logging.getLogger(__name__)


def open_checkpoint(config: RunConfig) -> WeightFile | None:
    """The checkpoint that a run starts from; None for a new model."""
    if config.model.init == "scratch":
        return None
    assert config.model.path is not None
    # With ema.init = "checkpoint" the file named is where the average starts, not the model.
    ema_file = model_of(config).ema_file if config.ema.init == "model" else None
    source = str(config.locate(config.model.path))
    file = load_checkpoint(
        source, ema=model_of(config).weights == "ema", ema_file=ema_file, revision=config.model.revision
    )
    _check_options(file, config)
    return file


def _check_options(file: WeightFile, config: RunConfig) -> None:
    """Refuse settings under which the weights of a checkpoint would compute something else than they were trained to.

    Raises:
        ConfigError: naming them.
    """
    own = asdict(checkpoint_geometry(file).options)
    wrong = [
        f"model.{name} is {json.dumps(value)}, and it was trained with {json.dumps(own[name])}; remove the key"
        for name, value in written_options(config).items()
        if value != own[name]
    ]
    if options_of(file).get("t5_attn_mask") and not model_of(config).t5_attn_mask:
        wrong.append("model.t5_attn_mask is false, and it was trained with padding hidden; set it to true")
    if wrong:
        raise ConfigError(f"the checkpoint {config.model.path} does not go with this run: " + "; ".join(wrong))


def _average(config: RunConfig, geometry: TinyFluxConfig, notes: list[str]) -> dict[str, Tensor]:
    """Averaged weights of the checkpoint under the model's names; keys they lack are left out."""
    assert config.model.path is not None
    file = load_checkpoint(
        str(config.locate(config.model.path)),
        ema=True,
        ema_file=model_of(config).ema_file,
        revision=config.model.revision,
        complete=False,
    )
    own = shapes(geometry)
    tensors, report = remap(file.tensors, own)
    unexpected = {key: file.tensors[key] for key in report.unexpected}
    what = f"{file.path}: is not an average of the model {config.model.path}"
    check_keys(own, {**tensors, **report.mismatched, **unexpected}, what, optional=report.missing)
    notes.append(f"average: starts from {file.origin}")
    if report.dropped:
        notes.append(f"  dropped {len(report.dropped)}: {', '.join(summary(report.dropped))}")
    return tensors


def checkpoint_options(config: RunConfig) -> dict[str, Any]:
    """Options that training records and caching obeys: how the teachers are run, and whether padding is hidden.

    Where nothing may be downloaded, a checkpoint that is not here counts as one that records nothing.
    """
    file = None
    if config.model.init == "checkpoint" and "auto" in (
        config.sd15.expert_input,
        config.sd15.expert_time,
        config.sd15.sol_spatial_norm,
    ):
        try:
            file = open_checkpoint(config)
        except CheckpointError:
            path = str(config.model.path)
            if not (LOCAL_ONLY.get() and (is_hub_id(path) or is_published(path))):
                raise
    recorded = options_of(file) if file else {}
    return {**resolve_experts(config, recorded), "t5_attn_mask": model_of(config).t5_attn_mask}


def geometry_of(config: RunConfig) -> TinyFluxConfig:
    """Shape of the model that a run trains."""
    if config.model.init == "scratch":
        return TinyFluxConfig.from_dict(model_of(config).geometry).with_options(written_options(config))
    file = open_checkpoint(config)
    assert file is not None
    return checkpoint_geometry(file)


def load_for_training(config: RunConfig, storing: Storing) -> Trainee:
    """Load or create the model of a run; see `Family`.

    Raises:
        CheckpointError: if the checkpoint holds another model.
        ConfigError: if the run uses a teacher that the model has no part for.
    """
    file = open_checkpoint(config)
    notes: list[str] = []
    average = None
    if file is None:
        geometry = geometry_of(config)
        model = build(geometry).to_empty(device="cpu")
        initialize(model, model_of(config).init_scheme, torch.Generator().manual_seed(config.run.seed))
        _store(model, storing)
    else:
        notes.append(f"weights: {file.origin}")
        model = _load(file, config, storing, notes.append)
        geometry = model.config
        if config.ema.enabled and config.ema.init == "checkpoint":
            average = _average(config, geometry, notes)
    for enabled, built, name in (
        (config.sd15.enable_lune, geometry.use_lune_expert, "lune"),
        (config.sd15.enable_sol, geometry.use_sol_prior, "sol"),
    ):
        if enabled and not built:
            raise ConfigError(
                f"experts.enable_{name} is true, but the checkpoint {config.model.path} was built without that part; "
                f"set experts.enable_{name} = false"
            )
    recorded = options_of(file) if file else {}
    options = {
        **resolve_experts(config, recorded),
        "t5_attn_mask": model_of(config).t5_attn_mask,
        **geometry.options.changed(),
    }
    notes += [
        f"note: {config.model.path} was trained with {key} = {before}, and this run uses {options[key]}"
        for key, before in recorded.items()
        if options.get(key) != before
    ]
    idle = [] if geometry.guidance_embeds or file is None else written_guidance(config)
    notes += [f"warning: {no_guidance(key, f'{config.model.path} embeds no guidance')}" for key in idle]
    base = sample_identity(file) if file is not None and config.adapter.type != "none" else None
    return Trainee(model, geometry, options, notes + storing.notes(), base, average)


def _load(
    file: WeightFile, config: RunConfig, storing: Storing, report: Callable[[str], None] = logger.warning
) -> TinyFluxDeep:
    settings = model_of(config)
    return load_model(
        file, rope_freqs=settings.rope_freqs, neutral=settings.upgrade_neutral, seed=config.run.seed, report=report,
        freeze=storing.freeze, merge=storing.merges,
    )  # fmt: skip


def open_base(config: RunConfig) -> WeightFile:
    """The checkpoint below the adapters of a run.

    Raises:
        ConfigError: if the run starts from random weights.
    """
    file = open_checkpoint(config)
    if file is None:
        raise ConfigError('model.init = "scratch": an adapter needs a trained model below it; give model.path')
    return file


def load_for_run(file: WeightFile, config: RunConfig, storing: Storing) -> TinyFluxDeep:
    """A checkpoint as a run computes with it, what it merges included."""
    return _load(file, config, storing)


def _store(model: TinyFluxDeep, storing: Storing) -> None:
    """Merge and store the weights of a model that comes from no file."""
    if storing.merges is not None:
        merge_layers(model, storing.merges)
    if storing.freeze is not None:
        freeze_layers(model, storing.freeze)


def outline_model(config: RunConfig) -> ModelOutline:
    """The model of a run without storage."""
    geometry, experts = geometry_of(config), config.sd15
    times = max(teachers_of(config, dataset).time_buckets for dataset in config.datasets)
    length, side = config.clip_and_t5.t5_max_tokens, geometry.sol_spatial_size
    shapes: dict[str, tuple[int, ...]] = {
        "t5_vec": (length, geometry.joint_attention_dim),
        "t5_mask": (length,),
        "clip_l_pooler": (geometry.pooled_projection_dim,),
    }
    if experts.enable_lune or experts.enable_sol:
        shapes["t_buckets"] = (times,)
    if experts.enable_lune:
        shapes["lune_features"] = (times, geometry.lune_expert_dim)
    if experts.enable_sol:
        shapes |= {"sol_stats": (times, 3), "sol_spatial": (times, side, side)}
    options = {"sol_spatial_norm": "max", "t5_attn_mask": model_of(config).t5_attn_mask}
    return ModelOutline(build(geometry), torch.float32, shapes, options)


def check_caches(config: RunConfig, geometry: TinyFluxConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the widths of cached tensors with those that the model takes.

    Raises:
        ConfigError: naming the geometry's field and the encoder's key, for all that differ; or if the mask of the text is
            wanted and not cached.
    """
    if model_of(config).t5_attn_mask and "t5_mask" not in shapes:
        raise ConfigError(
            "model.t5_attn_mask is true, but text caches hold no t5_mask (those of the published trainer have none); set it to "
            f"false, or make them again: python -m musubi_tuner.caching text {config.words}"
        )
    expected = {
        "t5_vec": ("joint_attention_dim", "model.t5_path"),
        "clip_l_pooler": ("pooled_projection_dim", "model.clip_path"),
        "lune_features": ("lune_expert_dim", "experts.unet"),
        "sol_spatial": ("sol_spatial_size", "experts.unet"),
        "latents": ("in_channels", "model.vae_path"),
    }
    problems = []
    for name, (field, key) in expected.items():
        if name in shapes:
            found, wanted = shapes[name][0 if name == "latents" else -1], getattr(geometry, field)
            if found != wanted:
                problems.append(f"the model's {field} is {wanted}, but {key} gave {name} of {found}")
    if problems:
        source = "[model.geometry]" if config.model.init == "scratch" else f"checkpoint {config.model.path}"
        raise ConfigError(f"{source} and encoders do not belong together: " + "; ".join(problems))


def make_process(config: RunConfig, options: dict[str, Any]) -> TinyFluxProcess:
    """The process of a run."""
    teachers = TeacherSettings(
        config.sd15.enable_lune,
        config.sd15.enable_sol,
        options["sol_spatial_norm"],
        distil=config.adapter.type == "none",
    )
    train = config.train
    masks = MaskSettings(train.mask_foreground, train.mask_background, train.mask_normalize)
    return TinyFluxProcess(
        objective_of(config),
        teachers,
        text_mask=options["t5_attn_mask"],
        masks=masks if train.masked_loss else None,
    )


def diffusers_modules(depth: int, depth_single: int) -> dict[str, tuple[str, ...]]:
    """None: diffusers has no TinyFlux."""
    return {}


if TYPE_CHECKING:
    from musubi_tuner.models.family import Family
    from musubi_tuner.models.tinyflux import family

    _: Family = family
