"""What the plan says of memory, disk and time, before anything big is loaded."""

import logging
import math
import shutil
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from musubi_tuner.config import RunConfig, Steps
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import tally
from musubi_tuner.data.workers import shared_memory_warning
from musubi_tuner.memory.compose import ways_to_save
from musubi_tuner.models.family import ModelOutline
from musubi_tuner.planning.estimate import (
    Estimate,
    Size,
    bucket_sizes,
    estimate_sizes,
    largest_sizes,
    peak,
    sharded,
)
from musubi_tuner.planning.task_estimate import estimate_task
from musubi_tuner.precision import COMPUTE_DTYPES
from musubi_tuner.units import Bytes, format_bytes, format_seconds

PROBE_SIDE = {"cuda": 4096, "cpu": 768}
"""Side of the matrices that are multiplied to measure a device."""
PROBE_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}

Missing = Mapping[str, Collection[str]]
"""Kind of cache -> keys of items."""
WIDTH = 120
"""Columns of a line of the plan."""


def estimate_lines(
    config: RunConfig,
    items: Sequence[Item],
    steps: Steps,
    device: torch.device,
    free: Bytes | None = None,
    processes: int = 1,
    rates: "Rates | None" = None,
    missing: Missing | None = None,
) -> list[str]:
    """What a run will need; a note where this torch cannot run a model without storage.

    Args:
        config: its ``blocks_to_swap`` is a number, see `resolve_swap`.
        free: device memory in bytes, to be warned if it is less.
        rates: of the device; absent = measured, where something is copied.
        missing: cache files that are still to be made; absent = none.
    """
    # The mode that runs it writes its own tracebacks; whatever is wrong with the model is said by name when it is loaded.
    fake = logging.getLogger("torch._subclasses.fake_tensor")
    before, fake.disabled = fake.disabled, True
    try:
        plan = config.spec.family.outline_model(config)
        measured = estimate_sizes(config, items, plan, _ends, count=True)
        whole = peak(config, measured)
        found = sharded(whole, config, plan, processes)
        found = replace(found, operations=max(each.operations for each in measured.values()))
    except (RuntimeError, NotImplementedError, AssertionError) as problem:
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        return [f"  memory   could not be estimated for this model: {reason}"]
    finally:
        fake.disabled = before
    unknown = []
    if config.sample.prompts is not None and not whole.decoding:
        unknown = ["           and the autoencoder while a sample is decoded, which is counted once it is downloaded"]
    lines = [
        *found.lines(processes),
        *unknown,
        *activation_lines(items, measured),
        *disk_lines(config, items, steps, plan, found, missing),
        *time_lines(config, found, device, rates),
    ]
    shared = shared_memory_warning(batch_bytes(config, items, plan), config.train.loader_workers, processes)
    lines += [shared] if shared else []
    if free is not None and found.total > free:
        lines.append(f"warning: only {format_bytes(free)} of device memory is free; see [memory]")
    return lines


def task_lines(config: RunConfig, items: Sequence[Item], free: Bytes | None, processes: int = 1) -> list[str]:
    """What a task of several roles will need of memory.

    Args:
        free: device memory in bytes, to be warned if it is less.
    """
    fake = logging.getLogger("torch._subclasses.fake_tensor")
    before, fake.disabled = fake.disabled, True
    try:
        sizes = bucket_sizes(items)
        found = max(
            (estimate_task(config, sizes[size][0], size.batch_size) for size in largest_sizes(sizes)),
            key=lambda each: each.total,
        )
    except (RuntimeError, NotImplementedError, AssertionError) as problem:
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        return [f"  memory   could not be estimated for this task: {reason}"]
    finally:
        fake.disabled = before
    lines = found.lines(processes)
    if free is not None and found.total > free:
        lines.append(f"warning: only {format_bytes(free)} of device memory is free; ways out: {ways_to_save(config)}")
    return lines


def _ends(sizes: Iterable[Size]) -> set[Size]:
    """The smallest and the largest size of every batch size."""
    by_batch: dict[int, list[Size]] = {}
    for size in sizes:
        by_batch.setdefault(size.batch_size, []).append(size)
    return {end for each in by_batch.values() for end in (min(each), max(each))}


def activation_lines(items: Sequence[Item], measured: Mapping[Size, Estimate]) -> list[str]:
    """Activations and backward pass of every bucket, if there are several; buckets of one size share a number.

    What autograd keeps of a batch grows evenly with the pixels of its images, so sizes between two measured ones lie on a line;
    but for the few tokens up to which a CPU computes attention as written.

    Args:
        measured: the smallest and the largest size of every batch size.
    """
    sizes = bucket_sizes(items)
    if len(sizes) == 1:
        return []
    shown = []
    for size, buckets in sizes.items():
        ends = [each for each in measured if each.batch_size == size.batch_size]
        low, high = min(ends), max(ends)
        share = (size.pixels - low.pixels) / max(1, high.pixels - low.pixels)
        least, most = (measured[end].activations + measured[end].passing for end in (low, high))
        names = ", ".join(f"{width}x{height}" for width, height in buckets)
        shown.append(f"{format_bytes(int(least + share * (most - least)))} ({names}, batch {size.batch_size})")
    return textwrap.wrap(
        "activations by bucket: " + "; ".join(shown),
        WIDTH,
        initial_indent=" " * 11,
        subsequent_indent=" " * 13,
        break_long_words=False,
        break_on_hyphens=False,
    )


def disk_lines(
    config: RunConfig,
    items: Sequence[Item],
    steps: Steps,
    plan: ModelOutline,
    found: Estimate,
    missing: Missing | None = None,
) -> list[str]:
    """Disk for caches and checkpoints, with a warning where there is too little for the checkpoints and the missing caches."""
    caches = cache_bytes(config, items, plan).total()
    weights, state = checkpoint_bytes(config, plan, found)
    count = _kept_checkpoints(config, steps)
    states = min(count, config.save.keep_last_states or count) if config.save.state else 0
    total = (count + config.save.release + config.keeps_best) * weights + states * state
    each = f"{format_bytes(weights)} of weights" + (f", {states} state(s) of {format_bytes(state)}" if states else "")
    lines = [f"  disk     caches up to {format_bytes(caches)}; {count} checkpoint(s) of {each}: {format_bytes(total)}"]
    due = cache_bytes(config, items, plan, missing or {})
    folders = [(config.output_dir, total)]
    folders += [(config.datasets[number].cache_directory, size) for number, size in due.items() if size]
    disks: dict[int, tuple[Path, Bytes]] = {}
    for folder, size in folders:
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        first, before = disks.get(place.stat().st_dev, (place, 0))
        disks[place.stat().st_dev] = first, before + size
    for place, needed in disks.values():
        available = shutil.disk_usage(place).free
        if available < needed:
            lines.append(
                f"warning: only {format_bytes(available)} of disk is free in {place}, and {format_bytes(needed)} will be written "
                "there; see [save]"
            )
    return lines


def cache_bytes(
    config: RunConfig, items: Sequence[Item], plan: ModelOutline, only: Missing | None = None
) -> Counter[int]:
    """Of the cache files by number of the dataset, if every caption fills its tokens.

    Args:
        only: count these; absent = all.
    """
    spec, chosen = config.spec, config.cache.dtype
    sizes = {"latents": "float32", "text": "bfloat16", "experts": "float32"}
    widths = {kind: getattr(torch, dtype if chosen == "auto" else chosen).itemsize for kind, dtype in sizes.items()}
    captions: dict[str, Counter[int]] = {kind: Counter() for kind in sizes}
    found: Counter[int] = Counter()
    if only is not None and not any(only.values()):
        return found
    for item, count in tally(items) if only is None else ((item, 1) for item in items):
        of = {kind for kind in sizes if only is None or item.key in only.get(kind, ())}
        for kind in of:
            captions[kind][item.dataset] += count * len(item.captions)
        if "latents" in of:
            of_one = math.prod(config.latents.shape(*item.bucket)) * widths["latents"] * max(1, len(item.views))
            found[item.dataset] += count * of_one
    groups = config.dataset_groups()
    for group in groups:
        own = plan if len(groups) == 1 else spec.family.outline_model(config.limited_to(group))
        for name, shape in own.shapes.items():
            kind = "experts" if name in spec.expert_keys else "text"
            size = torch.Size(shape).numel() * widths[kind]
            for number in group:
                found[number] += size * captions[kind][number]
    return found


def batch_bytes(config: RunConfig, items: Sequence[Item], plan: ModelOutline) -> Bytes:
    """Of the largest micro-batch: of one caption each, in the largest bucket of a dataset."""
    largest: dict[int, Item] = {}
    for item, _ in tally(items):
        other = largest.get(item.dataset)
        if other is None or math.prod(item.bucket) > math.prod(other.bucket):
            largest[item.dataset] = replace(item, more_captions=())
    sizes = cache_bytes(config, list(largest.values()), plan)
    return max(sizes[number] * item.batch_size for number, item in largest.items())


def checkpoint_bytes(config: RunConfig, plan: ModelOutline, found: Estimate) -> tuple[Bytes, Bytes]:
    """Of one checkpoint: its weights, with their average, and its state."""
    frozen = config.adapter.type != "none"
    stored = found.values if frozen else sum(tensor.numel() for tensor in plan.model.state_dict().values())
    copies = 2 if config.ema.enabled else 1
    weights = copies * stored * getattr(torch, config.save.dtype).itemsize
    return weights, 4 * copies * stored + found.moments


def _kept_checkpoints(config: RunConfig, steps: Steps) -> int:
    """How many lie on the disk at the end, the final one included."""
    save, count = config.save, 1
    for every, total, keep in (
        (save.every_steps, max(0, steps.total_updates - 1), save.keep_last_steps),
        (save.every_epochs, max(0, steps.epochs - 1), save.keep_last_epochs),
    ):
        if every:
            made = total // every
            count += min(made, keep) if keep else made
    return count


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: operations of matrix products, and bytes that come from main memory."""

    operations: float
    copied: float


def measure_rates(device: torch.device, dtype: torch.dtype | None) -> Rates:
    """Multiply and copy for a few milliseconds.

    Args:
        dtype: of the computation; None = float32.
    """
    side, size = PROBE_SIDE[device.type], PROBE_BYTES[device.type]
    a = torch.randn(side, side, device=device, dtype=dtype or torch.float32)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)

    def seconds(action: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(4):
            _synchronize(device)
            begun = time.perf_counter()
            action()
            _synchronize(device)
            best = min(best, time.perf_counter() - begun)
        return best

    return Rates(2 * side**3 / seconds(lambda: a @ a), size / seconds(lambda: target.copy_(host, non_blocking=True)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_lines(config: RunConfig, found: Estimate, device: torch.device, rates: Rates | None = None) -> list[str]:
    """Operations of an update, and whether they or the copies take longer.

    Args:
        rates: of the device; absent = measured, where something is copied.
    """
    per_update = config.train.grad_accum_steps
    work = (
        f"{found.operations * per_update / 1e12:.3g} * 10^12 operations per update and process, with the largest bucket"
    )
    if not found.moved:
        return [f"  compute  {work}; nothing is moved, so computation binds"]
    ways = f"{format_bytes(found.brought * per_update)} are moved to the device"
    ways += f" and {format_bytes(found.taken * per_update)} from it" if found.taken else ""
    if device.type not in PROBE_SIDE:
        return [f"  compute  {work}; {ways}"]
    dtype = COMPUTE_DTYPES[config.train.mixed_precision]
    rates = rates or measure_rates(device, dtype)
    # Both directions at once.
    computing, copying = found.operations / rates.operations, max(found.brought, found.taken) / rates.copied
    binds = "computation binds" if computing >= copying else "copying binds"
    return [
        f"  compute  {work}, at least {_seconds(computing * per_update)} at {rates.operations / 1e12:.3g} * 10^12/s;",
        f"           {ways}, at least {_seconds(copying * per_update)} at {format_bytes(rates.copied)}/s: {binds}",
    ]


def _seconds(value: float) -> str:
    return format_seconds(value) if value >= 60 else f"{value:.2g} s"
