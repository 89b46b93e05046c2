"""What the trainer, the sampler and the cache jobs ask of the FLUX.1 family."""

from typing import TYPE_CHECKING, Any

import torch

from musubi_tuner.config import RunConfig
from musubi_tuner.errors import ConfigError
from musubi_tuner.flow import MaskSettings
from musubi_tuner.memory.storage import Storing, storage_notes
from musubi_tuner.models.family import ModelOutline, Trainee
from musubi_tuner.models.flux_dev.conditioning import concatenate, null_inputs, text_inputs
from musubi_tuner.models.flux_dev.geometry import PATCH, FluxConfig
from musubi_tuner.models.flux_dev.model import Flux
from musubi_tuner.models.flux_dev.process import FluxProcess
from musubi_tuner.models.flux_dev.settings import model_of, objective_of
from musubi_tuner.models.flux_dev.state_dict import (
    build,
    diffusers_modules,
    load_checkpoint,
    load_model,
    load_to_merge,
    to_bfl,
)
from musubi_tuner.precision import COMPUTE_DTYPES
from musubi_tuner.weights.checkpoints import WeightFile, sample_identity

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


def compute_dtype(config: RunConfig) -> torch.dtype | None:
    """Dtype of the frozen weights: that of the computation, or None to keep them as stored."""
    if model_of(config).keep_dtype:
        return None
    return COMPUTE_DTYPES[config.train.mixed_precision] or torch.float32


def load_for_training(config: RunConfig, storing: Storing) -> Trainee:
    """Load the frozen base of a run; see `Family`."""
    return _load(open_base(config), config, storing)


def _load(file: WeightFile, config: RunConfig, storing: Storing) -> Trainee:
    _, weights = to_bfl(file, allow_schnell=model_of(config).allow_schnell)
    base, dtype = sample_identity(file), compute_dtype(config)
    model = load_model(
        file, dtype=dtype, allow_schnell=model_of(config).allow_schnell, freeze=storing.freeze, merge=storing.merges
    )
    notes = storing.notes()
    if not model.config.guidance_embed and "objective.guidance_scale" in config.set_keys():
        notes.append(f"warning: objective.guidance_scale: has no effect because {config.model.path} embeds no guidance")
    if dtype is not None:
        changed = {f"{path}.weight" for path in storing.merges.changed} if storing.merges else set()
        untouched = {key: weight for key, weight in weights.items() if key not in changed}
        notes += storage_notes(untouched, storing.freeze, config.spec.modulation, dtype)
    return Trainee(model, model.config, {}, notes, base)


def open_base(config: RunConfig) -> WeightFile:
    """The checkpoint below the adapters of a run."""
    assert config.model.path is not None
    return load_checkpoint(str(config.locate(config.model.path)), revision=config.model.revision)


def load_for_run(file: WeightFile, config: RunConfig, storing: Storing) -> Flux:
    """A checkpoint as a run computes with it, what it merges included."""
    model: Flux = _load(file, config, storing).model  # type: ignore[assignment]
    return model


def outline_model(config: RunConfig) -> ModelOutline:
    """The model of a run without storage, from the header of its checkpoint."""
    geometry, weights = to_bfl(open_base(config), allow_schnell=model_of(config).allow_schnell)
    largest = max(weights.values(), key=lambda weight: weight.numel())
    shapes = {
        "t5_vec": (config.clip_and_t5.t5_max_tokens, geometry.context_in_dim),
        "clip_l_pooler": (geometry.vec_in_dim,),
    }
    # A float8 file with model.keep_dtype is refused when it is loaded.
    kept = torch.bfloat16 if largest.is_fp8 else largest.dtype
    return ModelOutline(build(geometry), compute_dtype(config) or kept, shapes, {})


def check_caches(config: RunConfig, geometry: FluxConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the widths of cached tensors with those that the model takes.

    Raises:
        ConfigError: naming the encoder's key, for all that differ.
    """
    expected = {
        "t5_vec": (geometry.context_in_dim, "model.t5_path"),
        "clip_l_pooler": (geometry.vec_in_dim, "model.clip_path"),
        "latents": (geometry.in_channels // PATCH**2, "model.vae_path"),
    }
    problems = []
    for name, (wanted, key) in expected.items():
        if name in shapes:
            found = shapes[name][0 if name == "latents" else -1]
            if found != wanted:
                problems.append(f"the model takes {name} of {wanted}, but {key} gave {found}")
    if problems:
        raise ConfigError(f"checkpoint {config.model.path} and encoders do not belong together: " + "; ".join(problems))


def checkpoint_options(config: RunConfig) -> dict[str, Any]:
    """Options that training records and caching obeys: none."""
    return {}


def options_of(file: WeightFile) -> dict[str, Any]:
    """Training options recorded in a checkpoint: none."""
    return {}


def make_process(config: RunConfig, options: dict[str, Any]) -> FluxProcess:
    """The process of a run."""
    train = config.train
    masks = MaskSettings(train.mask_foreground, train.mask_background, train.mask_normalize)
    return FluxProcess(objective_of(config), masks if train.masked_loss else None)


if TYPE_CHECKING:
    from musubi_tuner.models.family import Family
    from musubi_tuner.models.flux_dev import family

    _: Family = family
