"""The parts of a checkpoint that make latents and texts, opened for cache jobs and for drawing."""

from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from musubi_tuner.config import RunConfig
from musubi_tuner.device import encoder_dtype
from musubi_tuner.encoders.autoencoder import Autoencoder
from musubi_tuner.encoders.locate import encoder_sources, find_tokenizer
from musubi_tuner.encoders.tokens import open_tokenizer
from musubi_tuner.errors import ConfigError
from musubi_tuner.flow import unpack_pixels
from musubi_tuner.models.fluxflow.autoencoder import Compressor, Expander, sample_latents
from musubi_tuner.models.fluxflow.checkpoint import geometry_of, make_part, open_system
from musubi_tuner.models.fluxflow.geometry import FluxFlowConfig
from musubi_tuner.models.fluxflow.settings import TOKENIZER, model_of, objective_of, trains_language
from musubi_tuner.models.fluxflow.state_dict import System, build_part
from musubi_tuner.models.fluxflow.system import VAE_PARTS
from musubi_tuner.models.fluxflow.text_encoder import TextEncoder

PAD = "[PAD]"


class FluxFlowAutoencoder(Autoencoder):
    """Compressor and expander with the interface of an autoencoder.

    Latents are what the flow makes: mu, or tokens behind the compressor's attention; see ``latent_space``.
    """

    def __init__(self, module: nn.ModuleDict, geometry: FluxFlowConfig, use_context: bool) -> None:
        self.module, self.geometry, self.use_context = module.eval().requires_grad_(False), geometry, use_context
        self.compressor: Compressor = module["compressor"]  # type: ignore[assignment]
        self.expander: Expander = module["expander"]  # type: ignore[assignment]
        self.channels, self.factor, self.scale, self.shift = geometry.vae_dim, geometry.factor, 1.0, 0.0
        self.linear = True  # it has no tiles

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None, use_shift: bool) -> Tensor:
        """Latents [B, D, h, w] of pixels in [-1, 1], float32; without noise those of the mean."""
        mu, logvar, latent = self.compressor.encode(pixels.to(self.device, self.dtype))
        z = mu if noise is None else sample_latents(mu, logvar, noise.to(mu.device, mu.dtype))
        return (z if self.geometry.latent_space == "mu" else self._tokens(z, latent)).float()

    @torch.no_grad()
    def decode(self, latents: Tensor, use_shift: bool) -> Tensor:
        """Pixels [B, 3, H, W] of latents, float32, clamped."""
        z = latents.to(self.device, self.dtype)
        tokens = self._tokens(z, torch.zeros_like(z)) if self.geometry.latent_space == "mu" else z
        return self.expander.decode(tokens, self.use_context).float().clamp(-1, 1)

    def _tokens(self, z: Tensor, latent: Tensor) -> Tensor:
        return unpack_pixels(self.compressor.tokens(z, latent), z.shape[-2], z.shape[-1])


def open_autoencoder(
    config: RunConfig, device: torch.device, storage_device: torch.device | None = None
) -> FluxFlowAutoencoder:
    """The autoencoder of a run's checkpoint; see `FrozenNetworks`.

    Raises:
        ConfigError: if the checkpoint has none.
    """
    system, _ = open_system(config)
    geometry = geometry_of(config)
    missing = [part for part in VAE_PARTS if part not in system.parts]
    if missing:
        raise ConfigError(
            f"model.path: {config.model.path}: holds no {' and no '.join(missing)}, which the flow needs; train the autoencoder first "
            "(objective.train_vae), or name one in model.vae_path"
        )
    parts = {part: make_part(part, system, config, geometry) for part in VAE_PARTS}
    dtype = encoder_dtype(config.model.vae_dtype, device, gpu="float32")
    module = nn.ModuleDict(parts).to(storage_device or device, dtype)
    return FluxFlowAutoencoder(module, geometry, _modulated(system, config))


def _modulated(system: System, config: RunConfig) -> bool:
    """Whether the expander sees its latents at every scale, as it was trained."""
    return bool(system.options.get("spade", objective_of(config).train_spade))


def outline_autoencoder(config: RunConfig) -> Callable[[], FluxFlowAutoencoder]:
    """What builds the autoencoder without its weights."""
    geometry, modulated = geometry_of(config), _modulated(open_system(config)[0], config)
    return lambda: FluxFlowAutoencoder(
        nn.ModuleDict({part: build_part(part, geometry) for part in VAE_PARTS}), geometry, modulated
    )


class BertTokens:
    """Captions as ids and a mask of what is no padding; picklable, for loader workers.

    Raises:
        ConfigError: if there is no tokenizer, or it is another text encoder's.
    """

    def __init__(self, config: RunConfig) -> None:
        geometry, self.tokenizer = geometry_of(config), tokenizer_of(config)
        known = self.tokenizer.get_vocab_size()
        if known > geometry.text_vocab:
            raise ConfigError(
                f"model.bert_tokenizer: knows {known} tokens, the text encoder {geometry.text_vocab}; give its own tokenizer"
            )
        limit = model_of(config).text_max_tokens
        if limit > geometry.text_positions:
            raise ConfigError(
                f"model.text_max_tokens: is {limit}, but the text encoder has {geometry.text_positions} positions; lower it"
            )
        self.tokenizer.enable_truncation(limit)
        self.tokenizer.enable_padding(length=limit, pad_token=PAD, pad_id=self.tokenizer.token_to_id(PAD) or 0)

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        """``bert_ids`` int64 and ``bert_mask`` bool, [B, L]."""
        found = self.tokenizer.encode_batch(texts)
        mask = torch.tensor([each.attention_mask for each in found], dtype=torch.bool)
        return {"bert_ids": torch.tensor([each.ids for each in found]), "bert_mask": mask}


class FluxFlowText:
    """The language model of a run, with its tokenizer; where the language model trains, the tokenizer alone.

    Raises:
        ConfigError: if the tokenizer is not at hand.
    """

    title = "DistilBERT"

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.geometry, self.tokens = geometry_of(config), BertTokens(config)
        self.dtype = encoder_dtype(config.model.text_dtype, device, gpu="bfloat16")
        self.batch_size, self.device = config.cache.text_batch_size, device
        self.encoder: TextEncoder | None = None
        if not trains_language(config):
            encoder: TextEncoder = make_part("text_encoder", open_system(config)[0], config, self.geometry)  # type: ignore[assignment]
            self.encoder = encoder.to(device, self.dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """``bert_mean`` [B, W] of the states, or ``bert_states`` [B, L, W] and ``bert_mask`` [B, L] where the flow sees all; ``bert_ids``
        [B, L] in the place of states where the language model trains."""
        parts = [
            self._encode(texts[start : start + self.batch_size]) for start in range(0, len(texts), self.batch_size)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        tokens = self.tokens(texts)
        if self.encoder is None:
            return tokens
        mask = tokens["bert_mask"]
        states = self.encoder.states(tokens["bert_ids"].to(self.device), mask.to(self.device)).float().cpu()
        if self.geometry.text_mode == "sequence":
            return {"bert_states": states, "bert_mask": mask}
        if self.geometry.compat == "reference":
            return {"bert_mean": states.mean(dim=1)}
        weights = mask[..., None].float()
        return {"bert_mean": (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)}


def tokenizer_of(config: RunConfig) -> Tokenizer:
    """The tokenizer of a run, without limits.

    Raises:
        ConfigError: if it is not at hand.
    """
    paths = encoder_sources(config, "text").paths(download=True)
    encoder, given = paths.get("bert"), paths.get("bert_tokenizer")
    place = find_tokenizer(encoder, given, TOKENIZER) if encoder is not None else given or TOKENIZER
    tokenizer = open_tokenizer(place, download=True)
    if tokenizer is None:
        raise ConfigError(
            f"model.bert_tokenizer: {place}: no tokenizer could be read there; give a folder with tokenizer.json"
        )
    return tokenizer
