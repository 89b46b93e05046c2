"""What the importers share: a run file that is built key by key, with its report."""

from typing import Any

from musubi_tuner.config.importers.report import Report
from musubi_tuner.config.schema import item_parameters, parameters
from musubi_tuner.models.registry import MODELS


class Builder:
    """Values by our dotted key, and what happened to every source key.

    Attributes:
        known: our settings by key. values: our key -> value. names: our key -> source key, for messages.
    """

    def __init__(self) -> None:
        self.report = Report()
        self.known = {parameter.key: parameter for parameter in parameters()}
        self.values: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self._assumed: dict[str, Any] = {}

    def _take(self, source: str, key: str, value: Any) -> None:
        """Take a value over, with numbers in the type of the setting."""
        kind = self.known[key].type_name
        if isinstance(value, str) and kind in ("int", "float") and is_number(value):
            number = float(value)
            whole = kind == "int" and number.is_integer()
            self._convert(source, value, key, int(number) if whole else number, "a number in quotes")
        elif kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            self._carry(source, key, float(value))
        else:
            self._carry(source, key, value)

    def _carry(self, source: str, key: str, value: Any) -> None:
        """Take a value over unchanged."""
        self._store(source, key, value)
        self.report.carried.append((source, key, value))

    def _convert(self, source: str, old: Any, key: str, value: Any, rule: str) -> None:
        """Take a value over after conversion."""
        self._store(source, key, value)
        self.report.converted.append((source, old, key, value, rule))

    def _store(self, source: str, key: str, value: Any) -> None:
        if _holds_nothing(value):
            self._refuse(source, f"is {value!r}; write a value")
        else:
            self.values[key], self.names[key] = value, source

    def _refuse(self, source: str, reason: str) -> None:
        self.report.refused.append((source, reason))

    def _leave_idle(self) -> None:
        """Leave out settings that have no effect with the other values; a run would only warn about them."""
        spec = MODELS.get(str(self.values.get("model.arch")))
        if spec is None:
            return
        own = {parameter.key: parameter for parameter in parameters(spec)}
        for key, value in spec.defaults.items():
            self._assumed.setdefault(key, value)
        for parameter in own.values():
            if not parameter.required:
                self._assumed.setdefault(parameter.key, parameter.default)
        for key in [key for key in self.values if key in own]:
            when = own[key].when
            if when is None or when.holds(self._current):
                continue
            self._drop(key, f"{key} has no effect because {when.reason(self._current)}")

    def _drop(self, key: str, reason: str) -> None:
        """Leave out a value that was taken over before."""
        self.names.pop(key, None)
        del self.values[key]
        self.report.leave_out(key, reason)

    def _current(self, key: str) -> Any:
        """Value of one of our keys, from the file or the defaults."""
        return self.values.get(key, self._assumed.get(key))

    def _nested(self) -> dict[str, Any]:
        """The values as tables."""
        document: dict[str, Any] = {"schema_version": 1}
        for key, value in self.values.items():
            section, _, name = key.rpartition(".")
            (document.setdefault(section, {}) if section else document)[name] = value
        return document


def _holds_nothing(value: Any) -> bool:
    """Whether a value is null, or has one inside, which TOML cannot say."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(_holds_nothing, inside))


def of_items(name: str, value: Any) -> Any:
    """A value of [general] or [[datasets]], with a number in quotes as the number."""
    kinds = {kind for each in item_parameters() if each.name == name for kind in each.kinds}
    if isinstance(value, str) and kinds & {int, float} and str not in kinds and is_number(value):
        number = float(value)
        return int(number) if number.is_integer() and int in kinds else number
    return value


def is_number(text: str) -> bool:
    """Whether a text is a number as Python reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return True
