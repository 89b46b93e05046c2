"""Names of adapter files, and the way between them.

    musubi     lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight / .lora_up.weight / .alpha      (kohya is the same)
    comfyui    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight / .lora_B.weight             no alpha
    diffusers  transformer.transformer_blocks.0.attn.to_q.lora_A.weight / .lora_B.weight               no alpha, layers split
    published  double_blocks_0_attn_img_qkv.lora_A / .lora_B, of a family's own trainer                 alpha in the header

Read as well: these paths behind other prefixes or underscored (OneTrainer, LyCORIS, peft), their layers split or not, with or
without ``.alpha``; what programs state of alphas elsewhere is read by `stated`. Paths are restored through the family's list
of layers, never guessed from underscores. Published files are read and written by the family (models/<family>/lora.py), those of
XLabs (``double_blocks.0.processor.qkv_lora1.down.weight``) are read.

Other types of adapters (`adapter_types`) have the same modules in front of leaves of their own; inside the program every type stands
under musubi's names. diffusers reads LoRA and DoRA only, whose norms of rows it calls ``lora_magnitude_vector``.

comfyui and diffusers files are read by programs of which some know no alpha, so its factor alpha / rank is folded into the
matrices. In float32 the root of its size goes into both, as in musubi-tuner, its sign into B. Fewer bits would be rounded by
that: there B alone takes the factor if every value stays exact (any power of two), else the layer is written in float32.

Layers that our models fuse (q, k, v; the first projection of single blocks) are split for diffusers: A is the same for
all parts, B is cut by rows. On the way back equal A's give the fused layer exactly; different ones are stacked, B becomes
block-diagonal, and the rank is the sum of the ranks.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from musubi_tuner.adapter_types import ADAPTERS, type_of
from musubi_tuner.adapters.kinds import refuse_other_kinds
from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import ModelSpec

Naming = Literal["musubi", "kohya", "diffusers", "comfyui", "published"]
NAMINGS: tuple[Naming, ...] = ("musubi", "kohya", "diffusers", "comfyui", "published")
_PUBLISHED = re.compile(r".*\.lora_[AB](\.\d+)?")
MUSUBI_PREFIX = "lora_unet_"
UNDERSCORED = (MUSUBI_PREFIX, "lora_transformer_", "lycoris_")
"""Beginnings of names in which underscores stand for dots."""
PATH_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")
_OWN = sorted(
    {leaf for record in ADAPTERS.values() for leaf in record.leaves} - {"lora_down.weight", "lora_up.weight", "weight"}
)
_KEY = re.compile(
    r"(?P<module>.+)\."
    r"(?:lora_(?P<leaf>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.weight|lora\.(?P<old>down|up)\.weight"
    rf"|(?P<own>{'|'.join(map(re.escape, _OWN))})"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?))"
    rf"|(?P<underscored>(?:{'|'.join(UNDERSCORED)})[^.]+)\.weight"
)
_PARTS = {"A": "down", "down": "down", "B": "up", "up": "up"}
_LEAVES = {"down": "lora_down.weight", "up": "lora_up.weight"}
Pair = dict[str, Tensor]
"""``down`` [rank, in], ``up`` [out, rank], and other parts of a layer by their leaf: ``alpha``, ``dora_scale``, ``lokr_w1``, ..."""


def is_published(keys: Iterable[str]) -> bool:
    """Whether keys are those of a family's own trainer."""
    return any(_PUBLISHED.fullmatch(key) for key in keys)


@dataclass
class FileLayer:
    """What a file holds of one layer, or of one part of a fused layer.

    Attributes:
        pair: its tensors. keys: under which they stand in the file. is_peft: they are called lora_A and lora_B.
    """

    pair: Pair = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    is_peft: bool = False

    @property
    def type(self) -> str | None:
        """Its type of adapter; None if its parts are of none."""
        return type_of({_LEAVES.get(name, name): tensor.ndim for name, tensor in self.pair.items()})

    def check(self, module: str) -> None:
        """Refuse what is incomplete.

        Raises:
            CheckpointError: naming the layer.
        """
        if self.type is not None and "down" not in self.pair and "up" not in self.pair:
            missing = [leaf for leaf in ADAPTERS[self.type].needed if leaf not in self.pair]
            if missing:
                raise CheckpointError(f"{module} lacks {', '.join(missing)}; the file is damaged")
            return
        if {"down", "up"} <= set(self.pair) and self.type is None:
            leaves = ", ".join(sorted(key.removeprefix(f"{module}.") for key in self.keys))
            raise CheckpointError(f"{module} has {leaves}, which are of no one type of adapter")
        if set(self.pair) - {"alpha", "dora_scale"} != {"down", "up"}:
            leaves = ", ".join(sorted(key.removeprefix(f"{module}.") for key in self.keys))
            raise CheckpointError(f"{module} has only {leaves}; the file is damaged")
        down, up = self.pair["down"], self.pair["up"]
        if up.ndim < 2 or up.shape[1] != len(down):
            raise CheckpointError(
                f"{module}: its matrices {list(down.shape)} and {list(up.shape)} are of different ranks; the file is damaged"
            )
        if "alpha" in self.pair and self.pair["alpha"].numel() != 1:
            raise CheckpointError(f"{module}: its alpha holds {self.pair['alpha'].numel()} values; the file is damaged")


def read_layers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, FileLayer], list[str]]:
    """Layer as the file names it -> its tensors, and the keys that are no part of an adapter.

    Raises:
        CheckpointError: if the file holds several adapters.
    """
    layers: dict[str, FileLayer] = {}
    rest, adapters = [], set[str | None]()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            rest.append(key)
            continue
        layer = layers.setdefault(match["module"] or match["underscored"], FileLayer())
        if match["leaf"] or match["old"]:
            part = _PARTS[match["leaf"] or match["old"]]
            adapters.add(match["adapter"])
        else:
            part = match["own"] or ("dora_scale" if match["magnitude"] else "weight")
        layer.pair[part] = tensor
        layer.keys.append(key)
        layer.is_peft |= match["leaf"] in ("A", "B")
    if len(adapters) > 1:
        names = ", ".join(sorted(str(name) for name in adapters))
        raise CheckpointError(f"holds several adapters ({names}); write each to a file of its own")
    return layers, rest


_XLABS = re.compile(
    r"(?P<block>(?:double|single)_blocks\.\d+)\.processor\.(?P<layer>(?:qkv|proj)_lora[12]?)\.(?P<half>down|up)\.weight"
)
_XLABS_LAYERS = {
    "qkv_lora1": "img_attn.qkv", "qkv_lora2": "txt_attn.qkv", "proj_lora1": "img_attn.proj", "proj_lora2": "txt_attn.proj",
    "proj_lora": "linear2",
}  # fmt: skip


def from_xlabs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys of XLabs' processors as those of paths; others are passed on.

    Its change of q, k and v of a single block is that of these parts of linear1.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _XLABS.fullmatch(bare_name(key))
        if match is None:
            found[key] = tensor
            continue
        layer, half = match["layer"], {"down": "lora_A", "up": "lora_B"}[match["half"]]
        if layer == "qkv_lora":
            index = match["block"].rpartition(".")[2]
            for part, rows in zip(
                ("to_q", "to_k", "to_v"), tensor.chunk(3) if half == "lora_B" else (tensor,) * 3, strict=True
            ):
                found[f"transformer.single_transformer_blocks.{index}.attn.{part}.{half}.weight"] = rows
        else:
            found[f"{match['block']}.{_XLABS_LAYERS[layer]}.{half}.weight"] = tensor
    return found


def bare_name(module: str) -> str:
    """A layer's name in a file without the beginnings that programs add to its path."""
    for prefix in UNDERSCORED:
        if module.startswith(prefix):
            return module.removeprefix(prefix)
    while prefix := next((prefix for prefix in PATH_PREFIXES if module.startswith(prefix)), ""):
        module = module.removeprefix(prefix)
    return module


@dataclass(frozen=True)
class Place:
    """Where a layer of a file belongs.

    Attributes:
        path: of our layer. part: which of the ``parts`` that make it up; 0 of 1 is the whole. foreign: named by diffusers.
    """

    path: str
    part: int = 0
    parts: int = 1
    foreign: bool = False


def place_of(module: str, spec: ModelSpec) -> Place | None:
    """Our layer that a name in a file means; None if the family has none such."""
    name = bare_name(module)
    own = layer_path(name.replace(".", "_"), spec)
    if own is not None:
        return Place(own)
    block = re.fullmatch(r"((?:single_)?transformer_blocks)[._](\d+)[._](.+)", name)
    if block:
        found = _diffusers_parts(spec.code).get(f"{block[1]}_0_{block[3].replace('.', '_')}")
        return found and replace(found, path=found.path.replace(".0.", f".{block[2]}.", 1))
    outside = _diffusers_parts(spec.code).get(name.replace(".", "_"))
    if outside is not None:
        return outside
    piece = re.fullmatch(r"((?:\w+)\.(\d+)\..+)\.(\d)", name)
    if piece and layer_path(piece[1].replace(".", "_"), spec) == piece[1]:
        parts = len(_diffusers_table(spec).get(piece[1].replace(f".{piece[2]}.", ".0.", 1), ()))
        return Place(piece[1], int(piece[3]), parts) if int(piece[3]) < parts else None
    return None


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
    if is_published(state_dict):
        state_dict = from_published(state_dict, metadata or {}, MODELS[arch] if arch else None)
    spec = MODELS[arch] if arch else family_of(state_dict)
    tensors = to_musubi(state_dict, spec)
    if to in ("musubi", "kohya"):
        return tensors
    if to == "published":
        return to_published(tensors, spec)[0]
    paths = layer_paths(tensors, spec)
    pairs = _pairs(tensors, paths)
    if to == "comfyui":
        _refuse_types(pairs, "ComfyUI", ("ia3",))
        return _to_paths({path: _folded(pair) for path, pair in pairs.items()}, prefix)
    _refuse_types(pairs, "diffusers", tuple(name for name in ADAPTERS if name not in ("lora", "dora")))
    return _to_paths(_split_for_diffusers(pairs, spec), "transformer.", "lora_magnitude_vector")


def _refuse_types(pairs: Mapping[str, Pair], program: str, types: tuple[str, ...]) -> None:
    """Refuse layers of types that a program does not read.

    Raises:
        CheckpointError: naming the first.
    """
    for path, pair in pairs.items():
        kind = FileLayer(pair).type
        if kind in types:
            raise CheckpointError(
                f"{path} is of type {kind}, which {program} does not read; merge_lora writes a model with the change in it"
            )


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
        if family.published is not None:
            return family.published.read_lora(tensors, metadata)
    raise CheckpointError(
        f"keys such as {next(iter(tensors))} are of no LoRA for {spec.title if spec else 'any family'}"
    )


def to_published(tensors: Mapping[str, Tensor], spec: ModelSpec) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA under musubi names as the family's own trainer stores it: tensors and header.

    Raises:
        CheckpointError: if there is no such form, or it lacks some of the layers.
    """
    if spec.published is None:
        raise CheckpointError(f"{spec.title} has no published trainer with names of its own")
    others = tuple(name for name in ADAPTERS if name != "lora")
    _refuse_types(_pairs(tensors, layer_paths(tensors, spec)), "the published trainer", others)
    return spec.published.write_lora(tensors)


def family_of(tensors: Mapping[str, Tensor], *, partly: bool = False) -> ModelSpec:
    """The family whose layers an adapter's names fit.

    Args:
        partly: it is enough if some of them do.

    Raises:
        CheckpointError: if none does; for a family that most names fit, naming the others.
    """
    modules = list(read_layers(tensors)[0])
    fits = {code: sum(place_of(module, MODELS[code]) is not None for module in modules) for code in MODELS}
    best = max(fits, key=lambda code: fits[code])
    if not fits[best]:
        shown = ", ".join(modules[:4] or list(tensors)[:4])
        raise CheckpointError(f"these names fit no model that is supported ({shown})")
    to_musubi(split_unmatched(tensors, MODELS[best])[0] if partly else tensors, MODELS[best])
    return MODELS[best]


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
    """Path of a layer or norm from its name without dots; None if the family has none such."""
    for blocks, layers in spec.adapters.layers.items():
        match = re.fullmatch(rf"{blocks}_(\d+)_(.+)", underscored)
        named = (*layers, *spec.adapters.convolutions.get(blocks, ()), *spec.adapters.norms.get(blocks, ()))
        layer = match and next((layer for layer in named if layer.replace(".", "_") == match[2]), None)
        if match and layer:
            return f"{blocks}.{match[1]}.{layer}"
    return next((path for path in spec.adapters.outside if path.replace(".", "_") == underscored), None)


def to_musubi(tensors: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """An adapter of any naming under musubi names. A LoRA without alpha gets alpha = rank.

    Raises:
        CheckpointError: for keys that belong to no layer of the family, another kind of adapter, or a damaged file.
    """
    refuse_other_kinds(tensors)
    layers, strange = read_layers(tensors)
    if not layers:
        raise CheckpointError("these are not the keys of an adapter")
    found: dict[str, dict[Place, Pair]] = {}
    for module, layer in layers.items():
        place = place_of(module, spec)
        if place is None:
            strange += layer.keys
            continue
        layer.check(module)
        present = found.setdefault(place.path, {})
        if place in present or any(other.parts != place.parts for other in present):
            raise CheckpointError(f"{module}: {place.path} stands twice in the file, under different names")
        present[place] = layer.pair
    for key in strange:
        _refuse_part(key, spec)
    if strange:
        raise CheckpointError(f"{len(strange)} keys belong to no layer of {spec.title} ({', '.join(strange[:4])})")
    converted: dict[str, Tensor] = {}
    for path, present in found.items():
        name, pair = (
            MUSUBI_PREFIX + path.replace(".", "_"),
            _swapped(path, _joined(present), back=next(iter(present)).foreign),
        )
        if "down" in pair:
            pair.setdefault("alpha", torch.tensor(float(len(pair["down"]))))
        converted |= {f"{name}.{_LEAVES.get(part, part)}": tensor for part, tensor in pair.items()}
    return converted


def _refuse_part(key: str, spec: ModelSpec) -> None:
    """Refuse a key of a layer of the family: left out, the layer would change otherwise than it was trained.

    Raises:
        CheckpointError: naming the key.
    """
    if not _KEY.fullmatch(key):
        ends = [match.start() for match in re.finditer(r"\.", key)]
        if any(place_of(key[:end], spec) for end in ends):
            raise CheckpointError(f"{key}: is an unknown part of this layer, which cannot be left out")


def split_unmatched(tensors: Mapping[str, Tensor], spec: ModelSpec) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of the layers of a family, and the keys of whole layers that it has not.

    Raises:
        CheckpointError: if nothing is left, or a key changes a layer of the family in another way than LoRA.
    """
    layers, unmatched = read_layers(tensors)
    for key in unmatched:
        _refuse_part(key, spec)
    unmatched += [key for module, layer in layers.items() if place_of(module, spec) is None for key in layer.keys]
    matched = {key: tensor for key, tensor in tensors.items() if key not in set(unmatched)}
    if not matched:
        raise CheckpointError(f"none of its layers belongs to {spec.title} ({', '.join(unmatched[:4])})")
    return matched, unmatched


def _pairs(tensors: Mapping[str, Tensor], paths: Mapping[str, str]) -> dict[str, Pair]:
    """Musubi tensors by path."""
    names = {leaf: part for part, leaf in _LEAVES.items()}
    pairs: dict[str, Pair] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.partition(".")
        pairs.setdefault(paths[module], {})[names.get(leaf, leaf)] = tensor
    return pairs


def _scale(pair: Pair) -> float:
    """alpha / rank."""
    return float(pair["alpha"]) / len(pair["down"]) if "alpha" in pair else 1.0


def _folded(pair: Pair) -> Pair:
    """A pair without alpha and of the same product; see the module text. Other types are left as they are."""
    if "down" not in pair:
        return pair
    rest = {part: tensor for part, tensor in pair.items() if part == "dora_scale"}
    scale, down, up = _scale(pair), pair["down"], pair["up"]
    if down.element_size() < 4:
        kept = torch.bfloat16 if down.element_size() == 1 else down.dtype  # 8-bit floats cannot be multiplied
        wanted = up.float() * scale
        folded = wanted.to(kept)
        if torch.equal(folded.float(), wanted):
            return {"down": down.to(kept), "up": folded, **rest}
    root = math.sqrt(abs(scale))
    return {"down": down.float() * root, "up": up.float() * math.copysign(root, scale), **rest}


def _to_paths(pairs: Mapping[str, Pair], prefix: str, magnitude: str = "dora_scale") -> dict[str, Tensor]:
    names = {"down": "lora_A.weight", "up": "lora_B.weight", "dora_scale": magnitude}
    return {
        f"{prefix}{path}.{names.get(part, part)}": tensor.contiguous()
        for path, pair in pairs.items()
        for part, tensor in pair.items()
    }


# -- diffusers -------------------------------------------------------------------------------------------------------


@cache
def _table_of(code: str) -> Mapping[str, tuple[str, ...]]:
    return MODELS[code].family.diffusers_modules(1, 1)


def _diffusers_table(spec: ModelSpec) -> Mapping[str, tuple[str, ...]]:
    """Path of ours -> diffusers' paths of its parts, for the first block of each list; empty where diffusers has no such model."""
    return _table_of(spec.code)


@cache
def _diffusers_parts(code: str) -> dict[str, Place]:
    """Underscored path of diffusers, of first blocks -> our layer."""
    return {
        part.replace(".", "_"): Place(path, index, len(parts), foreign=True)
        for path, parts in _table_of(code).items()
        for index, part in enumerate(parts)
    }


def _split_for_diffusers(pairs: Mapping[str, Pair], spec: ModelSpec) -> dict[str, Pair]:
    table = _diffusers_table(spec)
    if not table:
        raise CheckpointError(f"diffusers has no {spec.title}, so there are no names of it to convert to")
    found: dict[str, Pair] = {}
    for path, pair in pairs.items():
        pair = _swapped(path, pair, back=True)
        if path in spec.adapters.outside:
            found[table[path][0]] = _folded(pair)
            continue
        blocks, index, layer = path.split(".", 2)
        parts, folded = table[f"{blocks}.0.{layer}"], _folded(pair)
        sizes = part_rows(len(parts), len(folded["up"]), folded["down"].shape[1])
        norms = (
            [{"dora_scale": rows.flatten()} for rows in folded["dora_scale"].split(sizes)]
            if "dora_scale" in folded
            else [{}] * len(parts)
        )
        for part, rows, norm in zip(parts, folded["up"].split(sizes), norms, strict=True):
            found[part.replace(".0.", f".{index}.", 1)] = {"down": folded["down"].clone(), "up": rows, **norm}
    return found


def part_rows(parts: int, rows: int, columns: int) -> list[int]:
    """Rows of the parts of a fused layer: q, k and v are as wide as the input, what follows takes the rest."""
    if parts <= 1:
        return [rows]
    if parts == 3:
        return [rows // 3] * 3
    return [columns] * 3 + [rows - 3 * columns]


def _joined(present: Mapping[Place, Pair]) -> Pair:
    """One pair for a layer of ours from its parts; parts without a change get zero rows."""
    places = sorted(present, key=lambda place: place.part)
    if places[0].parts == 1:
        return dict(present[places[0]])
    pairs = [present[place] for place in places]
    if not all("down" in pair for pair in pairs):
        raise CheckpointError(
            f"{places[0].path} is one layer here, and the file has an adapter of type {FileLayer(pairs[0]).type} for each of its parts; "
            "only LoRA and DoRA can be put together"
        )
    norms = [pair["dora_scale"].reshape(-1, 1) for pair in pairs if "dora_scale" in pair]
    if norms and (len(norms) < len(pairs) or len(pairs) < places[0].parts):
        raise CheckpointError(
            f"{places[0].path}: only some of its parts have norms of DoRA, so those of the others are not known"
        )
    whole = {"dora_scale": torch.cat(norms)} if norms else {}
    scales = [_scale(pair) for pair in pairs]
    alike = len(set(scales)) == 1
    if not alike or any(pair["down"].element_size() == 1 for pair in pairs):
        factors = [1.0 if alike else scale for scale in scales]
        pairs = [{"down": p["down"].float(), "up": p["up"].float() * factor} for p, factor in zip(pairs, factors)]
    downs, ups = [pair["down"] for pair in pairs], {place.part: pair["up"] for place, pair in zip(places, pairs)}
    if len(pairs) == places[0].parts and all(torch.equal(down, downs[0]) for down in downs):
        down, up = downs[0], torch.cat(list(ups.values()))
    else:
        down, up = torch.cat(downs), _block_diagonal(ups, places[0].parts, downs[0].shape[1])
    return {"down": down, "up": up, "alpha": torch.tensor((scales[0] if alike else 1.0) * len(down)), **whole}


def _swapped(path: str, pair: Pair, *, back: bool) -> Pair:
    """A pair of a layer whose halves diffusers exchanges, in the other order if it comes from or goes to there."""
    if not (back and path == "final_layer.adaLN_modulation.1"):
        return pair
    return {
        part: torch.cat(tuple(reversed(tensor.chunk(2)))) if part in ("up", "dora_scale") else tensor
        for part, tensor in pair.items()
    }


def _block_diagonal(ups: Mapping[int, Tensor], parts: int, width: int) -> Tensor:
    """Matrices of the parts of a fused layer, each in rows and columns of its own.

    Args:
        width: columns of the layer, as wide as its q, k and v.
    """
    # The fourth part is the MLP, four times as wide in all published models.
    rows = [len(ups[part]) if part in ups else (4 * width if part == 3 else width) for part in range(parts)]
    first = next(iter(ups.values()))
    whole = first.new_zeros(sum(rows), sum(up.shape[1] for up in ups.values()))
    column = 0
    for part, up in ups.items():
        row = sum(rows[:part])
        whole[row : row + len(up), column : column + up.shape[1]] = up
        column += up.shape[1]
    return whole
