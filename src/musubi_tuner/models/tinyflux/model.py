"""TinyFlux-Deep v4.2: a small flow transformer of double-stream and single-stream blocks.

    img, txt = img_in(latent tokens), txt_in(T5 states)
    vec      = time + blend(CLIP pooled, pooled T5) + Lune signal (+ guidance, in models that embed it)
    double blocks: text and image keep their own weights and attend to text + image
    single blocks: one sequence [text, image], attention then MLP
    velocity = final_linear(RMSNorm(img))

Time t counts from 0 (noise) to 1 (image) and enters the embedding as it is; the output is ``x0 - noise``. New models may
compute three things otherwise, see `geometry.ModelOptions`.
Sol sharpens or softens attention (temperature) and modulates image queries and keys (spatial map).

Guarantees: float32 numbers equal the published code (tests/golden). Whatever the compute dtype, timestep
embedding, rotary angles, softmax of the T5 pool, Sol's geometric terms, temperature and modulation are float32.
Loading, time sampling and memory handling live elsewhere.

Shape letters: B batch, N image tokens, L text tokens, T = L + N, C latent channels, D hidden, A heads, d head width.
Source: the published TinyFlux-Deep v4.2 (MIT), rewritten from its description.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.memory.attention import attend
from musubi_tuner.models.layers import image_positions, rotate
from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig
from musubi_tuner.models.tinyflux.sol import LunePredictor, SolPrior, attention_temperature, modulation, upsample_map

EXACT_INPUTS = ("timestep", "guidance", "img_ids", "txt_ids")
"""Arguments of the model that are float32 whatever it computes in."""
TIME_WIDTH = 256
"""Width of the sinusoidal time embedding."""
ROPE_BASE = 10000.0


def text_ids(length: int, device: torch.device | str | None = None) -> Tensor:
    """Numbered text positions (i, 0, 0), [length, 3] float32; the published model leaves them all at zero."""
    ids = torch.zeros(length, 3, device=device)
    ids[:, 0] = torch.arange(length, device=device)
    return ids


def timestep_embedding(t_B: Tensor) -> Tensor:
    """Sines, then cosines, of t at 128 frequencies from 1 down to 1/10000, [B, 256] float32.

    The exponent is divided by 127, and t is not scaled: the fastest phase turns by one radian over all of [0, 1].
    """
    half = TIME_WIDTH // 2
    frequencies = torch.exp(torch.arange(half, device=t_B.device, dtype=torch.float32) * (-math.log(1e4) / (half - 1)))
    angles = t_B.float()[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class RotaryEmbedding(nn.Module):
    """Angles of the rotary position embedding, one group of frequencies per axis of the ids.

    The frequencies are persistent buffers, part of the published state dict, and stay float32 whatever
    ``.to(dtype)`` the model is given.
    """

    def __init__(self, axes: tuple[int, int, int]) -> None:
        super().__init__()
        for axis, width in enumerate(axes):
            self.register_buffer(f"freqs_{axis}", rotary_frequencies(width))

    def _apply(self, fn: Any, recurse: bool = True) -> "RotaryEmbedding":
        for name, buffer in self._buffers.items():
            assert buffer is not None
            moved = fn(buffer)
            self._buffers[name] = (moved if buffer.is_meta else buffer.to(moved.device)).float()
        return self

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tokens, d/2] float32 for ids [tokens, 3]."""
        frequencies = [getattr(self, f"freqs_{axis}") for axis in range(3)]
        angles = torch.cat([ids[:, axis, None].float() * freqs for axis, freqs in enumerate(frequencies)], dim=-1)
        return angles.cos(), angles.sin()


def rotary_frequencies(width: int) -> Tensor:
    """``10000^(-2k / width)`` for k < width / 2, float32."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return 1.0 / ROPE_BASE**exponents


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` with eps 1e-6; the root mean square is float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return (x.float() * scale).to(x.dtype) * self.weight


class AdaLayerNorm(nn.Module):
    """RMSNorm with shift and scale from the conditioning vector, and the gates that go with it."""

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * width)
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor, vec: Tensor) -> tuple[Tensor, ...]:
        """Return the modulated x and the remaining chunks, each [B, 1, D]."""
        shift, scale, *rest = self.linear(F.silu(vec)).unsqueeze(1).chunk(self.chunks, dim=-1)
        return self.norm(x) * (1 + scale) + shift, *rest


class MLP(nn.Module):
    """Linear, GELU (tanh approximation), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """[B, T, 3 A d] to queries with keys [2, B, A, T, d] and values [B, A, T, d]."""
    split = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return split[:2], split[2]


def scale_float(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a float32 factor, keeping the dtype of x: modulation of queries and keys, temperature of queries."""
    return (x.float() * factor).to(x.dtype)


class BlockInputs:
    """What every block of one forward pass shares.

    Attributes:
        rope_img: cosines and sines of the image tokens. rope_all: of text and image, for single blocks. rope_txt: of the
            text tokens, for double blocks of models with text positions, or None.
        map_B1N: Sol's importance map at latent resolution, or None.
        sharpness: 1 / temperature [B, 1 or A, 1, 1] that multiplies queries, or None.
        key_mask: [B, 1, 1, L + N] boolean, true = may be attended to, or None.
    """

    def __init__(
        self,
        rope_img: tuple[Tensor, Tensor],
        rope_all: tuple[Tensor, Tensor],
        map_B1N: Tensor | None,
        sharpness: Tensor | None,
        key_mask: Tensor | None,
        rope_txt: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.rope_img, self.rope_all, self.rope_txt = rope_img, rope_all, rope_txt
        self.map_B1N, self.sharpness, self.key_mask = map_B1N, sharpness, key_mask


class DoubleAttention(nn.Module):
    """Attention of two streams with own projections over the keys of both."""

    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        inner = self.heads * config.attention_head_dim
        self.txt_qkv = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.img_qkv = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.txt_out = nn.Linear(inner, config.hidden_size, bias=False)
        self.img_out = nn.Linear(inner, config.hidden_size, bias=False)
        if config.use_sol_prior:
            self.spatial_to_mod = nn.Conv2d(1, self.heads, kernel_size=1)

    def forward(self, txt: Tensor, img: Tensor, shared: BlockInputs) -> tuple[Tensor, Tensor]:
        """Return the attention outputs of text and image. Temperature acts on image queries only."""
        txt_qk, txt_v = split_heads(self.txt_qkv(txt), self.heads)
        img_qk, img_v = split_heads(self.img_qkv(img), self.heads)
        img_qk = rotate(img_qk, shared.rope_img)
        if shared.rope_txt is not None:
            txt_qk = rotate(txt_qk, shared.rope_txt)
        if shared.map_B1N is not None:
            img_qk = scale_float(img_qk, modulation(self.spatial_to_mod, shared.map_B1N))
        img_q, img_k = img_qk
        if shared.sharpness is not None:
            img_q = scale_float(img_q, shared.sharpness)
        # Both streams attend to the same keys, so their queries go through one call.
        q, k = torch.cat((txt_qk[0], img_q), dim=2), torch.cat((txt_qk[1], img_k), dim=2)
        attention = attend(q, k, torch.cat((txt_v, img_v), dim=2), shared.key_mask)
        return self.txt_out(attention[:, : txt.shape[1]]), self.img_out(attention[:, txt.shape[1] :])


class DoubleBlock(nn.Module):
    """Joint attention and one MLP per stream, all gated by the conditioning vector."""

    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.mlp_hidden
        self.img_norm1, self.txt_norm1 = AdaLayerNorm(width, 6), AdaLayerNorm(width, 6)
        self.attn = DoubleAttention(config)
        self.img_norm2, self.txt_norm2 = RMSNorm(width), RMSNorm(width)
        self.img_mlp, self.txt_mlp = MLP(width, hidden), MLP(width, hidden)

    def forward(self, txt: Tensor, img: Tensor, vec: Tensor, shared: BlockInputs) -> tuple[Tensor, Tensor]:
        """[B, L, D], [B, N, D] -> the same."""
        txt_in, txt_gate, txt_shift, txt_scale, txt_mlp_gate = self.txt_norm1(txt, vec)
        img_in, img_gate, img_shift, img_scale, img_mlp_gate = self.img_norm1(img, vec)
        txt_attn, img_attn = self.attn(txt_in, img_in, shared)
        txt = txt + txt_gate * txt_attn
        img = img + img_gate * img_attn
        txt = txt + txt_mlp_gate * self.txt_mlp(self.txt_norm2(txt) * (1 + txt_scale) + txt_shift)
        img = img + img_mlp_gate * self.img_mlp(self.img_norm2(img) * (1 + img_scale) + img_shift)
        return txt, img


class SingleAttention(nn.Module):
    """Self-attention over text and image in one sequence."""

    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        inner = self.heads * config.attention_head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)
        if config.use_sol_prior:
            self.spatial_to_mod = nn.Conv2d(1, self.heads, kernel_size=1)

    def forward(self, x: Tensor, shared: BlockInputs) -> Tensor:
        """Temperature acts on every token here, text included; the map on image tokens only."""
        qk, v = split_heads(self.qkv(x), self.heads)
        qk = rotate(qk, shared.rope_all)
        if shared.map_B1N is not None:
            factor = modulation(self.spatial_to_mod, shared.map_B1N)
            factor = F.pad(factor, (0, 0, x.shape[1] - factor.shape[2], 0), value=1.0)
            qk = scale_float(qk, factor)
        q, k = qk
        if shared.sharpness is not None:
            q = scale_float(q, shared.sharpness)
        return self.out_proj(attend(q, k, v, shared.key_mask))


class SingleBlock(nn.Module):
    """Gated attention, then a plain MLP (in sequence, unlike FLUX's parallel single block)."""

    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__()
        self.norm = AdaLayerNorm(config.hidden_size, 3)
        self.attn = SingleAttention(config)
        self.mlp = MLP(config.hidden_size, config.mlp_hidden)
        self.norm2 = RMSNorm(config.hidden_size)

    def forward(self, x: Tensor, vec: Tensor, shared: BlockInputs) -> Tensor:
        """[B, L + N, D] -> the same."""
        normed, gate = self.norm(x, vec)
        x = x + gate * self.attn(normed, shared)
        return x + self.mlp(self.norm2(x))


class TimeEmbedder(nn.Module):
    """Sinusoids of t through two Linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """[B] -> [B, D] in the dtype of the weights."""
        return self.mlp(timestep_embedding(t_B).to(next(self.mlp.parameters()).dtype))


class TinyFluxDeep(nn.Module):
    """The denoiser; see the module text for its equation and `forward` for its inputs."""

    rope: RotaryEmbedding

    def __init__(self, config: TinyFluxConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TinyFluxConfig()
        width = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, width)
        self.txt_in = nn.Linear(config.joint_attention_dim, width)
        self.time_in = TimeEmbedder(width)
        self.vector_in = nn.Sequential(nn.SiLU(), nn.Linear(config.pooled_projection_dim, width))
        if config.use_t5_vec:
            self.t5_pool = nn.Sequential(
                nn.Linear(config.joint_attention_dim, width), nn.SiLU(), nn.Linear(width, width)
            )
            self.text_balance = nn.Parameter(torch.zeros(()))
        if config.use_lune_expert:
            self.lune_predictor = LunePredictor(config).requires_grad_(not config.freeze_lune)
        if config.use_sol_prior:
            self.sol_prior = SolPrior(config)
            if config.freeze_sol:
                self.sol_prior.requires_grad_(False)
        if config.guidance_embeds:
            self.guidance_in = TimeEmbedder(width)
        self.rope = RotaryEmbedding(config.axes_dims_rope)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_double_layers))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.final_norm = RMSNorm(width)
        self.final_linear = nn.Linear(width, config.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, to which all inputs but the time are cast."""
        return self.img_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the input layers, which never leave it."""
        return self.img_in.weight.device

    @staticmethod
    def create_img_ids(batch_size: int, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        """Positions of image tokens for `forward`, [batch, height * width, 3] int64: (0, row, column).

        Args:
            height, width: of the latents.
        """
        return image_positions(height, width, device).expand(batch_size, -1, -1)

    def count_parameters(self) -> dict[str, int]:
        """Numbers of parameters by part, and ``total``. The balance of the text encoders counts with their pool."""
        parts = {"text_balance": "t5_pool", "final_norm": "final", "final_linear": "final"}
        found: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            part = name.partition(".")[0]
            part = parts.get(part, part)
            found[part] = found.get(part, 0) + parameter.numel()
        return {**found, "total": sum(found.values())}

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        lune_features: Tensor | None = None,
        sol_stats: Tensor | None = None,
        sol_spatial: Tensor | None = None,
        return_expert_pred: bool = False,
        *,
        height: int | None = None,
        width: int | None = None,
        lune_mask: Tensor | None = None,
        sol_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        guidance: Tensor | None = None,
        guidance_mask: Tensor | None = None,
    ) -> Any:
        """Predict the velocity ``x0 - noise``.

        Args:
            hidden_states: noisy latent tokens [B, N, C], row by row.
            encoder_hidden_states: T5 states [B, L, J].
            pooled_projections: CLIP pooled text [B, P].
            timestep: t in [0, 1], 0 = noise, [B]; float32 is kept as float32.
            img_ids: [N, 3] or [B, N, 3] (all rows alike); built from height and width when absent.
            txt_ids: [L, 3] or [B, L, 3] (all rows alike); absent = all zero, or numbered in models with text positions. Acts
                in single blocks, and in double blocks of such models only.
            lune_features: teacher features [B, E]. sol_stats: [B, 3]. sol_spatial: [B, S, S].
            return_expert_pred: return the pair (velocity, experts).
            height, width: latent size; absent = read from img_ids, else the square root of N.
            lune_mask, sol_mask: [B] boolean, true where the teacher features are real; absent = everywhere.
            text_mask: [B, L] boolean, true for real text tokens; absent = padding takes part, as published.
            guidance: embedded guidance [B], for models with ``guidance_embeds``, used as it is.
            guidance_mask: [B] boolean, true where the guidance counts; absent = everywhere.

        Returns:
            Velocity [B, N, C]; with ``return_expert_pred`` also a dictionary with ``lune`` {expert_signal, expert_pred,
            expert_used} or None, ``sol`` {temperature, spatial_importance, pred_stats, pred_spatial} or None, and
            the flat aliases ``lune_pred``, ``sol_stats_pred``, ``sol_spatial_pred``.

        Raises:
            ValueError: if the latent size is unknown or does not match the number of tokens, if ids differ between samples,
                or if guidance is missing where it is embedded, or given where it is not.
        """
        if (guidance is None) == self.config.guidance_embeds:
            verb = "embeds guidance; give one number per sample" if guidance is None else "has no guidance embedding"
            raise ValueError(f"guidance is {'missing' if guidance is None else 'given'}, and this model {verb}")
        tokens, t = hidden_states.shape[1], timestep.float()
        height, width = latent_size(tokens, img_ids, height, width)
        if img_ids is None:
            img_ids = image_positions(height, width, hidden_states.device)
        img_ids = shared_ids(img_ids, "img_ids")
        t5 = encoder_hidden_states.to(self.dtype)
        pooled = pooled_projections.to(self.dtype)
        img, txt = self.img_in(hidden_states.to(self.dtype)), self.txt_in(t5)

        time_emb = self.time_in(t * self.config.options.timestep_scale)
        vec = time_emb + self._text_vector(t5, pooled, text_mask)
        lune, sol = None, None
        if self.config.use_lune_expert:
            features = None if lune_features is None else lune_features.to(self.dtype)
            signal, guess = self.lune_predictor(time_emb, pooled, features, lune_mask)
            vec = vec + signal
            used = "predicted" if features is None else "real" if lune_mask is None else "mixed"
            lune = {"expert_signal": signal, "expert_pred": guess, "expert_used": used}
        if guidance is not None:
            embedded = self.guidance_in(guidance.float())
            vec = vec + (embedded if guidance_mask is None else embedded * guidance_mask[:, None].to(embedded.dtype))
        if self.config.use_sol_prior:
            stats = None if sol_stats is None else sol_stats.to(self.dtype)
            spatial = None if sol_spatial is None else sol_spatial.to(self.dtype)
            sol = self.sol_prior(time_emb, pooled, t, stats, spatial, sol_mask)

        shared = self._block_inputs(img_ids, txt_ids, txt.shape[1], sol, height, width, text_mask)
        for block in self.double_blocks:
            txt, img = block(txt, img, vec, shared)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vec, shared)
        velocity = self.final_linear(self.final_norm(x[:, txt.shape[1] :]))
        if not return_expert_pred:
            return velocity
        return velocity, {
            "lune": lune,
            "sol": sol,
            "lune_pred": lune and lune["expert_pred"],
            "sol_stats_pred": sol and sol["pred_stats"],
            "sol_spatial_pred": sol and sol["pred_spatial"],
        }

    def _text_vector(self, t5: Tensor, pooled: Tensor, text_mask: Tensor | None) -> Tensor:
        clip_vec = self.vector_in(pooled)
        if not self.config.use_t5_vec:
            return clip_vec
        balance = torch.sigmoid(self.text_balance)
        return balance * clip_vec + (1 - balance) * self.t5_pool(pool_text(t5, text_mask))

    def _block_inputs(
        self,
        img_ids: Tensor,
        txt_ids: Tensor | None,
        text_tokens: int,
        sol: dict[str, Tensor] | None,
        height: int,
        width: int,
        text_mask: Tensor | None,
    ) -> BlockInputs:
        options = self.config.options
        numbered = options.text_positions == "index"
        if txt_ids is None:
            txt_ids = text_ids(text_tokens, img_ids.device) if numbered else img_ids.new_zeros(text_tokens, 3)
        txt_ids = shared_ids(txt_ids, "txt_ids")
        cos, sin = self.rope(torch.cat((txt_ids.float(), img_ids.float())))
        key_mask = None
        if text_mask is not None:
            key_mask = F.pad(text_mask.bool(), (0, len(img_ids)), value=True)[:, None, None, :]
        return BlockInputs(
            rope_img=(cos[text_tokens:], sin[text_tokens:]),
            rope_all=(cos, sin),
            map_B1N=None if sol is None else upsample_map(sol["spatial_importance"], height, width),
            sharpness=None
            if sol is None
            else 1 / attention_temperature(sol["temperature"], options.temperature_per_head),
            key_mask=key_mask,
            rope_txt=(cos[:text_tokens], sin[:text_tokens]) if numbered else None,
        )


def pool_text(t5_BLJ: Tensor, text_mask: Tensor | None = None) -> Tensor:
    """Sum of T5 states weighted by the softmax of their own means, [B, J]; without a mask padding takes part."""
    logits = t5_BLJ.float().mean(-1)
    if text_mask is not None:
        logits = logits.masked_fill(~text_mask.bool(), float("-inf"))
    weights = torch.softmax(logits, dim=-1)
    return (weights.unsqueeze(-1) * t5_BLJ.float()).sum(1).to(t5_BLJ.dtype)


def shared_ids(ids: Tensor, name: str) -> Tensor:
    """Position ids [tokens, 3] of all samples of a batch, from those or from [B, tokens, 3]; the latter waits for the device.

    Raises:
        ValueError: if they differ between samples; angles are computed once for a batch.
    """
    if ids.ndim == 2:
        return ids
    if not torch.equal(ids, ids[:1].expand_as(ids)):
        raise ValueError(
            f"{name} differ between the samples of the batch; pictures of another size need a batch of their own"
        )
    return ids[0]


def latent_size(tokens: int, img_ids: Tensor | None, height: int | None, width: int | None) -> tuple[int, int]:
    """Rows and columns of the latent: as given, else from the ids, else a square.

    Reading the ids synchronises with the device, so the trainer and the sampler pass the size.

    Raises:
        ValueError: if the size does not match the number of tokens, or cannot be known.
    """
    if (height is None) != (width is None):
        raise ValueError(f"height and width go together: got {height} and {width}; pass both or neither")
    if height is None or width is None:
        if img_ids is not None:
            ids = img_ids[0] if img_ids.ndim == 3 else img_ids
            height, width = (int(value) + 1 for value in ids[:, 1:].amax(0).tolist())
        else:
            height = width = math.isqrt(tokens)
            if height * width != tokens:
                raise ValueError(f"{tokens} image tokens are not a square; pass height and width, or img_ids")
    if height * width != tokens:
        raise ValueError(f"latent size {height}x{width} has {height * width} tokens, got {tokens}")
    return height, width


def initialize(model: TinyFluxDeep, scheme: str = "reference", generator: torch.Generator | None = None) -> None:
    """Fill a new model with start values, in place.

    ``reference``: every Linear Xavier-uniform with zero bias (the AdaLN projections too), as the published code ends
    up doing; the final Linear's weight, the spatial modulation, ``text_balance`` and ``expert_gate`` zero; norms one.
    ``adaln_zero``: every block starts as the identity (Peebles and Xie 2022, arXiv:2212.09748): zero AdaLN projections, and a
    zero last layer in the MLP of single blocks, which no gate closes.

    Raises:
        ValueError: for an unknown scheme.
    """
    if scheme not in ("reference", "adaln_zero"):
        raise ValueError(f"unknown init scheme '{scheme}'; known: reference, adaln_zero")
    fresh = TinyFluxDeep(model.config)
    with torch.no_grad():
        for name, module in fresh.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
                closes = name.endswith(("norm1.linear", "norm.linear", ".mlp.fc2"))
                if scheme == "adaln_zero" and closes:
                    module.weight.zero_()
            elif isinstance(module, nn.Conv2d):
                module.weight.zero_()
                assert module.bias is not None
                module.bias.zero_()
        fresh.final_linear.weight.zero_()
    model.load_state_dict(fresh.state_dict(), assign=any(p.is_meta for p in model.parameters()))
    trainable = {name: parameter.requires_grad for name, parameter in fresh.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
