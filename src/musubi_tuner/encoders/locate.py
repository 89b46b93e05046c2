"""Where the files of an encoder are: a local file, a folder, or a repository on the hub. Torch-free.

A hub id is ``owner/repo``, ``owner/repo:subfolder`` or ``owner/repo:path/file.safetensors``. `identity` hashes the
content of the files, so that a cache knows which weights made it; hashes are remembered in the user's cache folder
by path and quick state (`stamps`).
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.config import RunConfig
from musubi_tuner.config.paths import WEIGHT_SUFFIXES, is_hub_id
from musubi_tuner.errors import CheckpointError
from musubi_tuner.files import read_json, write_json
from musubi_tuner.stamps import agrees, hash_file, hashed_state, quick_state
from musubi_tuner.weights.hub import LOCAL_ONLY

_HUB_PATTERNS = (
    "*.json",
    "*.txt",
    "*.model",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "*-of-*.safetensors",
)


@dataclass(frozen=True)
class Source:
    """An encoder as the config names it.

    Attributes:
        key: config key, for messages.
        text: what the key holds.
        path: local file or folder; None for a hub id.
    """

    key: str
    text: str
    path: Path | None
    revision: str | None = None

    def resolve(self, *, download: bool = True) -> Path | None:
        """The local file or folder; a hub id is downloaded, or looked up in the local cache.

        Returns:
            None only for a hub id that is not in the local cache, with ``download`` false.

        Raises:
            CheckpointError: if it does not exist or cannot be fetched.
        """
        if self.path is not None:
            if not self.path.exists():
                raise CheckpointError(f"{self.key}: {self.text}: no such file or folder")
            return self.path
        return _from_hub(self, download)


def source(key: str, text: str, local: Path, revision: str | None = None) -> Source:
    """Describe an encoder; ``local`` is where a path would be."""
    return Source(key, text, None if is_hub_id(text) else local, revision)


@dataclass(frozen=True)
class EncoderSources:
    """The encoders a run needs, by role; absent roles are not used."""

    sources: dict[str, Source]

    def paths(self, *, download: bool) -> dict[str, Path | None]:
        """Local path of every role."""
        return {role: found.resolve(download=download) for role, found in self.sources.items()}


def encoder_sources(config: RunConfig, kind: str) -> EncoderSources:
    """The encoders of one kind of cache."""
    if kind != "experts":
        return EncoderSources(config.spec.encoders.sources(config, kind))
    roles: dict[str, str] = {}
    if config.experts.extracted:
        roles = {"clip": "model.clip_path", "clip_tokenizer": "model.clip_tokenizer", "unet": "experts.unet"}
        roles |= {name: f"experts.{name}" for name in config.experts.extracted}
        if config.sd15.vae is not None:
            roles["expert_vae"] = "experts.vae"
    found = {}
    for role, key in roles.items():
        text = config.get(key)
        if text is not None:
            found[role] = source(key, text, config.locate(text))
    return EncoderSources(found)


def _from_hub(wanted: Source, download: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, inner = wanted.text.partition(":")
    is_file = inner.endswith(WEIGHT_SUFFIXES)
    folder = inner.rpartition("/")[0] if is_file else inner.strip("/")
    patterns = [inner, f"{inner.rpartition('.')[0]}.json"] if is_file else list(_HUB_PATTERNS)
    if folder and not is_file:
        patterns = [f"{folder}/{pattern}" for pattern in patterns]
    where = f"{wanted.key}: {repo} (revision {wanted.revision or 'main'})"
    try:
        local = not download or LOCAL_ONLY.get()
        snapshot = Path(
            snapshot_download(repo, revision=wanted.revision, allow_patterns=patterns, local_files_only=local)
        )
    except GatedRepoError:
        raise CheckpointError(
            f"{where}: access is gated. Accept the licence at https://huggingface.co/{repo} and put your token into HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{where}: no such revision on the hub") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{where}: no such repository on the hub, or it is private (put your token into HF_TOKEN)"
        ) from None
    except LocalEntryNotFoundError:
        if not download:
            return None
        raise CheckpointError(
            f"{where}: not in the local cache, and the hub cannot be reached. Connect once, or download the files and give "
            "their folder"
        ) from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"{where}: the hub answered: {error}") from error
    found = snapshot / inner if inner else snapshot
    if not found.exists():
        if not download:
            return None
        raise CheckpointError(f"{where}: has no {'file' if is_file else 'folder'} {inner}")
    return found


def weight_files(path: Path) -> list[Path]:
    """The files that decide what an encoder computes: weights, configs and tokenizer data, sorted by name."""
    if path.is_file():
        names = (f"{path.stem.removesuffix('_ema')}.json", "config.json", "model_config.json")
        return [path, *[path.with_name(name) for name in names if path.with_name(name).is_file()][:1]]
    suffixes = (*WEIGHT_SUFFIXES, ".json", ".txt", ".model")
    return sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(suffixes) and p.name != "README.txt")


def stated_config(path: Path) -> dict[str, Any] | None:
    """Config of an encoder, of its folder or file, without reading weights; None if there is none that can be read."""
    try:
        if path.is_dir():
            found = read_json(path / "config.json")
        else:
            found = _header_config(path) if path.suffix == ".safetensors" else None
            beside = weight_files(path)[1:]
            if found is None and beside:
                found = read_json(beside[0])
    except (OSError, ValueError):
        return None  # said where the encoder is loaded
    return found if isinstance(found, dict) else None


def _header_config(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np") as file:
            return json.loads((file.metadata() or {}).get("config_json", "null"))
    except SafetensorError:
        return None


def identity(path: Path, *, full: bool = False) -> str:
    """16 hex digits that change when any weight, config or tokenizer file of an encoder changes.

    Args:
        full: read the files, even where their hashes are remembered.
    """
    digest = hashlib.sha256()
    for file in weight_files(path):
        # The name of a single weight file is free; names inside a folder have a meaning.
        digest.update(f"{file.name if path.is_dir() else ''}\0{file_sha256(file, full=full)}\n".encode())
    return digest.hexdigest()[:16]


TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
"""Any of them makes a folder a tokenizer's."""
_ALL_TOKENIZER_FILES = (*TOKENIZER_FILES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def find_tokenizer(encoder: Path, given: Path | str | None, fallback: str) -> Path | str:
    """The tokenizer folder or hub id of an encoder: as given, else beside the weights, else the published id."""
    if given is not None:
        return given
    folder = encoder if encoder.is_dir() else encoder.parent
    for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"):
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            return place
    return fallback


def tokenizer_identity(folder: Path, *, full: bool = False) -> str:
    """16 hex digits that change when a tokenizer file of a folder changes; weights beside them do not count."""
    digest = hashlib.sha256()
    for name in _ALL_TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(f"{name}\0{file_sha256(folder / name, full=full)}\n".encode())
    return digest.hexdigest()[:16]


def user_cache_folder() -> Path:
    """Where hashes are remembered: MUSUBI_CACHE_HOME, or the system's folder for caches."""
    own = os.environ.get("MUSUBI_CACHE_HOME")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return Path(base or Path.home() / ".cache") / "musubi_tuner"


def file_sha256(path: Path, *, full: bool = False) -> str:
    """SHA-256 of a file; large files are hashed once and remembered by path and quick state.

    Args:
        full: hash it, even where it is remembered.
    """
    path = path.resolve()
    now = quick_state(path)
    if now["size"] < 1 << 20:
        return hash_file(path)
    # A file per state: machines that share the folder, but not the weights, do not forget each other's.
    name = hashlib.sha256(f"{path}\0{sorted(now.items())}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
    memory = user_cache_folder() / "hashes" / f"{name}.json"
    if not full:
        try:
            stored = read_json(memory)
            if stored["path"] == str(path) and agrees(stored, now):
                return str(stored["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not remembered, or not readable: hash it again
    state = hashed_state(path)
    if agrees(state, now):  # else it changed meanwhile, and another name would be its
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, {"path": str(path), **state})
        except OSError as error:
            logging.getLogger(__name__).warning("cannot remember file hashes in %s (%s)", memory.parent, error.strerror)
    return str(state["sha256"])
