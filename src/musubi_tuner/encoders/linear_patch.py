"""A linear autoencoder of image patches: exact to fit, a few kilobytes, no training. The demo's.

    encode   one latent pixel = a linear map of a window of pixels around its patch (a strided convolution)
    decode   the patch of pixels = a linear map of a window of latent pixels around it, so that patches overlap
             in what they see and seams stay small (a convolution, then pixel shuffle)

Borders are replicated. `fit` finds both maps for a set of pictures: the encoder is their principal components with
every component divided by the square root of its standard deviation (a full whitening would blow up noise, none hides
shape), then scaled to unit variance; the decoder is the least-squares inverse. ``config.json`` holds the fields of
`LinearPatchConfig` and ``_class_name``.
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearPatchConfig:
    """Geometry.

    Attributes:
        patch_size: pixels per latent pixel and axis; encoder_window: pixels that one latent pixel sees, at least the patch;
        decoder_window: latent pixels that one patch is made of, odd.
        scaling_factor, shift_factor: latents for the model are ``(z - shift) * scale``.
    """

    patch_size: int = 8
    encoder_window: int = 8
    decoder_window: int = 3
    latent_channels: int = 16
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.encoder_window < self.patch_size or (self.encoder_window - self.patch_size) % 2:
            raise ValueError(
                f"encoder_window is {self.encoder_window}, expected patch_size {self.patch_size} plus an even number"
            )
        if self.decoder_window % 2 == 0:
            raise ValueError(f"decoder_window is {self.decoder_window}, expected an odd number")

    def to_dict(self) -> dict[str, Any]:
        """Content of config.json."""
        return {"_class_name": "LinearPatchAutoencoder", **asdict(self)}


class LinearPatchAutoencoder(nn.Module):
    """See the module text. Pixels are [B, 3, H, W] in [-1, 1], latents [B, C, H / patch, W / patch]."""

    def __init__(self, config: LinearPatchConfig) -> None:
        super().__init__()
        self.config = config
        patch, channels = config.patch_size, config.latent_channels
        self.encoder = nn.Conv2d(3, channels, config.encoder_window, stride=patch)
        self.decoder = nn.Conv2d(channels, 3 * patch * patch, config.decoder_window)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels to latents."""
        border = (self.config.encoder_window - self.config.patch_size) // 2
        return self.encoder(_replicate(pixels, border))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels, not clamped."""
        border = self.config.decoder_window // 2
        return F.pixel_shuffle(self.decoder(_replicate(latents, border)), self.config.patch_size)

    @classmethod
    @torch.no_grad()
    def fit(cls, pixels: Tensor, config: LinearPatchConfig, ridge: float = 1e-4) -> Self:
        """Fit both maps to pictures [N, 3, H, W] in [-1, 1]; deterministic, in float64.

        Args:
            ridge: regularisation of the least squares, relative to the mean variance of a latent.
        """
        model = cls(config)
        border = (config.encoder_window - config.patch_size) // 2
        windows = _columns(_replicate(pixels, border), config.encoder_window, config.patch_size)
        mean = windows.mean(0)
        covariance = torch.cov((windows - mean).T)
        values, vectors = torch.linalg.eigh(covariance)
        order = values.argsort(descending=True)[: config.latent_channels]
        deviation = values[order].clamp(min=1e-12).sqrt()
        basis = vectors[:, order] / deviation.sqrt()
        # The sign of an eigenvector is arbitrary: fix it, so that every machine fits the same encoder.
        basis = basis * torch.sign(basis.gather(0, basis.abs().argmax(0, keepdim=True)))
        basis = basis / ((windows - mean) @ basis).std()
        model.encoder.weight.copy_(basis.T.reshape(model.encoder.weight.shape))
        model.encoder.bias.copy_(-(mean @ basis))  # type: ignore[union-attr]  # Conv2d is built with a bias

        latents = model.encode(pixels)
        border = config.decoder_window // 2
        inputs = _columns(_replicate(latents, border), config.decoder_window, 1)
        inputs = torch.cat((inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)), dim=1)
        targets = F.pixel_unshuffle(pixels, config.patch_size).permute(0, 2, 3, 1).flatten(0, 2).double()
        gram = inputs.T @ inputs
        gram += ridge * gram.diagonal()[:-1].mean() * torch.eye(len(gram), dtype=gram.dtype)
        solution = torch.linalg.solve(gram, inputs.T @ targets)
        model.decoder.weight.copy_(solution[:-1].T.reshape(model.decoder.weight.shape))
        model.decoder.bias.copy_(solution[-1])  # type: ignore[union-attr]  # Conv2d is built with a bias
        return model.requires_grad_(False).eval()


def _replicate(x: Tensor, border: int) -> Tensor:
    return F.pad(x, (border,) * 4, mode="replicate") if border else x


def _columns(x: Tensor, window: int, stride: int) -> Tensor:
    """All windows of x as rows, float64; channel-major within a row like a convolution's weight."""
    return F.unfold(x, window, stride=stride).transpose(1, 2).flatten(0, 1).double()
