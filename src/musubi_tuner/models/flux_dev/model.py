"""FLUX.1: a flow transformer of double-stream and single-stream blocks.

    img, txt = img_in(packed latent tokens), txt_in(T5 states)
    vec      = time_in(e(t)) + guidance_in(e(guidance)) + vector_in(CLIP pooled)
    double blocks: text and image keep their own weights and attend to text + image
    single blocks: one sequence [text, image]; attention and MLP in parallel, one projection out
    velocity = final_layer(img, vec)

The time is the noise fraction sigma in [0, 1]; the output is ``noise - x0``. Time and guidance stay float32 until they
are embedded: bfloat16 would round 1000 t to whole units.

Shapes are checked once, at entry; nothing inside squeezes. Module and parameter names are those of Black Forest Labs'
published weights. Loading, packing and time sampling live elsewhere.

Shape letters: B batch, N image tokens, L text tokens, T = L + N, C values per token, D hidden, A heads, d head width.
Source: Black Forest Labs, FLUX.1 (Apache-2.0 reference code), rewritten from its description.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.memory.attention import attend
from musubi_tuner.models.flux_dev.geometry import TIME_WIDTH, FluxConfig
from musubi_tuner.models.layers import rotate

TIME_FACTOR = 1000.0
NORM_EPS = 1e-6
EXACT_INPUTS = ("img_ids", "txt_ids", "timesteps", "guidance")
"""Arguments of the model that are float32 whatever it computes in."""
Rope = tuple[Tensor, Tensor]


def timestep_embedding(t_B: Tensor) -> Tensor:
    """Cosines, then sines, of 1000 t at 128 frequencies from 1 towards 1/10000, [B, 256] float32."""
    half = TIME_WIDTH // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t_B.device) * (-math.log(10_000) / half))
    angles = TIME_FACTOR * t_B.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_angles(ids_BT3: Tensor, axes: tuple[int, ...], theta: int) -> Rope:
    """Cosines and sines [B, 1, T, d/2] float32 of ``position / theta^(2k / width)``, axis after axis; float64 inside."""
    parts = []
    for axis, width in enumerate(axes):
        # MPS has no float64; the angles are made on the CPU there.
        place = "cpu" if ids_BT3.device.type == "mps" else ids_BT3.device
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=place) / width
        parts.append(ids_BT3[..., axis, None].to(place, torch.float64) / theta**exponents)
    angles = torch.cat(parts, dim=-1)[:, None]
    return angles.cos().float().to(ids_BT3.device), angles.sin().float().to(ids_BT3.device)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: a vector per sample to the hidden width."""

    def __init__(self, width_in: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(width_in, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in] -> [B, D]."""
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """``x / rms(x) * scale`` with eps 1e-6, in float32; the dtype of x is kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + NORM_EPS) * self.scale.float()).to(x.dtype)


class QKNorm(nn.Module):
    """Separate norms of queries and keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """[B, A, T, d] each."""
        return self.query_norm(q), self.key_norm(k)


class SelfAttention(nn.Module):
    """The projections of one stream of a double block; the attention itself spans both streams."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(width, width)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys, and values, [B, A, T, d] each, from [B, T, D]."""
        q, k, v = split_heads(self.qkv(x), self.heads)
        return *self.norm(q, k), v


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, 3 A d] to three of [B, A, T, d]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


class Modulation(nn.Module):
    """Shift, scale and gate from the conditioning vector, once or twice."""

    def __init__(self, width: int, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces
        self.lin = nn.Linear(width, pieces * width)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """[B, D] -> pieces of [B, 1, D]."""
        return self.lin(F.silu(vec))[:, None].chunk(self.pieces, dim=-1)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without learned parameters, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(1 + scale) * layer_norm(x) + shift``."""
    return (1 + scale) * layer_norm(x) + shift


def block_mlp(config: FluxConfig) -> nn.Sequential:
    """Linear, GELU (tanh approximation), Linear."""
    width, hidden = config.hidden_size, config.mlp_hidden
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


class DoubleStreamBlock(nn.Module):
    """Joint attention and one MLP per stream, all gated by the conditioning vector."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(config.hidden_size, 6), Modulation(config.hidden_size, 6)
        self.img_attn, self.txt_attn = SelfAttention(config), SelfAttention(config)
        self.img_mlp, self.txt_mlp = block_mlp(config), block_mlp(config)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """[B, N, D], [B, L, D], [B, D] -> image and text."""
        img_shift, img_scale, img_gate, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift, txt_scale, txt_gate, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)
        img_heads = self.img_attn.heads_of(modulate(img, img_shift, img_scale))
        txt_heads = self.txt_attn.heads_of(modulate(txt, txt_shift, txt_scale))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_heads, img_heads))
        attention = attend(rotate(q, rope), rotate(k, rope), v, None)
        txt_attention, img_attention = attention.split((txt.shape[1], img.shape[1]), dim=1)
        img = img + img_gate * self.img_attn.proj(img_attention)
        img = img + img_gate2 * self.img_mlp(modulate(img, img_shift2, img_scale2))
        txt = txt + txt_gate * self.txt_attn.proj(txt_attention)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on one sequence: one projection in, one out."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.mlp_hidden
        self.heads, self.widths = config.num_heads, (3 * width, hidden)
        self.linear1 = nn.Linear(width, 3 * width + hidden)
        self.linear2 = nn.Linear(width + hidden, width)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(width, 3)

    def forward(self, x: Tensor, vec: Tensor, rope: Rope) -> Tensor:
        """[B, T, D], [B, D] -> [B, T, D]."""
        shift, scale, gate = self.modulation(vec)
        qkv, hidden = self.linear1(modulate(x, shift, scale)).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, self.heads)
        q, k = self.norm(q, k)
        attention = attend(rotate(q, rope), rotate(k, rope), v, None)
        return x + gate * self.linear2(torch.cat((attention, F.gelu(hidden, approximate="tanh")), dim=-1))


class LastLayer(nn.Module):
    """Modulated norm and the projection to the values of a token; here the shift comes first, without a gate."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = nn.Linear(width, config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """[B, N, D], [B, D] -> [B, N, C]."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class Flux(nn.Module):
    """The denoiser; see the module text for its equation and `forward` for its inputs."""

    def __init__(self, config: FluxConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or FluxConfig()
        width = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, width)
        self.txt_in = nn.Linear(config.context_in_dim, width)
        self.time_in = MLPEmbedder(TIME_WIDTH, width)
        self.vector_in = MLPEmbedder(config.vec_in_dim, width)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_WIDTH, width)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(config)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the input layers, to which all inputs but time, guidance and ids are cast."""
        return self.img_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the input layers, which never leave it."""
        return self.img_in.weight.device

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity ``noise - x0``.

        Args:
            img: packed noisy latents [B, N, C]. img_ids: their positions [B, N, 3].
            txt: T5 states [B, L, J]. txt_ids: their positions [B, L, 3], zeros.
            timesteps: noise fraction in [0, 1], [B], float32.
            y: CLIP pooled text [B, P]. guidance: embedded guidance [B], float32.

        Returns:
            [B, N, C].

        Raises:
            ValueError: naming the argument whose shape does not fit.
        """
        self._check(img, img_ids, txt, txt_ids, timesteps, y, guidance)
        vec = self.time_in(timestep_embedding(timesteps).to(self.dtype)) + self.vector_in(y.to(self.dtype))
        if guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(self.dtype))
        rope = rotary_angles(torch.cat((txt_ids, img_ids), dim=1), self.config.axes_dim, self.config.theta)
        text_tokens = txt.shape[1]
        img, txt = self.img_in(img.to(self.dtype)), self.txt_in(txt.to(self.dtype))
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rope)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vec, rope)
        return self.final_layer(x[:, text_tokens:], vec)

    def _check(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor,
        guidance: Tensor | None,
    ) -> None:  # fmt: skip
        config, batch = self.config, len(img)
        expected: dict[str, tuple[Tensor, tuple[int | str, ...]]] = {
            "img": (img, (batch, "tokens", config.in_channels)),
            "img_ids": (img_ids, (batch, img.shape[1] if img.ndim > 1 else "tokens", 3)),
            "txt": (txt, (batch, "tokens", config.context_in_dim)),
            "txt_ids": (txt_ids, (batch, txt.shape[1] if txt.ndim > 1 else "tokens", 3)),
            "timesteps": (timesteps, (batch,)),
            "y": (y, (batch, config.vec_in_dim)),
        }
        if config.guidance_embed:
            if guidance is None:
                raise ValueError("guidance is missing: this model embeds it; give one number per sample")
            expected["guidance"] = (guidance, (batch,))
        elif guidance is not None:
            raise ValueError("guidance is given, but this model has no guidance embedding (schnell)")
        for name, (tensor, shape) in expected.items():
            fits = tensor.ndim == len(shape) and all(
                isinstance(size, str) or found == size for found, size in zip(tensor.shape, shape)
            )
            if not fits:
                wanted = ", ".join(str(size) for size in shape)
                raise ValueError(f"{name} is {list(tensor.shape)}, expected [{wanted}]")
