"""TinyFlux checkpoints: building on the meta device, loading in every accepted form.

Key names are the published ones, used unchanged. Accepted on the way in: wrapper prefixes, ``expert_gate`` of shape
[1], rotary buffers missing from very old files.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.checkpoints import WeightFile, copy_weights, find_weights, read_weights
from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig
from musubi_tuner.models.tinyflux.model import TinyFluxDeep, rotary_frequencies
from musubi_tuner.models.tinyflux.options import HUB_ID, OTHER_HUB_ID


def build(config: TinyFluxConfig) -> TinyFluxDeep:
    """The model's structure on the meta device, without storage."""
    with torch.device("meta"):
        return TinyFluxDeep(config)


def other_spelling(repo: str) -> str | None:
    """The other of the two repository names in use."""
    return {HUB_ID: OTHER_HUB_ID, OTHER_HUB_ID: HUB_ID}.get(repo)


def load_checkpoint(
    source: str | Path, *, ema: bool = False, ema_file: str | None = None, revision: str | None = None
) -> WeightFile:
    """Find and read a TinyFlux checkpoint: a file, a folder, a run folder, or a hub id.

    Raises:
        CheckpointError: if it is not there or not readable.
    """
    path = find_weights(source, ema=ema, ema_file=ema_file, revision=revision, other_spelling=other_spelling)
    return read_weights(path)


def load_model(
    source: str | Path | WeightFile,
    *,
    ema: bool = False,
    ema_file: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    rope_freqs: str = "checkpoint",
    device: torch.device | str = "cpu",
) -> TinyFluxDeep:
    """Load a model in eval mode, into storage of its own.

    Args:
        source: see `load_checkpoint`, or what it returned.
        ema: take the averaged weights; ema_file: exact name of their file.
        dtype: of parameters; rotary buffers stay float32.
        rope_freqs: ``checkpoint`` uses the stored frequencies, ``exact`` computes them again.

    Raises:
        CheckpointError: listing missing and unexpected keys, if the file holds another model.
    """
    if rope_freqs not in ("checkpoint", "exact"):
        raise ValueError(f"unknown rope_freqs '{rope_freqs}'; known: checkpoint, exact")
    file = (
        source
        if isinstance(source, WeightFile)
        else load_checkpoint(source, ema=ema, ema_file=ema_file, revision=revision)
    )
    geometry = checkpoint_geometry(file)
    model = build(geometry).to(dtype).to_empty(device=device)
    exact = {f"rope.freqs_{axis}": rotary_frequencies(width) for axis, width in enumerate(geometry.axes_dims_rope)}
    tensors = dict(file.tensors)
    for key, frequencies in exact.items():
        if rope_freqs == "exact" and key in tensors:
            tensors[key] = frequencies
    missing = [key for key in exact if key not in tensors]
    copy_weights(model, tensors, _what(file), optional=missing)
    for key in missing:
        model.rope.get_buffer(key.removeprefix("rope.")).copy_(exact[key])
    return model.eval()


def load_to_merge(file: WeightFile) -> TinyFluxDeep:
    """A model in the dtype of its file, to have adapters merged into it."""
    return load_model(file, dtype=next(iter(file.tensors.values())).dtype)


def from_pretrained(
    source: str | Path,
    *,
    ema: bool = False,
    ema_file: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> TinyFluxDeep:
    """Load a model for drawing pictures; as `load_model`, in bfloat16 unless asked otherwise."""
    return load_model(source, ema=ema, ema_file=ema_file, revision=revision, dtype=dtype, device=device)


def checkpoint_geometry(file: WeightFile) -> TinyFluxConfig:
    """Geometry of a checkpoint: from its header or a json beside it, else the published one if all shapes agree.

    Raises:
        CheckpointError: if there is no geometry and the shapes are not the published ones, or the numbers do not fit.
    """
    if file.config is not None:
        try:
            return TinyFluxConfig.from_dict(file.config)
        except (TypeError, ValueError) as error:
            what = str(file.path) if "img_in.weight" in file.tensors else _what(file)
            raise CheckpointError(f"{what}: its config does not fit together: {error}") from error
    published = TinyFluxConfig()
    shapes = {key: tensor.shape for key, tensor in build(published).state_dict().items()}
    differing = [
        key for key, shape in shapes.items() if key in file.tensors and file.tensors[key].shape.numel() != shape.numel()
    ]
    if differing or not set(shapes) & set(file.tensors):
        found = differing[0] if differing else next(iter(file.tensors))
        raise CheckpointError(
            f"{_what(file)}: it has no config in its header or beside it, and {found} {list(file.tensors[found].shape)} does "
            "not belong to the published geometry. Put the model's config.json beside the file"
        )
    return published


def _what(file: WeightFile) -> str:
    text = f"{file.path}: is not a TinyFlux-Deep v4.2 checkpoint"
    if any(key.startswith("expert_predictor.") for key in file.tensors):
        text += " but one of v3, whose upgrade is not built yet"
    elif any(key.startswith(("lora_unet_", "lora_te")) or ".lora_" in key for key in file.tensors):
        text += " but a LoRA"
    return text


def options_of(file: WeightFile) -> dict[str, Any]:
    """Training options recorded in a checkpoint.

    Raises:
        CheckpointError: for an option this version does not know; it may change what the weights mean.
    """
    known = {"expert_input", "expert_time", "sol_spatial_norm", "t5_attn_mask"}
    unknown = sorted(set(file.options) - known)
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
