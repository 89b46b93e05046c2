"""T5 in float8: plain and scaled files in both spellings, weights held in float8, and T5 as FLUX.1 wants it, without a mask."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner.encoders.text import TextEncoder, load_t5
from musubi_tuner.memory.frozen_linear import FrozenLinear, quantize_fp8

pytestmark = pytest.mark.usefixtures("offline")
Tensors = dict[str, Tensor]


def open_t5(path: Path, **options: Any) -> TextEncoder:
    settings = {"max_tokens": 16, "dtype": torch.float32, "device": "cpu"} | options
    return load_t5(path, None, "no/where", **settings)


@pytest.fixture
def folder(t5_files: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(t5_files["folder"], tmp_path / "t5"))


def rewrite(folder: Path, tensors: Tensors) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")


def scaled(tensors: Tensors, older: bool) -> tuple[Tensors, Tensors]:
    """Linear weights in scaled fp8, and what they then are."""
    stored: Tensors = {}
    true: Tensors = {}
    for key, tensor in tensors.items():
        layer = key.removesuffix(".weight")
        if any(
            part in key
            for part in ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o", ".wi_", ".wo.")
        ):
            codes, scale = quantize_fp8(tensor, "tensor")
            assert scale is not None
            stored[key], true[key] = codes, codes.float() * scale
            stored[f"{layer}.{'scale_weight' if older else 'weight_scale'}"] = scale
            if older:
                stored[f"{layer}.scale_input"] = torch.tensor(1.0)
            else:
                tag = json.dumps({"format": "float8_e4m3fn"}).encode()
                stored[f"{layer}.comfy_quant"] = torch.tensor(list(tag), dtype=torch.uint8)
        else:
            stored[key] = true[key] = tensor
    if older:
        stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return stored, true


def states(encoder: TextEncoder, texts: list[str]) -> Tensor:
    return encoder.encode(texts).states


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("fp8", [True, False])
def test_scaled_files(older: bool, fp8: bool, folder: Path, texts: list[str]) -> None:
    stored, true = scaled(load_file(folder / "model.safetensors"), older)
    rewrite(folder, true)
    expected = states(open_t5(folder), texts)
    rewrite(folder, stored)
    encoder = open_t5(folder, fp8=fp8)
    assert (states(encoder, texts) - expected).abs().max() < 1e-5
    layers = [layer for layer in encoder.module.modules() if isinstance(layer, FrozenLinear)]
    assert bool(layers) == fp8
    # The file's own values are held: nothing was rounded again.
    assert all(layer.scale is not None and layer.scale.numel() == 1 for layer in layers)


def test_plain_fp8_files(folder: Path, texts: list[str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    codes = {key: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for key, t in tensors.items()}
    rewrite(folder, {key: t.float() for key, t in codes.items()})
    expected = states(open_t5(folder), texts)
    rewrite(folder, codes)
    for fp8 in (False, True):
        assert torch.allclose(states(open_t5(folder, fp8=fp8), texts), expected, atol=1e-5)


def test_weights_of_any_file_can_be_held_in_fp8(folder: Path, texts: list[str]) -> None:
    """Rounding to three mantissa bits, by row, moves the states a little; norms and embeddings keep their precision."""
    expected, encoder = states(open_t5(folder), texts), open_t5(folder, fp8=True)
    found = states(encoder, texts)
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    kinds = {type(layer).__name__ for layer in encoder.module.modules() if getattr(layer, "out_features", None)}
    assert kinds == {"FrozenLinear"}
    assert {p.dtype for p in encoder.module.parameters()} == {torch.float32}


def test_bfloat16_computes_in_bfloat16(folder: Path, texts: list[str]) -> None:
    seen: set[torch.dtype] = set()
    encoder = open_t5(folder, fp8=True, dtype=torch.bfloat16)
    for layer in encoder.module.modules():
        if isinstance(layer, FrozenLinear):
            layer.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    assert states(encoder, texts).isfinite().all()
    assert seen == {torch.bfloat16}


def test_without_a_mask_padding_takes_part(folder: Path, t5: Any, t5_tokenizer: Any, texts: list[str]) -> None:
    tokens = t5_tokenizer(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = t5(input_ids=tokens).last_hidden_state
    found = states(open_t5(folder, masked=False), texts)
    assert (found - expected).abs().max() < 1e-4
    assert (found - states(open_t5(folder), texts)).abs().max() > 1e-3
