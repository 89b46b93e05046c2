"""The settings as JSON Schema (draft 2020-12), which editors use to complete and check run files. Torch-free.

A run file names it in its first line: ``#:schema run.schema.json``.
"""

from typing import Any, get_args

from pydantic import TypeAdapter

from musubi_tuner.config.fields import SHARE, Parameter, Section
from musubi_tuner.config.schema import SECTION_ALIASES, item_parameters, parameters, section_classes
from musubi_tuner.models.registry import MODELS

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(arch: str | None = None) -> dict[str, Any]:
    """The schema of run files: of one family, or of all.

    Raises:
        KeyError: for an unknown family.
    """
    spec = MODELS[arch] if arch else None
    tables: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for parameter in parameters(spec):
        target = tables.setdefault(parameter.section, {}) if parameter.section else top
        target[parameter.name] = field_schema(parameter)
    items = {
        parameter.name: field_schema(parameter) for parameter in item_parameters() if parameter.section == "general"
    }
    own = {
        parameter.name: field_schema(parameter) for parameter in item_parameters() if parameter.section == "datasets"
    }
    classes = section_classes(spec)
    properties = {**top, **{name: _table(fields, classes[name].__doc__) for name, fields in tables.items()}}
    for alias, name in SECTION_ALIASES.items():
        properties[alias] = properties[name]
    properties["general"] = _table(items, "What holds for all data sets.")
    properties["datasets"] = {"type": "array", "items": _table({**items, **own}, "One source of pictures.")}
    properties["steps"] = {
        "type": "array",
        "items": {"type": "object"},
        "description": "Steps of a pipeline; see docs/steps.md.",
    }
    return {
        "$schema": DRAFT,
        "title": "Run file",
        "type": "object",
        "additionalProperties": False,
        "required": ["run", "model"],
        "properties": properties,
    }


def _table(fields: dict[str, Any], text: str | None) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "description": text or "", "properties": fields}


def field_schema(parameter: Parameter) -> dict[str, Any]:
    """One setting: its type and limits, its default, and what a form needs to know, under names that begin with ``x-``."""
    annotation: Any = parameter.field.annotation
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    tables = [kind for kind in (*kinds, *(each for kind in kinds for each in get_args(kind)))
              if isinstance(kind, type) and issubclass(kind, Section)]  # fmt: skip
    found: dict[str, Any] = {"type": ["object", "array"]} if tables else _plain(annotation)
    for name, word in (("ge", "minimum"), ("gt", "exclusiveMinimum"), ("le", "maximum"), ("lt", "exclusiveMaximum"),
                       ("multiple_of", "multipleOf"), ("pattern", "pattern")):  # fmt: skip
        limit = parameter.limit(name)
        if limit is not None and not tables:
            found[word] = limit
    if parameter.extra("as_share"):
        found = {
            "anyOf": [
                found,
                {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                {"type": "string", "pattern": SHARE},
            ]
        }
    found["description"] = parameter.help
    if not parameter.required and parameter.default is not None and not tables:
        found["default"] = parameter.default
    facts = {"label": parameter.label, "tab": parameter.tab, "unit": parameter.extra("unit"), "expert": parameter.expert,
             "secret": parameter.extra("secret"), "path": parameter.extra("path"), "step": parameter.extra("step"),
             "when": parameter.when.data() if parameter.when is not None else None}  # fmt: skip
    return found | {f"x-{name}": value for name, value in facts.items() if value}


def _plain(annotation: Any) -> dict[str, Any]:
    """A type without null, which TOML has not."""
    schema = TypeAdapter(annotation).json_schema()
    options = [option for option in schema.get("anyOf", []) if option.get("type") != "null"]
    if "anyOf" in schema:
        return options[0] if len(options) == 1 else {"anyOf": options}
    return schema
