"""What is trained: which losses move which weights from which data. The loop needs to know nothing else.

    Role     modules and how they move, see `role`
    Phase    one backward pass and the steps after it: the roles that it moves, and the losses of a micro-batch
    Task     roles, and phases in the order in which they run within an update

`FlowTask` is the task of every family with one denoiser. Everything optional has become data before its losses are computed (a
draw, a mask, a weight); everything that differs between families sits in `process`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.config.schema.objective import NoiseRecipe, ObjectiveSection
from musubi_tuner.data.batch import Batch
from musubi_tuner.data.plan import MicroBatch, Update
from musubi_tuner.flow import multires_noise, multires_sizes, noise_offset, perturb
from musubi_tuner.flow.noise import LARGEST_RATIO, SMALLEST_RATIO
from musubi_tuner.models.family import LossTerm, Process
from musubi_tuner.randomness import generator, normal, uniform
from musubi_tuner.training.role import Role


@dataclass
class Position:
    """How far a run is.

    Attributes:
        step: updates done.
        epoch: from 0.
        update: updates done in this epoch.
        images: samples seen.
        skipped: updates that were not finite.
        skipped_in_a_row: consecutive ones up to now.
    """

    step: int = 0
    epoch: int = 0
    update: int = 0
    images: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


class Phase(Protocol):
    """One backward pass and the steps after it."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def roles(self) -> Sequence[str]:
        """Names of the roles that it moves; no gradient is made for the others."""

    @property
    def exchange(self) -> nn.Module | None:
        """The model under data parallelism, which averages gradients during the backward pass; None if the roles
        average them after the phase."""

    def due(self, at: Position) -> bool:
        """Whether it runs in the update after ``at``."""

    def begin(self, at: Position) -> None:
        """Called once per update, before its first micro-batch and identically on all ranks: advances buffers that a forward
        pass would change (u and v of spectral norm), which then stand still."""

    def losses(self, batch: Batch, draws: Any, at: Position) -> dict[str, LossTerm]:
        """Named loss terms of a micro-batch, one float32 value per sample each."""

    def end(self, add_up: Callable[[Tensor], None]) -> None:
        """Called once per update, after its last backward pass and identically on all ranks: takes in what it measured.

        Args:
            add_up: replaces a tensor by its sum over all ranks.
        """


class Task(Protocol):
    """What a run trains."""

    @property
    def roles(self) -> Mapping[str, Role]:
        """By name."""

    @property
    def phases(self) -> Sequence[Phase]:
        """In the order of the algorithm."""

    @property
    def remembered(self) -> dict[str, float]:
        """What updates have measured and later ones use; part of the state, which restores it in place."""

    @property
    def reconstruct(self) -> Callable[[Tensor], Tensor] | None:
        """Gives pictures [B, 3, H, W] in [-1, 1] back as an autoencoder that trains makes them; None if none does."""

    def draws(self, batch: Batch, update: Update, index: int, at: Position) -> Any:
        """Random numbers of a micro-batch, keyed by what they are for.

        Args:
            index: of the micro-batch in the update.
        """


@dataclass
class NoiseOffset:
    """Noise offset of a micro-batch; see `flow.noise_offset`.

    Attributes:
        normals: [B, C]. strength, adaptive_scale: of this update.
    """

    normals: Tensor
    strength: float
    adaptive_scale: float

    def on(self, x0: Tensor) -> Tensor:
        """What is added to the noise of these latents, [B, C, 1, 1]."""
        return noise_offset(self.normals, x0, self.strength, self.adaptive_scale)


@dataclass
class Draws:
    """Random numbers of one micro-batch, one row per sample.

    Attributes:
        noise: standard normal in the shape of the latents, float32.
        time: what `Process.time` turns into times. uniforms: by purpose, [B].
        input_noise: what the model sees instead of ``noise``, if a noise recipe changes it.
        offset: noise offset, which depends on the latents too.
    """

    noise: Tensor
    time: Tensor
    uniforms: dict[str, Tensor]
    input_noise: Tensor | None = None
    offset: NoiseOffset | None = None

    def to(self, device: torch.device) -> "Draws":
        """The same draws on a device, without waiting for what it computes."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True) if device.type != "cpu" else tensor

        return Draws(
            move(self.noise),
            move(self.time),
            {name: move(u) for name, u in self.uniforms.items()},
            None if self.input_noise is None else move(self.input_noise),
            self.offset and replace(self.offset, normals=move(self.offset.normals)),
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
    recipe = objective if isinstance(objective, NoiseRecipe) else None
    if recipe is not None and recipe.multires_noise_iterations:
        rows = [_multires(one, recipe, seed, epoch, index) for one, index in zip(noise, keys)]
        noise = torch.stack(rows)
    offset = _offset(latent_shape[0], recipe, keys, seed, epoch, update)
    if strata is not None:
        time = strata
    elif process.time_draw == "normal":
        time = torch.stack([normal((), seed, "time", epoch, index) for index in keys])
    else:
        time = torch.tensor([uniform(seed, "time", epoch, index) for index in keys])
    uniforms = {name: torch.tensor([uniform(seed, name, epoch, index) for index in keys]) for name in process.uniforms}
    return Draws(noise, time, uniforms, _input_noise(noise, objective, keys, seed, epoch, update), offset)


def _multires(noise: Tensor, recipe: NoiseRecipe, seed: int, epoch: int, index: int) -> Tensor:
    """The noise of one presentation with coarser ones in it."""
    count, (channels, height, width) = recipe.multires_noise_iterations or 0, noise.shape
    span = LARGEST_RATIO - SMALLEST_RATIO
    ratios = [SMALLEST_RATIO + span * uniform(seed, "multires_ratio", epoch, index, level) for level in range(count)]
    levels = [
        normal((channels, *size), seed, "multires", epoch, index, level)
        for level, size in enumerate(multires_sizes(height, width, ratios))
    ]
    return multires_noise(noise, levels, recipe.multires_noise_discount)


def _offset(
    channels: int, recipe: NoiseRecipe | None, keys: tuple[int, ...], seed: int, epoch: int, update: int
) -> NoiseOffset | None:
    """Noise offset; None if there is none."""
    if recipe is None or not recipe.noise_offset:
        return None
    normals = torch.stack([normal((channels,), seed, "noise_offset", epoch, index) for index in keys])
    share = uniform(seed, "noise_offset_strength", update) if recipe.noise_offset_random_strength else 1.0
    return NoiseOffset(normals, recipe.noise_offset * share, recipe.adaptive_noise_scale or 0.0)


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


QUANTILE_MARGIN = 1e-7
"""Distance of probabilities from 0 and 1, whose normals are infinite."""


def stratified_draws(
    batches: tuple[MicroBatch, ...], seed: int, epoch: int, update: int, normal_times: bool = False
) -> list[Tensor]:
    """Draws of an update, one per equal slice of the density, dealt to its samples in a keyed random order.

    Args:
        normal_times: standard normal draws instead of uniform ones in [0, 1].
    """
    keys = [index for batch in batches for index in batch.presentations]
    slices = torch.randperm(len(keys), generator=generator(seed, "strata", update))
    inside = torch.tensor([uniform(seed, "time", epoch, index) for index in keys])
    values = (slices + inside) / len(keys)
    if normal_times:
        values = torch.special.ndtri(values.double().clamp(QUANTILE_MARGIN, 1 - QUANTILE_MARGIN)).float()
    return list(values.split([len(batch) for batch in batches]))


def losses_at(
    model: nn.Module, process: Process, batch: Batch, draws: Draws, time: Tensor, update: int
) -> dict[str, LossTerm]:
    """Forward one micro-batch at given times; its loss terms, one float32 value per sample each."""
    x0 = batch.tensors["latents"]
    noise, seen = draws.noise, draws.noise if draws.input_noise is None else draws.input_noise
    if draws.offset is not None:
        shift = draws.offset.on(x0)
        noise, seen = noise + shift, seen + shift
    noisy = process.add_noise(x0, seen, time)
    target = process.target(x0, noise, time)
    inputs = process.conditioning(batch, time, draws.uniforms)

    prediction, extra = process.predict(model, noisy, time, inputs)

    # Losses are float32: the autocast of the model ends here.
    with torch.autocast(x0.device.type, enabled=False):
        return process.losses(prediction.float(), target, time, inputs, extra, update)


def weighted_sum(terms: Mapping[str, LossTerm]) -> Tensor:
    """The loss of a micro-batch, summed over its samples."""
    return torch.stack([term.weight * term.per_sample_B.sum() for term in terms.values()]).sum()


class FlowPhase:
    """The one phase of a denoiser: predict what the process asks for, at random times.

    Args:
        model: under data parallelism, if there are several ranks.
        role: name of the role that moves.
        datasets: which may have a caption dropout of their own, or be regularisation sets.
        prior_loss_weight: factor of the loss of those.
    """

    name = "flow"

    def __init__(
        self, model: nn.Module, process: Process, role: str, datasets: Sequence[DatasetConfig] = (),
        prior_loss_weight: float = 1.0,
    ) -> None:  # fmt: skip
        self.model, self.process, self.roles = model, process, (role,)
        self.datasets, self.prior_loss_weight = datasets, prior_loss_weight
        self.exchange: nn.Module | None = model

    def due(self, at: Position) -> bool:
        """In every update."""
        return True

    def begin(self, at: Position) -> None:
        """Nothing: a denoiser has no buffers that move."""

    def end(self, add_up: Callable[[Tensor], None]) -> None:
        """Nothing: its losses do not depend on earlier updates."""

    def losses(self, batch: Batch, draws: Draws, at: Position) -> dict[str, LossTerm]:
        """The terms of the family; ``main`` with the noise level of every sample."""
        draws = self._dropped(draws, batch, at.epoch)
        time = self.process.time(draws.time, self.process.size(batch.tensors["latents"]), draws.uniforms)
        terms = losses_at(self.model, self.process, batch, draws, time, at.step)
        terms["main"].sigma_B = self.process.sigma(time).detach()
        if any(dataset.is_reg for dataset in self.datasets):
            factors = [self.prior_loss_weight if dataset.is_reg else 1.0 for dataset in self.datasets]
            weights = _by_sample(factors, batch)
            return {name: replace(term, per_sample_B=term.per_sample_B * weights) for name, term in terms.items()}
        return terms

    def _dropped(self, draws: Draws, batch: Batch, epoch: int) -> Draws:
        """Draws that decide the dropout of text as the data set of a sample says, where one says something."""
        coins, texts = draws.uniforms.get("text_dropout"), [dataset.text for dataset in self.datasets]
        if coins is None or not any(text.drops or text.caption_dropout_rate is not None for text in texts):
            return draws
        own = _by_sample([text.caption_dropout_rate is not None for text in texts], batch)
        rates = _by_sample([text.caption_dropout_rate or 0.0 for text in texts], batch)
        whole = _by_sample([text.is_dropped(epoch, 1.0) for text in texts], batch)
        decided = torch.where(own, 2.0, coins)  # above every share, or as the run says
        decided = torch.where(whole | (coins < rates), -1.0, decided)
        return replace(draws, uniforms={**draws.uniforms, "text_dropout": decided})


def _by_sample(values: Sequence[Any], batch: Batch) -> Tensor:
    """A value of each data set for the samples of a batch, without waiting for the device."""
    return torch.tensor(values).to(batch.dataset_ids.device, non_blocking=True)[batch.dataset_ids]


class FlowTask:
    """The task of every family with one denoiser: one role, one phase.

    Args:
        model: that predicts; ``role`` moves it, or the adapters on it.
        objective: its noise recipe and its times. seed: of the run.
        datasets, prior_loss_weight: see `FlowPhase`.
    """

    def __init__(
        self, model: nn.Module, process: Process, role: Role, objective: ObjectiveSection, seed: int,
        datasets: Sequence[DatasetConfig] = (), prior_loss_weight: float = 1.0,
    ) -> None:  # fmt: skip
        self.process, self.objective, self.seed = process, objective, seed
        self.reconstruct: Callable[[Tensor], Tensor] | None = None
        self.remembered: dict[str, float] = {}
        self._strata: tuple[Update | None, list[Tensor]] = (None, [])
        self.roles = {role.name: role}
        self.phases = [FlowPhase(model, process, role.name, datasets, prior_loss_weight)]

    def draws(self, batch: Batch, update: Update, index: int, at: Position) -> Draws:
        """Noise, times and the uniform draws of the family."""
        strata = None
        if self.objective.timestep_stratified:
            if self._strata[0] is not update:  # once for all its micro-batches
                self._strata = (
                    update,
                    stratified_draws(
                        update.micro_batches, self.seed, at.epoch, at.step, self.process.time_draw == "normal"
                    ),
                )
            strata = self._strata[1][index]
        shape = tuple(batch.tensors["latents"].shape[1:])
        planned = update.micro_batches[index]
        return make_draws(self.process, shape, planned, self.seed, at.epoch, strata, self.objective, at.step)
