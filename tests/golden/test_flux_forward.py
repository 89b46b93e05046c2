"""FLUX.1 equals the reference implementations in float32: outputs, intermediate values, one training step."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from musubi_tuner.flow import interpolate, pack_patches, unpack_patches
from musubi_tuner.models.flux_dev import Flux, FluxConfig
from musubi_tuner.models.flux_dev.model import rotary_angles, timestep_embedding

FILE = Path(__file__).parent / "data" / "flux_forward.safetensors"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    with safe_open(str(FILE), "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(str(FILE), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)


@pytest.fixture(scope="module")
def model(golden: dict[str, Tensor], metadata: dict[str, str]) -> Flux:
    built = Flux(FluxConfig.from_dict(json.loads(metadata["config"])))
    built.load_state_dict({key[2:]: tensor for key, tensor in golden.items() if key.startswith("w.")})
    return built.eval()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=tolerance, rtol=0), (found - expected).abs().max()


def test_forward(model: Flux, golden: dict[str, Tensor]) -> None:
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    with torch.no_grad():
        assert_close(model(*(golden[f"in.{name}"] for name in names)), golden["out"])


def test_intermediate_values(model: Flux, golden: dict[str, Tensor]) -> None:
    assert_close(timestep_embedding(golden["in.timesteps"]), golden["mid.timestep_embedding"])
    with torch.no_grad():
        vec = model.time_in(timestep_embedding(golden["in.timesteps"])) + model.vector_in(golden["in.y"])
        assert_close(vec + model.guidance_in(timestep_embedding(golden["in.guidance"])), golden["mid.vec"])
    ids = torch.cat((golden["in.txt_ids"], golden["in.img_ids"]), dim=1)
    cos, sin = rotary_angles(ids, model.config.axes_dim, model.config.theta)
    table = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
    assert_close(table, golden["mid.pe"], 1e-6)


def test_training_step(model: Flux, golden: dict[str, Tensor], metadata: dict[str, str]) -> None:
    latents, noise, t = (golden[f"train.{name}"] for name in ("latents", "noise", "t"))
    noisy = interpolate(latents, noise, t)
    assert_close(noisy, golden["train.noisy"])
    packed = pack_patches(noisy)
    assert (
        torch.equal(packed, pack_patches(golden["train.noisy"])) or (packed - golden["train.packed"]).abs().max() < 1e-6
    )
    assert_close(packed, golden["train.packed"])
    guidance = torch.full((len(latents),), float(metadata["guidance_train"]))
    times = golden["train.timesteps"] / 1000
    assert_close(times, t + 1e-3, 1e-6)
    with torch.no_grad():
        tokens = model(
            packed, golden["in.img_ids"], golden["in.txt"], golden["in.txt_ids"], times, golden["in.y"], guidance
        )
    prediction = unpack_patches(tokens, *latents.shape[-2:])
    assert_close(prediction, golden["train.pred"])
    assert_close((prediction - (noise - latents)).square().mean()[None], golden["train.loss"])


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("text", [1, 5])
def test_no_axis_of_one_is_lost(model: Flux, batch: int, tokens: int, text: int) -> None:
    config = model.config
    with torch.no_grad():
        out = model(
            torch.randn(batch, tokens, config.in_channels),
            torch.zeros(batch, tokens, 3),
            torch.randn(batch, text, config.context_in_dim),
            torch.zeros(batch, text, 3),
            torch.rand(batch),
            torch.randn(batch, config.vec_in_dim),
            torch.ones(batch),
        )
    assert out.shape == (batch, tokens, config.in_channels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": (2, 1, 24)}, r"y is \[2, 1, 24\], expected \[2, 24\]"),
        ({"img": (2, 1, 60, 64)}, r"img is \[2, 1, 60, 64\]"),
        ({"img_ids": (2, 59, 3)}, r"img_ids is \[2, 59, 3\], expected \[2, 60, 3\]"),
        ({"timesteps": (1,)}, r"timesteps is \[1\], expected \[2\]"),
        ({"txt": (2, 7, 39)}, r"txt is \[2, 7, 39\], expected \[2, tokens, 40\]"),
    ],
)
def test_wrong_shapes_name_the_argument(
    model: Flux, golden: dict[str, Tensor], change: dict[str, tuple[int, ...]], message: str
) -> None:
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    inputs = {name: golden[f"in.{name}"] for name in names} | {key: torch.zeros(shape) for key, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_guidance_is_asked_for(model: Flux, golden: dict[str, Tensor]) -> None:
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y")
    with pytest.raises(ValueError, match="guidance is missing"):
        model(*(golden[f"in.{name}"] for name in names))
