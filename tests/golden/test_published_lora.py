"""LoRA on TinyFlux equals the published one: presets, layers of a config, learning rates, outputs, merging, files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from musubi_tuner.adapters.attach import AdapterSet, Plan, make_adapters, plan_adapters, target_paths
from musubi_tuner.config.schema import AdapterSection, AdapterTarget, OptimizerSection
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep, build
from musubi_tuner.training.optimizers import parameter_groups

DATA = Path(__file__).parent / "data"
TARGETS = MODELS["tf"].adapters
Tensors = dict[str, Tensor]


def read(name: str) -> tuple[Tensors, dict[str, str]]:
    with safe_open(str(DATA / name), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (not a mapping)


FORWARD, HEADER = read("tinyflux_forward.safetensors")
GOLDEN, METADATA = read("tinyflux_lora.safetensors")
STORED = {key[5:]: tensor for key, tensor in GOLDEN.items() if key.startswith("lora.")}
CONFIG: dict[str, Any] = json.loads(METADATA["lora_config_json"])


@pytest.fixture
def model() -> TinyFluxDeep:
    made = TinyFluxDeep(TinyFluxConfig.from_dict(json.loads(HEADER["config_json"])))
    made.load_state_dict({key: FORWARD[f"w.{key}"] for key in made.state_dict()})
    return made.eval().requires_grad_(False)


def section(**settings: Any) -> AdapterSection:
    targets = [AdapterTarget(**target) for target in settings.pop("targets", [])]
    return AdapterSection(type="lora", targets=targets, **settings)


def own_settings() -> AdapterSection:
    """The golden config in our words."""
    kinds = [kind for kind in ("double_attn", "single_attn", "single_mlp") if CONFIG[f"include_{kind}"]]
    return section(kinds=kinds, targets=CONFIG["targets"], **CONFIG["defaults"])


def parameters(model: torch.nn.Module, plans: list[Plan]) -> int:
    layers = {plan: model.get_submodule(plan.path) for plan in plans}
    return sum(plan.rank * (layer.in_features + layer.out_features) for plan, layer in layers.items())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("preset", "layers", "count"),
    [
        ("minimal", 50, 614_400),
        ("standard", 100, 3_276_800),
        ("character", 100, 3_276_800),
        ("concept", 60, 2_949_120),
        ("full", 160, 4_751_360),
        ("progressive", 160, 5_533_696),
    ],
)
def test_presets_at_full_size(preset: str, layers: int, count: int) -> None:
    model = build(TinyFluxConfig())
    plans = plan_adapters(target_paths(model, TARGETS), TARGETS, section(**TARGETS.presets[preset]))
    assert (len(plans), parameters(model, plans)) == (layers, count)


def test_sizes_and_rates_of_presets() -> None:
    model = build(TinyFluxConfig())
    found = {
        preset: {
            plan.path: plan
            for plan in plan_adapters(target_paths(model, TARGETS), TARGETS, section(**TARGETS.presets[preset]))
        }
        for preset in TARGETS.presets
    }
    assert {(plan.rank, plan.alpha) for plan in found["minimal"].values()} == {(8, 8.0)}
    assert {plan.alpha for name in found if name != "minimal" for plan in found[name].values()} == {16.0}
    character = [found["character"][f"single_blocks.{index}.mlp.fc1"] for index in (0, 9, 10, 19, 20, 24)]
    assert [(plan.rank, plan.lr_scale) for plan in character] == [(8, 0.5)] * 2 + [(16, 1.0)] * 2 + [(32, 1.5)] * 2
    doubles = [found["progressive"][f"double_blocks.{index}.attn.img_qkv"].rank for index in (0, 1, 7, 14)]
    singles = [found["progressive"][f"single_blocks.{index}.attn.qkv"].rank for index in (0, 1, 12, 24)]
    assert doubles == [8, 9, 16, 24] and singles == [8, 9, 20, 32]


def test_a_preset_fits_a_smaller_model(model: TinyFluxDeep) -> None:
    plans = plan_adapters(
        target_paths(model, TARGETS), TARGETS, section(preset="character", **TARGETS.presets["character"])
    )
    assert {(plan.rank, plan.lr_scale) for plan in plans} == {(8, 0.5)}


def made(model: TinyFluxDeep) -> AdapterSet:
    settings = own_settings()
    return make_adapters(model, plan_adapters(target_paths(model, TARGETS), TARGETS, settings), settings)


def test_layers_and_sizes_of_a_config(model: TinyFluxDeep) -> None:
    ranks: dict[str, int] = {}
    for key, tensor in STORED.items():
        name, _, part = key.partition(".lora_")
        if part[0] == "A":
            ranks[name] = ranks.get(name, 0) + len(tensor)
    adapters = made(model)
    assert {path.replace(".", "_"): adapter.rank for path, adapter in adapters.items()} == ranks
    assert dict(adapters.items())["single_blocks.0.attn.qkv"].scale == CONFIG["defaults"]["alpha"] / 3


def test_learning_rates_of_a_config(model: TinyFluxDeep) -> None:
    adapters = made(model)
    groups = parameter_groups(
        list(adapters.named_parameters()), OptimizerSection(lr=1e-3), None, adapters.parameter_rates()
    )
    found = [
        {"lr": group["lr"], "name": group["name"], "n": sum(p.numel() for p in group["params"])} for group in groups
    ]
    assert found == json.loads(METADATA["param_groups_base_lr_1e-3"])
