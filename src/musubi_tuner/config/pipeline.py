"""Run files of several steps. Torch-free.

    [[steps]]
    name = "warm-up"                 folder <output_dir>/01-warm-up
    use = ["cats"]                   which data sets, by their names; absent = all
    start = "previous"               from the final weights of the step before; "previous_ema" = their average, "file" = as the file says
    until = { metric = "loss/main", below = 0.02 }     ends it early
    [steps.train]                    each table overrides that of the file
    max_steps = 500

A step is an ordinary run; `document_of` gives its run file. A LoRA step starts from the adapter of a LoRA step before it, or attaches to the
model that full training left.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean
from musubi_tuner.models.registry import MODELS

Start = Literal["file", "previous", "previous_ema"]
TABLE = "steps"
_KEYS = ("name", "use", "start", "until")
_UNTIL = {"metric": str, "below": float, "min_epochs": int, "patience": int}


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
        start: what it starts from. previous: the step before; None for the first one.
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


def steps_of(document: Mapping[str, Any], problems: list[Diagnostic]) -> list[Step]:
    """The valid steps of a run file; empty for an ordinary one."""
    entries = document.get(TABLE, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        problems.append(Diagnostic("error", TABLE, "is not a list of tables; write [[steps]] with two brackets"))
        return []
    steps: list[Step] = []
    for number, entry in enumerate(entries, start=1):
        where = f"{TABLE}[{number - 1}]"

        def refuse(key: str, text: str, where: str = where) -> None:
            problems.append(Diagnostic("error", f"{where}.{key}" if key else where, text))

        name = entry.get("name")
        if not isinstance(name, str) or not name or name in (".", "..") or any(c in '/\\:*?"<>|' for c in name):
            refuse("name", f"is {name!r}, expected a name that a folder can have")
            name = f"step{number}"
        elif name in {step.name for step in steps}:
            refuse("name", f"is {name!r} twice; every step needs its own name")
        begin = entry.get("start", "previous" if steps else "file")
        if begin not in get_args(Start):
            refuse(
                "start",
                f"is {begin!r}, expected one of {', '.join(get_args(Start))}.{did_you_mean(str(begin), get_args(Start))}",
            )
            begin = "file"
        if begin != "file" and not steps:
            refuse("start", f'is "{begin}", and no step comes before the first one; write "file"')
            begin = "file"
        use = entry.get("use", [])
        if not isinstance(use, list) or not all(isinstance(each, str) for each in use):
            refuse("use", f"is {use!r}, expected a list of names of data sets")
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
                refuse(f"run.{key}", "belongs to the file; a step writes into its own folder below run.output_dir")
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
        kind = _UNTIL.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is None:
            refuse(f"until.{key}", f"unknown key.{did_you_mean(key, _UNTIL)}")
            good = False
        elif (
            (kind is str and not isinstance(value, str))
            or (kind is float and not is_number)
            or (kind is int and (not isinstance(value, int) or isinstance(value, bool) or value < (key == "patience")))
        ):
            words = {str: "a tag of metrics.jsonl", float: "a number", int: "a whole number"}[kind]
            refuse(f"until.{key}", f"is {value!r}, expected {words}")
            good = False
    for key in ("metric", "below"):
        if key not in given:
            refuse("until", f"has no {key}")
            good = False
    return Until(**{**given, "below": float(given["below"])}) if good else None


def find_step(steps: Sequence[Step], name: str) -> Step | str:
    """The step of a name, or why there is none."""
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
    root, name = Path(str(tables.get("run", {}).get("output_dir", ""))), str(tables.get("run", {}).get("name", ""))
    model = dict(tables.get("model", {}))
    chain: list[Step] = []
    current: Step | None = step
    while current is not None:
        chain.insert(0, current)
        current = current.previous
    for each in chain:
        # Each step hands on what the next one trains: a trained model, or the model below an adapter.
        model, adapter = _begun(each, tables, model, root, name)
        if each is step:
            laid = _lay(tables, each.own)
            laid["model"] = _lay({"m": model}, {"m": each.own.get("model", {})})["m"]
            if adapter:
                laid["adapter"] = {**adapter, **laid.get("adapter", {})}
            laid["run"] = {**laid.get("run", {}), "output_dir": str(root / step.folder)}
            return laid
        model = _lay({"m": model}, {"m": each.own.get("model", {})})["m"]
    raise AssertionError("a step is at the end of its own chain")


def trains_adapter(document: Mapping[str, Any], step: Step) -> bool:
    """Whether a step trains an adapter."""
    arch = document.get("model", {}).get("arch")
    usual = MODELS[arch].defaults.get("adapter.type", "none") if arch in MODELS else "none"
    kind = step.own.get("adapter", {}).get("type", document.get("adapter", {}).get("type", usual))
    return bool(kind != "none")


def _begun(
    step: Step, document: Mapping[str, Any], model: dict[str, Any], root: Path, name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """[model] and [adapter] of a step, as they follow from the step before."""
    if step.start == "file" or step.previous is None:
        return dict(document.get("model", {})), {}
    folder, ending = root / step.previous.folder, "_ema" if step.start == "previous_ema" else ""
    if trains_adapter(document, step.previous):
        return model, {"init_from": str(folder / f"{name}{ending}.safetensors")}
    of_another = ("geometry", "init_scheme", "ema_file", "revision", "weights")
    kept = {key: value for key, value in model.items() if key not in of_another}
    begun = {**kept, "init": "checkpoint", "path": str(folder)}
    return {**begun, **({"weights": "ema"} if ending else {})}, {}


def _lay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables over tables, key by key."""
    laid = dict(below)
    for key, value in above.items():
        laid[key] = {**laid[key], **value} if isinstance(value, dict) and isinstance(laid.get(key), dict) else value
    return laid


def follow_problem(document: Mapping[str, Any], step: Step) -> str | None:
    """Why a step cannot start from the one before; None if it can."""
    if step.start == "file" or step.previous is None:
        return None
    if trains_adapter(document, step.previous) and not trains_adapter(document, step):
        return (
            f'is "{step.start}", and step {step.previous.name} trains an adapter, from which the full model of this step cannot start; '
            'write "file", or merge the adapter and name the merged file'
        )
    return None
