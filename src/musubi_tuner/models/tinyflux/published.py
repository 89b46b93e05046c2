"""Files of the published TinyFlux trainer: settings, checkpoints, caches, LoRAs. Torch-free until one is read."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musubi_tuner.models.tinyflux.trainer_settings import read_settings

if TYPE_CHECKING:
    from torch import Tensor

    from musubi_tuner.config import RunConfig
    from musubi_tuner.models.family import PublishedState, PublishedTrainer
    from musubi_tuner.models.foreign_caches import ForeignCaches
    from musubi_tuner.models.tinyflux import published

    _: PublishedTrainer = published

__all__ = ["open_caches", "read_lora", "read_settings", "read_state", "write_lora", "write_state"]


def read_state(path: Path, config: "RunConfig", *, moments: bool = True) -> "PublishedState":
    """See `trainer_state.read_state`."""
    from musubi_tuner.models.tinyflux import trainer_state

    return trainer_state.read_state(path, config, moments=moments)


def write_state(state: "PublishedState", config: "RunConfig") -> tuple[dict[str, Any], list[str]]:
    """See `trainer_state.write_state`."""
    from musubi_tuner.models.tinyflux import trainer_state

    return trainer_state.write_state(state, config)


def open_caches(config: "RunConfig", sources: Sequence[Path], kinds: Collection[str]) -> "ForeignCaches":
    """See `published_caches.open_caches`."""
    from musubi_tuner.models.tinyflux import published_caches

    return published_caches.open_caches(config, sources, kinds)


def read_lora(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> "dict[str, Tensor]":
    """See `lora.read_lora`."""
    from musubi_tuner.models.tinyflux import lora

    return lora.read_lora(tensors, metadata)


def write_lora(tensors: "Mapping[str, Tensor]") -> "tuple[dict[str, Tensor], dict[str, str]]":
    """See `lora.write_lora`."""
    from musubi_tuner.models.tinyflux import lora

    return lora.write_lora(tensors)
