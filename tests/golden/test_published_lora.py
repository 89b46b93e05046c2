"""LoRA on TinyFlux equals the published one: presets, layers of a config, learning rates, outputs, merging, files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner import convert_lora
from musubi_tuner.adapters import attach, convert, detach, load_adapter, read_adapter
from musubi_tuner.adapters.attach import AdapterSet, Placement, make_adapters, place_adapters, target_paths
from musubi_tuner.adapters.files import AdapterFile, placements_of_file
from musubi_tuner.config.schema.adapter import AdapterSection, AdapterTarget
from musubi_tuner.config.schema.optimizer import OptimizerSection
from musubi_tuner.errors import CheckpointError
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


def parameters(model: torch.nn.Module, placements: list[Placement]) -> int:
    layers = {placement: model.get_submodule(placement.path) for placement in placements}
    return sum(placement.rank * (layer.in_features + layer.out_features) for placement, layer in layers.items())  # type: ignore[operator]


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
    placements = place_adapters(target_paths(model, TARGETS), TARGETS, section(**TARGETS.presets[preset]))
    assert (len(placements), parameters(model, placements)) == (layers, count)


def test_sizes_and_rates_of_presets() -> None:
    model = build(TinyFluxConfig())
    found = {
        preset: {
            placement.path: placement
            for placement in place_adapters(target_paths(model, TARGETS), TARGETS, section(**TARGETS.presets[preset]))
        }
        for preset in ("minimal", "standard", "character", "concept", "full", "progressive")
    }
    assert {(placement.rank, placement.alpha) for placement in found["minimal"].values()} == {(8, 8.0)}
    assert {placement.alpha for name in found if name != "minimal" for placement in found[name].values()} == {16.0}
    character = [found["character"][f"single_blocks.{index}.mlp.fc1"] for index in (0, 9, 10, 19, 20, 24)]
    assert [(placement.rank, placement.lr_scale) for placement in character] == [(8, 0.5)] * 2 + [(16, 1.0)] * 2 + [
        (32, 1.5)
    ] * 2
    doubles = [found["progressive"][f"double_blocks.{index}.attn.img_qkv"].rank for index in (0, 1, 7, 14)]
    singles = [found["progressive"][f"single_blocks.{index}.attn.qkv"].rank for index in (0, 1, 12, 24)]
    assert doubles == [8, 9, 16, 24] and singles == [8, 9, 20, 32]


def test_a_preset_fits_a_smaller_model(model: TinyFluxDeep) -> None:
    placements = place_adapters(
        target_paths(model, TARGETS), TARGETS, section(preset="character", **TARGETS.presets["character"])
    )
    assert {(placement.rank, placement.lr_scale) for placement in placements} == {(8, 0.5)}


def made(model: TinyFluxDeep) -> AdapterSet:
    settings = own_settings()
    return make_adapters(model, place_adapters(target_paths(model, TARGETS), TARGETS, settings), settings)


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


# Files


def predict(model: TinyFluxDeep) -> Tensor:
    names = ("lune_features", "sol_stats", "sol_spatial")
    out = model(
        FORWARD["in.hidden_states"],
        FORWARD["in.encoder_hidden_states"],
        FORWARD["in.pooled_projections"],
        FORWARD["in.timestep"],
        FORWARD["in.img_ids"],
        **{name: FORWARD[f"in.{name}"] for name in names},
    )
    return out[0] if isinstance(out, tuple) else out


def published(path: Path, tensors: Tensors = STORED, **metadata: str) -> Path:
    save_file(tensors, path, {"config_json": METADATA["lora_config_json"], **metadata})
    return path


def loaded(model: TinyFluxDeep, file: AdapterFile) -> AdapterSet:
    placements = placements_of_file(file.tensors, model, TARGETS, "file")
    adapters = make_adapters(model, placements, AdapterSection(type="lora"))
    load_adapter(adapters, file.tensors)
    return adapters


def same(ours: Tensor, golden: str) -> bool:
    return bool((ours - GOLDEN[golden]).abs().max() <= 1e-5)


def test_a_published_file_attached_merged_and_unmerged(model: TinyFluxDeep, tmp_path: Path) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    file = read_adapter(published(tmp_path / "a.safetensors"))
    assert file.spec.code == "tf" and "config_json" not in file.metadata
    adapters = loaded(model, file)
    attach(model, adapters)
    assert same(predict(model), "out.velocity")
    adapters.merge(model)
    assert same(model.single_blocks[0].attn.qkv.weight, "out.merged.single_blocks.0.attn.qkv.weight")
    assert same(predict(model), "out.velocity_merged")
    adapters.unmerge()
    assert same(predict(model), "out.velocity_unmerged")
    detach(model)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_torch_form_is_the_same(tmp_path: Path) -> None:
    plain = read_adapter(published(tmp_path / "a.safetensors")).tensors
    torch.save({"state_dict": STORED, "config": CONFIG, "metadata": {"num_adapters": "17"}}, tmp_path / "a.pt")
    found = read_adapter(tmp_path / "a.pt").tensors
    assert found.keys() == plain.keys() and all(torch.equal(found[key], plain[key]) for key in plain)


def test_torch_form_without_metadata_and_with_numbers_in_it(tmp_path: Path) -> None:
    plain = read_adapter(published(tmp_path / "a.safetensors")).tensors
    torch.save({"state_dict": STORED, "config": CONFIG}, tmp_path / "a.pt")
    found = read_adapter(tmp_path / "a.pt").tensors
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    old = {f"block_0_mlp_fc2.lora_{x}": STORED[f"single_blocks_0_mlp_fc2.lora_{x}"] for x in "AB"}
    torch.save({"state_dict": old, "metadata": {"rank": 4, "alpha": 7.0}}, tmp_path / "old.pt")
    assert float(read_adapter(tmp_path / "old.pt").tensors["lora_unet_single_blocks_0_mlp_fc2.alpha"]) == 7.0


def test_patterns_of_a_stored_config_are_those_of_the_published_trainer(tmp_path: Path) -> None:
    targets = [{"pattern": "single_blocks.[1].mlp.fc1", "alpha": 99.0}, {"pattern": "single_blocks.**", "alpha": 98.0}]
    config = {**CONFIG, "targets": [*CONFIG["targets"], *targets]}
    plain = read_adapter(published(tmp_path / "a.safetensors")).tensors
    found = read_adapter(published(tmp_path / "b.safetensors", config_json=json.dumps(config))).tensors
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_there_and_back_keeps_every_bit(tmp_path: Path) -> None:
    first = read_adapter(published(tmp_path / "a.safetensors")).tensors
    assert {key.rpartition(".")[2] for key in first} == {"weight", "alpha"}
    qkv = "lora_unet_single_blocks_1_attn_qkv"
    assert first[f"{qkv}.lora_down.weight"].shape[0] == 6 and float(first[f"{qkv}.alpha"]) == 12.0
    save_file(first, tmp_path / "ours.safetensors")
    for target, source, output in (("published", "ours", "b"), ("musubi", "b", "c")):
        arguments = ["--input", f"{tmp_path / source}.safetensors", "--output", f"{tmp_path / output}.safetensors"]
        assert convert_lora.main([*arguments, "--target", target]) == 0
    there, back = load_file(tmp_path / "b.safetensors"), load_file(tmp_path / "c.safetensors")
    assert back.keys() == first.keys() and all(torch.equal(back[key], first[key]) for key in first)
    unfolded = [key for key in STORED if not key[-1].isdigit()]
    assert all(torch.equal(there[key], STORED[key]) for key in unfolded)


def test_previous_revision(model: TinyFluxDeep, tmp_path: Path) -> None:
    names = {
        "double.block_1_img_qkv": "double_blocks_1_attn_img_qkv", "block_0_txt_out": "double_blocks_0_attn_txt_out",
        "single.block_1_out": "single_blocks_1_attn_out_proj", "block_0_mlp_fc2": "single_blocks_0_mlp_fc2",
        "block_1_mlp_fc1": "single_blocks_1_mlp_fc1",
    }  # fmt: skip
    tensors = {f"{old}.lora_{x}": STORED[f"{name}.lora_{x}"] for old, name in names.items() for x in "AB"}
    save_file(tensors, tmp_path / "old.safetensors", {"type": "double_stream_lora", "rank": "4", "alpha": "7.0"})
    file = read_adapter(tmp_path / "old.safetensors", MODELS["tf"])
    assert {key.partition(".")[0] for key in file.tensors} == {f"lora_unet_{name}" for name in names.values()}
    assert {float(tensor) for key, tensor in file.tensors.items() if key.endswith("alpha")} == {7.0}
    assert len(list(loaded(model, file).items())) == 5


@pytest.mark.parametrize(
    ("extra", "metadata", "message"),
    [
        ({"ext_double_0.attn.txt_qkv.weight": torch.ones(1), "ext_single_1.mlp.fc1.weight": torch.ones(1),
          "ext_single_0.mlp.fc1.weight": torch.ones(1)}, {}, "holds 1 double and 2 single extension blocks "
         r"\(3 keys: ext_double_0.attn.txt_qkv.weight"),
        ({}, {"config_json": json.dumps({**CONFIG, "extensions": {"single_blocks": 3}})},
         r"holds 0 double and 3 single extension blocks \(0 keys, of which its header tells\)"),
        ({}, {"config_json": json.dumps({**CONFIG, "extensions": [1]})}, "what its header says about extension blocks cannot be"),
        ({}, {"config_json": json.dumps({**CONFIG, "extensions": {"single_blocks": "few"}})}, r"cannot be read \(invalid literal"),
        ({}, {"config_json": "{}"}, "has rank 4, config_json in the header says 16"),
        ({}, {"config_json": "{"}, "its header holds broken JSON"),
        ({"single_blocks_0_mlp_fc1.lora_A.1": torch.ones(2, 64)}, {}, "single_blocks_0_mlp_fc1 has only"),
        ({"single_blocks_9x.lora_A": torch.ones(2, 64), "single_blocks_9x.lora_B": torch.ones(2, 2)}, {},
         "1 keys belong to no layer|2 keys belong to no layer"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(extra: Tensors, metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    path = published(tmp_path / "a.safetensors", {**STORED, **extra}, **metadata)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(path, MODELS["tf"])


def test_alpha_is_never_guessed(tmp_path: Path) -> None:
    save_file(STORED, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="its header has neither config_json nor alpha"):
        read_adapter(tmp_path / "a.safetensors")
    alphas = {f"{key.partition('.')[0]}.alpha": torch.tensor(3.0) for key in STORED}
    save_file({**STORED, **alphas}, tmp_path / "b.safetensors")
    found = read_adapter(tmp_path / "b.safetensors").tensors
    assert float(found["lora_unet_single_blocks_0_mlp_fc1.alpha"]) == 3.0
    assert float(found["lora_unet_single_blocks_0_attn_qkv.alpha"]) == 6.0


def test_entries_of_single_layers_replace_everything(tmp_path: Path) -> None:
    specs = {"single_blocks.0.mlp.fc1": {"rank": 2, "unknown": 1}}
    path = published(tmp_path / "a.safetensors", config_json=json.dumps({**CONFIG, "layer_specs": specs}))
    found = read_adapter(path).tensors
    alphas = [float(found[f"lora_unet_single_blocks_0_mlp_{name}.alpha"]) for name in ("fc1", "fc2")]
    assert alphas == [16.0, 5.0]


def test_other_families_and_other_layers_have_no_such_form() -> None:
    flux = {
        "lora_unet_single_blocks_0_linear2.lora_down.weight": torch.ones(2, 4),
        "lora_unet_single_blocks_0_linear2.lora_up.weight": torch.ones(4, 2),
    }
    with pytest.raises(CheckpointError, match=r"FLUX\.1-dev has no published trainer"):
        convert(flux, to="published")
    with pytest.raises(CheckpointError, match=r"are of no LoRA for FLUX\.1-dev"):
        convert(STORED, to="musubi", arch="fd")
    other = {key.replace("single_blocks_0_linear2", "double_blocks_0_img_mlp_fc1"): t for key, t in flux.items()}
    with pytest.raises(
        CheckpointError,
        match=r"1 layers cannot be adapted by the published trainer \(double_blocks.0.img_mlp.fc1\)",
    ):
        convert(other, to="published")
