"""What the options of a new model compute, and that without them nothing is computed otherwise (see also tests/golden)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep, build, initialize
from musubi_tuner.models.tinyflux.geometry import ModelOptions
from musubi_tuner.models.tinyflux.model import BlockInputs, text_ids, timestep_embedding
from musubi_tuner.models.tinyflux.sol import attention_temperature
from musubi_tuner.models.tinyflux.state_dict import example_inputs
from tiny import TINY

SMALL = replace(TINY, num_double_layers=2, num_single_layers=2, lune_expert_dim=10)


def make(**changes: Any) -> TinyFluxDeep:
    """A model in which every weight counts; options and fields of the geometry by name."""
    options = {key: changes.pop(key) for key in list(changes) if hasattr(ModelOptions, key)}
    model = build(replace(SMALL, **changes, options=ModelOptions(**options))).to_empty(device="cpu")
    initialize(model, "reference", torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def inputs(config: TinyFluxConfig = SMALL) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return example_inputs(config, 2, 4, 4, 5)


@torch.no_grad()
def velocity(model: TinyFluxDeep, **changes: Any) -> Tensor:
    result: Tensor = model(**{**inputs(model.config), **changes})
    return result


def test_every_option_changes_what_is_computed() -> None:
    plain = velocity(make())
    assert torch.equal(velocity(make(text_positions="zero", temperature_per_head=False, timestep_scale=1)), plain)
    for option in ({"text_positions": "index"}, {"temperature_per_head": True}, {"timestep_scale": 1000.0}):
        assert (velocity(make(**option)) - plain).abs().max() > 1e-4, option


@pytest.mark.parametrize("blocks", ["double", "single"])
def test_text_positions_act_in_both_kinds_of_blocks(blocks: str) -> None:
    """Without positions the order of the text tokens cannot matter."""
    other = "single" if blocks == "double" else "double"
    mixed = inputs()["encoder_hidden_states"][:, [3, 0, 4, 1, 2]]
    for positions in ("zero", "index"):
        model = make(text_positions=positions, **{f"num_{other}_layers": 0})
        gap = (velocity(model, encoder_hidden_states=mixed) - velocity(model)).abs().max()
        assert gap < 1e-5 if positions == "zero" else gap > 1e-3


def test_text_positions_are_numbers_unless_others_are_given() -> None:
    model = make(text_positions="index")
    assert torch.equal(velocity(model, txt_ids=text_ids(5)), velocity(model))
    assert not torch.equal(velocity(model, txt_ids=text_ids(5) * 2), velocity(model))
    flat = velocity(make())
    torch.testing.assert_close(velocity(model, txt_ids=torch.zeros(5, 3)), flat, atol=1e-6, rtol=1e-5)


def test_each_head_has_its_own_temperature() -> None:
    temperature = torch.tensor([[0.5, 2.0], [0.01, 1.0]])
    assert attention_temperature(temperature).flatten().tolist() == pytest.approx([1.25, 0.505])
    own = attention_temperature(temperature, per_head=True)
    assert own.shape == (2, 2, 1, 1)
    assert own.flatten().tolist() == pytest.approx([0.5, 2.0, 0.1, 1.0])


@pytest.mark.parametrize("per_head", [False, True])
def test_blocks_divide_queries_by_the_temperatures_of_sol(per_head: bool) -> None:
    model, shared = make(temperature_per_head=per_head), list[BlockInputs]()
    model.single_blocks[0].register_forward_pre_hook(lambda block, given: shared.append(given[2]))
    with torch.no_grad():
        _, experts = model(**inputs(), return_expert_pred=True)
    temperature = experts["sol"]["temperature"]
    expected = temperature if per_head else temperature.mean(dim=1, keepdim=True)
    assert shared[0].sharpness is not None
    torch.testing.assert_close(shared[0].sharpness[:, :, 0, 0], 1 / expected)
    assert temperature.std(dim=1).min() > 1e-3


@pytest.mark.parametrize("kind", ["double", "single"])
def test_the_temperature_of_a_head_acts_on_that_head_alone(kind: str) -> None:
    model, seen = make(), list[Tensor]()
    attention = getattr(model, f"{kind}_blocks")[0].attn
    out = attention.img_out if kind == "double" else attention.out_proj
    out.register_forward_hook(lambda layer, given, result: seen.append(given[0]))
    generator = torch.Generator().manual_seed(3)
    txt, img = torch.randn(1, 5, 32, generator=generator), torch.randn(1, 16, 32, generator=generator)
    tokens = (txt, img) if kind == "double" else (torch.cat((txt, img), dim=1),)
    turned = [torch.zeros(count, 8) for count in (16, 21)]
    for sharpness in (None, torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)):
        shared = BlockInputs(
            rope_img=(turned[0].cos(), turned[0]), rope_all=(turned[1].cos(), turned[1]), map_B1N=None,
            sharpness=sharpness, key_mask=None,
        )  # fmt: skip
        with torch.no_grad():
            attention(*tokens, shared)
    plain, sharper = (result.unflatten(-1, (2, 16)) for result in seen)
    assert torch.equal(plain[..., 0, :], sharper[..., 0, :])
    assert (plain[..., 1, :] - sharper[..., 1, :]).abs().max() > 1e-3


def test_the_time_is_scaled_in_its_embedding_alone() -> None:
    seen: dict[float, list[Tensor]] = {}
    guided = inputs(replace(SMALL, guidance_embeds=True))
    for scale in (1.0, 250.0):
        model = make(timestep_scale=scale, guidance_embeds=True)
        seen[scale] = []
        for part in (model.time_in, model.guidance_in):
            part.mlp[0].register_forward_hook(lambda layer, given, out, scale=scale: seen[scale].append(given[0]))
        model.sol_prior.register_forward_hook(lambda layer, given, out, scale=scale: seen[scale].append(given[2]))
        velocity(model, **guided)
    time = guided["timestep"]
    for scale, (embedded, guidance, of_sol) in seen.items():
        assert torch.equal(embedded, timestep_embedding(time * scale))
        assert torch.equal(guidance, timestep_embedding(guided["guidance"]))
        assert torch.equal(of_sol, time)


def test_a_larger_scale_tells_close_times_apart() -> None:
    close = [torch.tensor([0.5]), torch.tensor([0.501])]

    def gap(scale: float) -> float:
        first, second = (timestep_embedding(time * scale) for time in close)
        return float((first - second).norm())

    assert gap(1000.0) > 100 * gap(1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_positions": "middle"}, "text_positions is 'middle', expected 'zero' or 'index'"),
        ({"temperature_per_head": 1}, "temperature_per_head is 1, expected true or false"),
        ({"timestep_scale": 0.0}, "timestep_scale is 0.0, expected a positive number"),
        ({"timestep_scale": float("inf")}, "timestep_scale is inf, expected a positive number"),
        ({"timestep_scale": True}, "timestep_scale is True, expected a positive number"),
    ],
)
def test_impossible_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelOptions(**values)


def test_options_are_no_fields_of_the_config_file() -> None:
    config = SMALL.with_options({"text_positions": "index", "expert_time": "aligned"})
    assert config.options == ModelOptions(text_positions="index")
    assert config.to_dict() == SMALL.to_dict()
    assert TinyFluxConfig.from_dict({**SMALL.to_dict(), "text_positions": "index", "options": {}}) == SMALL
    assert config.options.changed() == {"text_positions": "index"} and SMALL.options.changed() == {}


@pytest.mark.parametrize("place", ["options.json", "_metadata"])
def test_options_come_back_with_the_config_file(place: str, tmp_path: Path) -> None:
    path, config = tmp_path / "config.json", SMALL.with_options({"timestep_scale": 10})
    options = {"expert_time": "aligned", "timestep_scale": 10.0}
    if place == "options.json":
        path.write_text(config.to_json(), encoding="utf-8")
        (tmp_path / place).write_text(json.dumps(options), encoding="utf-8")
    else:
        path.write_text(json.dumps({**config.to_dict(), place: {"options": options, "step": 4}}), encoding="utf-8")
    assert TinyFluxConfig.from_json(path) == config
