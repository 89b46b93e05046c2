"""Reading TOML files, with advice on what people write into them by mistake. Torch-free."""

import re
import tomllib
from pathlib import Path
from typing import Any

from musubi_tuner.errors import ConfigError
from musubi_tuner.files import read_text

DEEPEST = 50
"""Tables and lists inside each other in a config."""
MOST_VALUES = 1_000_000
"""Values of a config. A file of a megabyte holds fewer, unless its YAML aliases multiply them."""
_BACKSLASH = "in double quotes a backslash begins an escape: write Windows paths in 'single quotes'"
_OTHER_ENDINGS = (".yaml", ".yml", ".json", ".sh", ".bat", ".ps1", ".cmd")


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
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {reason(error)}{_advice(path, text, str(error))}") from error
    # Escapes that TOML knows: "C:\\temp" is a path with a tab.
    eaten = next((value for value in texts_of(path, document) if re.match("[A-Za-z]:[\b\t\n\f\r]", value)), None)
    if eaten is not None:
        raise ConfigError(f"{path}: {eaten!r} was written as a path; {_BACKSLASH}")
    return document


def reason(error: Exception) -> str:
    """What Python's reader found, in words of a config."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number has too many digits" if "integer string conversion" in str(error) else str(error)


def _advice(path: Path, text: str, found: str) -> str:
    """What to do about it, behind a semicolon; empty if nothing is known."""
    if path.suffix.lower() in _OTHER_ENDINGS:
        return f"; if another trainer uses it: python -m musubi_tuner.config import {path} -o run.toml"
    if "\\" in text and ("escape" in found or "hex" in found):
        return f"; {_BACKSLASH}"
    if re.search(r"=\s*[\[{]?\s*[\u201c-\u201f\u2018-\u201b\u00ab]", text):
        return "; write straight quotes, not those of a word processor"
    return ""


def toml_value(text: str) -> Any:
    """A value as TOML, or the text itself if it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def texts_of(path: Path, document: Any) -> list[str]:
    """All texts of a document, having checked that it can be a config.

    Args:
        path: of the file, for the error.

    Raises:
        ConfigError: if it is nested too deeply (or holds itself), has too many values, or has a NUL character in a text.
    """
    found, level, count = list[str](), [document], 0
    for _ in range(DEEPEST):
        inside = [part for value in level if isinstance(value, dict | list) for part in value]
        inside += [part for value in level if isinstance(value, dict) for part in value.values()]
        texts = [value for value in level if isinstance(value, str)]
        if any("\0" in text for text in texts):
            raise ConfigError(f"{path}: a text has a NUL character; is it a text file?")
        found, level, count = found + texts, inside, count + len(inside)
        if count > MOST_VALUES:
            raise ConfigError(f"{path}: has more than {MOST_VALUES:,} values; a config has a few hundred")
        if not level:
            return found
    raise ConfigError(f"{path}: is nested more than {DEEPEST} levels deep; a config has five at most")
