"""Finding and reading weight files: local files, folders, and repositories on the hub.

A source is a file, a folder, ``folder:name`` for a run folder of this trainer (name = final, best, step_N, epoch_N),
or ``owner/repo[:subfolder or file]`` on the hub. Pickled files are read with ``weights_only`` only.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.config.paths import WEIGHT_SUFFIXES, is_hub_id
from musubi_tuner.errors import CheckpointError

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


@dataclass
class WeightFile:
    """A weight file in memory.

    Attributes:
        path: where it lies.
        tensors: key -> tensor; may be views of the mapped file, so copy them.
        metadata: header of a safetensors file. config: geometry found in, or beside, the file; None if there is none.
        options: recorded options of training, from the config's ``_metadata.options`` or the header.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def find_weights(
    source: str | Path, *, ema: bool = False, ema_file: str | None = None, revision: str | None = None,
    other_spelling: Callable[[str], str | None] = lambda repo: None,
) -> Path:  # fmt: skip
    """Turn a source into the path of one weight file, downloading it if it is on the hub.

    Args:
        source: see the module text.
        ema: take the averaged weights.
        ema_file: exact name of the averaged file beside or below the source; implies ``ema``.
        revision: branch, tag or commit on the hub.
        other_spelling: suggests another repository when one is not found.

    Raises:
        CheckpointError: saying what was looked for.
    """
    text = str(source)
    ema = ema or ema_file is not None
    path = Path(text).expanduser()
    if path.is_file():
        return _ema_twin(path, ema_file) if ema else path
    if path.is_dir():
        return _in_folder(path, ema, ema_file)
    folder, colon, name = text.rpartition(":")
    if colon and Path(folder).expanduser().is_dir():
        named = _named(Path(folder).expanduser(), name, ema and ema_file is None)
        return _ema_twin(named, ema_file) if ema_file else named
    if is_hub_id(text):
        return _on_hub(text, ema, ema_file, revision, other_spelling)
    raise CheckpointError(f"{text}: file not found, and not a hub id of the form owner/name")


def _ema_twin(path: Path, ema_file: str | None) -> Path:
    if ema_file:
        twin = path.parent / ema_file
    elif path.stem.endswith("_ema") or path.name in EMA_FILES:
        return path
    else:
        candidates = [path.with_name(f"{path.stem}_ema{path.suffix}")]
        if path.name in MODEL_FILES:
            candidates += [path.parent / name for name in EMA_FILES]
        twin = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
    if not twin.is_file():
        raise CheckpointError(f"{twin}: no averaged weights beside {path.name}; take the model weights instead")
    return twin


def _in_folder(folder: Path, ema: bool, ema_file: str | None) -> Path:
    if ema_file:
        if not (folder / ema_file).is_file():
            raise CheckpointError(f"{folder / ema_file}: file not found")
        return folder / ema_file
    names = EMA_FILES if ema else MODEL_FILES
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if (folder / "checkpoints.json").is_file():
        return _named(folder, None, ema)
    if ema:
        for pattern in ("*_ema.safetensors", "*_ema.pt"):
            found = [path for path in folder.glob(pattern) if not re.search(r"(step|epoch)_?\d|-\d{6}_", path.name)]
            if len(found) == 1:
                return found[0]
    legacy = _reference_names(folder, ema)
    if legacy:
        return legacy
    held = sorted(path.name for path in folder.iterdir())[:8]
    raise CheckpointError(
        f"{folder}: holds no {'averaged ' if ema else ''}weights; looked for {', '.join(names)}, checkpoints.json, "
        f"final, best, step_N and epoch_N; found {', '.join(held) or 'nothing'}"
    )


def _reference_names(folder: Path, ema: bool) -> Path | None:
    """Names of the published trainer: final, best, highest step_N, highest epoch_N."""
    suffix = "_ema" if ema else ""
    for name in ("final", "best"):
        path = folder / f"{name}{suffix}.safetensors"
        if path.is_file():
            return path
    for kind in ("step", "epoch"):
        numbered = [
            (int(match[1]), path)
            for path in folder.glob(f"{kind}_*.safetensors")
            if (match := re.fullmatch(rf"{kind}_(\d+){suffix}", path.stem))
        ]
        if numbered:
            return max(numbered)[1]
    return None


def _named(folder: Path, name: str | None, ema: bool) -> Path:
    """A checkpoint of a run folder by name, through its checkpoints.json."""
    try:
        entries = dict(json.loads((folder / "checkpoints.json").read_text(encoding="utf-8"))["checkpoints"])
        if not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("an entry is not an object")
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder}: has no readable checkpoints.json, so '{name}' cannot be looked up; name a file"
        ) from None
    if name is None:
        name = next((n for n in ("final", "best") if n in entries), None) or (list(entries)[-1] if entries else "final")
    if name not in entries:
        raise CheckpointError(f"{folder}: no checkpoint '{name}'; it has {', '.join(entries) or 'none'}")
    file = entries[name].get("ema" if ema else "model")
    if not file:
        raise CheckpointError(f"{folder}: checkpoint '{name}' has no {'averaged ' if ema else ''}weights")
    if not (folder / file).is_file():
        raise CheckpointError(f"{folder / file}: listed in checkpoints.json, but not there")
    return folder / file


def _on_hub(
    text: str, ema: bool, ema_file: str | None, revision: str | None, other_spelling: Callable[[str], str | None]
) -> Path:
    repo, _, tail = text.partition(":")
    names: list[str]
    folder = ""
    if tail.endswith(WEIGHT_SUFFIXES):
        folder, _, file = tail.rpartition("/")
        stem, dot, suffix = file.rpartition(".")
        names = [f"{stem}_ema{dot}{suffix}"] if ema and not stem.endswith("_ema") else [file]
    else:
        folder = tail.strip("/")
        names = list(EMA_FILES[:2]) if ema else ["model.safetensors"]
    if ema_file:
        names = [ema_file]
    candidates = [f"{folder}/{name}" if folder else name for name in names]
    if tail and not tail.endswith(WEIGHT_SUFFIXES):
        candidates.append(f"{folder}{'_ema' if ema else ''}.safetensors")
    path = first_on_hub(repo, candidates, revision, other_spelling)
    for name in CONFIG_FILES:
        if optional_on_hub(repo, f"{folder}/{name}" if folder else name, revision):
            break
    return path


def first_on_hub(
    repo: str, names: Sequence[str], revision: str | None, other_spelling: Callable[[str], str | None] = lambda r: None
) -> Path:
    """Download the first of these files that a repository has.

    Raises:
        CheckpointError: naming repository, revision, licence page and token variable.
    """
    import logging

    for name in names:
        path = optional_on_hub(repo, name, revision, other_spelling)
        if path:
            if name != names[0]:
                logging.getLogger(__name__).warning("%s has no %s; using %s", repo, names[0], name)
            return path
    raise CheckpointError(f"{repo} (revision {revision or 'main'}) on the hub has none of {', '.join(names)}")


def optional_on_hub(
    repo: str, name: str, revision: str | None, other_spelling: Callable[[str], str | None] = lambda r: None
) -> Path | None:
    """Download a file, or None if the repository does not have it.

    Raises:
        CheckpointError: if the repository cannot be read; says how to get access.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repo} (revision {revision or 'main'})"
    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except GatedRepoError:
        raise CheckpointError(
            f"{where}: access is gated. Accept the licence at https://huggingface.co/{repo} and put your token into HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{where}: no such revision on the hub") from None
    except RepositoryNotFoundError:
        hint = other_spelling(repo)
        raise CheckpointError(
            f"{where}: no such repository on the hub, or it is private (put your token into HF_TOKEN)."
            + (f" Did you mean {hint}?" if hint else "")
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{where}: {name} is not in the local cache and the hub cannot be reached. Connect once, or download the "
            "files and give their folder"
        ) from None
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise CheckpointError(f"{where}: the hub answered: {error}") from error


def read_weights(path: Path) -> WeightFile:
    """Read a weight file and the geometry that belongs to it.

    Raises:
        CheckpointError: if the file is cut short, of another kind, or holds no tensors.
    """
    if path.suffix in (".safetensors", ".sft"):
        found = _read_safetensors(path)
    else:
        found = _read_pickle(path)
    found.tensors = {strip_wrappers(key): tensor for key, tensor in found.tensors.items()}
    if not found.tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    if found.config is None:
        for name in (f"{path.stem.removesuffix('_ema')}.json", *CONFIG_FILES):
            sibling = path.with_name(name)
            if sibling.is_file():
                found.config = read_json_object(sibling)
                recorded = as_object(found.config.get("_metadata", {}), f"{sibling}: _metadata")
                found.options = found.options or as_object(recorded.get("options", {}), f"{sibling}: options")
                break
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
        return as_object(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({error})") from error


def strip_wrappers(key: str) -> str:
    """A key without the prefixes that wrappers leave behind."""
    while key.startswith(WRAPPER_PREFIXES):
        key = key.split(".", 1)[1]
    return key.replace("._orig_mod.", ".")


def _read_safetensors(path: Path) -> WeightFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); copy or download it again"
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


def _read_pickle(path: Path) -> WeightFile:
    import pickle
    import struct
    import zipfile

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
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
    config, metadata = None, {}
    if isinstance(loaded, dict):
        config = loaded.get("model_config")
        metadata = _header_of(loaded)
        for key in ("model", "state_dict", "model_state_dict"):
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary of tensors")
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    return WeightFile(path, tensors, metadata, config if isinstance(config, dict) else None)


def _header_of(loaded: dict[str, Any]) -> dict[str, str]:
    """What would stand in a header, of a LoRA in torch form: {state_dict, config, metadata}."""
    stated, config = loaded.get("metadata"), loaded.get("config")
    if not isinstance(loaded.get("state_dict"), dict) or not isinstance(stated, dict):
        return {}
    header = {key: value for key, value in stated.items() if isinstance(key, str) and isinstance(value, str)}
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
