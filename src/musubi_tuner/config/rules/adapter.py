"""Rules of [adapter]."""

import re
from collections.abc import Iterator
from typing import Any

from musubi_tuner.adapter_types import ADAPTERS
from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean, error, warning
from musubi_tuner.config.patterns import compile_pattern
from musubi_tuner.config.rules.effect import NO_EFFECT
from musubi_tuner.config.rules.rule import Rules
from musubi_tuner.config.run_config import RunConfig
from musubi_tuner.errors import ConfigError

ADAPTER = Rules()
rule = ADAPTER.rule
USUAL_ALPHA = 4
"""Multiple of the rank above which alpha is rarely meant."""


@rule("V44", "adapter.type adapter.rank_from_weights adapter.init_from")
def _ranks_of_a_file(config: RunConfig) -> Iterator[Diagnostic]:
    adapter = config.adapter
    if adapter.type == "none" or not adapter.rank_from_weights:
        return
    if adapter.init_from is None:
        text = "needs adapter.init_from, the file to read the ranks from"
        yield error("V44", "adapter.rank_from_weights", text, "adapter.init_from")
    for index, target in enumerate(adapter.targets if "adapter.targets" in config.set_keys() else []):
        for name in ("rank", "alpha", "depth", "enabled"):
            if name in target.fields():
                text = "has no effect because adapter.rank_from_weights is true"
                yield warning(NO_EFFECT, f"adapter.targets[{index}].{name}", text, "adapter.rank_from_weights")


@rule(NO_EFFECT, "adapter.type adapter.preset adapter.rank_from_weights")
def _preset_is_used(config: RunConfig) -> Iterator[Diagnostic]:
    adapter = config.adapter
    preset = config.spec.adapters.presets.get(adapter.preset or "", {})
    given = [f"adapter.{name}" for name in preset]
    same = all(getattr(adapter, name) == value for name, value in preset.items() if name != "targets")
    if (
        adapter.type != "none"
        and given
        and not same
        and not adapter.rank_from_weights
        and set(given) <= set(config.set_keys())
    ):
        text = f"has no effect because everything it sets is also set explicitly: {', '.join(given)}"
        yield warning(NO_EFFECT, "adapter.preset", text, *given)


@rule("V47 NA03", "adapter.type adapter.dropout adapter.rank_dropout adapter.loraplus_lr_ratio adapter.targets")
def _acts_on_type(config: RunConfig) -> Iterator[Diagnostic]:
    adapter = config.adapter
    if adapter.type == "none":
        return
    ways = {
        "dropout": "which has no rank activations to drop; use adapter.module_dropout",
        "rank_dropout": "which has no ranks to drop; use adapter.module_dropout",
        "loraplus_lr_ratio": "which has no up matrix; use optimizer.group_lr",
    }
    for name, way in ways.items():
        if getattr(adapter, name) and name not in ADAPTERS[adapter.type].uses:
            off: Any = None if name == "loraplus_lr_ratio" else 0.0
            text = f'does not act on type "{adapter.type}", {way}'
            yield error("V47", f"adapter.{name}", text, "adapter.type", fix=[(f"adapter.{name}", off)])
    for index, target in enumerate(adapter.targets if "adapter.targets" in config.set_keys() else []):
        for name in ("dropout", "rank", "alpha", "depth"):
            if name not in target.fields() or name in ADAPTERS[adapter.type].uses:
                continue
            key = f"adapter.targets[{index}].{name}"
            if name == "dropout" and target.dropout:
                yield error("V47", key, f'does not act on type "{adapter.type}", {ways[name]}', "adapter.type")
            else:
                yield warning(NO_EFFECT, key, f'has no effect because adapter.type is "{adapter.type}"', "adapter.type")


@rule("V46", "adapter.type adapter.rank adapter.block_size")
def _blocks_of_ranks(config: RunConfig) -> Iterator[Diagnostic]:
    adapter = config.adapter
    if adapter.type == "dylora" and adapter.rank % adapter.block_size and not adapter.rank_from_weights:
        text = f"is {adapter.rank}, which is not a multiple of adapter.block_size = {adapter.block_size}"
        yield error("V46", "adapter.rank", text, "adapter.block_size", fix=[("adapter.block_size", 1)])


@rule("V49", "adapter.type adapter.conv_rank adapter.conv_alpha")
def _convolutions(config: RunConfig) -> Iterator[Diagnostic]:
    adapter = config.adapter
    if adapter.type == "none":
        return
    if adapter.conv_rank and not config.spec.adapters.convolutions and "conv_rank" in ADAPTERS[adapter.type].uses:
        text = f"is {adapter.conv_rank}, but {config.spec.title} has no convolutions; no layer is adapted by it"
        yield warning("V49", "adapter.conv_rank", text, fix=[("adapter.conv_rank", None)])
    if adapter.conv_alpha and not adapter.conv_rank:
        text = "has no effect because adapter.conv_rank is absent"
        yield warning("V49", "adapter.conv_alpha", text, "adapter.conv_rank")


@rule("V45", "adapter.type adapter.block_rank adapter.block_alpha model.geometry")
def _numbers_of_blocks(config: RunConfig) -> Iterator[Diagnostic]:
    adapter, counts = config.adapter, config.spec.adapters.blocks
    if adapter.type == "none" or config.get("model.geometry") or not counts:
        return
    for name in ("block_rank", "block_alpha"):
        numbers = getattr(adapter, name)
        if isinstance(numbers, list) and len(numbers) != sum(counts.values()):
            parts = " + ".join(f"{count} {blocks}" for blocks, count in counts.items())
            text = f"has {len(numbers)} values, {config.spec.title} needs {sum(counts.values())} ({parts})"
            yield error("V45", f"adapter.{name}", text)


@rule("V86", "adapter.type adapter.merge adapter.merge_multipliers")
def _merged_files(config: RunConfig) -> Iterator[Diagnostic]:
    adapter = config.adapter
    if adapter.type != "none" and adapter.merge_multipliers and len(adapter.merge_multipliers) != len(adapter.merge):
        text = f"has {len(adapter.merge_multipliers)} values for {len(adapter.merge)} files in adapter.merge; give one for each file"
        yield error("V86", "adapter.merge_multipliers", text, "adapter.merge")


@rule("V50", "adapter.type adapter.rank adapter.alpha adapter.rank_from_weights")
def _strength(config: RunConfig) -> Iterator[Diagnostic]:
    adapter = config.adapter
    if adapter.type == "none" or adapter.rank_from_weights or adapter.alpha is None:
        return
    if adapter.alpha > USUAL_ALPHA * adapter.rank and "adapter.alpha" in config.set_keys():
        text = (
            f"is {adapter.alpha:g}, {adapter.alpha / adapter.rank:g} times adapter.rank = {adapter.rank}, and the adapter is scaled by "
            "that factor; usual values are half the rank up to the rank"
        )
        yield warning("V50", "adapter.alpha", text, "adapter.rank", fix=[("adapter.alpha", float(adapter.rank))])


@rule("V43 U04 U07", "adapter.type adapter.preset adapter.kinds adapter.include adapter.targets")
def _layers(config: RunConfig) -> Iterator[Diagnostic]:
    """Names of presets and kinds, and patterns of targets."""
    adapter, targets = config.adapter, config.spec.adapters
    if adapter.type == "none":
        return
    named = [("preset", adapter.preset, targets.presets)] if adapter.preset is not None else []
    for key, name, known in [*named, *(("kinds", kind, targets.kinds) for kind in adapter.kinds or [])]:
        if not known:
            yield error(
                "NA01",
                f"adapter.{key}",
                f"does not apply to {config.spec.title}, which has none; remove it",
                "model.arch",
            )
        elif name not in known:
            text = f"has '{name}', expected one of {', '.join(known)}.{did_you_mean(name, known)}"
            yield error("U04", f"adapter.{key}", text)
    if adapter.kinds == [] and not (adapter.include or any(target.enabled for target in adapter.targets)):
        yield error(
            "V43",
            "adapter.kinds",
            "is empty, so no layer would be adapted; name a kind, or remove the key",
            "adapter.include",
        )
    for index, target in enumerate(adapter.targets):
        try:
            compile_pattern(target.pattern)
        except ConfigError as problem:
            yield error("U03", f"adapter.targets[{index}].pattern", str(problem))
        if not target.fields():
            text = f"sets nothing for {target.pattern!r}; set rank, for example"
            yield error("U07", f"adapter.targets[{index}]", text)


@rule("U03", "adapter.type adapter.include adapter.exclude adapter.only adapter.rank_patterns adapter.alpha_patterns")
def _expressions(config: RunConfig) -> Iterator[Diagnostic]:
    adapter = config.adapter
    if adapter.type == "none":
        return
    expressions = {
        "include": adapter.include,
        "exclude": adapter.exclude or [],
        "only": adapter.only,
        "rank_patterns": list(adapter.rank_patterns),
        "alpha_patterns": list(adapter.alpha_patterns),
    }
    for name, patterns in expressions.items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as problem:
                yield error("U03", f"adapter.{name}", f"{pattern!r} is not a regular expression ({problem})")
    for pattern, rank in adapter.rank_patterns.items():
        if not 0 <= rank <= 1024:
            yield error("U03", "adapter.rank_patterns", f"{pattern!r} has rank {rank}, expected 0 (none) to 1024")
