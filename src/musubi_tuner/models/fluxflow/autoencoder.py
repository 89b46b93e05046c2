"""FluxFlow's autoencoder: compressor and expander, convolutions with Bezier activations.

    compressor   image + coordinates -> stages that halve the sides -> latent -> mu, logvar;  z = mu + eps * exp(logvar / 2)
                 tokens = attention(z + positions [+ latent]);  packed = tokens and one token that holds the size
    expander     tokens as a map -> up-blocks that double the sides, modulated by the map itself (SPADE) -> RGB

Training and drawing work on maps and tokens with the size beside them: `Compressor.encode`, `Compressor.tokens` and
`Expander.decode`. ``packed`` is the published form, for files and comparisons.

Source: FluxFlow 0.3.1 to 0.5.1, rewritten from its description; SPADE is Park et al. 2019 (arXiv:1903.07291).

Shape letters: B batch, D latent channels, H/W image height and width, h/w of the latents, T = h w tokens.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from musubi_tuner.flow import pack_pixels, unpack_pixels
from musubi_tuner.models.fluxflow.bezier import BezierActivation, TrainableBezier
from musubi_tuner.models.fluxflow.geometry import POINTS_OF_LOGVAR

SPADE_HIDDEN = 128


def with_coordinates(x_BCHW: Tensor) -> Tensor:
    """Append two planes from -1 to 1: columns, then rows."""
    batch, _, height, width = x_BCHW.shape
    columns = torch.linspace(-1, 1, width, device=x_BCHW.device, dtype=x_BCHW.dtype)
    rows = torch.linspace(-1, 1, height, device=x_BCHW.device, dtype=x_BCHW.dtype)
    planes = torch.stack((columns.expand(height, width), rows[:, None].expand(height, width)))
    return torch.cat((x_BCHW, planes.expand(batch, -1, -1, -1)), dim=1)


def positions(height: int, width: int, channels: int, device: torch.device | str | None = None) -> Tensor:
    """Sines and cosines of rows, then of columns, [h w, D] float32; the rows take the larger half of an odd width."""
    row_TC = _axis(height, channels - channels // 2, device).repeat_interleave(width, dim=0)
    column_TC = _axis(width, channels // 2, device).repeat(height, 1)
    return torch.cat((row_TC, column_TC), dim=1)


def _axis(length: int, channels: int, device: torch.device | str | None) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(0, channels, 2, device=device, dtype=torch.float32) / max(channels, 1))
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :channels]


def size_token(height: int, width: int, packed: Tensor, max_hw: int) -> Tensor:
    """The last token of ``packed``, [B, 1, D]: latent rows and columns in units of ``max_hw``."""
    token = packed.new_zeros(len(packed), 1, packed.shape[-1])
    token[..., 0], token[..., 1] = height / max_hw, width / max_hw
    return token


def sizes_of(packed: Tensor, max_hw: int) -> list[tuple[int, int]]:
    """Rows and columns of every sample of ``packed``."""
    rows = (packed[:, -1, :2].float() * max_hw).round().clamp(min=1).int().tolist()
    return [(height, width) for height, width in rows]


def conv_bezier(conv: nn.Module, p_pre: str) -> nn.Sequential:
    """A layer that gives five channels for each that leaves the activation."""
    return nn.Sequential(conv, BezierActivation("sigmoid", p_pre))


def straight(stage: Callable[..., Any], *args: Any) -> Any:
    """Call a stage."""
    return stage(*args)


def recomputing(stage: Callable[..., Any], *args: Any) -> Any:
    """Call a stage that keeps its inputs only and is called again in the backward pass.

    Stages are a convolution and its activation: the five channels that an activation takes for one are what needs the memory.
    """
    if not torch.is_grad_enabled():
        return stage(*args)
    return checkpoint(stage, *args, use_reentrant=False, preserve_rng_state=False)


class AttentionBlock(nn.Module):
    """Pre-norm attention and a Bezier feed-forward layer over tokens [B, T, D]."""

    def __init__(self, width: int, heads: int, ff_mult: int, p_pre: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        hidden = ff_mult * width
        self.ff = nn.Sequential(
            nn.Linear(width, 5 * hidden), BezierActivation("sigmoid", p_pre), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.ff(self.norm2(x))


class Compressor(nn.Module):
    """Image to latents.

    Args:
        in_channels: of images. d_model: D. downscales: halvings. max_hw: unit of the size token.
        attn_layers, attn_heads, attn_ff_mult: of the attention over tokens.
        down_kernel, p_pre, latent_skip, down_shortcut, pair_residual, logvar_points: see `FluxFlowConfig`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        d_model: int = 128,
        downscales: int = 4,
        max_hw: int = 1024,
        attn_layers: int = 4,
        attn_heads: int = 8,
        attn_ff_mult: int = 2,
        *,
        down_kernel: int = 8,
        p_pre: str = "silu",
        latent_skip: bool = True,
        down_shortcut: bool = False,
        pair_residual: bool = False,
        logvar_points: tuple[float, float, float, float] = POINTS_OF_LOGVAR,
    ) -> None:
        super().__init__()
        self.d_model, self.downscales, self.max_hw = d_model, downscales, max_hw
        self.latent_skip, self.pair_residual = latent_skip, pair_residual
        self.call = straight
        widths = stage_widths(in_channels + 2, d_model, downscales)
        stages = list(pairwise(widths))
        padding = (down_kernel - 2) // 2
        self.encoder_first_step = nn.ModuleList(
            conv_bezier(nn.Conv2d(c, 5 * out, 3, padding=1, bias=False), p_pre) for c, out in stages
        )
        self.encoder_z = nn.ModuleList(
            conv_bezier(nn.Conv2d(out, 5 * out, down_kernel, stride=2, padding=padding), p_pre) for _, out in stages
        )
        self.shortcuts = nn.ModuleList(nn.Conv2d(4 * c, out, 1) for c, out in stages) if down_shortcut else None

        def pair(inputs: int) -> nn.Sequential:
            return nn.Sequential(*(conv_bezier(nn.Conv2d(c, 5 * d_model, 1), p_pre) for c in (inputs, d_model)))

        self.latent_proj, self.mu_proj, self.logvar_proj = pair(widths[-1]), pair(d_model), pair(d_model)
        self.mu_activation = TrainableBezier(d_model, (-2.0, -0.5, 0.5, 2.0), channel_only=True)
        self.logvar_activation = TrainableBezier(d_model, logvar_points, channel_only=True)
        self.token_attn = nn.ModuleList(
            AttentionBlock(d_model, attn_heads, attn_ff_mult, p_pre) for _ in range(attn_layers)
        )

    def encode(self, img_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of the latents, and the latents before both, [B, D, h, w] each.

        Raises:
            ValueError: if a side is no multiple of what the halvings need.
        """
        factor = 2**self.downscales
        if img_BCHW.shape[-2] % factor or img_BCHW.shape[-1] % factor:
            raise ValueError(
                f"an image of {img_BCHW.shape[-1]} x {img_BCHW.shape[-2]} has sides that are no multiples of {factor}"
            )
        x = with_coordinates(img_BCHW)
        for index, (first, second) in enumerate(zip(self.encoder_first_step, self.encoder_z)):
            y = self.call(second, self.call(first, x))
            x = y if self.shortcuts is None else y + self.shortcuts[index](F.pixel_unshuffle(x, 2))
        latent = self._pair(self.latent_proj, x)
        mu = self.mu_activation(self._pair(self.mu_proj, latent))
        return mu, self.logvar_activation(self._pair(self.logvar_proj, latent)), latent

    def _pair(self, pair: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = pair(x)
        return x + y if self.pair_residual else y

    def tokens(self, z_BDhw: Tensor, latent_BDhw: Tensor) -> Tensor:
        """Tokens [B, T, D] of sampled latents."""
        height, width = z_BDhw.shape[-2:]
        x = pack_pixels(z_BDhw) + positions(height, width, self.d_model, z_BDhw.device).to(z_BDhw.dtype)
        if self.latent_skip:
            x = x + pack_pixels(latent_BDhw)
        for block in self.token_attn:
            x = block(x)
        return x

    def forward(self, img: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Packed tokens [B, T + 1, D], mu and logvar [B, D, h, w].

        Args:
            img: [B, 3, H, W] in [-1, 1]. eps: standard normal in the shape of mu; None = mu itself is taken.
        """
        mu, logvar, latent = self.encode(img)
        x = self.tokens(mu if eps is None else sample_latents(mu, logvar, eps), latent)
        return torch.cat((x, size_token(mu.shape[-2], mu.shape[-1], x, self.max_hw)), dim=1), mu, logvar


def stage_widths(first: int, last: int, stages: int) -> list[int]:
    """Channels before and after every stage: evenly spaced, rounded half to even."""
    last = max(last, 8)
    return [round(first + (last - first) * index / stages) for index in range(stages + 1)]


def sample_latents(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """``mu + eps * exp(logvar / 2)``."""
    return mu + eps * torch.exp(0.5 * logvar)


class Spade(nn.Module):
    """Normalised features, scaled and shifted by what a context map says at every place."""

    def __init__(self, context_nc: int, num_features: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(min(32, num_features), num_features, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(context_nc, SPADE_HIDDEN, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(SPADE_HIDDEN, num_features, 3, padding=1)
        self.mlp_beta = nn.Conv2d(SPADE_HIDDEN, num_features, 3, padding=1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        if context.shape[-2:] != x.shape[-2:]:
            context = F.interpolate(context, size=x.shape[-2:], mode="bilinear", align_corners=False)
        shared = self.mlp_shared(context)
        return torch.addcmul(self.mlp_beta(shared), self.norm(x), 1 + self.mlp_gamma(shared))


class UpBlock(nn.Module):
    """Twice the sides at the same width.

    Args:
        channels: of input and output. context_size: of the context; kernel, mix_kernel, skip, p_pre: see `FluxFlowConfig`.
    """

    def __init__(
        self,
        channels: int,
        context_size: int,
        *,
        kernel: int = 16,
        mix_kernel: int = 5,
        skip: float = 0.1,
        p_pre: str = "silu",
    ) -> None:
        super().__init__()
        self.skip, self.call = skip, straight
        self.spade = Spade(context_size, channels)
        self.conv1 = nn.Sequential(
            nn.ConvTranspose2d(channels, 5 * channels, kernel, stride=2, padding=(kernel - 2) // 2),
            BezierActivation("sigmoid", p_pre),
            nn.Conv2d(channels, 5 * channels, mix_kernel, padding=mix_kernel - 1, dilation=2),
            BezierActivation("sigmoid", p_pre),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y = x if context is None else self.call(self.spade, x, context)
        for stage in (self.conv1[:2], self.conv1[2:]):
            y = self.call(stage, y)
        return y.add(F.interpolate(x, scale_factor=2, mode="nearest"), alpha=self.skip)


class Mixer(nn.Module):
    """One round of attention over a learned token and a few others; without a residual.

    Returns:
        The learned token [B, M], and the others [B, K, M].
    """

    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.cls = nn.Parameter(torch.zeros(1, 1, d_model))
        self.norm_in, self.norm_out = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.cat((self.cls.to(x.dtype).expand(len(x), -1, -1), self.norm_in(x)), dim=1)
        q, k, v = (
            part(y).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = self.norm_out(self.out_proj(out))
        return out[:, 0], out[:, 1:]


class Upscale(nn.Module):
    """The up-blocks under their published name."""

    def __init__(self, blocks: list[UpBlock]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, context)
        return x


class Expander(nn.Module):
    """Latents to image.

    Args:
        d_model: D. upscales: doublings. max_hw: unit of the size token.
        up_kernel, mix_kernel, up_skip, p_pre, head_widths, rgb_norm: see `FluxFlowConfig`.
    """

    def __init__(
        self,
        d_model: int = 128,
        upscales: int = 4,
        max_hw: int = 1024,
        *,
        up_kernel: int = 16,
        mix_kernel: int = 5,
        up_skip: float = 0.1,
        p_pre: str = "silu",
        head_widths: tuple[int, int] = (96, 48),
        rgb_norm: str = "group",
    ) -> None:
        super().__init__()
        self.d_model, self.max_hw = d_model, max_hw
        self.upscale = Upscale(
            [
                UpBlock(d_model, d_model, kernel=up_kernel, mix_kernel=mix_kernel, skip=up_skip, p_pre=p_pre)
                for _ in range(upscales)
            ]
        )
        # Never executed; its weights are part of the published files.
        self.context_mixer = Mixer(d_model, max(4, d_model // 64))
        wide, narrow = head_widths

        def norm(width: int) -> nn.Module:
            return nn.GroupNorm(8, width) if rgb_norm == "group" else nn.Identity()

        self.to_rgb_conv = nn.Sequential(
            nn.Conv2d(d_model, wide, 3, padding=1),
            norm(wide),
            nn.SiLU(),
            nn.Conv2d(wide, narrow, 3, padding=1),
            norm(narrow),
            nn.SiLU(),
            nn.Conv2d(narrow, 3, 1),
        )
        self.rgb_activation = TrainableBezier(3, (-1.0, 0.25, 0.75, 1.0), channel_only=True)

    def decode(self, map_BDhw: Tensor, use_context: bool = True, last: Tensor | None = None) -> Tensor:
        """Image [B, 3, H, W] of a map of tokens; not clamped.

        Args:
            last: takes the place of the last convolution's weight, for its gradient in this pass alone.
        """
        x = self.to_rgb_conv[:-1](self.upscale(map_BDhw, map_BDhw if use_context else None))
        conv = self.to_rgb_conv[-1]
        return self.rgb_activation(conv(x) if last is None else functional_call(conv, {"weight": last}, (x,)))

    def forward(self, packed: Tensor, use_context: bool = True) -> Tensor:
        """Image [B, 3, H, W] of packed tokens [B, T + 1, D].

        Raises:
            ValueError: if the images of a batch differ in size.
        """
        sizes, tokens = sizes_of(packed, self.max_hw), packed[:, :-1]
        if len(set(sizes)) == 1:
            return self.decode(unpack_pixels(tokens, *sizes[0]), use_context)
        images = [self.decode(unpack_pixels(one[None], *size), use_context) for one, size in zip(tokens, sizes)]
        if len({image.shape for image in images}) > 1:
            found = ", ".join(f"{width} x {height}" for height, width in sizes)
            raise ValueError(f"images of one batch have latents of {found}: decode them one by one")
        return torch.cat(images)
