"""Reading a file of another trainer: TOML, JSON, YAML, or a shell command. Torch-free.

Nothing is run: shell commands are only split into words.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from musubi_tuner.config.foreign import FOREIGN
from musubi_tuner.config.importers import import_published
from musubi_tuner.config.importers.ai_toolkit import import_ai_toolkit
from musubi_tuner.config.importers.documents import read_document
from musubi_tuner.config.importers.options import CHANGING, VARIANTS, import_options
from musubi_tuner.config.importers.report import Imported, Report
from musubi_tuner.config.importers.tools import TITLES, is_typed, recognise
from musubi_tuner.config.paths import locate
from musubi_tuner.config.schema.items import DatasetSection
from musubi_tuner.errors import ConfigError
from musubi_tuner.files import read_text

LARGEST = 1 << 20
"""Largest file in bytes; configs are small."""
SHELL = (".sh", ".bat", ".ps1", ".cmd", ".txt")
OTHER_SCRIPT = re.compile(r".*(cache|encode|generate|inference|gen_img).*\.py")
"""Scripts of other trainers that encode before training, which this program does itself, or draw after it."""

_END = "\0"
_PIECES = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|(?<!\S)#.*|(?:(?<!\S)\d)?&?[<>]+(?:&\d)?|[|;&]+""")
_OPERATOR = r"(?:\d?[<>]+(?:&\d)?|[|;&]+)"
_WINDOWS_WORD = rf"""{_OPERATOR}(?=\s|$)|(?:"[^"]*"|'[^']*'|[^\s"'])+"""
"""Of a shell text: what is quoted, what is a comment, and what ends a command; the former two are kept from being the latter."""


def read_foreign(path: Path, tool: str | None = None, dataset: Path | None = None) -> Imported:
    """Translate a file of another trainer.

    Args:
        tool: musubi, kohya, ai-toolkit, plan (a JSON training plan) or shell; None = recognised by its content.
        dataset: its data set file, if that is a separate file.

    Raises:
        ConfigError: if it cannot be read, or is not a file of a known trainer.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    if path.stat().st_size > LARGEST:
        raise ConfigError(f"{path}: is {path.stat().st_size} bytes; a config has at most {LARGEST}")
    document, notes = _document(path, tool)
    found = import_published(document) if tool is None else None
    if found is None:
        found = _translated(path, document, tool)
        found.report.needs_you += notes
    named = found.document.get("dataset_config")
    if dataset is None and isinstance(named, str) and has_subsets(locate(named, path)):
        dataset = locate(named, path)
    if dataset is not None:
        tables = data_tables(dataset, found.report)
        found.document.pop("dataset_config", None)
        for key in ("datasets", "dataset_config"):
            found.report.leave_out(key, f"the data sets are those of {dataset}")
        found.general, found.datasets = {**found.general, **tables.get("general", {})}, tables.get("datasets", [])
        for setting, keys in CHANGING.items():
            if any(table.get(key) for table in (found.general, *found.datasets) for key in keys):
                section, _, name = setting.partition(".")
                if name not in found.document.setdefault(section, {}):
                    found.document[section][name] = VARIANTS
                    found.report.defaulted.append((setting, VARIANTS))
    return found


def _translated(path: Path, document: Mapping[str, Any], tool: str | None) -> Imported:
    """Translate a file of a general trainer."""
    if document and set(document) <= {"general", "datasets"}:
        raise ConfigError(f"{path}: is a data set file; import the file of the training, with --dataset {path}")
    if isinstance(document.get("LoRA_type"), str):
        raise ConfigError(
            f"{path}: is a file of the bmaltais GUI. Let the GUI print its training command, put that into a .sh file, and import it"
        )
    kind = {"shell": None}.get(tool or "", tool) or recognise(document)
    if is_typed(document) and tool is None:
        raise ConfigError(f"{path}: is already a run file; use it as it is")
    if kind is None:
        raise ConfigError(
            f"{path}: is not the training_config.json of a known trainer, nor a file of {', '.join(TITLES.values())}; if it is one, name "
            "the trainer with --from"
        )
    if kind == "ai-toolkit":
        return import_ai_toolkit(document)
    return import_options(dict(document), lambda text: locate(text, path), kind)


def _document(path: Path, tool: str | None) -> tuple[Mapping[str, Any], list[tuple[str, str]]]:
    """The keys of a file, and which of them need a value from a person."""
    ending = path.suffix.lower()
    if tool == "shell" or ending in SHELL:
        try:
            return shell_options(read_text(path, ConfigError), windows=ending in (".bat", ".cmd", ".ps1"))
        except ConfigError as problem:
            raise ConfigError(f"{path}: {problem}") from None
    found = read_document(path)
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path}: is not the training_config.json of a known trainer: it holds a {type(found).__name__}, expected a table of keys and values"
        )
    return found, []


def shell_options(text: str, *, windows: bool = False) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Options of the first command with a script in a shell text, and those with values that the shell would fill in.

    Commands that only encode are skipped; a second training command is reported.

    Args:
        windows: backslashes are part of paths.

    Raises:
        ConfigError: if there is no such command.
    """
    joined = re.sub(r"[\\^`]\r?\n", " ", text)
    commands: list[tuple[list[str], int]] = []
    for line in joined.splitlines():
        for words in _commands(line, windows):
            at = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
            if at is not None and any(word.startswith("--") for word in words[at:]):
                commands.append((words, at))
    if not commands:
        raise ConfigError("no command with a .py script and --options was found in the text")
    training = [each for each in commands if not OTHER_SCRIPT.fullmatch(_script(each))] or commands
    found, unfilled = _options(*training[0])
    others = [
        ("(script)", f"{_script(each)} is a second training command; import it from a separate file")
        for each in training[1:]
    ]
    return found, [*unfilled, *others]


def _commands(line: str, windows: bool) -> list[list[str]]:
    """The words of each command of a line; a redirection ends a command, and a comment the line.

    Raises:
        ConfigError: for a script with a quote that is not closed.
    """
    if windows:
        if re.match(r"\s*(rem\b|::)", line, re.IGNORECASE):
            return []
        line = re.sub(r"(?<!\S)#.*", "", line)
        if line.count('"') % 2 and ".py" in line:
            raise ConfigError(f"{line.strip()[:80]!r}: a quote is not closed")
        words = [
            _END if re.fullmatch(_OPERATOR, word) else re.sub("[\"']", "", word)
            for word in re.findall(_WINDOWS_WORD, line)
        ]
    else:
        marked = _PIECES.sub(
            lambda match: match[0] if match[0][0] in "'\"\\" else "" if "#" in match[0] else f" {_END} ", line
        )
        try:
            words = shlex.split(marked)
        except ValueError:
            if ".py" not in line:
                return []
            raise ConfigError(f"{line.strip()[:80]!r}: a quote is not closed") from None
    found: list[list[str]] = [[]]
    for word in words:
        if word == _END:
            found.append([])
        else:
            found[-1].append(word)
    return found


def _script(command: tuple[list[str], int]) -> str:
    words, at = command
    return words[at].replace("\\", "/").rpartition("/")[2]


def _options(words: list[str], at: int) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    found: dict[str, Any] = {"script": words[at]}
    launch = dict(pairs(words[:at]))
    unfilled = []
    for name, value in pairs(words[at + 1 :]):
        texts = value if isinstance(value, list) else [value]
        open_texts = [text for text in texts if isinstance(text, str) and re.search(r"[$`]|%\w+%", text)]
        rest = [text for text in texts if text not in open_texts]
        if open_texts and not rest:
            unfilled.append((name, f"is {value!r}, which the shell would replace by a value; write that value"))
            continue
        # Words of a variable behind an option with its value are options of their own.
        unfilled += [(f"({text})", "stands for options that only the shell knows; write them") for text in open_texts]
        found[name] = rest if len(rest) > 1 else rest[0]
    if launch:
        found["accelerate"] = launch
    return found, unfilled


def pairs(words: list[str]) -> list[tuple[str, Any]]:
    """Options and their values: true without a value, a list for several."""
    found: list[tuple[str, Any]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2 and not word[2].isdigit():
            name, equals, value = word[2:].partition("=")
            found.append((name.replace("-", "_"), _typed(value) if equals else True))
        elif found:
            name, before = found[-1]
            value = _typed(word)
            found[-1] = (
                name,
                value if before is True else [*(before if isinstance(before, list) else [before]), value],
            )
    return found


def _typed(text: str) -> Any:
    """A text as a number or boolean if it is one; names such as 2024-01-01 and 1_000 stay texts."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d{1,400}", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+(\.\d*)?[eE][+-]?\d+)", text):
        return float(text)
    return text


def data_tables(path: Path, report: Report) -> dict[str, Any]:
    """[general] and [[datasets]] of a data set file of musubi-tuner or sd-scripts; subsets of the latter become data sets.

    Args:
        report: takes keys that mean nothing here.

    Raises:
        ConfigError: if it cannot be read.
    """
    document = read_document(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: holds {type(document).__name__}, expected [general] and [[datasets]]")
    general, entries, found = document.get("general", {}), document.get("datasets", []), []
    if (
        not isinstance(general, dict)
        or not isinstance(entries, list)
        or not all(isinstance(entry, dict) for entry in entries)
    ):
        raise ConfigError(f"{path}: expected a table [general] and a list of tables [[datasets]]")
    for entry in entries:
        subsets = entry.get("subsets", [{}])
        if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
            raise ConfigError(f"{path}: subsets is {subsets!r}, expected a list of tables")
        shared = {key: value for key, value in entry.items() if key != "subsets"}
        for subset in subsets:
            own = {**shared, **subset}
            folder = own.pop("image_dir", None)
            found.append({**({"image_directory": folder} if folder is not None else {}), **own})
    folders: dict[Any, int] = {}
    for own in found:  # one folder at several resolutions has a cache for each
        folder = str(own.get("image_directory"))
        folders[folder] = folders.get(folder, 0) + 1
        if folders[folder] > 1 and "cache_directory" not in own and "image_directory" in own:
            own["cache_directory"] = f"{folder}/cache_{folders[folder]}"
    own_names = set(DatasetSection.model_fields)
    for table in (general, *found):
        for key in [key for key in table if key not in own_names and key not in FOREIGN]:
            report.dropped_changes_result.append(
                (f"({path.name}: {key})", f"is {table.pop(key)!r}, and data sets have no such setting here")
            )
    return {"general": general, "datasets": found}


def has_subsets(path: Path) -> bool:
    """Whether a file is a data set file in sd-scripts' form, which only `data_tables` reads."""
    try:
        document = read_document(path) if path.is_file() else {}
    except ConfigError:
        return False  # said where it is read
    entries = document.get("datasets") if isinstance(document, dict) else None
    return isinstance(entries, list) and any(isinstance(entry, dict) and "subsets" in entry for entry in entries)
