"""What a name means that is not the name of a setting: another name of one, or a name of another trainer. Torch-free.

Looked up in this order: exact key, exact alias, the table of foreign names. Only names unknown to all three get a spelling suggestion.
"""

from dataclasses import dataclass
from typing import Any

from musubi_tuner.config.datasets import SHARED_KEYS
from musubi_tuner.config.diagnostics import Diagnostic, error, info, warning
from musubi_tuner.config.foreign import FOREIGN, Foreign, wins
from musubi_tuner.config.schema import flat_names, parameters, section_classes
from musubi_tuner.config.when import describe
from musubi_tuner.errors import keep_secret
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import ModelSpec

_MISSING = object()


@dataclass(frozen=True)
class Answer:
    """What a name with a value means here.

    Attributes:
        key: our setting, dotted; "" = none. value: what it is set to. rule: how the value was converted; "" = taken over unchanged.
        harmless: why nothing is lost by leaving it out. refused: why it cannot be done, and what to write instead.
        wins: it takes precedence over other names of the same setting.
    """

    key: str = ""
    value: Any = None
    rule: str = ""
    harmless: str = ""
    refused: str = ""
    wins: bool = False


def answer(name: str, value: Any, spec: ModelSpec | None) -> Answer | None:
    """What a name means here: an alias, or a name of another trainer; None if it is unknown.

    Args:
        name: with or without its table. spec: family of the run, if that is known.
    """
    table, _, last = name.rpartition(".")
    if table and table not in section_classes():  # a slip in the name of the table is no other name of a setting
        return None
    entry, alias = FOREIGN.get(name) or FOREIGN.get(last), flat_names().get(last)
    if entry is None and alias is not None:
        found = Answer(alias.key, value)
    elif entry is not None:
        found = _of_entry(entry, value)
    else:
        return None
    if spec is None or not found.key or found.key.startswith(("general.", "datasets.")):
        return found
    own = {parameter.key: parameter for parameter in parameters(spec)}
    if found.key in own:
        return found
    if _neutral(found.key, found.value):
        return Answer(harmless=f"it is off, and {spec.title} has no {found.key}")
    return Answer(
        refused=why_not(found.key, found.value, spec) or f"is {found.key} here, which {spec.title} does not have"
    )


def _of_entry(entry: Foreign, value: Any) -> Answer:
    if entry.is_neutral(value):
        return Answer(harmless=entry.harmless or "it is off")
    if entry.refused:
        return Answer(refused=f"is {'***' if entry.secret else describe(value)}, which {entry.refused}")
    if not entry.key:
        return Answer(harmless=entry.harmless)
    if entry.choices:
        if not isinstance(value, str) or value.lower() not in entry.choices:
            return Answer(refused=f"is {describe(value)}, expected one of {', '.join(entry.choices)}")
        return Answer(*entry.choices[value.lower()])
    try:
        converted = entry.convert(value) if entry.convert else value
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as problem:
        return Answer(refused=f"is {describe(value)}, expected {problem.args[0] if problem.args else 'another value'}")
    if converted is None:
        return Answer(harmless="it is off" if not value else "it has no effect by itself")
    return Answer(entry.key, converted, entry.rule if entry.convert else "", wins=entry.wins)


def is_secret_name(name: str) -> bool:
    """Whether the value of a name must not be shown: of a setting, of another name of one, or of another trainer's secret."""
    entry = FOREIGN.get(name) or FOREIGN.get(name.rpartition(".")[2])
    keys = {name, entry.key if entry is not None else ""}
    own = flat_names().get(name.rpartition(".")[2])
    secret = any(parameter.key in keys and parameter.extra("secret") for parameter in parameters())
    return secret or bool(entry and entry.secret) or bool(own and own.extra("secret"))


def shown(name: str, value: Any) -> str:
    """A value for a message; that of a secret is hidden."""
    return "***" if is_secret_name(name) else describe(value)


def why_not(key: str, value: Any, spec: ModelSpec) -> str | None:
    """Why a family has no such key, although others may; None if the key is unknown."""
    reason = spec.why_not(key, value)
    if reason is not None:
        return reason
    owners = [each.title for each in map(MODELS.__getitem__, MODELS) if key in {p.key for p in parameters(each)}]
    return f"is a setting of {' and '.join(owners)}; {spec.title} does not have it" if owners else None


def _neutral(key: str, value: Any) -> bool:
    """Whether a value of a setting of some family means "off" there."""
    return any(parameter.is_neutral(value) for parameter in parameters() if parameter.key == key)


def translate(
    document: dict[str, Any], where: str, spec: ModelSpec | None, problems: list[Diagnostic], outside: str | None = None
) -> None:
    """Give every key of a typed document its own name, in place; what is not supported becomes a problem, what is off is left out.

    Args:
        where: prefix of a key in a message, such as ``steps[0].``. outside: file with the data sets, if it is another file.
    """
    own = {parameter.key for parameter in parameters(spec)}
    taken: dict[str, tuple[str, Any]] = {}
    for section in [name for name in section_classes() if isinstance(document.get(name), dict)]:
        for name in [name for name in document[section] if f"{section}.{name}" not in own]:
            _one(document, section, name, where, spec, problems, taken, outside)
    known = {"schema_version", "dataset_config", "general", "datasets", "steps", *section_classes()}
    for name in [name for name in document if name not in known and not isinstance(document[name], dict)]:
        _one(document, "", name, where, spec, problems, taken, outside)


def _one(
    document: dict[str, Any], section: str, name: str, where: str, spec: ModelSpec | None, problems: list[Diagnostic],
    taken: dict[str, tuple[str, Any]], outside: str | None,
) -> None:  # fmt: skip
    table = document[section] if section else document
    value, written = table[name], f"{section}.{name}" if section else name
    elsewhere = spec is not None and written in {parameter.key for parameter in parameters()}
    if elsewhere and spec is not None:  # a setting of another family
        if _neutral(written, value):
            del table[name]
        return
    if not {name, written} & set(FOREIGN) and (alias := flat_names().get(name)) is not None and alias.name == name:
        return  # our own name, in the wrong table or in none: the loader says where it belongs
    if is_secret_name(written):
        keep_secret(value)
    found = answer(written, value, spec)
    if found is None or (name in SHARED_KEYS and not found.refused):
        return
    del table[name]
    if found.refused:
        problems.append(error("NA01", where + written, found.refused))
    elif found.harmless:
        problems.append(info("NA04", where + written, f"is left out: {found.harmless}"))
    elif found.key.startswith("datasets."):
        text = f"is a data set setting; write {found.key.partition('.')[2]} = {describe(found.value)} in [[datasets]]"
        problems.append(error("U01", where + written, text))
    elif outside is not None and found.key.startswith("general."):
        text = f"is a data set setting; write {found.key.partition('.')[2]} = {describe(found.value)} in {outside}"
        problems.append(error("U01", where + written, text))
    else:
        _put(document, written, found, where, problems, taken)


def _put(
    document: dict[str, Any],
    written: str,
    found: Answer,
    where: str,
    problems: list[Diagnostic],
    taken: dict[str, tuple[str, Any]],
) -> None:
    """Set what a name means, unless another name of the setting has another value."""
    section, _, name = found.key.rpartition(".")
    target = document.setdefault(section, {}) if section else document
    if not isinstance(target, dict):
        return
    first, before = taken.get(found.key, (found.key, target.get(name, _MISSING)))
    value = shown(found.key, found.value)
    if before is not _MISSING and before != found.value:
        if found.wins:
            problems.append(info("NA04", where + written, f"is read as {found.key} = {value}, instead of {first}"))
            target[name], taken[found.key] = found.value, (written, found.value)
        elif wins(first):
            problems.append(
                info("NA04", where + written, f"is left out: {first} sets {found.key} = {shown(found.key, before)}")
            )
        else:
            text = f"is {value}, but {first}, another name of it, is {shown(found.key, before)}; keep one"
            problems.append(error("U05", where + written, text, where + first))
        return
    if before is not _MISSING:
        text = f"is another name of {first}, which has the same value; keep one"
        problems.append(warning("U05", where + written, text, where + first))
    target[name] = found.value
    taken[found.key] = (written, found.value)
    rule = f" ({found.rule})" if found.rule else ""
    problems.append(info("NA04", where + written, f"is read as {found.key} = {value}{rule}"))
