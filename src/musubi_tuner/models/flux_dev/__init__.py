"""FLUX.1-dev: a 12 B parameter flow transformer, trained through LoRA. Names are imported on use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musubi_tuner.models.flux_dev.family import load_for_training, make_process
    from musubi_tuner.models.flux_dev.geometry import FluxConfig
    from musubi_tuner.models.flux_dev.model import Flux
    from musubi_tuner.models.flux_dev.process import FluxProcess
    from musubi_tuner.models.flux_dev.state_dict import build, load_checkpoint, load_model

_PLACES = {
    "Flux": "model",
    "FluxConfig": "geometry",
    "FluxProcess": "process",
    "build": "state_dict",
    "check_caches": "family",
    "checkpoint_options": "family",
    "concatenate": "conditioning",
    "diffusers_modules": "state_dict",
    "load_checkpoint": "state_dict",
    "load_for_run": "family",
    "load_for_training": "family",
    "load_model": "state_dict",
    "load_to_merge": "state_dict",
    "make_process": "family",
    "null_inputs": "conditioning",
    "open_base": "family",
    "options_of": "family",
    "plan_model": "family",
    "text_inputs": "conditioning",
}

__all__ = [
    "Flux",
    "FluxConfig",
    "FluxProcess",
    "build",
    "load_checkpoint",
    "load_for_training",
    "load_model",
    "make_process",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
