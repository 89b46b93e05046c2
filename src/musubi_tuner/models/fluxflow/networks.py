"""The networks around the flow processor, which are parts of its own checkpoint; see `models.family.FrozenNetworks`.

Torch-free until something is opened or hashed.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musubi_tuner.config import RunConfig
from musubi_tuner.encoders import locate
from musubi_tuner.encoders.locate import Source, source
from musubi_tuner.encoders.tokens import TokenLimit
from musubi_tuner.models.fluxflow.settings import TOKENIZER, model_of, trains_language

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from tokenizers import Tokenizer

    from musubi_tuner.models.fluxflow.encoding import FluxFlowAutoencoder, FluxFlowText

ACTING = ("attn_heads", "latent_skip", "pair_residual", "p_pre")
"""Fields of the geometry that change the latents, and not the shapes of weights."""
of_checkpoint: tuple[str, ...] = ("latents", "text")
"""Kinds of cache that are made by networks in the checkpoint that is trained."""


def needed(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Kind of cache -> keys that must be set to make it."""
    own = () if config.model.vae_path is not None else ("model.path",)
    return {"latents": own}


def sources(config: RunConfig, kind: str) -> dict[str, Source]:
    """Where the files of a kind's networks are, by role."""
    model, found = model_of(config), dict[str, Source]()
    if kind == "latents":
        key = "model.vae_path" if model.vae_path is not None else "model.path"
        if config.get(key) is not None:
            found["vae"] = _checkpoint(config, key)
        return found
    if model.bert_path is not None:
        found["bert"] = source("model.bert_path", model.bert_path, config.locate(model.bert_path))
    elif model.path is not None:
        found["bert"] = _checkpoint(config, "model.path")
    if model.bert_tokenizer is not None:
        key = "model.bert_tokenizer"
        found["bert_tokenizer"] = source(key, model.bert_tokenizer, config.locate(model.bert_tokenizer))
    return found


def _checkpoint(config: RunConfig, key: str) -> Source:
    """The file that the name of a checkpoint leads to."""
    from musubi_tuner.models.fluxflow.checkpoint import find_file

    return Source(key, config.get(key), find_file(config, key))


def settings(config: RunConfig, kind: str) -> dict[str, Any]:
    """What else decides what they compute, as part of the fingerprint."""
    from musubi_tuner.models.fluxflow.checkpoint import geometry_of

    geometry, model = geometry_of(config), model_of(config)
    if kind == "latents":
        return {"latent_space": geometry.latent_space, "layout": [getattr(geometry, name) for name in ACTING]}
    return {
        "text_max_tokens": model.text_max_tokens,
        "text_mode": geometry.text_mode,
        "compat": geometry.compat,
        "text_heads": geometry.text_heads,
        "tokens": trains_language(config),
    }


def identities(config: RunConfig, kind: str, paths: Mapping[str, Path], full: bool) -> dict[str, str]:
    """Hashes of the weights that make latents and texts, not of files: a flow that is trained on leaves caches fresh."""
    from musubi_tuner.models.fluxflow import checkpoint

    if "bert" in paths and model_of(config).bert_path is not None:
        return {"bert": locate.identity(paths["bert"], full=full)}
    if kind == "text" and trains_language(config):
        return {}  # tokens, which no weights make
    part, begin = ("compressor", "") if kind == "latents" else ("text_encoder", "language_model.")
    digest = hashlib.sha256()
    for key, value in sorted(checkpoint.weights_of_part(config, part).items()):
        if key.startswith(begin):
            digest.update(f"{key}\0".encode())
            digest.update(value.detach().contiguous().float().numpy().tobytes())
    return {"vae" if kind == "latents" else "bert": digest.hexdigest()[:16]}


def tokenizers(config: RunConfig) -> dict[str, str]:
    """Role of a text encoder -> hub id of its published tokenizer."""
    return {"bert": TOKENIZER}


def token_limit(config: RunConfig, role: str, encoder: Path | None, tokenizer: "Tokenizer | None") -> TokenLimit:
    """What the text encoder takes of a text."""
    advice = "shorten them, or raise model.text_max_tokens"
    return TokenLimit("DistilBERT", model_of(config).text_max_tokens, advice, tokenizer)


def open_text(config: RunConfig, device: "torch.device") -> "FluxFlowText":
    """The language model with its tokenizer."""
    from musubi_tuner.models.fluxflow.encoding import FluxFlowText

    return FluxFlowText(config, device)


def open_autoencoder(
    config: RunConfig, device: "torch.device", storage_device: "torch.device | None" = None
) -> "FluxFlowAutoencoder":
    """Compressor and expander."""
    from musubi_tuner.models.fluxflow import encoding

    return encoding.open_autoencoder(config, device, storage_device)


def outline_autoencoder(config: RunConfig) -> "Callable[[], FluxFlowAutoencoder] | None":
    """What builds them without their weights."""
    from musubi_tuner.models.fluxflow import encoding

    return encoding.outline_autoencoder(config)
