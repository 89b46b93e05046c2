"""The moving average and Euler sampling equal the published code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from musubi_tuner.flow import guide, solve, unpack_pixels
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep, TinyFluxProcess
from musubi_tuner.models.tinyflux.process import TeacherSettings
from musubi_tuner.models.tinyflux.settings import TinyFluxObjective
from musubi_tuner.training.ema import EMA

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-5
"""Relative to the largest value; both sides compute in float32."""
DECAY = 0.9
"""Of the file's averages, by its description."""


def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(DATA / name), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (not a mapping)


def assert_close(ours: Tensor, published: Tensor) -> None:
    assert ours.shape == published.shape
    assert ours.dtype == torch.float32
    assert (ours - published).abs().max().item() <= TOLERANCE * published.abs().max().item()


# Moving average


class OneMatrix(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


def test_average_equals_the_published_one_after_every_update() -> None:
    golden, _ = read("tinyflux_flow.safetensors")
    model = OneMatrix(golden["in.ema.w0"])
    ema = EMA(model, DECAY)
    updates = sorted(int(key.removeprefix("in.ema.w")) for key in golden if key.startswith("in.ema.w"))[1:]
    assert updates == [1, 2, 3]
    for number in updates:
        with torch.no_grad():
            model.weight.copy_(golden[f"in.ema.w{number}"])
        ema.update(model)
        assert_close(ema.shadow["weight"], golden[f"out.ema.shadow{number}"])


# Sampling


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return read("tinyflux_forward.safetensors")[0]


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return json.loads(read("tinyflux_forward.safetensors")[1]["sample_json"])


@pytest.fixture(scope="module")
def model(golden: dict[str, Tensor]) -> TinyFluxDeep:
    _, metadata = read("tinyflux_forward.safetensors")
    model = TinyFluxDeep(TinyFluxConfig.from_dict(json.loads(metadata["config_json"])))
    model.load_state_dict({key: golden[f"w.{key}"] for key in model.state_dict()})
    return model.eval()


@pytest.fixture(scope="module")
def process(settings: dict[str, Any]) -> TinyFluxProcess:
    return TinyFluxProcess(TinyFluxObjective(shift=settings["shift"]), TeacherSettings(False, False, "sum"))


@torch.no_grad()
def sample(
    model: TinyFluxDeep,
    process: TinyFluxProcess,
    golden: dict[str, Tensor],
    settings: dict[str, Any],
    guidance: float,
) -> Tensor:
    """Latents [2, 16, H, W] from the noise of the file, both branches in one forward pass."""
    noise = unpack_pixels(golden["in.sample.noise"], settings["height"], settings["width"])
    count = len(noise)
    t5, clip = golden["in.sample.t5"], golden["in.sample.clip"]
    if guidance > 1:
        t5 = torch.cat((t5, golden["in.sample.t5_neg"].expand(count, -1, -1)))
        clip = torch.cat((clip, golden["in.sample.clip_neg"].expand(count, -1)))

    def velocity(x: Tensor, now: float) -> Tensor:
        batch = torch.cat((x, x)) if guidance > 1 else x
        predicted, _ = process.predict(model, batch, torch.full((len(batch),), now), {"t5": t5, "clip": clip})
        return guide(predicted[:count], predicted[count:], guidance) if guidance > 1 else predicted

    return solve("euler", velocity, noise, process.sampling_times(settings["num_steps"], (8, 8)))


def test_sampling_times_equal_the_published_ones(
    process: TinyFluxProcess, golden: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    times = process.sampling_times(settings["num_steps"], (8, 8))
    assert_close(torch.tensor(times, dtype=torch.float32), golden["out.sample.timesteps"])
    assert (times[0], times[-1]) == (0.0, 1.0)


def test_guided_sampling_equals_the_published_latents(
    model: TinyFluxDeep, process: TinyFluxProcess, golden: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    latents = sample(model, process, golden, settings, settings["guidance_scale"])
    assert_close(latents, golden["out.sample.cfg.latents"])


def test_sampling_without_guidance_equals_the_published_latents(
    model: TinyFluxDeep, process: TinyFluxProcess, golden: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    latents = sample(model, process, golden, settings, 1.0)
    assert_close(latents, golden["out.sample.nocfg.latents"])


def test_every_sampling_output_of_the_file_is_covered(golden: dict[str, Tensor]) -> None:
    outputs = {key for key in golden if key.startswith("out.sample.")}
    assert outputs == {"out.sample.timesteps", "out.sample.cfg.latents", "out.sample.nocfg.latents"}
