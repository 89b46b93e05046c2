"""A TinyFlux checkpoint written for another version of the model."""

import json
from functools import partial
from pathlib import Path

from torch import Tensor

from musubi_tuner.errors import CheckpointError
from musubi_tuner.files import replace_file
from musubi_tuner.models.tinyflux.options import SPEC
from musubi_tuner.models.tinyflux.state_dict import checkpoint_geometry, load_checkpoint, options_of
from musubi_tuner.models.tinyflux.upgrade import upgrade_weights, v3_geometry
from musubi_tuner.tensors import save_tensors
from musubi_tuner.weights.checkpoints import WeightFile


def upgrade_file(
    source: str,
    output: Path,
    *,
    to: str = "v4",
    ema: bool = False,
    ema_file: str | None = None,
    revision: str | None = None,
    neutral: bool = True,
    seed: int = 42,
    strict: bool = True,
) -> list[str]:
    """Read a checkpoint and write it, and with ``ema`` its averaged weights as ``<output>_ema``, for another version.

    Args:
        source: see `load_checkpoint`. The other arguments: see `upgrade_weights`.

    Returns:
        Lines for a person: what became of every tensor, and what was written.

    Raises:
        CheckpointError: if the source is not there, or, with ``strict``, does not hold the model.
    """
    if not output.parent.is_dir():
        raise CheckpointError(f"{output.parent}: no such folder")
    model = load_checkpoint(source, revision=revision)
    average = None
    if ema:
        average = load_checkpoint(source, ema=True, ema_file=ema_file, revision=revision, complete=False)
    geometry = checkpoint_geometry(model)
    if to == "v3" and geometry.options.changed():
        names = ", ".join(geometry.options.changed())
        raise CheckpointError(f"{model.path}: was trained with {names}, which v3 does not know; it has no v3 form")
    written = v3_geometry(geometry) if to == "v3" else geometry
    tensors: dict[str, Tensor] | None = None
    lines = []
    for file, path, kind in (
        (model, output, "model"),
        (average, output.with_name(f"{output.stem}_ema{output.suffix}"), "ema"),
    ):
        if file is None:
            continue
        what = f"{file.path}: cannot be written for {to}"
        tensors, report = upgrade_weights(
            file.tensors, geometry, to=to, model=tensors, neutral=neutral, seed=seed, strict=strict, what=what
        )
        lines += report.lines(file.origin)
        metadata = _metadata(file, kind, json.dumps(written.to_dict()), json.dumps(options_of(model)))
        owned = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        replace_file(path, partial(save_tensors, owned, metadata=metadata))
        lines.append(f"{path}: {len(tensors)} tensors for {to}")
    return lines


def _metadata(file: WeightFile, kind: str, config: str, options: str) -> dict[str, str]:
    """Header of the file written: what the source said of itself, with the geometry of the new version."""
    return {
        **file.metadata,
        "format": "pt",
        "architecture": SPEC.full_name,
        "modelspec.architecture": SPEC.modelspec_architecture,
        "config_json": config,
        "options_json": options,
        "weights": kind,
    }
