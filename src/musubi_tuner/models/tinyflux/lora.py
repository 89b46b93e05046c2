"""LoRA files of the published TinyFlux trainer: both revisions are read, the last is written.

    v4.2      single_blocks_3_attn_qkv.lora_A / .lora_B; parallel pairs .lora_A.0, .lora_B.0, .lora_A.1, ...
              header: config_json, the whole config, which alone holds alpha
    before    block_3_img_qkv.lora_A / .lora_B, also behind double. or single.; header: rank and alpha as texts

Parallel pairs become one pair: A stacked by rows, B by columns, alpha so many times as large; the change is the same, and
everything else keeps its very bits both ways. Extension blocks, whole blocks beside the model's, are refused.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.adapters.convert import MUSUBI_PREFIX, layer_path, layer_paths
from musubi_tuner.config.patterns import LayerSettings, matches, matches_published, resolve
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.models.tinyflux.options import KINDS, PUBLISHED_KINDS, SPEC

OLD_LAYERS = {
    "txt_qkv": "double_blocks_{}_attn_txt_qkv", "img_qkv": "double_blocks_{}_attn_img_qkv",
    "txt_out": "double_blocks_{}_attn_txt_out", "img_out": "double_blocks_{}_attn_img_out",
    "qkv": "single_blocks_{}_attn_qkv", "out": "single_blocks_{}_attn_out_proj",
    "mlp_fc1": "single_blocks_{}_mlp_fc1", "mlp_fc2": "single_blocks_{}_mlp_fc2",
}  # fmt: skip
"""Names before v4.2, without the block's number; they tell the streams apart by themselves."""
FIELDS = ("rank", "alpha", "lr_scale", "depth", "dropout", "enabled")


def read_lora(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """A file of the published trainer under musubi names. Names of no layer are passed on, for the caller to report.

    Raises:
        CheckpointError: for extension blocks, an incomplete layer, or where alpha is not told.
    """
    config = _config(metadata)
    _refuse_extensions(tensors, config)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.rpartition(".alpha") if key.endswith(".alpha") else key.partition(".lora_")
        layers.setdefault(name, {})[leaf or "alpha"] = tensor
    found: dict[str, Tensor] = {}
    for name, parts in layers.items():
        old = re.fullmatch(r"(?:double\.|single\.)?block_(\d+)_(\w+)", name)
        module = OLD_LAYERS[old[2]].format(old[1]) if old and old[2] in OLD_LAYERS else name
        pairs = sorted((leaf.removeprefix("A") for leaf in parts if leaf.startswith("A")), key=lambda k: (len(k), k))
        if not pairs or {f"{letter}{k}" for letter in "AB" for k in pairs} | {"alpha"} != set(parts) | {"alpha"}:
            raise CheckpointError(f"{name} has only {', '.join(f'lora_{leaf}' for leaf in parts)}; the file is damaged")
        downs, ups = [parts[f"A{k}"] for k in pairs], [parts[f"B{k}"] for k in pairs]
        found[f"{MUSUBI_PREFIX}{module}.lora_down.weight"] = torch.cat(downs) if len(pairs) > 1 else downs[0]
        found[f"{MUSUBI_PREFIX}{module}.lora_up.weight"] = torch.cat(ups, dim=1) if len(pairs) > 1 else ups[0]
        path = layer_path(module, SPEC)
        if path is not None:
            alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(path, len(downs[0]), config, metadata)
            found[f"{MUSUBI_PREFIX}{module}.alpha"] = torch.tensor(alpha * len(pairs))
    return found


def _config(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    if "config_json" not in metadata:
        return None
    try:
        config = json.loads(metadata["config_json"])
    except ValueError as error:
        raise CheckpointError(f"config_json in its header is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"config_json in its header is {config!r}, expected an object")
    return config


def _refuse_extensions(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> None:
    keys = [key for key in tensors if re.match(r"ext_(double|single)_\d+\.", key)]
    stated, counts = (config or {}).get("extensions") or {}, dict[str, int]()
    try:
        for kind in ("double", "single"):
            held = len({key.partition(".")[0] for key in keys if key.startswith(f"ext_{kind}_")})
            counts[kind] = max(held, int(stated.get(f"{kind}_blocks", 0) or 0))
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"what its header says about extension blocks cannot be read ({error})") from error
    if any(counts.values()):
        named = f": {keys[0]}, ..." if keys else ", of which its header tells"
        raise CheckpointError(
            f"holds {counts['double']} double and {counts['single']} single extension blocks ({len(keys)} keys{named}); whole "
            "blocks beside the model's are not supported, the published model never ran them either"
        )


def _alpha(path: str, rank: int, config: Mapping[str, Any] | None, metadata: Mapping[str, str]) -> float:
    """Alpha of a layer as the header tells it."""
    try:
        if config is not None:
            own = _settings(path, config)
            if own.rank != rank:
                raise CheckpointError(f"{path} has rank {rank}, config_json in the header says {own.rank}")
            return own.alpha
        return float(metadata["alpha"])
    except KeyError:
        raise CheckpointError(
            "its header has neither config_json nor alpha, and only there do such files keep alpha; add a tensor NAME.alpha to "
            "every layer NAME, or take the original file"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"what its header says about alpha cannot be read ({error})") from error


def _settings(path: str, config: Mapping[str, Any]) -> LayerSettings:
    """Settings of a layer in a stored config."""

    def known(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {key: fields[key] for key in FIELDS if fields.get(key) is not None}

    specs = config.get("layer_specs") or {}
    if path in specs:
        return LayerSettings(**known(specs[path]))
    targets = [(target["pattern"], known(target)) for target in config.get("targets") or []]
    try:
        return resolve(path, LayerSettings(**known(config.get("defaults") or {})), targets, matches_published)[0]
    except ConfigError as error:
        raise CheckpointError(f"config_json in its header: {error}") from error


def write_lora(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA under musubi names as the published trainer stores it, v4.2: tensors and header.

    Raises:
        CheckpointError: naming layers that it cannot adapt.
    """
    paths = layer_paths(tensors, SPEC)
    foreign = [path for path in paths.values() if not any(matches(KINDS[kind], path) for kind in PUBLISHED_KINDS)]
    if foreign:
        raise CheckpointError(
            f"{len(foreign)} layers cannot be adapted by the published trainer ({', '.join(foreign[:4])})"
        )
    found: dict[str, Tensor] = {}
    specs: dict[str, dict[str, Any]] = {}
    for module, path in paths.items():
        down, up = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"]
        name, rank = module.removeprefix(MUSUBI_PREFIX), len(down)
        alpha = float(tensors[f"{module}.alpha"]) if f"{module}.alpha" in tensors else float(rank)
        found[f"{name}.lora_A"], found[f"{name}.lora_B"] = down.contiguous(), up.contiguous()
        specs[path] = {"rank": rank, "alpha": alpha, "lr_scale": 1.0, "depth": 1, "dropout": 0.0, "enabled": True}
    config: dict[str, Any] = {
        "name": "tinyflux_lora", "version": "1.0",
        "defaults": {"rank": 16, "alpha": 16.0, "lr_scale": 1.0, "depth": 1, "dropout": 0.0},
        "targets": [], "layer_specs": specs, "extensions": None,
        # Only the listed layers: one without an entry would be adapted too if its kind were included.
        **{f"include_{kind}": False for kind in PUBLISHED_KINDS},
    }  # fmt: skip
    return found, {"config_json": json.dumps(config), "num_adapters": str(len(specs))}
