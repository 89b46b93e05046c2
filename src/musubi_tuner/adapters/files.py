"""Adapter files: reading every naming in use, strict loading, saving with metadata."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from musubi_tuner.adapter_types import ADAPTERS, NORM, type_of
from musubi_tuner.adapters.attach import FILE_PREFIX, AdapterSet, Placement, adaptable_paths, file_name, weight_shape
from musubi_tuner.adapters.base import Adapter
from musubi_tuner.adapters.convert import (
    family_of,
    from_published,
    from_xlabs,
    is_published,
    read_layers,
    split_unmatched,
    to_musubi,
)
from musubi_tuner.adapters.kinds import refuse_other_kinds
from musubi_tuner.adapters.stated import stated_alphas, without_stated
from musubi_tuner.config import RunConfig
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.files import replace_file
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import AdapterTargets, ModelSpec
from musubi_tuner.tensors import save_tensors
from musubi_tuner.weights.checkpoints import ADAPTER_FILES, find_weights, read_weights

NOT_OF_THE_MODEL = {
    "text encoder": ("lora_te", "text_encoder.", "text_encoder_2.", "text_encoders.", "te1.", "te2.", "clip_l.", "t5."),
    "embedding": ("bundle_emb.", "emb_params"),
}
"""Beginnings of keys that go with a LoRA and change something else, which is not trained here."""
LEAVES = {leaf for record in ADAPTERS.values() for leaf in record.leaves}


def type_of_parts(parts: Mapping[str, Tensor]) -> str | None:
    """The type of the change of a layer from its tensors by leaf; None if they are of none."""
    return type_of({leaf: tensor.ndim for leaf, tensor in parts.items()})


def adapter_of(parts: Mapping[str, Tensor], shape: Sequence[int], what: str) -> Adapter:
    """The adapter of one layer of a file.

    Args:
        parts: its tensors by leaf. shape: of the layer's weight [out, in], or of the scale of a norm [size].

    Raises:
        CheckpointError: beginning with ``what``, if they are incomplete, damaged, or of another layer.
    """
    kind = type_of_parts(parts)
    if kind is None:
        raise CheckpointError(
            f"{what}: has {', '.join(sorted(parts))}, which are of no type of adapter; the file is damaged"
        )
    missing = [leaf for leaf in ADAPTERS[kind].needed if leaf not in parts]
    if missing:
        raise CheckpointError(f"{what}: has {', '.join(sorted(parts))}; expected {', '.join(ADAPTERS[kind].needed)}")
    try:
        known = ADAPTERS["locon" if kind == "lora" and len(shape) > 2 else kind].load()
        return known.of_parts(parts, (int(shape[0]), int(shape[1] if len(shape) > 1 else shape[0])))
    except (ValueError, RuntimeError) as problem:
        raise CheckpointError(f"{what}: {problem}") from problem


def parts_by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module name -> leaf -> tensor, of musubi names."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.partition(".")
        layers.setdefault(module, {})[leaf] = tensor
    return layers


def named_for_files(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under musubi names with the beginnings that their types have in files."""
    found: dict[str, Tensor] = {}
    for module, parts in parts_by_module(tensors).items():
        kind = type_of_parts(parts)
        begin = ADAPTERS[kind].prefix if kind else FILE_PREFIX
        found |= {f"{begin}{module.removeprefix(FILE_PREFIX)}.{leaf}": tensor for leaf, tensor in parts.items()}
    return found


def group_by_layer(tensors: Mapping[str, Tensor], paths: list[str]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Layer path -> leaf -> tensor, and the keys that belong to no layer; musubi names.

    Raises:
        CheckpointError: naming a key that is of no type of adapter.
    """
    refuse_other_kinds(tensors)
    known = {file_name(path): path for path in paths}
    layers: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        module, _, leaf = key.partition(".")
        if module not in known:
            strange.append(key)
        elif leaf in LEAVES:
            layers.setdefault(known[module], {})[leaf] = tensor
        else:
            raise CheckpointError(f"{key}: is an unknown part of this layer")
    return layers, strange


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file in memory.

    Attributes:
        tensors: under musubi names. metadata: header of the file.
        spec: the family it is for. skipped: keys that are left out, of text encoders, embeddings and unmatched layers.
        options: that it was trained with, where they are no defaults.
        alphas: where alphas that are no tensors were found, for a person; see `stated`.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    spec: ModelSpec
    skipped: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    alphas: str = ""

    @property
    def remarks(self) -> str:
        """What a person should know of how it was read, to stand behind its name."""
        return (f"; {self.alphas}" if self.alphas else "") + left_out(self.skipped)

    @property
    def hides_padding(self) -> bool:
        """Whether it was trained with the padding of T5 left out of attention (model.t5_attn_mask)."""
        return bool(self.options.get("t5_attn_mask"))

    def check_padding(self, config: RunConfig, key: str) -> None:
        """Refuse a run under whose attention the file would mean something else.

        Args:
            key: of the run file, that names this file.

        Raises:
            ConfigError: naming the setting to change.
        """
        if self.hides_padding and not config.get("model.t5_attn_mask"):
            raise ConfigError(f"{key}: {self.path} was trained with padding hidden; set model.t5_attn_mask to true")


def read_adapter(
    source: str | Path, spec: ModelSpec | None = None, *, ema: bool = False, ignore_unmatched: bool = False
) -> AdapterFile:
    """Read an adapter file of any naming.

    Args:
        spec: the family it must be for; absent = as its header says, or as its names fit.
        ema: take the averaged adapter of a run folder.
        ignore_unmatched: leave out keys that belong to no layer of the family, instead of stopping.

    Raises:
        CheckpointError: if it is for another family, no adapter, or trained with options that this version does not know.
    """
    path = find_weights(source, ema=ema, first=ADAPTER_FILES)
    file = read_weights(path)
    skipped = [key for key in file.tensors if why_skipped(key)]
    own = {key: tensor for key, tensor in file.tensors.items() if not why_skipped(key)}
    if not own:
        raise CheckpointError(f"{path}: holds only {why_skipped(skipped[0])} keys, which are not trained here")
    recorded = file.metadata.get("ss_base_model_version", "")
    stated = MODELS.get(recorded)
    if spec is not None and stated is not None and stated.code != spec.code:
        raise CheckpointError(f"{path}: is an adapter for {stated.title}, this run is {spec.title}")
    try:
        if is_published(own):
            own = from_published(own, file.metadata, spec or stated)
        own = from_xlabs(own)
        refuse_other_kinds(own)
        if not read_layers(own)[0]:
            raise CheckpointError(f"is not an adapter (first key: {next(iter(own))})")
        check_finite(own)
        alphas = stated_alphas(own, path, file.metadata)
        own |= alphas.tensors
        family = spec or stated or family_of(own, partly=ignore_unmatched)
        if ignore_unmatched:
            own, unmatched = split_unmatched(own, family)
            skipped += unmatched
        metadata = {key: value for key, value in without_stated(file.metadata).items() if key not in PUBLISHED_HEADER}
        named = to_musubi(own, family)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return AdapterFile(path, named, metadata, family, skipped, family.family.options_of(file), alphas.remark)


PUBLISHED_HEADER = ("config_json", "num_adapters")
"""Header entries that describe a file of a family's own trainer; what they say is in the tensors once it is read."""


def why_skipped(key: str) -> str:
    """What a key changes that is not the model; empty for keys of the model."""
    return next((what for what, starts in NOT_OF_THE_MODEL.items() if key.startswith(starts)), "")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that is broken.

    Raises:
        CheckpointError: naming tensors that are not finite.
    """
    broken = [key for key, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{len(broken)} of {len(tensors)} tensors hold NaN or infinite values ({', '.join(broken[:4])}); the training that made "
            "it failed, take an earlier file"
        )


def left_out(keys: Sequence[str]) -> str:
    """Names the keys of a file that are not used."""
    return f"; not used: {len(keys)} keys ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})" if keys else ""


def placements_of_file(
    tensors: Mapping[str, Tensor], model: nn.Module, targets: AdapterTargets, what: str
) -> list[Placement]:
    """Layers, types and sizes of a file (musubi names).

    Args:
        model: on which they are to be placed; it may be without storage.

    Raises:
        CheckpointError: listing keys that belong to no layer of the model, or naming a layer that does not fit.
    """
    paths = adaptable_paths(model, targets)
    layers, strange = group_by_layer(tensors, paths)
    if strange:
        raise CheckpointError(
            f"{what}: {len(strange)} keys belong to no layer of this model ({', '.join(strange[:4])})"
        )
    placements = []
    for path in paths:
        if path in layers:
            adapter = adapter_of(layers[path], weight_shape(model.get_submodule(path)), f"{what}: {path}")
            kind = type_of_parts(layers[path])
            assert kind is not None
            sizes = type(adapter).sizes_of(layers[path], (adapter.out_features, adapter.in_features))
            rank, alpha = sizes.pop("rank", 1), sizes.pop("alpha", 0.0)
            placements.append(Placement(path, rank, alpha, type=kind, own=sizes))
    return placements


@torch.no_grad()
def load_adapter(adapters: AdapterSet, tensors: Mapping[str, Tensor], what: str = "the adapter") -> None:
    """Load a file's tensors (musubi names) into adapters; strict. A missing alpha counts as the rank.

    Raises:
        CheckpointError: see `fitting`.
    """
    adapters.load_state_dict(fitting(adapters, tensors, what))


def fitting(adapters: AdapterSet, tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """A file's tensors as float32 in the shapes of adapters, which may be without storage.

    Raises:
        CheckpointError: listing every missing, unexpected or mis-shaped key.
    """
    own = adapters.state_dict()
    given = dict(tensors)
    for name, adapter in adapters.named_children():
        assert isinstance(adapter, Adapter)
        sized = "alpha" in ADAPTERS[type_of_parts(adapter.state_dict()) or NORM].uses
        for leaf, value in (
            ("alpha", torch.tensor(float(adapter.rank if sized else 0))),
            ("on_input", own.get(f"{name}.on_input")),
        ):
            if f"{name}.{leaf}" in own and value is not None and any(key.startswith(f"{name}.") for key in given):
                given.setdefault(f"{name}.{leaf}", value)
    problems = []
    missing, unexpected = [k for k in own if k not in given], [k for k in given if k not in own]
    shapes = [
        f"{key} is {list(given[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in given and given[key].numel() != own[key].numel()
    ]
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if keys:
            problems.append(f"{len(keys)} keys {kind}: {', '.join(keys)}")
    if problems:
        raise CheckpointError(
            f"{what} does not fit these adapters: {'; '.join(problems)}. adapter.rank_from_weights = true takes layers, ranks and alpha "
            "from the file"
        )
    return {key: given[key].to(own[key].dtype).view(own[key].shape) for key in own}


def save_adapter(
    path: Path,
    adapters: nn.Module | Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write adapters, with hashes of the content as sd-scripts makes them.

    Args:
        adapters: the set, whose names are musubi's, or tensors under any names.
        metadata: of the header; hashes in it are made anew.
        dtype: of all tensors; None keeps them as they are.
    """
    state = adapters.state_dict() if isinstance(adapters, nn.Module) else adapters
    tensors = {key: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for key, tensor in state.items()}
    complete = {"format": "pt", **(metadata or {})}
    complete |= content_hashes(tensors, {k: v for k, v in complete.items() if k.startswith("ss_")})
    replace_file(path, partial(save_tensors, tensors, metadata=complete))


def content_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """``sshs_model_hash`` and ``sshs_legacy_hash`` of the bytes that a file of these tensors would hold."""
    data = save(dict(tensors), metadata=dict(metadata) or None)
    start = 8 + int.from_bytes(data[:8], "little")
    legacy = data[0x100000 : 0x100000 + 0x10000]
    return {
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }
