"""When a setting has an effect, as data: conditions on other settings. Torch-free.

`param(..., when=...)` carries one, and a table may carry one for all its settings. They decide when a written value gives a warning
that it has no effect, what the form shows, and which settings the resolved config leaves out.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Get = Callable[[str], Any]
"""Dotted key -> its value; None if it is absent, or if the family has no such setting."""


class When(ABC):
    """A condition; ``&`` and ``|`` join two."""

    @abstractmethod
    def holds(self, get: Get) -> bool:
        """Whether the condition holds."""

    @abstractmethod
    def reason(self, get: Get) -> str:
        """Why the condition does not hold, in words."""

    @abstractmethod
    def about(self) -> tuple[str, ...]:
        """The settings that it depends on."""

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """As plain values, for JSON."""

    def __and__(self, other: "When") -> "When":
        return Every((*(self.parts if isinstance(self, Every) else (self,)), other))

    def __or__(self, other: "When") -> "When":
        return Some((*(self.parts if isinstance(self, Some) else (self,)), other))


@dataclass(frozen=True)
class Is(When):
    """A setting has one of some values, or is on.

    Attributes:
        key: dotted key. values: what it may be; empty = it is on: present, and not false, 0, empty or "none". negated: the opposite.
    """

    key: str
    values: tuple[Any, ...] = ()
    negated: bool = False

    def holds(self, get: Get) -> bool:
        value = get(self.key)
        found = any(value is each or value == each for each in self.values) if self.values else is_on(value)
        return found is not self.negated

    def reason(self, get: Get) -> str:
        return f"{self.key} is {describe(get(self.key))}"

    def about(self) -> tuple[str, ...]:
        return (self.key,)

    def data(self) -> dict[str, Any]:
        test: dict[str, Any] = (
            {"key": self.key, "in": list(self.values)} if self.values else {"key": self.key, "on": True}
        )
        return {"not": test} if self.negated else test


@dataclass(frozen=True)
class _Joined(When):
    parts: tuple[When, ...]

    def about(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for part in self.parts for key in part.about()))


class Every(_Joined):
    """All of some conditions."""

    def holds(self, get: Get) -> bool:
        return all(part.holds(get) for part in self.parts)

    def reason(self, get: Get) -> str:
        """The first part that does not hold."""
        return next(part.reason(get) for part in self.parts if not part.holds(get))

    def data(self) -> dict[str, Any]:
        return {"all": [part.data() for part in self.parts]}


class Some(_Joined):
    """One of some conditions."""

    def holds(self, get: Get) -> bool:
        return any(part.holds(get) for part in self.parts)

    def reason(self, get: Get) -> str:
        """All parts, none of which holds."""
        return " and ".join(dict.fromkeys(part.reason(get) for part in self.parts))

    def data(self) -> dict[str, Any]:
        return {"any": [part.data() for part in self.parts]}


def on(key: str) -> Is:
    """A setting is present, and not false, 0, empty or "none"."""
    return Is(key)


def off(key: str) -> Is:
    """A setting is absent, false, 0, empty or "none"."""
    return Is(key, negated=True)


def is_(key: str, *values: Any) -> Is:
    """A setting has one of these values."""
    return Is(key, values)


def is_not(key: str, *values: Any) -> Is:
    """A setting has none of these values."""
    return Is(key, values, negated=True)


def is_on(value: Any) -> bool:
    """Whether a value is not one of those that mean off."""
    return (
        value is not None
        and value is not False
        and value != 0
        and value not in ("", "none")
        and value != []
        and value != {}
    )


def describe(value: Any) -> str:
    """A value in TOML syntax, or "absent"."""
    if value is None:
        return "absent"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
