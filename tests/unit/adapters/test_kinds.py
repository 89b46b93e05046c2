"""What is no LoRA, or a LoRA with more, is refused by name, whatever may be ignored; only whole layers are left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from musubi_tuner import convert_lora, lora_post_hoc_ema
from musubi_tuner.adapters import convert, read_adapter
from musubi_tuner.adapters.merging import Merging
from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.registry import MODELS

KOHYA, PEFT = "lora_unet_single_blocks_0_linear2", "transformer.single_transformer_blocks.0.proj_out"


def lora(module: str = KOHYA) -> dict[str, Tensor]:
    names = ("lora_A", "lora_B") if module.startswith("transformer") else ("lora_down", "lora_up")
    return {f"{module}.{names[0]}.weight": torch.ones(2, 240), f"{module}.{names[1]}.weight": torch.ones(48, 2)}


OTHERS = [
    (f"{PEFT}.magnitude", "DoRA of an unknown program"),
    (f"{PEFT}.oft_R.default.weight", "OFT of peft"),
    (f"{PEFT}.boft_s", "OFT of peft"),
    (f"{KOHYA}.lora_mid.weight", "an adapter with Tucker decomposition"),
    ("lycoris_single_blocks_0_linear2.lokr_t2", "an adapter with Tucker decomposition"),
    (f"{PEFT}.ia3_l", r"\(IA\)\^3 of peft"),
    (f"{PEFT}.lora_E", "AdaLoRA"),
    (f"{PEFT}.vera_lambda_b", "VeRA"),
    (f"{PEFT}.lora_B.bias", "a LoRA with biases"),
    (f"{PEFT}.lora_B.default.bias", "a LoRA with biases"),
    (f"{KOHYA}.lora_up.bias", "a LoRA with biases"),
    ("diffusion_model.img_in.diff_b", "a change of biases"),
    ("base_model.model.proj_out.weight", "a whole weight beside a LoRA"),
    ("transformer.transformer_blocks.0.attn.norm_q.weight", "a whole weight beside a LoRA"),
    ("base_model.model.x_embedder.bias", "a whole weight beside a LoRA"),
]


@pytest.mark.parametrize("leaf", ["hada_w1_a", "lokr_w1", "oft_blocks", "a1.weight", "diff"])
def test_parts_of_two_types_in_one_layer_are_refused(leaf: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({**lora(), f"{KOHYA}.{leaf}": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match=f"{KOHYA} has .*{leaf}.*which are of no one type of adapter"):
        read_adapter(path, MODELS["fd"])


@pytest.mark.parametrize(("key", "kind"), OTHERS)
def test_other_kinds_are_refused_by_name_everywhere(
    key: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {**lora(PEFT if "transformer" in key else KOHYA), key: torch.ones(48)}
    save_file(tensors, path)
    for ignore in (False, True):
        with pytest.raises(CheckpointError, match=f"{path}: .*this is {kind}.*which is not supported"):
            read_adapter(path, MODELS["fd"], ignore_unmatched=ignore)
        with pytest.raises(CheckpointError, match=f"this is {kind}"):
            Merging(tensors, [], ignore_unmatched=ignore)
    with pytest.raises(CheckpointError, match=f"this is {kind}"):
        convert(tensors, "comfyui", arch="fd")
    output = str(tmp_path / "out.safetensors")
    assert convert_lora.main(["--input", str(path), "--output", output, "--target", "musubi"]) == 1
    assert lora_post_hoc_ema.main([str(path), str(path), "--output_file", output]) == 1
    assert capsys.readouterr().err.count("which is not supported") == 2
    assert not Path(output).exists()


def test_whole_layers_can_be_left_out_and_parts_of_layers_cannot(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"

    def refused(extra: dict[str, Tensor]) -> Any:
        save_file({**lora(), **extra}, path)
        return pytest.raises(CheckpointError)

    outside = lora("lora_unet_block_of_another_model")
    save_file({**lora(), **outside}, path)
    for family in (MODELS["fd"], None):
        found = read_adapter(path, family, ignore_unmatched=True)
        assert sorted(found.skipped) == sorted(outside) and len(found.tensors) == 3
    for part in (
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
        "lora_unet_double_blocks_0_img_attn_proj.alpha",
    ):
        with refused({part: torch.ones(2, 48)}) as caught:
            read_adapter(path, MODELS["fd"], ignore_unmatched=True)
        assert "has only" in str(caught.value) and "the file is damaged" in str(caught.value)
    for key in (f"{KOHYA}.new_part", f"{KOHYA}.new.part.weight2"):
        with refused({key: torch.ones(2)}) as caught:
            read_adapter(path, MODELS["fd"], ignore_unmatched=True)
        assert f"{key}: is an unknown part of this layer" in str(caught.value)
        with pytest.raises(CheckpointError, match="is an unknown part of this layer"):
            Merging({**lora(), key: torch.ones(2)}, ["single_blocks.0.linear2"], ignore_unmatched=True)
    save_file(outside, path)
    with pytest.raises(CheckpointError, match=r"none of its layers belongs to FLUX\.1-dev"):
        read_adapter(path, MODELS["fd"], ignore_unmatched=True)


def test_what_goes_with_a_lora_is_listed_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lora.safetensors"
    extra = [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.dora_scale",
        "bundle_emb.cat.clip_l",
    ]
    save_file({**lora(), **{key: torch.ones(2, 2) for key in extra}}, path)
    found = read_adapter(path, MODELS["fd"])
    assert sorted(found.skipped) == sorted(extra) and len(found.tensors) == 3
    assert "not used: 3 keys (" in found.remarks
    words = ["--input", str(path), "--output", str(tmp_path / "b.safetensors"), "--target", "musubi"]
    assert convert_lora.main(words) == 0
    printed = capsys.readouterr().out
    assert (
        "left out: 1 keys of embeddings (bundle_emb.cat.clip_l)" in printed
        and printed.count("left out: 2 keys of text encoders (") == 1
    )
    save_file({key: torch.ones(2, 2) for key in extra[2:]}, path)
    with pytest.raises(CheckpointError, match="holds only embedding keys, which are not trained here"):
        read_adapter(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_named(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {key: tensor.clone() for key, tensor in lora().items()}
    tensors[f"{KOHYA}.lora_up.weight"][3, 1] = value
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, path)
    with pytest.raises(
        CheckpointError, match=rf"1 of 2 tensors hold NaN or infinite values \({KOHYA}.lora_up.weight\)"
    ):
        read_adapter(path)


def test_damaged_pairs_and_several_adapters(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    for tensors, message in (
        ({**lora(), f"{KOHYA}.lora_up.weight": torch.ones(48, 3)}, "are of different ranks; the file is damaged"),
        ({**lora(), f"{KOHYA}.alpha": torch.ones(2)}, "its alpha holds 2 values"),
        ({**lora(), **lora("diffusion_model.single_blocks.0.linear2")}, "stands twice in the file"),
        ({f"{PEFT}.lora_{x}.{name}.weight": torch.ones(2, 2) for x in "AB" for name in ("cat", "dog")},
         r"holds several adapters \(cat, dog\)"),
    ):  # fmt: skip
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message):
            read_adapter(path, MODELS["fd"])
