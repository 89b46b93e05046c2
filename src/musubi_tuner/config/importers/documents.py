"""Files of other trainers as plain values: TOML, JSON and YAML. Torch-free."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from musubi_tuner.config.read import read_toml, reason, texts_of
from musubi_tuner.errors import ConfigError
from musubi_tuner.files import read_text

_TAG = "tag:yaml.org,2002"


def read_document(path: Path) -> Any:
    """What a file says, by its ending: .json, .yaml or .yml; TOML else.

    Raises:
        ConfigError: if it cannot be read, has a key twice, or holds what no config holds.
    """
    ending = path.suffix.lower()
    if ending not in (".json", ".yaml", ".yml"):
        return read_toml(path)
    kind, text = ("JSON" if ending == ".json" else "YAML"), read_text(path, ConfigError)
    try:
        if kind == "JSON":
            document = json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_number)
        else:
            document = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        found = _place(error) if isinstance(error, yaml.YAMLError) else reason(error)
        raise ConfigError(f"{path}: not valid {kind}: {found}") from None
    texts_of(path, document)
    return document


def _place(error: yaml.YAMLError) -> str:
    """What is wrong, and in which line."""
    mark, said = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {said}" if mark is not None else said


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in found if keys.count(key) > 1)!r} is there twice; keep one")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")


class _Loader(yaml.SafeLoader):
    """YAML as ai-toolkit reads it: 1e-4 is a number too. A date stays a text, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A table with text keys.

        Raises:
            ConstructorError: for a key that is no text, or is there twice.
        """
        seen = set[str]()
        for key, _ in node.value:
            if key.tag not in (f"{_TAG}:str", f"{_TAG}:merge"):
                problem = f"the key {getattr(key, 'value', '')!r} is no text; put it in quotes"
            elif key.value in seen:
                problem = f"the key {key.value!r} is there twice; keep one"
            else:
                seen.add(key.value)
                continue
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    f"{_TAG}:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)
for _kind in ("timestamp", "binary"):
    _Loader.add_constructor(f"{_TAG}:{_kind}", yaml.SafeLoader.construct_yaml_str)
for _kind in ("set", "omap", "pairs"):
    _Loader.add_constructor(f"{_TAG}:{_kind}", yaml.SafeLoader.construct_undefined)
