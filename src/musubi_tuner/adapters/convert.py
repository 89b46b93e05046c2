"""Names of LoRA files, and the way between them.

    musubi     lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight / .lora_up.weight / .alpha      (kohya is the same)
    comfyui    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight / .lora_B.weight             no alpha
    diffusers  transformer.transformer_blocks.0.attn.to_q.lora_A.weight / .lora_B.weight               no alpha, layers split
    published  double_blocks_0_attn_img_qkv.lora_A / .lora_B, of a family's own trainer                 alpha in the header

Published files are read and written by the family (models/<family>/lora.py). Elsewhere, where there is no alpha, its factor
alpha / rank is folded into the matrices: the square root of its size into both, its sign into B. Paths are restored through the family's list of layers, never guessed from underscores.

Layers that our models fuse (q, k, v; the first projection of single blocks) are split for diffusers: A is the same for
all parts, B is cut by rows. On the way back equal A's give the fused layer exactly; different ones are stacked, B becomes
block-diagonal, and the rank is the sum of the ranks.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import ModelSpec

Naming = Literal["musubi", "kohya", "diffusers", "comfyui", "published"]
NAMINGS: tuple[Naming, ...] = ("musubi", "kohya", "diffusers", "comfyui", "published")
_PUBLISHED = re.compile(r".*\.lora_[AB](\.\d+)?")
MUSUBI_PREFIX = "lora_unet_"
PATH_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")
_SUFFIXES = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha", ".lora.down.weight": "down",
    ".lora.up.weight": "up",
}  # fmt: skip
Pair = dict[str, Tensor]
"""``down`` [rank, in], ``up`` [out, rank] and perhaps ``alpha``."""


def detect(keys: Iterable[str]) -> str | None:
    """musubi, comfyui, diffusers or published; None if the keys are no LoRA's."""
    keys = list(keys)
    if any(_PUBLISHED.fullmatch(key) for key in keys):
        return "published"
    if keys and all(key.startswith(MUSUBI_PREFIX) for key in keys):
        return "musubi"
    if not keys or not any(key.endswith(tuple(_SUFFIXES)) for key in keys):
        return None
    return "diffusers" if any("transformer_blocks." in key for key in keys) else "comfyui"


def convert(
    state_dict: Mapping[str, Tensor],
    to: Naming,
    *,
    arch: str | None = None,
    prefix: str = "diffusion_model.",
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """A LoRA under other names; its weight changes stay the same.

    Args:
        state_dict: in any of the namings.
        to: ``musubi`` (``kohya`` is the same), ``comfyui``, ``diffusers`` or ``published``, whose alphas `to_published` gives.
        arch: family; absent = the one whose layers the names fit.
        prefix: of ``comfyui`` names.

    Raises:
        CheckpointError: for keys that belong to no layer of the family, or a family unknown to diffusers.
    """
    if to not in NAMINGS:
        raise ValueError(f"unknown naming '{to}'; known: {', '.join(NAMINGS)}")
    if detect(state_dict) == "published":
        state_dict = from_published(state_dict, metadata or {}, MODELS[arch] if arch else None)
    spec = MODELS[arch] if arch else family_of(state_dict)
    tensors = to_musubi(state_dict, spec)
    if to in ("musubi", "kohya"):
        return tensors
    if to == "published":
        return to_published(tensors, spec)[0]
    paths = layer_paths(tensors, spec)
    if to == "comfyui":
        return _to_paths({path: _folded(pair) for path, pair in _pairs(tensors, paths).items()}, prefix)
    return _to_paths(_split_for_diffusers(_pairs(tensors, paths), spec), "transformer.")


def from_published(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], spec: ModelSpec | None = None
) -> dict[str, Tensor]:
    """A file of a family's own trainer under musubi names; its layers are not checked.

    Args:
        metadata: header of the file, in which alpha stands. spec: the family; absent = the one that has such files.

    Raises:
        CheckpointError: if the family has none, or the file cannot be used.
    """
    for family in [spec] if spec else [MODELS[code] for code in MODELS]:
        try:
            read = family.load("read_published_lora")
        except AttributeError:
            continue
        return dict(read(tensors, metadata))
    raise CheckpointError(
        f"keys such as {next(iter(tensors))} are of no LoRA for {spec.title if spec else 'any family'}"
    )


def to_published(tensors: Mapping[str, Tensor], spec: ModelSpec) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA under musubi names as the family's own trainer stores it: tensors and header.

    Raises:
        CheckpointError: if there is no such form, or it lacks some of the layers.
    """
    try:
        write = spec.load("write_published_lora")
    except AttributeError:
        raise CheckpointError(f"{spec.title} has no published trainer with names of its own") from None
    found: tuple[dict[str, Tensor], dict[str, str]] = write(tensors)
    return found


def family_of(tensors: Mapping[str, Tensor]) -> ModelSpec:
    """The family whose layers a LoRA's names fit.

    Raises:
        CheckpointError: if none does.
    """
    reasons = []
    for code in MODELS:
        try:
            to_musubi(tensors, MODELS[code])
        except CheckpointError as error:
            reasons.append(f"{MODELS[code].title}: {error}")
        else:
            return MODELS[code]
    raise CheckpointError("these names fit no model that is supported. " + "; ".join(reasons))


def layer_paths(tensors: Iterable[str], spec: ModelSpec) -> dict[str, str]:
    """Module name in musubi's spelling -> path, for every block that occurs in the keys.

    Raises:
        CheckpointError: naming keys that belong to no layer.
    """
    known: dict[str, str] = {}
    strange = []
    for key in tensors:
        module = key.partition(".")[0]
        if module in known:
            continue
        path = layer_path(module.removeprefix(MUSUBI_PREFIX), spec)
        if path is None or not module.startswith(MUSUBI_PREFIX):
            strange.append(key)
        else:
            known[module] = path
    if strange:
        raise CheckpointError(f"{len(strange)} keys belong to no layer of {spec.title} ({', '.join(strange[:4])})")
    return known


def layer_path(underscored: str, spec: ModelSpec) -> str | None:
    """Path of a layer from its name without dots; None if the family has no such layer."""
    for blocks, layers in spec.adapters.layers.items():
        match = re.fullmatch(rf"{blocks}_(\d+)_(.+)", underscored)
        layer = match and next((layer for layer in layers if layer.replace(".", "_") == match[2]), None)
        if match and layer:
            return f"{blocks}.{match[1]}.{layer}"
    return None


def to_musubi(tensors: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """A LoRA of any naming under musubi names. What has no alpha gets alpha = rank.

    Raises:
        CheckpointError: for keys that belong to no layer of the family.
    """
    naming = detect(tensors)
    if naming is None:
        raise CheckpointError("these are not the keys of a LoRA")
    if naming == "musubi":
        layer_paths(tensors, spec)
        _check_leaves(tensors)
        return dict(tensors)
    pairs, strange = _read_pairs(tensors)
    if naming == "diffusers":
        pairs, more = _join_from_diffusers(pairs, spec)
        strange += more
    converted: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        name = MUSUBI_PREFIX + path.replace(".", "_")
        if layer_path(path.replace(".", "_"), spec) != path:
            strange.append(path)
            continue
        if set(pair) - {"alpha"} != {"down", "up"}:
            raise CheckpointError(f"{path} has only {', '.join(pair)}; the file is damaged")
        converted[f"{name}.lora_down.weight"], converted[f"{name}.lora_up.weight"] = pair["down"], pair["up"]
        converted[f"{name}.alpha"] = pair.get("alpha", torch.tensor(float(len(pair["down"]))))
    if strange:
        raise CheckpointError(f"{len(strange)} keys belong to no layer of {spec.title} ({', '.join(strange[:4])})")
    return converted


def _check_leaves(tensors: Mapping[str, Tensor]) -> None:
    """Refuse other kinds of adapters and damaged pairs under musubi names."""
    leaves: dict[str, set[str]] = {}
    for key in tensors:
        module, _, leaf = key.partition(".")
        leaves.setdefault(module, set()).add(leaf)
    kinds = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "oft_": "OFT", "lora_mid": "LoCon with Tucker"}
    for module, found in leaves.items():
        strange = sorted(found - {"lora_down.weight", "lora_up.weight", "alpha"})
        if strange:
            kind = next(
                (name for start, name in kinds.items() if strange[0].startswith(start)), "another kind of adapter"
            )
            raise CheckpointError(f"{module}.{strange[0]}: this is {kind}, which is not supported yet; only LoRA is")
        if not {"lora_down.weight", "lora_up.weight"} <= found:
            raise CheckpointError(f"{module} has only {', '.join(sorted(found))}; the file is damaged")


def _read_pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Pair], list[str]]:
    """Path without prefix -> its tensors, and keys that are none of a LoRA's."""
    pairs: dict[str, Pair] = {}
    strange = []
    for key, tensor in tensors.items():
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            strange.append(key)
            continue
        path = key.removesuffix(suffix)
        for prefix in PATH_PREFIXES:
            path = path.removeprefix(prefix)
        pairs.setdefault(path, {})[_SUFFIXES[suffix]] = tensor
    return pairs, strange


def _pairs(tensors: Mapping[str, Tensor], paths: Mapping[str, str]) -> dict[str, Pair]:
    """Musubi tensors by path."""
    names = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
    pairs: dict[str, Pair] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.partition(".")
        if leaf not in names:
            raise CheckpointError(f"{key}: only LoRA can be converted between namings")
        pairs.setdefault(paths[module], {})[names[leaf]] = tensor
    return pairs


def _folded(pair: Pair) -> Pair:
    """A pair without alpha and of the same product."""
    if not _complete(pair):
        raise CheckpointError(f"a layer has only {', '.join(pair)}; the file is damaged")
    rank = len(pair["down"])
    scale = float(pair["alpha"]) / rank if "alpha" in pair else 1.0
    root = math.sqrt(abs(scale))
    # In float32: 8-bit floats cannot be multiplied, and halves would be rounded on the way.
    kept = torch.bfloat16 if pair["down"].element_size() == 1 else pair["down"].dtype
    factors = {"down": root, "up": math.copysign(root, scale)}
    return {name: (pair[name].float() * factor).to(kept) for name, factor in factors.items()}


def _to_paths(pairs: Mapping[str, Pair], prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        found[f"{prefix}{path}.lora_A.weight"] = pair["down"].contiguous()
        found[f"{prefix}{path}.lora_B.weight"] = pair["up"].contiguous()
    return found


# -- diffusers -------------------------------------------------------------------------------------------------------


def _diffusers_table(paths: Iterable[str], spec: ModelSpec, theirs: bool) -> dict[str, tuple[str, ...]]:
    """Our path -> diffusers' paths, deep enough for the given ones (``theirs`` tells whose names they are)."""
    try:
        table = spec.load("diffusers_modules")
    except AttributeError:
        raise CheckpointError(
            f"diffusers has no {spec.title}, so there are no names of it to convert to or from"
        ) from None
    lists = ("transformer_blocks", "single_transformer_blocks") if theirs else tuple(spec.adapters.layers)
    depths = [
        1 + max((int(path.split(".")[1]) for path in paths if path.startswith(f"{blocks}.")), default=-1)
        for blocks in lists
    ]
    return table(*depths)


def _split_for_diffusers(pairs: Mapping[str, Pair], spec: ModelSpec) -> dict[str, Pair]:
    table = _diffusers_table(pairs, spec, theirs=False)
    found: dict[str, Pair] = {}
    for path, pair in pairs.items():
        parts, folded = table[path], _folded(pair)
        sizes = part_rows(len(parts), len(folded["up"]), folded["down"].shape[1])
        for part, rows in zip(parts, folded["up"].split(sizes)):
            found[part] = {"down": folded["down"].clone(), "up": rows}
    return found


def part_rows(parts: int, rows: int, columns: int) -> list[int]:
    """Rows of the parts of a fused layer: q, k and v are as wide as the input, what follows takes the rest."""
    if parts <= 1:
        return [rows]
    if parts == 3:
        return [rows // 3] * 3
    return [columns] * 3 + [rows - 3 * columns]


def _join_from_diffusers(pairs: dict[str, Pair], spec: ModelSpec) -> tuple[dict[str, Pair], list[str]]:
    left, found = dict(pairs), {}
    for path, parts in _diffusers_table(pairs, spec, theirs=True).items():
        present = {part: _folded(left.pop(part)) for part in parts if _complete(left.get(part))}
        if present:
            found[path] = next(iter(present.values())) if len(parts) == 1 else _fuse(parts, present)
    return found, list(left)


def _complete(pair: Pair | None) -> bool:
    return pair is not None and {"down", "up"} <= set(pair)


def _fuse(parts: tuple[str, ...], present: dict[str, Pair]) -> Pair:
    """One pair for a fused layer; parts without a change get zero rows."""
    downs = [pair["down"] for pair in present.values()]
    width = downs[0].shape[1]
    sizes = {part: len(present[part]["up"]) if part in present else width for part in parts}
    if len(parts) == 4 and parts[3] not in present:
        sizes[parts[3]] = 4 * width  # the MLP, four times as wide in all published models
    if len(present) == len(parts) and all(
        down.shape == downs[0].shape and torch.equal(down, downs[0]) for down in downs
    ):
        return {"down": downs[0], "up": torch.cat([present[part]["up"] for part in parts])}
    rank = sum(len(down) for down in downs)
    up = downs[0].new_zeros(sum(sizes.values()), rank)
    row = column = 0
    for part in parts:
        if part in present:
            block = present[part]["up"]
            up[row : row + len(block), column : column + block.shape[1]] = block
            column += block.shape[1]
        row += sizes[part]
    return {"down": torch.cat(downs), "up": up}
