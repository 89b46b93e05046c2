"""The frozen networks of a run, opened as its settings say: for cache jobs, and for drawing."""

import torch
from torch import Tensor

from musubi_tuner.config import RunConfig
from musubi_tuner.device import encoder_dtype
from musubi_tuner.encoders.autoencoder import Autoencoder, load_autoencoder
from musubi_tuner.encoders.locate import encoder_sources
from musubi_tuner.encoders.text import load_clip, load_t5
from musubi_tuner.errors import ConfigError


class TextEncoders:
    """T5 and CLIP of a run, loaded once."""

    title = "T5 and CLIP"

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        paths = encoder_sources(config, "text").paths(download=True)
        t5, clip = paths.get("t5"), paths.get("clip")
        if t5 is None or clip is None:
            raise ConfigError(f"{'model.t5_path' if t5 is None else 'model.clip_path'}: is needed to encode texts")
        self.dtype = encoder_dtype(config.model.text_dtype, device, gpu="bfloat16")
        self.t5 = load_t5(
            t5,
            paths.get("t5_tokenizer"),
            config.spec.t5_tokenizer,
            max_tokens=config.clip_and_t5.t5_max_tokens,
            dtype=self.dtype,
            device=device,
            preset=config.spec.t5_preset,
            masked=config.spec.t5_attention_mask,
            fp8=config.clip_and_t5.fp8_t5,
        )
        self.clip = load_clip(
            clip,
            paths.get("clip_tokenizer"),
            config.spec.clip_tokenizer,
            dtype=self.dtype,
            device=device,
            activation=config.clip_and_t5.clip_act,
        )
        self.batch_size = config.cache.text_batch_size

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """``t5_vec`` [B, L, J], ``t5_mask`` [B, L], ``clip_l_pooler`` [B, P]."""
        parts = []
        for start in range(0, len(texts), self.batch_size):
            some = texts[start : start + self.batch_size]
            t5, clip = self.t5.encode(some), self.clip.encode(some)
            assert clip.pooled is not None
            parts.append({"t5_vec": t5.states, "t5_mask": t5.mask, "clip_l_pooler": clip.pooled})
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def load_vae(config: RunConfig, device: torch.device, storage_device: torch.device | None = None) -> Autoencoder:
    """The run's autoencoder, for decoding.

    Args:
        device: where it decodes, which decides its precision. storage_device: where its weights lie; absent = there too.
    """
    path = encoder_sources(config, "latents").paths(download=True).get("vae")
    if path is None:
        raise ConfigError("model.vae_path: is needed to decode samples")
    dtype = encoder_dtype(config.model.vae_dtype, device, gpu="float32")
    spec = config.spec
    vae = load_autoencoder(
        path, channels=spec.latent_channels, factor=spec.vae_factor, dtype=dtype, device=storage_device or device
    )
    vae.set_tiling(config.cache.vae_tiling)
    return vae
