"""Losses of FluxFlow, one float32 value per sample [B] unless said otherwise.

Colour statistics take ``over``: ``sample`` compares every image with its own original, so that accumulation and processes change
nothing; ``batch`` is the published form, over the images of a batch together, and returns a scalar.

Shape letters: B batch, C channels, H/W height and width.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 64
Over = Literal["sample", "batch"]


def mean_of(values: Tensor) -> Tensor:
    """Mean over all axes but the first, [B]."""
    return values.flatten(1).mean(dim=1)


def mse(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error."""
    return mean_of((pred.float() - target.float()).square())


def frequency_l1(pred_BCHW: Tensor, target_BCHW: Tensor, alpha: float = 0.5) -> Tensor:
    """L1 of the blurred images plus ``alpha`` times L1 of what the blur takes away; the blur is a 3 x 3 mean with zeros outside."""
    difference = pred_BCHW.float() - target_BCHW.float()
    low = F.avg_pool2d(difference, 3, stride=1, padding=1)
    return mean_of(low.abs()) + alpha * mean_of((difference - low).abs())


def reconstruction(pred: Tensor, target: Tensor, *, alpha: float = 0.5, mse_weight: float = 0.1) -> Tensor:
    """`frequency_l1` plus the weighted `mse`; LPIPS is a term of its own."""
    return frequency_l1(pred, target, alpha) + mse_weight * mse(pred, target)


def kl(mu: Tensor, logvar: Tensor, free_bits: float = 0.0, normalize: bool = True) -> Tensor:
    """KL divergence from a standard normal.

    Args:
        free_bits: least value of every element; 0 = none. normalize: mean over elements; else the older sum.
    """
    mu, logvar = mu.float(), logvar.float()
    elements = -0.5 * (1 + logvar - mu.square() - logvar.exp())
    if free_bits > 0:
        elements = elements.clamp(min=free_bits)
    return mean_of(elements) if normalize else elements.flatten(1).sum(dim=1)


def kl_beta(step: int, warmup: int, beta_max: float) -> float:
    """Weight of the KL term: half a cosine from 0 to ``beta_max`` over the first ``warmup`` steps."""
    if warmup <= 0:
        return beta_max
    return beta_max * (1 - math.cos(math.pi * min(step / warmup, 1.0))) / 2


def _by_channel(image_BCHW: Tensor, over: Over) -> Tensor:
    """Values by channel, [B, C, N] or [C, N]."""
    flat = image_BCHW.float().flatten(2)
    return flat if over == "sample" else flat.transpose(0, 1).flatten(1)


def color_stats(pred_BCHW: Tensor, target_BCHW: Tensor, over: Over = "sample") -> Tensor:
    """Squared differences of the mean and the standard deviation of every channel, averaged over channels."""
    pred, target = _by_channel(pred_BCHW, over), _by_channel(target_BCHW, over)
    means = (pred.mean(dim=-1) - target.mean(dim=-1)).square()
    return (means + (pred.std(dim=-1) - target.std(dim=-1)).square()).mean(dim=-1)


FLAT = 0.1
"""Spread below which a channel of one image counts as flat."""


def contrast(pred_BCHW: Tensor, target_BCHW: Tensor, over: Over = "sample") -> Tensor:
    """Squared relative differences of the channels' standard deviations, and the squared difference of those of whole images.

    One image may have a channel of one value, by whose spread nothing can be divided: per sample it is at least `FLAT`.
    """
    pred, target = _by_channel(pred_BCHW, over), _by_channel(target_BCHW, over)
    spread, wanted = pred.std(dim=-1), target.std(dim=-1)
    relative = (spread - wanted) / wanted.clamp(min=FLAT) if over == "sample" else spread / (wanted + 1e-8) - 1
    whole = (pred_BCHW.float().flatten(1).std(dim=1) - target_BCHW.float().flatten(1).std(dim=1)).square()
    return (relative.square().sum(dim=-1) + (whole if over == "sample" else whole.mean())) / 4


def histogram(pred_BCHW: Tensor, target_BCHW: Tensor, over: Over = "sample", soft: bool = True) -> Tensor:
    """Mean distance of the channels' cumulative histograms over [-1, 1].

    Args:
        soft: every value counts in the two bins next to it, which gives it a gradient; hard bins, the published form, have none.
    """
    pred, target = _by_channel(pred_BCHW, over), _by_channel(target_BCHW, over)
    cumulative = _soft_histogram if soft else _hard_histogram
    return (cumulative(pred) - cumulative(target)).abs().mean(dim=(-1, -2))


def _soft_histogram(values: Tensor) -> Tensor:
    place = ((values + 1) * (BINS / 2) - 0.5).clamp(0, BINS - 1)
    low = place.detach().floor().clamp(max=BINS - 2)
    share = place - low
    counts = values.new_zeros(*values.shape[:-1], BINS)
    counts = counts.scatter_add(-1, low.long(), 1 - share).scatter_add(-1, low.long() + 1, share)
    return counts.cumsum(dim=-1) / values.shape[-1]


def _hard_histogram(values: Tensor) -> Tensor:
    inside = (values >= -1) & (values <= 1)
    place = ((values + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    counts = values.new_zeros(*values.shape[:-1], BINS).scatter_add(-1, place, inside.float())
    return counts.cumsum(dim=-1) / counts.sum(dim=-1, keepdim=True)


def patch_mean(logits_B1hw: Tensor) -> Tensor:
    """Mean over patches, [B]."""
    return mean_of(logits_B1hw.float())


def generator_loss(logits_B1hw: Tensor) -> Tensor:
    """``-logit`` of decoded images."""
    return -patch_mean(logits_B1hw)


def hinge_loss(real_B1hw: Tensor, fake_B1hw: Tensor) -> Tensor:
    """The discriminator's hinge loss."""
    return F.relu(1 - patch_mean(real_B1hw)) + F.relu(1 + patch_mean(fake_B1hw))


def r1_penalty(logits_B1hw: Tensor, images_BCHW: Tensor) -> Tensor:
    """Squared norm of the gradient of the logits by real images (Mescheder et al. 2018, arXiv:1801.04406), to be weighted by gamma / 2.

    Args:
        images_BCHW: with ``requires_grad``, from which the logits were computed.
    """
    (gradient,) = torch.autograd.grad(patch_mean(logits_B1hw).sum(), images_BCHW, create_graph=True)
    return gradient.float().square().flatten(1).sum(dim=1)


def mmd(z: Tensor, prior: Tensor) -> Tensor:
    """Maximum mean discrepancy with the kernel ``exp(-mean squared distance / 2)``, a scalar; a measure, not trained."""
    z, prior = z.float().flatten(1), prior.float().flatten(1)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-0.5 * (a[:, None] - b[None]).square().mean(dim=-1)).mean()

    return kernel(z, z) + kernel(prior, prior) - 2 * kernel(z, prior)
