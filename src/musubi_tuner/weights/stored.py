"""Weights as a file stores them, brought to a compute dtype one at a time.

A file's tensors are views of the mapped file, so listing them costs nothing. What a model calls one weight may be several in
the file (diffusers splits fused layers), may carry fp8 scales, and may stand in another order of rows: `StoredWeight`
remembers that and does it when the weight is asked for.

8-bit files of ComfyUI come in two spellings:

    older   marker `scaled_fp8`, and per layer `X.weight` (fp8) with `X.scale_weight`, perhaps `X.scale_input`
    newer   `X.weight` with `X.weight_scale`, perhaps `X.input_scale`; the format in `X.comfy_quant` (UINT8 JSON) or in the
            header's `_quantization_metadata`

The true weight is ``weight * scale``; the shape of the scale decides whether it counts for the tensor, a row, or 64
columns of a row. Plain fp8 files have no scales and are taken as they are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.errors import CheckpointError

FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
SCALE_NAMES = (".scale_weight", ".weight_scale")
CHUNK, DEVICE_CHUNK = 1 << 21, 1 << 23
"""Values that are brought to float32 together in main memory, and on a device, where few large steps are faster than many."""
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
    factor, rows = scale.float(), weight.shape[0] if weight.ndim else 1
    if factor.numel() > 1 and (factor.shape[0] != rows or (factor.ndim > 2 and weight[0].numel() % factor.shape[1])):
        raise ValueError(f"a scale of {list(scale.shape)} does not fit a weight of {list(weight.shape)}")
    chunk = CHUNK if weight.device.type == "cpu" else DEVICE_CHUNK
    if weight.ndim < 2 or weight.numel() <= chunk or torch.compiler.is_compiling():
        return _multiplied(weight, factor).to(dtype)  # in one pass, where a compiler fuses it
    # A few rows at a time: float32 copies of the whole would be several times the result.
    step = max(1, chunk // weight[0].numel())
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        result[part] = _multiplied(weight[part], factor if factor.numel() == 1 else factor[part]).to(dtype)
    return result


def _multiplied(weight: Tensor, factor: Tensor) -> Tensor:
    """``weight * factor`` in float32."""
    values = weight.float()
    if factor.numel() == 1:
        return values * factor.reshape(())
    if factor.ndim <= 2:
        return (values.flatten(1) * factor.reshape(len(values), -1)).view_as(values)
    return (values.view(len(values), factor.shape[1], -1) * factor).view_as(values)


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a model.

    Attributes:
        parts: tensors of the file, stacked on rows. scales: of each part, None where it has none.
        swapped: the halves of the rows stand in the other order.
    """

    parts: tuple[Tensor, ...]
    scales: tuple[Tensor | None, ...]
    swapped: bool = False

    @classmethod
    def of(cls, tensor: Tensor, scale: Tensor | None = None) -> "StoredWeight":
        """A weight that is one tensor of the file."""
        return cls((tensor,), (scale,))

    @property
    def shape(self) -> torch.Size:
        """Of the whole weight."""
        first = self.parts[0].shape
        return first if len(self.parts) == 1 else torch.Size((sum(len(part) for part in self.parts), *first[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """That of the file."""
        return self.parts[0].dtype

    def numel(self) -> int:
        """Number of values."""
        return self.shape.numel()

    @property
    def is_fp8(self) -> bool:
        """Whether the file stores it in an 8-bit float."""
        return all(is_fp8(part) for part in self.parts)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in a floating dtype; None = that of the file, bfloat16 where it is scaled.

        Raises:
            ValueError: if a scale does not fit.
        """
        rows = [
            part if scale is None else dequantize(part, scale, dtype or torch.bfloat16)
            for part, scale in zip(self.parts, self.scales)
        ]
        whole = rows[0] if len(rows) == 1 else torch.cat([row.to(rows[0].dtype) for row in rows])
        if self.swapped:
            whole = torch.cat(tuple(reversed(whole.chunk(2))))
        return whole.to(dtype) if dtype is not None and whole.is_floating_point() else whole

    def codes(self) -> tuple[Tensor, Tensor | None]:
        """fp8 values and scale as they are; scales of parts that differ become scales of rows."""
        codes = torch.cat([part.view(torch.uint8) for part in self.parts]).view(self.dtype)
        if all(scale is None for scale in self.scales):
            return codes, None
        if len(self.parts) == 1:
            assert self.scales[0] is not None
            return codes, self.scales[0].float()
        columns = []
        for part, scale in zip(self.parts, self.scales):
            factor = torch.ones(()) if scale is None else scale.float()
            if factor.ndim > 2:
                return codes, torch.cat([s.float() for s in self.scales if s is not None])
            columns.append(factor.reshape(-1, 1).expand(len(part), 1) if factor.numel() == 1 else factor.view(-1, 1))
        return codes, torch.cat(columns)


def read_stored(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], what: str) -> dict[str, StoredWeight]:
    """The weights of a file with their scales; markers, tags and scales are no entries of their own.

    Raises:
        CheckpointError: for another format, or a scale without its weight.
    """
    for layer, format_name in _formats(tensors, metadata, what).items():
        if format_name not in FP8:
            raise CheckpointError(
                f"{what}: {layer} is stored as {format_name}, which cannot be read; known: {', '.join(FP8)}. Use the bf16 or "
                "fp8 file"
            )
    found: dict[str, StoredWeight] = {}
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
            layer = key.removesuffix(".weight")
            scale = next((tensors[layer + s] for s in SCALE_NAMES if layer + s in tensors), None)
        if scale is not None and scale.numel() != 1 and len(scale) != len(tensor):
            raise CheckpointError(
                f"{what}: {key}: a scale of {list(scale.shape)} does not fit a weight of {list(tensor.shape)}; the file is damaged"
            )
        found[key] = StoredWeight.of(tensor, scale)
    return found


def _formats(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], what: str) -> dict[str, str]:
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
