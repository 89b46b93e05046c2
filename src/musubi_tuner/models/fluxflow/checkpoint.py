"""The checkpoint of a run: where it is, what it holds, and the parts that a run makes for itself."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from musubi_tuner.config import RunConfig
from musubi_tuner.encoders.locate import source
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.models.fluxflow.calibration import initialize
from musubi_tuner.models.fluxflow.geometry import LAYOUTS, FluxFlowConfig
from musubi_tuner.models.fluxflow.settings import model_of
from musubi_tuner.models.fluxflow.state_dict import PUBLISHED_FILES, System, build_part, read_system
from musubi_tuner.randomness import keyed_seed
from musubi_tuner.weights.checkpoints import FoundWeights, WeightFile, copy_weights, locate_weights, read_weights
from musubi_tuner.weights.sources import read_source


def load_checkpoint(
    source: str | Path, *, ema: bool = False, ema_file: str | None = None, revision: str | None = None
) -> WeightFile:
    """A checkpoint: a run folder, a release, a file, a hub id, or a folder of the published program."""
    found = _locate(source, ema, ema_file, revision)
    return read_weights(found.path, found.config, found.origin)


def _locate(source: str | Path, ema: bool, ema_file: str | None, revision: str | None) -> FoundWeights:
    first = () if ema or ema_file else tuple(PUBLISHED_FILES)[:1]
    return locate_weights(source, ema=ema, ema_file=ema_file, revision=revision, first=first)


def find_file(config: RunConfig, key: str) -> Path:
    """The file that model.path or model.vae_path leads to."""
    text, model = config.get(key), model_of(config)
    if key != "model.path":
        return _locate(str(config.locate(text)), False, None, None).path
    return _locate(str(config.locate(text)), model.weights == "ema", model.ema_file, model.revision).path


def open_system(config: RunConfig) -> tuple[System, WeightFile | None]:
    """The parts of the run's checkpoint, with the autoencoder of model.vae_path; empty for a new model."""
    system, file, model = System(), None, model_of(config)
    if model.init == "checkpoint" and model.path is not None:
        ema = model.weights == "ema"
        file = load_checkpoint(
            str(config.locate(model.path)), ema=ema, ema_file=model.ema_file, revision=model.revision
        )
        system = read_system(file)
    if config.model.vae_path is not None:
        vae = read_system(load_checkpoint(str(config.locate(config.model.vae_path))))
        own = {part: tensors for part, tensors in vae.parts.items() if part in ("compressor", "expander")}
        if not own:
            raise CheckpointError(f"model.vae_path: {config.model.vae_path}: holds no autoencoder of FluxFlow")
        system.parts |= own
        system.geometry = system.geometry or vae.geometry
        system.options |= {"spade": vae.options["spade"]} if "spade" in vae.options else {}
    return system, file


@lru_cache(maxsize=8)
def _geometry(path: Path, stamp: int) -> FluxFlowConfig | None:
    return read_system(read_weights(path)).geometry


def geometry_of(config: RunConfig) -> FluxFlowConfig:
    """Geometry of a run: of its checkpoint, or of a new model, whose layout [model.geometry] lays over.

    Raises:
        ConfigError: if the numbers do not fit together. CheckpointError: if the checkpoint cannot be read.
    """
    key = "model.path" if config.model.init == "checkpoint" else "model.vae_path"
    if config.get(key) is not None:
        path = find_file(config, key)
        found = _geometry(path, path.stat().st_mtime_ns)
        assert found is not None
        return found
    try:
        return FluxFlowConfig(**{**LAYOUTS[model_of(config).layout], **model_of(config).geometry})
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"model.geometry: {problem}") from problem


def weights_of_part(config: RunConfig, part: str) -> Mapping[str, Tensor]:
    """Weights of a part as the run computes with it: of its checkpoint, or those that it would make.

    Raises:
        CheckpointError: if there is no such checkpoint.
    """
    system, _ = open_system(config)
    if part in system.parts:
        return system.parts[part]
    return make_part(part, system, config, geometry_of(config)).state_dict()


def make_part(part: str, system: System, config: RunConfig, geometry: FluxFlowConfig) -> nn.Module:
    """A part with the weights of the checkpoint, or new, the same for every process of the run.

    Raises:
        CheckpointError: if weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(config.run.seed, "part", part))
        module = build_part(part, geometry)
        initialize(module)
    if part in system.parts:
        copy_weights(module, system.parts[part], f"{config.model.path}: {part}")
    if part == "text_encoder" and model_of(config).bert_path is not None:
        _load_language_model(module, config)
    return module


def _load_language_model(module: nn.Module, config: RunConfig) -> None:
    """Put pretrained weights into the language model, and nothing over them."""
    text = model_of(config).bert_path
    assert text is not None
    place = source("model.bert_path", text, config.locate(text)).resolve()
    assert place is not None
    tensors, _, file = read_source(place)
    own = {
        key.removeprefix("distilbert."): t
        for key, t in tensors.items()
        if not key.startswith(("vocab_", "classifier", "pre_"))
    }
    model: nn.Module = module.language_model  # type: ignore[assignment]
    copy_weights(model, own, f"model.bert_path: {file}: is no DistilBERT of [model.geometry]")
