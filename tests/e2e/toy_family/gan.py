"""A second task of the toy family: an autoencoder against a discriminator with spectral norm, on live pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from musubi_tuner.data.batch import Batch
from musubi_tuner.data.plan import Update
from musubi_tuner.models.family import LossTerm
from musubi_tuner.randomness import normal
from musubi_tuner.training.role import Role
from musubi_tuner.training.task import Position

LATENT = 4


def autoencoder(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({
        "encode": nn.Sequential(nn.Conv2d(3, width, 8, 8), nn.Tanh(), nn.Conv2d(width, LATENT, 1)),
        "decode": nn.Sequential(nn.Conv2d(LATENT, width, 1), nn.Tanh(), nn.ConvTranspose2d(width, 3, 8, 8)),
    })  # fmt: skip


def discriminator(width: int) -> nn.Sequential:
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, width, 8, 8)), nn.LeakyReLU(0.2), spectral_norm(nn.Conv2d(width, 1, 1))
    )


@dataclass
class Draws:
    noise: Tensor

    def to(self, device: torch.device) -> "Draws":
        return Draws(self.noise.to(device))


class GanPhase:
    """What both phases have: the parts, and spectral norms that move at the beginning."""

    exchange = None

    def __init__(self, vae: nn.ModuleDict, judge: nn.Module) -> None:
        self.vae, self.judge = vae, judge

    def due(self, at: Position) -> bool:
        return True

    def begin(self, at: Position) -> None:
        advance(self.judge)

    def end(self, add_up: Callable[[Tensor], None]) -> None:
        pass


class Critic(GanPhase):
    """The discriminator tells pictures from decoded ones."""

    name, roles = "discriminator", ("discriminator",)

    def losses(self, batch: Batch, draws: Draws, at: Position) -> dict[str, LossTerm]:
        real = batch.tensors["pixels"]
        with torch.no_grad():
            fake = reconstruct(self.vae, real, draws)
        scores = [self.judge(picture).flatten(1).mean(1) for picture in (real, fake)]
        return {"critic": LossTerm(F.relu(1 - scores[0]) + F.relu(1 + scores[1]), 1.0)}


class Autoencode(GanPhase):
    """The autoencoder learns to reconstruct, and to be taken for a picture."""

    name, roles = "autoencoder", ("vae",)

    def losses(self, batch: Batch, draws: Draws, at: Position) -> dict[str, LossTerm]:
        real = batch.tensors["pixels"]
        fake = reconstruct(self.vae, real, draws)
        recon = (fake - real).abs().flatten(1).mean(1)
        return {"recon": LossTerm(recon, 1.0), "taken": LossTerm(-self.judge(fake).flatten(1).mean(1), 0.1)}


def reconstruct(vae: nn.ModuleDict, pixels: Tensor, draws: Draws) -> Tensor:
    latents = vae["encode"](pixels)
    return vae["decode"](latents + 0.1 * draws.noise[..., : latents.shape[2], : latents.shape[3]])


def advance(module: nn.Module) -> None:
    """Move u and v of spectral norms by one iteration; then they stand still."""
    with torch.no_grad():
        for part in module.modules():
            if is_parametrized(part, "weight"):
                part.parametrizations.train()
                _ = part.weight
                part.parametrizations.eval()


class GanTask:
    """Discriminator first, then the autoencoder against it."""

    reconstruct = None

    def __init__(self, model: nn.ModuleDict, make_role: Callable[[str, nn.Module], Role], seed: int) -> None:
        self.remembered: dict[str, float] = {}
        self.seed = seed
        self.roles = {name: make_role(name, model[name]) for name in ("vae", "discriminator")}
        parts: Any = (model["vae"], model["discriminator"])
        self.phases = [Critic(*parts), Autoencode(*parts)]

    def draws(self, batch: Batch, update: Update, index: int, at: Position) -> Draws:
        keys = update.micro_batches[index].presentations
        return Draws(torch.stack([normal((LATENT, 32, 32), self.seed, "noise", at.epoch, key) for key in keys]))
