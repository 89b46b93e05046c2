"""What FluxFlow trains, but for a flow alone: phases over live pictures or caches.

    discriminator   hinge loss on pictures and reconstructions, R1 every so many updates
    vae             reconstruction, KL, colour statistics, LPIPS, and to be taken for a picture
    flow            v of noisy latents: cached ones, or those of the autoencoder as it is now

Within an update the discriminator goes first. Its gradients reach the expander alone: the reconstruction for the adversarial
loss is decoded from latents without a history. Without the losses of the reconstruction the compressor feels it too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from musubi_tuner.flow import unpack_pixels
from musubi_tuner.models.family import LossTerm
from musubi_tuner.models.fluxflow import losses
from musubi_tuner.models.fluxflow.autoencoder import Compressor, Expander, sample_latents
from musubi_tuner.models.fluxflow.discriminator import PatchDiscriminator
from musubi_tuner.models.fluxflow.process import FluxFlowProcess
from musubi_tuner.models.fluxflow.settings import FluxFlowObjective
from musubi_tuner.models.fluxflow.system import FluxFlowSystem
from musubi_tuner.randomness import normal, uniform

if TYPE_CHECKING:
    from musubi_tuner.data.batch import Batch
    from musubi_tuner.data.plan import Update
    from musubi_tuner.training.role import Role
    from musubi_tuner.training.task import Position

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distance of reconstructions and pictures, [B]."""


@dataclass
class Draws:
    """Random numbers of a micro-batch.

    Attributes:
        latents: standard normal in the shape of the latents. pictures: noise on what the discriminator sees, for pictures and for
            reconstructions, [2, B, 3, H, W]; None = none.
        noise: standard normal in the shape of the latents; time, dropout: uniform, [B]; for the flow.
    """

    latents: Tensor
    pictures: Tensor | None
    noise: Tensor
    time: Tensor
    dropout: Tensor

    def to(self, device: torch.device) -> "Draws":
        """The same on a device."""
        moved = [None if part is None else part.to(device, non_blocking=True) for part in vars(self).values()]
        return Draws(*moved)  # type: ignore[arg-type]  # None stays None


class Autoencoder:
    """Compressor and expander as the phases use them.

    Args:
        use_context: the expander sees its latents at every scale.
    """

    def __init__(self, vae: nn.ModuleDict, use_context: bool) -> None:
        self.compressor: Compressor = vae["compressor"]  # type: ignore[assignment]
        self.expander: Expander = vae["expander"]  # type: ignore[assignment]
        self.use_context = use_context

    def encode(self, pixels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens as a map [B, D, h, w], mu and logvar."""
        mu, logvar, latent = self.compressor.encode(pixels)
        tokens = self.compressor.tokens(sample_latents(mu, logvar, eps), latent)
        return unpack_pixels(tokens, mu.shape[-2], mu.shape[-1]), mu, logvar

    def decode(self, tokens: Tensor, watch: Callable[[Tensor], None] | None = None) -> Tensor:
        """Pictures of a map of tokens.

        Args:
            watch: gets the gradient of the last layer's weight in this pass.
        """
        last = None
        if watch is not None:
            weight: Tensor = self.expander.to_rgb_conv[-1].weight  # type: ignore[assignment]  # of a convolution
            last = weight.view_as(weight)
            last.register_hook(watch)
        return self.expander.decode(tokens, self.use_context, last)


def context_of(tokens_BDhw: Tensor) -> Tensor:
    """What the discriminator knows of a picture: the mean of its tokens."""
    return tokens_BDhw.mean(dim=(2, 3))


class GradientBalance:
    """Weight of the adversarial loss by the gradients at the expander's last layer, |reconstruction| / |adversarial|, in the
    update before; 1 in the first.

    Gradients are those of the backward pass, summed over an update and all ranks; the norms are of these sums.

    Args:
        remembered: holds the weight, as `KEY`; see `Task`.
    """

    KEY = "gan_weight"
    MOST = 1e4

    def __init__(self, remembered: dict[str, float]) -> None:
        self.remembered = remembered
        remembered[self.KEY] = 1.0
        self._sums: dict[str, Tensor] = {}

    @property
    def weight(self) -> float:
        """In this update."""
        return self.remembered[self.KEY]

    def watch(self, loss: str) -> Callable[[Tensor], None]:
        """Adds gradients to the sum of a loss."""

        def add(gradient: Tensor) -> None:
            self._sums[loss] = self._sums[loss] + gradient if loss in self._sums else gradient.clone()

        return add

    def end(self, add_up: Callable[[Tensor], None], scale: float) -> None:
        """Find the weight of the next update.

        Args:
            scale: by which the adversarial loss was multiplied.
        """
        sums, self._sums = self._sums, {}
        if len(sums) < 2 or not scale:
            return
        norms = []
        for total in (sums["reconstruction"], sums["adversarial"]):
            total = total.float()
            add_up(total)
            norms.append(float(total.norm()))
        if all(math.isfinite(norm) for norm in norms):  # otherwise the update changes nothing
            self.remembered[self.KEY] = min(norms[0] * scale / norms[1], self.MOST) if norms[1] else self.MOST


class DiscriminatorPhase:
    """Tells pictures from reconstructions."""

    name, roles = "discriminator", ("discriminator",)
    exchange = None

    def __init__(self, vae: Autoencoder, judge: PatchDiscriminator, objective: FluxFlowObjective) -> None:
        self.vae, self.judge, self.objective = vae, judge, objective

    def due(self, at: "Position") -> bool:
        return at.step >= self.objective.gan_start

    def begin(self, at: "Position") -> None:
        self.judge.advance()

    def end(self, add_up: Callable[[Tensor], None]) -> None:
        """Nothing is measured."""

    def losses(self, batch: "Batch", draws: Draws, at: "Position") -> dict[str, LossTerm]:
        objective, real = self.objective, batch.tensors["pixels"]
        with torch.no_grad():
            tokens, _, _ = self.vae.encode(real, draws.latents)
            fake, context = self.vae.decode(tokens), context_of(tokens)
        if draws.pictures is not None:
            noise = objective.instance_noise_std * objective.instance_noise_decay**at.step * draws.pictures
            real, fake = real + noise[0], fake + noise[1]
        penalised = objective.r1_gamma > 0 and at.step % objective.r1_interval == 0
        if not penalised:
            return {
                "disc": LossTerm(losses.hinge_loss(self.judge(real, context)[0], self.judge(fake, context)[0]), 1.0)
            }
        # A gradient of a gradient loses too much in half precision.
        with torch.autocast(real.device.type, enabled=False):
            real, context = real.float().requires_grad_(), context.float()
            seen = self.judge(real, context)[0]
            penalty = losses.r1_penalty(seen, real)
        hinge = losses.hinge_loss(seen, self.judge(fake, context)[0])
        return {"disc": LossTerm(hinge, 1.0), "r1": LossTerm(penalty, objective.r1_gamma / 2)}


class VaePhase:
    """Trains the autoencoder.

    Args:
        judge: None without a discriminator. perceptual: LPIPS; None without. balance: None = lambda_adv is the weight.
    """

    name, roles = "vae", ("vae",)
    exchange = None

    def __init__(
        self,
        vae: Autoencoder,
        judge: PatchDiscriminator | None,
        objective: FluxFlowObjective,
        perceptual: Perceptual | None = None,
        balance: GradientBalance | None = None,
    ) -> None:
        self.vae, self.judge, self.objective, self.perceptual = vae, judge, objective, perceptual
        self.balance = balance

    def due(self, at: "Position") -> bool:
        return True

    def begin(self, at: "Position") -> None:
        """Nothing: no buffers of it move."""

    def losses(self, batch: "Batch", draws: Draws, at: "Position") -> dict[str, LossTerm]:
        objective, pixels = self.objective, batch.tensors["pixels"]
        tokens, mu, logvar = self.vae.encode(pixels, draws.latents)
        beta = losses.kl_beta(at.step, objective.kl_warmup_steps, objective.kl_beta)
        terms = {"kl": LossTerm(losses.kl(mu, logvar, objective.kl_free_bits, objective.kl_normalize), beta)}
        if objective.train_reconstruction:
            watch = self.balance.watch("reconstruction") if self.balance else None
            terms |= self._reconstruction(self.vae.decode(tokens, watch), pixels)
        if self.judge is not None and at.step >= objective.gan_start:
            # Beside a reconstruction only the expander learns from the discriminator.
            watch = self.balance.watch("adversarial") if self.balance else None
            seen = self.vae.decode(tokens.detach() if objective.train_reconstruction else tokens, watch)
            logits, _ = self.judge(seen, context_of(tokens).detach())
            terms["gen"] = LossTerm(losses.generator_loss(logits), self._adversarial())
        return terms

    def _adversarial(self) -> float:
        """Weight of the adversarial loss in this update."""
        return self.objective.lambda_adv * (self.balance.weight if self.balance else 1.0)

    def end(self, add_up: Callable[[Tensor], None]) -> None:
        if self.balance:
            self.balance.end(add_up, self._adversarial())

    def _reconstruction(self, image: Tensor, pixels: Tensor) -> dict[str, LossTerm]:
        """The losses of a reconstruction, without those of weight 0."""
        objective = self.objective
        fine = losses.reconstruction(image, pixels, alpha=objective.frequency_alpha, mse_weight=objective.mse_weight)
        found = {"recon": LossTerm(fine, 1.0)}
        for name, loss, weight in (
            ("color", losses.color_stats, objective.color_weight),
            ("hist", losses.histogram, objective.histogram_weight),
            ("contrast", losses.contrast, objective.contrast_weight),
        ):
            if weight:
                found[name] = LossTerm(loss(image, pixels), weight)
        if self.perceptual is not None:
            found["lpips"] = LossTerm(self.perceptual(image, pixels), objective.lambda_lpips)
        return found


class FlowPhase:
    """Trains the flow processor, and with it the text encoder where that is one of the roles.

    Args:
        model: the whole system. vae: whose latents are learned, where pictures are read; None = cached latents.
    """

    name, exchange = "flow", None

    def __init__(
        self, model: FluxFlowSystem, process: FluxFlowProcess, roles: tuple[str, ...], vae: Autoencoder | None
    ) -> None:
        self.model, self.process, self.roles, self.vae = model, process, roles, vae

    def due(self, at: "Position") -> bool:
        return True

    def begin(self, at: "Position") -> None:
        """Nothing: no buffers of it move."""

    def end(self, add_up: Callable[[Tensor], None]) -> None:
        """Nothing is measured."""

    def losses(self, batch: "Batch", draws: Draws, at: "Position") -> dict[str, LossTerm]:
        x0 = self._latents(batch)
        time = self.process.time(draws.time, (), {})
        noisy, target = self.process.add_noise(x0, draws.noise, time), self.process.target(x0, draws.noise, time)
        inputs = self.process.conditioning(batch, time, {"text_dropout": draws.dropout})
        prediction, extra = self.process.predict(self.model, noisy, time, inputs)
        with torch.autocast(x0.device.type, enabled=False):
            term = self.process.losses(prediction.float(), target, time, inputs, extra, at.step)["main"]
        return {"flow": LossTerm(term.per_sample_B, 1.0, self.process.sigma(time).detach())}

    def _latents(self, batch: "Batch") -> Tensor:
        if self.vae is None:
            return batch.tensors["latents"]
        with torch.no_grad():
            mu, _, latent = self.vae.compressor.encode(batch.tensors["pixels"])
            if self.model.config.latent_space == "mu":
                return mu.float()
            return unpack_pixels(self.vae.compressor.tokens(mu, latent), mu.shape[-2], mu.shape[-1]).float()


class FluxFlowTask:
    """The task of a run that trains more than the flow processor.

    Args:
        model: with the parts of all roles. roles: that move. perceptual: LPIPS; None without.
    """

    def __init__(
        self,
        model: FluxFlowSystem,
        roles: tuple[str, ...],
        make_role: "Callable[[str, nn.Module], Role]",
        objective: FluxFlowObjective,
        process: FluxFlowProcess,
        seed: int,
        perceptual: Perceptual | None = None,
    ) -> None:
        self.seed, self.objective, self.config = seed, objective, model.config
        self.remembered: dict[str, float] = {}
        self.roles = {name: make_role(name, getattr(model, name)) for name in roles}
        self.vae = Autoencoder(model.vae, objective.train_spade) if objective.train_vae else None
        self.phases: list[DiscriminatorPhase | VaePhase | FlowPhase] = []
        if self.vae is not None:
            judge: Any = model.discriminator if "discriminator" in roles else None
            critic = [] if judge is None else [DiscriminatorPhase(self.vae, judge, objective)]
            balance = None
            if objective.gan_balance == "gradient" and judge is not None and objective.train_reconstruction:
                balance = GradientBalance(self.remembered)
            self.phases = [*critic, VaePhase(self.vae, judge, objective, perceptual, balance)]
        flow = tuple(name for name in ("flow", "text_encoder") if name in roles)
        if flow:
            self.phases.append(FlowPhase(model, process, flow, self.vae))

    def draws(self, batch: "Batch", update: "Update", index: int, at: "Position") -> Draws:
        """See `Task`."""
        keys = update.micro_batches[index].presentations
        height = width = 0
        if "pixels" in batch.tensors:
            height, width = batch.tensors["pixels"].shape[-2:]
            shape: tuple[int, ...] = (self.config.vae_dim, height // self.config.factor, width // self.config.factor)
        else:
            shape = tuple(batch.tensors["latents"].shape[1:])

        def of(purpose: str, shape: tuple[int, ...]) -> Tensor:
            return torch.stack([normal(shape, self.seed, purpose, at.epoch, key) for key in keys])

        def chance(purpose: str) -> Tensor:
            return torch.tensor([uniform(self.seed, purpose, at.epoch, key) for key in keys])

        pictures = None
        if self.objective.gan_training and self.objective.instance_noise_std and at.step >= self.objective.gan_start:
            pictures = torch.stack([of(f"{kind} pictures", (3, height, width)) for kind in ("real", "decoded")])
        return Draws(of("latents", shape), pictures, of("noise", shape), chance("time"), chance("text_dropout"))

    @property
    def reconstruct(self) -> Callable[[Tensor], Tensor] | None:
        """Pictures [B, 3, H, W] as the autoencoder gives them back, without noise; None where none trains."""
        vae = self.vae
        if vae is None:
            return None

        @torch.no_grad()
        def through(pixels: Tensor) -> Tensor:
            mu, _, latent = vae.compressor.encode(pixels)
            return vae.decode(unpack_pixels(vae.compressor.tokens(mu, latent), mu.shape[-2], mu.shape[-1]))

        return through
