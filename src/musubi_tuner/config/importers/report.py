"""What happened to every key of an imported file."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from musubi_tuner.config.diagnostics import Diagnostic, error, info, warning


@dataclass
class Report:
    """Source keys by what happened to them; each is in exactly one list, except `defaulted`, which lists our keys.

    Attributes:
        carried: source key, our key, value. converted: source key, its value, our key, value, rule.
        defaulted: our key, value: the source tool's default where ours differs.
        dropped_harmless, dropped_changes_result: source key, reason.
        secrets_removed: source keys. unknown: source key, hint. refused: source key, reason: what is not supported.
        needs_you: source key, what a person must do.
        ignores_unknown: unknown keys are a warning, not an error.
    """

    carried: list[tuple[str, str, Any]] = field(default_factory=list)
    converted: list[tuple[str, Any, str, Any, str]] = field(default_factory=list)
    defaulted: list[tuple[str, Any]] = field(default_factory=list)
    dropped_harmless: list[tuple[str, str]] = field(default_factory=list)
    dropped_changes_result: list[tuple[str, str]] = field(default_factory=list)
    secrets_removed: list[str] = field(default_factory=list)
    unknown: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    needs_you: list[tuple[str, str]] = field(default_factory=list)
    ignores_unknown: bool = False

    def keys(self) -> list[str]:
        """Source keys of all lists, in their order."""
        lists = (self.carried, self.converted, self.dropped_harmless, self.dropped_changes_result, self.unknown,
                 self.refused, self.needs_you)  # fmt: skip
        found = [entry[0] for entries in lists for entry in entries] + self.secrets_removed
        return [key for key in found if not key.startswith("(")]  # those in brackets are not keys of the source

    def leave_out(self, ours: str, reason: str) -> None:
        """Move what was taken over for one of our keys to what is not needed."""
        sources = [entry[0] for entry in self.carried if entry[1] == ours]
        sources += [entry[0] for entry in self.converted if entry[2] == ours]
        self.carried = [entry for entry in self.carried if entry[1] != ours]
        self.converted = [entry for entry in self.converted if entry[2] != ours]
        self.defaulted = [entry for entry in self.defaulted if entry[0] != ours]
        self.dropped_harmless += [(source, reason) for source in sources]

    def as_data(self) -> dict[str, Any]:
        """The lists as plain values."""
        return {name: [list(entry) if isinstance(entry, tuple) else entry for entry in entries]
                for name, entries in vars(self).items() if isinstance(entries, list)}  # fmt: skip

    def diagnostics(self) -> Iterator[Diagnostic]:
        """Errors for what is not supported, warnings for what changes the result, notes for the rest."""
        for key, hint in self.unknown:
            if self.ignores_unknown:
                yield warning("U01", key, f"is left out: unknown key.{hint}")
            else:
                yield error("U01", key, f"unknown key.{hint}")
        for key, reason in (*self.refused, *self.needs_you):
            yield error("NA01", key, reason)
        for key, reason in self.dropped_changes_result:
            yield warning("I01", key, f"is left out: {reason}")
        for key in self.secrets_removed:
            yield warning(
                "I01",
                key,
                f"is a secret and is not imported; set the environment variable {'WANDB_API_KEY' if 'wandb' in key else 'HF_TOKEN'}",
            )
        for key, old, ours, new, rule in self.converted:
            yield info("I02", key, f"{old!r} -> {ours} = {new!r} ({rule})")
        for key, reason in self.dropped_harmless:
            yield info("I02", key, f"is not needed: {reason}")
        if self.defaulted:
            text = ", ".join(f"{key} = {value!r}" for key, value in self.defaulted)
            yield info("I03", "", f"defaults of the source tool: {text}")


@dataclass
class Imported:
    """A run file made from a file of another tool.

    Attributes:
        document: as read from a run file. general: [general] values that the source tool assumes.
        names: our key -> source key, for messages. datasets: [[datasets]], if the file has data sets.
    """

    document: dict[str, Any]
    general: dict[str, Any]
    report: Report
    names: dict[str, str]
    datasets: list[dict[str, Any]] = field(default_factory=list)
