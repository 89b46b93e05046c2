"""Putting adapters on a model and taking them off.

An adapted layer stays the same object with the same parameter names; its class becomes one whose `forward` adds the change.
The adapters live in one `AdapterSet`, a module of its own, whose state dict has the names of the file.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from musubi_tuner.adapter_types import ADAPTERS, NORM
from musubi_tuner.adapters.base import Adapter
from musubi_tuner.adapters.norm import NormScale, scale_name
from musubi_tuner.config.patterns import LayerSettings, compile_pattern, matches, resolve
from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.errors import ConfigError
from musubi_tuner.memory.frozen_linear import FrozenLinear
from musubi_tuner.models.spec import AdapterTargets
from musubi_tuner.randomness import generator

FILE_PREFIX = "lora_unet_"
ALWAYS_EXCLUDED = r".*norm.*"
_NO_NUMBERS: Mapping[str, Any] = {}


def file_name(path: str) -> str:
    """Name of a module's adapter in a file: ``double_blocks.0.img_attn.qkv`` -> ``lora_unet_double_blocks_0_img_attn_qkv``."""
    return FILE_PREFIX + path.replace(".", "_")


def target_paths(model: nn.Module, targets: AdapterTargets) -> list[str]:
    """Paths of all Linear layers of a model that can be adapted, in order; those outside of its blocks last."""
    known = {path for path, _ in model.named_modules()}
    return _in_blocks(model, targets.layers) + [path for path in targets.outside if path in known]


def convolution_paths(model: nn.Module, targets: AdapterTargets) -> list[str]:
    """Paths of all convolutions of a model that can be adapted, in order."""
    return _in_blocks(model, targets.convolutions)


def _in_blocks(model: nn.Module, layers: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Paths of layers in all blocks of a model, from block list -> their names in a block."""
    return [
        f"{blocks}.{index}.{layer}"
        for blocks, names in layers.items()
        for index in range(len(getattr(model, blocks)))
        for layer in names
    ]


def adaptable_paths(model: nn.Module, targets: AdapterTargets) -> list[str]:
    """Paths of everything in a model that an adapter file may change."""
    return [*target_paths(model, targets), *convolution_paths(model, targets), *norm_paths(model, targets)]


def norm_paths(model: nn.Module, targets: AdapterTargets) -> list[str]:
    """Paths of all norms in the blocks of a model whose scale can be changed, in order."""
    blocks = tuple(f"{name}." for name in targets.layers)
    return [path for path, norm in model.named_modules() if path.startswith(blocks) and scale_name(norm)]


@dataclass(frozen=True)
class Placement:
    """One adapted layer.

    Attributes:
        lr_scale: factor of the learning rate. weight_decay: None = that of the optimizer.
        type: of the adapter; "" = that of the settings. own: arguments of its class that only a file tells.
    """

    path: str
    rank: int
    alpha: float
    lr_scale: float = 1.0
    dropout: float = 0.0
    weight_decay: float | None = None
    type: str = ""
    own: Mapping[str, Any] = field(default_factory=dict, hash=False)


def place_adapters(paths: list[str], targets: AdapterTargets, settings: AdapterSection) -> list[Placement]:
    """Which layers get an adapter, and of what size.

    As in musubi-tuner, patterns must match whole paths, a user's ``exclude`` replaces the family's (unless
    ``keep_default_excludes``), and ``include`` rescues what was excluded; ``only`` restricts. A layer of a kind that is not
    adapted counts as excluded. A target with ``enabled = true`` rescues as well. Sizes: [adapter], then its patterns of
    ranks and alphas, then its targets.

    Raises:
        ConfigError: for a pattern that matches nothing, or when no layer is left.
    """
    own = list(settings.exclude) if settings.exclude is not None else []
    excludes = own + (list(targets.exclude) if settings.exclude is None or settings.keep_default_excludes else [])
    patterns = {
        "exclude": own, "include": settings.include, "only": settings.only,
        "rank_patterns": list(settings.rank_patterns), "alpha_patterns": list(settings.alpha_patterns),
    }  # fmt: skip
    for key, expressions in patterns.items():
        for expression in expressions:
            if not any(re.fullmatch(expression, path) for path in paths):
                raise ConfigError(
                    f"adapter.{key}: {expression!r} matches no layer. Patterns must match a whole path, such as {paths[0]}"
                )
    # A preset is made for one depth; what it says of blocks that a smaller model lacks is no mistake.
    preset = targets.presets.get(settings.preset or "", {}).get("targets", [])
    own_targets = {target.pattern for target in settings.targets} - {target["pattern"] for target in preset}
    for pattern in own_targets:
        if not any(matches(pattern, path) for path in paths):
            raise ConfigError(
                f"adapter.targets: {pattern!r} matches no layer. Patterns must match a whole path, such as {paths[0]}; "
                "* is one part of it, ** any number"
            )
    kinds = [targets.kinds[kind] for kind in (targets.usual if settings.kinds is None else settings.kinds)]
    placements = []
    ranks, alphas = (by_block(key, getattr(settings, key), paths) for key in ("block_rank", "block_alpha"))
    named = _named_outside(paths, targets, settings)
    for path in paths:
        if path in targets.outside and path not in named:
            continue
        of_kind = any(matches(kind, path) for kind in kinds)
        unwanted = not of_kind if targets.kinds else bool(re.fullmatch(ALWAYS_EXCLUDED, path))
        excluded = (unwanted or _any_match(excludes, path)) and not _any_match(settings.include, path)
        layer, asked = layer_settings(path, settings, ranks, alphas)
        if (excluded and not asked) or (settings.only and not _any_match(settings.only, path)):
            continue
        if layer.enabled and layer.rank:
            rank, alpha = layer.folded
            if settings.rs_lora:  # alpha / sqrt(rank), in files whose readers divide by the rank
                alpha = (alpha or rank) * rank**0.5
            only_here: dict[str, Any] = {}
            if settings.type == "ia3":
                only_here["on_input"] = bool(re.fullmatch(targets.on_input, path))
            placements.append(
                Placement(
                    path, rank, alpha, layer.lr_scale, layer.dropout, layer.weight_decay, settings.type, only_here
                )
            )
    if not placements:
        raise ConfigError(
            "adapter: no layer is left to adapt; look at adapter.kinds, exclude, only, rank_patterns and targets"
        )
    return placements


def _named_outside(paths: Sequence[str], targets: AdapterTargets, settings: AdapterSection) -> set[str]:
    """Layers outside of the blocks that include or an enabling target means by a pattern of their own: one that matches none in a block."""
    inside = [path for path in paths if path not in targets.outside]
    tests = [re.compile(pattern).fullmatch for pattern in settings.include]
    tests += [compile_pattern(target.pattern).fullmatch for target in settings.targets if target.enabled]
    own = [test for test in tests if not any(map(test, inside))]
    return {path for path in paths if path in targets.outside and any(test(path) for test in own)}


def placements_of(model: nn.Module, targets: AdapterTargets, settings: AdapterSection) -> list[Placement]:
    """Which layers and norms of a model get an adapter; see `place_adapters`."""
    placements = place_adapters(target_paths(model, targets), targets, settings)
    if settings.conv_rank and settings.type == "locon":
        alpha = settings.conv_rank / 2 if settings.conv_alpha is None else settings.conv_alpha
        paths = convolution_paths(model, targets)
        placements += [
            Placement(path, settings.conv_rank, alpha, settings.lr_scale, settings.dropout, type="locon")
            for path in paths
        ]
    if settings.train_norm:
        norms = norm_paths(model, targets)
        placements += [Placement(path, 1, 0.0, settings.lr_scale, type=NORM) for path in norms]
    return placements


def layer_settings(
    path: str,
    settings: AdapterSection,
    ranks: Mapping[str, int] = _NO_NUMBERS,
    alphas: Mapping[str, float] = _NO_NUMBERS,
) -> tuple[LayerSettings, bool]:
    """What [adapter] says about a layer, and whether a target asks for it; what does not act on the type is left out.

    Args:
        ranks, alphas: of blocks that have their own; see `by_block`.
    """
    uses = ADAPTERS[settings.type].uses
    rank, alpha = settings.rank, settings.alpha if settings.alpha is not None else settings.rank / 2
    if "rank" in uses:
        rank = next((r for p, r in settings.rank_patterns.items() if re.fullmatch(p, path)), rank)
        rank = ranks.get(block_of(path), rank)
    if "alpha" in uses:
        alpha = next((a for p, a in settings.alpha_patterns.items() if re.fullmatch(p, path)), alpha)
        alpha = alphas.get(block_of(path), alpha)
    depth = settings.depth if "depth" in uses else 1
    base = LayerSettings(rank, alpha, settings.lr_scale, depth, settings.dropout if "dropout" in uses else 0.0)
    idle = {"rank", "alpha", "depth", "dropout"}.difference(uses)
    targets = [
        (target.pattern, {name: value for name, value in target.fields().items() if name not in idle})
        for target in settings.targets
    ]
    return resolve(path, base, targets)


Number = TypeVar("Number", int, float)


def by_block(key: str, numbers: Mapping[str, Number] | Sequence[Number], paths: Sequence[str]) -> dict[str, Number]:
    """Block -> its number of adapter.block_rank or block_alpha.

    Args:
        key: of [adapter]. numbers: one for each block, or a table with blocks such as ``single_blocks.3``, ``double.0-7``.
        paths: of all layers that can be adapted, in order.

    Raises:
        ConfigError: for a list of another length (naming the right one), or a block that does not exist.
    """
    blocks = list(dict.fromkeys(block_of(path) for path in paths if re.fullmatch(r"\w+\.\d+\..*", path)))
    counts = Counter(block.partition(".")[0] for block in blocks)
    if not isinstance(numbers, Mapping):
        if len(numbers) != len(blocks):
            parts = " + ".join(f"{count} {name}" for name, count in counts.items())
            raise ConfigError(f"adapter.{key}: has {len(numbers)} values, this model needs {len(blocks)} ({parts})")
        return dict(zip(blocks, numbers, strict=True))
    found: dict[str, Number] = {}
    for name, number in numbers.items():
        match = re.fullmatch(r"(\w+)\.(\d+)(?:-(\d+))?", name)
        first, last = (int(match[2]), int(match[3] or match[2])) if match else (0, -1)
        wanted = (
            [f"{match[1].removesuffix('_blocks')}_blocks.{index}" for index in range(first, last + 1)] if match else []
        )
        if not wanted or not set(wanted) <= set(blocks):
            raise ConfigError(f"adapter.{key}: {name!r} names no blocks of this model; they are {_ranges(counts)}")
        found |= dict.fromkeys(wanted, number)
    return found


def _ranges(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}.0-{count - 1}" for name, count in counts.items())


def block_of(path: str) -> str:
    """Name of the block of a layer, as adapter.block_rank has it: ``single_blocks.3.linear1`` -> ``single_blocks.3``."""
    return ".".join(path.split(".")[:2])


def _any_match(expressions: list[str], path: str) -> bool:
    return any(re.fullmatch(expression, path) for expression in expressions)


class AdapterSet(nn.Module):
    """The adapters of a model by file name, and the layers they are on.

    The state dict has the keys of the file, such as ``lora_unet_<path>.lora_down.weight``; see `files.named_for_files`.

    Attached, the changes can be merged into the weights, which saves their time while drawing. The weights from before are kept
    beside and put back, so merging and unmerging leaves every bit as it was. While merged, nothing is trained.

    Attributes:
        multiplier: strength of all changes. strength: factor of it that this set alone has.
    """

    def __init__(
        self, adapters: Mapping[str, Adapter], rates: Mapping[str, tuple[float, float | None]] | None = None
    ) -> None:
        """Collect adapters.

        Args:
            rates: path -> factor of the learning rate, and weight decay (None = the optimizer's); absent = 1 and None.
        """
        super().__init__()
        self.strength = self.multiplier = 1.0
        self._kept: dict[str, _Merged] = {}
        self.paths = {file_name(path): path for path in adapters}
        self.rates = {file_name(path): rate for path, rate in (rates or {}).items()}
        for path, adapter in adapters.items():
            self.add_module(file_name(path), adapter)

    def items(self) -> Iterator[tuple[str, Adapter]]:
        """Layer path and adapter."""
        for name, adapter in self.named_children():
            assert isinstance(adapter, Adapter)
            yield self.paths[name], adapter

    def parameter_rates(self) -> dict[str, tuple[float, float | None]]:
        """Parameter name -> factor of its learning rate, and its weight decay (None = the optimizer's)."""
        return {
            name: self.rates.get(name.partition(".")[0], (1.0, None)) for name, parameter in self.named_parameters()
        }

    def dotted_names(self) -> dict[str, str]:
        """Parameter name -> the path of its layer with the rest of its name."""
        parts = {name: name.partition(".") for name, _ in self.named_parameters()}
        return {name: f"{self.paths[layer]}.{leaf}" for name, (layer, _, leaf) in parts.items()}

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of all changes: the factor of their alpha / rank; 0 turns them off."""
        self.multiplier = multiplier
        self._apply_strength()

    @property
    def merged(self) -> bool:
        """Whether the changes are in the weights."""
        return bool(self._kept)

    def merge(self, model: nn.Module) -> None:
        """Add the changes to the weights of the model that they are attached to, in float32, rounded once.

        Quantised weights are held in the compute dtype until `unmerge`, beside their stored form.

        Raises:
            RuntimeError: if they are attached to another model, or merged already.
            ConfigError: naming a layer whose weight is streamed from main memory.
        """
        if getattr(model, "adapters", None) is not self:
            raise RuntimeError("these adapters are not attached to this model; attach them first")
        if self.merged:
            raise RuntimeError("the adapters are merged already; unmerge them first")
        layers = {path: model.get_submodule(path) for path, _ in self.items()}
        self._kept = {path: _Merged(layer, path) for path, layer in layers.items()}
        self._apply_strength()

    def unmerge(self) -> None:
        """Put the weights back that were there before `merge`.

        Raises:
            RuntimeError: if nothing is merged.
        """
        if not self.merged:
            raise RuntimeError("the adapters are not merged")
        for kept in self._kept.values():
            kept.restore()
        self._kept = {}
        self._apply_strength()

    @torch.no_grad()
    def _apply_strength(self) -> None:
        for path, adapter in self.items():
            adapter.multiplier, adapter.active = self.strength * self.multiplier, not self.merged
            if self.merged:
                kept, weight = self._kept[path], self._kept[path].weight
                kept.put(adapter.changed(weight.float()).to(weight.dtype))

    @torch.no_grad()
    def limit_norms(self, max_norm: float) -> dict[str, Tensor]:
        """Apply `Adapter.limit_norm` to all that can; number scaled, mean and maximum of the norms, on the device."""
        found = [adapter.limit_norm(max_norm) for _, adapter in self.items() if adapter.factors()]
        norms = torch.stack([norm for norm, _ in found])
        return {
            "max_norm/keys_scaled": torch.stack([over for _, over in found]).sum(),
            "max_norm/average_key_norm": norms.mean(),
            "max_norm/max_key_norm": norms.max(),
        }


class _Merged:
    """A layer whose weight is replaced for a while; quantised ones are plain as long."""

    def __init__(self, layer: nn.Module, path: str) -> None:
        """Keep the weight.

        Raises:
            ConfigError: if it is streamed from main memory.
        """
        self.layer = layer
        self.name = scale_name(layer) or "weight"
        if not isinstance(layer, FrozenLinear):
            self.weight = layer._parameters[self.name].data  # type: ignore[union-attr]
            return
        if layer.residence is not None or layer.stored is None:
            raise ConfigError(
                f"adapter: {path} is streamed from main memory, so nothing can be added to its weight; keep the adapter "
                "attached, or merge its file before the weights are stored (adapter.merge)"
            )
        self.form = layer.form()
        self.weight = layer.stored if layer.storage == "plain" else layer.dense_weight(layer.dtype)

    def put(self, weight: Tensor) -> None:
        """Compute with another weight."""
        if isinstance(self.layer, FrozenLinear):
            self.layer.take_form((weight, None, "plain", "no"))
        else:
            self.layer._parameters[self.name].data = weight  # type: ignore[union-attr]

    def restore(self) -> None:
        """Put back what was there, bit for bit."""
        if isinstance(self.layer, FrozenLinear):
            self.layer.take_form(self.form)
        else:
            self.put(self.weight)


def make_adapters(model: nn.Module, placements: list[Placement], settings: AdapterSection, seed: int = 0) -> AdapterSet:
    """Untrained adapters at their placements; each layer's start depends on the seed and its path alone.

    Raises:
        ConfigError: naming a layer for which the type does not work.
    """
    adapters = {}
    for placement in placements:
        layer, kind = model.get_submodule(placement.path), placement.type or settings.type
        columns, rows = _features(layer, placement.path)
        record = ADAPTERS[kind]
        options: dict[str, Any] = {"dropout": placement.dropout, "rank_dropout": settings.rank_dropout}
        options = {name: value for name, value in options.items() if name in record.uses}
        own = {**(placement.own or own_arguments(kind, settings)), **_way_of(layer)}
        if "kernel" in own:
            if kind not in ("lora", "locon"):
                raise ConfigError(
                    f"adapter: {placement.path} is a convolution, which type {kind} does not take; locon does"
                )
            record = ADAPTERS["locon"]
        try:
            adapter = record.load()(
                columns,
                rows,
                placement.rank,
                placement.alpha,
                **{**options, **own, "module_dropout": settings.module_dropout},
            )
        except ValueError as problem:
            raise ConfigError(f"adapter: {placement.path}: {problem}") from problem
        adapter.initialize(generator(seed, "adapter", placement.path))
        if adapter.starts and not (weight := _weight_below(layer)).is_meta:
            adapter.begin_from(weight, fresh=True)
        adapters[placement.path] = adapter
    return AdapterSet(
        adapters, {placement.path: (placement.lr_scale, placement.weight_decay) for placement in placements}
    )


OWN = ("lokr_factor", "lokr_decompose_both", "lokr_full", "block_size", "constraint", "rescaled")
"""Settings of [adapter] that are arguments of some classes, there without the name of the type."""


def own_arguments(kind: str, settings: AdapterSection) -> dict[str, Any]:
    """Arguments of a type's class that [adapter] has settings for."""
    return {name.removeprefix("lokr_"): getattr(settings, name) for name in OWN if name in ADAPTERS[kind].uses}


def _way_of(layer: nn.Module) -> dict[str, Any]:
    """How a convolution goes over its input; empty for other layers."""
    if not isinstance(layer, nn.Conv2d):
        return {}
    way = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return {"kernel": tuple(layer.kernel_size), "way": way}


def _features(layer: nn.Module, path: str) -> tuple[int, int]:
    """Columns and rows of a layer; twice the size of a norm."""
    if isinstance(layer, nn.Linear | FrozenLinear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return layer.in_channels, layer.out_channels
    name = scale_name(layer)
    if name is None:
        raise ConfigError(
            f"adapter: {path} is a {type(layer).__name__}; only Linear layers, convolutions without groups, and scales of norms can be adapted"
        )
    size = layer._parameters[name].numel()  # type: ignore[union-attr]
    return size, size


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Shape of the weight of a layer [out, in], or of the scale of a norm [size].

    Raises:
        ConfigError: for a module that cannot be adapted.
    """
    columns, rows = _features(layer, type(layer).__name__)
    if isinstance(layer, nn.Conv2d):
        return tuple(layer.weight.shape)
    return (rows, columns) if isinstance(layer, nn.Linear | FrozenLinear) else (rows,)


@torch.no_grad()
def _weight_below(layer: nn.Module) -> Tensor:
    """The weight [out, in] of a layer in float32, with the changes that are attached already."""
    weight: Any = layer.dense_weight(torch.float32) if isinstance(layer, FrozenLinear) else layer.weight
    weight = weight.float()
    for adapter in vars(layer).get("adapters", ()):
        weight = adapter.changed(weight)
    return weight


def attach(model: nn.Module, *sets: AdapterSet) -> None:
    """Let layers show their changes, those of later sets on top of earlier ones.

    The first set becomes the submodule ``adapters`` of the model, the others the list ``more_adapters``.

    Raises:
        RuntimeError: if the model has adapters already.
    """
    if hasattr(model, "adapters"):
        raise RuntimeError("the model has adapters already; detach them first")
    for adapters in sets:
        for path, adapter in adapters.items():
            layer: Any = model.get_submodule(path)
            below = vars(layer).get("adapters", ())
            if not below:
                first = _AdaptedNorm if scale_name(layer) else _Adapted
                layer.__class__ = _adapted(first, type(layer))  # type: ignore[arg-type]  # classes are hashable
            elif adapter.starts:
                adapter.begin_from(_weight_below(layer), fresh=False)
            vars(layer)["adapters"] = (*below, adapter)  # not as submodules: names in the state dict stay as they are
    model.adapters = sets[0]
    if len(sets) > 1:
        model.more_adapters = nn.ModuleList(sets[1:])


class _Adapted(nn.Module):
    """First base of the class of an adapted layer. Alike layers share their class, so compilers see them as alike."""

    adapters: tuple[Adapter, ...]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self._through(x, len(self.adapters))

    def _through(self, x: Tensor, count: int) -> Tensor:
        """The layer below so many of its adapters."""
        if not count:
            return super().forward(x)
        adapter = self.adapters[count - 1]
        if not adapter.active:
            return self._through(x, count - 1)
        return adapter.apply_to(x, lambda y: self._through(y, count - 1), self._bias)

    def _bias(self) -> Tensor | None:
        return self.fetch("bias") if isinstance(self, FrozenLinear) else self.bias  # type: ignore[return-value]


class _AdaptedNorm(nn.Module):
    """First base of the class of a norm whose scale is changed: its scale is read with the changes."""

    adapters: tuple[NormScale, ...]

    def _shown(self, name: str) -> Tensor:
        scale: Any = self._parameters[name]
        for adapter in self.adapters:
            if adapter.active:
                scale = adapter.shown(scale)
        return scale

    @property
    def weight(self) -> Tensor:
        """The scale of norms that call it so."""
        return self._shown("weight")

    @property
    def scale(self) -> Tensor:
        """The scale of norms that call it so."""
        return self._shown("scale")


@cache
def _adapted(first: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{base.__name__}", (first, base), {})


def detach(model: nn.Module) -> AdapterSet:
    """Take all adapters off, unmerging them first; the model is as before they were attached, the first set is returned.

    Raises:
        RuntimeError: if there are none.
    """
    adapters = getattr(model, "adapters", None)
    if not isinstance(adapters, AdapterSet):
        raise RuntimeError("the model has no adapters")
    if adapters.merged:
        adapters.unmerge()
    for each in (adapters, *getattr(model, "more_adapters", ())):
        for path, _ in each.items():
            layer: Any = model.get_submodule(path)
            if vars(layer).pop("adapters", None):
                layer.__class__ = type(layer).__bases__[1]
    del model.adapters
    if hasattr(model, "more_adapters"):
        del model.more_adapters
    return adapters
