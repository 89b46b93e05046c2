"""Placing the weights of a frozen model: each is read, has adapters merged into it, is stored in its final form, and freed.

Neither host nor device ever holds the model in its compute dtype beside the stored form.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from musubi_tuner.memory.frozen_linear import FrozenLinear, Scale, Storage
from musubi_tuner.models.checkpoints import check_keys
from musubi_tuner.models.stored import StoredWeight


@dataclass(frozen=True)
class Freeze:
    """How the Linear layers of a frozen model are stored.

    Attributes:
        storage: of the chosen layers. scale: what shares one, for fp8_scaled.
        layers: regular expression of module paths that are frozen in this way; all others stay ordinary.
        quantize_on: device that quantises; absent = where the weight lies.
        deltas: module path -> weight change, merged before storing.
    """

    storage: Storage = "plain"
    scale: Scale = "block"
    layers: str = r".*"
    quantize_on: torch.device | None = None
    deltas: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    def takes(self, path: str) -> bool:
        """Whether a layer is stored in this way."""
        return re.fullmatch(self.layers, path) is not None


def place_weights(
    model: nn.Module,
    weights: Mapping[str, StoredWeight],
    what: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
    freeze: Freeze | None = None,
) -> None:
    """Give a meta model its weights.

    Args:
        weights: must hold exactly the keys of the model's state dict.
        what: begins the error: the file and the model.
        dtype: of ordinary weights, and that frozen layers compute in; None = that of the file.

    Raises:
        CheckpointError: listing missing, unexpected and mis-shaped keys.
    """
    own = model.state_dict(keep_vars=True)
    check_keys(own, weights, what)
    frozen = {
        path for path, layer in model.named_modules() if freeze and isinstance(layer, nn.Linear) and freeze.takes(path)
    }
    for path in sorted(frozen):
        assert freeze is not None
        _freeze(model, path, weights, dtype, device, freeze)
    for key in own:
        parent, _, leaf = key.rpartition(".")
        if parent in frozen:
            continue
        tensor = weights[key].dense(dtype)
        # A copy of its own: a view of the mapped file would keep the file open, and its pages cannot be pinned.
        tensor = tensor.to(device, copy=True).view(own[key].shape)
        owner = model.get_submodule(parent)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor


def _freeze(
    model: nn.Module,
    path: str,
    weights: Mapping[str, StoredWeight],
    dtype: torch.dtype | None,
    device: torch.device | str,
    freeze: Freeze,
) -> None:
    weight, bias = weights[f"{path}.weight"], weights.get(f"{path}.bias")
    compute = dtype or (torch.bfloat16 if weight.is_fp8 else weight.dtype)
    if path in freeze.deltas:
        weight = StoredWeight.of((weight.dense(torch.float32) + freeze.deltas[path]()).to(compute))
    layer = FrozenLinear.of_weight(
        weight,
        None if bias is None else bias.dense(compute),
        freeze.storage,
        compute,
        scale=freeze.scale,
        device=device,
        quantize_on=freeze.quantize_on,
    )
    model.set_submodule(path, layer)


def freeze_layers(model: nn.Module, freeze: Freeze) -> None:
    """Store the Linear layers of a model that has its weights already, one by one."""
    layers = {
        path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and freeze.takes(path)
    }
    for path, layer in layers.items():
        bias = None if layer.bias is None else layer.bias.detach()
        stored = FrozenLinear.of_weight(
            StoredWeight.of(layer.weight.detach()), bias, freeze.storage, layer.weight.dtype, scale=freeze.scale,
            device=layer.weight.device, quantize_on=freeze.quantize_on,
        )  # fmt: skip
        model.set_submodule(path, stored)
