"""Choosing the kernel of attention: layouts, missing packages, devices."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.errors import ConfigError
from musubi_tuner.memory import attention as layers
from musubi_tuner.memory.attention import attend, use_attention

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def own_kernel() -> Iterator[None]:
    yield
    use_attention("sdpa", torch.device("cpu"))


def package(monkeypatch: pytest.MonkeyPatch, name: str, function: str) -> list[tuple[int, ...]]:
    """Another package's attention over [B, T, A, d]; returns the shapes that it is called with."""
    shapes: list[tuple[int, ...]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.append(tuple(q.shape))
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    for part in (name.split(".")[0], name):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    setattr(sys.modules[name], function, kernel)
    return shapes


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU."""

    @property
    def device(self) -> Any:  # type: ignore[override]
        return CUDA


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [("flash", "flash_attn", "flash_attn_func"), ("xformers", "xformers.ops", "memory_efficient_attention")],
)
def test_other_kernels_get_their_layout(name: Any, module: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = package(monkeypatch, module, function)
    use_attention(name, CUDA)
    q, k, v = (torch.randn(2, 3, 300, 8) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    found = attend(q.as_subclass(OnGpu), k, v, None)
    assert shapes == [(2, 300, 3, 8)]
    assert torch.allclose(found.as_subclass(torch.Tensor), expected, atol=1e-5)
    # On a CPU, where such kernels do not run, the estimate uses torch's own.
    assert torch.allclose(attend(q, k, v, None), expected, atol=1e-5) and len(shapes) == 1
    with pytest.raises(ConfigError, match=r"memory\.attention: hidden padding .* needs \"sdpa\""):
        attend(q.as_subclass(OnGpu), k, v, torch.ones(2, 1, 1, 300, dtype=torch.bool))
    use_attention("sdpa", CUDA)
    assert layers._kernel is None


@pytest.mark.parametrize(("name", "package_name"), [("flash", "flash-attn"), ("xformers", "xformers")])
def test_missing_package_is_named(name: Any, package_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf'"{name}" needs the package {package_name}, which cannot be imported'):
        use_attention(name, CUDA)


def test_kernels_of_gpus_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r'memory\.attention: "flash" runs on GPUs only, but this run is on cpu'):
        use_attention("flash", torch.device("cpu"))
