"""Command-line options of every command that takes a run file, generated from the schema. Torch-free.

``--name value`` for flat names, ``--set section.key=value`` for all keys. Hyphens and underscores are the same. A bare
``--flag`` means true and ``--no_flag`` false.

Other users can see command lines in the list of processes. So a command passes secrets to its children in an environment
variable: `secret_environment` makes it, and `split_overrides` of the child reads it.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w

from musubi_tuner.config.diagnostics import did_you_mean
from musubi_tuner.config.fields import Parameter
from musubi_tuner.config.foreign import FOREIGN
from musubi_tuner.config.load import parse_value
from musubi_tuner.config.names import is_secret_name
from musubi_tuner.config.read import read_toml, toml_value
from musubi_tuner.config.schema import flat_names, item_parameters, parameter_of, parameters, section_classes
from musubi_tuner.config.schema.items import DatasetSection, GeneralSection
from musubi_tuner.errors import ConfigError
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import ModelSpec


def format_default(parameter: Parameter) -> str:
    """Default of a setting as TOML, or a word."""
    if parameter.required:
        return "required"
    return format_value(parameter.field.get_default(call_default_factory=True))


def format_value(value: Any) -> str:
    """A value as TOML, or a word."""
    if value is None:
        return "absent"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def type_and_default(parameter: Parameter, spec: ModelSpec | None = None) -> tuple[str, str]:
    """Type and default of a setting in a family; or in all, behind the code of each where they differ or not all have it."""
    types, defaults = {}, {}
    for code in [spec.code] if spec else MODELS:
        if parameter.section in ("general", "datasets"):
            types[code] = parameter.written_as
            defaults[code] = format_value(MODELS[code].dataset_defaults.get(parameter.name))
        elif (own := parameter_of(MODELS[code], parameter.key)) is not None:
            value = MODELS[code].defaults.get(own.key)
            types[code] = own.written_as
            defaults[code] = format_default(own) if value is None else format_value(value)
    shared = len(set(defaults.values())) == 1 and len(defaults) == (1 if spec else len(MODELS))
    each = ["; ".join(f"{code}: {fact}" for code, fact in facts.items()) for facts in (types, defaults)]
    kind = parameter.written_as if len(set(types.values())) == 1 else each[0]
    return kind, next(iter(defaults.values())) if shared else each[1]


def family_of(words: Sequence[str]) -> ModelSpec | None:
    """Family of the run file among the words of a command, whose settings its help shows; None if there is none."""
    for word in words:
        with suppress(ConfigError, KeyError, TypeError):
            if word.endswith(".toml"):
                return MODELS[read_toml(Path(word))["model"]["arch"]]
    return None


def settings_help(spec: ModelSpec | None = None) -> str:
    """All settings by table: flag, type, defaults and sentence; of one family, or of all."""
    by_key: dict[str, list[str]] = {}
    for name, parameter in flat_names().items():
        by_key.setdefault(parameter.key, []).append(f"--{name}")
    lines = []
    section = None
    for parameter in (*parameters(spec), *item_parameters()):
        if parameter.section != section:
            section = parameter.section
            lines.append(f"\n[{section}]  {table_doc(section, spec)}" if section else "\ntop level")
        of_set = parameter.section == "datasets"
        flags = "" if of_set else ", ".join(by_key.get(parameter.key, [f"--set {parameter.key}=..."]))
        kind, default = type_and_default(parameter, spec)
        lines.append(f"  {parameter.name}  ({kind}; default {default})  {flags}")
        lines.append(f"      {parameter.help}")
    return "\n".join(lines)


def table_doc(section: str, spec: ModelSpec | None = None) -> str:
    """What a table is for: in a family, or in the first that has settings in it."""
    if section in ITEM_TABLES:
        return ITEM_TABLES[section].__doc__ or ""
    classes = [section_classes(each)[section] for each in ([spec] if spec else map(MODELS.__getitem__, MODELS))]
    return next((cls.__doc__ for cls in classes if cls.model_fields), None) or ""


ITEM_TABLES = {"general": GeneralSection, "datasets": DatasetSection}


class Parser(argparse.ArgumentParser):
    """Argument parser whose mistakes are our errors, with a suggestion."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}\nusage: {self.format_usage().removeprefix('usage: ').strip()}")


_SECRETS = "MUSUBI_SECRETS"
"""Variable with the secret overrides of the parent, a JSON object."""


def is_secret(option: str) -> bool:
    """Whether an override is a secret, for the file or for one of its steps.

    Args:
        option: dotted key or flat name.
    """
    parts = option.split(".")
    start = 2 if parts[0] == "steps" else 0
    return any(is_secret_name(".".join(parts[n:])) for n in range(start, len(parts)))


def override_arguments(overrides: Mapping[str, Any]) -> list[str]:
    """Command-line form of overrides, for a child; secrets go another way, see `secret_environment`."""
    words = []
    for key, value in overrides.items():
        if is_secret(key):
            continue
        if key == "step":
            words += ["--step", str(value)]
            continue
        text = (
            "none" if value is None else tomli_w.dumps({"v": value}, multiline_strings=False).partition("=")[2].strip()
        )
        if isinstance(value, str):
            text = value
        words += ["--set", f"{key}={text}"]
    return words


def secret_environment(overrides: Mapping[str, Any]) -> dict[str, str]:
    """Variables that give a child the secrets among the overrides."""
    secrets = {key: value for key, value in overrides.items() if is_secret(key)}
    return {_SECRETS: json.dumps(secrets)} if secrets else {}


def split_overrides(arguments: Sequence[str], own: set[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate a command's own options from settings.

    Args:
        own: option names of the command, with their dashes; they and everything positional are passed on.

    Returns:
        The arguments for the command's parser, and overrides by dotted key, typed; with the secrets of a parent.

    Raises:
        ConfigError: for an unknown option or a missing value.
    """
    flat = flat_names()
    keys = {**flat, **{parameter.key: parameter for parameter in (*parameters(), *item_parameters())}}
    passed: list[str] = []
    overrides: dict[str, Any] = json.loads(os.environ.pop(_SECRETS, "{}"))
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            passed.append(word)
            continue
        option, equals, attached = word.partition("=")
        name = option[2:].replace("-", "_")
        if f"--{name}" in own:
            passed.append(f"--{name}{equals}{attached}")
            continue
        if name == "step":
            overrides[name] = attached if equals else _value(word, rest)
            continue
        if name == "set":
            if not equals:
                attached = _value(word, rest)
            key, sign, text = attached.partition("=")
            if not sign:
                raise ConfigError(f"--set {attached}: expected --set section.key=value")
            overrides[key] = _parse_key(key, text, keys)
            continue
        negative = name.startswith("no_") and name not in flat
        parameter = flat.get(name.removeprefix("no_") if negative else name)
        if parameter is None and name in FOREIGN:
            overrides[name] = _foreign_value(name, attached if equals else None, rest)
            continue
        if parameter is None:
            known = [*flat, *(option_name[2:] for option_name in own)]
            raise ConfigError(f"unknown option --{name}.{did_you_mean(name, known)} See --help")
        is_bool = bool in parameter.kinds and not parameter.choices
        if negative and not is_bool:
            raise ConfigError(f"--{name}: {parameter.key} is not a true/false setting")
        if is_bool and not equals and not (rest and rest[0] in ("true", "false")):
            overrides[parameter.key] = not negative
            continue
        overrides[parameter.key] = parse_value(parameter, attached if equals else _value(word, rest))
    return passed, overrides


def _foreign_value(name: str, attached: str | None, rest: list[str]) -> Any:
    """Value of an option by another trainer's name: of the type of the setting that it stands for, or as it looks."""
    if attached is None and (not rest or rest[0].startswith("--")):
        return True
    text = attached if attached is not None else rest.pop(0)
    entry = FOREIGN[name]
    known = {parameter.key: parameter for parameter in (*parameters(), *item_parameters())}
    if entry.key in known and entry.convert is None:
        return parse_value(known[entry.key], text)
    if text in ("True", "False"):
        return text == "True"
    return toml_value(text)


def _value(option: str, rest: list[str]) -> str:
    if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
        raise ConfigError(f"{option}: the value is missing")
    return rest.pop(0)


def _parse_key(key: str, text: str, keys: dict[str, Parameter]) -> Any:
    if key.startswith(("steps.", "roles.")):  # a setting, behind the name of a step or a role
        parts = key.split(".")
        key = next((end for n in range(2, len(parts)) if (end := ".".join(parts[n:])) in keys), key)
        key = "train.max_grad_norm" if key.endswith(".max_grad_norm") else key
    if key in keys:
        return parse_value(keys[key], text)
    return toml_value(text)


def weights_to_write(option: str, text: str, overwrite: bool) -> Path:
    """The weight file that a command is to write, checked before it begins to work.

    Args:
        option: that names the file, with a space behind it. overwrite: replace a file that is there.

    Raises:
        ConfigError: if it is no safetensors file, or if one is there.
    """
    path = Path(text)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{option}{path}: expected a name that ends in .safetensors")
    if path.exists() and not overwrite:
        raise ConfigError(f"{option}{path}: exists already; choose another name, or add --overwrite to replace it")
    return path
