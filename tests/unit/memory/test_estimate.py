"""The memory estimate of the plan agrees with what a process allocates, whichever part is the largest."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import save_file

from musubi_tuner.config import RunConfig, calculate_steps, load_config
from musubi_tuner.data.buckets import place
from musubi_tuner.data.item import Item
from musubi_tuner.device import has_bf16
from musubi_tuner.encoders.linear_patch import LinearPatchAutoencoder, LinearPatchConfig
from musubi_tuner.errors import ConfigError
from musubi_tuner.memory.flat import pinned_pieces
from musubi_tuner.memory.transfer import STAGING_BYTES
from musubi_tuner.models.family import ModelOutline
from musubi_tuner.models.flux_dev import FluxConfig, build
from musubi_tuner.models.tinyflux.flops import training_flops
from musubi_tuner.planning import fake_step
from musubi_tuner.planning.estimate import (
    Estimate,
    Size,
    bucket_sizes,
    decoding_bytes,
    estimate,
    estimate_sizes,
    largest_sizes,
    peak,
    resolve_swap,
    sharded,
)
from musubi_tuner.planning.report import (
    Rates,
    activation_lines,
    cache_bytes,
    checkpoint_bytes,
    disk_lines,
    estimate_lines,
    measure_rates,
    time_lines,
)
from musubi_tuner.units import format_bytes
from musubi_tuner.weights.stored import DEVICE_CHUNK

pytestmark = pytest.mark.long

TF = {"hidden_size": 512, "num_attention_heads": 8, "attention_head_dim": 64, "joint_attention_dim": 64, "pooled_projection_dim": 64,
      "axes_dims_rope": [16, 24, 24], "lune_expert_dim": 64}  # fmt: skip
FD = FluxConfig(hidden_size=768, num_heads=6, depth=1, depth_single_blocks=8, vec_in_dim=64, context_in_dim=64)
SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from musubi_tuner.config import load_config
from musubi_tuner.data.batch import Batch
from musubi_tuner.memory.compose import compose_memory
from musubi_tuner.planning.estimate import estimate
from musubi_tuner.assemble import attach_adapters, load_trainee
from musubi_tuner.training.ema import EMA
from musubi_tuner.training.optimizers import build_optimizer, trainable
from musubi_tuner.precision import COMPUTE_DTYPES, autocast
from musubi_tuner.training.task import FlowPhase, Position, make_draws, weighted_sum
from musubi_tuner.data.plan import MicroBatch

config = load_config(sys.argv[1])
spec, batch_size, side = config.spec, int(sys.argv[2]), int(sys.argv[3])
plan = spec.family.outline_model(config)
expected = estimate(config, plan, (side, side), batch_size)

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

torch.nn.Linear(8, 8)(torch.zeros(2, 8)).sum().backward()
torch.optim.AdamW([torch.zeros(2, requires_grad=True)], fused=True)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load_trainee(config, torch.device("cpu")).model
trained = model
if config.adapter.type != "none":
    trained, _ = attach_adapters(model, config)
    model.eval()
compose_memory(model, config.memory, spec, torch.device("cpu"))
parameters = trainable(trained)
optimizer = build_optimizer(parameters, config.optimizer)
ema = EMA(trained) if config.ema.enabled else None
process = spec.family.make_process(config, plan.options)
size = (batch_size, spec.latent_channels, side // spec.vae_factor, side // spec.vae_factor)
tensors = {name: torch.randn(batch_size, *shape) for name, shape in plan.shapes.items()}
if "t_buckets" in tensors:
    tensors["t_buckets"] = torch.linspace(0.05, 0.95, tensors["t_buckets"].shape[1]).expand(batch_size, -1)
valid = {name: torch.ones(batch_size, dtype=torch.bool) for name in tensors}
ids = torch.zeros(batch_size, dtype=torch.int64)
tensors["latents"] = torch.randn(size)
batch = Batch(tensors, valid, [""] * batch_size, tuple(range(batch_size)), ids)
planned = MicroBatch(tuple(range(batch_size)), tuple(range(batch_size)))
phase = FlowPhase(model, process, "model")
dtype = COMPUTE_DTYPES[config.train.mixed_precision]
for step in range(2):
    draws = make_draws(process, size[1:], planned, 1, step)
    with autocast(torch.device("cpu"), dtype):
        loss = weighted_sum(phase.losses(batch, draws, Position(step=step)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ema:
        ema.update(trained)
done = True
thread.join()
print(peak - before, expected.total, expected.weights, expected.optimizer, expected.activations)
"""


def run_file(folder: Path, arch: str, **changes: dict[str, Any]) -> Path:
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "x", "output_dir": str(folder / "out"), "device": "cpu"},
        "model": {"arch": arch, "vae_path": "a/vae", "clip_path": "a/clip", "t5_path": "a/t5", "t5_max_tokens": 64},
        "train": {"max_steps": 10, "mixed_precision": "no"},
        "scheduler": {"warmup_steps": 1},
        "cache": {"run": "never"},
    }
    if arch == "tf":
        tables["experts"] = {"expert_input": "random"}
    for name, values in changes.items():
        tables[name] = {**tables.get(name, {}), **values}
    document = {"schema_version": 1, **tables, "datasets": [{"image_directory": "images"}]}
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(document))
    return path


def flux_base(folder: Path) -> str:
    tensors = {key: torch.zeros(t.shape, dtype=torch.bfloat16) for key, t in build(FD).state_dict().items()}
    save_file(tensors, folder / "flux.safetensors")
    (folder / "flux.json").write_text(json.dumps(FD.to_dict()))
    return str(folder / "flux.safetensors")


def measured(path: Path, batch_size: int, side: int) -> tuple[int, list[int]]:
    environment = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    import os

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(batch_size), str(side)], capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    peak, *rest = (int(number) for number in done.stdout.split()[-5:])
    return peak, rest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "largest", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("weights", "optimizer")), "activations"]
)
def test_estimate_is_what_a_process_allocates(largest: str, tmp_path: Path) -> None:
    if largest == "weights":
        path = run_file(tmp_path, "fd", model={"path": flux_base(tmp_path)}, adapter={"rank": 4})
        peak, (total, weights, optimizer, activations) = measured(path, 1, 128)
        assert weights > max(optimizer, activations)
    elif largest == "optimizer":
        geometry = {**TF, "num_double_layers": 4, "num_single_layers": 4}
        path = run_file(tmp_path, "tf", model={"init": "scratch", "geometry": geometry}, ema={"enabled": False})
        peak, (total, weights, optimizer, activations) = measured(path, 1, 64)
        assert optimizer > max(weights, activations)
    else:
        geometry = {**TF, "num_double_layers": 2, "num_single_layers": 2}
        # Where bfloat16 is emulated this would take minutes; float32 has the same parts.
        precision = "bf16" if has_bf16(torch.device("cpu")) else "no"
        path = run_file(
            tmp_path, "tf", model={"init": "scratch", "geometry": geometry}, train={"mixed_precision": precision}
        )
        peak, (total, weights, optimizer, activations) = measured(path, 4, 192)
        assert activations > max(weights, optimizer)
    print(f"{largest}: {peak / 1e6:.0f} MB allocated, {total / 1e6:.0f} MB estimated")
    assert abs(total / peak - 1) < 0.15, (peak / 1e6, total / 1e6)


def estimate_run(config: RunConfig, items: Any) -> Estimate:
    """The estimate for the bucket that needs most."""
    return peak(config, estimate_sizes(config, items, config.spec.family.outline_model(config), largest_sizes))


def an_item(side: int, key: str = "image") -> Item:
    return Item(
        key, f"0:{key}", Path("a.png"), "text", Path("cache"), (side, side), place((side, side), (side, side)), 1, 1
    )


def of_flux(tmp_path: Path, count: bool = False, **changes: dict[str, Any]) -> Estimate:
    config = load_config(
        run_file(tmp_path, "fd", model={"path": flux_base(tmp_path)}, train={"mixed_precision": "bf16"}, **changes)
    )
    plan = config.spec.family.outline_model(config)
    return estimate(config, plan, (256, 256), 1, count=count)


def test_every_option_saves_what_it_promises(tmp_path: Path) -> None:
    plain = of_flux(tmp_path)
    assert plain.weights == 2 * sum(p.numel() for p in build(FD).parameters())
    fp8 = of_flux(tmp_path, memory={"base_storage": "fp8_scaled"})
    nf4 = of_flux(tmp_path, memory={"base_storage": "nf4"})
    everything = of_flux(tmp_path, memory={"base_storage": "fp8_scaled", "fp8_modulation": True})
    assert nf4.weights < fp8.weights < plain.weights and everything.weights < fp8.weights
    swapped = of_flux(tmp_path, memory={"blocks_to_swap": 4})
    assert swapped.weights + swapped.host == plain.weights
    assert 0 < swapped.ring < swapped.host
    checkpointed = of_flux(tmp_path, memory={"gradient_checkpointing": True})
    assert checkpointed.activations + checkpointed.passing < 0.5 * plain.activations
    small, large = of_flux(tmp_path, adapter={"rank": 2}), of_flux(tmp_path, adapter={"rank": 8})
    assert large.optimizer == 4 * small.optimizer and large.weights == small.weights


def test_auto_takes_the_fewest_blocks_that_fit(tmp_path: Path) -> None:
    def items(side: int) -> Any:
        return [SimpleNamespace(bucket=(side, side), batch_size=1)]

    path = run_file(tmp_path, "fd", model={"path": flux_base(tmp_path)}, memory={"blocks_to_swap": "auto"})
    config = load_config(path)
    totals = {}
    for count in range(7):
        chosen = load_config(path, {"memory.blocks_to_swap": count})
        totals[count] = estimate_run(chosen, items(128)).total
    for count in (0, 3, 6):
        # One block more or less moves the total; free memory is such that this number just fits.
        found, line = resolve_swap(config, items(128), int(totals[count] / 0.9) + 2)
        expected = min(n for n in totals if totals[n] <= totals[count])
        assert found.memory.blocks_to_swap == expected
        assert line is not None and f'"auto" is {expected}' in line
    with pytest.raises(ConfigError, match=r"finds no number that fits: .* Ways out: turn on memory\.gradient"):
        resolve_swap(config, items(128), min(totals.values()) // 2)
    found, line = resolve_swap(config, items(128), None)
    assert found.memory.blocks_to_swap == 0 and line is not None and "computes in main memory" in line
    _, line = resolve_swap(load_config(path, {"memory.swap_ring": 3, "memory.swap_pinned": False}), items(128), None)
    assert line is not None and line.endswith("; memory.swap_ring and memory.swap_pinned have no effect")
    assert resolve_swap(found, items(128), 1) == (found, None)


def test_auto_says_why_a_model_has_no_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no rule for this operator")

    monkeypatch.setattr("musubi_tuner.planning.estimate.run_step", failing)
    path = run_file(tmp_path, "fd", model={"path": flux_base(tmp_path)}, memory={"blocks_to_swap": "auto"})
    with pytest.raises(ConfigError, match=r"blocks_to_swap: .*no rule for this operator.*Write a number"):
        resolve_swap(load_config(path), [an_item(128)], 2**30)


@pytest.mark.slow
def test_full_size(tmp_path: Path) -> None:
    """FLUX.1-dev at 1024 px: 22.2 GiB of weights in bfloat16, and a run that fits 16 GB."""
    config = load_config(
        run_file(tmp_path, "fd", model={"path": flux_base(tmp_path)}, train={"mixed_precision": "bf16"},
                 memory={"base_storage": "fp8_scaled", "blocks_to_swap": 25, "gradient_checkpointing": True})
    )  # fmt: skip
    shapes = {"t5_vec": (512, 4096), "clip_l_pooler": (768,)}
    found = estimate(config, ModelOutline(build(FluxConfig()), torch.bfloat16, shapes, {}), (1024, 1024), 1)
    assert 10 * 2**30 < found.weights < 11 * 2**30
    assert found.total < 16e9
    assert "GiB on the device: weights" in found.lines()[0] and "main memory for swapped blocks" in found.lines()[1]


@pytest.mark.slow
def test_operations_are_those_of_the_formula(tmp_path: Path) -> None:
    """models/tinyflux/flops.py derives them from the geometry, and leaves small products out."""
    geometry = {**TF, "num_double_layers": 3, "num_single_layers": 5}
    model = {"init": "scratch", "geometry": geometry, "t5_max_tokens": 128}
    experts = {"expert_input": "random", "enable_lune": False, "enable_sol": False}
    found = {}
    for checkpointing, side in ((False, 256), (True, 256), (False, 512)):
        path = run_file(tmp_path, "tf", model=model, experts=experts, memory={"gradient_checkpointing": checkpointing})
        config = load_config(path)
        plan = config.spec.family.outline_model(config)
        found[checkpointing, side] = estimate(config, plan, (side, side), 2).operations
        expected = training_flops(plan.model.config, 2, side // 8, side // 8, 128, checkpointing=checkpointing)
        # The backward pass of attention recomputes its logits (3.5 products of a forward's 2, not 4): up to a tenth more.
        assert 0.97 < found[checkpointing, side] / expected < 1.12, (checkpointing, side)
    assert found[True, 256] > 1.2 * found[False, 256]


@pytest.mark.parametrize("layers", [(0, 1), (1, 1), (2, 0)])
def test_operations_of_lists_with_few_blocks_or_none(layers: tuple[int, int], tmp_path: Path) -> None:
    geometry = {**TF, "num_double_layers": layers[0], "num_single_layers": layers[1]}
    experts = {"expert_input": "random", "enable_lune": False, "enable_sol": False}
    config = load_config(run_file(tmp_path, "tf", model={"init": "scratch", "geometry": geometry}, experts=experts))
    plan = config.spec.family.outline_model(config)
    items: Any = [SimpleNamespace(bucket=(512, 512), batch_size=2)]
    (found,) = estimate_sizes(config, items, plan, list, count=True).values()
    expected = training_flops(plan.model.config, 2, 64, 64, 64, checkpointing=False)
    assert 0.97 < found.operations / expected < 1.12


def test_recomputation_counts_every_nth_block(tmp_path: Path) -> None:
    plain = of_flux(tmp_path, count=True).operations
    every, second = (
        of_flux(tmp_path, count=True, memory={"gradient_checkpointing": True, "checkpoint_every": n}).operations
        for n in (1, 2)
    )
    assert plain < second < every
    # Nine blocks: one double and eight single; every second one of them is the double one and four single ones.
    assert (every - plain) * 0.5 < second - plain < (every - plain) * 0.7


def test_what_is_moved(tmp_path: Path) -> None:
    assert of_flux(tmp_path).moved == 0
    swapped = of_flux(tmp_path, memory={"blocks_to_swap": 4, "swap_pinned": False})
    assert not swapped.pinned
    assert swapped.moved == 2 * (swapped.host - swapped.ring)
    plain = of_flux(tmp_path, memory={"gradient_checkpointing": True})
    away = of_flux(tmp_path, memory={"checkpoint_offload": True})
    # Image and text into the double block, the sequence into eight single ones: 256 + 64 tokens of 768 in bfloat16.
    assert away.offloaded == 9 * (256 + 64) * 768 * 2
    assert away.brought == away.taken == away.offloaded
    assert plain.activations - away.activations > 0.8 * away.offloaded
    assert away.total < plain.total
    assert "main memory for the inputs of blocks" in away.lines()[1]


def test_lines_of_the_plan(tmp_path: Path) -> None:
    path = run_file(tmp_path, "fd", model={"path": flux_base(tmp_path)}, train={"mixed_precision": "bf16", "grad_accum_steps": 2},
                    adapter={"rank": 4}, memory={"blocks_to_swap": 4, "gradient_checkpointing": True},
                    save={"every_steps": 3, "keep_last_steps": 2, "dtype": "bfloat16"})  # fmt: skip
    config = load_config(path)
    items = [an_item(side) for side in (256, 128, 256)]
    steps = calculate_steps([(3, 1)], num_processes=1, grad_accum_steps=2, max_steps=10, max_epochs=None)
    lines = estimate_lines(config, items, steps, torch.device("cpu"), free=1)
    assert lines[0].startswith("  memory   about ")
    assert re.fullmatch(r" {11}activations by bucket: .*iB \(128x128, batch 1\); .*iB \(256x256, batch 1\)", lines[2])
    assert re.search(r"disk     caches up to .*; 3 checkpoint\(s\) of .* of weights, 2 state\(s\) of ", lines[3])
    assert re.search(
        r"10\^12 operations per update and process, with the largest bucket, at least [\w.]+ ?s? at .*", lines[4]
    )
    assert re.search(
        r"GiB? are moved to the device, at least [\w.]+ ?s? at .*/s: (computation|copying) binds", lines[5]
    )
    assert lines[6].startswith("warning: only 0.0 MiB of device memory is free")
    plan = config.spec.family.outline_model(config)
    latents, text = 4 * 16 * (2 * 32**2 + 16**2), 3 * 2 * (64 * 64 + 64)
    assert cache_bytes(config, items, plan).total() == latents + text
    several = [replace(items[0], more_captions=("second", "third")), *items[1:]]
    assert cache_bytes(config, several, plan).total() == latents + text * 5 // 3
    found = estimate_run(config, items)
    weights, state = checkpoint_bytes(config, plan, found)
    assert found.moments == 8 * found.values and (weights, state) == (2 * found.values, (4 + 8) * found.values)


def test_a_sharded_model_leaves_its_share_and_two_blocks_on_each_device(tmp_path: Path) -> None:
    path = run_file(tmp_path, "tf", model={"init": "scratch"}, distributed={"fsdp": True}, ema={"enabled": True})
    config = load_config(path)
    plan = config.spec.family.outline_model(config)
    whole = estimate_run(config, [an_item(128)])
    assert sharded(whole, config, plan, 1) == whole
    half = sharded(whole, config, plan, 2)
    assert half.optimizer == whole.optimizer // 2 and half.average == whole.average // 2
    blocks = [
        sum(p.numel() for p in block.parameters())
        for name in config.spec.block_lists
        for block in getattr(plan.model, name)
    ]
    outside = sum(p.numel() for p in plan.model.parameters()) - sum(blocks)
    assert half.weights == -(-whole.weights // 2) + 4 * (outside + 2 * max(blocks))
    assert half.activations == whole.activations
    for decoding in (0, 1):
        many = sharded(replace(whole, decoding=decoding), config, plan, 1000)
        assert many.weights + many.decoding == whole.weights + decoding and many.total >= whole.weights
        assert "the whole model is gathered" in "".join(many.lines(1000))


def test_activations_of_every_bucket_are_those_of_the_model(tmp_path: Path) -> None:
    """Two sizes of each batch size are run; what is between them lies on a line."""
    path = run_file(tmp_path, "fd", model={"path": flux_base(tmp_path)}, train={"mixed_precision": "bf16"})
    config = load_config(path)
    plan = config.spec.family.outline_model(config)
    single = [(256, 256), (512, 256), (256, 512), (512, 512), (768, 768)]
    shapes = [*((bucket, 1) for bucket in single), ((256, 256), 4), ((512, 512), 4)]
    items: Any = [SimpleNamespace(bucket=bucket, batch_size=count) for bucket, count in shapes]
    sizes = bucket_sizes(items)
    assert sizes[Size(1, 256 * 512)] == [(256, 512), (512, 256)]
    every = estimate_sizes(config, items, plan, sorted)
    ends = (Size(1, 256**2), Size(1, 768**2), Size(4, 256**2), Size(4, 512**2))
    measured = {size: every[size] for size in ends}
    assert len(sizes) == len(ends) + 2
    text = " ".join(" ".join(activation_lines(items, measured)).split()).removeprefix("activations by bucket: ")
    shown = re.findall(r"([\d.]+) ([MG])iB \((.*?), batch (\d)\)", text)
    expected = [(", ".join(f"{w}x{h}" for w, h in buckets), str(size.batch_size)) for size, buckets in sizes.items()]
    assert [tuple(names) for _, _, *names in shown] == expected
    bytes_shown = [float(number) * {"M": 2**20, "G": 2**30}[unit] for number, unit, *_ in shown]
    assert bytes_shown == pytest.approx([found.activations + found.passing for found in every.values()], rel=0.01)


def test_many_small_images_may_need_more_than_one_of_as_many_pixels(tmp_path: Path) -> None:
    """Every image of a batch brings its text."""
    config = load_config(run_file(tmp_path, "fd", model={"path": flux_base(tmp_path)}))
    one, four = SimpleNamespace(bucket=(256, 256), batch_size=1), SimpleNamespace(bucket=(128, 128), batch_size=4)
    small: Any = SimpleNamespace(bucket=(64, 64), batch_size=1)
    totals = {each.batch_size: estimate_run(config, [each]).total for each in (one, four)}  # type: ignore[list-item]
    assert totals[4] > totals[1]
    assert estimate_run(config, [one, small, four]).total == totals[4]  # type: ignore[list-item]
    assert largest_sizes([Size(1, 9), Size(1, 8), Size(2, 4), Size(4, 1)]) == [Size(4, 1), Size(2, 4), Size(1, 9)]


def test_what_binds(tmp_path: Path) -> None:
    """Both directions are copied at once, so the longer one counts."""
    config = load_config(run_file(tmp_path, "fd", model={"path": flux_base(tmp_path)}, memory={"blocks_to_swap": 4}))
    found = Estimate(0, 0, 0, 0, 0, 0, 0, 0, 0, operations=10**12, brought=2**30, taken=2**29)
    cpu = torch.device("cpu")
    assert time_lines(config, found, cpu, Rates(1e12, 2**31)) == [
        "  compute  1 * 10^12 operations per update and process, with the largest bucket, at least 1 s at 1 * 10^12/s;",
        "           1.00 GiB are moved to the device and 0.50 GiB from it, at least 0.5 s at 2.00 GiB/s: computation binds",
    ]
    assert "copying binds" in time_lines(config, found, cpu, Rates(1e12, 2**29))[1]
    assert time_lines(config, replace(found, brought=0, taken=0), cpu) == [
        "  compute  1 * 10^12 operations per update and process, with the largest bucket; nothing is moved, so computation binds"
    ]
    rates = measure_rates(cpu, torch.float32)
    assert rates.operations > 1e7 and rates.copied > 1e7


def test_disk_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(run_file(tmp_path, "fd", model={"path": flux_base(tmp_path)}, save={"release": False}))
    items = [an_item(128, "first"), an_item(128, "second")]
    steps = calculate_steps([(1, 1)], num_processes=1, grad_accum_steps=1, max_steps=10, max_epochs=None)
    plan = config.spec.family.outline_model(config)
    found = estimate_run(config, items)
    checkpoints = checkpoint_bytes(config, plan, found)[0] + checkpoint_bytes(config, plan, found)[1]
    caches = {kind: ["0:first", "0:second"] for kind in ("latents", "text")}
    everything = cache_bytes(config, items, plan, caches).total()
    assert everything == cache_bytes(config, items, plan).total()
    half = cache_bytes(config, items, plan, {kind: ["0:second"] for kind in caches}).total()
    assert 2 * half == everything

    def warnings(free: int, missing: dict[str, list[str]] | None = None) -> list[str]:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
        return disk_lines(config, items, steps, plan, found, missing)[1:]

    (line,) = warnings(1000)
    assert line.startswith(f"warning: only 0.0 MiB of disk is free in {tmp_path}, and ") and line.endswith("see [save]")
    assert warnings(checkpoints) == []
    assert len(warnings(checkpoints, caches)) == len(warnings(checkpoints + everything - 1, caches)) == 1
    assert warnings(checkpoints + everything, caches) == []


def test_main_memory_of_the_plan_is_what_the_settings_take() -> None:
    found = Estimate(0, 0, 0, 0, 0, 0, 0, 0, 2**30, 2**30, pinned=3 * 2**29)
    pinned = " of main memory for swapped blocks (1.50 GiB pinned)"
    staged = " of main memory for swapped blocks (not pinned; beside it 64.0 MiB of pinned buffers for copies)"
    assert found.lines()[1].endswith(pinned)
    assert found.lines()[2].endswith(" for the inputs of blocks (not pinned)")
    lines = replace(found, pinned=0, staging=2**26, pins=True, averaged=2**30).lines()
    assert lines[1].endswith(staged)
    assert lines[2].endswith(" for the inputs of blocks (pinned, up to twice that)")
    assert lines[3] == "           1.00 GiB of main memory for the average (not pinned)"
    lines = found.lines(processes=3)
    assert "on the device of each process: " in lines[0]
    assert "1.00 GiB of main memory in each of 3 processes, 3.00 GiB in all, for swapped blocks" in lines[1]


def test_what_products_hold_for_the_moment_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest input is the second layer of a single block, the widest output the first: values and MLP of all tokens."""
    tokens, width = 16 * 16 + 64, FD.hidden_size
    inner = int(FD.mlp_ratio * width)
    largest = width * (3 * width + inner)

    def moment(**memory: Any) -> int:
        run, common = {"device": "auto"}, {"gradient_checkpointing": True}
        plain = of_flux(tmp_path, run=run, memory=common)
        return of_flux(tmp_path, run=run, memory={**common, **memory}).passing - plain.passing

    assert moment(base_storage="fp8_scaled") == 2 * largest
    assert moment(base_storage="nf4") == 6 * largest
    fp8 = {"base_storage": "fp8_scaled", "fp8_compute": True}
    assert moment(**fp8) == max(2 * largest, 5 * tokens * (width + inner))
    assert moment(**fp8, fp8_compute_backward="fp8") == max(2 * largest, 9 * tokens * (3 * width + inner))
    # A GPU brings more of it to float32 together, where there are scales.
    monkeypatch.setattr("musubi_tuner.planning.estimate.choose_device", lambda _: torch.device("cuda"))
    assert moment(base_storage="int8") == 2 * largest + 8 * min(largest, DEVICE_CHUNK)
    assert moment(base_storage="fp8") == 2 * largest


def test_a_gpu_keeps_the_inputs_of_norms_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two norms for images and two for text in the double block, one for both in each single one, and the last, for images.

    What enters the very first of images and of text needs no gradient, so it is not kept. The last one is given a part of a tensor:
    in its own precision all of that tensor is kept, in another a copy of the part. Of each token there are mean and deviation.
    """
    image, text, width, single = 16 * 16, 64, FD.hidden_size, FD.depth_single_blocks
    last = 4 * width * image - 2 * width * (image + text)
    recomputed = {"memory": {"gradient_checkpointing": True}, "adapter": {"only": [r"single_blocks\..*"]}}
    here, here_recomputed = of_flux(tmp_path), of_flux(tmp_path, count=True, **recomputed)
    monkeypatch.setattr("musubi_tuner.planning.estimate.choose_device", lambda _: torch.device("cuda"))
    there, there_recomputed = of_flux(tmp_path), of_flux(tmp_path, count=True, **recomputed)
    inside = 2 * width * (image + text) * (1 + single)
    moments = 2 * 2 * ((image + text) * (1 + single) + image)
    assert there.activations - here.activations == inside + last + moments
    assert there_recomputed.activations - here_recomputed.activations == last + 2 * 2 * image
    # What enters a recomputed block is kept outside of it; its float32 copy is not.
    assert there_recomputed.passing - here_recomputed.passing == (4 * width + 2 * 2) * (image + text)
    assert there_recomputed.operations == here_recomputed.operations


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a run on a GPU."""
    monkeypatch.setattr("musubi_tuner.planning.estimate.choose_device", lambda _: torch.device("cuda"))


def test_what_is_pinned_is_pinned_on_a_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"blocks_to_swap": 3}
    here = of_flux(tmp_path, memory=memory)
    assert here.pinned == here.staging == 0 and here.lines()[1].endswith("(not pinned)")
    monkeypatch.setattr("musubi_tuner.planning.estimate.choose_device", lambda _: torch.device("cuda"))
    swapped = of_flux(tmp_path, memory=memory)
    assert swapped.host == here.host and swapped.staging == 0
    assert swapped.pinned == sum(size for size, _ in pinned_pieces([swapped.host // 3] * 3)) > swapped.host
    loose = of_flux(tmp_path, memory={**memory, "swap_pinned": False})
    assert loose.pinned == 0 and loose.staging == 2 * STAGING_BYTES


def test_gradients_of_swapped_blocks_pass_through_two_buffers(tmp_path: Path, on_gpu: None) -> None:
    """On the device, and pinned in main memory; a single swapped block needs one."""
    items: Any = [SimpleNamespace(bucket=(64, 64), batch_size=1)]
    geometry = {**TF, "num_double_layers": 2, "num_single_layers": 5}
    found = {}
    for count in (1, 3):
        memory = {"blocks_to_swap": count, "swap_ring": 1}
        path = run_file(tmp_path, "tf", model={"init": "scratch", "geometry": geometry}, memory=memory)
        found[count] = estimate_run(load_config(path), items)
    block = found[1].ring // 2
    assert found[3].ring == 3 * block
    assert block < found[1].staging == found[1].pinned and found[3].staging == 2 * found[1].pinned
    assert found[3].taken == 3 * found[1].taken == 3 * block and found[3].brought == 6 * block


def test_the_plan_and_the_search_for_a_number_of_blocks_agree(tmp_path: Path, on_gpu: None) -> None:
    items: Any = [SimpleNamespace(bucket=(64, 64), batch_size=1)]
    geometry = {**TF, "num_double_layers": 3, "num_single_layers": 3}
    path = run_file(tmp_path, "tf", model={"init": "scratch", "geometry": geometry}, memory={"blocks_to_swap": 2},
                    train={"mixed_precision": "bf16"})  # fmt: skip
    needed = estimate_run(load_config(path), items).total
    config = load_config(path, {"memory.blocks_to_swap": "auto"})
    found, line = resolve_swap(config, items, int(needed / 0.9) + 2)
    assert found.memory.blocks_to_swap == 2
    assert line is not None and f"about {format_bytes(needed)} of" in line


def test_an_average_in_main_memory_is_none_on_the_device(tmp_path: Path) -> None:
    items: Any = [SimpleNamespace(bucket=(64, 64), batch_size=1)]
    for swap in (0, 2):
        there, here = (
            estimate_run(load_config(run_file(
                tmp_path, "tf", model={"init": "scratch"}, ema={"on_cpu": on_cpu}, memory={"blocks_to_swap": swap}
            )), items)
            for on_cpu in (False, True)
        )  # fmt: skip
        assert here.average == 0 and here.averaged == there.average == there.gradients and there.averaged == 0
        assert here.total == there.total - there.average and here.host == there.host


def test_decoding_counts_where_it_needs_more_than_the_backward_pass(tmp_path: Path) -> None:
    linear = LinearPatchConfig()
    save_file(LinearPatchAutoencoder(linear).state_dict(), tmp_path / "vae.safetensors")
    (tmp_path / "vae.json").write_text(json.dumps(linear.to_dict()))
    model = {"init": "scratch", "vae_path": str(tmp_path / "vae.safetensors")}
    sample = {"prompts": ["a cat", "a dog --w 128 --h 256"], "every_steps": 1, "width": 64, "height": 64}
    found = decoding_bytes(load_config(run_file(tmp_path, "tf", model=model, sample=sample)))
    weights = sum(4 * p.numel() for p in LinearPatchAutoencoder(linear).parameters())
    # Pixels come out as columns and as a picture.
    pixels = 4 * 3 * 128 * 256
    assert 2 * pixels < found - weights < 6 * pixels
    assert decoding_bytes(load_config(run_file(tmp_path, "tf", model=model))) == 0
    resting = Estimate(
        weights=100, ring=0, trained=1, gradients=20, optimizer=2, average=4, activations=5, passing=5, host=0
    )
    assert (resting.total, replace(resting, decoding=29).total, replace(resting, decoding=50).total) == (137, 137, 157)
    assert "while a sample is decoded" in replace(resting, decoding=50).lines()[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_keep_their_dtype_are_counted_in_it(dtype: torch.dtype, tmp_path: Path) -> None:
    small = FluxConfig(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1, vec_in_dim=64, context_in_dim=64)
    tensors = {key: torch.zeros(t.shape, dtype=dtype) for key, t in build(small).state_dict().items()}
    save_file(tensors, tmp_path / "flux.safetensors")
    (tmp_path / "flux.json").write_text(json.dumps(small.to_dict()))
    config = load_config(
        run_file(tmp_path, "fd", model={"path": str(tmp_path / "flux.safetensors"), "keep_dtype": True})
    )
    assert config.spec.family.outline_model(config).dtype == dtype


ADAPTERS: dict[str, dict[str, Any]] = {
    "none": {"type": "none"},
    "everywhere": {},
    "some blocks": {"only": [r"double_blocks\.2\..*", r"single_blocks\.[3-5]\.linear1"]},
    "by block": {"dropout": 0.5, "targets": [{"pattern": "single_blocks.[2-4].**", "rank": 8},
                                             {"pattern": "single_blocks.6.**", "enabled": False}]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("adapters", "every", "away"),
    [("none", 2, False),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in (
         ("none", 0, False), ("everywhere", 1, True), ("everywhere", 2, False), ("some blocks", 0, False),
         ("by block", 0, False), ("by block", 3, False)))],
)  # fmt: skip
def test_few_blocks_stand_for_all(
    adapters: str, every: int, away: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with every block keeps to the byte, and computes to the operation, what is reckoned from runs with few."""
    family = "tf" if adapters == "none" else "fd"
    geometry = {**TF, "num_double_layers": 4, "num_single_layers": 7}
    model = {"init": "scratch", "geometry": geometry} if family == "tf" else {"path": flux_base(tmp_path)}
    tables: dict[str, Any] = {
        "adapter": {"rank": 4, **ADAPTERS[adapters]},
        "memory": {"gradient_checkpointing": every > 0, "checkpoint_every": every or 1, "checkpoint_offload": away},
        "train": {"mixed_precision": "bf16"},
    }
    config = load_config(run_file(tmp_path, family, model=model, **tables))
    plan = config.spec.family.outline_model(config)
    if family == "fd":
        plan = replace(plan, model=build(replace(FD, depth=4, depth_single_blocks=7)))
    few = fake_step.run_step(config, plan, (128, 64), 2)
    assert few.kept and few.operations and bool(few.offloaded) is away and bool(few.block) is (every > 0)
    alike = fake_step._kinds

    def every_block_alone(*args: Any) -> list[Any]:
        kinds = {(kind.name, number): kind for kind in alike(*args) for number in kind.numbers}
        assert len(kinds) == 11
        return [kinds[at]._replace(numbers=[at[1]]) for at in sorted(kinds)]

    monkeypatch.setattr(fake_step, "_kinds", every_block_alone)
    assert few == fake_step.run_step(config, plan, (128, 64), 2)
