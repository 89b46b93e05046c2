"""TinyFlux-Deep: a 245 M parameter flow transformer distilled from two SD1.5 experts. Names are imported on use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musubi_tuner.models.tinyflux.conditioning import encode_clip, encode_t5
    from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig
    from musubi_tuner.models.tinyflux.model import TinyFluxDeep, initialize
    from musubi_tuner.models.tinyflux.process import TinyFluxProcess
    from musubi_tuner.models.tinyflux.state_dict import build, from_pretrained, load_checkpoint, load_model

_PLACES = {
    "TinyFluxConfig": "geometry",
    "TinyFluxDeep": "model",
    "TinyFluxProcess": "process",
    "build": "state_dict",
    "encode_clip": "conditioning",
    "encode_t5": "conditioning",
    "from_pretrained": "state_dict",
    "initialize": "model",
    "load_checkpoint": "state_dict",
    "load_model": "state_dict",
}

__all__ = [
    "TinyFluxConfig",
    "TinyFluxDeep",
    "TinyFluxProcess",
    "build",
    "encode_clip",
    "encode_t5",
    "from_pretrained",
    "initialize",
    "load_checkpoint",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
