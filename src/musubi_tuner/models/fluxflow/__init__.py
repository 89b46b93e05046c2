"""FluxFlow: an autoencoder trained against a discriminator, and a v-diffusion transformer on its latents. Names are imported on use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musubi_tuner.models.fluxflow.autoencoder import Compressor, Expander
    from musubi_tuner.models.fluxflow.bezier import BezierActivation, TrainableBezier
    from musubi_tuner.models.fluxflow.discriminator import PatchDiscriminator
    from musubi_tuner.models.fluxflow.geometry import FluxFlowConfig
    from musubi_tuner.models.fluxflow.model import FlowProcessor
    from musubi_tuner.models.fluxflow.text_encoder import TextEncoder

_PLACES = {
    "BezierActivation": "bezier",
    "Compressor": "autoencoder",
    "Expander": "autoencoder",
    "FlowProcessor": "model",
    "FluxFlowConfig": "geometry",
    "PatchDiscriminator": "discriminator",
    "TextEncoder": "text_encoder",
    "TrainableBezier": "bezier",
}

__all__ = [
    "BezierActivation",
    "Compressor",
    "Expander",
    "FlowProcessor",
    "FluxFlowConfig",
    "PatchDiscriminator",
    "TextEncoder",
    "TrainableBezier",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
