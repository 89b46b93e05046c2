"""The model equals the published code in float32: outputs, intermediate values, gradients, sampling."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep
from musubi_tuner.models.tinyflux.model import pool_text, text_ids

FILE = Path(__file__).parent / "data" / "tinyflux_forward.safetensors"
OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

OFF = {"use_lune_expert": False, "use_sol_prior": False, "use_t5_vec": False}
CASES: dict[str, tuple[dict[str, bool], tuple[str, ...], str]] = {
    # case: (config changes, teacher inputs given, suffix of the image inputs)
    "all_given": ({}, ("lune_features", "sol_stats", "sol_spatial"), ""),
    "none_given": ({}, (), ""),
    "lune_only": ({}, ("lune_features",), ""),
    "sol_stats_only": ({}, ("sol_stats",), ""),
    "txt_ids": ({}, ("lune_features", "sol_stats", "sol_spatial", "txt_ids"), ""),
    "large_square": ({}, ("lune_features", "sol_stats", "sol_spatial"), "_large"),
    "experts_disabled": (OFF, (), ""),
    "experts_disabled_nonsquare": (OFF, (), "_nonsquare"),
    "sol_disabled": ({"use_sol_prior": False}, ("lune_features",), ""),
    "lune_disabled": ({"use_lune_expert": False}, ("sol_stats", "sol_spatial"), ""),
    "t5_vec_disabled": ({"use_t5_vec": False}, ("lune_features", "sol_stats", "sol_spatial"), ""),
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(str(FILE), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    with safe_open(str(FILE), "pt") as file:
        return file.metadata()


def build(golden: dict[str, Tensor], metadata: dict[str, str], changes: dict[str, bool]) -> TinyFluxDeep:
    config = TinyFluxConfig.from_dict({**json.loads(metadata["config_json"]), **changes})
    model = TinyFluxDeep(config)
    weights = {key: golden[f"w.{key}"] for key in model.state_dict()}
    model.load_state_dict(weights)
    return model.eval()


def run(model: TinyFluxDeep, golden: dict[str, Tensor], given: tuple[str, ...], suffix: str) -> tuple[Tensor, dict]:
    return model(
        golden[f"in.hidden_states{suffix}"],
        golden["in.encoder_hidden_states"],
        golden["in.pooled_projections"],
        golden["in.timestep"],
        golden[f"in.img_ids{suffix}"],
        return_expert_pred=True,
        **{name: golden[f"in.{name}"] for name in given},
    )


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = OUTPUT_TOLERANCE) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max().item() <= tolerance


def test_file_uses_every_weight(golden: dict[str, Tensor], metadata: dict[str, str]) -> None:
    model = build(golden, metadata, {})
    assert {f"w.{key}" for key in model.state_dict()} == {key for key in golden if key.startswith("w.")}


def test_file_has_just_these_cases(golden: dict[str, Tensor]) -> None:
    found = {key.split(".")[1] for key in golden if key.startswith("out.") and key.endswith(".velocity")}
    assert found == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_outputs(case: str, golden: dict[str, Tensor], metadata: dict[str, str]) -> None:
    changes, given, suffix = CASES[case]
    velocity, experts = run(build(golden, metadata, changes), golden, given, suffix)
    assert_close(velocity, golden[f"out.{case}.velocity"])
    for part in ("lune", "sol"):
        names = [key.rsplit(".", 1)[1] for key in golden if key.startswith(f"out.{case}.{part}.")]
        assert bool(names) == (experts[part] is not None)
        for name in names:
            assert_close(experts[part][name], golden[f"out.{case}.{part}.{name}"])


def test_intermediate_values(golden: dict[str, Tensor], metadata: dict[str, str]) -> None:
    model = build(golden, metadata, {})
    seen: dict[str, Tensor] = {}
    model.time_in.register_forward_hook(lambda module, args, out: seen.update(time_emb=out))
    model.vector_in.register_forward_hook(lambda module, args, out: seen.update(clip_vec=out))
    model.t5_pool.register_forward_hook(lambda module, args, out: seen.update(t5_vec=out, t5_pooled=args[0]))
    model.double_blocks[0].register_forward_hook(
        lambda module, args, out: seen.update({"vec": args[2], "double0.txt": out[0], "double0.img": out[1]})
    )
    length = golden["in.encoder_hidden_states"].shape[1]
    model.single_blocks[0].register_forward_hook(
        lambda module, args, out: seen.update({"single0.txt": out[:, :length], "single0.img": out[:, length:]})
    )
    run(model, golden, CASES["all_given"][1], "")
    names = [key.removeprefix("out.all_given.mid.") for key in golden if key.startswith("out.all_given.mid.")]
    assert set(names) == set(seen)
    for name in names:
        assert_close(seen[name], golden[f"out.all_given.mid.{name}"])


def test_rotary_tables(golden: dict[str, Tensor], metadata: dict[str, str]) -> None:
    model = build(golden, metadata, {})
    for name in ("img", "txt"):
        cos, sin = model.rope(golden[f"in.{name}_ids"][0])
        assert_close(torch.stack((cos, sin), -1).flatten(-2)[:, None], golden[f"out.rope.{name}"])
    assert_close(text_ids(7), golden["in.txt_ids"][0].float())


@pytest.mark.parametrize("case", ["all_given", "none_given"])
def test_gradients(case: str, golden: dict[str, Tensor], metadata: dict[str, str]) -> None:
    model = build(golden, metadata, {})
    velocity, _ = run(model, golden, CASES[case][1], "")
    loss = (velocity - golden["in.grad_target"]).square().mean()
    loss.backward()
    assert_close(loss.detach(), golden[f"out.{case}.grad.loss"])
    prefix = f"out.{case}.grad."
    names = [key.removeprefix(prefix) for key in golden if key.startswith(prefix) and key != prefix + "loss"]
    parameters = dict(model.named_parameters())
    assert set(names) <= set(parameters) and names
    for name in names:
        expected, gradient = golden[prefix + name], parameters[name].grad
        ours = torch.zeros_like(expected) if gradient is None else gradient
        scale = expected.abs().max().item()
        assert (ours - expected).abs().max().item() <= GRADIENT_TOLERANCE * scale + 1e-7, name


def test_all_true_mask_equals_given_and_all_false_equals_predicted(
    golden: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    model = build(golden, metadata, {})
    inputs = [golden[f"in.{n}"] for n in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")]
    teachers = {name: golden[f"in.{name}"] for name in CASES["all_given"][1]}
    for value, case in ((True, "all_given"), (False, "none_given")):
        mask = torch.full((2,), value)
        velocity = model(*inputs, golden["in.img_ids"], **teachers, lune_mask=mask, sol_mask=mask)
        assert_close(velocity, golden[f"out.{case}.velocity"])


def test_pool_without_padding_ignores_masked_rows(golden: dict[str, Tensor]) -> None:
    states = golden["in.encoder_hidden_states"]
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 4:] = False
    torch.testing.assert_close(pool_text(states, mask), pool_text(states[:, :4]))


@pytest.mark.parametrize("case", ["all_given", "experts_disabled_nonsquare"])
def test_fused_attention_gives_the_same_outputs(
    case: str, golden: dict[str, Tensor], metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("musubi_tuner.memory.attention.EXPLICIT_ATTENTION_TOKENS", 0)
    changes, given, suffix = CASES[case]
    velocity, _ = run(build(golden, metadata, changes), golden, given, suffix)
    assert_close(velocity, golden[f"out.{case}.velocity"])
