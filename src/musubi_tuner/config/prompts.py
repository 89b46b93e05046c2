"""Prompts and their options, in the formats of musubi-tuner. Torch-free.

    .txt    one prompt per line; blank lines and lines that begin with # are ignored
    .toml   [prompt] with shared values, and [[prompt.subset]] entries that override them
    .json   a list of texts or objects

In a line, options follow the prompt: ``a cat on a mat --w 768 --h 512 --d 7``. Text before the first option is
never parsed, and ``--`` without a letter is part of the prompt.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from musubi_tuner.config.read import read_toml
from musubi_tuner.config.run_config import RunConfig
from musubi_tuner.errors import ConfigError
from musubi_tuner.files import read_text


@dataclass(frozen=True)
class Prompt:
    """A prompt with its own settings; None = as set in the run file.

    Attributes:
        guidance, cfg_scale, shift: see the keys of the same name in [sample]; shift 0 = by picture size.
        name: part of the file name. multiplier: strength of the adapters.
    """

    text: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    cfg_scale: float | None = None
    shift: float | None = None
    name: str | None = None
    multiplier: float | None = None


@dataclass(frozen=True)
class _Option:
    field: str
    kind: Callable[[str], Any]
    low: float = 0
    high: float = 2**32


OPTIONS: dict[str, _Option] = {
    "w": _Option("width", int, 16, 8192),
    "h": _Option("height", int, 16, 8192),
    "d": _Option("seed", int, 0, 2**32 - 1),
    "s": _Option("steps", int, 1, 1000),
    "g": _Option("guidance", float, 0, 100),
    "l": _Option("cfg_scale", float, 0, 100),
    "fs": _Option("shift", float, 0, 100),
    "n": _Option("negative", str),
    "m": _Option("multiplier", float, -100, 100),
    "name": _Option("name", str),
}
"""Option letter -> field; letters are case-insensitive."""
OTHERS = {"f": "videos", "i": "start images", "ei": "end images", "cn": "control videos", "ci": "control images",
          "of": "one-frame inference"}  # fmt: skip
"""Options of musubi-tuner for models that are not supported here."""
ALIASES = {
    "prompt": "text", "sample_steps": "steps", "guidance_scale": "guidance", "discrete_flow_shift": "shift",
    "negative_prompt": "negative",
}  # fmt: skip
"""Names of musubi-tuner's prompt objects -> ours."""
_OPTION = re.compile(r"(?:^|\s)--([A-Za-z]\w*)(?:=|(?=\s|$))")
_OTHER_DASH = re.compile(r"(?:^|\s)([\u2014\u2013\u2212-])([A-Za-z]+)[=\s]+-?\d")
"""An option after one hyphen, or after a dash that an editor made of two."""


def parse_line(line: str, where: str) -> Prompt:
    """A prompt with its options.

    Args:
        where: prefix of error messages: file and line.

    Raises:
        ConfigError: for an unknown option, a bad value, or no prompt.
    """
    found = list(_OPTION.finditer(line))
    for dash, letter in _OTHER_DASH.findall(line):
        if letter.lower() in OPTIONS:
            raise ConfigError(
                f"{where}: '{dash}{letter}' would be part of the prompt; write options with two hyphens: --{letter}"
            )
    text = line[: found[0].start()].strip() if found else line.strip()
    if not text:
        raise ConfigError(f"{where}: has options but no prompt; write the prompt before the options")
    values: dict[str, Any] = {}
    for match, following in zip(found, [*found[1:], None]):
        letter = match[1].lower()
        value = line[match.end() : following.start() if following else len(line)].strip()
        if letter in OTHERS:
            raise ConfigError(f"{where}: --{match[1]} is for {OTHERS[letter]}, which no model here supports; remove it")
        if letter not in OPTIONS:
            raise ConfigError(
                f"{where}: --{match[1]} is not an option; known: {', '.join('--' + name for name in OPTIONS)}"
            )
        option = OPTIONS[letter]
        if option.field in values:
            raise ConfigError(f"{where}: --{match[1]} is given twice; keep one")
        values[option.field] = _value(option, value, f"{where}: --{match[1]}")
    return Prompt(text, **values)


def _value(option: _Option, text: str, where: str) -> Any:
    if option.kind is str:
        return text
    try:
        value = option.kind(text)
    except ValueError:
        kind = "a whole number" if option.kind is int else "a number"
        raise ConfigError(f"{where} {text or '(nothing)'}: expected {kind}") from None
    if not option.low <= value <= option.high:
        raise ConfigError(f"{where} {text}: expected {option.low:g} to {option.high:g}")
    return value


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file.

    Raises:
        ConfigError: naming file and line, for what cannot be read, or if there is no prompt.
    """
    suffix = path.suffix.lower()
    readers = {".txt": _read_lines, ".toml": _read_toml, ".json": _read_json}
    if suffix not in readers:
        raise ConfigError(f"{path}: is not a prompt file; expected .txt, .toml or .json")
    prompts = readers[suffix](path)
    if not prompts:
        raise ConfigError(
            f"{path}: has no prompt; write one per line" if suffix == ".txt" else f"{path}: has no prompt"
        )
    return prompts


def _read_text(path: Path) -> str:
    try:
        return read_text(path, ConfigError)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a prompt file ({error})") from error


def _read_lines(path: Path) -> list[Prompt]:
    lines = _read_text(path).splitlines()
    return [
        parse_line(line.strip(), f"{path} line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _read_toml(path: Path) -> list[Prompt]:
    document = read_toml(path)
    table = document.get("prompt")
    if set(document) != {"prompt"} or not isinstance(table, dict):
        raise ConfigError(
            f"{path}: expected one table [prompt] with [[prompt.subset]] entries, found {', '.join(document)}"
        )
    shared = {key: value for key, value in table.items() if key != "subset"}
    entries = table.get("subset", [{}])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path}: [prompt.subset] is not a list of tables; write [[prompt.subset]] with two brackets")
    return [from_object({**shared, **entry}, f"{path} subset {n}") for n, entry in enumerate(entries, start=1)]


def _read_json(path: Path) -> list[Prompt]:
    try:
        entries = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: holds a {type(entries).__name__}, expected a list of texts or objects")
    return [
        parse_line(entry, f"{path} entry {n}") if isinstance(entry, str) else from_object(entry, f"{path} entry {n}")
        for n, entry in enumerate(entries, start=1)
    ]


def from_object(entry: Any, where: str) -> Prompt:
    """A prompt from a JSON object or a TOML table.

    Raises:
        ConfigError: for unknown keys and bad values.
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: is {entry!r}, expected a text or an object")
    values: dict[str, Any] = {ALIASES.get(str(key), str(key)): value for key, value in entry.items()}
    known = {field.name for field in fields(Prompt)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]}; known: {', '.join(sorted(known))}")
    by_field = {option.field: option for option in OPTIONS.values()}
    for key, value in values.items():
        kind = by_field[key].kind if key in by_field else str
        good = isinstance(value, str) if kind is str else isinstance(value, int | float) and not isinstance(value, bool)
        if not good or (kind is int and not isinstance(value, int)):
            raise ConfigError(f"{where}: {key} is {value!r}, expected {'a text' if kind is str else 'a number'}")
        if kind is not str:
            _value(by_field[key], str(value), f"{where}: {key}")
    if not values.get("text"):
        raise ConfigError(f"{where}: has no prompt")
    return Prompt(**values)


def as_prompts(prompts: Sequence[str | Prompt], where: str = "") -> list[Prompt]:
    """Parse texts with options; prompts are kept unchanged."""
    return [
        p if isinstance(p, Prompt) else parse_line(p, f"{where} entry {n}".strip())
        for n, p in enumerate(prompts, start=1)
    ]


def sample_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts of [sample]; an empty list = no samples are drawn.

    Raises:
        ConfigError: naming file and line of what cannot be read.
    """
    prompts = config.sample.prompts
    if prompts is None:
        return []
    return read_prompts(config.locate(prompts)) if isinstance(prompts, str) else as_prompts(prompts)


def prompt_texts(prompts: Sequence[str | Prompt], negative: str | None) -> list[str]:
    """Texts of prompts, their negative ones, the shared negative or the empty text, each once: what drawing them encodes."""
    parsed = as_prompts(prompts)
    own = [prompt.negative for prompt in parsed if prompt.negative is not None]
    return list(dict.fromkeys([*(prompt.text for prompt in parsed), *own, negative or ""]))


def prompts_file(config: RunConfig) -> Path | None:
    """Where encodings of the sample prompts are kept; None if the run has no caches of texts."""
    if "text" not in config.spec.task(config).caches or not config.datasets:
        return None
    return config.datasets[0].cache_directory / f"prompts_{config.spec.code}.safetensors"


@dataclass(frozen=True)
class SampleSettings:
    """How samples are drawn; sizes in pixels; ``negative`` None = the trained null condition, or an empty text."""

    width: int
    height: int
    steps: int
    guidance: float
    solver: str
    seed: int
    negative: str | None
    cfg_scale: float = 1.0
    shift: float | None = None
    multiplier: float = 1.0

    def of(self, prompt: Prompt, index: int, pixel_step: int) -> "SampleSettings":
        """Settings of one picture, with those of the prompt; sizes are rounded down to a multiple of ``pixel_step``.

        Without its own seed, picture i is drawn from seed + i.
        """
        own = {
            field.name: value
            for field in fields(self)
            if field.name != "seed" and (value := getattr(prompt, field.name, None)) is not None
        }
        if own.get("shift") == 0:
            own["shift"] = None
        for side in ("width", "height"):
            if side in own:
                own[side] -= own[side] % pixel_step
        seed = prompt.seed if prompt.seed is not None else self.seed + index
        return replace(self, **own, seed=seed)
