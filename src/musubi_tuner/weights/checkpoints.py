"""Finding and reading weight files: local files, folders, and repositories on the hub.

A source is a file, a folder, ``folder:name`` for a checkpoint of a run folder (name = final, best, latest, step_N,
epoch_N), ``owner/repo[:subfolder or file]`` on the hub, or ``hub[:subfolder or file]`` for the family's own repository.
A folder is searched by the same rules here and on the hub. Pickled files are read with ``weights_only`` only.
"""

import hashlib
import json
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from musubi_tuner.config.paths import (
    WEIGHT_SUFFIXES,
    expand,
    is_checkpoint_name,
    is_hub_id,
    is_published,
    run_checkpoint,
)
from musubi_tuner.errors import CheckpointError, DataError, NoAverageError
from musubi_tuner.files import read_json
from musubi_tuner.weights.hub import Repository

logger = logging.getLogger(__name__)
WRAPPER_PREFIXES = ("_orig_mod.", "module.")
"""Left in key names by torch.compile and by data parallel wrappers."""
MODEL_FILES = (
    "model.safetensors",
    "pytorch_model.safetensors",
    "weights.safetensors",
    "model.pt",
    "pytorch_model.pt",
    "weights.pt",
    "checkpoint.pt",
)
EMA_FILES = ("ema.safetensors", "model_ema.safetensors", "ema_weights.safetensors", "ema.pt", "model_ema.pt")
CONFIG_FILES = ("config.json", "model_config.json")
OPTIONS_FILE = "options.json"
"""Beside config.json: the options of training, of which the config has no fields."""
ADAPTER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")
"""Names of adapters in the folders of peft and diffusers."""
ADAPTER_CONFIG = "adapter_config.json"
"""Beside an adapter of peft: its ranks and alphas."""


@dataclass
class WeightFile:
    """A weight file in memory.

    Attributes:
        path: where it lies.
        tensors: key -> tensor; may be views of the mapped file, so copy them.
        metadata: header of a safetensors file. config: geometry found in, or beside, the file; None if there is none.
        options: recorded options of training, from the header or options.json beside the config.
        origin: what a person would call the file; its path, or repository and name.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True)
class FoundWeights:
    """A weight file that a source led to.

    Attributes:
        path: where it lies now. origin: what a person would call it. config: json of the geometry for a file that has none
            in its header or beside it.
    """

    path: Path
    origin: str
    config: Path | None = None


def find_weights(source: str | Path, *, ema: bool = False, first: Sequence[str] = ()) -> Path:
    """The path of `locate_weights`."""
    return locate_weights(source, ema=ema, first=first).path


def locate_weights(
    source: str | Path, *, ema: bool = False, ema_file: str | None = None, revision: str | None = None,
    published: Sequence[str] = (), first: Sequence[str] = (),
) -> FoundWeights:  # fmt: skip
    """Turn a source into one weight file, downloading it if it is on the hub.

    Args:
        source: see the module text.
        ema: take the averaged weights.
        ema_file: exact name of the averaged file beside or below the source, or its whole path; implies ``ema``.
        revision: branch, tag or commit on the hub.
        published: repositories of the family; ``hub`` means the first, and one is suggested when another is not found.
        first: names under which a folder may hold weights that have no average; taken before all others.

    Raises:
        CheckpointError: saying what was looked for.
    """
    text = str(source)
    if ema_file is not None and expand(ema_file).is_absolute():
        path = expand(ema_file)
        if not path.is_file():
            raise CheckpointError(f"{path}: file not found")
        return FoundWeights(path, str(path))
    ema = ema or ema_file is not None
    path = expand(text)
    if path.is_file():
        place = _Folder(path.parent)
        return place.found(_ema_twin(place, path.name, ema_file) if ema else path.name)
    if path.is_dir():
        return _choose(_Folder(path), ema, ema_file, first)
    folder, name = run_checkpoint(text)
    if folder is not None:
        place = _Folder(folder)
        chosen = _named(place, name, ema and ema_file is None)
        return place.found(_ema_twin(place, chosen, ema_file) if ema_file else chosen)
    if is_published(text):
        if not published:
            raise CheckpointError(f"{text}: this model has no published repository; write owner/name instead of hub")
        text = published[0] + text.removeprefix("hub")
    if is_hub_id(text):
        return _on_hub(text, ema, ema_file, revision, published, first)
    if is_checkpoint_name(text):
        raise CheckpointError(f"{text}: names a checkpoint of a run; write its folder too, as in folder:{text}")
    if text == "none":
        raise CheckpointError('none: names no weights; a new model is made with model.init = "scratch"')
    raise CheckpointError(f"{text}: file not found, and not a hub id of the form owner/name")


class _Folder:
    """A folder of weight files on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> list[str]:
        """Of everything directly in it."""
        return sorted(path.name for path in self.folder.iterdir())

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def said(self, name: str) -> str:
        """A file of it, for messages."""
        return str(self.folder / name)

    def fetch(self, name: str) -> Path:
        return self.folder / name

    def found(self, name: str) -> FoundWeights:
        return FoundWeights(self.folder / name, self.said(name))


class _HubFolder:
    """The root or a subfolder of a repository."""

    def __init__(self, repository: Repository, files: Sequence[str], folder: str = "") -> None:
        self.repository, self.files, self.folder = repository, files, folder
        self.prefix = f"{folder}/" if folder else ""

    def __str__(self) -> str:
        return f"{self.repository}{f': {self.folder}' if self.folder else ''}"

    def names(self) -> list[str]:
        below = [name.removeprefix(self.prefix) for name in self.files if name.startswith(self.prefix)]
        return sorted({name.partition("/")[0] for name in below})

    def has(self, name: str) -> bool:
        return self.prefix + name in self.files

    def said(self, name: str) -> str:
        return f"{self.repository}: {self.prefix}{name}"

    def fetch(self, name: str) -> Path:
        return self.repository.fetch(self.prefix + name)

    def found(self, name: str) -> FoundWeights:
        """Download a weight file with the config that belongs to it: one beside it, else one at the root; and what goes with both."""
        path, whole = self.fetch(name), self.prefix + name
        folder, _, file = whole.rpartition("/")
        beside = [f"{folder}/{config}" if folder else config for config in config_names(file)]
        config = next((wanted for wanted in (*beside, *CONFIG_FILES) if wanted in self.files), None)
        more = [f"{folder}/{ADAPTER_CONFIG}", *([f"{config.rpartition('/')[0]}/{OPTIONS_FILE}"] if config else [])]
        for wanted in [name.removeprefix("/") for name in more]:
            if wanted in self.files:
                self.repository.fetch(wanted)
        return FoundWeights(path, self.said(name), self.repository.fetch(config) if config else None)


_Place = _Folder | _HubFolder


TORCH_SUFFIXES = (".pt", ".pth")
"""Of files that may hold an average beside the weights."""


def config_names(file: str) -> tuple[str, ...]:
    """Names under which the geometry of a weight file may lie beside it, best first."""
    return (f"{Path(file).stem.removesuffix('_ema')}.json", *CONFIG_FILES)


def _ema_twin(place: _Place, name: str, ema_file: str | None) -> str:
    """Name of the averaged weights that belong to a file."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.rpartition(".")
    if ema_file:
        candidates = [folder + slash + ema_file]
    elif stem.endswith("_ema") or file in EMA_FILES:
        return name
    else:
        names = [f"{stem}_ema{dot}{suffix}", f"{stem}_ema.safetensors", *(EMA_FILES if file in MODEL_FILES else ())]
        candidates = [folder + slash + candidate for candidate in names]
    twin = next((candidate for candidate in candidates if place.has(candidate)), None)
    if twin is None and not ema_file and name.endswith(TORCH_SUFFIXES) and _holds_average(place.fetch(name)):
        return name
    if twin is None:
        raise NoAverageError(
            f"{place.said(candidates[0])}: no averaged weights beside {file}; take the model weights instead"
        )
    return twin


def _holds_average(path: Path) -> bool:
    """Whether a torch file of a trainer has the averaged weights in it."""
    try:
        held = read_torch_file(path)
    except CheckpointError:
        return False  # what is wrong with the file is said where its weights are read
    return isinstance(held, dict) and averaged_inside(held) is not None


def averaged_inside(held: dict[str, Any]) -> dict[str, Any] | None:
    """Averaged weights in what a torch file of the published trainer holds."""
    ema = held.get("ema")
    shadow = ema.get("shadow") if isinstance(ema, dict) else None
    return shadow if isinstance(shadow, dict) else None


def _choose(place: _Place, ema: bool, ema_file: str | None, first: Sequence[str]) -> FoundWeights:
    """The weights of a folder, by the names that trainers give them."""
    if ema_file:
        if not place.has(ema_file):
            raise CheckpointError(f"{place.said(ema_file)}: file not found")
        return place.found(ema_file)
    names = (*first, *(EMA_FILES if ema else MODEL_FILES))
    for name in names:
        if place.has(name):
            return place.found(name)
    if place.has("checkpoints.json"):
        return place.found(_named(place, None, ema))
    held = place.names()
    if ema:
        for suffix in ("_ema.safetensors", "_ema.pt"):
            found = [
                name for name in held if name.endswith(suffix) and not re.search(r"(step|epoch)_?\d|-\d{6}_", name)
            ]
            if len(found) == 1:
                return place.found(found[0])
    known = next(iter(_trainer_names(held, ema)), None)
    if known:
        return place.found(known)
    alone = [name for name in held if name.endswith(".safetensors")]
    if first and ADAPTER_CONFIG in held and len(alone) == 1:
        return place.found(alone[0])
    if ema:  # a torch file of a trainer may hold both
        whole = next((name for name in (*MODEL_FILES, *_trainer_names(held, False)) if place.has(name)), "")
        if whole.endswith(TORCH_SUFFIXES) and _holds_average(place.fetch(whole)):
            return place.found(whole)
    kind, which = (NoAverageError, "averaged ") if ema else (CheckpointError, "")
    raise kind(
        f"{place}: holds no {which}weights; looked for {', '.join(names)}, checkpoints.json, "
        f"final, best, step_N and epoch_N; found {', '.join(held[:8]) or 'nothing'}"
    )


def _trainer_names(held: Sequence[str], ema: bool) -> list[str]:
    """Files under the names of trainers, best first.

    final, best, highest step_N, highest epoch_N of the published trainer; then those of a run of this one, which its
    ``<name>.config.toml`` names.
    """
    suffix = r"_ema" if ema else ""
    patterns = [rf"final{suffix}", rf"best{suffix}", rf"step_(\d+){suffix}", rf"epoch_(\d+){suffix}"]
    for run in (name.removesuffix(".config.toml") for name in held if name.endswith(".config.toml")):
        patterns += [re.escape(run) + part for part in (suffix, rf"-step(\d{{8}}){suffix}", rf"-(\d{{6}}){suffix}")]
    chosen = []
    for pattern in patterns:
        matches = [
            (int((match.groups() or ("0",))[0]), name.endswith(".safetensors"), name)
            for name in held
            if (match := re.fullmatch(rf"{pattern}\.(?:safetensors|pt)", name))
        ]
        chosen += [name for _, _, name in sorted(matches, reverse=True)]
    return chosen


def _named(place: _Place, name: str | None, ema: bool) -> str:
    """File of a checkpoint by name: through checkpoints.json, or in folders of the published trainer by its own name.

    ``latest`` is the newest checkpoint; None the final one, else the best, else the newest.
    """
    if name is not None and not place.has("checkpoints.json"):
        wanted = re.compile(r"(step|epoch)_\d+" if name == "latest" else re.escape(name))
        for averaged in (True, False) if ema else (False,):
            known = _trainer_names(place.names(), averaged)
            file = next((f for f in known if wanted.fullmatch(f.rpartition(".")[0].removesuffix("_ema"))), None)
            if file:
                return _ema_twin(place, file, None) if ema else file
    try:
        if not place.has("checkpoints.json"):
            raise FileNotFoundError("checkpoints.json")
        entries = dict(read_json(place.fetch("checkpoints.json"))["checkpoints"])
        if not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("an entry is not an object")
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{place}: has no readable checkpoints.json, so '{name}' cannot be looked up; name a file"
        ) from None
    if name is None:
        name = next((n for n in ("final", "best") if n in entries), "latest")
    if name == "latest" and entries:
        name = list(entries)[-1]
    if name not in entries:
        raise CheckpointError(f"{place}: no checkpoint '{name}'; it has {', '.join(entries) or 'none'}")
    file = entries[name].get("ema" if ema else "model")
    if not file:
        kind, which = (NoAverageError, "averaged ") if ema else (CheckpointError, "")
        raise kind(f"{place}: checkpoint '{name}' has no {which}weights")
    if not place.has(file):
        raise CheckpointError(f"{place.said(file)}: listed in checkpoints.json, but not there")
    return str(file)


def _on_hub(
    text: str, ema: bool, ema_file: str | None, revision: str | None, published: Sequence[str], first: Sequence[str]
) -> FoundWeights:
    """Weights in a repository: what the part after the colon names, a file or a folder."""
    repo, _, tail = text.partition(":")
    tail = tail.strip("/")
    repository = Repository(repo, revision, published)
    files = repository.names()
    root = _HubFolder(repository, files)
    if ema_file and root.has(ema_file):
        return root.found(ema_file)
    # step_N alone lies where the published trainer uploads it.
    ends = ("",) if tail.endswith(WEIGHT_SUFFIXES) else WEIGHT_SUFFIXES
    spelled = [f"{folder}{tail}{end}" for folder in ("", "checkpoints/") for end in ends] if tail else []
    file = next((name for name in spelled if root.has(name)), None)
    if file:
        return root.found(_ema_twin(root, file, ema_file) if ema else file)
    folder = _HubFolder(repository, files, tail)
    if not folder.names():
        parent, _, name = tail.rpartition("/")
        if is_checkpoint_name(name):
            for place in (parent, f"{parent}/checkpoints" if parent else "checkpoints"):
                above = _HubFolder(repository, files, place)
                if above.has("checkpoints.json") or (name == "latest" and _trainer_names(above.names(), ema)):
                    return above.found(_named(above, name, ema))
        raise CheckpointError(
            f"{repository}: has no file or folder {tail}; it holds {', '.join(root.names()[:8]) or 'nothing'}"
        )
    found = _choose(folder, ema, ema_file, first)
    usual = (EMA_FILES if ema else MODEL_FILES)[0]
    if ema_file is None and found.path.name not in (usual, *first):
        logger.warning("%s has no %s; using %s", folder, usual, found.origin.rpartition(": ")[2])
    return found


def read_weights(path: Path, config: Path | None = None, origin: str | None = None, *, ema: bool = False) -> WeightFile:
    """Read a weight file and the geometry that belongs to it.

    Args:
        config: json of the geometry, where the file has none in its header or beside it. origin: see `WeightFile`.
        ema: of a torch file that holds averaged weights beside others, take those.

    Raises:
        CheckpointError: if the file is cut short, of another kind, or holds no tensors.
    """
    found = _read_safetensors(path) if path.suffix in (".safetensors", ".sft") else _read_pickle(path, ema)
    beside = path.with_suffix(".safetensors")
    if not found.tensors and path.suffix == ".pt" and beside.is_file():
        # The v4.1 trainer kept optimizer and position in the torch file, and the weights beside it.
        logger.warning("%s holds no weights; using %s", path, beside.name)
        held, path = found.config, beside
        found = _read_safetensors(beside)
        found.config = found.config or held
    found.origin = str(path) if origin is None else origin
    found.tensors = {strip_wrappers(key): tensor for key, tensor in found.tensors.items()}
    if not found.tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    place = f"{path}: config"
    if found.config is None:
        for sibling in (*(path.with_name(name) for name in config_names(path.name)), config):
            if sibling is not None and sibling.is_file():
                found.config, place = read_json_object(sibling), str(sibling)
                options = sibling.with_name(OPTIONS_FILE)
                if not found.options and sibling.name in CONFIG_FILES and options.is_file():
                    found.options = read_json_object(options)
                break
    if found.config is not None and not found.options:
        # Folders written before options.json keep them in the config.
        recorded = as_object(found.config.get("_metadata", {}), f"{place}: _metadata")
        found.options = as_object(recorded.get("options", {}), f"{place}: options")
    return found


def sample_identity(file: WeightFile) -> str:
    """16 hex digits from the names, shapes and the first and last values of all tensors of a file.

    Reads a page or two per tensor, so it costs nothing even for large files; training changes every tensor, and so this.
    """
    digest = hashlib.sha256()
    for key in sorted(file.tensors):
        tensor = file.tensors[key]
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        for part in (flat[:64], flat[-64:]):
            digest.update(part.contiguous().view(torch.uint8).numpy().tobytes() if part.numel() else b"")
    return digest.hexdigest()[:16]


def as_object(value: Any, what: str) -> dict[str, Any]:
    """A dictionary, or a `CheckpointError` that says what was found instead."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is {value!r}, expected a JSON object")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if the file is not JSON, or holds something else than an object.
    """
    try:
        return as_object(read_json(path), str(path))
    except DataError as error:
        raise CheckpointError(str(error)) from error


def strip_wrappers(key: str) -> str:
    """A key without the prefixes that wrappers leave behind."""
    while key.startswith(WRAPPER_PREFIXES):
        key = key.split(".", 1)[1]
    return key.replace("._orig_mod.", ".")


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: {_what_it_is(path) or f'not a complete safetensors file ({error}); copy or download it again'}"
        ) from error
    try:
        config = json.loads(metadata["config_json"]) if "config_json" in metadata else None
        options = json.loads(metadata.get("options_json", "{}"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: its header holds broken JSON ({error})") from error
    if config is not None:
        as_object(config, f"{path}: config_json of its header")
    as_object(options, f"{path}: options_json of its header")
    return WeightFile(path, tensors, metadata, config, options)


def _what_it_is(path: Path) -> str:
    """What a file is that is called safetensors and is none; empty if its first bytes tell nothing."""
    with path.open("rb") as file:
        start = file.read(64)
    return next((text for begin, text in FOREIGN_STARTS.items() if start.lower().startswith(begin)), "")


FOREIGN_STARTS = {
    b"pk\x03\x04": "is a torch file (pickle) under the name of a safetensors file; rename it to .pt",
    b"\x80\x02": "is a torch file (pickle) under the name of a safetensors file; rename it to .pt",
    b"gguf": "is a GGUF file, which cannot be read; use the safetensors file",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch it with git lfs pull",
    b"<!doctype": "is a web page, not the file itself; use its download link",
    b"<html": "is a web page, not the file itself; use its download link",
}
"""First bytes, in small letters, of files that people have under the name of a safetensors file."""


def read_torch_file(path: Path) -> Any:
    """What a file of ``torch.save`` holds; nothing in it is run, and tensors are views of the mapped file.

    Raises:
        CheckpointError: if it is no such file, cut short, or holds objects that need code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: cannot be read as plain weights (not a torch file, or more than tensors in it). Files that need code to "
            "unpickle are not opened; convert it to safetensors"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, IndexError, KeyError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path}: cannot be read as plain weights (not a complete torch file); copy or download it again, or convert it to "
            "safetensors"
        ) from error


def _read_pickle(path: Path, ema: bool) -> WeightFile:
    loaded = read_torch_file(path)
    config, metadata = None, {}
    if isinstance(loaded, dict):
        config = loaded.get("model_config")
        metadata = _header_of(loaded) | ({"step": str(loaded["step"])} if isinstance(loaded.get("step"), int) else {})
        inside = [loaded.get(key) for key in ("model", "state_dict", "model_state_dict")]
        candidates = [averaged_inside(loaded) if ema else None, *inside]
        loaded = next((held for held in candidates if isinstance(held, dict)), loaded)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary of tensors")
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    return WeightFile(path, tensors, metadata, config if isinstance(config, dict) else None)


def _header_of(loaded: dict[str, Any]) -> dict[str, str]:
    """What would stand in a header, of a LoRA in torch form: {state_dict, config, metadata}."""
    stated, config = loaded.get("metadata"), loaded.get("config")
    if not isinstance(loaded.get("state_dict"), dict):
        return {}
    header: dict[str, str] = {}
    if isinstance(stated, dict):
        header = {
            key: str(value)
            for key, value in stated.items()
            if isinstance(key, str) and isinstance(value, str | int | float)
        }
    return header | ({"config_json": json.dumps(config, default=str)} if isinstance(config, dict) else {})


def copy_weights(model: nn.Module, tensors: dict[str, Tensor], what: str, optional: Iterable[str] = ()) -> None:
    """Copy tensors into a model that has storage; nothing stays a view of a mapped file.

    Args:
        model: parameters and persistent buffers are overwritten in place.
        tensors: must hold exactly the keys of the model's state dict, but for ``optional``.
        what: begins the error: the file and the model.
        optional: keys that may be missing and are then left as they are.

    Raises:
        CheckpointError: listing missing, unexpected and mis-shaped keys.
    """
    own = model.state_dict(keep_vars=True)
    check_keys(own, tensors, what, optional)
    with torch.no_grad():
        for key, tensor in own.items():
            if key in tensors:
                tensor.copy_(tensors[key].view(tensor.shape) if tensors[key].shape != tensor.shape else tensors[key])


def check_keys(own: Mapping[str, Any], tensors: Mapping[str, Any], what: str, optional: Iterable[str] = ()) -> None:
    """Raise a `CheckpointError` that lists missing, unexpected and mis-shaped keys, if there are any."""
    missing = [key for key in own if key not in tensors and key not in set(optional)]
    unexpected = [key for key in tensors if key not in own]
    shapes = [
        f"{key} is {list(tensors[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in tensors and not _same_shape(tensors[key], own[key])
    ]
    problems = list(_list_problem("missing", missing, len(own)))
    problems += _list_problem("unexpected", unexpected, len(tensors))
    problems += _list_problem("of another shape", shapes, len(own))
    if problems:
        raise CheckpointError(f"{what}: " + "; ".join(problems))


def _same_shape(found: Any, expected: Any) -> bool:
    """Equal shapes; a single number may be written with or without an axis."""
    return found.shape == expected.shape or (found.numel() == 1 and expected.numel() == 1)


def _list_problem(kind: str, entries: list[str], total: int) -> Iterator[str]:
    if entries:
        shown = ", ".join(entries[:4]) + (", ..." if len(entries) > 4 else "")
        yield f"{len(entries)} of {total} keys {kind} ({shown})"
