"""Files of FluxFlow: the published names, geometry from shapes, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner import fluxflow_export
from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.fluxflow import FluxFlowConfig
from musubi_tuner.models.fluxflow.checkpoint import load_checkpoint, make_part
from musubi_tuner.models.fluxflow.geometry import V2
from musubi_tuner.models.fluxflow.settings import FluxFlowModel
from musubi_tuner.models.fluxflow.state_dict import (
    PARTS,
    PUBLISHED_FILES,
    System,
    build_part,
    published_tensors,
    read_system,
    split,
)

SMALL = FluxFlowConfig(
    vae_dim=8, downscales=2, attn_layers=1, attn_heads=8, head_widths=(16, 8), feature_maps_dim=16, flow_layers=2,
    flow_heads=2, text_embedding_dim=12, feature_maps_dim_disc=4, disc_depth=2, text_width=64, text_layers=1,
    text_heads=1, text_ff=32, text_vocab=50, text_positions=16, down_kernel=4, up_kernel=6, mix_kernel=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    return {part: dict(build_part(part, SMALL).state_dict()) for part in PARTS}


@pytest.fixture
def published(parts: dict[str, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A folder as the published program leaves it, without any config."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name, tensors in published_tensors(parts).items():
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / name)
    return folder


def test_a_published_folder_is_read_whole_and_written_with_identical_keys(published: Path, tmp_path: Path) -> None:
    system = read_system(load_checkpoint(published))
    assert system.geometry == SMALL
    assert set(system.parts) == set(PARTS)
    for part, tensors in system.parts.items():
        assert tensors.keys() == build_part(part, SMALL).state_dict().keys()
    assert fluxflow_export.main([str(published), "-o", str(tmp_path / "again"), "--raw_weights"]) == 0
    for name in PUBLISHED_FILES:
        ours, theirs = load_file(tmp_path / "again" / name), load_file(published / name)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(tensor) for key, tensor in theirs.items())
    assert fluxflow_export.main([str(published), "-o", str(tmp_path / "again"), "--raw_weights"]) == 2


def test_published_names() -> None:
    assert {key.split(".")[0] + "." + key.split(".")[1] for key in published_tensors(
        {part: {"x": torch.zeros(1)} for part in PARTS}
    )["flxflow_final.safetensors"]} == {"diffuser.compressor", "diffuser.flow_processor", "diffuser.expander"}  # fmt: skip


def test_files_of_one_part_do_without_a_prefix(parts: dict[str, dict[str, Tensor]]) -> None:
    for part in PARTS:
        assert split(parts[part], "x") == {part: parts[part]}
    assert split({f"disc_img.{key}": value for key, value in parts["discriminator"].items()}, "x").keys() == {
        "discriminator"
    }


@pytest.mark.parametrize(
    ("key", "version"),
    [
        ("diffuser.compressor.final_norm.weight", "0.6"),
        ("diffuser.expander.context_proj.weight", "0.7"),
        ("diffuser.flow_processor.transformer_blocks.0.film_p0.weight", "0.8"),
        ("D_img.backbone.0.weight", "0.6"),
    ],
)
def test_files_of_later_versions_are_refused_by_name(key: str, version: str) -> None:
    with pytest.raises(CheckpointError, match=f"FluxFlow {version} or later"):
        split({key: torch.zeros(1)}, "x")


def test_foreign_and_incomplete_files_are_named(parts: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="belongs to no part"):
        split({"unet.conv.weight": torch.zeros(1)}, "x")
    short = {f"flow.{key}": tensor for key, tensor in parts["flow"].items() if key != "text_proj.weight"}
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"text_proj\.weight"):
        read_system(load_checkpoint(tmp_path / "short.safetensors"))


def test_flags_travel_with_the_weights(tmp_path: Path) -> None:
    shape = {**SMALL.to_dict(), **V2}
    config = FluxFlowConfig.from_dict(shape)
    tensors = {f"vae.compressor.{key}": value for key, value in build_part("compressor", config).state_dict().items()}
    save_file(
        tensors, tmp_path / "model.safetensors", {"config_json": config.to_json(), "options_json": '{"spade": true}'}
    )
    system = read_system(load_checkpoint(tmp_path))
    assert system.geometry == config and system.options == {"spade": True}


def test_a_pretrained_language_model_stays_as_it_is(tmp_path: Path) -> None:
    """The published program initialises its layers again after loading."""
    encoder: Any = build_part("text_encoder", SMALL)
    encoder.language_model.save_pretrained(tmp_path / "bert")
    settings = FluxFlowModel(arch="ff", bert_path=str(tmp_path / "bert"))
    config: Any = SimpleNamespace(model=settings, run=SimpleNamespace(seed=3), locate=Path)
    made: Any = make_part("text_encoder", System(), config, SMALL)
    for key, tensor in encoder.language_model.state_dict().items():
        assert made.language_model.state_dict()[key].equal(tensor)
    assert not made.ouput_layer[0].weight.equal(encoder.ouput_layer[0].weight)
    other: Any = SimpleNamespace(model=settings, run=SimpleNamespace(seed=4), locate=Path)
    assert (
        not make_part("text_encoder", System(), other, SMALL)
        .state_dict()["ouput_layer.0.weight"]
        .equal(made.ouput_layer[0].weight)
    )
    with pytest.raises(CheckpointError, match="is no DistilBERT"):
        make_part("text_encoder", System(), config, FluxFlowConfig.from_dict({**SMALL.to_dict(), "text_layers": 2}))
