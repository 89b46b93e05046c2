"""Encodings of sample prompts, kept beside the caches: no start needs the text encoders for prompts that were encoded before.

    prompts_{code}.safetensors   one row for every text in each tensor, as the encoders gave them
        header: ``texts`` (JSON list), and ``fingerprint`` of what made them, as in a cache file of texts

The file lies in the cache folder of the first data set and goes where that goes. The texts of a run are encoded together, so a picture does not
depend on what was encoded before.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from musubi_tuner.caching.fingerprint import AUTO, Fingerprint, difference, expectation
from musubi_tuner.config import RunConfig
from musubi_tuner.config.prompts import prompt_texts, prompts_file, sample_prompts
from musubi_tuner.errors import CacheError
from musubi_tuner.files import json_text, replace_file
from musubi_tuner.headers import read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from musubi_tuner.models.family import TextNetworks


def texts_of_run(config: RunConfig) -> list[str]:
    """All texts that drawing the samples of a run takes, each once; empty if none are drawn."""
    if config.sample.prompts is None or not config.spec.task(config).has("sample.prompts"):
        return []
    return prompt_texts(sample_prompts(config), config.sample.negative_prompt)


def prompt_encodings(config: RunConfig, texts: Sequence[str], device: "torch.device") -> "dict[str, Tensor]":
    """Encodings of texts, a row for each, from the file or from the encoders, which then are in memory for that time only.

    Raises:
        ConfigError: if they are to be encoded, and an encoder is missing.
    """
    import torch

    found = _read(config, texts)
    if found is not None:
        return found
    encoders = config.spec.encoders.open_text(config, device)
    encoded = _keep(config, encoders, texts)
    del encoders
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what T5 had goes back to the device
    return encoded


def keep_prompts(config: RunConfig, encoders: "TextNetworks") -> None:
    """Encode the prompts of a run, unless the file has them, with encoders that are open anyway."""
    texts = texts_of_run(config)
    if texts and prompts_file(config) is not None and _read(config, texts) is None:
        _keep(config, encoders, texts)


def are_known(config: RunConfig) -> bool:
    """Whether the prompts of a run, if it has any, need no encoder. Torch-free."""
    path, texts = prompts_file(config), texts_of_run(config)
    return not texts or (path is not None and _rows(config, path, texts) is not None)


def _rows(config: RunConfig, path: Path, texts: Sequence[str]) -> list[int] | None:
    """Rows of texts in a file; None if it lacks one, or other encoders made it. Without pictures it counts whatever made it."""
    try:
        header = read_header(path)
        held: list[str] = json.loads(header.metadata["texts"])
        rows = [held.index(text) for text in texts]
    except (OSError, CacheError, ValueError, KeyError, AttributeError):
        return None
    if config.is_precached:
        return rows
    wanted, complete = _expected(config, download=False)
    return rows if not complete or difference(header.fingerprint or {}, wanted) is None else None


def _expected(config: RunConfig, *, download: bool) -> tuple[Fingerprint, bool]:
    """What makes encodings, which are stored as they come; and whether all encoders are at hand."""
    expected = expectation(config, "text", {}, download=download)
    return {key: value for key, value in expected.shared.items() if key != "storage"}, expected.complete


def _read(config: RunConfig, texts: Sequence[str]) -> "dict[str, Tensor] | None":
    from safetensors.torch import load

    path = prompts_file(config)
    rows = None if path is None else _rows(config, path, texts)
    if path is None or rows is None:
        return None
    return {name: tensor[rows].clone() for name, tensor in load(path.read_bytes()).items()}


def _keep(config: RunConfig, encoders: "TextNetworks", texts: Sequence[str]) -> "dict[str, Tensor]":
    """Encode texts and write the file; one that cannot be written only costs time at the next start."""
    from musubi_tuner.tensors import save_tensors

    encoded: dict[str, Tensor] = {name: tensor.cpu() for name, tensor in encoders.encode(list(texts)).items()}
    path = prompts_file(config)
    if path is None:
        return encoded
    made, _ = _expected(config, download=True)
    if made.get("precision") == AUTO:
        made["precision"] = str(encoders.dtype).removeprefix("torch.")
    header = {"fingerprint": json_text(made), "texts": json_text(list(texts))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.contiguous() for name, tensor in encoded.items()}
        replace_file(path, partial(save_tensors, contiguous, metadata=header))
    except OSError as problem:
        print(f"note: {path} cannot be written ({problem.strerror}); prompts are encoded at every start", flush=True)
    return encoded
