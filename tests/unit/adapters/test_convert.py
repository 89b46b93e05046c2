"""The way to another program's names and back changes no bit of a weight change that fewer bits than float32 can hold."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from musubi_tuner.adapters import convert
from musubi_tuner.adapters.convert import place_of
from musubi_tuner.models.registry import MODELS

LAYERS = {  # rows and columns, for a width of 8
    "double_blocks_0_img_attn_qkv": (24, 8), "double_blocks_1_txt_attn_proj": (8, 8), "double_blocks_0_img_mlp_2": (8, 32),
    "single_blocks_0_linear1": (56, 8), "single_blocks_11_linear2": (8, 40), "single_blocks_0_modulation_lin": (24, 8),
}  # fmt: skip
NAMINGS = ["comfyui", "diffusers", "musubi"]
Tensors = dict[str, Tensor]


def lora(ranks: list[int], alphas: list[float], dtype: torch.dtype, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for (name, (rows, columns)), rank, alpha in zip(LAYERS.items(), ranks, alphas, strict=True):
        found[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, columns, generator=generator).to(dtype)
        found[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, rank, generator=generator).to(dtype)
        found[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    return found


def changes(tensors: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """Change of every layer in float64, and the sum of the sizes of its terms."""
    found = {}
    for key in tensors:
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            down, up = tensors[key].double(), tensors[f"{name}.lora_up.weight"].double()
            scale = tensors[f"{name}.alpha"].double() / len(down)
            found[name] = (up @ down * scale, up.abs() @ down.abs() * scale.abs())
    return found


def assert_same(first: Tensors, second: Tensors, tolerance: float) -> None:
    ours, theirs = changes(first), changes(second)
    assert set(ours) == set(theirs)
    for name, (change, size) in ours.items():
        assert ((change - theirs[name][0]).abs() <= tolerance * size).all(), name


sizes = st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=6, max_size=6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    ranks=sizes,
    powers=st.lists(st.integers(-4, 3), min_size=6, max_size=6),
    sign=st.sampled_from([1, -1]),
    route=st.lists(st.sampled_from(NAMINGS), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float8_e4m3fn]),
)
def test_powers_of_two_stay_exact_and_as_small(
    ranks: list[int], powers: list[int], sign: int, route: list[Any], dtype: torch.dtype
) -> None:
    ours = lora(ranks, [sign * rank * 2.0**power for rank, power in zip(ranks, powers)], dtype)
    theirs = ours
    for naming in route:
        theirs = convert(theirs, to=naming, arch="fd")
    if dtype != torch.float16:  # whose smallest values have no half
        widest = 2 if dtype.itemsize == 2 or set(route) != {"musubi"} else 1
        assert {t.dtype.itemsize for key, t in theirs.items() if not key.endswith("alpha")} == {widest}
    assert_same(convert(theirs, to="musubi", arch="fd"), ours, 0.0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    ranks=sizes,
    alphas=st.lists(st.sampled_from([0.1, 1.0, 5.0, 10.0, -7.0, 0.0]), min_size=6, max_size=6),
    route=st.lists(st.sampled_from(NAMINGS), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]),
)
def test_other_factors_are_kept_to_the_rounding_of_float32(
    ranks: list[int], alphas: list[float], route: list[Any], dtype: torch.dtype
) -> None:
    ours = lora(ranks, alphas, dtype)
    theirs = ours
    for naming in route:
        theirs = convert(theirs, to=naming, arch="fd")
    assert_same(convert(theirs, to="musubi", arch="fd"), ours, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_alphas_of_split_layers_stay_where_they_are_alike(dtype: torch.dtype) -> None:
    """A file of parts with alphas: alike they become the alpha of the whole, different ones go into the rows."""
    parts = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    generator = torch.Generator().manual_seed(0)
    for ranks, alphas in (((3, 3, 3), (1.0, 1.0, 1.0)), ((2, 4, 4), (1.0, 2.0, 2.0)), ((2, 3, 4), (1.0, 1.0, 5.0))):
        tensors: Tensors = {}
        wanted = []
        for part, rank, alpha in zip(parts, ranks, alphas):
            down, up = (
                torch.randn(rank, 8, generator=generator).to(dtype),
                torch.randn(8, rank, generator=generator).to(dtype),
            )
            tensors |= {
                f"{part}.lora_A.weight": down,
                f"{part}.lora_B.weight": up,
                f"{part}.alpha": torch.tensor(alpha),
            }
            wanted.append(up.double() @ down.double() * alpha / rank)
        found = convert(tensors, to="musubi", arch="fd")
        ((change, size),) = changes(found).values()
        assert ((change - torch.cat(wanted)).abs() <= 1e-6 * size).all()
        alike = len({alpha / rank for alpha, rank in zip(alphas, ranks)}) == 1
        alpha = float(found["lora_unet_double_blocks_0_img_attn_qkv.alpha"])
        assert alpha == pytest.approx(sum(alphas) if alike else sum(ranks))
        assert found["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].dtype == (
            dtype if alike else torch.float32
        )


def renamed(tensors: Tensors, naming: str) -> Tensors:
    """Tensors under diffusers' names as other programs spell them."""
    found: Tensors = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".lora_")
        path = module.removeprefix("transformer.")
        part = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[leaf]
        if naming == "peft":
            found[f"base_model.model.{path}.lora_{leaf[0]}.my_adapter.weight"] = tensor
        elif naming == "older diffusers":
            found[f"{module}.{part.replace('lora_', 'lora.')}"] = tensor
        elif naming == "SimpleTuner for ComfyUI":
            found[f"diffusion_model.{path}.lora_{leaf}"] = tensor
        else:
            found[f"{naming}{path.replace('.', '_')}.{part}"] = tensor
    return found


@pytest.mark.parametrize(
    "naming", ["peft", "older diffusers", "SimpleTuner for ComfyUI", "lora_transformer_", "lycoris_", "lora_unet_"]
)
def test_names_of_diffusers_as_other_programs_spell_them(naming: str) -> None:
    ours = lora([2] * 6, [1.0] * 6, torch.bfloat16)
    theirs = renamed(convert(ours, to="diffusers"), naming)
    assert_same(convert(theirs, to="musubi", arch="fd"), ours, 0.0)


@pytest.mark.parametrize("prefix", ["lycoris_", "transformer.", "base_model.model.diffusion_model."])
def test_our_names_behind_other_prefixes(prefix: str) -> None:
    ours = lora([2] * 6, [1.0] * 6, torch.bfloat16)
    if prefix == "lycoris_":
        theirs = {key.replace("lora_unet_", prefix): tensor for key, tensor in ours.items()}
    else:
        names = convert(ours, to="comfyui")
        theirs = {key.replace("diffusion_model.", prefix): tensor for key, tensor in names.items()}
    assert_same(convert(theirs, to="musubi", arch="fd"), ours, 0.0)


def test_parts_of_fused_layers_by_number() -> None:
    """OneTrainer's newer files: our paths, the parts of fused layers numbered."""
    ours = lora([2] * 6, [1.0] * 6, torch.bfloat16)
    theirs: Tensors = {}
    for key, tensor in convert(ours, to="diffusers").items():
        module, _, leaf = key.rpartition(".lora_")
        place = place_of(module, MODELS["fd"])
        assert place is not None
        name = place.path if place.parts == 1 else f"{place.path}.{place.part}"
        theirs[f"transformer.{name}.lora_{leaf}"] = tensor
    assert "transformer.single_blocks.0.linear1.3.lora_A.weight" in theirs
    assert_same(convert(theirs, to="musubi", arch="fd"), ours, 0.0)


def test_every_layer_has_one_place_under_every_name() -> None:
    spec = MODELS["fd"]
    layers = [f"{blocks}.12.{layer}" for blocks, names in spec.adapters.layers.items() for layer in names]
    places = {}
    for path in layers:
        down, up = torch.zeros(1, 8), torch.zeros({"qkv": 24, "linear1": 56}.get(path.rpartition(".")[2], 8), 1)
        name = f"lora_unet_{path.replace('.', '_')}"
        theirs = convert({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, to="diffusers", arch="fd")
        for module in {key.rpartition(".lora_")[0] for key in theirs}:
            place = place_of(module, spec)
            assert place is not None and place.path == path
            assert place == place_of(f"lora_transformer_{module.removeprefix('transformer.').replace('.', '_')}", spec)
            assert module not in places
            places[module] = place
        assert sorted(place.part for place in places.values() if place.path == path) == list(range(place.parts))
