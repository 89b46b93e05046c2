"""Noise levels, their weights and the sampling schedule equal musubi-tuner's."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from musubi_tuner.flow import (
    NoiseSettings,
    noise_level_weight,
    sample_noise_levels,
    sampling_schedule,
)
from musubi_tuner.flow.noise_levels import MODES, density, line, table_sigma

DATA = Path(__file__).parent / "data"
GOLDEN: dict[str, Any] = json.loads((DATA / "timestep_sampling.json").read_text(encoding="utf-8"))
SCHEDULES: list[dict[str, Any]] = json.loads((DATA / "flux_schedule.json").read_text(encoding="utf-8"))["cases"]
NAMES = {"discrete_flow_shift": "shift"}


def settings_of(mode: str, args: dict[str, Any]) -> NoiseSettings:
    values = {NAMES.get(key, key): value for key, value in args.items()}
    low, high = values.pop("min_timestep", 0) / 1000, values.pop("max_timestep", 1000) / 1000
    return NoiseSettings(mode=mode, low=low, high=high, **values)


@pytest.mark.parametrize(
    "case", GOLDEN["flow"], ids=lambda case: f"{case['mode']}-{case['args']}-{case.get('latent_hw')}"
)
def test_modes(case: dict[str, Any]) -> None:
    u = torch.tensor(GOLDEN["u"], dtype=torch.float64)
    height, width = case.get("latent_hw", (128, 128))
    found = sample_noise_levels(u, settings_of(case["mode"], case["args"]), height=height, width=width)
    ends = (u < 1e-6) | (u > 1 - 1e-6)
    difference = (found - torch.tensor(case["t"])).abs()
    assert difference[~ends].max() < 1e-5
    assert difference.max() < 2e-4


@pytest.mark.parametrize("case", GOLDEN["density"], ids=lambda case: f"{case['scheme']}-{case['args']}")
def test_densities(case: dict[str, Any]) -> None:
    settings = NoiseSettings(mode="sigma", density=case["scheme"], **case["args"])
    draws = torch.tensor(GOLDEN["u"], dtype=torch.float64)
    if case["z"] is not None:
        draws = 0.5 * (1 + torch.erf(torch.tensor(case["z"], dtype=torch.float64) / math.sqrt(2)))
    assert torch.allclose(density(draws, settings).float(), torch.tensor(case["density"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", GOLDEN["sigma_mode"], ids=lambda case: str(case["discrete_flow_shift"]))
def test_table(case: dict[str, Any]) -> None:
    index = torch.tensor(case["index"])
    assert torch.allclose(table_sigma(index), torch.tensor(case["sigmas"]), atol=1e-6, rtol=0)
    draws = (index.double() + 0.5) / 1000
    compatible = NoiseSettings(mode="sigma", shift=case["discrete_flow_shift"], upstream_sigma=True)
    assert torch.allclose(sample_noise_levels(draws, compatible), torch.tensor(case["sigmas"]), atol=1e-6, rtol=0)
    ours = sample_noise_levels(draws, NoiseSettings(mode="sigma", shift=case["discrete_flow_shift"]))
    assert torch.equal(ours, sample_noise_levels(draws, compatible)) == (case["discrete_flow_shift"] == 1)


@pytest.mark.parametrize("case", GOLDEN["loss_weight"], ids=lambda case: case["scheme"])
def test_weights(case: dict[str, Any]) -> None:
    sigma = torch.tensor(case["sigmas"])
    expected = torch.ones_like(sigma) if case["weight"] is None else torch.tensor(case["weight"])
    assert torch.allclose(noise_level_weight(sigma, case["scheme"]), expected, rtol=1e-4, atol=1e-6)
    assert noise_level_weight(torch.tensor([1e-5]), "sigma_sqrt").item() == pytest.approx(1e6)


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda case: f"{case['mode']}-{case['num_steps']}-{case.get('shift')}")
def test_sampling_schedule(case: dict[str, Any]) -> None:
    given: dict[str, Any] = {"shift": 1.0}
    if case["mode"] == "auto":
        given = {"tokens": case["image_seq_len"]}
        assert line(case["image_seq_len"]) == pytest.approx(case["mu"])
    elif case["mode"] == "shift":
        given = {"shift": case["shift"]}
    found = sampling_schedule(case["num_steps"], **given)
    assert found == pytest.approx(case["timesteps"], abs=1e-6)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("uniform", "sigma")])
def test_truncation_keeps_the_shape(mode: str) -> None:
    """Draws in the range are distributed like those of an unrestricted run that land in it (quantiles within 0.01)."""
    generator = torch.Generator().manual_seed(0)
    u, pick = torch.rand(2, 200_000, generator=generator, dtype=torch.float64)
    low, high = 0.45, 0.8
    free = sample_noise_levels(u, NoiseSettings(mode=mode), pick_B=pick)
    expected = free[(free >= low) & (free <= high)]
    cut = NoiseSettings(mode=mode, low=low, high=high, preserve_shape=True)
    found = sample_noise_levels(u, cut, pick_B=pick)
    assert found.min() >= low - 1e-6 and found.max() <= high + 1e-6
    levels = torch.linspace(0.05, 0.95, 19)
    difference = torch.quantile(found[:100_000], levels) - torch.quantile(expected[:100_000], levels)
    assert difference.abs().max() < 0.01


def test_mixtures_take_their_shares() -> None:
    pick = (torch.arange(1000) + 0.5) / 1000
    found = sample_noise_levels(torch.full((1000,), 0.5), NoiseSettings(mode="qinglong_flux"), pick_B=pick)
    values, counts = found.unique(return_counts=True)
    middle = [1 / (1 + math.exp(5.36 / 2)), 0.5, 1 / (1 + math.exp(-1.15))]
    assert values.tolist() == pytest.approx(middle, abs=1e-6)
    assert counts.tolist() == [100, 110, 790]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown timestep mode 'flux_shfit'"):
        sample_noise_levels(torch.rand(2), NoiseSettings(mode="flux_shfit"))
    with pytest.raises(ValueError, match="unknown weighting scheme 'sqrt'"):
        noise_level_weight(torch.rand(2), "sqrt")
