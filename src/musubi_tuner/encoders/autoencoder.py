"""Autoencoders between pixels and latents, chosen by what the file says it is.

    AutoencoderKL            the convolutional autoencoder of diffusers: FLUX (16 channels) and SD1.5 (4 channels);
                             single files with the key names of Black Forest Labs are translated
    LinearPatchAutoencoder   ours, see linear_patch.py

Geometry: the config in the file's header, else a json beside it, else the published FLUX geometry if all shapes agree.
Latents for the model are ``(z - shift) * scale``; a family may leave the shift out (``use_shift``).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.encoders.linear_patch import LinearPatchAutoencoder, LinearPatchConfig
from musubi_tuner.errors import CheckpointError
from musubi_tuner.weights.sources import fits, materialize, on_meta, part_of, read_source

FLUX_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
"""The published autoencoder of FLUX.1."""

_BFL_RULES: tuple[tuple[str, str], ...] = (
    (r"(encoder|decoder)\.mid\.block_([12])\.", r"\1.mid_block.resnets.\2."),
    (r"(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.mid_block.attentions.0.group_norm."),
    (r"(encoder|decoder)\.mid\.attn_1\.proj_out\.", r"\1.mid_block.attentions.0.to_out.0."),
    (r"(encoder|decoder)\.mid\.attn_1\.([qkv])\.", r"\1.mid_block.attentions.0.to_\2."),
    (r"(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
)


def translate_bfl(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Key names of Black Forest Labs' autoencoder to those of diffusers; 1x1 attention convolutions become Linear."""
    levels = 1 + max((int(m[1]) for key in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", key))), default=0)
    translated = {}
    for key, tensor in tensors.items():
        name = key
        for pattern, replacement in _BFL_RULES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"mid_block\.resnets\.([12])", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", name)
        if match := re.match(r"decoder\.up\.(\d+)\.(block\.(\d+)|upsample)\.(.*)", name):
            level = levels - 1 - int(match[1])  # theirs counts from the finest level, diffusers' from the coarsest
            part = f"resnets.{match[3]}" if match[3] is not None else "upsamplers.0"
            name = f"decoder.up_blocks.{level}.{part}.{match[4]}"
        is_attention = ".attentions.0.to_" in name and tensor.ndim == 4
        translated[name] = tensor[:, :, 0, 0] if is_attention else tensor
    return translated


def _current_attention_name(key: str) -> str:
    """Attention names of older diffusers files (SD1.5's among them) to the present ones."""
    for old, new in ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")):
        if ".attentions." in key:
            key = key.replace(old, new)
    return key


class Autoencoder:
    """A frozen autoencoder with one interface.

    Attributes:
        channels: latent channels. factor: pixels per latent cell. scale, shift: of its config.
    """

    def __init__(self, module: nn.Module, config: dict[str, Any]) -> None:
        self.module = module
        self.linear = isinstance(module, LinearPatchAutoencoder)
        self.channels = int(config["latent_channels"])
        self.factor = int(config["patch_size"]) if self.linear else 2 ** (len(config["block_out_channels"]) - 1)
        # Configs of the first SD1.5 autoencoders name no scale; diffusers' default is theirs.
        self.scale = float(config.get("scaling_factor") or (1.0 if self.linear else 0.18215))
        self.shift = float(config.get("shift_factor") or 0.0)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.module.parameters()).dtype

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """The weights on a device inside the block, and back where they were after it."""
        before = self.device
        # Not module.to(): the libraries override it with warnings.
        nn.Module.to(self.module, device)
        try:
            yield
        finally:
            nn.Module.to(self.module, before)
            if device != before and device.type == "cuda":
                torch.cuda.empty_cache()

    def set_tiling(self, enabled: bool) -> None:
        """Work on large images in overlapping tiles; a linear autoencoder needs too little memory to bother."""
        if enabled and not self.linear:
            self.module.enable_tiling()  # type: ignore[operator]  # AutoencoderKL of diffusers

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None, use_shift: bool) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to model latents [B, C, H / factor, W / factor], float32.

        Args:
            noise: standard normal of the latents' shape to sample the posterior with; None takes its mean.
            use_shift: subtract the autoencoder's shift.
        """
        inputs = pixels.to(self.device, self.dtype)
        if self.linear:
            z = self.module.encode(inputs).float()  # type: ignore[operator]  # LinearPatchAutoencoder
        else:
            posterior = self.module.encode(inputs).latent_dist  # type: ignore[operator]  # AutoencoderKL
            z = posterior.mean.float()
            if noise is not None:
                z = z + posterior.std.float() * noise.to(z.device)
        return (z - (self.shift if use_shift else 0.0)) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor, use_shift: bool) -> Tensor:
        """Model latents to pixels [B, 3, H, W] in [-1, 1], float32, clamped."""
        z = latents.float() / self.scale + (self.shift if use_shift else 0.0)
        decoded = self.module.decode(z.to(self.device, self.dtype))  # type: ignore[operator]  # both kinds have it
        return (decoded if self.linear else decoded.sample).float().clamp(-1, 1)


def load_autoencoder(
    path: Path,
    *,
    channels: int,
    factor: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    key: str = "model.vae_path",
) -> Autoencoder:
    """Load an autoencoder from a file or a diffusers folder.

    Args:
        channels: latent channels the caller needs. factor: pixels per latent cell it needs.
        key: config key, for messages.

    Raises:
        CheckpointError: if it is not an autoencoder, or one of another shape.
    """
    config, tensors, what = _read(path, key)
    found = Autoencoder(on_meta(lambda: _module(config, what)), config)
    if found.channels != channels:
        hint = " (4 channels is an SD1.5 or SDXL autoencoder)" if found.channels == 4 else ""
        raise CheckpointError(f"{what}: has {found.channels} latent channels, expected {channels}{hint}")
    if found.factor != factor:
        raise CheckpointError(f"{what}: reduces images by {found.factor}, expected {factor}")
    materialize(found.module, tensors, f"{what}: is not this autoencoder", dtype, device)
    return found


def plan_autoencoder(path: Path, key: str = "model.vae_path") -> Callable[[], Autoencoder]:
    """What builds the autoencoder of a file without its weights, to be measured.

    Raises:
        CheckpointError: if it is not an autoencoder.
    """
    config, _, what = _read(path, key)
    return lambda: Autoencoder(_module(config, what), config)


def _read(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Config and tensors of an autoencoder, and what begins its errors."""
    tensors, config, file = read_source(path)
    tensors, what = part_of(tensors, "vae.", "first_stage_model."), f"{key}: {file}"
    if any(key_.startswith(("encoder.down.", "decoder.up.")) for key_ in tensors):
        tensors = translate_bfl(tensors)
    tensors = {_current_attention_name(key_): tensor for key_, tensor in tensors.items()}
    if config is None:
        config = FLUX_CONFIG
        if not fits(on_meta(lambda: _autoencoder_kl(FLUX_CONFIG)), tensors):
            raise CheckpointError(
                f"{what}: has no config in its header or beside it, and is not the published FLUX autoencoder. "
                "Put its config.json beside the file, or give its diffusers folder"
            )
    return config, tensors, what


def _module(config: dict[str, Any], what: str) -> nn.Module:
    class_name = config.get("_class_name")
    if class_name == "LinearPatchAutoencoder":
        fields = {name: config[name] for name in LinearPatchConfig.__dataclass_fields__ if name in config}
        return LinearPatchAutoencoder(LinearPatchConfig(**fields))
    if class_name == "AutoencoderKL":
        return _autoencoder_kl(config)
    raise CheckpointError(
        f"{what}: is {class_name or 'of no known class'}, expected AutoencoderKL or LinearPatchAutoencoder"
    )


def _autoencoder_kl(config: dict[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config({k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"})
