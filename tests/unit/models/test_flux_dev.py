"""FLUX.1 files: every accepted form gives the same model, everything else is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from musubi_tuner.config import load_document
from musubi_tuner.errors import CacheError, CheckpointError
from musubi_tuner.memory.frozen_linear import FrozenLinear, quantize_fp8
from musubi_tuner.memory.storage import Freeze, Storing
from musubi_tuner.models.flux_dev import Flux, FluxConfig, load_model
from musubi_tuner.models.flux_dev.conditioning import pooled_text, text_states
from musubi_tuner.models.flux_dev.family import load_for_training
from musubi_tuner.models.flux_dev.state_dict import (
    check_uniform,
    diffusers_config,
    load_checkpoint,
    to_bfl,
    to_diffusers,
)
from musubi_tuner.models.registry import MODELS
from musubi_tuner.weights.stored import StoredWeight

pytestmark = pytest.mark.long

CONFIG = FluxConfig(
    vec_in_dim=24, context_in_dim=40, hidden_size=48, num_heads=3, depth=2, depth_single_blocks=3, axes_dim=(4, 6, 6)
)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> Flux:
    torch.manual_seed(0)
    built = Flux(CONFIG).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return built


@pytest.fixture(scope="module")
def weights(model: Flux) -> Tensors:
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def output(model: Flux) -> Tensor:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.tensor([[0, row, column] for row in range(2) for column in range(3)]).float()[None].expand(2, -1, -1)
    with torch.no_grad():
        return model(
            draw(2, 6, 64),
            ids,
            draw(2, 5, 40),
            torch.zeros(2, 5, 3),
            torch.tensor([0.3, 0.8]),
            draw(2, 24),
            torch.ones(2),
        )


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None, config: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    if config:
        (path.parent / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return path


def assert_loads(path: Path, model: Flux, tolerance: float = 1e-5) -> None:
    found = output(load_model(path, dtype=torch.float32))
    assert (found - output(model)).abs().max() <= tolerance


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
def test_prefixes(prefix: str, model: Flux, weights: Tensors, tmp_path: Path) -> None:
    path = write(tmp_path / "flux.safetensors", {prefix + key: tensor for key, tensor in weights.items()})
    assert_loads(path, model, 0)


def test_whole_checkpoint_of_comfyui(
    model: Flux, weights: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = {"vae.decoder.conv_in.weight": torch.zeros(2), "text_encoders.clip_l.transformer.x": torch.zeros(2)}
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in weights.items()} | others
    assert_loads(write(tmp_path / "all.safetensors", tensors), model, 0)
    assert "2 other tensors are not" in caplog.text


def test_folder_of_diffusers_in_one_file_and_in_shards(model: Flux, weights: Tensors, tmp_path: Path) -> None:
    tensors = to_diffusers(weights, CONFIG)
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    for folder in (whole, shards):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(diffusers_config(CONFIG)))
    write(whole / "diffusion_pytorch_model.safetensors", tensors, config=False)
    names = sorted(tensors)
    index = {}
    for number, keys in enumerate((names[:30], names[30:]), start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        write(shards / name, {key: tensors[key] for key in keys}, config=False)
        index.update(dict.fromkeys(keys, name))
    (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_loads(whole, model)
    assert_loads(shards, model)
    nested = tmp_path / "pipeline"
    nested.mkdir()
    whole.rename(nested / "transformer")
    assert_loads(nested, model)


def test_shards_without_an_index_are_found_by_their_names(model: Flux, weights: Tensors, tmp_path: Path) -> None:
    names = list(weights)
    for number, part in enumerate((names[:20], names[20:40], names[40:]), start=1):
        write(tmp_path / f"flux-{number:05d}-of-00003.safetensors", {key: weights[key] for key in part})
    assert_loads(tmp_path / "flux-00002-of-00003.safetensors", model, 0)
    assert_loads(tmp_path / "flux-00001-of-00003.safetensors", model, 0)
    (tmp_path / "flux-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"flux-00003-of-00003.safetensors: is missing; .* is one of 3 parts"):
        load_checkpoint(tmp_path / "flux-00001-of-00003.safetensors")


def scaled(weights: Tensors, shape: str, older: bool, prefix: str = "") -> tuple[Tensors, Tensors]:
    """Blocks in scaled fp8, and what the weights then are."""
    stored: Tensors = {}
    true = dict(weights)
    for key, tensor in weights.items():
        layer = key.removesuffix(".weight")
        if key.endswith(".weight") and "_blocks." in key and tensor.ndim == 2:
            fp8, scale = quantize_fp8(tensor, shape)  # type: ignore[arg-type]
            assert scale is not None
            stored[prefix + key] = fp8
            stored[f"{prefix}{layer}.{'scale_weight' if older else 'weight_scale'}"] = scale
            stored[f"{prefix}{layer}.{'scale_input' if older else 'input_scale'}"] = torch.tensor(1.0)
            if not older:
                tag = json.dumps({"format": "float8_e4m3fn"}).encode()
                stored[f"{prefix}{layer}.comfy_quant"] = torch.tensor(list(tag), dtype=torch.uint8)
            values = fp8.float() * scale if scale.ndim < 3 else (
                fp8.float().view(len(fp8), scale.shape[1], -1) * scale
            ).view(fp8.shape)  # fmt: skip
            true[key] = values
        else:
            stored[prefix + key] = tensor
    if older:
        stored[f"{prefix}scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return stored, true


@pytest.mark.parametrize("shape", ["tensor", "row", "block"])
@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8(shape: str, older: bool, prefix: str, weights: Tensors, tmp_path: Path) -> None:
    stored, true = scaled(weights, shape, older, prefix)
    expected = Flux(CONFIG)
    expected.load_state_dict(true)
    assert_loads(write(tmp_path / "fp8.safetensors", stored), expected.eval(), 0)


@pytest.mark.parametrize("shape", ["tensor", "row", "block", None])
@pytest.mark.parametrize("wanted", ["tensor", "row", "block"])
def test_fp8_of_a_file_is_kept_bit_for_bit(shape: Any, wanted: Any, tmp_path: Path) -> None:
    """With the scales of the file, whatever the run would choose: rescaling would round twice."""
    config = dataclasses.replace(CONFIG, hidden_size=128, num_heads=2, axes_dim=(8, 28, 28))
    torch.manual_seed(0)
    weights = Flux(config).state_dict()
    if shape is None:
        stored = {
            key: tensor.to(torch.float8_e4m3fn) if ".linear" in key and tensor.ndim == 2 else tensor
            for key, tensor in weights.items()
        }
    else:
        stored, _ = scaled(weights, shape, older=False)
    path = write(tmp_path / "fp8.safetensors", stored)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    loaded = load_model(path, freeze=Freeze("fp8_scaled", MODELS["fd"].quantizable, scale=wanted))
    layers = [(name, layer) for name, layer in loaded.named_modules() if isinstance(layer, FrozenLinear)]
    kept = [(name, layer) for name, layer in layers if stored[f"{name}.weight"].dtype == torch.float8_e4m3fn]
    assert len(kept) == (6 if shape is None else len(layers))
    for name, layer in kept:
        codes, scale = stored[f"{name}.weight"], stored.get(f"{name}.weight_scale")
        assert layer.stored is not None and layer.stored.dtype == codes.dtype
        assert torch.equal(layer.stored.view(torch.uint8), codes.view(torch.uint8))
        assert (layer.scale is None) == (scale is None)
        if scale is not None:
            assert scale.ndim == {"tensor": 0, "row": 2, "block": 3}[shape]
            assert layer.scale is not None and layer.scale.dtype == torch.float32 and torch.equal(layer.scale, scale)


def test_scaled_fp8_described_in_the_header(weights: Tensors, tmp_path: Path) -> None:
    stored, true = scaled(weights, "tensor", older=False)
    layers = {
        key.removesuffix(".comfy_quant"): {"format": "float8_e4m3fn"} for key in stored if key.endswith(".comfy_quant")
    }
    stored = {key: tensor for key, tensor in stored.items() if not key.endswith(".comfy_quant")}
    expected = Flux(CONFIG)
    expected.load_state_dict(true)
    path = write(tmp_path / "fp8.safetensors", stored, {"_quantization_metadata": json.dumps({"layers": layers})})
    assert_loads(path, expected.eval(), 0)
    layers[next(iter(layers))] = {"format": "nvfp4"}
    path = write(tmp_path / "fp8.safetensors", stored, {"_quantization_metadata": json.dumps({"layers": layers})})
    with pytest.raises(CheckpointError, match="is stored as nvfp4, which cannot be read; known: float8_e4m3fn"):
        load_model(path)


def test_plain_fp8(weights: Tensors, tmp_path: Path) -> None:
    stored = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in weights.items()}
    expected = Flux(CONFIG)
    expected.load_state_dict({key: tensor.float() for key, tensor in stored.items()})
    assert_loads(write(tmp_path / "fp8.safetensors", stored), expected.eval(), 0)


def test_fp8_is_not_computed_in(weights: Tensors, tmp_path: Path) -> None:
    stored = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in weights.items()}
    path = write(tmp_path / "fp8.safetensors", stored)
    with pytest.raises(
        CheckpointError, match=r"stored in float8, in which nothing can be computed: leave model\.keep_dtype"
    ):
        load_model(path, dtype=None)


def test_dtype_is_the_one_asked_for_or_that_of_the_file(weights: Tensors, tmp_path: Path) -> None:
    path = write(tmp_path / "flux.safetensors", {key: tensor.bfloat16() for key, tensor in weights.items()})
    assert {p.dtype for p in load_model(path, dtype=torch.float32).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(path, dtype=None).parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in load_model(path).parameters())


def test_blocks_of_different_dtypes_are_refused(weights: Tensors) -> None:
    mixed = {key: t.bfloat16() if key.startswith("single_blocks.1.") else t for key, t in weights.items()}
    with pytest.raises(
        CheckpointError, match=r"single_blocks.0.linear1.weight is torch.float32 and single_blocks.1.linear1"
    ):
        check_uniform({key: StoredWeight.of(tensor) for key, tensor in mixed.items()}, "file")


def test_number_of_blocks_is_that_of_the_file(weights: Tensors, tmp_path: Path) -> None:
    pruned = {
        key: tensor for key, tensor in weights.items() if not key.startswith(("double_blocks.1.", "single_blocks.2."))
    }
    loaded = load_model(write(tmp_path / "flux.safetensors", pruned))
    assert (loaded.config.depth, loaded.config.depth_single_blocks) == (1, 2)


def changed(weights: Tensors, change: str) -> Tensors:
    tensors = dict(weights)
    if change == "schnell":
        return {key: tensor for key, tensor in tensors.items() if not key.startswith("guidance_in.")}
    if change == "fill":
        return {**tensors, "img_in.weight": torch.zeros(3072, 384)}
    if change == "depth":
        return {**tensors, "img_in.weight": torch.zeros(3072, 128)}
    if change == "nf4":
        return {**tensors, "double_blocks.0.img_attn.qkv.weight.absmax": torch.zeros(1)}
    if change == "flux2":
        return {**tensors, "double_stream_modulation_img.lin.weight": torch.zeros(1)}
    if change == "lora":
        return {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 2)}
    if change == "t5":
        return {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}
    if change == "clip":
        return {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}
    if change == "vae":
        return {"encoder.conv_in.weight": torch.zeros(2), "decoder.conv_in.weight": torch.zeros(2)}
    if change == "missing":
        return {key: tensor for key, tensor in tensors.items() if key != "single_blocks.1.linear2.bias"}
    if change == "unexpected":
        return {**tensors, "double_blocks.0.extra.weight": torch.zeros(2)}
    if change == "prefix":
        return {**{f"model.diffusion_model.{key}": t for key, t in tensors.items()}, "img_in.weight": torch.zeros(2)}
    assert change == "other"
    return {"conv.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("schnell", "has no guidance embedding, so it is FLUX.1-schnell, .* set model.allow_schnell = true"),
        ("fill", r"is FLUX.1 Fill \(img_in takes 384 values\), not FLUX.1-dev"),
        ("depth", "is FLUX.1 Canny, Depth or Redux"),
        ("nf4", "is quantised to 4 bits"),
        ("flux2", "is FLUX.2, another architecture"),
        ("lora", "is a LoRA, not a model; give it as adapter.init_from or in adapter.merge"),
        ("t5", "is a T5 encoder; it belongs to model.t5_path"),
        ("clip", "is a CLIP text model; it belongs to model.clip_path"),
        ("vae", "is an autoencoder; it belongs to model.vae_path"),
        ("missing", r"is not a FLUX.1 transformer: 1 of 92 keys missing \(single_blocks.1.linear2.bias\)"),
        ("unexpected", r"1 of 93 keys unexpected \(double_blocks.0.extra.weight\)"),
        ("prefix", r"some keys begin with 'model.diffusion_model.' and others do not \(img_in.weight\)"),
        ("other", r"is not a FLUX.1 transformer: it has no img_in.weight \(first key: conv.weight\)"),
    ],
)
def test_other_files_are_refused_by_name(change: str, message: str, weights: Tensors, tmp_path: Path) -> None:
    path = write(tmp_path / "flux.safetensors", changed(weights, change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path)
    assert str(caught.value).startswith(str(path))


def test_schnell_may_be_allowed(weights: Tensors, tmp_path: Path) -> None:
    path = write(tmp_path / "flux.safetensors", changed(weights, "schnell"))
    assert not load_model(path, allow_schnell=True).config.guidance_embed


@pytest.mark.parametrize(
    ("change", "objective", "warned"),
    [("schnell", {"guidance_scale": 2.0}, True), ("schnell", {}, False), ("", {"guidance_scale": 2.0}, False)],
)
def test_guidance_that_a_checkpoint_does_not_embed_is_warned_of(
    change: str, objective: dict[str, float], warned: bool, weights: Tensors, tmp_path: Path
) -> None:
    path = write(tmp_path / "flux.safetensors", changed(weights, change) if change else weights)
    config = load_document(
        {
            "run": {"name": "x", "output_dir": str(tmp_path / "out"), "device": "cpu"},
            "model": {"arch": "fd", "path": str(path), "allow_schnell": True},
            "objective": objective,
            "train": {"max_steps": 1, "mixed_precision": "no"},
            "scheduler": {"warmup_steps": 0},
            "cache": {"run": "never"},
            "datasets": [{"image_directory": str(tmp_path)}],
        }
    )
    notes = "\n".join(load_for_training(config, Storing()).notes)
    assert (f"guidance_scale: has no effect because {path} embeds no guidance" in notes) == warned


def test_gguf_and_cut_files_are_refused(weights: Tensors, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a GGUF file, which is not supported"):
        load_checkpoint(tmp_path / "flux.gguf")
    path = write(tmp_path / "flux.safetensors", weights)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_checkpoint(path)


def test_unknown_rotary_widths_are_asked_for(weights: Tensors, tmp_path: Path) -> None:
    path = write(tmp_path / "flux.safetensors", weights, config=False)
    with pytest.raises(CheckpointError, match=r"its heads are 16 wide, .* put the model's config.json beside the file"):
        load_model(path)


def test_incomplete_diffusers_file(weights: Tensors, tmp_path: Path) -> None:
    tensors = to_diffusers(weights, CONFIG)
    del tensors["transformer_blocks.0.attn.to_k.weight"]
    path = write(tmp_path / "flux.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"of diffusers: 1 missing \(transformer_blocks.0.attn.to_k.weight\)"):
        load_model(path)


def test_names_of_diffusers_and_back(weights: Tensors, tmp_path: Path) -> None:
    file = load_checkpoint(write(tmp_path / "flux.safetensors", to_diffusers(weights, CONFIG)))
    config, back = to_bfl(file)
    assert config == CONFIG
    assert set(back) == set(weights) and all(torch.equal(back[key].dense(), weights[key]) for key in weights)


# The border between caches and model


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 1, 5, 8), (1, 1, 8), (1, 1, 1, 8)])
def test_text_states(shape: tuple[int, ...]) -> None:
    assert text_states(torch.zeros(shape)).shape == (shape[0], shape[-2], 8)


def test_one_text_gets_a_batch() -> None:
    assert text_states(torch.zeros(5, 8)).shape == (1, 5, 8)
    assert pooled_text(torch.zeros(8)).shape == (1, 8)
    assert pooled_text(torch.zeros(2, 1, 8)).shape == (2, 8)
    assert pooled_text(torch.zeros(1, 8)).shape == (1, 8)


@pytest.mark.parametrize(
    ("function", "shape"), [(text_states, (2, 2, 5, 8)), (text_states, (8,)), (pooled_text, (2, 2, 8))]
)
def test_other_shapes_are_refused(function: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(CacheError, match="run the text job again"):
        function(torch.zeros(shape))
