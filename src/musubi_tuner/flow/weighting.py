"""Loss weights by noise level.

With the signal-to-noise ratio ``snr = (signal / noise fraction)^2 = (t / (1 - t))^2``, where t is the data
fraction, Hang et al. 2023 (arXiv:2303.09556) weigh a clean-image prediction by ``min(snr, gamma)`` and so an
epsilon prediction by ``min(snr, gamma) / snr``. Three forms are in use for a velocity prediction:

    published   min(snr, gamma) / snr          the released TinyFlux; vanishes towards clean images
    x0          min(snr, gamma) / snr          the same expression without the floors of the published code
    vpred       min(snr, gamma) / (snr + 1)    exact for v-prediction
"""

import torch
from torch import Tensor

MIN_SNR_FORMS = ("published", "x0", "vpred", "none")
_FLOOR = 1e-5


def min_snr_weight(t_B: Tensor, gamma: float = 5.0, form: str = "published") -> Tensor:
    """Weight of each sample's loss.

    Args:
        t_B: data fraction in [0, 1] (1 - sigma), [B].
        gamma: cap of the signal-to-noise ratio, > 0.
        form: one of `MIN_SNR_FORMS`.

    Returns:
        [B] float32.

    Raises:
        ValueError: for an unknown form.
    """
    t = t_B.float()
    if form == "none":
        return torch.ones_like(t)
    if form == "published":
        snr = (t / (1 - t).clamp(min=_FLOOR)).square()
        return snr.clamp(max=gamma) / snr.clamp(min=_FLOOR)
    snr = (t / (1 - t).clamp(min=torch.finfo(t.dtype).tiny)).square()
    if form == "x0":
        # min(snr, gamma) / snr written so that snr = 0 gives 1 and snr = infinity gives 0
        return torch.where(snr <= gamma, torch.ones_like(snr), gamma / snr)
    if form == "vpred":
        return torch.where(snr <= gamma, snr, torch.full_like(snr, gamma)) / (snr + 1)
    raise ValueError(f"unknown min-SNR form '{form}'; known: {', '.join(MIN_SNR_FORMS)}")


def ramp(step: int, warmup_steps: int, target: float) -> float:
    """Weight of an auxiliary loss: linear from 0 at step 0 to ``target`` at ``warmup_steps``, then constant."""
    return target * step / warmup_steps if step < warmup_steps else target
