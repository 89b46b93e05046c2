"""Switches of torch and precision, set once per process."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from musubi_tuner.config.schema.cache import CacheSection
from musubi_tuner.config.schema.model import ClipAndT5, ModelSection
from musubi_tuner.config.schema.run import RunSection
from musubi_tuner.device import apply_backend_flags, encoder_dtype, with_precision
from musubi_tuner.encoders.for_run import TextEncoders
from musubi_tuner.models.registry import MODELS

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]


def switches() -> tuple[str, bool, bool, bool]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize(
    ("settings", "sizes", "expected", "line"),
    [
        ({}, 1, ("high", True, True, False), "kernels: TF32 on, cudnn benchmark on"),
        ({}, 3, ("high", True, False, False), "kernels: TF32 on, cudnn benchmark off"),
        ({"allow_tf32": False}, 1, ("highest", False, True, False), "kernels: TF32 off, cudnn benchmark on"),
        ({"cudnn_benchmark": False}, 1, ("high", True, False, False), "kernels: TF32 on, cudnn benchmark off"),
        ({"deterministic": True}, 1, ("highest", False, False, True),
         "kernels: TF32 off, cudnn benchmark off, repeatable ones only"),
    ],
)  # fmt: skip
def test_switches_of_a_gpu(
    settings: dict[str, Any], sizes: int, expected: tuple[Any, ...], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert apply_backend_flags(RunSection(name="x", output_dir="out", **settings), CUDA, sizes) == line
    assert switches() == expected
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_a_cpu_keeps_its_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    before = switches()
    assert apply_backend_flags(RunSection(name="x", output_dir="out"), CPU, 1) is None
    assert switches() == before
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    line = apply_backend_flags(RunSection(name="x", output_dir="out", deterministic=True), CPU, 1)
    assert line == "kernels: repeatable ones only" and torch.are_deterministic_algorithms_enabled()


class _Record(SimpleNamespace):
    def model_copy(self, update: dict[str, Any]) -> "_Record":
        return _Record(**{**vars(self), **update})


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("setting", ["auto", "no", "bf16"])
def test_auto_is_what_the_device_computes_in(setting: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("musubi_tuner.device.has_bf16", lambda device: native)
    config: Any = _Record(train=_Record(mixed_precision=setting), run=_Record(device="cpu"))
    expected = {"auto": "bf16" if native else "no"}.get(setting, setting)
    assert with_precision(config).train.mixed_precision == expected


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_encoders_compute_as_told_or_as_their_device_allows(kind: str) -> None:
    device = torch.device(kind)
    assert encoder_dtype("float16", device, gpu="bfloat16") == torch.float16
    assert encoder_dtype("auto", device, gpu="bfloat16") == (torch.bfloat16 if kind == "cuda" else torch.float32)


def test_text_is_encoded_in_bfloat16_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """T5 overflows float16."""
    loaded: list[torch.dtype] = []
    for name in ("load_t5", "load_clip"):
        monkeypatch.setattr(f"musubi_tuner.encoders.for_run.{name}", lambda *files, dtype, **rest: loaded.append(dtype))
    config: Any = SimpleNamespace(
        model=ModelSection(arch="tf"), clip_and_t5=ClipAndT5(), spec=MODELS["tf"], cache=CacheSection()
    )
    sources = SimpleNamespace(paths=lambda download: {"t5": tmp_path, "clip": tmp_path})
    monkeypatch.setattr("musubi_tuner.encoders.for_run.encoder_sources", lambda *arguments: sources)
    for kind, expected in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        loaded.clear()
        TextEncoders(config, torch.device(kind))
        assert loaded == [expected, expected]
