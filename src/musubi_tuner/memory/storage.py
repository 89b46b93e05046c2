"""Placing the weights of a frozen model: each is read, has adapters merged into it, is stored in its final form, and freed.

Neither host nor device ever holds the model in its compute dtype beside the stored form.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from musubi_tuner.memory.frozen_linear import FrozenLinear, Scale, Storage
from musubi_tuner.units import format_bytes
from musubi_tuner.weights.checkpoints import check_keys
from musubi_tuner.weights.stored import StoredWeight

Merge = Callable[[str, Tensor], Tensor]
"""Layer path and its weight in float32 -> the weight with adapters merged into it."""


@dataclass(frozen=True)
class Freeze:
    """How the Linear layers of a frozen model are stored.

    Attributes:
        storage: of the layers that ``quantized`` matches. scale: what shares one, for fp8_scaled.
        quantized: regular expression of module paths. plain: of those that are frozen as they are, so that they can leave the
            device; None = none. All others stay ordinary layers.
        quantize_on: device that quantises; absent = where the weight lies.
    """

    storage: Storage
    quantized: str
    plain: str | None = None
    scale: Scale = "block"
    quantize_on: torch.device | None = None

    def storage_of(self, path: str) -> Storage | None:
        """Form of a layer; None = an ordinary one."""
        if self.storage != "plain" and re.fullmatch(self.quantized, path):
            return self.storage
        return "plain" if self.plain is not None and re.fullmatch(self.plain, path) else None


class Merges(Protocol):
    """Adapters that are merged into weights while these are loaded."""

    changed: set[str]
    """Paths of the layers that it has changed."""

    def __call__(self, path: str, weight: Tensor) -> Tensor:
        """The weight of a layer in float32 with all changes; the very same tensor if it has none."""

    def notes(self) -> list[str]:
        """What was merged, for the person."""


@dataclass(frozen=True)
class Storing:
    """What happens to the weights of a frozen model while they are loaded.

    Attributes:
        freeze: form of its Linear layers; None = they stay ordinary ones. merges: None = nothing is merged.
    """

    freeze: Freeze | None = None
    merges: Merges | None = None

    def notes(self) -> list[str]:
        """What was merged, for the person."""
        return self.merges.notes() if self.merges else []


def place_weights(
    model: nn.Module,
    weights: Mapping[str, StoredWeight],
    what: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
    freeze: Freeze | None = None,
    merge: Merge | None = None,
) -> None:
    """Give a meta model its weights, one by one.

    Args:
        weights: must hold exactly the keys of the model's state dict.
        what: begins the error: the file and the model.
        dtype: of ordinary weights, and that frozen layers compute in; None = that of the file.

    Raises:
        CheckpointError: listing missing, unexpected and mis-shaped keys.
    """
    own = model.state_dict(keep_vars=True)
    check_keys(own, weights, what)
    linears = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    storages = {path: storage for path in linears if freeze and (storage := freeze.storage_of(path))}
    for path, storage in storages.items():
        assert freeze is not None
        weight, bias = _merged(weights, path, merge, dtype), weights.get(f"{path}.bias")
        compute = dtype or (torch.bfloat16 if weight.is_fp8 else weight.dtype)
        layer = FrozenLinear.of_weight(
            weight, None if bias is None else bias.dense(compute), storage, compute, scale=freeze.scale, device=device,
            quantize_on=freeze.quantize_on,
        )  # fmt: skip
        model.set_submodule(path, layer)
    for key in own:
        parent, _, leaf = key.rpartition(".")
        if parent in storages:
            continue
        weight = _merged(weights, parent, merge, dtype) if leaf == "weight" and parent in linears else weights[key]
        # A copy of its own: a view of the mapped file would keep the file open, and its pages cannot be pinned.
        tensor = weight.dense(dtype).to(device, copy=True).view(own[key].shape)
        owner = model.get_submodule(parent)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor


def storage_notes(
    weights: Mapping[str, StoredWeight], freeze: Freeze | None, modulation: str, dtype: torch.dtype
) -> list[str]:
    """What becomes of weights that the file stores in 8 bits already, for the person.

    Args:
        modulation: regular expression of the layers that only memory.fp8_modulation keeps so. dtype: computed in.
    """
    stored = {key.removesuffix(".weight"): weight for key, weight in weights.items()
              if key.endswith(".weight") and weight.is_fp8}  # fmt: skip
    form = {path: freeze.storage_of(path) if freeze else None for path in stored}
    kept = [path for path, storage in form.items() if storage in ("fp8", "fp8_scaled")]
    again = [path for path, storage in form.items() if storage in ("int8", "nf4")]
    dense = [path for path, storage in form.items() if storage in (None, "plain")]
    lines = []
    if kept:
        scales = any(scale is not None for path in kept for scale in stored[path].scales)
        lines.append(
            f"storage: {len(kept)} layers stay as the float8 numbers of the file, {'with its' if scales else 'without'} scales, whatever "
            "memory.base_storage and memory.fp8_scale say"
        )
    if again and freeze is not None:
        lines.append(
            f"warning: {len(again)} layers are rounded twice, to float8 in the file and to {freeze.storage} here; use the bf16 file, or "
            'memory.base_storage = "fp8_scaled"'
        )
    if dense:
        more = sum(stored[path].numel() for path in dense) * (dtype.itemsize - 1)
        key = 'memory.base_storage = "fp8_scaled"' if not kept and not again else "memory.fp8_modulation = true"
        possible = any(re.fullmatch(modulation, path) for path in dense) or not (kept or again)
        lines.append(
            f"storage: {len(dense)} layers are float8 numbers in the file and are brought to {str(dtype).removeprefix('torch.')}, "
            f"{format_bytes(more)} more" + (f"; {key} keeps 8 bits" if possible else "")
        )
    return lines


def _merged(
    weights: Mapping[str, StoredWeight], path: str, merge: Merge | None, dtype: torch.dtype | None
) -> StoredWeight:
    """A layer's weight after merging; layers without a change keep their stored form."""
    stored = weights[f"{path}.weight"]
    if merge is None:
        return stored
    before = stored.dense(torch.float32)
    after = merge(path, before)
    return stored if after is before else StoredWeight.of(after.to(dtype or stored.dense().dtype))


def freeze_layers(model: nn.Module, freeze: Freeze) -> None:
    """Bring the Linear layers of a model that has its weights already into their form, one by one."""
    for path, layer in list(model.named_modules()):
        storage = freeze.storage_of(path) if isinstance(layer, nn.Linear) else None
        if storage is None or not isinstance(layer, nn.Linear):
            continue
        bias = None if layer.bias is None else layer.bias.detach()
        stored = FrozenLinear.of_weight(
            StoredWeight.of(layer.weight.detach()), bias, storage, layer.weight.dtype, scale=freeze.scale,
            device=layer.weight.device, quantize_on=freeze.quantize_on,
        )  # fmt: skip
        model.set_submodule(path, stored)


@torch.no_grad()
def merge_layers(model: nn.Module, merge: Merge) -> None:
    """Merge adapters into a model that has its weights already."""
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            before = layer.weight.float()
            after = merge(path, before)
            if after is not before:
                layer.weight.copy_(after.to(layer.weight.dtype))
