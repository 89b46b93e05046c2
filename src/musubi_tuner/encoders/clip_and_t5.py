"""The frozen networks of families of the FLUX kind, an autoencoder, T5 and CLIP; see `models.family.FrozenNetworks`.

Torch-free until something is opened.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musubi_tuner.config import RunConfig
from musubi_tuner.encoders.locate import Source, encoder_sources, identity, source
from musubi_tuner.encoders.tokens import TokenLimit, clip_limit

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from tokenizers import Tokenizer

    from musubi_tuner.encoders.autoencoder import Autoencoder
    from musubi_tuner.encoders.for_run import TextEncoders

__all__ = [
    "identities",
    "needed",
    "of_checkpoint",
    "open_autoencoder",
    "open_text",
    "outline_autoencoder",
    "settings",
    "sources",
    "token_limit",
    "tokenizers",
]

of_checkpoint: tuple[str, ...] = ()
"""Kinds of cache that are made by networks in the checkpoint that is trained."""
_KEYS = {
    "latents": {"vae": "model.vae_path"},
    "text": {
        "t5": "model.t5_path",
        "clip": "model.clip_path",
        "t5_tokenizer": "model.t5_tokenizer",
        "clip_tokenizer": "model.clip_tokenizer",
    },
}


def needed(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Kind of cache -> keys that must be set to make it."""
    return {"latents": ("model.vae_path",), "text": ("model.clip_path", "model.t5_path")}


def sources(config: RunConfig, kind: str) -> dict[str, Source]:
    """Where the files of a kind's networks are, by role."""
    named = {role: (key, config.get(key)) for role, key in _KEYS[kind].items()}
    return {role: source(key, text, config.locate(text)) for role, (key, text) in named.items() if text is not None}


def identities(config: RunConfig, kind: str, paths: Mapping[str, Path], full: bool) -> dict[str, str]:
    """Hashes of the files, by role."""
    return {role: identity(path, full=full) for role, path in paths.items()}


def settings(config: RunConfig, kind: str) -> dict[str, Any]:
    """What else decides what they compute, as part of the fingerprint."""
    if kind == "latents":
        return {"latent_shift": config.spec.latent_shift}
    model = config.clip_and_t5
    return {
        "t5_max_tokens": model.t5_max_tokens,
        "t5_masked": config.spec.t5_attention_mask,
        "fp8_t5": model.fp8_t5,
        "clip_act": model.clip_act,
    }


def tokenizers(config: RunConfig) -> dict[str, str]:
    """Role of a text encoder -> hub id of its published tokenizer."""
    return {"t5": config.spec.t5_tokenizer, "clip": config.spec.clip_tokenizer}


def token_limit(config: RunConfig, role: str, encoder: Path | None, tokenizer: "Tokenizer | None") -> TokenLimit:
    """What a text encoder takes of a text."""
    if role == "t5":
        advice = "shorten them, or raise model.t5_max_tokens"
        return TokenLimit("T5", config.clip_and_t5.t5_max_tokens, advice, tokenizer)
    advice = "it never sees the rest, so begin with what matters"
    return TokenLimit("CLIP", clip_limit(encoder) if encoder else 0, advice, tokenizer)


def open_text(config: RunConfig, device: "torch.device") -> "TextEncoders":
    """T5 and CLIP."""
    from musubi_tuner.encoders.for_run import TextEncoders

    return TextEncoders(config, device)


def open_autoencoder(
    config: RunConfig, device: "torch.device", storage_device: "torch.device | None" = None
) -> "Autoencoder":
    """The autoencoder."""
    from musubi_tuner.encoders.for_run import load_vae

    return load_vae(config, device, storage_device)


def outline_autoencoder(config: RunConfig) -> "Callable[[], Autoencoder] | None":
    """What builds the autoencoder without its weights; None if it is not here."""
    from musubi_tuner.encoders.autoencoder import plan_autoencoder

    path = encoder_sources(config, "latents").paths(download=False).get("vae")
    if path is None:
        return None
    build = plan_autoencoder(path)

    def tiled() -> "Autoencoder":
        vae = build()
        vae.set_tiling(config.cache.vae_tiling)
        return vae

    return tiled
