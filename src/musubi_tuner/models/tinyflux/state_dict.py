"""TinyFlux checkpoints: building on the meta device, loading in every accepted form.

Key names are the published ones, used unchanged. Accepted on the way in: wrapper prefixes, ``expert_gate`` of shape
[1], rotary buffers missing from very old files, and files of v3 and v4.1, which `upgrade` brings to v4.2.
"""

import logging
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.errors import CheckpointError
from musubi_tuner.memory.storage import Freeze, Merge, place_weights
from musubi_tuner.models.tinyflux.geometry import ModelOptions, TinyFluxConfig
from musubi_tuner.models.tinyflux.model import TinyFluxDeep, rotary_frequencies
from musubi_tuner.models.tinyflux.options import HUB_ID, OTHER_HUB_ID
from musubi_tuner.models.tinyflux.upgrade import is_older, remap, shapes, summary, upgrade_weights
from musubi_tuner.weights.checkpoints import WeightFile, copy_weights, locate_weights, read_weights
from musubi_tuner.weights.stored import StoredWeight

logger = logging.getLogger(__name__)


def build(config: TinyFluxConfig) -> TinyFluxDeep:
    """The model's structure on the meta device, without storage."""
    with torch.device("meta"):
        return TinyFluxDeep(config)


class Checkpoint(WeightFile):
    """A TinyFlux checkpoint, whose model is loaded when it is asked for. ``file["model"]`` and ``file["step"]`` work too."""

    @cached_property
    def model(self) -> TinyFluxDeep:
        """The model, float32 in eval mode."""
        return load_model(self)

    @property
    def step(self) -> int | None:
        """Updates after which it was saved; None if it does not say."""
        text = self.metadata.get("step", "")
        return int(text) if text.isdecimal() else None

    def __getitem__(self, name: str) -> Any:
        if name not in ("model", "step", "config", "options"):
            raise KeyError(name)
        return getattr(self, name)


def load_checkpoint(
    source: str | Path,
    *,
    ema: bool = False,
    ema_file: str | None = None,
    revision: str | None = None,
    complete: bool = True,
) -> Checkpoint:
    """Find and read a TinyFlux checkpoint: a file, a folder, a run folder, or a hub id; ``hub`` is the published one.

    Args:
        complete: take what averaged weights lack from the model weights of the same source.

    Raises:
        CheckpointError: if it is not there or not readable.
    """

    def read(ema: bool, ema_file: str | None) -> Checkpoint:
        found = locate_weights(source, ema=ema, ema_file=ema_file, revision=revision, published=(HUB_ID, OTHER_HUB_ID))
        return Checkpoint(**vars(read_weights(found.path, found.config, found.origin, ema=ema or ema_file is not None)))

    file = read(ema, ema_file)
    if complete and (ema or ema_file is not None):
        _complete(file, lambda: read(False, None))
    return file


def _complete(file: WeightFile, read_model: Callable[[], WeightFile]) -> None:
    """Copy the keys that averaged weights lack from the model weights, if those have them."""
    try:
        own = shapes(checkpoint_geometry(file))
        lacking = [key for key in remap(file.tensors, own)[1].missing if not key.startswith("rope.")]
        model = read_model() if lacking else None
    except CheckpointError:
        return  # reported where the file is loaded
    if model is not None and model.path != file.path:
        given = remap(model.tensors, own)[0]
        copied = {key: given[key] for key in lacking if key in given}
        file.tensors.update(copied)
        if copied:
            parts = ", ".join(summary(copied))
            logger.warning(
                "%s: lacks %d keys (%s); they are taken from %s", file.origin, len(copied), parts, model.origin
            )


def load_model(
    source: str | Path | WeightFile,
    *,
    ema: bool = False,
    ema_file: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    rope_freqs: str = "checkpoint",
    device: torch.device | str = "cpu",
    neutral: bool = True,
    seed: int = 0,
    report: Callable[[str], None] = logger.warning,
    freeze: Freeze | None = None,
    merge: Merge | None = None,
    load_ema: bool = False,
    ema_path: str | None = None,
) -> TinyFluxDeep:
    """Load a model in eval mode, into storage of its own. Files of v3 and v4.1 are upgraded.

    With ``freeze`` or ``merge`` the model is frozen, and its weights are read, brought to their form and placed one by one.

    Args:
        source: see `load_checkpoint`, or what it returned.
        ema: take the averaged weights; ema_file: exact name of their file.
        dtype: of parameters; rotary buffers stay float32.
        rope_freqs: ``checkpoint`` uses the stored frequencies, ``exact`` computes them again.
        neutral, seed: of an upgrade; see `upgrade_weights`. report: receives its lines.
        load_ema, ema_path: what ``ema`` and ``ema_file`` are called in the published package.
        freeze: how Linear layers of the blocks are stored; absent = as ordinary layers. merge: changes weights before that.

    Raises:
        CheckpointError: listing missing and unexpected keys, if the file holds another model.
    """
    if rope_freqs not in ("checkpoint", "exact"):
        raise ValueError(f"unknown rope_freqs '{rope_freqs}'; known: checkpoint, exact")
    file = (
        source
        if isinstance(source, WeightFile)
        else load_checkpoint(source, ema=ema or load_ema, ema_file=ema_file or ema_path, revision=revision)
    )
    geometry = checkpoint_geometry(file)
    tensors = upgraded(file, geometry, neutral=neutral, seed=seed, report=report)
    if rope_freqs == "exact":
        for axis, width in enumerate(geometry.axes_dims_rope):
            tensors[f"rope.freqs_{axis}"] = rotary_frequencies(width)
    if freeze is not None or merge is not None:
        return _place(build(geometry), tensors, _what(file), dtype, device, freeze, merge).eval()
    model = build(geometry).to(dtype).to_empty(device=device)
    copy_weights(model, tensors, _what(file))
    return model.eval()


def _place(
    model: TinyFluxDeep, tensors: dict[str, Tensor], what: str, dtype: torch.dtype, device: torch.device | str,
    freeze: Freeze | None, merge: Merge | None,
) -> TinyFluxDeep:  # fmt: skip
    weights = {key: StoredWeight.of(tensor) for key, tensor in tensors.items()}
    place_weights(model, weights, what, dtype, device, freeze, merge)
    for name in list(model.rope._buffers):
        model.rope._buffers[name] = tensors[f"rope.{name}"].to(device, torch.float32, copy=True)
    return model.requires_grad_(False)


def upgraded(
    file: WeightFile, geometry: TinyFluxConfig, *, neutral: bool, seed: int, report: Callable[[str], None]
) -> dict[str, Tensor]:
    """All tensors of the v4.2 model that a file is loaded into.

    Raises:
        CheckpointError: listing missing, unexpected and mis-shaped keys. Whole parts may be missing from older files only.
    """
    older = is_older(file)
    what = f"{file.path}: is an older TinyFlux checkpoint that cannot be upgraded" if older else _what(file)
    tensors, done = upgrade_weights(
        file.tensors, geometry, neutral=neutral, seed=seed, strict=True, whole_parts=older, what=what
    )
    if not done.is_plain:
        for line in done.lines(file.origin or str(file.path)):
            report(line)
    return tensors


def load_to_merge(file: WeightFile) -> TinyFluxDeep:
    """A model in the dtype of its file, to have adapters merged into it."""
    return load_model(file, dtype=next(iter(file.tensors.values())).dtype)


def from_pretrained(
    source: str | Path = "hub",
    *,
    ema: bool = False,
    use_ema: bool = False,
    ema_file: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> TinyFluxDeep:
    """Load a model for drawing pictures; as `load_model`, in bfloat16 unless asked otherwise.

    Args:
        source: absent = the published model. use_ema: what ``ema`` is called in the published package, where it is on unless
            it is turned off.
    """
    return load_model(source, ema=ema or use_ema, ema_file=ema_file, revision=revision, dtype=dtype, device=device)


def checkpoint_geometry(file: WeightFile) -> TinyFluxConfig:
    """Geometry of a checkpoint: from its header or a json beside it, else the published one if all shapes agree.

    The options of the model that the checkpoint records are part of it.

    Raises:
        CheckpointError: if there is no geometry and the shapes are not the published ones, the numbers do not fit, or the
            checkpoint records an option that this version does not know.
    """
    try:
        stated = TinyFluxConfig.from_dict(file.config or {}).with_options(options_of(file))
    except (TypeError, ValueError) as error:
        what = str(file.path) if "img_in.weight" in file.tensors else _what(file)
        raise CheckpointError(f"{what}: its config does not fit together: {error}") from error
    if file.config is not None:
        return stated
    published = TinyFluxConfig()
    fitting, report = remap(file.tensors, shapes(published))
    if report.mismatched or not fitting:
        key, tensor = next(iter((report.mismatched or file.tensors).items()))
        raise CheckpointError(
            f"{_what(file)}: it has no config in its header or beside it, and {key} {list(tensor.shape)} does not "
            "belong to the published geometry. Put the model's config.json beside the file"
        )
    return stated


def _what(file: WeightFile) -> str:
    text = f"{file.path}: is not a TinyFlux-Deep v4.2 checkpoint"
    if any(key.startswith(("lora_unet_", "lora_te")) or ".lora_" in key for key in file.tensors):
        text += " but a LoRA"
    return text


def options_of(file: WeightFile) -> dict[str, Any]:
    """Options of the training and of the model recorded in a checkpoint.

    Raises:
        CheckpointError: for an option this version does not know; it may change what the weights mean.
    """
    known = {"expert_input", "expert_time", "sol_spatial_norm", "t5_attn_mask"}
    unknown = sorted(set(file.options) - known - {field.name for field in fields(ModelOptions)})
    if unknown:
        raise CheckpointError(
            f"{file.path}: was trained with unknown options {', '.join(unknown)}; update musubi-tinyflux"
        )
    return file.options


def example_inputs(config: TinyFluxConfig, batch: int, height: int, width: int, text: int) -> dict[str, Tensor]:
    """Random inputs of the right shapes, for benchmarks and tests."""
    return {
        "hidden_states": torch.randn(batch, height * width, config.in_channels),
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
        "timestep": torch.rand(batch),
        **({"guidance": torch.rand(batch)} if config.guidance_embeds else {}),
    }
