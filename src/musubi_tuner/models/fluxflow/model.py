"""FluxFlow's flow processor: predicts v of latent tokens from a text vector and a time.

    x = Linear(tokens)     context = pooled mixer over the first tokens     text token = Linear(text + time)
    blocks: gated context -> self-attention, cross-attention to the text -> four pillars -> Linear -> Bezier
    v = Linear(x) + what convolutions over the whole map say, pooled

Time is an index 0..999 of the diffusion. With ``compat = "reference"`` it is read as the published program does, which multiplies
the index by 999, so that all but 0 mean the last one. The flags of `FluxFlowConfig` mend what the layout itself has.

Source: FluxFlow 0.3.1 to 0.5.1, rewritten from its description.

Shape letters: B batch, D latent channels, M width, E text width, T tokens, h/w latent rows and columns, A heads, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.flow import pack_pixels, unpack_pixels
from musubi_tuner.models.fluxflow.autoencoder import Mixer, sizes_of, straight, with_coordinates
from musubi_tuner.models.fluxflow.bezier import BezierActivation, TrainableBezier
from musubi_tuner.models.layers import image_positions, rotate

NUM_TIMES = 1000
Rope = tuple[Tensor, Tensor]


class RotaryEmbedding(nn.Module):
    """Tables of the rotary position embedding. The frequencies are part of the published files.

    Args:
        head_dim: d. axial: rows and columns of a map, for `rotate`; else raster indices in the published form, whose tables repeat
            neighbours while the halves of a head are turned.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, axial: bool = False) -> None:
        super().__init__()
        self.axial = axial
        half = head_dim // 2
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half))

    def forward(self, height: int, width: int) -> Rope:
        """Cosines and sines of a map, float32: [T, d] in the published form, else [T, d/2]."""
        device = self.inv_freq.device
        if self.axial:
            axes = image_positions(height, width, device)[:, 1:].float()
            # Rows and columns take turns, so both have slow and fast frequencies.
            angles = axes.repeat(1, len(self.inv_freq) // 2) * self.inv_freq.float()
            return angles.cos(), angles.sin()
        return self.raster(height * width)

    def raster(self, length: int) -> Rope:
        """Tables of the published form for indices 0 to length - 1."""
        index = torch.arange(length, device=self.inv_freq.device, dtype=torch.float32)
        angles = (index[:, None] * self.inv_freq.float()).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


def turn_halves(x: Tensor, rope: Rope) -> Tensor:
    """The published product: ``x cos + [-x2, x1] sin`` with x1, x2 the halves of a head, x [..., T, d]."""
    cos, sin = (table[: x.shape[-2]] for table in rope)
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Attention with a projection for queries and one for keys and values."""

    def __init__(self, d_model: int, n_head: int, axial: bool = False) -> None:
        super().__init__()
        self.n_head, self.axial = n_head, axial
        self.q_proj, self.kv_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, 2 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self,
        x_q: Tensor,
        x_kv: Tensor,
        rope_q: Rope | None = None,
        rope_k: Rope | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Args:
        rope_q, rope_k: tables of queries and keys; None = no rotation. mask: keys to see, broadcast to [B, A, Tq, Tk].
        """
        q, k, v = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for part in (self.q_proj(x_q), *self.kv_proj(x_kv).chunk(2, dim=-1))
        )
        turn = rotate if self.axial else turn_halves
        q = q if rope_q is None else turn(q, rope_q)
        k = k if rope_k is None else turn(k, rope_k)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class ContextInjection(nn.Module):
    """``x * sigmoid(G c) + B c`` with one context vector per sample."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(d_model, d_model), nn.Sigmoid())
        self.bias = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return torch.addcmul(self.bias(context)[:, None], x, self.gate(context)[:, None])


def pillar(d_model: int) -> nn.Sequential:
    """Three layers, with an activation behind the last too."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(d_model, d_model), nn.SiLU()) for _ in range(3)))


class Block(nn.Module):
    """One block. The four pillars make the control points of its last step and hand them to the next block.

    Args:
        interleaved: channel by channel and beside a residual; else the parts lie one after another, so that a fifth of the
            outputs sees x alone and each other fifth one pillar alone.
    """

    def __init__(self, d_model: int, n_head: int, *, axial: bool = False, interleaved: bool = False) -> None:
        super().__init__()
        self.interleaved, self.axial = interleaved, axial
        self.self_attn, self.cross_attn = Attention(d_model, n_head, axial), Attention(d_model, n_head, axial)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))
        self.p0, self.p1, self.p2, self.p3 = (pillar(d_model) for _ in range(4))
        self.ffn = nn.Sequential(nn.Linear(d_model, d_model), BezierActivation("sigmoid", "none"))
        self.rotary_pe = RotaryEmbedding(d_model // n_head, axial)

    def forward(
        self, x: Tensor, text: Tensor, points: list[Tensor] | None, rope: Rope, text_mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Args:
            x: image tokens [B, T, M]. text: [B, L, M]. points: pillars of the block before. rope: tables of x.
            text_mask: text tokens to see, bool [B, L].

        Returns:
            Tokens, and the pillars.
        """
        y = self.norm1(x)
        x = x + self.self_attn(y, y, rope, rope)
        mask = None if text_mask is None else text_mask[:, None, None]
        # Rotating a text makes sense only in the published form, where it has one token and no effect.
        turned = None if self.axial or text.shape[1] > 1 else rope
        x = x + self.cross_attn(self.norm2(x), self.norm2(text), turned, turned, mask)
        gate = x.sigmoid()
        before = [gate] * 4 if points is None else [gate * point for point in points]
        points = [mlp(y) for mlp, y in zip((self.p0, self.p1, self.p2, self.p3), before)]
        x = x + self.ffn[0](self.norm3(x))
        if self.interleaved:
            return x + self.ffn[1](torch.stack((x, *points), dim=-1).flatten(-2)), points
        return self.ffn[1](torch.cat((x, *points), dim=-1)), points


class FlowProcessor(nn.Module):
    """Predicts v of tokens.

    Args:
        d_model: M. vae_dim: D. embedding_size: E. n_head, n_layers: of the blocks. max_hw: unit of the size token.
        ctx_tokens: tokens that the context begins with, and that the convolutions change.
        compat: what `forward` takes unless it is told; rotary, controls, flow_head: see `FluxFlowConfig`.
        text_width: of the text states of text_mode = "sequence"; 0 = pooled.
    """

    def __init__(
        self,
        d_model: int = 512,
        vae_dim: int = 128,
        embedding_size: int = 1024,
        n_head: int = 8,
        n_layers: int = 10,
        max_hw: int = 1024,
        ctx_tokens: int = 4,
        *,
        compat: str = "fixed",
        rotary: str = "raster",
        controls: str = "part",
        flow_head: str = "first",
        text_width: int = 0,
    ) -> None:
        super().__init__()
        self.max_hw, self.ctx_tokens, self.compat = max_hw, ctx_tokens, compat
        self.everywhere = flow_head == "all"
        self.call = straight
        self.vae_to_dmodel, self.dmodel_to_vae = nn.Linear(vae_dim, d_model), nn.Linear(d_model, vae_dim)
        self.ctx_mixer = Mixer(d_model, max(1, d_model // 128))
        self.time_embed = nn.Sequential(
            nn.Embedding(NUM_TIMES, d_model),
            nn.LayerNorm(d_model),
            TrainableBezier(d_model),
            nn.Linear(d_model, embedding_size),
        )
        self.text_proj = nn.Linear(embedding_size, d_model)
        self.text_tokens = nn.Linear(text_width, d_model) if text_width else None
        self.context_injection = ContextInjection(d_model)
        self.transformer_blocks = nn.ModuleList(
            Block(d_model, n_head, axial=rotary == "axial", interleaved=controls == "interleaved")
            for _ in range(n_layers)
        )
        self.flow_predictor = nn.Sequential(
            nn.Conv2d(d_model, d_model, 5, padding=2),
            TrainableBezier((d_model, 1, 1)),
            nn.Conv2d(d_model, d_model, 3, padding=1),
        )
        self.context_final = nn.Sequential(
            nn.Conv2d(d_model + 2, d_model, 7, padding=3), TrainableBezier((d_model, 1, 1))
        )

    def rotary(self, height: int, width: int) -> Rope:
        """Tables of the first block, which serve all."""
        first: Block = self.transformer_blocks[0]  # type: ignore[assignment]
        tables: Rope = first.rotary_pe(height, width)
        return tables

    def predict(
        self,
        tokens: Tensor,
        size: tuple[int, int],
        text: Tensor,
        index: Tensor,
        states: Tensor | None = None,
        states_mask: Tensor | None = None,
    ) -> Tensor:
        """v of tokens [B, T, D] of one size.

        Args:
            size: h, w. text: pooled text [B, E], zeros = no text. index: time of every sample, int64 [B] in 0..999.
            states: text states [B, L, text_width], for text_mode = "sequence". states_mask: bool [B, L], those that count.
        """
        x = self.vae_to_dmodel(tokens)
        first = min(self.ctx_tokens, x.shape[1])
        context, _ = self.ctx_mixer(x[:, :first])
        condition = text + self.time_embed(index)
        texts, mask = self.text_proj(condition)[:, None], None
        if self.text_tokens is not None and states is not None:
            texts = torch.cat((texts, self.text_tokens(states.to(texts.dtype))), dim=1)
            if states_mask is not None:
                mask = F.pad(states_mask.bool(), (1, 0), value=True)  # the pooled text with the time always counts
        points = None
        rope: Rope = self.rotary(*size)
        for block in self.transformer_blocks:
            x, points = self.call(block, self.context_injection(x, context), texts, points, rope, mask)
            context = context + x.mean(dim=1)
        over_map = self.flow_predictor(unpack_pixels(x, *size))
        over_map = self.context_final(with_coordinates(over_map))
        v = self.dmodel_to_vae(x)
        if self.everywhere:
            return v + self.dmodel_to_vae(pack_pixels(over_map))
        pooled = self.dmodel_to_vae(over_map.mean(dim=(2, 3)))[:, None]
        return torch.cat((v[:, :first] + pooled, v[:, first:]), dim=1)

    def forward(
        self,
        packed: Tensor,
        text: Tensor,
        t: Tensor,
        compat: str | None = None,
        *,
        states: Tensor | None = None,
        states_mask: Tensor | None = None,
    ) -> Tensor:
        """Packed v [B, T + 1, D]; the size token is passed on.

        Args:
            packed: noisy tokens and the size token [B, T + 1, D]; sizes may differ. text: [B, E].
            t: times [B]; integers are indices 0..999, fractions of [0, 1] are multiplied by 999.
            compat: ``fixed`` or ``reference``; None = that of the model.

        Raises:
            ValueError: for a fraction outside of [0, 1], or an unknown ``compat``.
        """
        index = time_index(t, compat or self.compat)
        sizes, tokens = sizes_of(packed, self.max_hw), packed[:, :-1]
        # Samples of one size go through together; usually that is all of them.
        v = torch.empty_like(tokens)
        for size in dict.fromkeys(sizes):
            rows = [row for row, other in enumerate(sizes) if other == size]
            some = [None if part is None else part[rows] for part in (states, states_mask)]
            v[rows] = self.predict(tokens[rows], size, text[rows], index[rows], *some).to(v.dtype)
        return torch.cat((v, packed[:, -1:]), dim=1)


def time_index(t: Tensor, compat: str) -> Tensor:
    """Times as indices 0..999, int64; see `FlowProcessor.forward`."""
    if compat == "reference":
        return (t.float() * (NUM_TIMES - 1)).long().clamp(0, NUM_TIMES - 1)
    if compat != "fixed":
        raise ValueError(f"compat is '{compat}'; known: fixed, reference")
    if not t.is_floating_point():
        return t.long()
    if bool(((t < 0) | (t > 1)).any()):
        raise ValueError("times outside of [0, 1]: indices 0..999 must be integers, fractions lie between 0 and 1")
    return (t.float() * (NUM_TIMES - 1)).long()
