"""Loading with quantisation never holds the model in its compute dtype: anonymous memory of a process that loads is watched."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from musubi_tuner.memory.storage import Freeze, freeze_layers, merge_layers
from musubi_tuner.models import tinyflux
from musubi_tuner.models.flux_dev import FluxConfig, build
from musubi_tuner.models.flux_dev.state_dict import diffusers_config, to_diffusers
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.tinyflux.state_dict import example_inputs, load_model
from musubi_tuner.models.tinyflux.upgrade import upgrade_weights
from musubi_tuner.weights.checkpoints import WeightFile
from tiny import TINY

pytestmark = pytest.mark.long

CONFIG = FluxConfig(hidden_size=768, num_heads=6, depth=1, depth_single_blocks=12, vec_in_dim=64, context_in_dim=64)
"""About 125 million parameters, 250 MB in bfloat16, a fifth of it modulation, which stays as it is."""
SCRIPT = """
import importlib, sys, threading, time
from pathlib import Path
import torch
from musubi_tuner.memory.storage import Freeze
from musubi_tuner.models.registry import MODELS

torch.set_num_threads(1)

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

spec, peak, done = MODELS[sys.argv[3]], 0, False
load_model = importlib.import_module(f"musubi_tuner.models.{sys.argv[4]}.state_dict").load_model

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

torch.zeros(64, 64).to(torch.float8_e4m3fn)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[1], freeze=Freeze(sys.argv[2], spec.quantizable))
done = True
thread.join()
print(peak - before, sum(b.numel() * b.element_size() for b in (*model.parameters(), *model.buffers())))
"""


def random_weights(config: FluxConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: (0.02 * torch.randn(tensor.shape, generator=generator)).bfloat16()
        for key, tensor in build(config).state_dict().items()
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    tensors = random_weights(CONFIG)
    for name, values, config in (
        ("bfl", tensors, CONFIG.to_dict()),
        ("diffusers", to_diffusers(tensors, CONFIG), diffusers_config(CONFIG)),
    ):
        (folder / name).mkdir()
        save_file(values, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))
    return {name: folder / name for name in ("bfl", "diffusers")}


def peak_of_loading(path: Path, *family: str, **environment: str) -> tuple[int, int]:
    """Highest anonymous memory above the start, and what the loaded model holds, bytes."""
    command = [sys.executable, "-c", SCRIPT, str(path), "fp8_scaled", *family]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    peak, held = (int(number) for number in done.stdout.split()[-2:])
    return peak, held


def assert_small_peak(path: Path, config: FluxConfig) -> None:
    """0.65 of the size in bfloat16, and 100 MB."""
    peak, held = peak_of_loading(path, "fd", "flux_dev")
    size = 2 * sum(tensor.numel() for tensor in build(config).parameters())
    print(
        f"{path.name}: {peak / 1e6:.0f} MB above the start, {held / 1e6:.0f} MB held, {size / 1e6:.0f} MB in bfloat16"
    )
    assert held < 0.66 * size
    assert peak <= 0.65 * size + 100e6, (peak / 1e6, held / 1e6, size / 1e6)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["bfl", "diffusers"])
def test_peak_of_loading_in_fp8(form: str, checkpoints: dict[str, Path]) -> None:
    assert 2 * sum(tensor.numel() for tensor in build(CONFIG).parameters()) > 245e6
    assert_small_peak(checkpoints[form], CONFIG)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_of_loading_two_gigabytes(tmp_path: Path) -> None:
    """FLUX.1 at a third of its width would be as large; here fewer blocks of two thirds."""
    config = FluxConfig(
        hidden_size=2048, num_heads=16, depth=2, depth_single_blocks=12, vec_in_dim=64, context_in_dim=64
    )
    assert 2e9 < 2 * sum(tensor.numel() for tensor in build(config).parameters()) < 2.6e9
    save_file(random_weights(config), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert_small_peak(tmp_path, config)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tinyflux_below_adapters_is_never_held_in_float32(tmp_path: Path) -> None:
    """The stored model, 159 MB, and what quantising one tensor takes; the model in float32 would be 367 MB.

    Measured: 238 MB, and 540 MB where it is loaded whole and stored afterwards. The allocator gives large tensors back at
    once here; otherwise it keeps up to 90 MB more, differing from run to run.
    """
    config = tinyflux.TinyFluxConfig(
        hidden_size=768, num_attention_heads=6, num_double_layers=0, num_single_layers=10, lune_hidden_dim=64,
        joint_attention_dim=64, pooled_projection_dim=64,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = tinyflux.build(config).state_dict()
    tensors = {key: (0.02 * torch.randn(t.shape, generator=generator)).bfloat16() for key, t in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"config_json": json.dumps(config.to_dict())})
    peak, held = peak_of_loading(tmp_path / "model.safetensors", "tf", "tinyflux", MALLOC_MMAP_THRESHOLD_="1000000")
    whole = 4 * sum(tensor.numel() for tensor in tensors.values())
    print(f"{peak / 1e6:.0f} MB above the start, {held / 1e6:.0f} MB held, {whole / 1e6:.0f} MB in float32")
    assert held < 0.45 * whole
    assert peak <= held + 120e6 < 0.8 * whole, (peak / 1e6, held / 1e6, whole / 1e6)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("older", [False, True], ids=["v4", "v3"])
@pytest.mark.parametrize("storage", ["plain", "fp8", "fp8_scaled", "int8", "nf4"])
def test_tinyflux_stored_while_it_is_read_equals_one_stored_afterwards(storage: Any, older: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(t.shape, generator=generator) for key, t in tinyflux.build(TINY).state_dict().items()}
    if older:
        tensors, _ = upgrade_weights(tensors, TINY, to="v3")
    weights = {key: t if key.startswith("rope.") else t.bfloat16() for key, t in tensors.items()}
    file = WeightFile(Path("model.safetensors"), weights, config=TINY.to_dict())

    def merge(path: str, weight: Tensor) -> Tensor:
        return weight + 0.25 if path.endswith(("mlp.fc1", "txt_in")) else weight

    freeze = Freeze(storage, MODELS["tf"].quantizable, plain=r"(double|single)_blocks\.\d+\..*")
    ours, lines = list[str](), list[str]()
    theirs = load_model(file, report=lines.append)
    merge_layers(theirs, merge)
    freeze_layers(theirs, freeze)
    model = load_model(file, freeze=freeze, merge=merge, report=ours.append)
    assert ours == lines and bool(lines) == older
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = dict([*theirs.named_parameters(), *theirs.named_buffers()])
    found = dict([*model.named_parameters(), *model.named_buffers()])
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        assert torch.equal(as_bytes(found[key]), as_bytes(tensor)), key
    inputs = example_inputs(TINY, 2, 4, 4, 5)
    with torch.no_grad():
        assert torch.equal(model(**inputs, height=4, width=4), theirs.eval()(**inputs, height=4, width=4))


def test_rotary_frequencies_of_a_frozen_tinyflux_stay_float32() -> None:
    tensors = {key: torch.rand(t.shape) for key, t in tinyflux.build(TINY).state_dict().items()}
    file = WeightFile(Path("model.safetensors"), tensors, config=TINY.to_dict())
    model = load_model(file, dtype=torch.bfloat16, freeze=Freeze("fp8", MODELS["tf"].quantizable))
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.rope.get_buffer("freqs_1"), tensors["rope.freqs_1"])
