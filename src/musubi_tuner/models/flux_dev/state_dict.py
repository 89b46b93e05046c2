"""FLUX.1 weight files: every form in use, brought to Black Forest Labs' names.

Accepted: those names, with a prefix on all of them, ComfyUI checkpoints that also hold encoders, diffusers folders and
shards, plain fp8, and scaled fp8 in both spellings. Other models that look alike are refused by name.

All floating weights are brought to one dtype: a part cast alone would make blocks of one list differ. Scaled fp8 weights are
multiplied by their scales on the way, or kept as they are where the run stores its base in fp8.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config.paths import expand
from musubi_tuner.encoders.locate import source as describe
from musubi_tuner.errors import CheckpointError
from musubi_tuner.memory.storage import Freeze, Merge, place_weights
from musubi_tuner.models.flux_dev.geometry import FluxConfig
from musubi_tuner.models.flux_dev.model import Flux
from musubi_tuner.models.flux_dev.options import PUBLISHED_AXES
from musubi_tuner.weights.checkpoints import WeightFile, find_weights, read_weights
from musubi_tuner.weights.sources import read_source
from musubi_tuner.weights.stored import StoredWeight, read_stored

logger = logging.getLogger(__name__)
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
FOREIGN = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.")
"""Beginnings of the other networks in a ComfyUI checkpoint."""
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.[a-z]+)")


def build(config: FluxConfig) -> Flux:
    """The model's structure on the meta device, without storage."""
    with torch.device("meta"):
        return Flux(config)


def load_checkpoint(source: str | Path, *, ema: bool = False, revision: str | None = None) -> WeightFile:
    """Find and read a FLUX.1 checkpoint: a file, any shard, a diffusers folder, or a hub id with a file or subfolder.

    Raises:
        CheckpointError: if it is not there, not complete, or of a kind that cannot be read.
    """
    text = str(source)
    path = expand(text)
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path}: is a GGUF file, which is not supported; use the safetensors or fp8 file")
    if not path.exists():
        found = describe("model.path", text, path, revision)
        path = found.resolve() or path
    if path.is_dir():
        if (path / "transformer" / "config.json").is_file():
            path = path / "transformer"
        if not (path / "config.json").is_file() and (shards := sorted(path.glob("*-00001-of-*.safetensors"))):
            return _read_shards(shards[0])
        if (path / "checkpoints.json").is_file():
            return read_weights(find_weights(path, ema=ema))
        tensors, config, file = read_source(path)
        return WeightFile(file, tensors, config=config)
    if _SHARD.fullmatch(path.name):
        return _read_shards(path)
    return read_weights(path)


def _read_shards(path: Path) -> WeightFile:
    match = _SHARD.fullmatch(path.name)
    assert match is not None
    stem, count, suffix = match.groups()
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    config = None
    for number in range(1, int(count) + 1):
        part = path.with_name(f"{stem}-{number:05d}-of-{count}{suffix}")
        if not part.is_file():
            raise CheckpointError(f"{part}: is missing; {path.name} is one of {int(count)} parts")
        file = read_weights(part)
        tensors.update(file.tensors)
        metadata.update(file.metadata)
        config = config or file.config
    return WeightFile(path, tensors, metadata, config)


def load_model(
    source: str | Path | WeightFile,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    allow_schnell: bool = False,
    device: torch.device | str = "cpu",
    freeze: Freeze | None = None,
    merge: Merge | None = None,
) -> Flux:
    """Load a model in eval mode, frozen. Weights are read, brought to their form and placed one by one.

    Args:
        source: see `load_checkpoint`, or what it returned.
        dtype: to which floating tensors are brought; None keeps them as stored.
        freeze: how Linear layers of the blocks are stored; absent = as ordinary layers. merge: changes weights before that.

    Raises:
        CheckpointError: for another model, missing or unexpected keys, or blocks of different dtypes.
    """
    file = source if isinstance(source, WeightFile) else load_checkpoint(source, revision=revision)
    config, weights = to_bfl(file, allow_schnell=allow_schnell)
    if dtype is None:
        check_uniform(weights, str(file.path))
        if any(weight.is_fp8 for weight in weights.values()):
            raise CheckpointError(
                f"{file.path}: is stored in float8, in which nothing can be computed: leave model.keep_dtype off, and set "
                'memory.base_storage = "fp8_scaled" to keep its 8 bits'
            )
    model = build(config)
    place_weights(model, weights, f"{file.path}: is not a FLUX.1 transformer", dtype, device, freeze, merge)
    return model.requires_grad_(False).eval()


def to_bfl(file: WeightFile, *, allow_schnell: bool = False) -> tuple[FluxConfig, dict[str, StoredWeight]]:
    """Geometry and weights of a file under Black Forest Labs' names.

    Raises:
        CheckpointError: naming what the file is, if it is something else.
    """
    what = str(file.path)
    tensors = own_part(file.tensors, what)
    _refuse(tensors, what, allow_schnell)
    weights = read_stored(tensors, file.metadata, what)
    if _is_diffusers(weights):
        weights = from_diffusers(weights, what)
    return geometry_of_tensors(weights, file.config, what), weights


def own_part(tensors: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The transformer's tensors of a file, without prefix."""
    prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in tensors)), "")
    if not prefix:
        return tensors
    others = [key for key in tensors if not key.startswith(prefix)]
    strange = [key for key in others if not key.startswith(FOREIGN) and not key.startswith("scaled_fp8")]
    if strange:
        raise CheckpointError(
            f"{what}: some keys begin with '{prefix}' and others do not ({strange[0]}); it is damaged"
        )
    if others:
        logger.warning(
            "%s: is a whole checkpoint; its transformer is used, %d other tensors are not", what, len(others)
        )
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _is_diffusers(tensors: Iterable[str]) -> bool:
    return any(key.startswith(("transformer_blocks.", "single_transformer_blocks.", "x_embedder.")) for key in tensors)


def _refuse(tensors: dict[str, Tensor], what: str, allow_schnell: bool) -> None:
    keys = set(tensors)

    def has(*parts: str) -> bool:
        return any(part in key for key in keys for part in parts)

    kinds: list[tuple[Callable[[], bool], str]] = [
        (lambda: has("lora_down", "lora_up", "lora_A", "lora_B", "hada_w1", "lokr_w"),
         "is a LoRA, not a model; give it as adapter.init_from or in adapter.merge"),
        (lambda: has("quant_state.bitsandbytes", ".absmax", ".quant_map"),
         "is quantised to 4 bits (NF4), which cannot be read; use the bf16 or an fp8 file"),
        (lambda: has("double_stream_modulation", "single_stream_modulation"), "is FLUX.2, another architecture"),
        (lambda: has(".SelfAttention."), "is a T5 encoder; it belongs to model.t5_path"),
        (lambda: has("text_model.encoder."), "is a CLIP text model; it belongs to model.clip_path"),
        (lambda: {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= keys,
         "is an autoencoder; it belongs to model.vae_path"),
    ]  # fmt: skip
    for applies, reason in kinds:
        if applies():
            raise CheckpointError(f"{what}: {reason}")
    entry = tensors.get("img_in.weight", tensors.get("x_embedder.weight"))
    if entry is None:
        raise CheckpointError(
            f"{what}: is not a FLUX.1 transformer: it has no img_in.weight (first key: {next(iter(tensors))})"
        )
    variants = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny, Depth or Redux"}
    if entry.shape[1] in variants and entry.shape[0] == FluxConfig().hidden_size:
        raise CheckpointError(
            f"{what}: is {variants[entry.shape[1]]} (img_in takes {entry.shape[1]} values), not FLUX.1-dev"
        )
    if not has("guidance_in.", "guidance_embedder.") and not allow_schnell:
        raise CheckpointError(
            f"{what}: has no guidance embedding, so it is FLUX.1-schnell, whose distilled steps training would undo; "
            "set model.allow_schnell = true to train on it anyway"
        )


def geometry_of_tensors(tensors: Mapping[str, StoredWeight], config: dict[str, Any] | None, what: str) -> FluxConfig:
    """Geometry from shapes; the rotary widths, which no shape shows, from a config, else the published ones.

    Raises:
        CheckpointError: if a tensor needed for it is missing, or the widths are not known.
    """

    def shape(key: str) -> torch.Size:
        if key not in tensors:
            raise CheckpointError(f"{what}: is not a complete FLUX.1 transformer: {key} is missing")
        return tensors[key].shape

    config = config or {}
    hidden, in_channels = shape("img_in.weight")
    head = shape("double_blocks.0.img_attn.norm.query_norm.scale" if "double_blocks.0.img_attn.qkv.weight" in tensors
                 else "single_blocks.0.norm.query_norm.scale")[0]  # fmt: skip
    axes = config.get("axes_dim", config.get("axes_dims_rope", PUBLISHED_AXES))
    if sum(axes) != head:
        raise CheckpointError(
            f"{what}: its heads are {head} wide, and it has no config that says how rotary widths divide that; put the model's "
            "config.json beside the file"
        )
    mlp = tensors.get("double_blocks.0.img_mlp.0.weight")
    ratio = (mlp.shape[0] if mlp is not None else shape("single_blocks.0.linear2.weight")[1] - hidden) / hidden
    try:
        return FluxConfig(
            in_channels=in_channels,
            vec_in_dim=shape("vector_in.in_layer.weight")[1],
            context_in_dim=shape("txt_in.weight")[1],
            hidden_size=hidden,
            mlp_ratio=float(ratio),
            num_heads=hidden // head,
            depth=count_blocks(tensors, "double_blocks"),
            depth_single_blocks=count_blocks(tensors, "single_blocks"),
            axes_dim=tuple(axes),
            theta=int(config.get("theta", FluxConfig().theta)),
            qkv_bias="double_blocks.0.img_attn.qkv.bias" in tensors,
            guidance_embed=any(key.startswith("guidance_in.") for key in tensors),
        )
    except ValueError as error:
        raise CheckpointError(f"{what}: its shapes do not fit together: {error}") from error


def count_blocks(keys: Iterable[str], name: str) -> int:
    """Highest block number of a list, plus one."""
    numbers = [int(key.split(".")[1]) for key in keys if key.startswith(f"{name}.")]
    return max(numbers, default=-1) + 1


# -- names of diffusers ----------------------------------------------------------------------------------------------

ENDS: dict[str, tuple[str, ...]] = {
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "txt_in": ("context_embedder",),
    "img_in": ("x_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
"""Our module -> diffusers' modules whose rows it stacks."""
DOUBLE: dict[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE: dict[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
SWAPPED = "final_layer.adaLN_modulation.1"
"""Its two halves stand in the other order in diffusers: scale first."""


def diffusers_modules(depth: int, depth_single: int) -> dict[str, tuple[str, ...]]:
    """Our module path -> the diffusers modules that make it up, in row order."""
    table = dict(ENDS)
    for ours, theirs, count, rows in (
        ("double_blocks", "transformer_blocks", depth, DOUBLE),
        ("single_blocks", "single_transformer_blocks", depth_single, SINGLE),
    ):
        for index in range(count):
            table |= {
                f"{ours}.{index}.{name}": tuple(f"{theirs}.{index}.{part}" for part in parts)
                for name, parts in rows.items()
            }
    return table


def _leaves(module: str) -> tuple[tuple[str, str], ...]:
    """(our leaf, diffusers' leaf) of a module's tensors."""
    return (
        (("scale", "weight"),)
        if module.endswith(("query_norm", "key_norm"))
        else (("weight", "weight"), ("bias", "bias"))
    )


def swap_halves(tensor: Tensor) -> Tensor:
    """Exchange the first and the second half of the rows."""
    return torch.cat(tuple(reversed(tensor.chunk(2))))


def from_diffusers(weights: Mapping[str, StoredWeight], what: str) -> dict[str, StoredWeight]:
    """Diffusers' weights under our names; nothing is copied yet.

    Raises:
        CheckpointError: listing keys that are missing or left over.
    """
    left = dict(weights)
    found: dict[str, StoredWeight] = {}
    missing: list[str] = []
    depths = [count_blocks(weights, name) for name in ("transformer_blocks", "single_transformer_blocks")]
    for module, parts in diffusers_modules(*depths).items():
        for ours, theirs in _leaves(module):
            names = [f"{part}.{theirs}" for part in parts]
            present = [name for name in names if name in left]
            if present and len(present) < len(names):
                missing += [name for name in names if name not in left]
            if len(present) == len(names):
                pieces = [left.pop(name) for name in names]
                found[f"{module}.{ours}"] = StoredWeight(
                    tuple(part for piece in pieces for part in piece.parts),
                    tuple(scale for piece in pieces for scale in piece.scales),
                    swapped=module == SWAPPED,
                )
    if missing or left:
        problem = f"{len(missing)} missing ({missing[0]})" if missing else f"{len(left)} unknown ({next(iter(left))})"
        raise CheckpointError(f"{what}: is not a complete FLUX.1 transformer of diffusers: {problem}")
    return found


def to_diffusers(tensors: dict[str, Tensor], config: FluxConfig) -> dict[str, Tensor]:
    """Our tensors under diffusers' names, the inverse of `from_diffusers`."""
    found: dict[str, Tensor] = {}
    for module, parts in diffusers_modules(config.depth, config.depth_single_blocks).items():
        for ours, theirs in _leaves(module):
            tensor = tensors.get(f"{module}.{ours}")
            if tensor is None:
                continue
            tensor = swap_halves(tensor) if module == SWAPPED else tensor
            sizes = row_sizes(module, config) if len(parts) > 1 else (len(tensor),)
            found |= {f"{part}.{theirs}": rows.clone() for part, rows in zip(parts, tensor.split(sizes))}
    return found


def row_sizes(module: str, config: FluxConfig) -> tuple[int, ...]:
    """Rows of the parts that a fused module stacks."""
    width = config.hidden_size
    return (width, width, width, config.mlp_hidden) if module.endswith("linear1") else (width, width, width)


def diffusers_config(config: FluxConfig) -> dict[str, Any]:
    """Fields of diffusers' ``config.json`` for this geometry."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }


def check_uniform(weights: Mapping[str, StoredWeight], what: str) -> None:
    """Check that each block list is stored alike, where weights keep the dtype of their file.

    Raises:
        CheckpointError: if weights that blocks exchange have different dtypes.
    """
    seen: dict[str, tuple[str, torch.dtype]] = {}
    for key, weight in weights.items():
        match = re.fullmatch(r"((?:double|single)_blocks)\.\d+\.(.*\.weight)", key)
        if match:
            name = f"{match[1]}.*.{match[2]}"
            first = seen.setdefault(name, (key, weight.dtype))
            if first[1] != weight.dtype:
                raise CheckpointError(
                    f"{what}: {first[0]} is {first[1]} and {key} is {weight.dtype}; blocks must be stored alike: leave "
                    "model.keep_dtype off"
                )


def load_to_merge(file: WeightFile) -> Flux:
    """A model in the dtype of its file, to have adapters merged into it; fp8 becomes bfloat16, which can hold the change."""
    stored = any(tensor.element_size() == 1 and tensor.is_floating_point() for tensor in file.tensors.values())
    return load_model(file, dtype=torch.bfloat16 if stored else None, allow_schnell=True)
