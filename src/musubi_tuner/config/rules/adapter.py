"""Rules of [adapter]."""

import re
from collections.abc import Iterator

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
