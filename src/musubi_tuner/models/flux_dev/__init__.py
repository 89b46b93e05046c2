"""FLUX.1-dev: a 12 B parameter flow transformer, trained through LoRA. Names are imported on use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musubi_tuner.models.flux_dev.geometry import FluxConfig
    from musubi_tuner.models.flux_dev.model import Flux
    from musubi_tuner.models.flux_dev.process import FluxProcess
    from musubi_tuner.models.flux_dev.state_dict import build, load_checkpoint, load_model

_PLACES = {
    "Flux": "model",
    "FluxConfig": "geometry",
    "FluxProcess": "process",
    "build": "state_dict",
    "load_checkpoint": "state_dict",
    "load_model": "state_dict",
}

__all__ = ["Flux", "FluxConfig", "FluxProcess", "build", "load_checkpoint", "load_model"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
