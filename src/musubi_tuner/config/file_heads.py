"""Checks of weight files by their first bytes, so that wrong ones are found before torch is imported and anything is encoded."""

import json
from collections.abc import Iterable
from pathlib import Path

from musubi_tuner.models.registry import MODELS

_HEADERS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run `git lfs pull`, or download the file",
    b"GGUF": "is a GGUF file, which is not supported; use the safetensors file",
}
_PAGES = (b"<!doctype", b"<html", b"<?xml")
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")
_LARGEST_HEADER = 100 << 20


def head_problem(path: Path, arch: str | None = None) -> str | None:
    """Why a file cannot be the expected weights; None if no problem is found.

    Args:
        path: of a file; empty ones are left to the loader.
        arch: code of the family whose model it should be; None = it is an encoder or an adapter.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size = path.stat().st_size
            if not head:
                return None
            for start, reason in _HEADERS.items():
                if head.startswith(start):
                    return reason
            if head.lstrip().lower().startswith(_PAGES):
                return "is a web page, such as a login or error page; sign in and download the file again"
            if path.suffix not in (".safetensors", ".sft"):
                return None
            if head.startswith(_PICKLES):
                return (
                    f"is a torch pickle with the extension {path.suffix}; use the safetensors file, or rename it to .pt"
                )
            length = int.from_bytes(head[:8], "little")
            if length > min(size - 8, _LARGEST_HEADER):
                return f"is a truncated safetensors file: {size} bytes, but its header expects more; download it again"
            file.seek(8)
            header = json.loads(file.read(length))
    except (OSError, ValueError):
        return None
    return other_model(header, arch) if arch is not None and isinstance(header, dict) else None


def texts_in(path: Path) -> list[str]:
    """The texts that a file of encoded prompts says it holds; none if it cannot be read. What made it is compared later."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            texts = json.loads(json.loads(file.read(min(length, _LARGEST_HEADER)))["__metadata__"]["texts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [text for text in texts if isinstance(text, str)] if isinstance(texts, list) else []


def other_model(names: Iterable[str], arch: str) -> str | None:
    """What is wrong if a file holds a model of another family; None otherwise."""
    tensors = list(names)
    found = [code for code in MODELS if any(tensor.endswith(mark) for tensor in tensors for mark in _marks(code))]
    if found and arch not in found:
        return f'holds {MODELS[found[0]].title}, but model.arch is "{arch}"; write arch = "{found[0]}", or name another file'
    if any(tensor.startswith("model.diffusion_model.input_blocks.") for tensor in tensors):
        return f"holds a U-Net of Stable Diffusion, which this program does not train; expected {MODELS[arch].title}"
    return None


def _marks(code: str) -> list[str]:
    """Names of tensors that each checkpoint of a family has."""
    lists = MODELS[code].adapters.layers
    return [f"{name}.0.{layers[0]}.weight" for name, layers in lists.items()]
