"""Muon for matrices and AdamW for everything else, as one optimizer (torch.optim.Muon; Jordan et al. 2024)."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from musubi_tuner.errors import ConfigError


class MuonWithAdamW(Optimizer):
    """Two optimizers behind one list of groups and one state.

    With ``adjust_lr_fn = "match_rms_adamw"`` an update of a matrix is as large as one of AdamW, so both share the learning rate.

    Args:
        groups: with ``names`` beside ``params``; each is divided into its matrices and the rest.
        muon: further arguments of torch.optim.Muon.

    Raises:
        ConfigError: if torch has no Muon.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, **muon: Any
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(f'optimizer.type = "Muon" needs torch 2.9 or later, this is {torch.__version__}')
        matrices, rest = _parts(groups, matrices=True), _parts(groups, matrices=False)
        parts: list[Optimizer] = [torch.optim.Muon(matrices, lr=lr, **muon)] if matrices else []
        parts += [AdamW(rest, lr=lr, betas=betas, eps=eps)] if rest else []
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            part.state = self.state
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.parts = parts

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step with both."""
        for part in self.parts:
            part.step()


def _parts(groups: list[dict[str, Any]], *, matrices: bool) -> list[dict[str, Any]]:
    found = []
    for group in groups:
        chosen = [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if (p.ndim == 2) is matrices]
        if chosen:
            found.append({**group, "names": [name for name, _ in chosen], "params": [p for _, p in chosen]})
    return found
