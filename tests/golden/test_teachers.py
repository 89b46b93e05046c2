"""Sol statistics and teacher features equal the published code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from attention import reduce_attention
from musubi_tuner.encoders import teachers
from musubi_tuner.encoders.teachers import Teacher
from musubi_tuner.errors import CacheError

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-5


def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(DATA / name), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (not a mapping)


@pytest.fixture(scope="module")
def stats() -> dict[str, Tensor]:
    return read("tinyflux_sol_stats.safetensors")[0]


def layer(stats: dict[str, Tensor], name: str) -> tuple[Tensor, tuple[int, int]]:
    height, width = stats[f"in.{name}.hw"].tolist()
    return stats[f"in.{name}"], (height, width)


def assert_group(stats: dict[str, Tensor], group: str, found: tuple[Tensor, Tensor]) -> None:
    for name, value in zip(("stats", "spatial"), found, strict=True):
        assert (value - stats[f"out.{group}.{name}"]).abs().max().item() <= TOLERANCE, (group, name)


def test_single_layers(stats: dict[str, Tensor]) -> None:
    for index in range(3):
        assert_group(stats, f"layer{index}", reduce_attention([layer(stats, f"attn.{index}")], 2))


def test_layers_together(stats: dict[str, Tensor]) -> None:
    layers = [layer(stats, f"attn.{index}") for index in range(3)]
    assert_group(stats, "all", reduce_attention(layers, 2))
    assert_group(stats, "all.spatial4", reduce_attention(layers, 2, size=4))


def test_rectangular_grid(stats: dict[str, Tensor]) -> None:
    assert_group(stats, "rect4x6", reduce_attention([layer(stats, "rect")], 2))


def test_layers_of_another_batch_or_grid_are_ignored(stats: dict[str, Tensor]) -> None:
    layers = [
        (stats["in.skip.not_hw"], (4, 4)),
        (stats["in.skip.wrong_batch"], (4, 4)),
        layer(stats, "attn.0"),
        layer(stats, "attn.1"),
    ]
    assert_group(stats, "skipped", reduce_attention(layers, 2))


def test_uniform_and_identity_attention(stats: dict[str, Tensor]) -> None:
    uniform = torch.full((2, 4, 36, 36), 1 / 36)
    assert_group(stats, "uniform6x6", reduce_attention([(uniform, (6, 6))], 2))
    identity = torch.eye(36).expand(2, 4, 36, 36)
    assert_group(stats, "identity6x6", reduce_attention([(identity, (6, 6))], 2))


def test_nothing_captured_is_an_error() -> None:
    with pytest.raises(CacheError, match="no self-attention layer was captured"):
        reduce_attention([], 2)


@pytest.fixture(scope="module")
def unet_case() -> tuple[dict[str, Tensor], Teacher]:
    from diffusers import UNet2DConditionModel

    golden, metadata = read("tinyflux_experts_unet.safetensors")
    unet = UNet2DConditionModel.from_config(json.loads(metadata["unet_config_json"]))
    unet.load_state_dict({key[2:]: value for key, value in golden.items() if key.startswith("w.")})
    return golden, Teacher(unet.eval())


def test_features_of_a_unet(unet_case: tuple[dict[str, Tensor], Teacher]) -> None:
    golden, teacher = unet_case
    found = teacher.features(golden["in.latents"], golden["in.t"] * 1000, golden["in.text"], lune=True, sol=True)
    assert (found["lune_features"] - golden["out.lune"]).abs().max().item() <= TOLERANCE
    assert (found["sol_stats"] - golden["out.sol.stats"]).abs().max().item() <= TOLERANCE
    assert (found["sol_spatial"] - golden["out.sol.spatial"]).abs().max().item() <= TOLERANCE


def test_walking_over_few_queries_gives_the_same_features(
    unet_case: tuple[dict[str, Tensor], Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden, teacher = unet_case
    monkeypatch.setattr(teachers, "QUERY_BLOCK_BYTES", 2 * 2 * 256 * 4 * 5)  # five queries of the largest layer
    found = teacher.features(golden["in.latents"], golden["in.t"] * 1000, golden["in.text"], lune=False, sol=True)
    assert (found["sol_stats"] - golden["out.sol.stats"]).abs().max().item() <= TOLERANCE
    assert (found["sol_spatial"] - golden["out.sol.spatial"]).abs().max().item() <= TOLERANCE


def test_capturing_does_not_change_the_output(unet_case: tuple[dict[str, Tensor], Teacher]) -> None:
    golden, teacher = unet_case
    seen = []
    handle = teacher.unet.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    try:
        teacher.features(golden["in.latents"], golden["in.t"] * 1000, golden["in.text"], lune=True, sol=True)
    finally:
        handle.remove()
    assert (seen[0] - golden["out.unet"]).abs().max().item() <= TOLERANCE
    assert (seen[0] - golden["out.unet_with_sol_processor"]).abs().max().item() <= TOLERANCE
