"""What becomes of every tensor of an older TinyFlux file, and that a neutral upgrade computes what the older model did."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner import tinyflux_upgrade
from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep, load_checkpoint, load_model
from musubi_tuner.models.tinyflux.state_dict import example_inputs
from musubi_tuner.models.tinyflux.upgrade import remap, shapes, upgrade_weights, v3_geometry, v3_shapes
from tiny import TINY

pytestmark = pytest.mark.long

NO_SOL = replace(TINY, use_sol_prior=False)
Weights = dict[str, Tensor]


def filled(config: TinyFluxConfig, seed: int = 0) -> Weights:
    """Random weights of a v4.2 model; rotary frequencies as they are."""
    generator = torch.Generator().manual_seed(seed)
    state = TinyFluxDeep(config).state_dict()
    return {
        key: tensor if key.startswith("rope.") else torch.randn(tensor.shape, generator=generator) * 0.2
        for key, tensor in state.items()
    }


def v3_weights(seed: int = 0) -> Weights:
    """The state dict of a v3 model: another name of the predictor, a gate with one axis, no Sol, no T5 vector."""
    state = filled(v3_geometry(TINY), seed)
    state = {key.replace("lune_predictor.", "expert_predictor."): tensor for key, tensor in state.items()}
    gate = state["expert_predictor.expert_gate"]
    return {**state, "expert_predictor.expert_gate": gate.view(1)}


def v3_config() -> dict[str, object]:
    """The config of a v3 model in the names of its time."""
    values = {
        key: value for key, value in TINY.to_dict().items() if not key.startswith(("use_", "lune_", "sol_", "freeze"))
    }
    return {**values, "use_expert_predictor": True, "expert_dim": 40, "expert_hidden_dim": 16, "expert_dropout": 0.0,
            "sol_spatial_size": 4, "sol_hidden_dim": 12}  # fmt: skip


def write(path: Path, state: Weights, config: dict[str, object] | None = None) -> Path:
    config = v3_config() if config is None else config
    save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, path, metadata={"config_json": json.dumps(config)}
    )
    return path


def model_of(config: TinyFluxConfig, state: Weights) -> TinyFluxDeep:
    model = TinyFluxDeep(config).eval()
    model.load_state_dict(state)
    return model


@torch.no_grad()
def outputs(model: TinyFluxDeep) -> Tensor:
    torch.manual_seed(1)
    return model(**example_inputs(model.config, 2, 4, 6, 5), height=4, width=6)


def v3_model(seed: int = 0) -> TinyFluxDeep:
    """What v3 computes: our model without the parts that came later."""
    return model_of(v3_geometry(TINY), filled(v3_geometry(TINY), seed))


# What is computed


def test_neutral_upgrade_without_sol_computes_what_the_v3_model_did() -> None:
    state, _ = upgrade_weights(v3_weights(), NO_SOL)
    before = outputs(v3_model())
    difference = (outputs(model_of(NO_SOL, state)) - before).abs().max() / before.abs().max()
    # sigmoid(8) takes 1 - 0.99966 of the pooled text away.
    assert difference < 2e-3
    untouched, _ = upgrade_weights(v3_weights(), NO_SOL, neutral=False)
    difference = (outputs(model_of(NO_SOL, untouched)) - before).abs().max() / before.abs().max()
    assert difference > 2e-2


def test_of_a_fresh_sol_only_the_temperature_changes_what_is_computed() -> None:
    state, report = upgrade_weights(v3_weights(), TINY)
    before = outputs(v3_model())
    with_temperature = (outputs(model_of(TINY, state)) - before).abs().max() / before.abs().max()
    # Blend nothing geometric, and let the learned temperature be softplus(log(e - 1)) = 1.
    state["sol_prior.blend_gate"] = torch.tensor(-100.0)
    state["sol_prior.stat_to_temperature.2.weight"].zero_()
    state["sol_prior.stat_to_temperature.2.bias"].fill_(float(torch.log(torch.expm1(torch.tensor(1.0)))))
    without = (outputs(model_of(TINY, state)) - before).abs().max() / before.abs().max()
    assert without < 2e-3 < with_temperature
    assert report.notes == ["not neutral: Sol's attention temperature starts 70% geometric, the rest untrained"]


def test_neutral_upgrade_of_a_file_without_predictor_adds_nothing_to_the_vector() -> None:
    state = {key: tensor for key, tensor in v3_weights().items() if not key.startswith("expert_predictor.")}
    upgraded, report = upgrade_weights(state, NO_SOL)
    assert any(key.startswith("lune_predictor.") for key in report.fresh)
    bare = replace(NO_SOL, use_lune_expert=False)
    other, _ = upgrade_weights(state, bare)
    assert torch.equal(outputs(model_of(NO_SOL, upgraded)), outputs(model_of(bare, other)))


# What becomes of every tensor


def test_every_key_of_file_and_model_is_in_exactly_one_list() -> None:
    extra = {
        "guidance_in.mlp.0.weight": torch.zeros(2),
        "time_in.sin_basis": torch.zeros(2),
        "nobody.knows": torch.zeros(1),
    }
    given = {**v3_weights(), **extra}
    state, report = upgrade_weights(given, TINY)
    assert set(state) == set(shapes(TINY)) == set(report.loaded) | set(report.fresh)
    assert not set(report.loaded) & set(report.fresh)
    back = {name: key for key, name in report.remapped.items()}
    assert {back.get(key, key) for key in report.loaded} | set(report.dropped) | set(report.unexpected) == set(given)
    assert report.dropped == ["guidance_in.mlp.0.weight", "time_in.sin_basis"]
    assert report.unexpected == ["nobody.knows"]
    assert len(report.remapped) == 13
    for key, name in report.remapped.items():
        assert torch.equal(state[name].reshape(-1), given[key].reshape(-1)), key


def test_gate_keeps_its_value_through_both_directions() -> None:
    state, _ = upgrade_weights(v3_weights(), TINY)
    gate = v3_weights()["expert_predictor.expert_gate"]
    assert state["lune_predictor.expert_gate"].shape == ()
    assert state["lune_predictor.expert_gate"] == gate
    back, _ = upgrade_weights(state, TINY, to="v3")
    assert back["expert_predictor.expert_gate"].shape == (1,)
    assert back["expert_predictor.expert_gate"] == gate


def test_way_back_gives_the_v3_file_again_and_names_what_it_drops() -> None:
    state, _ = upgrade_weights(v3_weights(), TINY)
    back, report = upgrade_weights(state, TINY, to="v3", strict=True)
    assert set(back) == set(v3_shapes(TINY)) == set(v3_weights())
    for key, tensor in v3_weights().items():
        assert torch.equal(back[key], tensor), key
    assert set(report.dropped) == set(state) - set(shapes(v3_geometry(TINY)))
    assert not report.fresh


def test_fresh_parts_follow_the_seed_and_have_the_neutral_values() -> None:
    first, report = upgrade_weights(v3_weights(), TINY, seed=1)
    again, _ = upgrade_weights(v3_weights(), TINY, seed=1)
    other, _ = upgrade_weights(v3_weights(), TINY, seed=2)
    key = "sol_prior.stat_predictor.0.weight"
    assert key in report.fresh
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])
    assert first[key].std() > 0.01
    assert first["text_balance"] == 8
    assert not first["t5_pool.2.weight"].any()
    assert first["t5_pool.0.weight"].any()
    assert not first["double_blocks.0.attn.spatial_to_mod.weight"].any()
    raw, _ = upgrade_weights(v3_weights(), TINY, neutral=False)
    assert raw["text_balance"] == 0
    assert raw["t5_pool.2.weight"].any()


def test_fresh_parts_have_the_dtype_of_the_file() -> None:
    state, _ = upgrade_weights({key: tensor.half() for key, tensor in v3_weights().items()}, TINY)
    assert state["sol_prior.stat_predictor.0.weight"].dtype == torch.float16


def test_modulation_without_sol_is_dropped_and_with_sol_it_is_kept() -> None:
    v41 = {
        **filled(NO_SOL),
        "double_blocks.0.attn.spatial_to_mod.weight": torch.ones(2, 1, 1, 1),
        "double_blocks.0.attn.spatial_to_mod.bias": torch.ones(2),
    }
    _, report = remap(v41, shapes(NO_SOL))
    assert report.dropped == [
        "double_blocks.0.attn.spatial_to_mod.weight",
        "double_blocks.0.attn.spatial_to_mod.bias",
    ]
    assert not remap(filled(TINY), shapes(TINY))[1].dropped


def test_piece_of_a_part_is_damage_and_strict_raises() -> None:
    given = {**v3_weights(), "t5_pool.0.weight": torch.zeros(32, 24)}
    _, report = upgrade_weights(given, TINY)
    assert report.missing == ["t5_pool.0.bias", "t5_pool.2.weight", "t5_pool.2.bias"]
    with pytest.raises(CheckpointError) as caught:
        upgrade_weights(given, TINY, strict=True, what="old.pt")
    for part in ("old.pt", f"3 of {len(shapes(TINY))} keys", "t5_pool.0.bias, t5_pool.2.weight, t5_pool.2.bias"):
        assert part in str(caught.value)


def test_other_shapes_and_unknown_keys_are_reported_and_strict_raises() -> None:
    given = {**v3_weights(), "img_in.weight": torch.zeros(32, 5), "nobody.knows": torch.zeros(1)}
    state, report = upgrade_weights(given, TINY)
    assert (list(report.mismatched), report.unexpected) == (["img_in.weight"], ["nobody.knows"])
    assert "img_in.weight" not in state
    with pytest.raises(CheckpointError) as caught:
        upgrade_weights(given, TINY, strict=True, what="old.pt")
    assert "1 of 60 keys unexpected (nobody.knows)" in str(caught.value)
    assert "(img_in.weight is [32, 5], expected [32, 4])" in str(caught.value)


def test_report_reads_as_text() -> None:
    _, report = upgrade_weights({**v3_weights(), "guidance_in.mlp.0.weight": torch.zeros(2)}, TINY)
    assert report.lines("old.pt") == [
        "old.pt: 59 tensors loaded, 13 of them under other names",
        "  fresh     28: text_balance, t5_pool (4), sol_prior (19), spatial_to_mod (4)",
        "  dropped   1: guidance_in",
        "  not neutral: Sol's attention temperature starts 70% geometric, the rest untrained",
    ]


# Averages


def test_average_is_renamed_too_and_takes_what_it_lacks_from_the_model() -> None:
    model, _ = upgrade_weights(v3_weights(0), TINY)
    average = {key: tensor for key, tensor in v3_weights(7).items() if not key.startswith("final_linear")}
    state, report = upgrade_weights(average, TINY, model=model, strict=True)
    assert not report.fresh
    assert {"final_linear.weight", "text_balance"} <= set(report.copied)
    assert torch.equal(state["final_linear.weight"], model["final_linear.weight"])
    assert torch.equal(state["lune_predictor.input_proj.bias"], v3_weights(7)["expert_predictor.input_proj.bias"])


def test_averaged_file_that_lacks_keys_takes_them_from_the_model_beside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "cat.safetensors", filled(TINY, 1), TINY.to_dict())
    average = {key: tensor for key, tensor in filled(TINY, 2).items() if not key.startswith(("sol_prior.", "final_"))}
    path = write(tmp_path / "cat_ema.safetensors", average, TINY.to_dict())
    state = load_model(tmp_path / "cat.safetensors", ema=True).state_dict()
    assert torch.equal(state["img_in.weight"], filled(TINY, 2)["img_in.weight"])
    assert torch.equal(state["final_linear.weight"], filled(TINY, 1)["final_linear.weight"])
    assert caplog.messages == [
        f"{path}: lacks 22 keys (sol_prior (19), final_norm.weight, final_linear.weight, final_linear.bias); they are taken "
        f"from {tmp_path / 'cat.safetensors'}"
    ]


# Loading


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_v3_file_is_loaded_as_a_v42_model_and_the_report_is_printed(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"v3{suffix}"
    if suffix == ".pt":
        torch.save({"model": v3_weights(), "model_config": v3_config()}, path)
    else:
        write(path, v3_weights())
    model = load_model(path)
    assert model.config == replace(TINY, lune_dropout=0.0)
    expected, _ = upgrade_weights(v3_weights(), TINY)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert caplog.messages[0] == f"{path}: 59 tensors loaded, 13 of them under other names"
    assert len(caplog.messages) == 3


def test_file_of_this_version_is_loaded_without_a_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_model(write(tmp_path / "a.safetensors", filled(TINY), TINY.to_dict()))
    assert not caplog.messages


def test_part_that_the_config_promises_is_not_made_up(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in filled(TINY).items() if not key.startswith("sol_prior.")}
    path = write(tmp_path / "a.safetensors", state, TINY.to_dict())
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors: is not a TinyFlux-Deep v4.2 checkpoint: 19 of 87 keys mis"
    ):
        load_model(path)


def test_part_that_an_older_config_does_not_mention_is_fresh(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in filled(TINY).items() if not key.startswith(("t5_pool.", "text_balance"))}
    config = {key: value for key, value in TINY.to_dict().items() if key != "use_t5_vec"}
    lines: list[str] = []
    model = load_model(write(tmp_path / "a.safetensors", state, config), report=lines.append)
    assert model.text_balance.item() == 8
    assert lines[1] == "  fresh     5: text_balance, t5_pool (4)"


def test_v3_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    state = v3_weights()
    del state["img_in.bias"]
    path = write(tmp_path / "v3.safetensors", state)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    for part in (str(path), "cannot be upgraded", "1 of 87 keys", "img_in.bias"):
        assert part in str(caught.value)


# The command


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run it; returns its exit code and all that it printed."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        code = tinyflux_upgrade.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_command_writes_a_file_that_loads_without_an_upgrade(
    tmp_path: Path, command: Callable[..., tuple[int, str]], caplog: pytest.LogCaptureFixture
) -> None:
    source, output = write(tmp_path / "v3.safetensors", v3_weights()), tmp_path / "v4.safetensors"
    write(tmp_path / "v3_ema.safetensors", v3_weights(7))
    code, text = command(source, output, "--ema")
    assert code == 0
    assert f"{source}: 59 tensors loaded, 13 of them under other names" in text
    assert f"{output}: 87 tensors for v4" in text
    model, average = load_model(output), load_model(output, ema=True)
    assert not caplog.messages
    expected, _ = upgrade_weights(v3_weights(), TINY, seed=42)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert torch.equal(average.img_in.weight, v3_weights(7)["img_in.weight"])
    # What the average lacks is what the model begins with, not a second draw.
    assert torch.equal(average.sol_prior.stat_predictor[0].weight, model.sol_prior.stat_predictor[0].weight)
    with safe_open(str(output), "pt") as file:
        header = file.metadata()
    assert header["architecture"] == "tinyflux"
    assert load_checkpoint(output).config == replace(TINY, lune_dropout=0.0).to_dict()


def test_command_goes_back_and_its_file_loads_as_the_model_without_later_parts(
    tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    source = write(tmp_path / "v4.safetensors", filled(TINY), TINY.to_dict())
    code, text = command(source, tmp_path / "v3.safetensors", "--to", "v3")
    assert code == 0
    assert "  dropped   28: " in text
    assert set(load_file(tmp_path / "v3.safetensors")) == set(v3_weights())
    model = load_model(tmp_path / "v3.safetensors")
    assert model.config == v3_geometry(TINY)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, filled(TINY)[key]), key


def test_command_explains_what_is_wrong(tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
    source = write(tmp_path / "v3.safetensors", {k: v for k, v in v3_weights().items() if k != "img_in.bias"})
    code, text = command(source, tmp_path / "out.bin")
    assert (code, text) == (2, f"error: {tmp_path / 'out.bin'}: expected a name that ends in .safetensors\n")
    code, text = command(source, tmp_path / "gone" / "out.safetensors")
    assert (code, text) == (1, f"error: {tmp_path / 'gone'}: no such folder\n")
    code, text = command(source, tmp_path / "out.safetensors")
    assert code == 1
    assert f"{source}: cannot be written for v4: 1 of 87 keys missing (img_in.bias)" in text
    assert not (tmp_path / "out.safetensors").exists()
    code, text = command(source, tmp_path / "out.safetensors", "--lenient")
    assert code == 0
    assert "  missing   1: img_in.bias" in text
    assert len(load_file(tmp_path / "out.safetensors")) == 86


@pytest.fixture(autouse=True)
def warnings_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


@pytest.mark.parametrize("taken", ["new.safetensors", "new_ema.safetensors"])
def test_command_replaces_no_file_unless_asked(
    taken: str, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    for name in ("v4", "v4_ema"):
        source = write(tmp_path / f"{name}.safetensors", filled(TINY), TINY.to_dict())
    source = tmp_path / "v4.safetensors"
    (tmp_path / taken).write_bytes(b"mine")
    code, text = command(source, tmp_path / "new.safetensors", "--ema")
    assert code == 2 and f"{tmp_path / taken}: exists already" in text and "--overwrite" in text
    assert (tmp_path / taken).read_bytes() == b"mine" and len(list(tmp_path.glob("new*"))) == 1
    assert command(source, tmp_path / "new.safetensors", "--ema", "--overwrite")[0] == 0
    assert load_file(tmp_path / taken)
