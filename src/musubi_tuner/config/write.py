"""The resolved config as a run file that can be given back, with the origin of every value. Torch-free."""

from collections.abc import Mapping
from typing import Any

import tomli_w

from musubi_tuner.config.fields import Parameter, Section
from musubi_tuner.config.rules.effect import idle
from musubi_tuner.config.run_config import RunConfig
from musubi_tuner.config.schema import parameters, section_classes


def resolved_toml(config: RunConfig) -> str:
    """All settings as TOML; absent values, secrets, and defaults of settings that do nothing are left out."""
    lines = [f"# Resolved from {config.path.name}; a comment names the origin of a value that is not the default."]
    facts, at_rest = config.spec.task(config), idle(config)
    by_section: dict[str, list[str]] = {}
    of_roles: dict[str, list[str]] = {}
    for parameter in parameters(config.spec):
        value = config.get(parameter.key)
        if not facts.has(parameter.key):
            continue
        if parameter.extra("secret") or parameter.key == "dataset_config":
            continue
        if parameter.key in at_rest and (config.origins.get(parameter.key, "default") in ("default", "arch")):
            continue  # given back, it would be a setting that a person wrote and that does nothing
        if (
            parameter.extra("as_share")
            and config.get(parameter.extra("as_share"))
            and parameter.key not in config.set_keys()
        ):
            continue  # the share holds instead of the family's count, and both of them written would be refused
        if value is None:
            if parameter.required or config.get(parameter.section) is None or default_of(config, parameter) is None:
                continue
            value = parameter.neutral[0]  # TOML has no null
        if isinstance(value, Section):
            changed = value.model_dump(exclude_defaults=True)
            text = tomli_w.dumps({parameter.section: {parameter.name: changed}}) if changed else ""
            of_roles.setdefault(parameter.section, []).extend(["", *text.splitlines()] if text else [])
            continue
        origin = config.origins.get(parameter.key, "default")
        tables = isinstance(value, list) and value and isinstance(value[0], Section)
        text = _inline(parameter.name, value) if tables else tomli_w.dumps({parameter.name: value}).rstrip()
        if isinstance(value, dict):
            text = "\n".join(tomli_w.dumps({key: item}).rstrip() for key, item in value.items())
            by_section.setdefault(f"{parameter.section}.{parameter.name}", []).extend(text.splitlines() if text else [])
            continue
        if origin != "default":
            text = text + f"  # {origin}" if "\n" not in text else f"# {origin}\n{text}"
        by_section.setdefault(parameter.section, []).append(text)
    lines += by_section.pop("", [])
    for section in section_classes():
        own = by_section.get(section)
        if own and config.get(section) is not None:
            lines += ["", f"[{section}]", *own]
        lines += [
            line
            for name, entries in by_section.items()
            if name.startswith(f"{section}.") and entries
            for line in ("", f"[{name}]", *entries)
        ]
        lines += of_roles.get(section, [])
    data: dict[str, Any] = config.dataset_tables
    if "general" in data:
        lines += ["", "[general]", *tomli_w.dumps(data["general"]).splitlines()]
    for dataset in data.get("datasets", []):
        lines += ["", *dataset_toml(dataset).splitlines()]
    return "\n".join(lines) + "\n"


def dataset_toml(dataset: Mapping[str, Any]) -> str:
    """One table of [[datasets]], which the library would write inline, into the section above it, if it is short."""
    nested = {key: value for key, value in dataset.items() if isinstance(value, dict)}
    plain = {key: value for key, value in dataset.items() if key not in nested}
    tables = [f"\n[datasets.{key}]\n{tomli_w.dumps(table)}" for key, table in nested.items()]
    return "".join(["[[datasets]]\n", tomli_w.dumps(plain), *tables])


def default_of(config: RunConfig, parameter: Parameter) -> Any:
    """Default of a setting in the family of a run."""
    return config.spec.defaults.get(parameter.key, None if parameter.required else parameter.default)


def _inline(name: str, tables: list[Section]) -> str:
    """A list of tables as one value; as tables of their own they would end the section that they stand in."""
    rows = []
    for table in tables:
        fields = table.model_dump(exclude_none=True)
        rows.append(", ".join(tomli_w.dumps({key: value}).rstrip() for key, value in fields.items()))
    return "\n".join([f"{name} = [", *(f"    {{ {row} }}," for row in rows), "]"])
