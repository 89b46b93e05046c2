"""How a rule between settings is written: a function with its code and the settings that it reads."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from musubi_tuner.config.diagnostics import Diagnostic, error

if TYPE_CHECKING:
    from musubi_tuner.config.run_config import RunConfig

Check = Callable[["RunConfig"], Iterator[Diagnostic]]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        codes: of its findings. keys: settings that it reads; it is skipped if one of them has a wrong value.
        check: config -> findings.
    """

    codes: tuple[str, ...]
    keys: tuple[str, ...]
    check: Check

    def applies(self, wrong: Collection[str]) -> bool:
        """Whether all settings that it reads have a usable value, and so do their tables."""
        return not any(key in wrong or key.partition(".")[0] in wrong for key in self.keys)


class Rules:
    """Rules of one subject, in the order in which they are written."""

    def __init__(self) -> None:
        self.all: list[Rule] = []

    def rule(self, codes: str, keys: str = "") -> Callable[[Check], Check]:
        """Decorator of a rule: its codes and the settings that it reads, each separated by spaces."""

        def add(check: Check) -> Check:
            self.all.append(Rule(tuple(codes.split()), tuple(keys.split()), check))
            return check

        return add

    def check(self, config: "RunConfig", wrong: Collection[str] = ()) -> Iterator[Diagnostic]:
        """Findings of all rules that apply.

        Args:
            wrong: keys without a usable value, for which the config has the default.
        """
        for rule in self.all:
            if rule.applies(wrong):
                try:
                    yield from rule.check(config)
                except OSError as problem:  # such as a name that is too long for any file
                    yield error("P01", rule.keys[0], f"{problem.filename}: cannot be looked up ({problem.strerror})")
