"""Sol prior and Lune predictor: what TinyFlux learns from its two SD1.5 teachers.

Lune: a guess of the teacher's pooled mid-block features, projected into the conditioning vector.
Sol: a guess of attention statistics and of an importance map, turned into one attention temperature per
sample (or per head, in new models that ask for it) and a multiplicative modulation of image queries and keys.

Where a sample has real teacher features they replace the guess; `mask` chooses per sample. The guess is always
computed: the distillation loss needs it, and data parallel training then sees every parameter in the graph.

Shape letters: B batch, A heads, E Lune width, S side of the Sol map, H/W latent rows and columns.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig

MODULATION_LIMIT = 2.0
"""The exponent of the spatial modulation is clamped to plus or minus this."""
MIN_TEMPERATURE = 0.1


def choose(given: Tensor | None, guessed: Tensor, mask_B: Tensor | None) -> Tensor:
    """Real features where present, else the guess; ``mask_B`` true = present."""
    if given is None:
        return guessed
    if mask_B is None:
        return given
    mask = mask_B.view(-1, *[1] * (guessed.ndim - 1))
    return torch.where(mask, given.to(guessed.dtype), guessed)


class LunePredictor(nn.Module):
    """Guess the Lune features from time and pooled text, and project features into the conditioning vector."""

    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__()
        hidden = config.lune_hidden_dim
        self.input_proj = nn.Linear(config.hidden_size + config.pooled_projection_dim, hidden)
        self.predictor = nn.Sequential(
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Dropout(config.lune_dropout),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, config.lune_expert_dim),
        )
        self.output_proj = nn.Sequential(
            nn.LayerNorm(config.lune_expert_dim), nn.Linear(config.lune_expert_dim, config.hidden_size)
        )
        self.expert_gate = nn.Parameter(torch.zeros(()))

    def forward(
        self, time_emb: Tensor, pooled: Tensor, features_BE: Tensor | None, mask_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the signal to add to the conditioning vector [B, D] and the guess [B, E]."""
        guess = self.predictor(self.input_proj(torch.cat((time_emb, pooled), dim=-1)))
        signal = self.output_proj(choose(features_BE, guess, mask_B))
        return torch.sigmoid(self.expert_gate) * signal, guess


def geometric_map(t_B: Tensor, size: int) -> Tensor:
    """Importance by distance from the centre: ``t + (1 - t) exp(-2 r)`` on [-1, 1]^2, [B, size, size] float32."""
    axis = torch.linspace(-1, 1, size, device=t_B.device, dtype=torch.float32)
    radius = torch.sqrt(axis[:, None].square() + axis[None, :].square())
    t = t_B.float().view(-1, 1, 1)
    return t + (1 - t) * torch.exp(-2 * radius)


class SolPrior(nn.Module):
    """Blend learned and geometric attention priors."""

    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__()
        self.size, self.heads = config.sol_spatial_size, config.num_attention_heads
        width, hidden = config.hidden_size + config.pooled_projection_dim, config.sol_hidden_dim

        def predictor(outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
            )

        self.stat_predictor = predictor(3)
        self.spatial_predictor = predictor(self.size * self.size)
        self.stat_to_temperature = nn.Sequential(
            nn.Linear(3, hidden // 2), nn.SiLU(), nn.Linear(hidden // 2, self.heads), nn.Softplus()
        )
        # Part of every published checkpoint, used by no forward pass: kept for its keys, never trained.
        self.spatial_to_qk_scale = nn.Linear(1, self.heads).requires_grad_(False)
        weight = min(max(config.sol_geometric_weight, 1e-4), 1 - 1e-4)
        self.blend_gate = nn.Parameter(torch.tensor(math.log(weight / (1 - weight))))

    def forward(
        self,
        time_emb: Tensor,
        pooled: Tensor,
        t_B: Tensor,
        stats_B3: Tensor | None,
        spatial_BSS: Tensor | None,
        mask_B: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return temperature [B, A], spatial_importance [B, S, S], pred_stats [B, 3], pred_spatial [B, S, S]."""
        features = torch.cat((time_emb, pooled), dim=-1)
        pred_stats = self.stat_predictor(features)
        pred_spatial = torch.sigmoid(self.spatial_predictor(features)).view(-1, self.size, self.size)
        stats = choose(stats_B3, pred_stats, mask_B)
        spatial = choose(spatial_BSS, pred_spatial, mask_B)

        learned = self.stat_to_temperature(stats.to(time_emb.dtype)).float()
        t = t_B.float()
        spread = torch.linspace(-0.2, 0.2, self.heads, device=t.device, dtype=torch.float32)
        geometric = (1 + t[:, None] + spread).clamp(0.5, 3.0)
        gate = torch.sigmoid(self.blend_gate.float())
        return {
            "temperature": gate * geometric + (1 - gate) * learned,
            "spatial_importance": gate * geometric_map(t, self.size) + (1 - gate) * spatial.float(),
            "pred_stats": pred_stats,
            "pred_spatial": pred_spatial,
        }


def upsample_map(map_BSS: Tensor, height: int, width: int) -> Tensor:
    """Importance map at latent resolution, flattened row by row: [B, 1, H*W] float32."""
    resized = F.interpolate(map_BSS.float()[:, None], size=(height, width), mode="bilinear", align_corners=False)
    return resized.flatten(2)


def modulation(to_mod: nn.Conv2d, map_B1N: Tensor) -> Tensor:
    """Factor on image queries and keys, [B, A, N, 1] float32: ``exp(clamp(weight_a * map + bias_a, -2, 2))``.

    The published layer is a 1x1 convolution from one channel; written out it stays float32 under autocast.
    """
    assert to_mod.bias is not None
    weight, bias = to_mod.weight.float().view(1, -1, 1), to_mod.bias.float().view(1, -1, 1)
    return (weight * map_B1N + bias).clamp(-MODULATION_LIMIT, MODULATION_LIMIT).exp().unsqueeze(-1)


def attention_temperature(temperature_BA: Tensor, per_head: bool = False) -> Tensor:
    """Temperature of the attention, at least 0.1, float32: one per sample [B, 1, 1, 1], or per head [B, A, 1, 1].

    The published model averages the heads away, so the per-head spread of `SolPrior` cancels.
    """
    temperature = temperature_BA if per_head else temperature_BA.mean(dim=1, keepdim=True)
    return temperature.clamp(min=MIN_TEMPERATURE)[:, :, None, None]
