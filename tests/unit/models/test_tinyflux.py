"""TinyFlux: its size, its config file, its precision, its latent sizes and its start values."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.models.layers import image_positions
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep, build, initialize
from musubi_tuner.models.tinyflux.model import latent_size, rotary_frequencies
from musubi_tuner.models.tinyflux.state_dict import example_inputs
from tiny import TINY

pytestmark = pytest.mark.long


def random_model(config: TinyFluxConfig = TINY, seed: int = 0) -> TinyFluxDeep:
    """A model in eval mode whose zero-initialised parts were filled too, so that every path acts."""
    generator = torch.Generator().manual_seed(seed)
    model = build(config).to_empty(device="cpu")
    initialize(model, "reference", generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def inputs(height: int = 4, width: int = 4, text: int = 5, config: TinyFluxConfig = TINY) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return example_inputs(config, 2, height, width, text)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.float() - exact.float()).norm() / exact.float().norm()).item()


def count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


# Size


@pytest.fixture(scope="module")
def published() -> TinyFluxDeep:
    return build(TinyFluxConfig())


def test_published_model_has_the_published_number_of_parameters(published: TinyFluxDeep) -> None:
    assert count(published.parameters()) == 245_347_234
    assert len(published.state_dict()) == 683


@pytest.mark.parametrize(
    ("prefixes", "expected"),
    [
        (("img_in.",), 8_704),
        (("txt_in.",), 393_728),
        (("time_in.",), 394_240),
        (("vector_in.",), 393_728),
        (("t5_pool.", "text_balance"), 656_385),
        (("lune_predictor.",), 2_496_257),
        (("sol_prior.",), 805_712),
        (("double_blocks.",), 141_757_560),
        (("double_blocks.0.",), 9_450_504),
        (("single_blocks.",), 98_432_200),
        (("single_blocks.24.",), 3_937_288),
        (("final_norm.", "final_linear."), 8_720),
    ],
)
def test_part_of_the_published_model_has_its_number_of_parameters(
    prefixes: tuple[str, ...], expected: int, published: TinyFluxDeep
) -> None:
    assert count(p for name, p in published.named_parameters() if name.startswith(prefixes)) == expected


@pytest.mark.parametrize(
    ("switched_off", "parameters", "entries"),
    [
        (("use_lune_expert",), 242_850_977, 670),
        (("use_sol_prior",), 244_541_202, 584),
        (("use_t5_vec",), 244_690_849, 678),
        (("use_lune_expert", "use_sol_prior", "use_t5_vec"), 241_388_560, 566),
    ],
)
def test_variant_has_its_number_of_parameters(switched_off: tuple[str, ...], parameters: int, entries: int) -> None:
    model = build(TinyFluxConfig(**dict.fromkeys(switched_off, False)))
    assert count(model.parameters()) == parameters
    assert len(model.state_dict()) == entries


def test_building_takes_no_storage(published: TinyFluxDeep) -> None:
    assert {tensor.device.type for tensor in published.state_dict().values()} == {"meta"}


# Config


def message_of(**values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        TinyFluxConfig(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"hidden_size": 500},
            "hidden_size 500 is not num_attention_heads 4 x attention_head_dim 128 = 512",
        ),
        (
            {"axes_dims_rope": (16, 56, 54)},
            "axes_dims_rope [16, 56, 54] sums to 126, it must be attention_head_dim 128",
        ),
        (
            {"axes_dims_rope": (15, 57, 56)},
            "axes_dims_rope is [15, 57, 56], it must be three even numbers of at least 2",
        ),
        ({"axes_dims_rope": (0, 64, 64)}, "axes_dims_rope is [0, 64, 64], it must be three even numbers of at least 2"),
        ({"axes_dims_rope": (64, 64)}, "axes_dims_rope is [64, 64], it must be three even numbers of at least 2"),
        ({"sol_geometric_weight": 1.5}, "sol_geometric_weight is 1.5, it must lie in [0, 1]"),
        ({"sol_geometric_weight": -0.1}, "sol_geometric_weight is -0.1, it must lie in [0, 1]"),
        ({"lune_dropout": 1.0}, "lune_dropout is 1.0, it must lie in [0, 1)"),
        ({"lune_dropout": -0.1}, "lune_dropout is -0.1, it must lie in [0, 1)"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0, it must be positive"),
        ({"patch_size": 2}, "patch_size is 2; TinyFlux has one token per latent pixel, so only 1 works"),
        ({"num_double_layers": -1}, "num_double_layers is -1, it must not be negative"),
        ({"num_single_layers": -1}, "num_single_layers is -1, it must not be negative"),
    ],
)
def test_config_that_does_not_fit_together_names_the_numbers(values: dict[str, Any], message: str) -> None:
    assert message_of(**values) == message


@pytest.mark.parametrize(
    "name",
    [
        "hidden_size",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "patch_size",
        "joint_attention_dim",
        "pooled_projection_dim",
        "lune_expert_dim",
        "lune_hidden_dim",
        "sol_spatial_size",
        "sol_hidden_dim",
    ],
)
def test_config_refuses_an_empty_dimension(name: str) -> None:
    assert message_of(**{name: 0}) == f"{name} is 0, it must be at least 1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "512"),
        ("hidden_size", 512.0),
        ("in_channels", True),
        ("mlp_ratio", "4"),
        ("mlp_ratio", math.nan),
        ("axes_dims_rope", 128),
        ("use_sol_prior", "no"),
    ],
)
def test_config_value_of_another_type_is_refused_by_name(name: str, value: Any) -> None:
    assert name in message_of(**{name: value})


def test_axes_become_a_tuple() -> None:
    assert TinyFluxConfig(axes_dims_rope=[16, 56, 56]).axes_dims_rope == (16, 56, 56)  # type: ignore[arg-type]


def test_config_json_holds_just_the_fields_and_comes_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(TINY.to_json(), encoding="utf-8")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written) == list(TINY.to_dict())
    assert len(written) == 22
    assert written["axes_dims_rope"] == [4, 6, 6]
    assert TinyFluxConfig.from_json(path) == TINY


def test_unknown_and_underscored_keys_are_ignored() -> None:
    extra = {"_class_name": "TinyFlux", "_metadata": {}, "t5_pool_mode": "mean", "use_huber_loss": True}
    assert TinyFluxConfig.from_dict({**TINY.to_dict(), **extra}) == TINY


def test_legacy_names_are_mapped() -> None:
    legacy = {"use_expert_predictor": False, "expert_dim": 40, "expert_hidden_dim": 16, "expert_dropout": 0.2}
    config = TinyFluxConfig.from_dict(legacy)
    assert (config.use_lune_expert, config.lune_expert_dim) == (False, 40)
    assert (config.lune_hidden_dim, config.lune_dropout) == (16, 0.2)


def test_current_name_wins_over_a_legacy_one() -> None:
    config = TinyFluxConfig.from_dict({"use_expert_predictor": True, "use_lune_expert": False})
    assert config.use_lune_expert is False


def test_config_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        TinyFluxConfig.from_json(path)
    assert str(caught.value) == f"{path}: holds a list, expected a JSON object"


def test_broken_config_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        TinyFluxConfig.from_json(path)
    assert str(caught.value).startswith(f"{path}: not a JSON file (")


def test_config_json_that_does_not_fit_together_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 3}', encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        TinyFluxConfig.from_json(path)
    assert str(caught.value).startswith(f"{path}: hidden_size 3 is not ")


# Precision


def test_rotary_buffers_stay_float32_and_exact_in_a_bfloat16_model() -> None:
    model = random_model().to(torch.bfloat16)
    assert model.img_in.weight.dtype == torch.bfloat16
    for axis, width in enumerate(TINY.axes_dims_rope):
        buffer = getattr(model.rope, f"freqs_{axis}")
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, rotary_frequencies(width))


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_rotary_buffers_stay_float32_under_every_conversion(convert: Any) -> None:
    model = convert(build(TINY).to_empty(device="cpu"))
    assert {buffer.dtype for buffer in model.rope.buffers()} == {torch.float32}


def test_rotary_frequencies_are_their_formula() -> None:
    expected = [10000 ** (-2 * k / 6) for k in range(3)]
    assert rotary_frequencies(6).tolist() == pytest.approx(expected, rel=1e-6)


# bfloat16 keeps 8 bits: 0.4 % per rounding, and a few roundings in a row.
BFLOAT16_TOLERANCE = 0.03


@pytest.mark.parametrize("teachers", [False, True], ids=["predicted", "given"])
def test_bfloat16_model_without_autocast_is_close_to_float32(teachers: bool) -> None:
    given = inputs()
    if teachers:
        given |= {
            "lune_features": torch.randn(2, 40),
            "sol_stats": torch.rand(2, 3),
            "sol_spatial": torch.rand(2, 4, 4),
        }
    with torch.no_grad():
        exact = random_model()(**given)
        rough = random_model().to(torch.bfloat16)(**given)
    assert rough.dtype == torch.bfloat16
    assert relative_error(rough, exact) < BFLOAT16_TOLERANCE


def test_bfloat16_autocast_is_close_to_float32() -> None:
    model, given = random_model(), inputs()
    with torch.no_grad():
        exact = model(**given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(**given)
    assert 0 < relative_error(rough, exact) < BFLOAT16_TOLERANCE


def test_bfloat16_model_tells_apart_times_that_bfloat16_cannot() -> None:
    model, given = random_model().to(torch.bfloat16), inputs()
    embedded: list[Tensor] = []
    model.time_in.mlp[0].register_forward_hook(lambda module, args, out: embedded.append(args[0]))
    with torch.no_grad():
        for time in (0.996, 0.9975):
            model(**{**given, "timestep": torch.full((2,), time)})
    assert torch.tensor(0.996).bfloat16() == torch.tensor(0.9975).bfloat16()
    assert not torch.equal(embedded[0], embedded[1])


def test_every_trained_parameter_gets_a_gradient_in_bfloat16() -> None:
    model = random_model().to(torch.bfloat16)
    velocity, experts = model(**inputs(), return_expert_pred=True)
    loss = velocity.float().square().mean() + experts["lune_pred"].float().square().mean()
    loss = (
        loss + experts["sol_stats_pred"].float().square().mean() + experts["sol_spatial_pred"].float().square().mean()
    )
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


# Latent size


@pytest.mark.parametrize(("height", "width"), [(16, 4), (4, 16), (2, 32)])
def test_non_square_latent_is_not_read_as_the_square_of_as_many_tokens(height: int, width: int) -> None:
    model, given = random_model(), inputs(8, 8)
    with torch.no_grad():
        assert relative_error(model(**given, height=height, width=width), model(**given)) > 1e-3


def test_latent_size_is_read_from_image_ids() -> None:
    model, given = random_model(), inputs(8, 8)
    with torch.no_grad():
        explicit = model(**given, height=16, width=4)
        assert torch.equal(model(**given, img_ids=image_positions(16, 4)), explicit)
        assert torch.equal(model(**given, img_ids=image_positions(16, 4).expand(2, -1, -1)), explicit)


@pytest.mark.parametrize("name", ["img_ids", "txt_ids"])
def test_ids_that_differ_between_samples_are_refused(name: str) -> None:
    model, given = random_model(), inputs(8, 8)
    count = {"img_ids": 64, "txt_ids": given["encoder_hidden_states"].shape[1]}[name]
    ids = torch.zeros(2, count, 3)
    ids[1, 0, 0] = 1
    with pytest.raises(ValueError, match=f"{name} differ between the samples of the batch; pictures of another size"):
        model(**given, height=8, width=8, **{name: ids})


def test_latent_size_is_as_given_then_from_ids_then_a_square() -> None:
    assert latent_size(64, image_positions(16, 4), 4, 16) == (4, 16)
    assert latent_size(64, image_positions(16, 4), None, None) == (16, 4)
    assert latent_size(64, None, None, None) == (8, 8)


def test_tokens_that_are_no_square_need_a_size() -> None:
    with pytest.raises(ValueError) as caught:
        latent_size(24, None, None, None)
    assert str(caught.value) == "24 image tokens are not a square; pass height and width, or img_ids"


@pytest.mark.parametrize(("ids", "height", "width"), [(None, 4, 5), (image_positions(4, 5), None, None)])
def test_latent_size_must_match_the_number_of_tokens(ids: Tensor | None, height: int | None, width: int | None) -> None:
    with pytest.raises(ValueError) as caught:
        latent_size(24, ids, height, width)
    assert str(caught.value) == "latent size 4x5 has 20 tokens, got 24"


@pytest.mark.parametrize(("height", "width"), [(16, None), (None, 16)])
def test_one_side_alone_is_not_silently_ignored(height: int | None, width: int | None) -> None:
    with pytest.raises(ValueError, match="height and width"):
        latent_size(64, None, height, width)


def test_wrong_latent_size_stops_the_forward_pass() -> None:
    with pytest.raises(ValueError, match="latent size 3x5 has 15 tokens, got 16"):
        random_model()(**inputs(4, 4), height=3, width=5)


# Start values


def fresh(scheme: str = "reference", seed: int = 0, config: TinyFluxConfig = TINY) -> TinyFluxDeep:
    model = build(config).to_empty(device="cpu")
    initialize(model, scheme, torch.Generator().manual_seed(seed))
    return model.eval()


@pytest.mark.parametrize("scheme", ["reference", "adaln_zero"])
def test_new_model_begins_with_a_zero_velocity(scheme: str) -> None:
    with torch.no_grad():
        assert fresh(scheme)(**inputs()).abs().max().item() == 0.0


def test_same_seed_gives_the_same_weights_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    first = fresh(seed=5).state_dict()
    torch.manual_seed(2)
    second = fresh(seed=5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_another_seed_gives_other_weights() -> None:
    assert not torch.equal(fresh(seed=5).img_in.weight, fresh(seed=6).img_in.weight)


def test_initializing_on_the_meta_device_gives_the_same_weights() -> None:
    on_meta = build(TINY)
    initialize(on_meta, "reference", torch.Generator().manual_seed(0))
    expected = fresh().state_dict()
    found = on_meta.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_reference_scheme_is_xavier_everywhere_and_adaln_too() -> None:
    model = fresh()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "final_linear":
            fan_out, fan_in = module.weight.shape
            bound = math.sqrt(6 / (fan_in + fan_out))
            largest = module.weight.abs().max().item()
            # The smallest layer draws two values; more values come closer to the bound of gain 1.
            assert 0 < largest <= bound * (1 + 1e-6), name
            assert module.weight.numel() < 100 or largest > 0.9 * bound, name
            assert module.bias is None or not module.bias.any(), name


@pytest.mark.parametrize("scheme", ["reference", "adaln_zero"])
def test_gates_norms_and_modulation_have_their_start_values(scheme: str) -> None:
    model = fresh(scheme)
    assert model.text_balance.item() == 0.0
    assert model.lune_predictor.expert_gate.item() == 0.0
    assert model.sol_prior.blend_gate.item() == pytest.approx(math.log(0.7 / 0.3), abs=1e-6)
    for name, parameter in model.named_parameters():
        if "spatial_to_mod" in name:
            assert not parameter.any(), name
        if name.endswith(("norm1.norm.weight", "norm2.weight", "norm.norm.weight", "final_norm.weight")):
            assert bool((parameter == 1).all()), name


@pytest.mark.parametrize(("weight", "gate"), [(0.0, -9.2102), (1.0, 9.2102)])
def test_extreme_geometric_weight_gives_a_finite_gate(weight: float, gate: float) -> None:
    model = fresh(config=replace(TINY, sol_geometric_weight=weight))
    assert model.sol_prior.blend_gate.item() == pytest.approx(gate, abs=1e-3)


def test_adaln_zero_differs_from_reference_only_where_blocks_are_closed() -> None:
    reference, zeroed = fresh("reference").state_dict(), fresh("adaln_zero").state_dict()
    differing = {key for key in reference if not torch.equal(reference[key], zeroed[key])}
    assert differing == {
        "double_blocks.0.img_norm1.linear.weight",
        "double_blocks.0.txt_norm1.linear.weight",
        "single_blocks.0.norm.linear.weight",
        "single_blocks.0.mlp.fc2.weight",
    }
    assert not any(zeroed[key].any() for key in differing)


@pytest.mark.parametrize("kind", ["double_blocks", "single_blocks"])
def test_adaln_zero_block_begins_as_the_identity(kind: str) -> None:
    model = fresh("adaln_zero")
    changed: list[bool] = []

    def compare(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        streams = out if isinstance(out, tuple) else (out,)
        changed.extend(not torch.equal(before, after) for before, after in zip(args, streams, strict=False))

    getattr(model, kind)[0].register_forward_hook(compare)
    with torch.no_grad():
        model(**inputs())
    assert changed and not any(changed)


def test_unknown_init_scheme_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unknown init scheme 'zero'; known: reference, adaln_zero$"):
        initialize(build(TINY), "zero")


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


UNUSED = {"sol_prior.spatial_to_qk_scale.weight", "sol_prior.spatial_to_qk_scale.bias"}


def test_only_the_unused_scale_is_not_trainable() -> None:
    assert frozen_names(build(TINY)) == UNUSED
    assert frozen_names(fresh()) == UNUSED


def test_initializing_keeps_the_unused_scale_out_of_training_on_every_path() -> None:
    model = TinyFluxDeep(TINY)
    initialize(model)
    assert frozen_names(model) == UNUSED
    on_meta = build(TINY)
    initialize(on_meta)
    assert frozen_names(on_meta) == UNUSED


def test_freeze_lune_freezes_the_whole_predictor() -> None:
    frozen = frozen_names(fresh(config=replace(TINY, freeze_lune=True)))
    assert frozen == UNUSED | {f"lune_predictor.{name}" for name, _ in build(TINY).lune_predictor.named_parameters()}


def test_freeze_sol_leaves_the_modulation_of_the_blocks_trainable() -> None:
    frozen = frozen_names(fresh(config=replace(TINY, freeze_sol=True)))
    assert frozen == {f"sol_prior.{name}" for name, _ in build(TINY).sol_prior.named_parameters()}


# Text mask


@pytest.fixture(scope="module")
def padded() -> tuple[TinyFluxDeep, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """A model, two inputs that differ in the padding rows only, and the mask of the real rows."""
    first = inputs(text=6)
    second = dict(first, encoder_hidden_states=first["encoder_hidden_states"].clone())
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    mask[1, 2:] = False
    second["encoder_hidden_states"][~mask] += 5.0
    return random_model(), first, second, mask


Padded = tuple[TinyFluxDeep, dict[str, Tensor], dict[str, Tensor], Tensor]


def test_padding_acts_without_a_text_mask(padded: Padded) -> None:
    model, first, second, _ = padded
    with torch.no_grad():
        assert relative_error(model(**second), model(**first)) > 0.01


def test_padding_does_not_act_with_a_text_mask(padded: Padded) -> None:
    model, first, second, mask = padded
    with torch.no_grad():
        torch.testing.assert_close(model(**second, text_mask=mask), model(**first, text_mask=mask), atol=1e-5, rtol=0)
        assert relative_error(model(**first, text_mask=mask), model(**first)) > 0.01


def test_text_mask_equals_leaving_the_padding_out(padded: Padded) -> None:
    model, first, _, _ = padded
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, :3] = True
    shorter = dict(first, encoder_hidden_states=first["encoder_hidden_states"][:, :3])
    with torch.no_grad():
        torch.testing.assert_close(model(**first, text_mask=mask), model(**shorter), atol=1e-5, rtol=0)


def test_mask_of_real_text_only_changes_nothing(padded: Padded) -> None:
    model, first, _, mask = padded
    with torch.no_grad():
        # Another attention kernel runs when a mask is given.
        torch.testing.assert_close(model(**first, text_mask=torch.ones_like(mask)), model(**first), atol=1e-5, rtol=0)


def test_text_mask_also_acts_without_t5_pooling() -> None:
    model, given = random_model(replace(TINY, use_t5_vec=False)), inputs(text=6)
    mask = torch.tensor([[True] * 3 + [False] * 3] * 2)
    with torch.no_grad():
        assert relative_error(model(**given, text_mask=mask), model(**given)) > 1e-4


# What the forward pass returns


def test_teacher_features_are_marked_as_real_predicted_or_mixed() -> None:
    model, given, features = random_model(), inputs(), torch.randn(2, 40)
    mask = torch.tensor([True, False])
    with torch.no_grad():
        used = [
            model(**given, return_expert_pred=True, **teacher)[1]["lune"]["expert_used"]
            for teacher in ({}, {"lune_features": features}, {"lune_features": features, "lune_mask": mask})
        ]
    assert used == ["predicted", "real", "mixed"]


def test_teacher_mask_chooses_per_sample() -> None:
    model, given = random_model(), inputs()
    teachers = {"lune_features": torch.randn(2, 40), "sol_stats": torch.rand(2, 3), "sol_spatial": torch.rand(2, 4, 4)}
    mask = torch.tensor([True, False])
    with torch.no_grad():
        mixed = model(**given, **teachers, lune_mask=mask, sol_mask=mask)
        torch.testing.assert_close(mixed[0], model(**given, **teachers)[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(mixed[1], model(**given)[1], atol=1e-5, rtol=0)


def test_flat_aliases_name_the_same_tensors_as_the_nested_ones() -> None:
    with torch.no_grad():
        _, experts = random_model()(**inputs(), return_expert_pred=True)
    assert experts["lune_pred"] is experts["lune"]["expert_pred"]
    assert experts["sol_stats_pred"] is experts["sol"]["pred_stats"]
    assert experts["sol_spatial_pred"] is experts["sol"]["pred_spatial"]


def test_model_without_experts_returns_none_for_them() -> None:
    model = random_model(replace(TINY, use_lune_expert=False, use_sol_prior=False))
    with torch.no_grad():
        _, experts = model(**inputs(), return_expert_pred=True)
    assert set(experts.values()) == {None}


# Embedded guidance, as models before v4.2 had it


def test_guidance_is_added_to_the_conditioning_vector() -> None:
    config = replace(TINY, guidance_embeds=True)
    model, plain = random_model(config), random_model()
    plain.load_state_dict(
        {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("guidance_in")}
    )
    inputs = example_inputs(TINY, 3, 4, 4, 5)
    guidance, kept = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([True, False, True])
    expected = plain(**inputs)
    found = model(**inputs, guidance=guidance, guidance_mask=kept)
    assert torch.equal(found[1], expected[1])
    assert not torch.allclose(found[0], expected[0]) and not torch.allclose(found[2], expected[2])
    assert not torch.allclose(found[:1], model(**inputs, guidance=guidance + 1)[:1])
    # The vector itself: a model whose time embedding is moved by the same amount gives the same.
    moved = random_model(config)
    moved.load_state_dict(model.state_dict())
    nn.init.zeros_(moved.guidance_in.mlp[2].weight)
    assert torch.equal(moved(**inputs, guidance=guidance), moved(**inputs, guidance=guidance + 1))


def test_guidance_missing_or_too_much() -> None:
    inputs = example_inputs(TINY, 2, 4, 4, 5)
    with pytest.raises(ValueError, match="guidance is missing, and this model embeds guidance"):
        random_model(replace(TINY, guidance_embeds=True))(**inputs)
    with pytest.raises(ValueError, match="guidance is given, and this model has no guidance embedding"):
        random_model()(**inputs, guidance=torch.ones(2))


def test_released_configs_do_not_name_the_embedding() -> None:
    assert "guidance_embeds" not in TINY.to_dict()
    assert TinyFluxConfig.from_dict(replace(TINY, guidance_embeds=True).to_dict()).guidance_embeds
    assert not any(key.startswith("guidance_in") for key in TinyFluxDeep(TINY).state_dict())
