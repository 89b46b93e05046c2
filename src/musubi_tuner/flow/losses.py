"""Element-wise losses and the weights laid over them. Everything is computed and returned in float32."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DISTILLATION_MODES = ("cosine", "huber", "soft", "hard", "mse")


def huber_loss(prediction: Tensor, target: Tensor, delta: float | Tensor = 0.1) -> Tensor:
    """Element-wise Huber loss ``0.5 q^2 + delta (a - q)`` with ``a = |prediction - target|``, ``q = min(a, delta)``."""
    distance = (prediction.float() - target.float()).abs()
    capped = distance.clamp(max=delta)
    return 0.5 * capped.square() + delta * (distance - capped)


HUBER_SCHEDULES = ("constant", "exponential", "snr")


def huber_threshold(sigma_B: Tensor, threshold: float, schedule: str, scale: float = 1.0) -> Tensor:
    """Threshold of the Huber losses at a noise level (Khrapov 2023), times ``scale``.

    ``constant`` the threshold; ``exponential`` threshold ** sigma, from 1 at the image to the threshold at the noise; ``snr``
    ``(1 - threshold) (1 - sigma)^2 + threshold``, the same ends by the signal-to-noise ratio of a flow.

    Args:
        sigma_B: noise fraction in [0, 1], [B].

    Returns:
        [B], float32.

    Raises:
        ValueError: for an unknown schedule.
    """
    sigma = sigma_B.float()
    if schedule == "constant":
        return torch.full_like(sigma, threshold * scale)
    if schedule == "exponential":
        return threshold**sigma * scale
    if schedule == "snr":
        return ((1 - threshold) * (1 - sigma).square() + threshold) * scale
    raise ValueError(f"unknown Huber schedule '{schedule}'; known: {', '.join(HUBER_SCHEDULES)}")


LOSSES = ("l2", "l1", "huber", "smooth_l1", "pseudo_huber", "pseudo_smooth_l1")


def element_loss(prediction: Tensor, target: Tensor, kind: str, threshold_B: Tensor) -> Tensor:
    """Element-wise loss, [B, ...] float32.

    With d the difference and c the threshold: ``l2`` d^2; ``l1`` |d|; ``huber`` d^2/2 below c, then linear; ``smooth_l1`` that
    divided by c; ``pseudo_huber`` 2c (sqrt(d^2 + c^2) - c) and ``pseudo_smooth_l1`` 2 (sqrt(d^2 + c^2) - c), what sd-scripts calls
    huber and smooth_l1.

    Args:
        prediction, target: [B, ...]. kind: one of `LOSSES`. threshold_B: of the Huber losses, above 0.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind == "l2":
        return squared_error(prediction, target)
    distance = (prediction.float() - target.float()).abs()
    if kind == "l1":
        return distance
    threshold = threshold_B.view(-1, *[1] * (prediction.ndim - 1))
    if kind in ("huber", "smooth_l1"):
        loss = huber_loss(prediction, target, threshold)
        return loss if kind == "huber" else loss / threshold
    if kind in ("pseudo_huber", "pseudo_smooth_l1"):
        loss = 2 * ((distance.square() + threshold.square()).sqrt() - threshold)
        return loss * threshold if kind == "pseudo_huber" else loss
    raise ValueError(f"unknown loss '{kind}'; known: {', '.join(LOSSES)}")


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Element-wise squared error."""
    return (prediction.float() - target.float()).square()


def spatial_weight(map_BSS: Tensor, height: int, width: int) -> Tensor:
    """Resize an importance map to the latent grid and divide it by its own mean.

    Args:
        map_BSS: [B, S, S], non-negative.
        height, width: latent size.

    Returns:
        [B, height, width], mean about 1 per sample.
    """
    resized = F.interpolate(map_BSS.float()[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
    return resized / (resized.mean(dim=(1, 2), keepdim=True) + 1e-6)


def mask_weight(mask_BHW: Tensor, foreground: float = 2.0, background: float = 0.5) -> Tensor:
    """Weight of each latent pixel from a soft mask in [0, 1]: ``mask * foreground + (1 - mask) * background``."""
    mask = mask_BHW.float()
    return mask * foreground + (1 - mask) * background


@dataclass(frozen=True)
class MaskSettings:
    """How loss masks weigh: see `mask_weight`; ``normalize`` divides the weights of a sample by their mean."""

    foreground: float
    background: float
    normalize: bool = False

    def weights(self, mask_BHW: Tensor, valid_B: Tensor) -> Tensor:
        """Weight of each latent pixel [B, H, W]; samples without a mask (``valid_B`` false) weigh 1 everywhere."""
        weights = mask_weight(mask_BHW, self.foreground, self.background)
        if self.normalize:
            weights = weights / (weights.mean(dim=(1, 2), keepdim=True) + 1e-6)
        return torch.where(valid_B.view(-1, 1, 1), weights, torch.ones_like(weights))


def distillation_loss(prediction_BE: Tensor, target_BE: Tensor, mode: str = "cosine", delta: float = 0.1) -> Tensor:
    """Distance of predicted teacher features from the real ones, one value per sample.

    Args:
        prediction_BE, target_BE: [B, E].
        mode: ``cosine`` 1 - cosine similarity; ``huber`` mean Huber loss; ``soft`` mean squared error / 100;
            ``hard`` (or ``mse``) mean squared error.
        delta: Huber threshold.

    Returns:
        [B] float32.

    Raises:
        ValueError: for an unknown mode.
    """
    prediction, target = prediction_BE.float(), target_BE.float()
    if mode == "cosine":
        return 1 - (F.normalize(prediction, dim=-1, eps=1e-12) * F.normalize(target, dim=-1, eps=1e-12)).sum(-1)
    if mode == "huber":
        return huber_loss(prediction, target, delta).mean(-1)
    if mode == "soft":
        return squared_error(prediction, target).mean(-1) / 100
    if mode in ("hard", "mse"):
        return squared_error(prediction, target).mean(-1)
    raise ValueError(f"unknown distillation mode '{mode}'; known: {', '.join(DISTILLATION_MODES)}")


def drop_conditioning(conditioning: Tensor, keep_B: Tensor) -> Tensor:
    """Zero the rows of a conditioning tensor [B, ...] whose ``keep_B`` is false, keeping its dtype."""
    keep = keep_B.to(conditioning.device).view(-1, *[1] * (conditioning.ndim - 1))
    return torch.where(keep, conditioning, torch.zeros((), dtype=conditioning.dtype, device=conditioning.device))
