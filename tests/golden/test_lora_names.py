"""LoRA equals musubi-tuner's: keys and shapes of its files, forward, gradients; names of the other programs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from musubi_tuner.adapters import attach, convert, detach, load_adapter, merge
from musubi_tuner.adapters.attach import AdapterSet, make_adapters, place_adapters, target_paths
from musubi_tuner.adapters.files import placements_of_file
from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.config.schema.optimizer import OptimizerSection
from musubi_tuner.flow import pack_patches, unpack_patches
from musubi_tuner.models.flux_dev import Flux, FluxConfig, build
from musubi_tuner.models.flux_dev.state_dict import to_diffusers
from musubi_tuner.models.registry import MODELS
from musubi_tuner.training.optimizers import parameter_groups

DATA = Path(__file__).parent / "data"
KEYS: dict[str, Any] = json.loads((DATA / "lora_keys.json").read_text(encoding="utf-8"))
TARGETS = MODELS["fd"].adapters
CONFIG = FluxConfig.from_dict(KEYS["config"])
Shapes = dict[str, list[int]]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(str(DATA / "flux_forward.safetensors"), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)


def adapters_of(model: torch.nn.Module, **settings: Any) -> AdapterSet:
    section = AdapterSection(type="lora", rank=KEYS["rank"], alpha=KEYS["alpha"], **settings)
    return make_adapters(model, place_adapters(target_paths(model, TARGETS), TARGETS, section), section)


def shapes(tensors: dict[str, Tensor]) -> Shapes:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lora_default", {}),
        ("lora_single_only", {"exclude": [r".*double_blocks.*"]}),
        ("lora_img_attn_only", {"exclude": [r".*"], "include": [r"double_blocks\.\d+\.img_attn\..*"]}),
    ],
)
def test_keys_of_a_file(name: str, settings: dict[str, Any]) -> None:
    assert shapes(adapters_of(Flux(CONFIG), **settings).state_dict()) == KEYS["sets"][name]["keys"]


def test_full_size() -> None:
    """228 modules and 56,033,280 parameters at rank 16; the model itself has 780 tensors."""
    model = build(FluxConfig())
    assert shapes(model.state_dict()) == KEYS["full_model_state_dict"]
    section = AdapterSection(type="lora", rank=16)
    placements = place_adapters(target_paths(model, TARGETS), TARGETS, section)
    assert len(placements) == 228
    count = 0
    for placement in placements:
        layer = model.get_submodule(placement.path)
        count += placement.rank * (layer.in_features + layer.out_features)  # type: ignore[operator]
    assert count == 56_033_280
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320


@pytest.mark.parametrize(("name", "ratio"), [("plain", None), ("loraplus4", 4.0)])
def test_parameter_groups(name: str, ratio: float | None) -> None:
    parameters = list(adapters_of(Flux(CONFIG)).named_parameters())
    groups = parameter_groups(parameters, OptimizerSection(lr=1e-4), ratio)
    found = [(group["lr"], len(group["params"])) for group in groups]
    assert found == [(pytest.approx(group["lr"]), group["count"]) for group in KEYS["param_groups"][name]]


def test_training_step_with_adapters(golden: dict[str, Tensor]) -> None:
    model = Flux(CONFIG)
    model.load_state_dict({key[2:]: tensor for key, tensor in golden.items() if key.startswith("w.")})
    model.requires_grad_(False)
    tensors = {key[5:]: tensor for key, tensor in golden.items() if key.startswith("lora.")}
    placements = placements_of_file(tensors, model, TARGETS, "golden")
    adapters = make_adapters(model, placements, AdapterSection(type="lora"))
    load_adapter(adapters, tensors)
    attach(model, adapters)

    def predict() -> Tensor:
        tokens = model(
            pack_patches(golden["train.noisy"]),
            golden["in.img_ids"],
            golden["in.txt"],
            golden["in.txt_ids"],
            golden["train.timesteps"] / 1000,
            golden["in.y"],
            torch.ones(2),
        )
        return unpack_patches(tokens, 12, 20)

    prediction = predict()
    loss = (prediction - golden["train.target"]).square().mean()
    loss.backward()
    assert torch.allclose(prediction, golden["lora_train.pred"], atol=1e-4, rtol=0)
    assert loss.item() == pytest.approx(golden["lora_train.loss"].item(), rel=1e-5)
    named = dict(adapters.named_parameters())
    checked = 0
    for key, expected in golden.items():
        if key.startswith("lora_grad."):
            gradient = named[key.removeprefix("lora_grad.")].grad
            assert gradient is not None
            assert (gradient - expected).abs().max() <= 1e-3 * expected.abs().max()
            checked += 1
    assert checked == 8
    # Taken off, the model is the base again; merged, it computes the same as with adapters.
    with torch.no_grad():
        detach(model)
        assert torch.allclose(predict(), golden["train.pred"], atol=1e-4, rtol=0)
        assert shapes(model.state_dict()) == shapes({k[2:]: t for k, t in golden.items() if k.startswith("w.")})
        merge(model, tensors, TARGETS)
        assert torch.allclose(predict(), prediction, atol=1e-5, rtol=0)


# Names of other programs


def lora_with_random_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.tensor(float(KEYS["alpha"])) if key.endswith(".alpha") else torch.randn(shape, generator=generator)
        for key, shape in KEYS["sets"]["lora_default"]["keys"].items()
    }


def deltas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight change of every layer of a file under musubi names."""
    found = {}
    for key in tensors:
        if key.endswith("lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            down, up, alpha = (tensors[f"{name}.{leaf}"] for leaf in ("lora_down.weight", "lora_up.weight", "alpha"))
            found[name] = up @ down * (alpha / len(down))
    return found


def assert_same_change(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    ours, theirs = deltas(first), deltas(second)
    assert set(ours) == set(theirs)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5, rtol=1e-5) for name in ours)


def test_comfyui_names() -> None:
    ours = lora_with_random_weights()
    theirs = convert(ours, to="comfyui")
    assert shapes(theirs) == KEYS["peft_bfl_names"]["keys"]
    factor = KEYS["peft_bfl_names"]["scale_each"]
    down = ours["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]
    assert torch.allclose(theirs["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"], down * factor)
    assert_same_change(convert(theirs, to="musubi"), ours)
    wrong = tuple(KEYS["peft_bfl_names"]["reference_gets_these_wrong"])
    assert not any(key.startswith(wrong) for key in theirs)


def test_diffusers_names() -> None:
    ours = lora_with_random_weights()
    theirs = convert(ours, to="diffusers")
    assert shapes(theirs) == KEYS["diffusers_names"]["keys"]
    back = convert(theirs, to="musubi")
    # Equal A's: the fused layers come back as they were.
    assert {k: s for k, s in shapes(back).items() if not k.endswith("alpha")} == {
        k: s for k, s in KEYS["sets"]["lora_default"]["keys"].items() if not k.endswith("alpha")
    }
    assert_same_change(back, ours)


def test_different_parts_of_diffusers_are_stacked() -> None:
    theirs = convert(lora_with_random_weights(), to="diffusers")
    generator = torch.Generator().manual_seed(1)
    theirs = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in theirs.items()}
    back = convert(theirs, to="musubi")
    assert shapes(back) == KEYS["diffusers_back_to_default"]["keys"]
    name = "lora_unet_single_blocks_1_linear1"
    parts = [
        f"transformer.single_transformer_blocks.1.{part}"
        for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    expected = torch.cat([theirs[f"{part}.lora_B.weight"] @ theirs[f"{part}.lora_A.weight"] for part in parts])
    assert torch.allclose(deltas(back)[name], expected, atol=1e-4)


def test_layers_absent_in_diffusers_files_change_nothing() -> None:
    theirs = {
        key: t for key, t in convert(lora_with_random_weights(), to="diffusers").items() if ".attn.to_k." not in key
    }
    back = deltas(convert(theirs, to="musubi"))
    expected = deltas(lora_with_random_weights())
    width = CONFIG.hidden_size
    for name in ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"):
        wanted = expected[name].clone()
        wanted[width : 2 * width] = 0
        assert torch.allclose(back[name], wanted, atol=1e-5)


@pytest.mark.parametrize("alpha", [-2.0, 0.0])
@pytest.mark.parametrize("naming", ["comfyui", "diffusers"])
def test_any_alpha_survives(alpha: float, naming: Any) -> None:
    ours = {k: torch.tensor(alpha) if k.endswith(".alpha") else t for k, t in lora_with_random_weights().items()}
    theirs = convert(ours, to=naming)
    assert all(tensor.isfinite().all() for tensor in theirs.values())
    assert_same_change(convert(theirs, to="kohya"), ours)


def test_weights_of_diffusers_have_its_keys() -> None:
    tensors = {key: torch.zeros(shape.shape) for key, shape in Flux(CONFIG).state_dict().items()}
    found = shapes(to_diffusers(tensors, CONFIG))
    wanted: Shapes = KEYS["diffusers_model_state_dict"]["keys"]
    assert found == wanted
