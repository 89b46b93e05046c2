"""Pure maths on tensors: interpolation, times, weights, losses, solvers. Imports torch and nothing of ours above it."""

from musubi_tuner.flow.interpolation import (
    interpolate,
    linear_lookup,
    noise_from_v,
    noise_from_velocity,
    pack_patches,
    pack_pixels,
    unpack_patches,
    unpack_pixels,
    v_from_noise,
    v_target,
    vp_interpolate,
    x0_from_noise,
    x0_from_v,
    x0_from_velocity,
)
from musubi_tuner.flow.losses import (
    MaskSettings,
    distillation_loss,
    drop_conditioning,
    huber_loss,
    mask_weight,
    spatial_weight,
    squared_error,
)
from musubi_tuner.flow.noise import perturb
from musubi_tuner.flow.noise_levels import (
    NoiseSettings,
    noise_level_weight,
    sample_noise_levels,
    sampling_schedule,
)
from musubi_tuner.flow.solvers import SOLVERS, euler, guide, heun, solve
from musubi_tuner.flow.timesteps import flux_shift, flux_unshift, sample_timesteps, stratify, uniform_between
from musubi_tuner.flow.weighting import MIN_SNR_FORMS, min_snr_weight, ramp

__all__ = [
    "MIN_SNR_FORMS",
    "SOLVERS",
    "MaskSettings",
    "NoiseSettings",
    "distillation_loss",
    "drop_conditioning",
    "euler",
    "flux_shift",
    "flux_unshift",
    "guide",
    "heun",
    "huber_loss",
    "interpolate",
    "linear_lookup",
    "mask_weight",
    "min_snr_weight",
    "noise_from_v",
    "noise_from_velocity",
    "noise_level_weight",
    "pack_patches",
    "pack_pixels",
    "perturb",
    "ramp",
    "sample_noise_levels",
    "sample_timesteps",
    "sampling_schedule",
    "solve",
    "spatial_weight",
    "squared_error",
    "stratify",
    "uniform_between",
    "unpack_patches",
    "unpack_pixels",
    "v_from_noise",
    "v_target",
    "vp_interpolate",
    "x0_from_noise",
    "x0_from_v",
    "x0_from_velocity",
]
