"""Weights stored in 8-bit floating point with scales, as ComfyUI writes them, in both spellings.

    older   marker `scaled_fp8`, and per layer `X.weight` (fp8) with `X.scale_weight`, perhaps `X.scale_input`
    newer   `X.weight` with `X.weight_scale`, perhaps `X.input_scale`; the format in `X.comfy_quant` (UINT8 JSON) or in the
            header's `_quantization_metadata`

The true weight is ``weight * scale``; the shape of the scale decides whether it counts for the tensor, a row, or 64
columns of a row. Plain fp8 files have no scales and are cast up as they are.
"""

import json
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.errors import CheckpointError

FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
SCALE_NAMES = (".scale_weight", ".weight_scale")
DROPPED = (".scale_input", ".input_scale", ".comfy_quant")
"""Scales of activations, which training does not use, and format tags."""


def is_fp8(tensor: Tensor) -> bool:
    """Whether a tensor is stored in an 8-bit float."""
    return tensor.dtype in FP8.values()


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``weight * scale`` for a scale of shape [], [1], [out, 1] or [out, groups, 1], computed in float32.

    Raises:
        ValueError: if the scale fits neither tensor, rows nor groups of columns.
    """
    values, factor = weight.float(), scale.float()
    if factor.numel() == 1:
        return (values * factor.reshape(())).to(dtype)
    rows = values.shape[0]
    if factor.shape[0] != rows or (factor.ndim > 2 and values[0].numel() % factor.shape[1]):
        raise ValueError(f"a scale of {list(scale.shape)} does not fit a weight of {list(weight.shape)}")
    if factor.ndim <= 2:
        return (values.flatten(1) * factor.reshape(rows, -1)).view_as(values).to(dtype)
    return (values.view(rows, factor.shape[1], -1) * factor).view_as(values).to(dtype)


def dequantize_file(
    tensors: dict[str, Tensor], metadata: dict[str, str], what: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """All scaled weights of a file multiplied out; scales, markers and tags are gone from the result.

    Raises:
        CheckpointError: for another format, or a scale without its weight.
    """
    for layer, format_name in _formats(tensors, metadata, what).items():
        if format_name not in FP8:
            raise CheckpointError(
                f"{what}: {layer} is stored as {format_name}, which cannot be read; known: {', '.join(FP8)}. Use the bf16 or fp8 file"
            )
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith(DROPPED) or key.rpartition(".")[2] == "scaled_fp8":
            continue
        suffix = next((s for s in SCALE_NAMES if key.endswith(s)), None)
        if suffix is not None:
            if f"{key.removesuffix(suffix)}.weight" not in tensors:
                raise CheckpointError(f"{what}: {key} scales a weight that is not there; the file is damaged")
            continue
        scale = None
        if key.endswith(".weight"):
            scale = next(
                (tensors[name] for s in SCALE_NAMES if (name := key.removesuffix(".weight") + s) in tensors), None
            )
        if scale is None:
            found[key] = tensor
            continue
        try:
            found[key] = dequantize(tensor, scale, dtype)
        except ValueError as error:
            raise CheckpointError(f"{what}: {key}: {error}; the file is damaged") from error
    return found


def _formats(tensors: dict[str, Tensor], metadata: dict[str, str], what: str) -> dict[str, str]:
    """Layer -> format, where a file of the newer spelling names it."""
    formats: dict[str, str] = {}
    try:
        if "_quantization_metadata" in metadata:
            layers: dict[str, Any] = json.loads(metadata["_quantization_metadata"])["layers"]
            formats.update({layer: str(entry["format"]) for layer, entry in layers.items()})
        for key, tensor in tensors.items():
            if key.endswith(".comfy_quant"):
                formats[key.removesuffix(".comfy_quant")] = str(json.loads(bytes(tensor.tolist()))["format"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{what}: the description of its quantised layers cannot be read ({error})") from error
    return formats
