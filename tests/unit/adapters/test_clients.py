"""A LoRA trained here computes the same in diffusers, and one made by peft computes the same here.

Outputs of the denoiser agree to 1e-5 in float32; the LoRA moves them by far more. Diffusers splits the first layer of single
blocks by numbers fixed for a hidden size of 3072 when it reads sd-scripts' names, so for that path they are replaced here.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from musubi_tuner import convert_lora
from musubi_tuner.adapters import attach, convert, detach, load_adapter, read_adapter, save_adapter
from musubi_tuner.adapters.attach import make_adapters, target_paths
from musubi_tuner.adapters.files import adapter_of, placements_of_file
from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.flux_dev import Flux, FluxConfig
from musubi_tuner.models.flux_dev.state_dict import diffusers_config, diffusers_modules, to_diffusers
from musubi_tuner.models.registry import MODELS

pytestmark = pytest.mark.long

TARGETS = MODELS["fd"].adapters
CONFIG = FluxConfig(
    vec_in_dim=24, context_in_dim=40, hidden_size=48, num_heads=3, depth=2, depth_single_blocks=3, axes_dim=(4, 6, 6)
)
TOLERANCE = 1e-5
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> Flux:
    torch.manual_seed(0)
    return Flux(CONFIG).eval().requires_grad_(False)


@pytest.fixture
def client(model: Flux) -> Any:
    """The same model in diffusers."""
    from diffusers import FluxTransformer2DModel

    settings = {key: value for key, value in diffusers_config(CONFIG).items() if key != "_class_name"}
    built = FluxTransformer2DModel(**{**settings, "axes_dims_rope": tuple(settings["axes_dims_rope"])})
    built.load_state_dict(to_diffusers(dict(model.state_dict()), CONFIG))
    return built.eval()


def inputs() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[0, row, column] for row in range(2) for column in range(3)]).float()
    return {
        "img": torch.randn(2, 6, 64, generator=generator),
        "ids": ids,
        "txt": torch.randn(2, 5, 40, generator=generator),
        "y": torch.randn(2, 24, generator=generator),
        "t": torch.tensor([0.3, 0.8]),
        "guidance": torch.tensor([1.0, 3.5]),
    }


def ours(model: Flux) -> Tensor:
    x = inputs()
    ids = x["ids"][None].expand(2, -1, -1)
    with torch.no_grad():
        return model(x["img"], ids, x["txt"], torch.zeros(2, 5, 3), x["t"], x["y"], x["guidance"])


def theirs(client: Any) -> Tensor:
    x = inputs()
    with torch.no_grad():
        return client(
            hidden_states=x["img"],
            encoder_hidden_states=x["txt"],
            pooled_projections=x["y"],
            timestep=x["t"],
            img_ids=x["ids"],
            txt_ids=torch.zeros(5, 3),
            guidance=x["guidance"],
        ).sample


def difference(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


def lora(model: Flux, rank: int = 4, alpha: float = 2.0, **settings: Any) -> Tensors:
    """A LoRA with random weights under musubi names."""
    from musubi_tuner.adapters.attach import place_adapters

    section = AdapterSection(type="lora", rank=rank, alpha=alpha, **settings)
    adapters = make_adapters(model, place_adapters(target_paths(model, TARGETS), TARGETS, section), section)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, adapter in adapters.items():
            adapter.lora_up.weight.copy_(0.2 * torch.randn(adapter.lora_up.weight.shape, generator=generator))
    return {key: tensor.clone() for key, tensor in adapters.state_dict().items()}


def ours_with(model: Flux, tensors: Tensors) -> Tensor:
    adapters = make_adapters(model, placements_of_file(tensors, model, TARGETS, "file"), AdapterSection(type="lora"))
    load_adapter(adapters, tensors)
    attach(model, adapters)
    try:
        return ours(model)
    finally:
        detach(model)


def test_models_are_the_same(model: Flux, client: Any) -> None:
    assert difference(ours(model), theirs(client)) < TOLERANCE


def test_diffusers_loads_our_export(model: Flux, client: Any) -> None:
    tensors = lora(model)
    expected = ours_with(model, tensors)
    client.load_lora_adapter(convert(tensors, to="diffusers"), prefix="transformer")
    assert difference(theirs(client), expected) < TOLERANCE
    assert difference(expected, ours(model)) > 1000 * TOLERANCE


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")  # proj_out is the end of other names too
def test_layers_outside_the_blocks_mean_the_same_there(model: Flux, client: Any) -> None:
    """diffusers exchanges the halves of the last modulation; the names of OneTrainer are its, with underscores."""
    outside = [path for path in TARGETS.outside if "guidance" not in path or CONFIG.guidance_embed]
    tensors = lora(model, include=[re.escape(path) for path in outside], only=[re.escape(path) for path in outside])
    expected = ours_with(model, tensors)
    there = convert(tensors, to="diffusers")
    client.load_lora_adapter(there, prefix="transformer")
    assert difference(theirs(client), expected) < TOLERANCE
    assert difference(expected, ours(model)) > 1000 * TOLERANCE
    names = {"lora_A": "lora_down", "lora_B": "lora_up"}
    trainer = {
        f"lora_transformer_{path.replace('.', '_')}.{names[leaf]}.weight": tensor
        for key, tensor in there.items()
        for path, leaf in [key.removeprefix("transformer.").removesuffix(".weight").rsplit(".", 1)]
    }
    assert difference(ours_with(model, convert(trainer, to="musubi", arch="fd")), expected) < TOLERANCE


def test_processors_of_xlabs(model: Flux) -> None:
    """Of single blocks they change q, k and v, the first rows of linear1."""
    from musubi_tuner.adapters.convert import from_xlabs

    tensors = {key: tensor for key, tensor in lora(model).items() if not key.endswith(".alpha")}
    width = CONFIG.hidden_size
    for key in [key for key in tensors if "linear1.lora_up" in key]:
        tensors[key] = torch.cat([tensors[key][: 3 * width], torch.zeros_like(tensors[key][3 * width :])])
    expected = ours_with(
        model, {key: tensor for key, tensor in tensors.items() if "mlp_" not in key and "mod" not in key}
    )
    layers = {"img_attn_qkv": "qkv_lora1", "txt_attn_qkv": "qkv_lora2", "img_attn_proj": "proj_lora1", "txt_attn_proj": "proj_lora2",
              "linear1": "qkv_lora", "linear2": "proj_lora"}  # fmt: skip
    theirs_of: Tensors = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"lora_unet_(double|single)_blocks_(\d+)_(.+)\.lora_(down|up)\.weight", key)
        assert found
        if found[3] in layers:
            rows = tensor[: 3 * width] if found[3] == "linear1" and found[4] == "up" else tensor
            theirs_of[f"{found[1]}_blocks.{found[2]}.processor.{layers[found[3]]}.{found[4]}.weight"] = rows
    assert difference(ours_with(model, convert(from_xlabs(theirs_of), to="musubi", arch="fd")), expected) < TOLERANCE


def test_one_foreign_key_is_named_alone(model: Flux) -> None:
    with pytest.raises(CheckpointError, match=r"^1 keys belong to no layer of FLUX\.1-dev \(lora_unet_other\.alpha\)$"):
        convert({**lora(model), "lora_unet_other.alpha": torch.ones(())}, to="comfyui")


def test_diffusers_loads_our_own_names(model: Flux, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FluxPipeline
    from diffusers.loaders import lora_conversion_utils

    source = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers
    width = CONFIG.hidden_size

    def with_our_widths(state_dict: Any) -> Any:
        # The list of row counts is a literal inside the function: replace the constants in a copy of its code.
        import types

        def replaced(code: types.CodeType) -> types.CodeType:
            sizes = {3072: width, 12288: 4 * width}
            constants = tuple(
                replaced(value)
                if isinstance(value, types.CodeType)
                else tuple(sizes.get(v, v) for v in value)
                if isinstance(value, tuple)
                else sizes.get(value, value)
                if isinstance(value, int)
                else value
                for value in code.co_consts
            )
            return code.replace(co_consts=constants)

        function = types.FunctionType(
            replaced(source.__code__), source.__globals__, source.__name__, source.__defaults__, source.__closure__
        )
        return function(state_dict)

    monkeypatch.setattr("diffusers.loaders.lora_pipeline._convert_kohya_flux_lora_to_diffusers", with_our_widths)
    tensors = lora(model)
    expected = ours_with(model, tensors)
    converted = FluxPipeline.lora_state_dict(dict(tensors))
    client.load_lora_adapter(converted, prefix="transformer")
    assert difference(theirs(client), expected) < TOLERANCE


def test_diffusers_computes_dora_of_our_export(model: Flux, client: Any) -> None:
    """Norms are those of rows, so that fused layers may be split."""
    from musubi_tuner.adapters.attach import place_adapters

    section = AdapterSection(type="dora", rank=4, alpha=2.0)
    adapters = make_adapters(model, place_adapters(target_paths(model, TARGETS), TARGETS, section), section)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tensors = dict(adapters.state_dict())
    expected = ours_with(model, tensors)
    client.load_lora_adapter(convert(tensors, to="diffusers"), prefix="transformer")
    assert difference(theirs(client), expected) < TOLERANCE
    assert difference(expected, ours(model)) > 1000 * TOLERANCE


def test_comfyui_rule_applied_to_our_export(model: Flux) -> None:
    """ComfyUI adds ``B @ A`` to the layer that follows the prefix; alpha absent counts as the rank."""
    tensors = lora(model)
    expected = ours_with(model, tensors)
    patched = Flux(CONFIG).eval()
    patched.load_state_dict(model.state_dict())
    exported = convert(tensors, to="comfyui")
    for key, down in exported.items():
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
            layer: Any = patched.get_submodule(path)
            layer.weight.data += exported[key.replace("lora_A", "lora_B")] @ down
    assert difference(ours(patched), expected) < TOLERANCE


@pytest.mark.parametrize("alpha", [4, 16])
def test_lora_of_peft_loads_here(alpha: int, model: Flux, client: Any) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    before = theirs(client)
    config = LoraConfig(
        r=4, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "net.2"],
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(3)
    # proj_out of the last layer is no part of a block; leave it to the blocks.
    config.target_modules = (
        r".*transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|proj_mlp|proj_out|ff\.net\.2)"
    )
    client.add_adapter(config)
    scale = alpha / 4
    state = get_peft_model_state_dict(client)
    # peft keeps alpha in its config; a file carries the factor in its weights.
    saved = {f"transformer.{k}": t.clone() * (scale if ".lora_B." in k else 1) for k, t in state.items()}
    expected = theirs(client)
    assert difference(ours_with(model, convert(saved, to="musubi")), expected) < TOLERANCE
    assert difference(expected, before) > 1000 * TOLERANCE


# Files, as both programs write and read them


def deltas_here(tensors: Tensors) -> Tensors:
    """Weight changes of a file under musubi names, by the path of the layer with underscores."""
    return {
        key.removeprefix("lora_unet_").removesuffix(".alpha"): adapter_of(
            {leaf: tensors[key.replace("alpha", leaf)] for leaf in ("lora_down.weight", "lora_up.weight", "alpha")},
            (
                len(tensors[key.replace("alpha", "lora_up.weight")]),
                tensors[key.replace("alpha", "lora_down.weight")].shape[1],
            ),
            key,
        ).delta()
        for key in tensors
        if key.endswith(".alpha")
    }


def deltas_there(client: Any) -> Tensors:
    """The same of a model of diffusers with one adapter, as peft computes them; its parts stacked as ours."""
    found: Tensors = {}
    for path, parts in diffusers_modules(CONFIG.depth, CONFIG.depth_single_blocks).items():
        layers = [client.get_submodule(part) for part in parts if hasattr(client.get_submodule(part), "lora_A")]
        if layers:
            assert len(layers) == len(parts)
            rows = [layer.get_delta_weight(next(iter(layer.lora_A))) for layer in layers]
            found[path.replace(".", "_")] = torch.cat(rows).detach()
    return found


def assert_same_deltas(first: Tensors, second: Tensors, tolerance: float = 1e-6) -> None:
    assert set(first) == set(second)
    for name, delta in first.items():
        assert difference(delta, second[name]) <= tolerance * float(delta.abs().max()), name


@pytest.mark.parametrize(
    ("dtype", "rank", "alpha", "low_memory"),
    [
        (torch.bfloat16, 4, 2.0, False),
        (torch.bfloat16, 12, 5.0, True),
        (torch.bfloat16, 8, 1.0, True),
        (torch.float16, 12, 5.0, False),
        (torch.float32, 12, 5.0, False),
    ],
)
def test_diffusers_computes_the_very_changes_of_our_export(
    dtype: torch.dtype, rank: int, alpha: float, low_memory: bool, model: Flux, client: Any, tmp_path: Path
) -> None:
    """Through the loader of the model and that of the pipeline; the split of a root in bfloat16 was wrong by 2e-3."""
    from diffusers import FluxPipeline

    source, target = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save_adapter(source, lora(model, rank, alpha), dtype=dtype)
    assert convert_lora.main(["--input", str(source), "--output", str(target), "--target", "diffusers"]) == 0
    if low_memory:
        state, alphas = FluxPipeline.lora_state_dict(str(target), return_alphas=True)
        client.load_lora_adapter(state, network_alphas=alphas, low_cpu_mem_usage=True)
    else:
        client.load_lora_adapter(str(target))
    expected = ours_with(model, read_adapter(source).tensors)
    assert_same_deltas(deltas_here(read_adapter(source).tensors), deltas_there(client))
    assert difference(theirs(client), expected) < TOLERANCE


TARGET_MODULES = r".*transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|proj_mlp|proj_out|ff\.net\.2)"
PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 32},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"^single_transformer_blocks\.\d+\.proj_out": 2, "ff.net.2": 3},
        "alpha_pattern": {"transformer_blocks.1.attn.to_out.0": 1, r"single_transformer_blocks\.\d+\.proj_out": 64},
    },
}


@pytest.mark.parametrize("settings", list(PEFT_SETTINGS))
@pytest.mark.parametrize("form", ["peft folder", "renamed file", "pipeline", "model"])
def test_files_of_peft_and_diffusers_count_here_as_there(form: str, settings: str, client: Any, tmp_path: Path) -> None:
    from diffusers import FluxPipeline
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(target_modules=TARGET_MODULES, init_lora_weights=False, **PEFT_SETTINGS[settings])
    torch.manual_seed(3)
    source = tmp_path
    if form in ("peft folder", "renamed file"):
        get_peft_model(client, config).save_pretrained(tmp_path)
        if form == "renamed file":
            source = (tmp_path / "adapter_model.safetensors").rename(tmp_path / "cat.safetensors")
    else:
        client.add_adapter(config)
        if form == "model":
            client.save_lora_adapter(tmp_path, upcast_before_saving=True)
        else:
            FluxPipeline.save_lora_weights(
                tmp_path,
                transformer_lora_layers=get_peft_model_state_dict(client),
                transformer_lora_adapter_metadata=client.peft_config["default"].to_dict(),
            )
    file = read_adapter(source, MODELS["fd"])
    assert ("header" if form in ("pipeline", "model") else "adapter_config.json beside it") in file.remarks
    assert_same_deltas(deltas_here(file.tensors), deltas_there(client))
