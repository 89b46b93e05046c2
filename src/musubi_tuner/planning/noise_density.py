"""How often a run trains each noise level: what its settings of timesteps come to, as shares of equal parts of 0 to 1."""

import torch

from musubi_tuner.config import RunConfig
from musubi_tuner.flow.noise_levels import normal_quantile

DRAWS = 1 << 15
"""Draws that are counted, evenly spread."""
PARTS = 50


def noise_density(config: RunConfig, bucket: tuple[int, int], parts: int = PARTS) -> list[float]:
    """Shares of the noise levels that are drawn, by the process of the run itself.

    Args:
        bucket: width and height of the pictures, on which the times of some families depend.
        parts: of equal width from 0 (picture) to 1 (noise).

    Returns:
        One share per part; they sum to 1.
    """
    family = config.spec.family
    process = family.make_process(config, family.outline_model(config).options)
    u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    draws = (normal_quantile(u) if process.time_draw == "normal" else u).float()
    generator = torch.Generator().manual_seed(0)
    uniforms = {name: torch.rand(DRAWS, generator=generator) for name in process.uniforms}
    latents = torch.empty(1, *config.latents.shape(*bucket), device="meta")
    levels = process.sigma(process.time(draws, process.size(latents), uniforms))
    counts = torch.histc(levels.float().clamp(0, 1), bins=parts, min=0, max=1)
    return [float(share) for share in counts / DRAWS]
