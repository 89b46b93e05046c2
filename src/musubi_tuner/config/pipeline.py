"""Run files of several steps. Torch-free.

    [[steps]]
    name = "warm-up"                 folder <output_dir>/01-warm-up
    use = ["cats"]                   names of its data sets; absent = all
    start = "previous"               from the final weights of the previous step; "previous_ema" = their average, "file" = as set in the file
    until = { metric = "loss/main", below = 0.02 }     ends it early
    [steps.train]                    each table overrides that of the file
    max_steps = 500

A step is an ordinary run; `document_of` gives its run file. A LoRA step starts from the adapter of a previous LoRA step, or attaches to the
model of previous full training.
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean, error
from musubi_tuner.config.paths import expand
from musubi_tuner.config.schema import SECTION_ALIASES, flat_names, parameters
from musubi_tuner.files import read_json
from musubi_tuner.models.registry import MODELS

Start = Literal["file", "previous", "previous_ema"]
TABLE = "steps"
CHECKPOINTS = "checkpoints.json"
_KEYS = ("name", "use", "start", "until")
_UNTIL = {
    "metric": "a tag of metrics.jsonl",
    "below": "a number",
    "min_epochs": "a whole number, 0 or more",
    "patience": "a whole number, 1 or more",
}
_FOLDER = re.compile(r'[^/\\:*?"<>|=\x00-\x1f\x7f]{0,99}[^/\\:*?"<>|=\x00-\x1f\x7f\s.]')


@dataclass(frozen=True)
class Until:
    """When a step ends early.

    Attributes:
        metric: a tag of metrics.jsonl, whose mean over the last 20 logged values is tested at each log line.
        below: limit that the mean must be under.
        min_epochs: complete epochs before it may end.
        patience: tests in a row that must succeed.
    """

    metric: str
    below: float
    min_epochs: int = 0
    patience: int = 1


@dataclass(frozen=True)
class Step:
    """A step of a run file.

    Attributes:
        number: from 1. of: how many there are.
        start: what it starts from. previous: the previous step; None for the first one.
        use: names of its data sets; empty = all.
        own: tables that override those of the file.
    """

    number: int
    of: int
    name: str
    start: Start
    previous: "Step | None"
    use: tuple[str, ...]
    until: Until | None
    own: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Name of its folder below run.output_dir."""
        return f"{self.number:02d}-{self.name}"


def rename_aliases(tables: dict[str, Any], where: str, problems: list[Diagnostic]) -> None:
    """Rename tables that are written under another name.

    Args:
        where: prefix of the key in a message, such as ``steps[0].``.
    """
    for alias, name in SECTION_ALIASES.items():
        if alias in tables:
            if name in tables:
                problems.append(error("U05", f"{where}{alias}", f"is another name of [{name}]; keep one"))
            tables[name] = tables.pop(alias)


def take_step_options(document: dict[str, Any], overrides: dict[str, Any], problems: list[Diagnostic]) -> None:
    """Move options ``steps.NAME.section.key`` into the named steps.

    Args:
        document: the run file, changed in place. overrides: the options; those of steps are removed.
    """
    entries = document.get(TABLE)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return
    by_name = {entry["name"]: entry for entry in entries if isinstance(entry.get("name"), str)}
    known = {**{parameter.key: parameter for parameter in parameters()}, **flat_names()}
    for option in [key for key in overrides if key.startswith(f"{TABLE}.")]:
        value, rest = overrides.pop(option), option.removeprefix(f"{TABLE}.")
        name = max((name for name in by_name if rest.startswith(f"{name}.")), key=len, default=None)
        if name is None and rest in by_name:
            problems.append(error("S04", option, f"names a step but no setting; write {option}.section.key=..."))
            continue
        if name is None:
            hint = did_you_mean(rest.partition(".")[0], by_name)
            problems.append(error("S04", option, f"no step has this name.{hint} The steps are {', '.join(by_name)}"))
            continue
        key = rest.removeprefix(f"{name}.")
        section, dot, last = (known[key].key if key in known else key).partition(".")
        if key == "name" or not put(by_name[name], SECTION_ALIASES.get(section, section) + dot + last, value):
            problems.append(error("S04", option, "cannot be changed by an option; change it in the file"))


def put(document: dict[str, Any], key: str, value: Any) -> bool:
    """Set a dotted key; False if one of its tables is not a table, which the schema reports."""
    *tables, last = key.split(".")
    table: Any = document
    for part in tables:
        table = table.setdefault(part, {}) if isinstance(table, dict) else None
    if isinstance(table, dict):
        table[last] = value
    return isinstance(table, dict)


def steps_of(document: Mapping[str, Any], problems: list[Diagnostic]) -> list[Step]:
    """The valid steps of a run file; empty for an ordinary one."""
    entries = document.get(TABLE, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        problems.append(error("S05", TABLE, "is not a list of tables; write [[steps]] with two brackets"))
        return []
    if entries and not {"schema_version", "run", "model"} & set(document):
        text = "need a run file with [run] and [model], not an option file; see docs/steps.md"
        problems.append(error("S05", TABLE, text))
        return []
    steps: list[Step] = []
    for number, entry in enumerate(entries, start=1):
        where = f"{TABLE}[{number - 1}]"

        def refuse(key: str, text: str, where: str = where) -> None:
            problems.append(error("S06", f"{where}.{key}" if key else where, text))

        name = entry.get("name")
        if not isinstance(name, str) or not _FOLDER.fullmatch(name):
            refuse("name", f"is {name!r}, expected a text that is valid as a folder name")
            name = f"step{number}"
        elif name in {step.name for step in steps}:
            refuse("name", f"is {name!r}, which another step has too; give every step its own name")
        begin = entry.get("start", "previous" if steps else "file")
        if begin not in get_args(Start):
            refuse(
                "start",
                f"is {begin!r}, expected one of {', '.join(get_args(Start))}.{did_you_mean(str(begin), get_args(Start))}",
            )
            begin = "file"
        if begin != "file" and not steps:
            refuse("start", f'is "{begin}", but the first step has no previous step; write "file"')
            begin = "file"
        use = entry.get("use", [])
        if not isinstance(use, list) or not all(isinstance(each, str) for each in use):
            refuse("use", f"is {use!r}, expected a list of data set names")
            use = []
        own = {key: value for key, value in entry.items() if key not in _KEYS}
        for key, value in own.items():
            if not isinstance(value, dict):
                refuse(
                    key, f"unknown key.{did_you_mean(key, _KEYS)} Settings of a step belong in tables: [steps.train]"
                )
        own = {key: value for key, value in own.items() if isinstance(value, dict)}
        for key in ("output_dir", "name"):
            if key in own.get("run", {}):
                refuse(
                    f"run.{key}", "belongs in [run] of the file; a step writes into its own folder in run.output_dir"
                )
        until = _until(entry.get("until"), refuse)
        previous = steps[-1] if steps else None
        steps.append(Step(number, len(entries), name, begin, previous, tuple(use), until, own))
    return steps


def _until(given: Any, refuse: Any) -> Until | None:
    if given is None:
        return None
    if not isinstance(given, dict):
        refuse("until", f'is {given!r}, expected a table such as {{ metric = "loss/main", below = 0.02 }}')
        return None
    good = True
    for key, value in given.items():
        if key not in _UNTIL:
            refuse(f"until.{key}", f"unknown key.{did_you_mean(key, _UNTIL)}")
            good = False
        elif not _is_until(key, value):
            refuse(f"until.{key}", f"is {value!r}, expected {_UNTIL[key]}")
            good = False
    for key in ("metric", "below"):
        if key not in given:
            refuse("until", f"has no {key}")
            good = False
    return Until(**{**given, "below": float(given["below"])}) if good else None


def _is_until(key: str, value: Any) -> bool:
    """Whether a value is valid for a key of ``until``."""
    if key == "metric":
        return isinstance(value, str) and bool(value.strip())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if key == "below":
        return math.isfinite(value)
    return isinstance(value, int) and value >= (key == "patience")


def find_step(steps: Sequence[Step], name: str) -> Step | str:
    """The step with a name, or why there is none."""
    for step in steps:
        if step.name == name:
            return step
    names = [step.name for step in steps]
    return (
        f"has no step {name!r}.{did_you_mean(name, names)} Its steps: {', '.join(names)}"
        if names
        else "has no [[steps]]"
    )


def document_of(document: Mapping[str, Any], step: Step) -> dict[str, Any]:
    """The run file of a step.

    Args:
        document: the whole file with command-line overrides applied.
    """
    tables = {key: value for key, value in copy.deepcopy(dict(document)).items() if key != TABLE}
    run = _table(tables, "run")
    root, name = expand(str(run.get("output_dir", ""))), str(run.get("name", ""))
    model = _table(tables, "model")
    chain: list[Step] = []
    current: Step | None = step
    while current is not None:
        chain.insert(0, current)
        current = current.previous
    adapter: dict[str, Any] = {}
    for each in chain:
        # Each step hands on what the next one trains: a trained model, or the model below an adapter.
        model, adapter = _begun(each, tables, model, root, name)
        model = _lay(model, _table(each.own, "model"))
    for key, begun in (("model", model), ("adapter", adapter)):
        if begun and isinstance(tables.get(key, {}), dict):
            tables[key] = begun if key == "model" else {**tables.get(key, {}), **begun}
    laid = {key: _lay(value, step.own[key]) if key in step.own else value for key, value in tables.items()}
    laid |= {key: value for key, value in step.own.items() if key not in laid}
    if isinstance(laid.get("run", {}), dict):
        laid["run"] = {**laid.get("run", {}), "output_dir": str(root / step.folder)}
    return laid


def _table(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A table of a file; empty if it is not a table, which the schema reports."""
    found = document.get(key)
    return dict(found) if isinstance(found, dict) else {}


def _lay(below: Any, above: Mapping[str, Any]) -> Any:
    """Merge a table over a table, recursively; a value that should be a table is kept, for the schema to report."""
    if not isinstance(below, dict):
        return below
    inner = {key: _lay(below[key], value) for key, value in above.items()
             if isinstance(value, dict) and isinstance(below.get(key), dict)}  # fmt: skip
    return {**below, **above, **inner}


def _setting(document: Mapping[str, Any], step: Step, key: str) -> Any:
    """Value of a setting in a step: from the step, the file, the family or the schema."""
    section, name = key.split(".")
    for table in (_table(step.own, section), _table(document, section)):
        if name in table:
            return table[name]
    arch = _table(document, "model").get("arch")
    if isinstance(arch, str) and arch in MODELS and key in MODELS[arch].defaults:
        return MODELS[arch].defaults[key]
    return next(
        parameter.field.get_default(call_default_factory=True) for parameter in parameters() if parameter.key == key
    )


def trains_adapter(document: Mapping[str, Any], step: Step) -> bool:
    """Whether a step trains an adapter."""
    return bool(_setting(document, step, "adapter.type") != "none")


def _begun(
    step: Step, document: Mapping[str, Any], model: dict[str, Any], root: Path, name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """[model] and [adapter] of a step, as they follow from the previous step."""
    if step.start == "file" or step.previous is None:
        return _table(document, "model"), {}
    folder, ending = root / step.previous.folder, "_ema" if step.start == "previous_ema" else ""
    if trains_adapter(document, step.previous):
        return model, {"init_from": str(folder / f"{name}{ending}.safetensors")}
    of_another = ("geometry", "init_scheme", "ema_file", "revision", "weights")
    kept = {key: value for key, value in model.items() if key not in of_another}
    begun = {**kept, "init": "checkpoint", "path": f"{folder}{_FINAL}"}
    return {**begun, **({"weights": "ema"} if ending else {})}, {}


_FINAL = ":final"
"""Suffix of a step's folder: its final checkpoint."""


def final_update(folder: Path) -> int | None:
    """Update at which the run of a folder ended; None if it has not."""
    try:
        return int(read_json(folder / CHECKPOINTS)["checkpoints"]["final"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def unfinished_step(step: Step | None, root: Path, texts: Sequence[str | None]) -> Step | None:
    """The previous step whose files this one needs and that is not finished yet; None if there is none.

    Args:
        texts: paths of the run file.
    """
    before = step.previous if step else None
    while before is not None:
        folder = root / before.folder
        files = [Path(text.removesuffix(_FINAL)) for text in texts if text is not None]
        if any(file.is_relative_to(folder) for file in files) and final_update(folder) is None:
            return before
        before = before.previous
    return None


def follow_problem(document: Mapping[str, Any], step: Step) -> str | None:
    """Why a step cannot start from the previous one; None if it can."""
    if step.start == "file" or step.previous is None:
        return None
    if trains_adapter(document, step.previous) and not trains_adapter(document, step):
        return (
            f'is "{step.start}", but step {step.previous.name} trains an adapter, and full training cannot start from one; '
            'write "file", or merge the adapter and name the merged file'
        )
    if step.start == "previous_ema" and not _setting(document, step.previous, "ema.enabled"):
        return (
            f'is "previous_ema", but step {step.previous.name} keeps no average (ema.enabled = false); write "previous"'
        )
    return None
