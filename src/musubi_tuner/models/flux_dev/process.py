"""FLUX.1's process: the only place that knows which way its time runs.

    sigma = 1 is noise, 0 the image      noisy = (1 - sigma) * x0 + sigma * noise      target = noise - x0

Time is the noise fraction itself. musubi-tuner gives the model sigma + 0.001; `timestep_offset` reproduces that.
Latents are packed 2 x 2 right before the model and unpacked right after it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.device import to_model
from musubi_tuner.flow import (
    MaskSettings,
    NoiseSettings,
    element_loss,
    huber_threshold,
    interpolate,
    min_snr_weight,
    noise_level_weight,
    pack_patches,
    sample_noise_levels,
    sampling_schedule,
    solve,
    unpack_patches,
)
from musubi_tuner.models.family import LossTerm
from musubi_tuner.models.flux_dev.conditioning import text_inputs
from musubi_tuner.models.flux_dev.geometry import PATCH
from musubi_tuner.models.flux_dev.model import EXACT_INPUTS
from musubi_tuner.models.flux_dev.settings import FluxObjective
from musubi_tuner.models.layers import image_positions


class FluxProcess:
    """Times, noise, target, conditioning and loss of FLUX.1."""

    time_draw = "uniform"

    def __init__(self, objective: FluxObjective, masks: MaskSettings | None = None) -> None:
        self.objective, self.masks = objective, masks
        mode = objective.timestep_sampling
        self.uniforms: tuple[str, ...] = ("mixture",) if mode.startswith("qinglong") else ()
        self.noise_settings = NoiseSettings(
            mode=mode,
            sigmoid_scale=objective.sigmoid_scale,
            shift=objective.discrete_flow_shift,
            logit_mean=objective.logit_mean,
            logit_std=objective.logit_std,
            low=objective.min_timestep / 1000,
            high=objective.max_timestep / 1000,
            preserve_shape=objective.preserve_distribution_shape,
            density=objective.weighting_scheme,
            mode_scale=objective.mode_scale,
            upstream_sigma=objective.sigma_compat == "upstream",
        )

    def size(self, x0: Tensor) -> tuple[int, ...]:
        """Rows and columns of the latents."""
        return (x0.shape[-2], x0.shape[-1])

    def time(self, draws_B: Tensor, size: tuple[int, ...], uniforms: dict[str, Tensor]) -> Tensor:
        """sigma from one uniform draw per sample, for latents of ``size`` (rows, columns)."""
        height, width = size
        return sample_noise_levels(
            draws_B, self.noise_settings, height=height, width=width, pick_B=uniforms.get("mixture")
        )

    def sigma(self, time_B: Tensor) -> Tensor:
        """The time itself."""
        return time_B

    def add_noise(self, x0: Tensor, noise: Tensor, time_B: Tensor) -> Tensor:
        """``(1 - sigma) * x0 + sigma * noise`` in float32."""
        return interpolate(x0.float(), noise.float(), time_B)

    def target(self, x0: Tensor, noise: Tensor, time_B: Tensor) -> Tensor:
        """``noise - x0``, float32."""
        return noise.float() - x0.float()

    def conditioning(self, batch: Any, time_B: Tensor, uniforms: dict[str, Tensor]) -> dict[str, Any]:
        """Text encodings, the embedded guidance of training, and weights of the loss."""
        inputs = text_inputs(batch.tensors, use_mask=False)
        if self.masks is not None and "mask_weights" in batch.tensors:
            inputs["mask_weights"] = self.masks.weights(batch.tensors["mask_weights"], batch.valid["mask_weights"])
        guidance = torch.full((len(time_B),), self.objective.guidance_scale, device=time_B.device)
        return {**inputs, "guidance": guidance}

    def predict(
        self, model: nn.Module, noisy: Tensor, time_B: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Velocity in the layout of the latents [B, C, H, W]; sides must be even."""
        height, width = noisy.shape[-2:]
        ids = image_positions(height // PATCH, width // PATCH, noisy.device).float().expand(len(noisy), -1, -1)
        bare: Any = getattr(model, "module", model)  # below data parallelism
        arguments: dict[str, Any] = {
            "img": pack_patches(noisy, PATCH),
            "img_ids": ids,
            "txt": inputs["t5"],
            "txt_ids": ids.new_zeros(*inputs["t5"].shape[:2], 3),
            "timesteps": time_B.float() + self.objective.timestep_offset,
            "y": inputs["clip"],
            "guidance": inputs.get("guidance") if bare.config.guidance_embed else None,
        }
        velocity = model(**to_model(arguments, bare.device, bare.dtype, EXACT_INPUTS))
        return unpack_patches(velocity, height, width, PATCH), {}

    def losses(
        self,
        prediction: Tensor,
        target: Tensor,
        time_B: Tensor,
        inputs: dict[str, Any],
        extra: dict[str, Any],
        update: int,
    ) -> dict[str, LossTerm]:
        """The velocity's error, weighed by noise level, per sample."""
        settings = self.objective
        threshold = huber_threshold(time_B, settings.huber_delta, settings.huber_schedule, settings.huber_scale)
        error = element_loss(prediction, target, settings.loss, threshold)
        if "mask_weights" in inputs:
            error = error * inputs["mask_weights"][:, None]
        main = error.flatten(1).mean(1) * noise_level_weight(time_B, settings.weighting_scheme)
        if settings.min_snr_gamma:
            main = main * min_snr_weight(1 - time_B, settings.min_snr_gamma, settings.min_snr_form)
        return {"main": LossTerm(main, 1.0)}

    def solve(
        self, name: str, predict: Callable[[Tensor, float], Tensor], noise: Tensor, times: Sequence[float]
    ) -> Tensor:
        """Integrate the velocity; see `flow.solve`."""
        return solve(name, predict, noise, times)

    def sampling_times(self, steps: int, size: tuple[int, ...], shift: float | None = None) -> list[float]:
        """Noise levels from 1 to 0; without a shift, the one that follows from the number of tokens."""
        height, width = size
        return sampling_schedule(steps, shift=shift, tokens=(height // PATCH) * (width // PATCH))
