"""Reading TOML files, with advice on what people write into them by mistake. Torch-free."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from musubi_tuner.errors import ConfigError
from musubi_tuner.files import read_text

_BACKSLASH = "in double quotes a backslash begins an escape: write Windows paths in 'single quotes'"


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: if it is missing or not TOML; names the line, and single quotes for Windows paths.
    """
    try:
        text = read_text(path, ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run `python train.py` to list the run files here") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, expected a TOML file") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        advice = ""
        if "\\" in text and ("escape" in str(error) or "hex" in str(error)):
            advice = f"; {_BACKSLASH}"
        elif re.search(r"=\s*[\[{]?\s*[\u201c-\u201f\u2018-\u201b\u00ab]", text):
            advice = "; write straight quotes, not those of a word processor"
        raise ConfigError(f"{path}: not valid TOML: {error}{advice}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply") from None
    # Escapes that TOML knows: "C:\\temp" is a path with a tab.
    eaten = next((value for value in _texts(document) if re.match("[A-Za-z]:[\b\t\n\f\r]", value)), None)
    if eaten is not None:
        raise ConfigError(f"{path}: {eaten!r} was written as a path; {_BACKSLASH}")
    return document


def _texts(value: Any) -> Iterator[str]:
    """The texts of a document, whatever tables and lists they are in."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
