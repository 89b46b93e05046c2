"""What pydantic finds wrong with a run file, as our own messages. Torch-free."""

import re
from typing import Any, get_args

from musubi_tuner.config.datasets import SHARED_KEYS
from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean, error
from musubi_tuner.config.fields import Parameter, Section
from musubi_tuner.config.names import why_not
from musubi_tuner.config.run_config import ROLE_TABLES
from musubi_tuner.config.schema import flat_names, parameters, section_classes
from musubi_tuner.config.schema.roles import RoleSection
from musubi_tuner.models.spec import ModelSpec


def explain(item: Any, spec: ModelSpec | None) -> Diagnostic:
    """One finding of pydantic."""
    location = [str(part) for part in item["loc"] if not str(part).startswith(("list[", "function-"))]
    by_key = {parameter.key: parameter for parameter in parameters(spec)}
    key = ".".join(location[:2])
    parameter = by_key.get(key)
    if item["type"] == "missing" and len(location) == 4:
        return error("U07", f"{key}[{location[2]}]", f"has no {location[3]}")
    if item["type"] == "missing":
        return error("U07", key, f"is required. {parameter.help if parameter else ''}".strip())
    if item["type"] == "extra_forbidden":
        where = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(location))
        return error("U01", where, _unknown_key(location, item["input"], spec))
    if parameter is None:
        return error("U02", key, f"is {item['input']!r}, expected a table")
    inner = parameter.field.annotation
    if len(location) > 2 and isinstance(inner, type) and issubclass(inner, Section):
        key = ".".join(location[:3])
        parameter = Parameter(f"{location[0]}.{location[1]}", location[2], inner.model_fields[location[2]])
    nested = [part for part in get_args(parameter.field.annotation) if isinstance(part, type)]
    if len(location) == 4 and nested and issubclass(nested[0], Section):
        parameter = Parameter(f"{key}[{location[2]}]", location[3], nested[0].model_fields[location[3]])
        key = parameter.key
    value = "***" if parameter.extra("secret") else repr(item["input"])
    choices, given = [choice for choice in parameter.choices if isinstance(choice, str)], item["input"]
    hint = f".{did_you_mean(given, choices) if len(given) > 2 else ''}" if choices and isinstance(given, str) else ""
    code = "U04" if choices else "U02" if "type" in item["type"] or item["type"].endswith("parsing") else "U03"
    said, expected = item.get("ctx", {}).get("error"), parameter.expected
    if isinstance(said, ValueError):  # of a validator of ours
        return error("U03", key, f"is {value}, {said}")
    if item["type"] == "finite_number":
        expected = expected.replace("a number", "a finite number") if "a number" in expected else "a finite number"
    return error(code, key, f"is {value}, expected {expected}{hint}")


def _unknown_key(location: list[str], value: Any, spec: ModelSpec | None) -> str:
    name, key = location[-1], ".".join(location)
    if location[0] == "roles" and len(location) == 3:
        table = next((p.section for p in parameters(spec) if p.section in ROLE_TABLES and p.name == name), None)
        inside = f" It is written [roles.{location[1]}.{table}] {name}." if table else ""
        return f"unknown key.{inside or did_you_mean(name, RoleSection.model_fields)}"
    reason = why_not(key, value, spec) if spec else None
    if reason:
        return reason
    if name in SHARED_KEYS and name not in section_classes(spec).get(location[0], Section).model_fields:
        return "unknown key. It is a data set setting and belongs in [general] or [[datasets]]."
    flat = flat_names().get(name)
    here = f" It is written [{flat.section}] {flat.name}." if flat else ""
    if len(location) == 1:
        tables = [*section_classes(), "general", "datasets", "schema_version", "dataset_config"]
        kind = "table" if isinstance(value, dict) else "key"
        return f"unknown {kind}.{here or did_you_mean(name, tables)}"
    own = [parameter.name for parameter in parameters(spec) if parameter.section == location[0]]
    elsewhere = [p.key for p in parameters(spec) if p.name == name]
    if here or elsewhere:
        return f"unknown key.{here or f' Did you mean {chr(39)}{elsewhere[0]}{chr(39)}?'}"
    return f"unknown key.{did_you_mean(name, own) or did_you_mean(name, [*flat_names(), *SHARED_KEYS])}"
