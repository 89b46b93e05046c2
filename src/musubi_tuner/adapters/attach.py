"""Putting adapters on a model and taking them off.

An adapted layer stays the same object with the same parameter names; its class becomes one whose `forward` adds the change.
The adapters live in one `AdapterSet`, a module of its own, whose state dict has the names of the file.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.lora import LoRALinear
from musubi_tuner.config.patterns import LayerSettings, matches, resolve
from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.errors import ConfigError
from musubi_tuner.memory.frozen_linear import FrozenLinear
from musubi_tuner.models.spec import AdapterTargets
from musubi_tuner.randomness import generator

FILE_PREFIX = "lora_unet_"
ALWAYS_EXCLUDED = r".*norm.*"


def file_name(path: str) -> str:
    """Name of a module's adapter in a file: ``double_blocks.0.img_attn.qkv`` -> ``lora_unet_double_blocks_0_img_attn_qkv``."""
    return FILE_PREFIX + path.replace(".", "_")


def target_paths(model: nn.Module, targets: AdapterTargets) -> list[str]:
    """Paths of all layers of a model that can be adapted, in order."""
    return [
        f"{blocks}.{index}.{layer}"
        for blocks, layers in targets.layers.items()
        for index in range(len(getattr(model, blocks)))
        for layer in layers
    ]


@dataclass(frozen=True)
class Placement:
    """One adapted layer.

    Attributes:
        lr_scale: factor of the learning rate. weight_decay: None = that of the optimizer.
    """

    path: str
    rank: int
    alpha: float
    lr_scale: float = 1.0
    dropout: float = 0.0
    weight_decay: float | None = None


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
    for path in paths:
        of_kind = any(matches(kind, path) for kind in kinds)
        unwanted = not of_kind if targets.kinds else bool(re.fullmatch(ALWAYS_EXCLUDED, path))
        excluded = (unwanted or _any_match(excludes, path)) and not _any_match(settings.include, path)
        layer, asked = layer_settings(path, settings)
        if (excluded and not asked) or (settings.only and not _any_match(settings.only, path)):
            continue
        if layer.enabled and layer.rank:
            rank, alpha = layer.folded
            placements.append(Placement(path, rank, alpha, layer.lr_scale, layer.dropout, layer.weight_decay))
    if not placements:
        raise ConfigError(
            "adapter: no layer is left to adapt; look at adapter.kinds, exclude, only, rank_patterns and targets"
        )
    return placements


def layer_settings(path: str, settings: AdapterSection) -> tuple[LayerSettings, bool]:
    """What [adapter] says about a layer, and whether a target asks for it."""
    rank = next((r for p, r in settings.rank_patterns.items() if re.fullmatch(p, path)), settings.rank)
    default_alpha = settings.alpha if settings.alpha is not None else settings.rank / 2
    alpha = next((a for p, a in settings.alpha_patterns.items() if re.fullmatch(p, path)), default_alpha)
    base = LayerSettings(rank, alpha, settings.lr_scale, settings.depth, settings.dropout)
    return resolve(path, base, [(target.pattern, target.fields()) for target in settings.targets])


def _any_match(expressions: list[str], path: str) -> bool:
    return any(re.fullmatch(expression, path) for expression in expressions)


class AdapterSet(nn.Module):
    """The adapters of a model by file name, and the layers they are on.

    The state dict has the keys of the file: ``lora_unet_<path>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``.

    Attached, the changes can be merged into the weights, which saves their time while drawing. The weights from before are kept
    beside and put back, so merging and unmerging leaves every bit as it was. While merged, nothing is trained.

    Attributes:
        multiplier: strength of all changes.
    """

    def __init__(
        self, adapters: Mapping[str, LoRALinear], rates: Mapping[str, tuple[float, float | None]] | None = None
    ) -> None:
        """Collect adapters.

        Args:
            rates: path -> factor of the learning rate, and weight decay (None = the optimizer's); absent = 1 and None.
        """
        super().__init__()
        self.multiplier = 1.0
        self._kept: dict[str, _Merged] = {}
        self.paths = {file_name(path): path for path in adapters}
        self.rates = {file_name(path): rate for path, rate in (rates or {}).items()}
        for path, adapter in adapters.items():
            self.add_module(file_name(path), adapter)

    def items(self) -> Iterator[tuple[str, LoRALinear]]:
        """Layer path and adapter."""
        for name, adapter in self.named_children():
            assert isinstance(adapter, LoRALinear)
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
            adapter.multiplier, adapter.active = self.multiplier, not self.merged
            if self.merged:
                kept, weight = self._kept[path], self._kept[path].weight
                changed = (weight.float() + adapter.delta().to(weight.device)).to(weight.dtype)
                kept.put(changed)

    @torch.no_grad()
    def limit_norms(self, max_norm: float) -> dict[str, Tensor]:
        """Apply `LoRALinear.limit_norm` to all; number scaled, mean and maximum of the norms, on the device."""
        found = [adapter.limit_norm(max_norm) for _, adapter in self.items()]
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
        if not isinstance(layer, FrozenLinear):
            assert isinstance(layer.weight, nn.Parameter)
            self.weight = layer.weight.data
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
            assert isinstance(self.layer.weight, nn.Parameter)
            self.layer.weight.data = weight

    def restore(self) -> None:
        """Put back what was there, bit for bit."""
        if isinstance(self.layer, FrozenLinear):
            self.layer.take_form(self.form)
        else:
            self.put(self.weight)


def make_adapters(model: nn.Module, placements: list[Placement], settings: AdapterSection, seed: int = 0) -> AdapterSet:
    """Untrained adapters at their placements; each layer's start depends on the seed and its path alone."""
    adapters = {}
    for placement in placements:
        layer = model.get_submodule(placement.path)
        adapter = LoRALinear(
            *_features(layer, placement.path),
            placement.rank,
            placement.alpha,
            dropout=placement.dropout,
            rank_dropout=settings.rank_dropout,
            module_dropout=settings.module_dropout,
        )
        adapter.initialize(generator(seed, "adapter", placement.path))
        adapters[placement.path] = adapter
    return AdapterSet(
        adapters, {placement.path: (placement.lr_scale, placement.weight_decay) for placement in placements}
    )


def _features(layer: nn.Module, path: str) -> tuple[int, int]:
    if not isinstance(layer, nn.Linear | FrozenLinear):
        raise ConfigError(f"adapter: {path} is a {type(layer).__name__}; only Linear layers can be adapted")
    return layer.in_features, layer.out_features


def attach(model: nn.Module, adapters: AdapterSet) -> None:
    """Let layers add their changes. The adapters become the submodule ``adapters`` of the model.

    Raises:
        RuntimeError: if the model has adapters already.
    """
    if hasattr(model, "adapters"):
        raise RuntimeError("the model has adapters already; detach them first")
    for path, adapter in adapters.items():
        layer: Any = model.get_submodule(path)
        layer.__class__ = _adapted(type(layer))  # type: ignore[arg-type]  # classes are hashable
        vars(layer)["adapter"] = adapter  # not as a submodule: names in the state dict stay as they are
    model.adapters = adapters


class _Adapted(nn.Module):
    """First base of the class of an adapted layer. Alike layers share their class, so compilers see them as alike."""

    adapter: LoRALinear

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        out = super().forward(x)
        if not self.adapter.active:
            return out
        return (out + self.adapter(x)).to(out.dtype)


@cache
def _adapted(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{base.__name__}", (_Adapted, base), {})


def detach(model: nn.Module) -> AdapterSet:
    """Take the adapters off, unmerging them first; the model is as before they were attached.

    Raises:
        RuntimeError: if there are none.
    """
    adapters = getattr(model, "adapters", None)
    if not isinstance(adapters, AdapterSet):
        raise RuntimeError("the model has no adapters")
    if adapters.merged:
        adapters.unmerge()
    for path, _ in adapters.items():
        layer: Any = model.get_submodule(path)
        layer.__class__ = type(layer).__bases__[1]
        del vars(layer)["adapter"]
    del model.adapters
    return adapters
