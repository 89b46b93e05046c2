"""Patterns of module paths, and the settings that layers get through them. Torch-free.

    single_blocks.*.mlp.*          * is one part of a path
    single_blocks.[20-24].**       ** is any number of parts; [a-b] a range of numbers, both ends included
    double_blocks.[0,3,7].attn.*   a list of numbers or names, which may hold ranges
    single_blocks.[5].attn.qkv     one number

In files of the published TinyFlux trainer a * is a part of one, so ** is one part of two characters or more, and a single [5]
matches nothing; their settings are read as they acted there.

A pattern must match a whole path. Settings of a layer: the defaults, then every matching target in order, a later one
winning field by field; an entry of its own replaces all of it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from musubi_tuner.errors import ConfigError

MOST_NUMBERS = 10_000
"""Longest range that a pattern may name."""
NOTHING = "(?!)"
"""Regular expression that matches nothing."""


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches a whole path.

    Raises:
        ConfigError: for a pattern that cannot be read.
    """
    return compile_pattern(pattern).fullmatch(path) is not None


def matches_published(pattern: str, path: str) -> bool:
    """Whether a pattern in a file of the published trainer matches a whole path there.

    Raises:
        ConfigError: for a pattern that cannot be read.
    """
    return compile_published(pattern).fullmatch(path) is not None


@cache
def compile_published(pattern: str) -> re.Pattern[str]:
    """A pattern of the published language as a regular expression.

    Raises:
        ConfigError: for a pattern that cannot be read.
    """
    if "[" in (rest := re.sub(r"\[[^\[\]]*\]", "", pattern)) or "]" in rest:
        return re.compile(NOTHING)
    expression = ""
    for literal, brackets, star in re.findall(r"([^\[\]*]+)|\[([^\[\]]*)\]|(\*)", pattern):
        if literal or star:
            expression += re.escape(literal) if literal else r"[^.]+"
        else:
            expression += _choices(brackets, pattern) if re.search("[-,]", brackets) else NOTHING
    return re.compile(expression)


@cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression.

    Raises:
        ConfigError: for a pattern that cannot be read.
    """
    parts = pattern.split(".")
    if "" in parts:
        raise ConfigError(f"{pattern!r} has an empty part; separate the parts of a path by one dot")
    expression, separator = "", ""
    for index, part in enumerate(parts):
        if part != "**":
            expression += separator + _part(part, pattern)
            separator = r"\."
        elif index == len(parts) - 1:
            expression += r"(?:\.[^.]+)*" if separator else r"[^.]+(?:\.[^.]+)*"
        else:
            expression += separator + r"(?:[^.]+\.)*"
            separator = ""
    return re.compile(expression)


def _part(part: str, pattern: str) -> str:
    """Regular expression of one part between dots."""
    if "**" in part:
        raise ConfigError(f"{pattern!r}: ** stands for whole parts, as in single_blocks.**")
    expression = ""
    for literal, brackets, star in re.findall(r"([^\[\]*]+)|\[([^\[\]]*)\]|(\*)", part):
        expression += re.escape(literal) if literal else r"[^.]+" if star else _choices(brackets, pattern)
    if part.count("[") != part.count("]") or re.search(r"\][^\[]*\]|^[^\[]*\]|\[[^\]]*\[|\[[^\]]*$", part):
        raise ConfigError(f"{pattern!r}: a bracket is not closed; expected [2], [2-5] or [2,4,7]")
    return expression


def _choices(brackets: str, pattern: str) -> str:
    """Regular expression of what stands in brackets."""
    found: list[str] = []
    for item in (item.strip() for item in brackets.split(",")):
        ends = re.fullmatch(r"(\d+)\s*-\s*(\d+)", item)
        if ends is None and not re.fullmatch(r"\w+", item):
            raise ConfigError(f"{pattern!r}: [{brackets}] is not a list or range; expected [2], [2-5] or [2,4,7]")
        if ends is None:
            found.append(item)
            continue
        first, last = int(ends[1]), int(ends[2])
        if not first <= last < first + MOST_NUMBERS:
            raise ConfigError(f"{pattern!r}: [{brackets}] must be an ascending range of at most {MOST_NUMBERS} numbers")
        found += [str(number) for number in range(first, last + 1)]
    return f"(?:{'|'.join(found)})"


@dataclass(frozen=True)
class LayerSettings:
    """What an adapter of one layer is like; see the keys of [adapter] and [[adapter.targets]].

    Attributes:
        depth: parallel pairs of matrices. weight_decay: None = that of the optimizer.
    """

    rank: int = 16
    alpha: float = 16.0
    lr_scale: float = 1.0
    depth: int = 1
    dropout: float = 0.0
    enabled: bool = True
    weight_decay: float | None = None

    @property
    def folded(self) -> tuple[int, float]:
        """Rank and alpha of the one pair that n parallel pairs are: n times as wide, at the same alpha / rank."""
        return self.rank * self.depth, (self.alpha or self.rank) * self.depth


Target = tuple[str, Mapping[str, Any]]
"""A pattern, and the fields of `LayerSettings` that it sets."""


def resolve(
    path: str, base: LayerSettings, targets: Iterable[Target], match: Callable[[str, str], bool] = matches
) -> tuple[LayerSettings, bool]:
    """Settings of a layer, and whether a target asks for it with ``enabled = true``.

    Args:
        match: the language of the patterns.

    Raises:
        ConfigError: for a pattern that cannot be read.
    """
    asked = False
    for pattern, fields in targets:
        if match(pattern, path):
            base = replace(base, **fields)
            asked = asked or fields.get("enabled") is True
    return base, asked
