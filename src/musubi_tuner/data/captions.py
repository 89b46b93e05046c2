"""Captions made from captions or from the columns of a JSONL line: built-in transforms, or any function. Torch-free.

    object_relations   puts "subject, object, " or "subject, " in front, each with probability 1/2: one generator with
                       seed 42, one draw per item in the order of the data set
    imagenet           subject, class, subclass, label, caption, synset, imagenet, joined by commas; the label is left out
                       if the classifier was confident and wrong
    package.module:function   called as function(caption, columns) for each caption; returns the new one. The module lies beside
                       the run file, or is installed

Transforms run while the data is listed, so that fingerprints see their result.
"""

import importlib
import importlib.util
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from musubi_tuner.errors import DataError

Columns = Mapping[str, Any]
"""A JSONL line; for an image in a folder only its ``image_path``."""
Transform = Callable[[list[str], Columns], list[str]]
"""New captions of an item from its captions. Called once for each item of a data set, in order."""
CONFIDENT = 0.5
"""At or above this confidence, a wrong prediction removes the label of an item."""
PREFIXES = ("subject, object, ", "subject, ")


def object_relations() -> Transform:
    """A prefix for each item, drawn anew from the start."""
    draws = random.Random(42)

    def prefixed(captions: list[str], columns: Columns) -> list[str]:
        prefix = PREFIXES[draws.random() >= 0.5]
        return [prefix + caption for caption in captions]

    return prefixed


def imagenet_caption(caption: str, columns: Columns) -> str:
    """Caption of an ImageNet item from its columns.

    Args:
        caption: the prompt of the image; may be empty.
        columns: ``semantic_class``, ``semantic_subclass``, ``label``, ``synset_id``, ``pred_confidence``, ``top1_correct``,
            ``top5_correct``; missing ones count as empty, 0 and false.

    Raises:
        DataError: naming a column of another type.
    """
    label = _column(columns, "label", str, "").replace("_", " ")
    confident = _column(columns, "pred_confidence", float, 0.0) >= CONFIDENT
    right = [_column(columns, name, bool, False) for name in ("top1_correct", "top5_correct")]
    parts = [
        "subject",
        _column(columns, "semantic_class", str, "") or "object",
        _column(columns, "semantic_subclass", str, ""),
        "" if confident and not any(right) else label,
        caption,
        _column(columns, "synset_id", str, ""),
        "imagenet",
    ]
    return ", ".join(part for part in parts if part)


def _column(columns: Columns, name: str, kind: type, default: Any) -> Any:
    value = columns.get(name)
    if value is None:
        return default
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (kind is float and isinstance(value, bool)):
        words = {str: "a text", float: "a number", bool: "true or false"}
        raise DataError(f"{name} is {value!r}, expected {words[kind]}")
    return value


def make_transform(name: str | None, beside: Path = Path()) -> Transform:
    """The transform of a data set by its name; None = captions are not changed.

    Args:
        beside: folder in which a module is looked for first.

    Raises:
        DataError: if a function cannot be imported.
    """
    if name is None:
        return lambda captions, columns: captions
    if name == "object_relations":
        return object_relations()
    if name == "imagenet":
        return lambda captions, columns: [imagenet_caption(caption, columns) for caption in captions or [""]]
    return _own(name, beside)


def _module(name: str, beside: Path) -> ModuleType:
    """A module of a folder, which may import others of it; else one that is installed."""
    file = (beside / name.replace(".", "/")).with_suffix(".py").resolve()
    if not file.is_file():
        return importlib.import_module(name)
    own = f"{name} in {file.parent}"  # two run files may have functions of the same name
    if own not in sys.modules and (spec := importlib.util.spec_from_file_location(own, file)) and spec.loader:
        sys.modules[own] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(file.parent))
        try:
            spec.loader.exec_module(sys.modules[own])
        except BaseException:
            del sys.modules[own]
            raise
        finally:
            sys.path.remove(str(file.parent))
    return sys.modules[own]


def _own(name: str, beside: Path) -> Transform:
    """A function of the user; errors and wrong results become a `DataError`."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(_module(module, beside), attribute)
    except Exception as error:
        raise DataError(f"caption_transform: {name} cannot be imported ({type(error).__name__}: {error})") from error

    def transformed(captions: list[str], columns: Columns) -> list[str]:
        found = []
        for caption in captions:
            try:
                value = function(caption, columns)
            except Exception as error:
                raise DataError(f"caption_transform: {name} failed ({type(error).__name__}: {error})") from error
            if not isinstance(value, str):
                raise DataError(f"caption_transform: {name} returned {value!r}, expected a text")
            found.append(value)
        return found

    return transformed
