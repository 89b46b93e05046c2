"""TinyFlux's process: the only place that knows which way its time runs.

    t = 0 is noise, t = 1 the image          noisy = (1 - t) * noise + t * x0          target = x0 - noise

In the noise fraction that `flow` speaks, sigma = 1 - t. The shift bends t, so a shift above 1 moves training and
sampling towards clean images, the opposite of FLUX.

Beside the main loss there are two distillation terms, one for each teacher of the run:
Lune (predicted against real mid-block features) and Sol (attention statistics and map). Below an adapter the predictors are frozen,
so teachers are fed and not distilled. Samples without features of a
teacher, such as those of a dataset that has none, take the model's own guess and add nothing to its term (unless
`objective.missing_teacher` gives them zeros). The features of a sample are looked up on its own grid of times.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.device import to_model
from musubi_tuner.errors import ConfigError
from musubi_tuner.flow import (
    MaskSettings,
    distillation_loss,
    drop_conditioning,
    element_loss,
    flux_shift,
    huber_threshold,
    interpolate,
    linear_lookup,
    min_snr_weight,
    noise_level_weight,
    pack_pixels,
    ramp,
    sample_timesteps,
    solve,
    spatial_weight,
    squared_error,
    unpack_pixels,
)
from musubi_tuner.models.family import LossTerm
from musubi_tuner.models.tinyflux.model import EXACT_INPUTS
from musubi_tuner.models.tinyflux.settings import TinyFluxObjective

SOL_MEAN_CAP = 4.0
"""With sol_spatial_norm = "mean", a map value is at most this many times the mean."""


def scale_sol_map(map_BSS: Tensor, norm: str) -> Tensor:
    """Bring a teacher map that sums to 1 to the scale that training uses.

    ``sum`` leaves it (published); ``mean`` makes its mean 1, capped at 4; ``max`` makes its maximum 1, the range of
    the predicted and the geometric map it is blended with.

    Raises:
        ValueError: for an unknown norm.
    """
    if norm == "sum":
        return map_BSS
    if norm == "mean":
        return (map_BSS * map_BSS[0].numel()).clamp(max=SOL_MEAN_CAP)
    if norm == "max":
        return map_BSS / map_BSS.amax(dim=(1, 2), keepdim=True).clamp(min=1e-8)
    raise ValueError(f"unknown sol_spatial_norm '{norm}'; known: sum, mean, max")


@dataclass(frozen=True)
class TeacherSettings:
    """Which teachers a run uses and how; see the keys of the same name in [objective] and [experts].

    Attributes:
        distil: the model's own predictors train, and learn from them.
    """

    lune: bool
    sol: bool
    sol_spatial_norm: str
    distil: bool = True


class TinyFluxProcess:
    """Times, noise, target, conditioning and losses of TinyFlux."""

    uniforms = ("text_dropout", "lune_dropout", "sol_dropout", "guidance", "guidance_dropout")

    def __init__(
        self,
        objective: TinyFluxObjective,
        teachers: TeacherSettings,
        text_mask: bool = False,
        masks: MaskSettings | None = None,
    ) -> None:
        self.objective, self.teachers, self.text_mask, self.masks = objective, teachers, text_mask, masks
        self.time_draw = "normal" if objective.timestep_sampling == "logit_normal" else "uniform"
        self.dtype: torch.dtype = getattr(torch, objective.precision)

    def _rounded(self, value: Tensor) -> Tensor:
        """A value as `objective.precision` holds it, in float32."""
        return value.to(self.dtype).float()

    def size(self, x0: Tensor) -> tuple[int, ...]:
        """Nothing: its times are the same for every size."""
        return ()

    def time(self, draws_B: Tensor, size: tuple[int, ...], uniforms: dict[str, Tensor]) -> Tensor:
        """t from one normal or uniform draw per sample (`time_draw`), float32 in [1e-4, 1 - 1e-4], or rounded to bfloat16."""
        settings = self.objective
        time = sample_timesteps(
            draws_B,
            settings.timestep_sampling,
            logit_mean=settings.logit_mean,
            logit_std=settings.logit_std,
            shift=settings.shift,
            low=1 - settings.max_timestep / 1000,
            high=1 - settings.min_timestep / 1000,
            preserve_shape=settings.preserve_distribution_shape,
        )
        return self._rounded(time)

    def sigma(self, time_B: Tensor) -> Tensor:
        """Noise fraction 1 - t."""
        return 1 - time_B

    def add_noise(self, x0: Tensor, noise: Tensor, time_B: Tensor) -> Tensor:
        """``(1 - t) * noise + t * x0`` in `objective.precision`, float32."""
        return self._rounded(interpolate(self._rounded(x0), self._rounded(noise), self.sigma(time_B)))

    def target(self, x0: Tensor, noise: Tensor, time_B: Tensor) -> Tensor:
        """``x0 - noise`` in `objective.precision`, float32."""
        return self._rounded(self._rounded(x0) - self._rounded(noise))

    def conditioning(self, batch: Any, time_B: Tensor, uniforms: dict[str, Tensor]) -> dict[str, Any]:
        """Text after dropout, and teacher features looked up at t, each with the mask of the samples that have them; weights of the loss."""
        settings = self.objective
        keep_text = uniforms["text_dropout"] >= settings.text_dropout
        inputs: dict[str, Any] = {
            "t5": drop_conditioning(batch.tensors["t5_vec"], keep_text),
            "clip": drop_conditioning(batch.tensors["clip_l_pooler"], keep_text),
        }
        low, high = settings.guidance_min, settings.guidance_max
        inputs["guidance"] = low + (high - low) * uniforms["guidance"]
        inputs["guidance_mask"] = uniforms["guidance_dropout"] >= settings.guidance_dropout
        if self.text_mask:
            inputs["text_mask"] = batch.tensors["t5_mask"].bool()
        if self.masks is not None and "mask_weights" in batch.tensors:
            inputs["mask_weights"] = self.masks.weights(batch.tensors["mask_weights"], batch.valid["mask_weights"])
        if self.teachers.lune and "lune_features" in batch.tensors:
            features = linear_lookup(batch.tensors["lune_features"], batch.tensors["t_buckets"], time_B)
            inputs["lune"] = self._teacher(
                {"features": features}, batch.valid["lune_features"], uniforms["lune_dropout"],
                settings.lune_teacher_dropout, keep_text,
            )  # fmt: skip
        if self.teachers.sol and "sol_stats" in batch.tensors:
            grid = batch.tensors["t_buckets"]
            maps = linear_lookup(batch.tensors["sol_spatial"], grid, time_B)
            target = {
                "stats": linear_lookup(batch.tensors["sol_stats"], grid, time_B),
                "spatial": scale_sol_map(maps, self.teachers.sol_spatial_norm),
            }
            inputs["sol"] = self._teacher(
                target, batch.valid["sol_stats"], uniforms["sol_dropout"], settings.sol_teacher_dropout, keep_text
            )
        return inputs

    def _teacher(
        self, target: dict[str, Tensor], valid_B: Tensor, coin_B: Tensor, dropout: float, keep_text_B: Tensor
    ) -> dict[str, Tensor]:
        """Add to the targets which samples feed them to the model and which pay the distillation loss."""
        settings, present_B = self.objective, valid_B
        if settings.teacher_dropout_mode == "batch":
            coin_B = coin_B[:1].expand_as(coin_B)
        kept = coin_B >= dropout
        if settings.drop_experts_with_text:
            # Without text the features, made from the text, would leak the condition into the unconditional branch.
            valid_B = valid_B & keep_text_B
        feed = valid_B & kept
        # Rows without features hold zeros, whatever the lookup made of them: their gradient is then 0, not 0 * NaN.
        target = {
            name: torch.where(present_B.view(-1, *[1] * (value.ndim - 1)), value, torch.zeros_like(value))
            for name, value in target.items()
        }
        return {**target, "feed": feed, "distil": valid_B if settings.distill_on_dropped else feed}

    def predict(
        self, model: nn.Module, noisy: Tensor, time_B: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Velocity in the layout of the latents [B, C, H, W], and the model's guesses of the teacher features.

        A model that embeds guidance gets the middle of the trained range where none is given, as in drawing.
        """
        height, width = noisy.shape[-2:]
        guidance: dict[str, Any] = {}
        bare: Any = getattr(model, "module", model)  # behind data parallelism
        if bare.config.guidance_embeds:
            middle = (self.objective.guidance_min + self.objective.guidance_max) / 2
            given = inputs.get("guidance")
            guidance = {
                "guidance": torch.full_like(time_B, middle) if given is None else given,
                "guidance_mask": inputs.get("guidance_mask"),
            }
        lune, sol = inputs.get("lune"), inputs.get("sol")
        arguments: dict[str, Any] = {
            "hidden_states": pack_pixels(noisy),
            "encoder_hidden_states": inputs["t5"],
            "pooled_projections": inputs["clip"],
            "timestep": time_B,
            "lune_features": lune and lune["features"],
            "sol_stats": sol and sol["stats"],
            "sol_spatial": sol and sol["spatial"],
            "return_expert_pred": True,
            "height": height,
            "width": width,
            "lune_mask": lune and lune["feed"],
            "sol_mask": sol and sol["feed"],
            "text_mask": inputs.get("text_mask"),
            **guidance,
        }
        velocity, experts = model(**to_model(arguments, bare.device, bare.dtype, EXACT_INPUTS))
        return unpack_pixels(velocity, height, width), experts

    def losses(
        self,
        prediction: Tensor,
        target: Tensor,
        time_B: Tensor,
        inputs: dict[str, Any],
        extra: dict[str, Any],
        update: int,
    ) -> dict[str, LossTerm]:
        """``main``, and ``lune`` and ``sol`` where the run distils these teachers: in every batch, so that all processes add up the same."""
        settings = self.objective
        prediction, sigma = self._rounded(prediction), self.sigma(time_B)
        threshold = huber_threshold(sigma, settings.huber_delta, settings.huber_schedule, settings.huber_scale)
        error = self._rounded(element_loss(prediction, target, settings.loss, threshold))
        sol, lune = inputs.get("sol"), inputs.get("lune")
        if settings.spatial_weighting and sol is not None:
            weights = spatial_weight(sol["spatial"], *target.shape[-2:])
            weights = torch.where(sol["distil"].view(-1, 1, 1), weights, torch.ones_like(weights))
            error = error * weights[:, None]
        if "mask_weights" in inputs:
            error = error * inputs["mask_weights"][:, None]
        main = error.flatten(1).mean(1) * noise_level_weight(sigma, settings.weighting_scheme)
        if settings.min_snr_gamma:
            main = main * min_snr_weight(time_B, settings.min_snr_gamma, settings.min_snr_form)
        terms = {"main": LossTerm(self._rounded(main), 1.0)}
        nothing = torch.zeros_like(time_B)
        if self.teachers.lune and self.teachers.distil:
            loss = nothing
            if lune is not None:
                loss = distillation_loss(extra["lune_pred"], lune["features"], settings.lune_mode, settings.huber_delta)
                loss = torch.where(lune["distil"], loss, nothing)
            terms["lune"] = LossTerm(
                self._rounded(loss), ramp(update, settings.lune_warmup_steps, settings.lune_weight)
            )
        if self.teachers.sol and self.teachers.distil:
            loss = nothing
            if sol is not None:
                loss = sol_loss(
                    extra["sol_stats_pred"],
                    sol["stats"],
                    extra["sol_spatial_pred"],
                    sol["spatial"],
                    settings.sol_stats_weight,
                    settings.sol_spatial_weight,
                )
                loss = torch.where(sol["distil"], loss, nothing)
            terms["sol"] = LossTerm(self._rounded(loss), ramp(update, settings.sol_warmup_steps, settings.sol_weight))
        return terms

    def solve(
        self, name: str, predict: Callable[[Tensor, float], Tensor], noise: Tensor, times: Sequence[float]
    ) -> Tensor:
        """Integrate the velocity; see `flow.solve`."""
        return solve(name, predict, noise, times)

    def sampling_times(self, steps: int, size: tuple[int, ...], shift: float | None = None) -> list[float]:
        """``shift(k / steps)`` for k = 0 .. steps: from noise (0) to the image (1).

        Raises:
            ConfigError: if another shift is asked for; sampling uses the times of training.
        """
        if shift is not None:
            raise ConfigError("TinyFlux samples with objective.shift, the times it was trained on; leave the shift out")
        return flux_shift(torch.linspace(0, 1, steps + 1, dtype=torch.float64), self.objective.shift).tolist()


def sol_loss(
    pred_stats_B3: Tensor,
    stats_B3: Tensor,
    pred_spatial_BSS: Tensor,
    spatial_BSS: Tensor,
    stats_weight: float = 1.0,
    spatial_weight: float = 1.0,
) -> Tensor:
    """Mean squared error of statistics plus that of the map, per sample [B]."""
    stats = squared_error(pred_stats_B3, stats_B3).mean(1)
    spatial = squared_error(pred_spatial_BSS, spatial_BSS).flatten(1).mean(1)
    return stats_weight * stats + spatial_weight * spatial
