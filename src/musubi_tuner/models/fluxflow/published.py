"""Files of the published FluxFlow trainer: its settings and states; it has no others. Torch-free."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.models.fluxflow.trainer_settings import read_settings

if TYPE_CHECKING:
    from torch import Tensor

    from musubi_tuner.config import RunConfig
    from musubi_tuner.models.family import PublishedState, PublishedTrainer
    from musubi_tuner.models.fluxflow import published
    from musubi_tuner.models.foreign_caches import ForeignCaches

    _: PublishedTrainer = published

__all__ = ["open_caches", "read_lora", "read_settings", "read_state", "write_lora", "write_state"]


def read_state(path: Path, config: "RunConfig", *, moments: bool = True) -> "PublishedState":
    """See `trainer_state.read_state`."""
    from musubi_tuner.models.fluxflow import trainer_state

    return trainer_state.read_state(path, config, moments=moments)


def write_state(state: "PublishedState", config: "RunConfig") -> tuple[dict[str, Any], list[str]]:
    """Its states lie in its output folder, which another command writes."""
    raise ConfigError(
        f"{config.path}: FluxFlow's trainer goes on from its output folder; fluxflow-graphs --training_states writes that"
    )


def open_caches(config: "RunConfig", sources: Sequence[Path], kinds: Collection[str]) -> "ForeignCaches":
    """It has no caches."""
    raise ConfigError("the published FluxFlow trainer writes no caches")


def read_lora(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> "dict[str, Tensor]":
    """It has no adapters."""
    raise CheckpointError("the published FluxFlow trainer writes no adapters")


def write_lora(tensors: "Mapping[str, Tensor]") -> "tuple[dict[str, Tensor], dict[str, str]]":
    """It has no adapters."""
    raise CheckpointError("the published FluxFlow trainer reads no adapters")
