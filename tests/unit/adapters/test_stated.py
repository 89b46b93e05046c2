"""Alphas are found wherever other programs keep them, count as those count them, and it is said where they are from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner import convert_lora, lora_post_hoc_ema, merge_lora
from musubi_tuner.adapters import read_adapter
from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.flux_dev import Flux, FluxConfig

RANK = 4
ATTENTION, MLP = "transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.proj_out"
Factors = dict[str, float]


def pair(module: str, names: tuple[str, str] = ("lora_A", "lora_B"), rank: int = RANK) -> dict[str, Tensor]:
    """A LoRA of ones, whose change is everywhere its rank times alpha / rank."""
    return {f"{module}.{names[0]}.weight": torch.ones(rank, 48), f"{module}.{names[1]}.weight": torch.ones(48, rank)}


def peft(prefix: str = "transformer.", **ranks: int) -> dict[str, Tensor]:
    """Two layers under names of peft, and of different ranks if asked."""
    return pair(f"{prefix}{ATTENTION}", rank=ranks.get("attention", RANK)) | pair(f"{prefix}{MLP}")


def factors(path: Path | str, **options: Any) -> Factors:
    """alpha / rank of each layer of a file as it is read, by our path."""
    tensors = read_adapter(path, **options).tensors
    return {
        key.removeprefix("lora_unet_").removesuffix(".alpha"): float(alpha) / len(tensors[key.replace("alpha", "lora_down.weight")])
        for key, alpha in tensors.items()
        if key.endswith(".alpha")
    }  # fmt: skip


def both(attention: float, mlp: float | None = None) -> Factors:
    return {
        "double_blocks_0_img_attn_proj": attention,
        "single_blocks_0_linear2": attention if mlp is None else mlp,
    }


# peft's settings -> factors of both layers
SETTINGS: list[tuple[dict[str, Any], Factors]] = [
    ({"lora_alpha": 32, "r": RANK}, both(8)),
    ({"lora_alpha": 2, "r": RANK, "target_modules": ["to_out.0", "proj_out"]}, both(0.5)),
    ({"lora_alpha": 16, "r": RANK, "use_rslora": True}, both(8)),
    ({"lora_alpha": 16, "r": RANK, "alpha_pattern": {ATTENTION: 2}}, both(0.5, 4)),
    ({"lora_alpha": 16, "r": RANK, "alpha_pattern": {f"^{MLP}": 8, "proj_out": 1}}, both(4, 2)),
    ({"lora_alpha": 16, "r": RANK, "alpha_pattern": {"out.0": 1}}, both(4)),  # no whole part of the path
    ({"lora_alpha": 16, "r": 8, "rank_pattern": {r".*\.to_out\.0": RANK, "proj_out": RANK}}, both(4)),
]
BEFORE_COMPONENT = ["flat JSON", "nested JSON", "plain JSON", "flat entries", "plain entries"]


def header(place: str, settings: dict[str, Any]) -> dict[str, str]:
    """A header that states settings in one of the ways in use."""
    flat = {f"transformer.{key}": value for key, value in settings.items()}
    if place == "flat JSON":
        other = {"text_encoder.lora_alpha": 1, "text_encoder.r": 1}
        return {"lora_adapter_metadata": json.dumps(flat | other)}
    if place == "nested JSON":
        return {
            "lora_adapter_metadata": json.dumps({"transformer": settings, "text_encoder": {"lora_alpha": 1, "r": 1}})
        }
    if place == "plain JSON":
        return {"lora_adapter_metadata": json.dumps(settings)}
    entries = flat if place == "flat entries" else settings
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}


@pytest.mark.parametrize("place", BEFORE_COMPONENT)
@pytest.mark.parametrize(("settings", "expected"), SETTINGS, ids=lambda value: str(value)[:60])
def test_settings_in_the_header_count(place: str, settings: dict[str, Any], expected: Factors, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(peft(), path, header(place, settings))
    assert factors(path) == pytest.approx(expected)
    found = read_adapter(path)
    assert "header" in found.remarks and ("rs-LoRA" in found.remarks) == ("use_rslora" in settings)
    # They are tensors now; a header that still told of them would be read once more.
    assert not set(found.metadata) & set(header(place, settings))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "my cat.safetensors"])
@pytest.mark.parametrize(("settings", "expected"), SETTINGS, ids=lambda value: str(value)[:60])
def test_settings_beside_the_file_count(name: str, settings: dict[str, Any], expected: Factors, tmp_path: Path) -> None:
    path = tmp_path / name
    save_file(peft("base_model.model."), path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}), encoding="utf-8-sig")
    assert factors(path) == pytest.approx(expected)
    assert "from adapter_config.json beside it" in read_adapter(path).remarks
    assert factors(tmp_path) == pytest.approx(expected)  # the folder of peft


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin"])
def test_folders_of_peft_and_diffusers(name: str, tmp_path: Path) -> None:
    if name.endswith(".bin"):
        torch.save(peft(), tmp_path / name)
    else:
        save_file(peft(), tmp_path / name)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 32, "r": RANK}))
    for ema in (False, True):
        assert factors(tmp_path, ema=ema) == both(8)


def test_several_files_beside_one_config(tmp_path: Path) -> None:
    for name in ("epoch 1", "epoch 2"):
        save_file(peft(), tmp_path / f"{name}.safetensors")
    save_file(peft(attention=8), tmp_path / "other rank.safetensors")
    save_file(pair("transformer.transformer_blocks.0.attn.to_add_out"), tmp_path / "other layers.safetensors")
    config = {"lora_alpha": 32, "r": RANK, "target_modules": ["to_out.0", "proj_out"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert factors(tmp_path / "epoch 1.safetensors") == both(8)
    assert "beside it (and beside 3 other files)" in read_adapter(tmp_path / "epoch 1.safetensors").remarks
    assert factors(tmp_path / "other rank.safetensors") == both(1)
    remarks = read_adapter(tmp_path / "other rank.safetensors").remarks
    assert "no alpha is stated, so it counts as the rank" in remarks and "of another adapter (it says rank 4" in remarks
    assert "it says no target_modules for" in read_adapter(tmp_path / "other layers.safetensors").remarks
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ".*attn.*"}))
    assert "target_modules that do not match" in read_adapter(tmp_path / "epoch 1.safetensors").remarks
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": "all-linear"}))
    assert factors(tmp_path / "epoch 1.safetensors") == both(8)


def test_the_header_is_nearer_than_a_file_beside(tmp_path: Path) -> None:
    path, config = tmp_path / "lora.safetensors", tmp_path / "adapter_config.json"
    save_file(peft(), path, header("flat JSON", {"lora_alpha": 8, "r": RANK}))
    config.write_text(json.dumps({"lora_alpha": 32, "r": RANK}))
    assert factors(path) == both(2)
    assert "adapter_config.json beside it says otherwise and is not used" in read_adapter(path).remarks
    config.write_text(json.dumps({"lora_alpha": 8, "r": RANK}))
    assert "otherwise" not in read_adapter(path).remarks
    save_file(peft(), path, header("flat entries", {"r": RANK}))  # tells of no alpha
    assert factors(path) == both(2)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "base_model.model.", ""])
def test_tensors_of_the_file_are_nearest(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = peft(prefix) | {f"{prefix}{ATTENTION}.alpha": torch.tensor(2.0)}
    save_file(tensors, path, header("flat entries", {"lora_alpha": 16, "r": RANK}))
    assert factors(path) == both(0.5, 4)
    save_file(tensors, path)
    assert factors(path) == both(0.5, 1)
    assert "no alpha is stated for 1 of 2 layers, so it counts as the rank" in read_adapter(path).remarks
    save_file(tensors | {f"{prefix}{MLP}.alpha": torch.tensor([1.0])}, path, {"ss_network_alpha": "7"})
    assert factors(path) == both(0.5, 0.25) and read_adapter(path).remarks == ""


def test_a_file_without_any_alpha_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(peft(), path, {"software": '{"name": "ai-toolkit"}', "training_info": '{"step": 7}'})
    assert factors(path) == both(1)
    assert (
        convert_lora.main(["--input", str(path), "--output", str(tmp_path / "b.safetensors"), "--target", "musubi"])
        == 0
    )
    assert f"{path}: no alpha is stated, so it counts as the rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"ss_network_alpha": "8", "ss_network_dim": "4"}, 2.0),
        ({"ss_network_alpha": "8", "ss_network_dim": "16"}, 1.0),  # of another rank
        ({"ss_network_alpha": "8", "ss_network_dim": "Dynamic"}, 1.0),
        ({"ss_network_alpha": "None", "ss_network_dim": "4"}, 1.0),
        ({"network_alpha": "8"}, 2.0),
    ],
)
def test_alpha_in_the_header_of_kohya(entries: dict[str, str], expected: float, tmp_path: Path) -> None:
    """It counts for its own names alone: musubi-tuner's converter keeps the entries and folds alpha into other names."""
    path, names = tmp_path / "lora.safetensors", ("lora_down", "lora_up")
    modules = ("lora_unet_double_blocks_0_img_attn_proj", "lora_unet_single_blocks_0_linear2")
    save_file(pair(modules[0], names) | pair(modules[1], names), path, entries)
    assert factors(path) == both(expected)
    save_file(peft(), path, entries)
    assert factors(path) == both(expected if "network_alpha" in entries else 1.0)
    if "ss_network_alpha" in entries and entries["ss_network_alpha"] != "None":
        assert "ss_network_alpha 8 of its header is that of the training and is not used" in read_adapter(path).remarks


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("{", "what it says about its alphas cannot be read"),
        ("[1]", "adapter_config.json beside it is no JSON object"),
        ({"lora_alpha": "much", "r": 4}, "alphas cannot be read"),
        ({"lora_alpha": float("nan"), "r": 4}, "lora_alpha|alpha is nan, expected a number"),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": [1]}, "alpha_pattern is .*, expected an object"),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"(": 1}}, "alphas cannot be read"),
        ({"lora_alpha": 8, "r": 16}, r"adapter_config.json beside it does not fit its tensors: it says rank 16 for .*, which has 4"),
        ({"lora_alpha": 8, "r": 4, "use_dora": True}, "says that this is DoRA, whose norms .* are not in the file"),
        ({"lora_alpha": 8, "r": 4, "lora_bias": True}, "says that this is a LoRA with biases"),
        ({"lora_alpha": 8, "r": 4, "peft_type": "ADALORA"}, "says that this is ADALORA"),
        ({"lora_alpha": 8, "r": 4, "init_lora_weights": "pissa_niter_16"}, "changes the model's own weights too"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be_used(stated: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file(peft(), path)
    text = stated if isinstance(stated, str) else json.dumps(stated)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(path)
    assert str(caught.value).startswith(f"{path}: ")
    if isinstance(stated, dict):
        (tmp_path / "adapter_config.json").unlink()
        save_file(peft(), path, {"lora_adapter_metadata": json.dumps(stated)})
        with pytest.raises(CheckpointError):
            read_adapter(path)


def test_every_command_takes_the_alpha_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = FluxConfig(
        vec_in_dim=24,
        context_in_dim=40,
        hidden_size=48,
        num_heads=3,
        depth=1,
        depth_single_blocks=1,
        axes_dim=(4, 6, 6),
    )
    base = {key: tensor.detach() for key, tensor in Flux(config).state_dict().items()}
    save_file(base, "base.safetensors")
    Path("base.json").write_text(json.dumps(config.to_dict()))
    Path("one").mkdir()
    tensors = pair(f"transformer.{ATTENTION}")
    save_file(tensors, "one/cat.safetensors")
    Path("one/adapter_config.json").write_text(json.dumps({"lora_alpha": 32, "r": RANK}))
    said = "alpha 32 from adapter_config.json beside it"
    merged = ["--dit", "base.safetensors", "--arch", "fd", "--save_merged_model", "merged.safetensors"]
    assert merge_lora.main([*merged, "--lora_weight", "one"]) == 0
    change = (
        load_file("merged.safetensors")["double_blocks.0.img_attn.proj.weight"]
        - base["double_blocks.0.img_attn.proj.weight"]
    )
    assert torch.allclose(change, torch.full((48, 48), 32.0), atol=1e-4)
    assert said in capsys.readouterr().out
    # The average lies elsewhere, where no config tells of alpha.
    assert (
        lora_post_hoc_ema.main(["one/cat.safetensors", "one/cat.safetensors", "--output_file", "ema.safetensors"]) == 0
    )
    assert factors("ema.safetensors") == {"double_blocks_0_img_attn_proj": 8.0}
    assert said in capsys.readouterr().out
    Path("two").mkdir()
    save_file(tensors, "two/cat.safetensors")
    Path("two/adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": RANK}))
    words = ["one/cat.safetensors", "two/cat.safetensors", "--output_file", "ema2.safetensors"]
    assert lora_post_hoc_ema.main(words) == 1
    assert "other alphas are stated for it than for cat.safetensors" in capsys.readouterr().err


def test_a_converted_file_is_not_scaled_twice(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    entries = {"ss_network_dim": "4", "ss_network_alpha": "16", "ss_output_name": "cat"}
    save_file(peft(), source, {**header("flat entries", {"lora_alpha": 16, "r": RANK}), **entries})
    for name in ("diffusers", "comfyui", "musubi"):
        assert (
            convert_lora.main(["--input", str(source), "--output", str(target), "--target", name, "--overwrite"]) == 0
        )
        found = read_adapter(target)
        key = "lora_unet_single_blocks_0_linear2"
        product = found.tensors[f"{key}.lora_up.weight"] @ found.tensors[f"{key}.lora_down.weight"]
        assert torch.equal(product * factors(target)["single_blocks_0_linear2"], torch.full((48, 48), 16.0))
        assert found.metadata["ss_output_name"] == "cat"
        assert found.metadata["ss_network_alpha"] == ("16" if name == "musubi" else "4")
