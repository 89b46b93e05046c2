"""Errors and warnings about a config, collected and printed together."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from musubi_tuner.errors import ConfigError

Level = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Diagnostic:
    """One finding.

    Attributes:
        code: of the rule, for machines and searches.
        level: an error refuses the start; a warning is shown and the run goes on; info is shown in the plan.
        keys: dotted TOML keys or files that the finding is about; the first is the one to look at. May be empty.
        reason: what was found, what was expected, what to do.
        fix: key and value of each change that would mend it, as far as a machine can tell.
    """

    code: str
    level: Level
    keys: tuple[str, ...]
    reason: str
    fix: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """The key to look at."""
        return self.keys[0] if self.keys else ""

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason


def error(code: str, key: str, reason: str, *others: str, fix: Sequence[tuple[str, Any]] = ()) -> Diagnostic:
    """A finding that refuses the start; ``others`` are the other keys that it is about."""
    return Diagnostic(code, "error", (key, *others), reason, tuple(fix))


def warning(code: str, key: str, reason: str, *others: str, fix: Sequence[tuple[str, Any]] = ()) -> Diagnostic:
    """A finding with which the run goes on; see `error`."""
    return Diagnostic(code, "warning", (key, *others), reason, tuple(fix))


def info(code: str, key: str, reason: str, *others: str) -> Diagnostic:
    """A note for the plan; see `error`."""
    return Diagnostic(code, "info", (key, *others), reason)


MOST_HINTS = 3


def closest(word: str, known: Iterable[str]) -> list[str]:
    """The known words nearest to a mistyped one, at most three, and within max(2, a quarter of its length) slips."""
    limit = max(2, len(word) // 4)
    letters = Counter(word)
    near = []
    for other in dict.fromkeys(known):
        apart = Counter(other)
        if max((letters - apart).total(), (apart - letters).total()) > limit:
            continue
        slips = distance(word, other)
        if slips <= min(limit, len(other) - 1):
            near.append((slips, other))
    least = min((slips for slips, _ in near), default=0)
    return [other for slips, other in near if slips == least][:MOST_HINTS]


def distance(first: str, second: str) -> int:
    """Slips between two words: letters left out, added, changed, or swapped with their neighbour (Damerau and Levenshtein)."""
    before: list[int] = []
    last = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        row = [i]
        for j, other in enumerate(second, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest known words, or an empty string."""
    words = [f"'{other}'" for other in closest(word, known)]
    return f" Did you mean {', '.join(words[:-1]) + ' or ' if words[1:] else ''}{words[-1]}?" if words else ""


class InvalidConfig(ConfigError):
    """A config with mistakes; ``findings`` are all of them, and what else was found; ``message`` if it is not that of `format_problems`."""

    def __init__(self, source: str, findings: Sequence[Diagnostic], message: str | None = None) -> None:
        super().__init__(message or format_problems(source, [found for found in findings if found.level == "error"]))
        self.findings = list(findings)


def format_problems(source: str, problems: list[Diagnostic]) -> str:
    """All errors as one message: a count, then one indented line each."""
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    return "\n  ".join([f"{source}: {count}", *(str(problem) for problem in problems)])
