"""The commands around LoRA files: rewrite, merge, average. Their mistakes are exit code 2 or 1, never a traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner import convert_lora, lora_post_hoc_ema, merge_lora
from musubi_tuner.lora_post_hoc_ema import betas, power_gamma
from musubi_tuner.models.flux_dev import Flux, FluxConfig
from musubi_tuner.models.tinyflux import TinyFluxConfig
from musubi_tuner.models.tinyflux.state_dict import build
from musubi_tuner.weights.checkpoints import read_weights

CONFIG = FluxConfig(
    vec_in_dim=24, context_in_dim=40, hidden_size=48, num_heads=3, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6)
)
LAYER = "lora_unet_single_blocks_0_linear2"


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lora(
    path: str, value: float = 1.0, metadata: dict[str, str] | None = None, alpha: float = 1.0
) -> dict[str, Tensor]:
    tensors = {
        f"{LAYER}.lora_down.weight": torch.full((2, 240), value),
        f"{LAYER}.lora_up.weight": torch.full((48, 2), value),
        f"{LAYER}.alpha": torch.tensor(alpha),
    }
    save_file(tensors, path, metadata)
    return tensors


def base(path: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = dict(Flux(CONFIG).state_dict())
    save_file(tensors, path)
    Path(path).with_suffix(".json").write_text(json.dumps(CONFIG.to_dict()))
    return tensors


def test_names_there_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = lora("a.safetensors", 0.5, {"ss_steps": "7", "ss_base_model_version": "flux_dev"})
    assert convert_lora.main(["--input", "a.safetensors", "--output", "b.safetensors", "--target", "other"]) == 0
    assert set(load_file("b.safetensors")) == {
        f"diffusion_model.single_blocks.0.linear2.lora_{letter}.weight" for letter in "AB"
    }
    assert convert_lora.main(["--input", "b.safetensors", "--output", "c.safetensors", "--target", "diffusers"]) == 0
    assert convert_lora.main(["--input", "c.safetensors", "--output", "d.safetensors", "--target", "default"]) == 0
    back = load_file("d.safetensors")
    scale = float(back[f"{LAYER}.alpha"]) / 2
    product = back[f"{LAYER}.lora_up.weight"] @ back[f"{LAYER}.lora_down.weight"] * scale
    assert torch.allclose(product, tensors[f"{LAYER}.lora_up.weight"] @ tensors[f"{LAYER}.lora_down.weight"] / 2)
    with safe_open("d.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"] == "7" and len(file.metadata()["sshs_model_hash"]) == 64
    assert "d.safetensors: 3 tensors under musubi names, for FLUX.1-dev" in capsys.readouterr().out


def test_text_encoder_keys_are_listed_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = lora("a.safetensors") | {"lora_te1_x.lora_down.weight": torch.zeros(1, 1)}
    save_file(tensors, "a.safetensors")
    assert convert_lora.main(["--input", "a.safetensors", "--output", "b.safetensors", "--target", "comfyui"]) == 0
    assert "left out: 1 keys of text encoders (lora_te1_x.lora_down.weight)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--input", "a.safetensors", "--output", "b.bin", "--target", "musubi"],
            2,
            "expected a name that ends in .safetensors",
        ),
        (["--input", "a.safetensors", "--output", "b.safetensors", "--target", "sdnext"], 2, "invalid choice"),
        (
            ["--input", "no.safetensors", "--output", "b.safetensors", "--target", "musubi"],
            1,
            "no.safetensors: file not found",
        ),
        (
            ["--input", "a.safetensors", "--output", "b.safetensors", "--target", "musubi", "--arch", "xl"],
            2,
            "--arch xl",
        ),
        (
            ["--input", "a.safetensors", "--output", "b.safetensors", "--target", "musubi", "--arch", "tf"],
            1,
            "keys belong to no layer of TinyFlux-Deep",
        ),
    ],
)
def test_mistakes_in_converting(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lora("a.safetensors")
    assert convert_lora.main(arguments) == code
    assert message in capsys.readouterr().err
    assert not Path("b.safetensors").exists()


def test_merging_two_files() -> None:
    before = base("base.safetensors")
    lora("a.safetensors", 0.1)
    lora("b.safetensors", 0.2)
    arguments = ["--dit", "base.safetensors", "--lora_weight", "a.safetensors", "b.safetensors", "--lora_multiplier", "1", "0.5",
                 "--save_merged_model", "merged.safetensors"]  # fmt: skip
    assert merge_lora.main(arguments) == 0
    after = load_file("merged.safetensors")
    key = "single_blocks.0.linear2.weight"
    assert torch.allclose(after[key], before[key] + 0.1 * 0.1 + 0.5 * 0.2 * 0.2, atol=1e-6)
    assert all(torch.equal(after[name], before[name]) for name in before if name != key)
    with safe_open("merged.safetensors", "pt") as file:
        assert file.metadata()["modelspec.merged_from"] == "a.safetensors, b.safetensors"


def test_merging_keeps_the_precision_of_the_model() -> None:
    tensors = {key: tensor.bfloat16() for key, tensor in base("base.safetensors").items()}
    save_file(tensors, "base.safetensors")
    lora("a.safetensors", 0.1)
    merge_lora.main(
        ["--dit", "base.safetensors", "--lora_weight", "a.safetensors", "--save_merged_model", "m.safetensors"]
    )
    assert {tensor.dtype for tensor in load_file("m.safetensors").values()} == {torch.bfloat16}


def test_merging_into_fp8_gives_bfloat16() -> None:
    """8 bits cannot hold a small change; the description of the quantised layers goes with them."""
    key, scale = "single_blocks.0.linear2.weight", torch.tensor(0.01)
    tensors = {name: tensor.bfloat16() for name, tensor in base("base.safetensors").items()}
    codes = (tensors[key].float() / scale).to(torch.float8_e4m3fn)
    stored = {**tensors, key: codes, key.replace(".weight", ".weight_scale"): scale}
    layers = json.dumps({"layers": {"single_blocks.0.linear2": {"format": "float8_e4m3fn"}}})
    save_file(stored, "base.safetensors", {"_quantization_metadata": layers})
    lora("a.safetensors", 0.1)
    arguments = ["--dit", "base.safetensors", "--lora_weight", "a.safetensors", "--save_merged_model", "m.safetensors"]
    assert merge_lora.main(arguments) == 0
    after = load_file("m.safetensors")
    assert set(after) == set(tensors) and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert torch.equal(after[key], ((codes.float() * scale).bfloat16().float() + 0.1 * 0.1).bfloat16())
    with safe_open("m.safetensors", "pt") as file:
        assert "_quantization_metadata" not in file.metadata()


def test_a_merged_model_hides_padding_where_its_adapter_did(capsys: pytest.CaptureFixture[str]) -> None:
    geometry = TinyFluxConfig(
        hidden_size=32, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6), joint_attention_dim=8,
        pooled_projection_dim=8, num_double_layers=1, num_single_layers=1,
    )  # fmt: skip
    save_file(dict(build(geometry).to_empty(device="cpu").state_dict()), "base.safetensors",
              {"config_json": json.dumps(geometry.to_dict())})  # fmt: skip
    names = ("double_blocks_0_attn_img_qkv.lora_down", "double_blocks_0_attn_img_qkv.lora_up")
    shapes = ((2, 32), (3 * 32, 2))
    tensors = {f"lora_unet_{name}.weight": torch.ones(shape) for name, shape in zip(names, shapes)}
    for hides in (False, True):
        save_file(tensors, "a.safetensors", {"options_json": json.dumps({"t5_attn_mask": hides})})
        arguments = [
            "--dit",
            "base.safetensors",
            "--lora_weight",
            "a.safetensors",
            "--save_merged_model",
            "m.safetensors",
            "--overwrite",
        ]
        assert merge_lora.main(arguments) == 0
        assert ("note: padding is hidden (model.t5_attn_mask = true)" in capsys.readouterr().out) == hides
        assert read_weights(Path("m.safetensors")).options.get("t5_attn_mask", False) == hides


def test_mistakes_in_merging(capsys: pytest.CaptureFixture[str]) -> None:
    base("base.safetensors")
    tensors = lora("a.safetensors")
    deeper = {key.replace("blocks_0", "blocks_7"): tensor for key, tensor in tensors.items()}
    save_file(deeper, "deep.safetensors")
    common = ["--dit", "base.safetensors", "--save_merged_model", "m.safetensors"]
    assert merge_lora.main([*common, "--lora_weight", "a.safetensors", "--lora_multiplier", "1", "2"]) == 2
    assert "has 2 numbers for 1 files" in capsys.readouterr().err
    assert merge_lora.main([*common, "--lora_weight", "deep.safetensors"]) == 1
    assert "3 keys belong to no layer of this model (lora_unet_single_blocks_7_linear2" in capsys.readouterr().err
    assert not Path("m.safetensors").exists()
    assert merge_lora.main([*common, "--lora_weight", "deep.safetensors", "--ignore_unmatched"]) == 0
    assert "not used: lora_unet_single_blocks_7_linear2" in capsys.readouterr().out


def test_average_goes_by_training_steps() -> None:
    lora("late.safetensors", 3.0, {"ss_steps": "30", "ss_output_name": "late"})
    lora("early.safetensors", 1.0, {"ss_steps": "10"})
    lora("middle.safetensors", 2.0, {"ss_steps": "20"})
    arguments = [
        "late.safetensors",
        "early.safetensors",
        "middle.safetensors",
        "--output_file",
        "ema.safetensors",
        "--beta",
        "0.5",
    ]
    assert lora_post_hoc_ema.main(arguments) == 0
    found = load_file("ema.safetensors")
    assert float(found[f"{LAYER}.lora_up.weight"][0, 0]) == pytest.approx(0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 3)
    assert float(found[f"{LAYER}.alpha"]) == 1
    with safe_open("ema.safetensors", "pt") as file:
        assert file.metadata()["ss_output_name"] == "late"


def test_files_of_every_type_are_averaged() -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        parts = {"oft_blocks": torch.full((4, 2, 2), value), "weight": torch.full((3,), value), "lokr_w1": torch.full((2, 2), value),
                 "hada_w1_a": torch.full((2, 2), value), "diff": torch.full((2, 2), value), "on_input": torch.tensor(1)}  # fmt: skip
        save_file(
            {
                f"lycoris_single_blocks_{index}_linear2.{leaf}": tensor
                for index, (leaf, tensor) in enumerate(parts.items())
            },
            f"{name}.safetensors",
        )
    files = ["a.safetensors", "b.safetensors", "--no_sort", "--beta", "0.95", "--output_file", "ema.safetensors"]
    assert lora_post_hoc_ema.main(files) == 0
    for key, tensor in load_file("ema.safetensors").items():
        expected = torch.ones_like(tensor) if key.endswith("on_input") else torch.full_like(tensor, 1.05)
        torch.testing.assert_close(tensor, expected)


def test_shares_of_the_average() -> None:
    assert betas(3, 0.9, None, None) == [0.9, 0.9, 0.9]
    assert betas(3, 0.8, 0.9, None) == pytest.approx([0.8, 0.85, 0.9])
    gamma = power_gamma(0.1)
    assert gamma == pytest.approx(6.937, abs=1e-2)  # the paper's value for a relative width of 0.1 is 6.94
    assert betas(3, 0, None, 0.1) == pytest.approx([0, 0.5 ** (gamma + 1), (2 / 3) ** (gamma + 1)])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["a.safetensors"], 2, "needs at least two files"),
        (["a.safetensors", "b.safetensors", "--beta", "1"], 2, "--beta 1: expected at least 0 and below 1"),
        (["a.safetensors", "b.safetensors", "--sigma_rel", "0.5"], 2, "--sigma_rel 0.5"),
        (["a.safetensors", "no.safetensors"], 2, "no.safetensors: no such file"),
        (["a.safetensors", "alpha.safetensors"], 1, "alpha is 2, in a.safetensors 1"),
        (["a.safetensors", "other.safetensors"], 1, "has other keys than a.safetensors"),
    ],
)
def test_mistakes_in_averaging(options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        lora(f"{name}.safetensors")
    lora("alpha.safetensors", alpha=2.0)
    save_file({"x": torch.zeros(1)}, "other.safetensors")
    assert lora_post_hoc_ema.main([*options, "--output_file", "ema.safetensors", "--no_sort"]) == code
    assert message in capsys.readouterr().err
    assert not Path("ema.safetensors").exists()


# What is there already


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (convert_lora.main, ["--input", "a.safetensors", "--target", "comfyui", "--output"]),
        (merge_lora.main, ["--dit", "base.safetensors", "--lora_weight", "a.safetensors", "--save_merged_model"]),
        (lora_post_hoc_ema.main, ["a.safetensors", "b.safetensors", "--output_file"]),
    ],
)
def test_a_file_is_only_replaced_where_that_is_asked_for(
    command: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base("base.safetensors")
    for name in ("a", "b"):
        lora(f"{name}.safetensors", metadata={"ss_base_model_version": "flux_dev"})
    Path("mine.safetensors").write_bytes(b"mine")
    assert command([*arguments, "mine.safetensors"]) == 2
    assert "mine.safetensors: exists already; choose another name, or add --overwrite" in capsys.readouterr().err
    assert Path("mine.safetensors").read_bytes() == b"mine"
    assert command([*arguments, "mine.safetensors", "--overwrite"]) == 0
    assert load_file("mine.safetensors")
