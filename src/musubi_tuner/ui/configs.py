"""Run files for the page: checked as they are typed, read, written, imported. Torch-free."""

import hashlib
import json
import math
import re
import secrets
import threading
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w

from musubi_tuner.config import RunConfig, load_document, load_documents
from musubi_tuner.config.diagnostics import Diagnostic, InvalidConfig
from musubi_tuner.config.explain_key import explain_key
from musubi_tuner.config.fields import Parameter
from musubi_tuner.config.importers.read import read_foreign
from musubi_tuner.config.load import STEP
from musubi_tuner.config.pipeline import TABLE
from musubi_tuner.config.rules.effect import idle
from musubi_tuner.config.schema import item_parameters, parameters
from musubi_tuner.errors import ConfigError, UserError
from musubi_tuner.files import write_text
from musubi_tuner.models.registry import MODELS
from musubi_tuner.ui.answers import Difference, Finding, Names, NotThere, Resolved
from musubi_tuner.ui.form import defaults_of

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}")
"""Of a saved config."""
SUFFIX = ".toml"


Steps = list[dict[str, Any]]
_OF_STEP = re.compile(r"steps\[(\d+)\]\.?")
_EMPTY: dict[str, Any] = {"resolved": {}, "idle": [], "origins": {}, "steps": [], "not_applicable": {}, "title": ""}


def steps_in(document: dict[str, Any]) -> Steps:
    """The entries of [[steps]]; none where the key is something else."""
    found = document.get(TABLE)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def check(document: dict[str, Any]) -> dict[str, Any]:
    """What is wrong with a run file, which of its settings do nothing, and all values as they would be used; see `Checked`.

    Rules that look at files are among the findings (codes P..).
    """
    document = as_meant(document)
    steps = steps_in(document)
    findings: dict[str, Finding] = {}

    def note(found: Iterable[Diagnostic], step: int | None) -> None:
        for each in found:
            data = _as_data(each, document, steps, step)
            findings.setdefault(json.dumps(data, sort_keys=True, default=str), data)

    configs = []
    try:
        configs = load_documents(document)
        for number, config in enumerate(configs):
            note(config.findings, number if steps else None)
    except InvalidConfig as problem:
        if not steps:
            note(problem.findings, None)
        for number, step in enumerate(steps):  # each alone, so that a finding has its place
            try:
                load_document(document, {STEP: step.get("name")})
            except InvalidConfig as own:
                note(own.findings, number)
            except ConfigError:
                note(problem.findings, None)
        if not any(each["level"] == "error" for each in findings.values()):  # of all steps together, such as run.strict
            note(problem.findings, None)
        if not any(each["level"] == "error" for each in findings.values()):
            findings[""] = {"code": "", "level": "error", "keys": [], "reason": str(problem), "fix": [], "step": None}
    except ConfigError as problem:
        findings[""] = {"code": "", "level": "error", "keys": [], "reason": str(problem), "fix": [], "step": None}
    answer = {**_EMPTY, "diagnostics": list(findings.values())}
    if not configs:
        return answer
    parts = [_resolved(config) for config in configs]
    config = configs[0]
    other = {
        p.key: config.spec.why_not(p.key, None) or f"{config.spec.title} has no such setting"
        for p in parameters()
        if not any(p.key in part["resolved"] for part in parts)
    }
    if steps:
        everywhere = set.intersection(*(set(part["idle"]) for part in parts))
        return {
            **answer,
            "idle": sorted(everywhere),
            "steps": parts,
            "not_applicable": other,
            "title": config.spec.title,
        }
    return {**answer, **parts[0], "not_applicable": other, "title": config.spec.title}


def _resolved(config: RunConfig) -> Resolved:
    facts, resolved = config.spec.task(config), {}
    for parameter in parameters(config.spec):
        if not parameter.extra("secret") and facts.has(parameter.key):
            resolved[parameter.key] = as_json(json.loads(json.dumps(config.get(parameter.key), default=str)))
    origins = {
        key: origin
        for key, origin in config.origins.items()
        if key in resolved and origin not in ("file", "cli", "default")
    }
    return {"resolved": resolved, "idle": sorted(idle(config)), "origins": origins}


def _as_data(found: Diagnostic, document: dict[str, Any], steps: Steps, step: int | None) -> Finding:
    """A finding as JSON, with the place of its setting: in a step if that sets it, otherwise in the file."""
    keys = list(found.keys)
    named = _OF_STEP.match(keys[0]) if keys else None
    if named:
        step, keys[0] = int(named[1]), keys[0][named.end() :]
    elif step is not None and not (keys and _sets(steps[step], keys[0])):
        step = None
    entries = document.get("datasets")
    for number, entry in enumerate(entries if isinstance(entries, list) else []):  # named ones are found by their names
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str):
            keys = [
                f"datasets[{number}]{key[len(name) :]}" if key == name or key.startswith(f"{name}.") else key
                for key in keys
            ]
    return {
        "code": found.code,
        "level": found.level,
        "keys": keys,
        "reason": found.reason,
        "fix": as_json(found.fix),
        "step": step,
    }  # type: ignore[typeddict-item]


def _sets(step: dict[str, Any], key: str) -> bool:
    """Whether a step sets a key, such as ``train.max_steps`` or ``roles.vae.optimizer.lr``."""
    found: Any = step
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return False
        found = found[part]
    return True


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[Difference]:
    """Settings in which two run files differ, as they would be used; as they are written where a file has errors or steps.

    Args:
        theirs: empty = the defaults of our family.
    """
    model = ours.get("model")
    arch = model.get("arch") if isinstance(model, dict) else None
    own = defaults_of(arch) if isinstance(arch, str) and arch in MODELS else {}
    from_defaults = not theirs
    if from_defaults:
        theirs = {"model": {"arch": arch}}
    both = [check(each)["resolved"] for each in (ours, theirs)]
    left, right = both if all(both) else (_flat(ours), _flat(theirs))
    if from_defaults and not all(both):
        defaults = {**{parameter.key: _plain_default(parameter) for parameter in parameters()}, **own}
        right = {**{key: value for key, value in defaults.items() if key in left}, **right}
    data = {key for key in (*_flat(ours), *_flat(theirs)) if key.startswith(("general.", "datasets", TABLE))}
    left = {**left, **{key: value for key, value in _flat(ours).items() if key in data}}
    right = {**right, **{key: value for key, value in _flat(theirs).items() if key in data}}
    return [
        {"key": key, "ours": left.get(key), "theirs": right.get(key)}
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key)
    ]


def _plain_default(parameter: Parameter) -> Any:
    """A default as JSON; none where a value is required."""
    return None if parameter.required else as_json(json.loads(json.dumps(parameter.default, default=str)))


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    """A run file by dotted keys; entries of lists of tables by number."""
    found: dict[str, Any] = {}
    for table, values in document.items():
        entries = values if isinstance(values, list) else [values]
        for number, entry in enumerate(entries):
            name = f"{table}[{number}]" if isinstance(values, list) else table
            found |= (
                {f"{name}.{key}": value for key, value in entry.items()} if isinstance(entry, dict) else {name: entry}
            )
    return found


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
        return tomli_w.dumps(as_meant(document))
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
        found: dict[str, Any] = as_json(tomllib.loads(text))
        return found
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"not valid TOML: {problem}") from problem


def as_json(value: Any) -> Any:
    """A value for JSON, which has no NaN and infinities: they are words, as a person types them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: as_json(each) for key, each in value.items()}
    return [as_json(each) for each in value] if isinstance(value, list | tuple) else value


@cache
def _numbers() -> frozenset[str]:
    """Names of settings that are numbers."""
    return frozenset(each.name for each in (*parameters(), *item_parameters()) if float in each.kinds)


def as_meant(value: Any, name: str = "") -> Any:
    """The other way: such words are numbers where a setting is one."""
    if isinstance(value, str) and name in _numbers() and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, dict):
        return {key: as_meant(each, key) for key, each in value.items()}
    return [as_meant(each, name) for each in value] if isinstance(value, list) else value


@dataclass
class Configs:
    """The named configs of a project, ``<folder>/NAME.toml``, and its templates.

    Attributes:
        folder: of the saved ones; made when one is saved. templates: of those that are only read.
    """

    folder: Path
    templates: Path
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def names(self) -> Names:
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
        path = self.path(name, template)
        try:
            if not path.resolve().is_relative_to(path.parent.resolve()):  # a link that leads out
                raise OSError
            text = path.read_text(encoding="utf-8")
        except (OSError, RuntimeError) as problem:  # a link to itself is a RuntimeError
            raise NotThere(f"{name}: no such config") from problem
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
            raise NotThere(f"{name}: no such config") from problem


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
    document = as_json(dict(found.document))
    if found.general:
        document["general"] = found.general
    if found.datasets:
        document["datasets"] = found.datasets
    return {"document": document, "report": found.report.as_data()}
