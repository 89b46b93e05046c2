"""TinyFlux-Deep: a 245 M parameter flow transformer distilled from two SD1.5 experts. Names are imported on use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musubi_tuner.models.tinyflux.conditioning import encode_clip, encode_t5
    from musubi_tuner.models.tinyflux.family import (
        checkpoint_options,
        geometry_of,
        load_for_training,
        make_process,
    )
    from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig
    from musubi_tuner.models.tinyflux.model import TinyFluxDeep, initialize
    from musubi_tuner.models.tinyflux.process import TinyFluxProcess
    from musubi_tuner.models.tinyflux.state_dict import build, from_pretrained, load_checkpoint, load_model

_PLACES = {
    "TinyFluxConfig": "geometry",
    "TinyFluxDeep": "model",
    "TinyFluxProcess": "process",
    "build": "state_dict",
    "check_caches": "family",
    "checkpoint_options": "family",
    "concatenate": "conditioning",
    "from_pretrained": "state_dict",
    "geometry_of": "family",
    "initialize": "model",
    "load_checkpoint": "state_dict",
    "load_for_run": "family",
    "load_for_training": "family",
    "load_model": "state_dict",
    "load_to_merge": "state_dict",
    "make_process": "family",
    "open_base": "family",
    "open_published_caches": "published_caches",
    "options_of": "state_dict",
    "read_published_lora": "lora",
    "read_published_settings": "trainer_settings",
    "read_published_state": "trainer_state",
    "null_inputs": "conditioning",
    "plan_model": "family",
    "text_inputs": "conditioning",
    "write_published_lora": "lora",
    "encode_clip": "conditioning",
    "encode_t5": "conditioning",
    "forward_flops": "flops",
    "training_flops": "flops",
}

__all__ = [
    "TinyFluxConfig",
    "TinyFluxDeep",
    "TinyFluxProcess",
    "build",
    "checkpoint_options",
    "encode_clip",
    "encode_t5",
    "from_pretrained",
    "geometry_of",
    "initialize",
    "load_checkpoint",
    "load_for_training",
    "load_model",
    "make_process",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
