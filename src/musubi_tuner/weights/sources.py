"""Building a frozen network from a config and weights, in storage of its own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.errors import CheckpointError
from musubi_tuner.weights.checkpoints import as_object, copy_weights, read_json_object, read_weights

_FOLDER_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin")


def read_source(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, Path]:
    """Tensors, config and exact file of an encoder given as a file or as a folder in the Hugging Face layout.

    Raises:
        CheckpointError: if the folder is empty, or a file is broken.
    """
    if path.is_file():
        file = read_weights(path)
        return file.tensors, file.config, path
    config_file = path / "config.json"
    if not config_file.is_file():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise CheckpointError(f"{path}: the folder has no config.json (found {inside}); give the encoder's own folder")
    config = read_json_object(config_file)
    for name in _FOLDER_FILES:
        if (path / name).is_file():
            return read_weights(path / name).tensors, config, path / name
    for name in _FOLDER_FILES[:2]:
        index = path / f"{name}.index.json"
        if index.is_file():
            weight_map = as_object(read_json_object(index).get("weight_map"), f"{index}: weight_map")
            tensors: dict[str, Tensor] = {}
            for shard in sorted(set(weight_map.values())):
                if not (path / shard).is_file():
                    raise CheckpointError(f"{path / shard}: is named in {index.name}, but not there")
                tensors.update(read_weights(path / shard).tensors)
            return tensors, config, index
    raise CheckpointError(f"{path}: the folder has no weights; looked for {', '.join(_FOLDER_FILES)}")


def part_of(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """One network of an all-in-one file, by the first prefix that occurs, without it; the tensors of other files as they are."""
    for prefix in prefixes:
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if own:
            return own
    return tensors


def fits(module: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors have exactly the keys and shapes of a module."""
    own = {key: tensor.shape for key, tensor in module.state_dict().items()}
    return own == {key: tensor.shape for key, tensor in tensors.items() if key in own} and set(own) <= set(tensors)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A module without storage."""
    with torch.device("meta"):
        return build()


def materialize(
    module: nn.Module, tensors: dict[str, Tensor], what: str, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Give a meta module storage and its weights; frozen and in eval mode.

    Raises:
        CheckpointError: listing keys that do not belong together.
    """
    lost = {name for name, _ in module.named_buffers()} - set(module.state_dict())
    # Not module.to(): the libraries override it with warnings about casts of weights that are still to come.
    nn.Module.to(module, dtype).to_empty(device=device)
    for name in lost:
        parent, _, leaf = name.rpartition(".")
        if leaf != "position_ids":
            raise CheckpointError(f"{what}: buffer {name} cannot be rebuilt; this library version is not supported")
        owner = module.get_submodule(parent)
        count = owner.get_buffer(leaf).shape[-1]
        owner.register_buffer(leaf, torch.arange(count, device=device)[None], persistent=False)
    copy_weights(module, tensors, what)
    module.requires_grad_(False).eval()
