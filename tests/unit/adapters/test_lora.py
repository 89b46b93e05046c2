"""LoRA layers and sets: identity at the start, dropouts, norms, attachment, files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from musubi_tuner.adapters import LoRALinear, attach, detach, load_adapter, merge, read_adapter, save_adapter
from musubi_tuner.adapters.attach import AdapterSet, Placement, make_adapters, place_adapters, target_paths
from musubi_tuner.config.schema.adapter import AdapterSection, AdapterTarget
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.memory.storage import Freeze, freeze_layers
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import AdapterTargets
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep

TARGETS = AdapterTargets(layers={"blocks": ("first", "second")}, exclude=(r".*second",), network_module="none")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def section(**settings: Any) -> AdapterSection:
    return AdapterSection(**{"type": "lora", "rank": 4, "alpha": 2.0, **settings})


def made(model: nn.Module, seed: int = 0, filled: bool = True, **settings: Any) -> AdapterSet:
    own = section(**settings)
    adapters = make_adapters(model, place_adapters(target_paths(model, TARGETS), TARGETS, own), own, seed)
    if filled:
        generator = torch.Generator().manual_seed(1)
        for _, adapter in adapters.items():
            adapter.lora_up.weight.data.copy_(torch.randn(adapter.lora_up.weight.shape, generator=generator))
    return adapters


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def test_untrained_adapter_changes_nothing(model: Model) -> None:
    before = model(X)
    attach(model, made(model, filled=False))
    assert torch.equal(model(X), before)


def test_attached_and_detached(model: Model) -> None:
    names, before = list(model.state_dict()), model(X)
    adapters = made(model)
    attach(model, adapters)
    assert not torch.allclose(model(X), before)
    assert [name for name in model.state_dict() if not name.startswith("adapters.")] == names
    with pytest.raises(RuntimeError, match="has adapters already"):
        attach(model, made(model))
    assert detach(model) is adapters
    assert torch.equal(model(X), before) and list(model.state_dict()) == names
    with pytest.raises(RuntimeError, match="has no adapters"):
        detach(model)


def test_two_models_do_not_disturb_each_other(model: Model) -> None:
    other = Model()
    other.load_state_dict(model.state_dict())
    before = other(X)
    attach(model, made(model))
    assert torch.equal(other(X), before)


def test_multiplier_scales_the_change(model: Model) -> None:
    layer = LoRALinear(6, 8, 4, 2.0)
    layer.initialize()
    layer.lora_up.weight.data.normal_()
    whole = layer(X)
    layer.multiplier = 0.5
    assert torch.allclose(layer(X), whole / 2)
    assert torch.allclose(layer.delta(), 0.5 * (2 / 4) * layer.lora_up.weight @ layer.lora_down.weight)
    layer.multiplier = 0.0
    assert (layer(X) == 0).all()


@pytest.mark.parametrize("multiplier", [1.0, 0.5, -1.0])
def test_merged_equals_attached(multiplier: float, model: Model) -> None:
    adapters = made(model)
    attach(model, adapters)
    adapters.set_multiplier(multiplier)
    expected = model(X)
    detach(model)
    report = merge(model, adapters.state_dict(), TARGETS, multiplier)
    assert torch.allclose(model(X), expected, atol=1e-5)
    assert report.layers == 3 and report.ratio > 0.1 and report.skipped == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_unmerging_a_live_model_leaves_every_bit(dtype: torch.dtype, model: Model) -> None:
    model.to(dtype)
    x = X.to(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapters = made(model)
    attach(model, adapters)
    attached = model(x)
    adapters.merge(model)
    layer, adapter = model.blocks[0].first, dict(adapters.items())["blocks.0.first"]
    assert torch.equal(layer.weight, (before["blocks.0.first.weight"].float() + adapter.delta()).to(dtype))
    assert torch.allclose(model(x), attached, atol=1e-5 if dtype == torch.float32 else 0.1)
    with pytest.raises(RuntimeError, match="merged already"):
        adapters.merge(model)
    adapters.unmerge()
    assert torch.equal(model(x), attached)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    with pytest.raises(RuntimeError, match="are not merged"):
        adapters.unmerge()


def test_strength_acts_on_merged_changes(model: Model) -> None:
    plain = model(X)
    adapters = made(model)
    attach(model, adapters)
    adapters.set_multiplier(0.5)
    half = model(X)
    adapters.set_multiplier(1.0)
    adapters.merge(model)
    adapters.set_multiplier(0.5)
    assert torch.allclose(model(X), half, atol=1e-5)
    adapters.set_multiplier(0.0)
    assert torch.equal(model(X), plain)


def test_detaching_unmerges_first(model: Model) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapters = made(model)
    with pytest.raises(RuntimeError, match="not attached to this model"):
        adapters.merge(model)
    attach(model, adapters)
    adapters.merge(model)
    detach(model)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not adapters.merged and type(model.blocks[0].first) is nn.Linear


@pytest.mark.parametrize("storage", ["plain", "fp8", "fp8_scaled", "int8", "nf4"])
def test_merging_into_frozen_layers(storage: Any, model: Model) -> None:
    freeze_layers(model, Freeze(storage, ".*", plain=".*" if storage == "plain" else None))
    adapters = made(model)
    attach(model, adapters)
    attached = model(X)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(2):
        adapters.merge(model)
        assert torch.allclose(model(X), attached, atol=1e-5)
        adapters.unmerge()
        assert torch.equal(model(X), attached)
    adapters.merge(model)
    detach(model)
    attach(model, adapters)
    assert torch.equal(model(X), attached)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[key].view(torch.uint8), before[key].view(torch.uint8)) for key in before if before[key].ndim
    )


def test_adapters_are_float32_on_any_base(model: Model) -> None:
    model.to(torch.bfloat16)
    attach(model, made(model))
    assert {p.dtype for p in model.adapters.parameters()} == {torch.float32}
    assert model(X.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.long
@pytest.mark.parametrize("name", ["dropout", "rank_dropout", "module_dropout"])
def test_dropouts_act_while_training_and_keep_the_mean(name: str) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(6, 8, 16, 16.0, **{name: 0.5})
    layer.initialize()
    layer.lora_up.weight.data.normal_()
    layer.eval()
    plain = layer(X)
    assert torch.equal(layer(X), plain)
    layer.train()
    drawn = torch.stack([layer(X) for _ in range(4000)])
    assert not torch.allclose(drawn[0], drawn[1])
    scale = 0.5 if name == "module_dropout" else 1.0  # a skipped module is not made up for
    assert (drawn.mean(0) - scale * plain).abs().max() < 0.15 * plain.abs().max()


def test_rank_dropout_is_one_mask_per_sample() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(6, 6, 6, 6.0, rank_dropout=0.5)
    layer.lora_down.weight.data.copy_(torch.eye(6))
    layer.lora_up.weight.data.copy_(torch.eye(6))
    out = layer(torch.ones(3, 7, 6))
    assert (out == out[:, :1]).all()
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert not (out[0] == out[1]).all() or not (out[1] == out[2]).all()


def test_skipped_module_has_zero_gradients_not_none() -> None:
    layer = LoRALinear(6, 8, 4, module_dropout=0.999999)
    layer.initialize()
    layer(X).sum().backward()
    assert layer.lora_up.weight.grad is not None and (layer.lora_up.weight.grad == 0).all()


def test_max_norm_scales_both_factors(model: Model) -> None:
    adapters = made(model)
    norms = [float(adapter.delta().norm()) for _, adapter in adapters.items()]
    limit = sorted(norms)[1] * 1.01
    found = adapters.limit_norms(limit)
    after = [float(adapter.delta().norm()) for _, adapter in adapters.items()]
    assert [min(norm, limit) for norm in norms] == pytest.approx(after, rel=1e-5)
    assert float(found["max_norm/keys_scaled"]) == 1
    assert float(found["max_norm/max_key_norm"]) == pytest.approx(max(norms), rel=1e-5)


def test_start_depends_on_seed_and_path_only(model: Model) -> None:
    all_three, only_one = made(model, filled=False), made(model, filled=False, only=[r"blocks\.1\.first"])
    first, second = (dict(a.items())["blocks.1.first"].lora_down.weight for a in (all_three, only_one))
    assert torch.equal(first, second)
    assert not torch.equal(first, dict(made(model, seed=1).items())["blocks.1.first"].lora_down.weight)
    assert first.abs().max() <= 6**-0.5


# Which layers


def paths(model: nn.Module, **settings: Any) -> list[str]:
    return [placement.path for placement in place_adapters(target_paths(model, TARGETS), TARGETS, section(**settings))]


def test_patterns(model: Model) -> None:
    firsts = ["blocks.0.first", "blocks.1.first", "blocks.2.first"]
    assert paths(model) == firsts
    assert paths(model, exclude=[r"blocks\.0\..*"]) == [
        "blocks.1.first",
        "blocks.1.second",
        "blocks.2.first",
        "blocks.2.second",
    ]
    assert paths(model, exclude=[r"blocks\.0\..*"], keep_default_excludes=True) == firsts[1:]
    assert paths(model, include=[r"blocks\.2\.second"]) == [*firsts, "blocks.2.second"]
    assert paths(model, only=[r"blocks\.[12]\..*"]) == firsts[1:]
    assert paths(model, rank_patterns={r"blocks\.1\..*": 0}) == [firsts[0], firsts[2]]


def test_ranks_and_alphas_by_pattern(model: Model) -> None:
    own = section(rank_patterns={r"blocks\.0\..*": 8}, alpha_patterns={r"blocks\.[01]\..*": 3.0}, alpha=None)
    placements = place_adapters(target_paths(model, TARGETS), TARGETS, own)
    assert [(placement.rank, placement.alpha) for placement in placements] == [(8, 3.0), (4, 3.0), (4, 2.0)]
    zero = place_adapters(target_paths(model, TARGETS), TARGETS, section(alpha=0.0))
    assert {(placement.rank, placement.alpha) for placement in zero} == {(4, 4.0)}


def test_targets_set_sizes_rates_and_layers(model: Model) -> None:
    own = section(
        depth=2,
        rank_patterns={r"blocks\.2\..*": 6},
        targets=[
            AdapterTarget(pattern="blocks.[0,2].first", alpha=3.0, depth=1),
            AdapterTarget(pattern="blocks.[2].*", lr_scale=0.5, dropout=0.25, weight_decay=0.0),
            AdapterTarget(pattern="blocks.1.second", enabled=True, rank=2),
            AdapterTarget(pattern="blocks.1.first", enabled=False),
        ],
    )
    placements = place_adapters(target_paths(model, TARGETS), TARGETS, own)
    assert placements == [
        Placement("blocks.0.first", 4, 3.0, type="lora"),
        Placement("blocks.1.second", 4, 4.0, type="lora"),
        Placement("blocks.2.first", 6, 3.0, 0.5, 0.25, 0.0, "lora"),
    ]
    adapters = make_adapters(model, placements, own)
    assert {path: adapter.dropout for path, adapter in adapters.items()}["blocks.2.first"] == 0.25
    assert adapters.parameter_rates()["lora_unet_blocks_2_first.lora_up.weight"] == (0.5, 0.0)


def test_target_that_matches_nothing(model: Model) -> None:
    with pytest.raises(
        ConfigError, match=r"adapter.targets: '\*.first' matches no layer.*such as blocks.0.first; \* is one"
    ):
        paths(model, targets=[AdapterTarget(pattern="*.first", rank=2)])


@pytest.mark.parametrize("key", ["exclude", "include", "only"])
def test_pattern_that_matches_nothing(key: str, model: Model) -> None:
    with pytest.raises(ConfigError, match=rf"adapter.{key}: 'first' matches no layer"):
        paths(model, **{key: ["first"]})


def test_no_layer_left(model: Model) -> None:
    with pytest.raises(ConfigError, match="no layer is left to adapt"):
        paths(model, exclude=[".*"])


def test_targets_of_tinyflux_exist() -> None:
    targets = MODELS["tf"].adapters
    model = TinyFluxDeep(TinyFluxConfig(hidden_size=32, num_attention_heads=2, attention_head_dim=16,
                                        axes_dims_rope=(4, 6, 6), num_double_layers=2, num_single_layers=3))  # fmt: skip
    placements = place_adapters(target_paths(model, targets), targets, section())
    assert [placement.path.partition(".")[2] for placement in placements[:4]] == [
        "0.attn.qkv",
        "0.attn.out_proj",
        "0.mlp.fc1",
        "0.mlp.fc2",
    ]
    assert len(placements) == 4 * 3
    everything = place_adapters(target_paths(model, targets), targets, section(kinds=list(targets.kinds)))
    assert len(everything) == 10 * 2 + 5 * 3
    assert {placement.path for placement in everything} == {
        path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and "blocks." in path
    }
    assert len(make_adapters(model, placements, section()).state_dict()) == 3 * len(placements)


# Files


def flux_lora(**changes: Tensor) -> dict[str, Tensor]:
    name = "lora_unet_single_blocks_0_linear2"
    return {f"{name}.lora_down.weight": torch.ones(2, 20), f"{name}.lora_up.weight": torch.ones(4, 2),
            f"{name}.alpha": torch.tensor(1.0), **changes}  # fmt: skip


def test_saved_file_has_hashes_of_its_content(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "lora.safetensors"
    save_adapter(path, flux_lora(), {"ss_steps": "5", "other": "x"}, torch.bfloat16)
    with safe_open(str(path), "pt") as file:
        header = file.metadata()
        assert file.get_tensor("lora_unet_single_blocks_0_linear2.alpha").dtype == torch.bfloat16
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert header["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()
    assert len(header["sshs_legacy_hash"]) == 8 and header["ss_steps"] == "5"


def test_family_is_read_from_header_or_names(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(flux_lora(), path)
    assert read_adapter(path).spec.code == "fd"
    save_file(flux_lora(), path, {"ss_base_model_version": "flux_dev"})
    assert read_adapter(path, MODELS["fd"]).spec.code == "fd"
    with pytest.raises(CheckpointError, match=r"is an adapter for FLUX\.1-dev, this run is TinyFlux-Deep"):
        read_adapter(path, MODELS["tf"])


def test_options_that_an_adapter_was_trained_with(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    name = "lora_unet_single_blocks_0_attn_qkv"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors, path, {"options_json": '{"t5_attn_mask": true}'})
    assert read_adapter(path, MODELS["tf"]).options == {"t5_attn_mask": True}
    save_file(tensors, path, {"options_json": '{"later": 1}'})
    with pytest.raises(CheckpointError, match="was trained with unknown options later") as error:
        read_adapter(path, MODELS["tf"])
    assert str(error.value).count(str(path)) == 1


def test_file_of_no_family(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down_blocks_0_x.lora_down.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match="these names fit no model that is supported"):
        read_adapter(path)


def test_strict_loading_lists_everything(model: Model) -> None:
    adapters = made(model)
    tensors = dict(adapters.state_dict())
    del tensors["lora_unet_blocks_0_first.lora_up.weight"]
    tensors["lora_unet_blocks_9_first.lora_up.weight"] = torch.zeros(1)
    tensors["lora_unet_blocks_1_first.lora_up.weight"] = torch.zeros(8, 3)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(adapters, tensors, "file")
    message = str(caught.value)
    assert "1 keys missing: lora_unet_blocks_0_first.lora_up.weight" in message
    assert "1 keys unexpected: lora_unet_blocks_9_first.lora_up.weight" in message
    assert "lora_unet_blocks_1_first.lora_up.weight is [8, 3], expected [8, 4]" in message


def test_alpha_of_the_file_counts(model: Model) -> None:
    adapters = made(model, alpha=2.0)
    tensors = dict(adapters.state_dict())
    tensors["lora_unet_blocks_0_first.alpha"] = torch.tensor(8.0)
    del tensors["lora_unet_blocks_1_first.alpha"]
    load_adapter(adapters, tensors)
    scales = [adapter.scale for _, adapter in adapters.items()]
    assert scales == [2.0, 1.0, 0.5]


def test_merging_names_strange_keys(model: Model) -> None:
    tensors = {**made(model).state_dict(), "lora_unet_x.lora_up.weight": torch.zeros(1)}
    with pytest.raises(
        CheckpointError, match=r"1 keys belong to no layer of this model \(lora_unet_x.lora_up.weight\)"
    ):
        merge(model, tensors, TARGETS)
    assert merge(model, tensors, TARGETS, ignore_unmatched=True).skipped == ["lora_unet_x.lora_up.weight"]


def test_a_pair_that_is_not_complete(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = flux_lora()
    del tensors["lora_unet_single_blocks_0_linear2.lora_up.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"has only alpha, lora_down.weight; the file is damaged"):
        read_adapter(path, MODELS["fd"])


def test_keys_outside_the_blocks_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    outside = {"lora_unet_block_of_another_model.lora_down.weight": torch.zeros(2, 2)}
    save_file({**flux_lora(), **outside}, path)
    with pytest.raises(CheckpointError, match=r"1 keys belong to no layer of FLUX\.1-dev"):
        read_adapter(path, MODELS["fd"])
    found = read_adapter(path, MODELS["fd"], ignore_unmatched=True)
    assert set(found.tensors) == set(flux_lora()) and found.skipped == list(outside)
