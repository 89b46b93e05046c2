"""FluxFlow's process: discrete diffusion with v-prediction, the only place that knows what its time means.

    noisy = sqrt(a) x0 + sqrt(1 - a) noise        target = sqrt(a) noise - sqrt(1 - a) x0        a = alphas[index]

Time t in [0, 1) stands for index floor(1000 t), from the picture to noise. For logs and statistics the noise fraction is that of a flow
with the same signal-to-noise ratio, sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)). Latents of ``latent_space = "mu"`` are normalised per channel on
the way in, and back on the way out.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from musubi_tuner.device import to_model
from musubi_tuner.errors import ConfigError
from musubi_tuner.flow import MaskSettings, diffusion, min_snr_weight, squared_error, v_target, vp_interpolate
from musubi_tuner.models.family import LossTerm
from musubi_tuner.models.fluxflow.settings import FluxFlowObjective

if TYPE_CHECKING:
    from musubi_tuner.data.batch import Batch

TEXTS = ("bert_mean", "bert_states", "bert_ids", "bert_mask")
"""Names of cached texts: what the language model makes of them, or their tokens where it trains."""


class FluxFlowProcess:
    """The process of a run.

    Args:
        objective: times, weights and dropout. mean, spread: of the latents per channel; None = they are taken as they are.
        masks: how loss masks weigh; None = they do not.
    """

    uniforms: tuple[str, ...] = ("text_dropout",)
    time_draw = "uniform"

    def __init__(
        self,
        objective: FluxFlowObjective,
        mean: Sequence[float] | None = None,
        spread: Sequence[float] | None = None,
        masks: MaskSettings | None = None,
    ) -> None:
        self.objective, self.masks = objective, masks
        betas = (objective.beta_start, objective.beta_end)
        self.alphas = diffusion.linear_alphas(
            *betas, scaled=objective.beta_schedule == "scaled_linear", zero_terminal=objective.zero_terminal_snr
        )
        self.powers: list[float] = self.alphas.tolist()
        self.prior = diffusion.cosine_time_prior() if objective.timestep_sampling == "cosine_weighted" else None
        self.mean = None if mean is None else torch.tensor(mean).view(-1, 1, 1)
        self.spread = None if spread is None else torch.tensor(spread).view(-1, 1, 1)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents [B, D, h, w] as the model sees them."""
        if self.mean is None or self.spread is None:
            return latents
        return (latents - self.mean.to(latents.device)) / self.spread.to(latents.device)

    def size(self, x0: Tensor) -> tuple[int, ...]:
        """Nothing: times do not depend on the size."""
        return ()

    def index(self, time_B: Tensor) -> Tensor:
        """Times as indices 0..999, int64."""
        return (time_B.float() * diffusion.NUM_TIMES).long().clamp(0, diffusion.NUM_TIMES - 1)

    def _alpha(self, time_B: Tensor) -> Tensor:
        # Made anew: a table that is kept would not be of the fake tensors with which memory is estimated.
        return torch.tensor(self.powers, device=time_B.device)[self.index(time_B)]

    def time(self, draws_B: Tensor, size: tuple[int, ...], uniforms: dict[str, Tensor]) -> Tensor:
        """Training times from uniform draws."""
        index = diffusion.times_from(draws_B, self.prior)
        return (index + 0.5) / diffusion.NUM_TIMES  # the middle, which no rounding moves to a neighbour

    def sigma(self, time_B: Tensor) -> Tensor:
        """Noise fraction of a flow with the same signal-to-noise ratio."""
        signal, noise = self._alpha(time_B).sqrt(), (1 - self._alpha(time_B)).sqrt()
        return noise / (signal + noise)

    def add_noise(self, x0: Tensor, noise: Tensor, time_B: Tensor) -> Tensor:
        """Noisy latents, normalised."""
        return vp_interpolate(self.normalise(x0), noise, self._alpha(time_B))

    def target(self, x0: Tensor, noise: Tensor, time_B: Tensor) -> Tensor:
        """v of normalised latents."""
        return v_target(self.normalise(x0), noise, self._alpha(time_B))

    def conditioning(self, batch: "Batch", time_B: Tensor, uniforms: dict[str, Tensor]) -> dict[str, Any]:
        """Texts, of which some are dropped."""
        keep = uniforms["text_dropout"] >= self.objective.text_dropout
        inputs = {**{name: batch.tensors[name] for name in TEXTS if name in batch.tensors}, "keep": keep}
        if self.masks is not None and "mask_weights" in batch.tensors:
            inputs["mask_weights"] = self.masks.weights(batch.tensors["mask_weights"], batch.valid["mask_weights"])
        return inputs

    def predict(
        self, model: nn.Module, noisy: Tensor, time_B: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """v, in the layout of the latents."""
        weight = next(model.parameters())
        arguments = to_model({**inputs, "noisy": noisy, "index": self.index(time_B)}, weight.device, weight.dtype, ())
        return model(arguments.pop("noisy"), arguments.pop("index"), arguments), {}

    def losses(
        self,
        prediction: Tensor,
        target: Tensor,
        time_B: Tensor,
        inputs: dict[str, Any],
        extra: dict[str, Any],
        update: int,
    ) -> dict[str, LossTerm]:
        """Mean squared error over all latent values, weighted by min-SNR if asked for."""
        error = squared_error(prediction, target)
        if "mask_weights" in inputs:
            error = error * inputs["mask_weights"][:, None]
        loss = error.flatten(1).mean(dim=1)
        if self.objective.min_snr_gamma:
            loss = loss * min_snr_weight(1 - self.sigma(time_B), self.objective.min_snr_gamma, "vpred")
        return {"main": LossTerm(loss, 1.0)}

    def sampling_times(self, steps: int, size: tuple[int, ...], shift: float | None = None) -> list[float]:
        """Times from noise to the picture, and 0.

        Raises:
            ConfigError: for a shift, which a diffusion does not have.
        """
        if shift is not None:
            raise ConfigError("sample.shift: FluxFlow's diffusion has no shift; remove it")
        if steps > diffusion.NUM_TIMES:
            raise ConfigError(f"sample.steps: is {steps}, FluxFlow has {diffusion.NUM_TIMES} times; ask for fewer")
        return [(index + 0.5) / diffusion.NUM_TIMES for index in diffusion.trailing_times(steps)] + [0.0]

    def solve(
        self, name: str, predict: Callable[[Tensor, float], Tensor], noise: Tensor, times: Sequence[float]
    ) -> Tensor:
        """Latents as the autoencoder takes them, from noise.

        Raises:
            ValueError: for an unknown solver.
        """
        solvers = {"dpm++": diffusion.dpm_solver, "ddim": diffusion.ddim}
        if name not in solvers:
            raise ValueError(f"unknown solver '{name}'; known: {', '.join(solvers)}")
        indices = [int(time * diffusion.NUM_TIMES) for time in times[:-1]]
        drawn = solvers[name](
            lambda x, index: predict(x, (index + 0.5) / diffusion.NUM_TIMES), noise, indices, self.alphas
        )
        if self.mean is None or self.spread is None:
            return drawn
        return drawn * self.spread.to(drawn.device) + self.mean.to(drawn.device)
