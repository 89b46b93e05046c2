"""Run files for the page: checked as they are typed, read, written, imported. Torch-free."""

import hashlib
import json
import re
import secrets
import threading
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from musubi_tuner.config import load_document
from musubi_tuner.config.diagnostics import Diagnostic, InvalidConfig
from musubi_tuner.config.explain_key import explain_key
from musubi_tuner.config.importers.read import read_foreign
from musubi_tuner.config.rules.effect import idle
from musubi_tuner.config.schema import parameters
from musubi_tuner.errors import ConfigError, UserError
from musubi_tuner.files import write_text

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}")
"""Of a saved config."""
SUFFIX = ".toml"


def as_data(found: Diagnostic) -> dict[str, Any]:
    """A finding as JSON."""
    return {"code": found.code, "level": found.level, "keys": list(found.keys), "reason": found.reason,
            "fix": [[key, value] for key, value in found.fix]}  # fmt: skip


def check(document: dict[str, Any]) -> dict[str, Any]:
    """What is wrong with a run file, which of its settings do nothing, and all values as they would be used.

    Rules that look at files are among the findings (codes P..).
    """
    try:
        config = load_document(document)
    except InvalidConfig as problem:
        return {
            "diagnostics": [as_data(found) for found in problem.findings],
            "resolved": {},
            "idle": [],
            "not_applicable": {},
            "title": "",
        }
    except ConfigError as problem:
        found = {"code": "", "level": "error", "keys": [], "reason": str(problem), "fix": []}
        return {"diagnostics": [found], "resolved": {}, "idle": [], "not_applicable": {}, "title": ""}
    facts = config.spec.task(config)
    resolved = {}
    for parameter in parameters(config.spec):
        if not parameter.extra("secret") and facts.has(parameter.key):
            resolved[parameter.key] = json.loads(json.dumps(config.get(parameter.key), default=str))
    other = {
        p.key: config.spec.why_not(p.key, None) or f"{config.spec.title} has no such setting"
        for p in parameters()
        if p.key not in resolved
    }
    return {
        "diagnostics": [as_data(found) for found in config.findings],
        "resolved": resolved,
        "idle": sorted(idle(config)),
        "not_applicable": other,
        "title": config.spec.title,
    }


def explain(name: str) -> str:
    """What a name means here: a setting, another name of one, or the reason why there is none; empty if nobody knows it."""
    try:
        return explain_key(name)
    except ConfigError:
        return ""


def to_toml(document: dict[str, Any]) -> str:
    """The text of a run file.

    Raises:
        ConfigError: for a value that has no TOML, such as null.
    """
    try:
        return tomli_w.dumps(document)
    except (TypeError, ValueError, AttributeError, RecursionError) as problem:
        raise ConfigError(
            f"the run file holds a value that cannot be written as TOML ({problem}); remove it"
        ) from problem


def from_toml(text: str) -> dict[str, Any]:
    """A run file's tables.

    Raises:
        ConfigError: naming the line.
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"not valid TOML: {problem}") from problem


@dataclass
class Configs:
    """The named configs of a project, ``<folder>/NAME.toml``, and its templates.

    Attributes:
        folder: of the saved ones; made when one is saved. templates: of those that are only read.
    """

    folder: Path
    templates: Path
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def names(self) -> dict[str, list[str]]:
        """Saved configs and templates."""

        def stems(folder: Path) -> list[str]:
            return sorted(path.stem for path in folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []

        return {"saved": stems(self.folder), "templates": [n for n in stems(self.templates) if self._is_run(n)]}

    def _is_run(self, name: str) -> bool:
        return "[run]" in (self.templates / f"{name}{SUFFIX}").read_text(encoding="utf-8", errors="replace")

    def path(self, name: str, template: bool = False) -> Path:
        """Where a config lies.

        Raises:
            ConfigError: for a name that may be none.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r}: a name is made of letters, digits, points, dashes and underscores, at most 80"
            )
        return (self.templates if template else self.folder) / f"{name}{SUFFIX}"

    def read(self, name: str, template: bool = False) -> tuple[str, str]:
        """Text of a config, and its tag.

        Raises:
            ConfigError: if there is none of this name.
        """
        try:
            text = self.path(name, template).read_text(encoding="utf-8")
        except OSError as problem:
            raise ConfigError(f"{name}: no such config") from problem
        return text, tag_of(text)

    def write(self, name: str, text: str, expected: str | None) -> str:
        """Save a config; its new tag.

        Args:
            expected: tag of what is replaced; None = there must be none.

        Raises:
            Conflict: if something else is there.
        """
        path, tag = self.path(name), tag_of(text)
        with self._one_at_a_time:
            there = tag_of(path.read_text(encoding="utf-8")) if path.is_file() else None
            if there != expected:
                raise Conflict(there)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        return tag

    def remove(self, name: str) -> None:
        """Remove a saved config.

        Raises:
            ConfigError: if there is none of this name.
        """
        try:
            self.path(name).unlink()
        except OSError as problem:
            raise ConfigError(f"{name}: no such config") from problem


class Conflict(Exception):
    """Another page has saved the config. tag: of what is there; None = it is gone."""

    def __init__(self, tag: str | None) -> None:
        super().__init__("saved by another page in the meantime")
        self.tag = tag


def tag_of(text: str) -> str:
    """Identifies a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def import_text(text: str, name: str, folder: Path) -> dict[str, Any]:
    """A config of another tool as ours, with the report of what became of its keys.

    Args:
        name: of the file, whose ending says its format. folder: where it is put to be read; it is removed again.

    Raises:
        ConfigError: if it is no config that is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"import-{secrets.token_hex(8)}{Path(name).suffix or '.toml'}"
    try:
        path.write_text(text, encoding="utf-8")
        found = read_foreign(path)
    except UserError as problem:
        raise ConfigError(str(problem).replace(str(path), name)) from problem
    finally:
        path.unlink(missing_ok=True)
    document = dict(found.document)
    if found.general:
        document["general"] = found.general
    if found.datasets:
        document["datasets"] = found.datasets
    return {"document": document, "report": found.report.as_data()}
