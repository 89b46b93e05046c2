"""What readers of other tools' options share: a typed document that grows key by key, with its report."""

from typing import Any

from musubi_tuner.config.importers.report import Report
from musubi_tuner.config.schema import parameters


class Builder:
    """Values by our dotted key, and what became of every source key.

    Attributes:
        known: our settings by key. values: our key -> value. names: our key -> source key, for messages.
    """

    def __init__(self) -> None:
        self.report = Report()
        self.known = {parameter.key: parameter for parameter in parameters()}
        self.values: dict[str, Any] = {}
        self.names: dict[str, str] = {}

    def _carry(self, source: str, key: str, value: Any) -> None:
        """Take a value over as it is."""
        self._store(source, key, value)
        self.report.carried.append((source, key, value))

    def _convert(self, source: str, old: Any, key: str, value: Any, rule: str) -> None:
        """Take a value over in another form."""
        self._store(source, key, value)
        self.report.converted.append((source, old, key, value, rule))

    def _store(self, source: str, key: str, value: Any) -> None:
        self.values[key], self.names[key] = value, source

    def _refuse(self, source: str, reason: str) -> None:
        self.report.refused.append((source, reason))

    def _nested(self) -> dict[str, Any]:
        """The values as tables."""
        document: dict[str, Any] = {"schema_version": 1}
        for key, value in self.values.items():
            section, _, name = key.rpartition(".")
            (document.setdefault(section, {}) if section else document)[name] = value
        return document
