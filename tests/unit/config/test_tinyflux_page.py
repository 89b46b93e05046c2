"""docs/tinyflux.md names settings as they are: every key with its default, every snippet valid, every id on the list."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.config.command_line import format_default
from musubi_tuner.config.schema import parameters, section_classes
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "tinyflux.md").read_text(encoding="utf-8")
SPEC = MODELS["tf"]
KEYS = {parameter.key: parameter for parameter in parameters(SPEC)}
ROWS = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", PAGE, re.MULTILINE))
SNIPPETS = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def default_of(key: str) -> str:
    """Default of a setting in a TinyFlux run, as the page writes it."""
    if key in SPEC.defaults:
        return f"`{as_toml(SPEC.defaults[key])}`"
    if key.startswith("model.geometry."):
        (field,) = (field for field in fields(TinyFluxConfig) if field.name == key.rpartition(".")[2])
        return f"`{as_toml(field.default)}`"
    text = format_default(KEYS[key])
    return text if text == "absent" else f"`{text}`"


def test_defaults_are_those_of_the_code() -> None:
    assert len(ROWS) > 80
    assert {key: cells.split(" | ")[0] for key, cells in ROWS.items()} == {key: default_of(key) for key in ROWS}


def test_no_key_is_listed_twice() -> None:
    assert len(re.findall(r"^\| `[\w.]+` \|", PAGE, re.MULTILINE)) == len(ROWS)


@pytest.mark.parametrize("section", ["experts", "objective"])
def test_every_setting_of_training_that_applies_is_listed(section: str) -> None:
    own = [key for key in KEYS if key.startswith(f"{section}.")]
    assert len(own) > 10 and [key for key in own if key not in ROWS] == []


def test_snippets_hold_known_settings_with_values_that_they_take() -> None:
    assert len(SNIPPETS) == 2
    classes = section_classes(SPEC)
    for snippet in SNIPPETS:
        for section, values in tomllib.loads(snippet).items():
            required = {"model": {"arch": "tf"}}.get(section, {})
            classes[section].model_validate({**required, **values})


@pytest.mark.parametrize(("snippet", "file"), [(0, "toml/tinyflux.toml"), (1, "toml/tinyflux_scratch.toml")])
def test_snippets_go_with_the_run_files_they_are_about(snippet: int, file: str) -> None:
    run = tomllib.loads((ROOT / file).read_text(encoding="utf-8"))
    for section, values in tomllib.loads(SNIPPETS[snippet]).items():
        for key, value in values.items():
            assert key in run[section], key
            # The second shows what its file has; the first what to change in its file.
            assert snippet == 0 or run[section][key] == value, key


def test_ids_are_on_the_list_of_acceptance() -> None:
    listed = tomllib.loads((ROOT / "tests" / "acceptance.toml").read_text(encoding="utf-8"))
    named = set(re.findall(r"\b(R\d\d|[A-H]\d{1,2})\b", PAGE))
    assert len(named) > 50
    assert sorted(named - set(listed)) == []
