"""The training step: one for all families.

Everything optional has become data before this point (a draw, a mask, a weight); everything that differs between
families sits in `process`. The step returns sums over samples: the caller divides by the samples of the whole update, so
that any split into processes and accumulation gives the same gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musubi_tuner.config.schema import ObjectiveSection
from musubi_tuner.data.dataset import Batch
from musubi_tuner.data.plan import MicroBatch
from musubi_tuner.flow import perturb
from musubi_tuner.models.spec import LossTerm, Process
from musubi_tuner.randomness import normal, uniform


@dataclass
class Draws:
    """Random numbers of one micro-batch, one row per sample.

    Attributes:
        noise: standard normal in the shape of the latents, float32.
        time: what `Process.time` turns into times. uniforms: by purpose, [B].
        input_noise: what the model sees instead of ``noise``, if a noise recipe changes it.
    """

    noise: Tensor
    time: Tensor
    uniforms: dict[str, Tensor]
    input_noise: Tensor | None = None

    def to(self, device: torch.device) -> "Draws":
        """The same draws on a device, without waiting for what it computes."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True) if device.type != "cpu" else tensor

        return Draws(
            move(self.noise),
            move(self.time),
            {name: move(u) for name, u in self.uniforms.items()},
            None if self.input_noise is None else move(self.input_noise),
        )


def make_draws(
    process: Process,
    latent_shape: tuple[int, ...],
    batch: MicroBatch,
    seed: int,
    epoch: int,
    strata: Tensor | None = None,
    objective: ObjectiveSection | None = None,
    update: int = 0,
) -> Draws:
    """Draws keyed by (seed, purpose, epoch, presentation), whoever asks for them.

    Args:
        latent_shape: of one sample.
        strata: replaces the uniform time draws, for stratified times.
        objective: its noise recipe; absent = none. update: keys what is drawn once per update.
    """
    keys = batch.presentations
    noise = torch.stack([normal(latent_shape, seed, "noise", epoch, index) for index in keys])
    if strata is not None:
        time = strata
    elif process.time_draw == "normal":
        time = torch.stack([normal((), seed, "time", epoch, index) for index in keys])
    else:
        time = torch.tensor([uniform(seed, "time", epoch, index) for index in keys])
    uniforms = {name: torch.tensor([uniform(seed, name, epoch, index) for index in keys]) for name in process.uniforms}
    return Draws(noise, time, uniforms, _input_noise(noise, objective, keys, seed, epoch, update))


def _input_noise(
    noise: Tensor, objective: ObjectiveSection | None, keys: tuple[int, ...], seed: int, epoch: int, update: int
) -> Tensor | None:
    """Noise after the recipe of [objective]; None if there is none."""
    if objective is None or not objective.ip_noise_gamma:
        return None
    extra = torch.stack([normal(tuple(noise.shape[1:]), seed, "ip_noise", epoch, index) for index in keys])
    if not objective.ip_noise_gamma_random_strength:
        return perturb(noise, extra, objective.ip_noise_gamma)
    if objective.ip_noise_per_sample:
        shares = torch.tensor([uniform(seed, "ip_noise_strength", epoch, index) for index in keys])
        return perturb(noise, extra, objective.ip_noise_gamma * shares)
    return perturb(noise, extra, objective.ip_noise_gamma * uniform(seed, "ip_noise_strength", update))


def stratified_draws(batches: tuple[MicroBatch, ...], seed: int, epoch: int, update: int) -> list[Tensor]:
    """Uniform draws of an update, one per equal slice of [0, 1], dealt to its samples in a keyed random order."""
    keys = [index for batch in batches for index in batch.presentations]
    from musubi_tuner.randomness import generator

    slices = torch.randperm(len(keys), generator=generator(seed, "strata", update))
    inside = torch.tensor([uniform(seed, "time", epoch, index) for index in keys])
    values = (slices + inside) / len(keys)
    return list(values.split([len(batch) for batch in batches]))


@dataclass
class StepOutput:
    """What a micro-batch gives.

    Attributes:
        loss: weighted sum of all terms over the samples; its backward is the caller's.
        terms: unweighted sum over the samples by name, detached. time: the family's times, [B].
        main: the main term of each sample, [B], detached.
        weights: factor of every term but the main one.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    time: Tensor
    main: Tensor
    weights: dict[str, float]


def training_step(model: nn.Module, process: Process, batch: Batch, draws: Draws, update: int) -> StepOutput:
    """Forward one micro-batch and sum its losses over the samples.

    Args:
        update: number of optimizer steps done, for losses that warm up.
    """
    x0 = batch.latents
    time = process.time(draws.time, (x0.shape[-2], x0.shape[-1]), draws.uniforms)
    terms = losses_at(model, process, batch, draws, time, update)
    loss = torch.stack([term.weight * term.per_sample_B.sum() for term in terms.values()]).sum()
    sums = {name: term.per_sample_B.detach().sum() for name, term in terms.items()}
    weights = {name: term.weight for name, term in terms.items() if name != "main"}
    main = terms["main"].per_sample_B.detach()
    return StepOutput(loss, {**sums, "total": loss.detach()}, time.detach(), main, weights)


def losses_at(
    model: nn.Module, process: Process, batch: Batch, draws: Draws, time: Tensor, update: int
) -> dict[str, LossTerm]:
    """Forward one micro-batch at given times; its loss terms, one float32 value per sample each."""
    x0 = batch.latents
    noisy = process.add_noise(x0, draws.noise if draws.input_noise is None else draws.input_noise, time)
    target = process.target(x0, draws.noise)
    inputs = process.conditioning(batch, time, draws.uniforms)

    prediction, extra = process.predict(model, noisy, time, inputs)

    # Losses are float32: the autocast of the model ends here.
    with torch.autocast(x0.device.type, enabled=False):
        return process.losses(prediction.float(), target, time, inputs, extra, update)
