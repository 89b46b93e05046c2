"""Which layers of a family are stored how, and what that costs in precision."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from musubi_tuner.config.schema.memory import MemorySection
from musubi_tuner.memory.compose import freeze_of
from musubi_tuner.memory.frozen_linear import FrozenLinear
from musubi_tuner.memory.storage import freeze_layers
from musubi_tuner.models.flux_dev import Flux, FluxConfig
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.tinyflux import TinyFluxDeep
from tiny import TINY

FLUX = FluxConfig(in_channels=16, vec_in_dim=8, context_in_dim=8, hidden_size=64, num_heads=2, depth=1,
                  depth_single_blocks=2, axes_dim=(8, 12, 12), mlp_ratio=2.0)  # fmt: skip
MODULATION = {
    "fd": r"double_blocks\.0\.(img|txt)_mod\.lin|single_blocks\.[01]\.modulation\.lin",
    "tf": r"double_blocks\.0\.(img|txt)_norm1\.linear|single_blocks\.0\.norm\.linear",
}


def model(code: str) -> nn.Module:
    torch.manual_seed(0)
    built = Flux(FLUX) if code == "fd" else TinyFluxDeep(TINY)
    for path, layer in built.named_modules():
        if re.fullmatch(MODULATION[code], path):
            nn.init.normal_(layer.weight, std=0.02)
    return built


def stored(code: str, **settings: Any) -> nn.Module:
    built, freeze = model(code), freeze_of(MemorySection(**settings), MODELS[code])
    assert freeze is not None
    freeze_layers(built, freeze)
    return built


def frozen_paths(of: nn.Module) -> set[str]:
    return {path for path, layer in of.named_modules() if isinstance(layer, FrozenLinear)}


@pytest.mark.parametrize(("code", "count"), [("fd", 4), ("tf", 3)])
@pytest.mark.parametrize(
    ("storage", "bound"), [("fp8_scaled", 0.032), ("fp8", 0.047), ("int8", 0.0101), ("nf4", 0.108)]
)
def test_modulation_is_stored_like_the_rest_where_it_is_asked_for(
    code: str, count: int, storage: str, bound: float
) -> None:
    """The error of its output is that of its weight, whose figures are derived in test_frozen_linear; a fifth is added.

    Scaled fp8: 0.0266. Plain fp8: values below 2^-6 have steps of 2^-9, so 2^-9 / sqrt(12) / 0.02 = 0.028 too, together 0.039.
    int8: of 64 normal values the largest is hardly above 3.7 standard deviations, and 3.7 / 127 / sqrt(12) = 0.0084. nf4: 0.09.
    """
    plain, without = model(code), stored(code, base_storage=storage)
    frozen = stored(code, base_storage=storage, fp8_modulation=True)
    added = frozen_paths(frozen) - frozen_paths(without)
    assert len(added) == count and frozen_paths(without) < frozen_paths(frozen)
    assert all(re.fullmatch(MODULATION[code], path) for path in added)
    for path in added:
        layer, true = frozen.get_submodule(path), plain.get_submodule(path)
        assert isinstance(layer, FrozenLinear) and isinstance(true, nn.Linear) and layer.storage == storage
        x = torch.randn(256, true.in_features)
        with torch.no_grad():
            expected, error = x @ true.weight.T, layer(x) - true(x)
        assert 0 < float(error.norm() / expected.norm()) < bound
