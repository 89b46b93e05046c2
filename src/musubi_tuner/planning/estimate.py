"""How much device memory a run will need, from its own model without storage.

    weights      what lies on the device, in its form of storage, streamed blocks left out, and the ring that they pass through
    trained      weights, gradients, optimizer state and average of what trains
    activations  what autograd keeps of one micro-batch, counted while the training step runs on tensors without storage
    passing      the recomputed block, and the largest weight in its compute form, for the moment of the backward pass
    operations   of the matrix products of forward and backward, by torch's counter, recomputation included
    brought      copied to the device in one micro-batch: streamed blocks twice, but for those that are still in the ring, and
                 inputs of blocks that come back
    taken        copied from it, beside that: gradients of trained blocks, and inputs of blocks

Nothing is read from a table: the model is built and run, only without memory (torch's fake tensors).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from musubi_tuner.config import RunConfig
from musubi_tuner.config.prompts import sample_prompts
from musubi_tuner.config.swap import most_swapped, swapped_counts
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import tally
from musubi_tuner.device import choose_device, encoder_dtype
from musubi_tuner.errors import ConfigError
from musubi_tuner.memory.block_swap import streamed_indices
from musubi_tuner.memory.compose import block_counts, freeze_of, ways_to_save
from musubi_tuner.memory.flat import pinned_pieces
from musubi_tuner.memory.frozen_linear import BLOCK, Storage
from musubi_tuner.memory.gradient_return import GRADIENT_BUFFERS
from musubi_tuner.memory.transfer import STAGING_BYTES
from musubi_tuner.models.family import ModelOutline
from musubi_tuner.optimizers import state_bytes
from musubi_tuner.planning.fake_step import Alive, StepNeeds, default_dtype, run_step
from musubi_tuner.training.sampling import sample_settings
from musubi_tuner.units import Bytes, format_bytes
from musubi_tuner.weights.stored import DEVICE_CHUNK


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device, but for ``host``, the permanent copies of streamed blocks in main memory, and ``offloaded``, what
    a forward pass leaves there.

    ``operations``, ``brought`` and ``taken`` are those of one micro-batch; ``values`` is the number of trained ones, ``moments`` what
    the optimizer remembers of them wherever it lies; ``pinned`` is what torch pins for the weights in ``host``, 0 = they are not
    pinned; ``staging`` is what it pins for copies only; ``pins`` says whether the device's copies need that; ``averaged`` is an
    average in main memory; ``decoding`` is the autoencoder with the peak of decoding a sample, when there are no
    gradients and activations, and what the rest of a sharded model takes while it is gathered (``gathers``). All of it is of one process.
    """

    weights: Bytes
    ring: Bytes
    trained: Bytes
    gradients: Bytes
    optimizer: Bytes
    average: Bytes
    activations: Bytes
    passing: Bytes
    host: Bytes
    offloaded: Bytes = 0
    operations: int = 0
    brought: Bytes = 0
    taken: Bytes = 0
    values: int = 0
    moments: Bytes = 0
    pinned: Bytes = 0
    staging: Bytes = 0
    pins: bool = False
    averaged: Bytes = 0
    decoding: Bytes = 0
    gathers: bool = False

    @property
    def total(self) -> Bytes:
        """The peak on the device: in the backward pass, or where a sample is decoded."""
        resting = self.weights + self.ring + self.trained + self.optimizer + self.average
        return resting + max(self.gradients + self.activations + self.passing, self.decoding)

    @property
    def moved(self) -> Bytes:
        """Copied between main memory and the device in one micro-batch."""
        return self.brought + self.taken

    def lines(self, processes: int = 1) -> list[str]:
        """For the plan of a run of so many processes."""
        parts = {
            "weights": self.weights, "swap ring": self.ring, "trained": self.trained, "gradients": self.gradients,
            "optimizer": self.optimizer, "average": self.average, "activations": self.activations,
            "backward pass": self.passing,
        }  # fmt: skip
        shown = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        where = "the device" if processes == 1 else "the device of each process"
        lines = [f"  memory   about {format_bytes(self.total)} on {where}: {shown}"]
        copied = f"{format_bytes(self.pinned)} pinned" if self.pinned else "not pinned"
        if self.staging:
            copied += f"; beside it {format_bytes(self.staging)} of pinned buffers for copies"
        for size, of, how in (
            (self.host, "swapped blocks", copied),
            (self.offloaded, "the inputs of blocks", "pinned, up to twice that" if self.pins else "not pinned"),
            (self.averaged, "the average", "not pinned"),
        ):
            if size:
                each = (
                    f" in each of {processes} processes, {format_bytes(processes * size)} in all,"
                    if processes > 1
                    else ""
                )
                lines.append(f"           {format_bytes(size)} of main memory{each} for {of} ({how})")
        if self.decoding:
            lines.append(
                f"           {format_bytes(self.decoding)} on it while a sample is decoded{' or the whole model is gathered' if self.gathers else ''}, in "
                "place of gradients and activations"
            )
        return lines


def stored_bytes(layer: nn.Linear, storage: Storage, scale: str, dtype: torch.dtype) -> Bytes:
    """Bytes of a frozen layer with its scales and bias."""
    rows, columns = layer.out_features, layer.in_features
    values = rows * columns
    per_block = -(-values // BLOCK) if columns % BLOCK == 0 else rows
    scales = {"tensor": 1, "row": rows, "block": per_block}[scale]
    size = {
        "plain": values * dtype.itemsize,
        "fp8": values,
        "fp8_scaled": values + 4 * scales,
        "int8": values + 4 * rows,
        "nf4": values // 2 + 4 * -(-values // BLOCK),
    }[storage]
    return size + (0 if layer.bias is None else rows * dtype.itemsize)


def estimate(
    config: RunConfig, plan: ModelOutline, bucket: tuple[int, int], batch_size: int, *, count: bool = True
) -> Estimate:
    """Device memory of training with one bucket.

    Args:
        plan: of the model without adapters. bucket: width and height in pixels. count: operations too; see `run_step`.
    """
    return _estimate(config, plan, _step(config, plan, bucket, batch_size, count), _weights(config, plan))


def _step(
    config: RunConfig, plan: ModelOutline, bucket: tuple[int, int], batch_size: int, count: bool = False
) -> StepNeeds:
    """The step as the run's device computes it."""
    return run_step(config, plan, bucket, batch_size, count=count, gpu=_on_gpu(config))


def _estimate(config: RunConfig, plan: ModelOutline, step: StepNeeds, weights: "_Weights") -> Estimate:
    """Where everything is that a step needs."""
    frozen, moves, ema = config.adapter.type != "none", config.optimizer, config.ema
    width = 2 if config.train.full_half else 4
    values = _values(step.trained)
    moments, host_moments = (state_bytes(moves.type, shapes, moves.args) for shapes in (step.trained, weights.trained))
    host_values = _values(weights.trained)
    on_device = values - host_values
    held = max((shape.numel() for shape in step.trained), default=0) if moves.fused_backward else on_device
    return Estimate(
        weights=weights.resident,
        ring=weights.ring,
        trained=width * values if frozen else 0,
        gradients=width * held,
        optimizer=moments - host_moments,
        average=4 * on_device * (ema.enabled and not ema.on_cpu),
        averaged=4 * on_device * (ema.enabled and ema.on_cpu),
        activations=step.kept,
        passing=step.block + _moment(config, plan, step, bool(weights.trained)) + 2 * step.inputs,
        host=weights.host + host_moments + 4 * (1 + ema.enabled) * host_values,
        offloaded=step.offloaded,
        operations=step.operations,
        brought=weights.brought + step.offloaded,
        taken=weights.taken + step.offloaded,
        values=values,
        moments=moments,
        pinned=weights.pinned,
        staging=weights.staging,
        pins=_on_gpu(config),
    )


def _on_gpu(config: RunConfig) -> bool:
    """Whether copies go to a GPU; other devices compute in main memory, or have no engine."""
    return choose_device(config.run.device).type == "cuda"


def _values(shapes: Mapping[torch.Size, int]) -> int:
    return sum(count * shape.numel() for shape, count in shapes.items())


def _moment(config: RunConfig, plan: ModelOutline, step: StepNeeds, trains_from_host: bool) -> Bytes:
    """What a product with a weight in another form holds for the moment."""
    memory = config.memory
    largest = max((m.weight.numel() for m in plan.model.modules() if isinstance(m, nn.Linear)), default=0)
    compute = {"no": 4, "bf16": 2, "fp16": 2}[config.train.mixed_precision]
    if trains_from_host:
        # Its gradient in the compute dtype, and its weight, unless that is float32 already.
        return largest * compute * (2 if compute < 4 else 1)
    if memory.base_storage == "none":
        return 0
    # nf4 goes through float32. Products in fp8 make a float32 copy of their inputs, and codes; of gradients one more.
    # Scaled codes go through it in chunks: a copy, and its product with the scales.
    moment = largest * (compute + (4 if memory.base_storage == "nf4" else 0))
    if memory.base_storage in ("fp8_scaled", "int8") and choose_device(config.run.device).type != "cpu":
        moment += 8 * min(largest, DEVICE_CHUNK)
    if memory.fp8_compute:
        both = memory.fp8_compute_backward == "fp8"
        moment = max(moment, 5 * step.widest_input, 9 * step.widest_output if both else 0)
    return moment


class Size(NamedTuple):
    """What the memory of a micro-batch depends on. ``pixels`` are those of one image."""

    batch_size: int
    pixels: int


def bucket_sizes(items: Sequence[Item]) -> dict[Size, list[tuple[int, int]]]:
    """Buckets of every size that occurs, as width and height; both are sorted."""
    found: dict[Size, set[tuple[int, int]]] = {}
    for item, _ in tally(items):
        width, height = item.bucket
        found.setdefault(Size(item.batch_size, width * height), set()).add(item.bucket)
    return {size: sorted(found[size]) for size in sorted(found)}


def largest_sizes(sizes: Iterable[Size]) -> list[Size]:
    """Those of which no other has as many images and as many pixels in all."""
    found: list[Size] = []
    for size in sorted(sizes, reverse=True):
        if all(size.batch_size * size.pixels > other.batch_size * other.pixels for other in found):
            found.append(size)
    return found


def estimate_sizes(
    config: RunConfig,
    items: Sequence[Item],
    plan: ModelOutline,
    wanted: Callable[[Iterable[Size]], Iterable[Size]],
    *,
    count: bool = False,
) -> dict[Size, Estimate]:
    """The estimates of some sizes.

    Args:
        items: of the data sets. plan: of the config. wanted: chooses among the sizes that occur.
        count: operations, too, of those that may need most.
    """
    sizes = bucket_sizes(items)
    counted = largest_sizes(sizes) if count else []
    return {
        size: estimate(config, plan, sizes[size][0], size.batch_size, count=size in counted) for size in wanted(sizes)
    }


def peak(config: RunConfig, found: Mapping[Size, Estimate]) -> Estimate:
    """The estimate of the size that needs most, with the decoding of samples."""
    return replace(max(found.values(), key=lambda each: each.total), decoding=decoding_bytes(config))


def sharded(found: Estimate, config: RunConfig, plan: ModelOutline, processes: int) -> Estimate:
    """What is on each device where the model is sharded across the processes.

    Beside the shards that is everything outside of blocks and two blocks, one that computes and one that is prefetched, with as much for
    their gradients; and the whole model while it is loaded, validated or drawn from.
    """
    if not config.distributed.fsdp or processes == 1:
        return found
    sizes = Counter[str]()
    for name, parameter in plan.model.named_parameters():
        head, _, rest = name.partition(".")
        block = f"{head}.{rest.partition('.')[0]}" if head in config.spec.block_lists else ""
        sizes[block] += parameter.numel() * plan.dtype.itemsize
    outside = sizes.pop("", 0)
    together = outside + 2 * max(sizes.values(), default=0)
    weights = -(-found.weights // processes) + together
    return replace(
        found,
        weights=weights,
        gradients=-(-found.gradients // processes) + together,
        optimizer=-(-found.optimizer // processes),
        average=-(-found.average // processes),
        averaged=-(-found.averaged // processes),
        decoding=found.decoding + max(0, found.weights - weights),
        gathers=True,
    )


def decoding_bytes(config: RunConfig) -> Bytes:
    """Weights of the autoencoder and the peak of decoding the largest sample; 0 if none are drawn, or it is not here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec, shared = config.spec, sample_settings(config)
    own = [shared.of(prompt, index, spec.pixel_step) for index, prompt in enumerate(sample_prompts(config))]
    build = spec.encoders.outline_autoencoder(config) if own else None
    if build is None:
        return 0
    largest = max(own, key=lambda one: one.width * one.height)
    dtype = encoder_dtype(config.model.vae_dtype, choose_device(config.run.device), gpu="float32")
    with FakeTensorMode():
        with default_dtype(dtype):
            vae = build()
        vae.module.eval()
        weights = sum(tensor.numel() * tensor.element_size() for tensor in vae.module.state_dict().values())
        latents = torch.zeros(1, *config.latents.shape(largest.width, largest.height))
        with Alive() as alive:
            vae.decode(latents, spec.latent_shift)
    return weights + alive.peak


MARGIN = 0.1
"""Share of the free memory that auto leaves alone: fragments, and what the libraries keep for themselves."""


def resolve_swap(config: RunConfig, items: Sequence[Item], free: Bytes | None) -> tuple[RunConfig, str | None]:
    """Replace ``blocks_to_swap = "auto"`` by the smallest number with which the run fits.

    Args:
        free: device memory in bytes; None = the device computes in main memory, where nothing is gained.

    Returns:
        The config, and a line for the person if something was chosen.

    Raises:
        ConfigError: if the run does not fit even with all blocks swapped, or cannot be estimated.
    """
    if config.memory.blocks_to_swap != "auto":
        return config, None
    if free is None:
        return _with_swap(config, 0), (
            f'swap: memory.blocks_to_swap = "auto" is 0, since this device computes in main memory{_unused(config, 0)}'
        )
    plan = config.spec.family.outline_model(config)
    usable, sizes = int(free * (1 - MARGIN)), bucket_sizes(items)
    try:
        steps = [_step(config, plan, sizes[size][0], size.batch_size) for size in largest_sizes(sizes)]
        decoding = decoding_bytes(config)
    except (RuntimeError, NotImplementedError, AssertionError) as problem:
        raise ConfigError(
            f'memory.blocks_to_swap: "auto" needs an estimate of the memory, and this model has none ({problem}). Write a number'
        ) from problem
    needed = 0
    for count in range(most_swapped(block_counts(plan.model, config.spec.block_lists), config.memory.swap_policy) + 1):
        chosen = _with_swap(config, count)
        weights = _weights(chosen, plan)
        needed = max(replace(_estimate(chosen, plan, step, weights), decoding=decoding).total for step in steps)
        if needed <= usable:
            return chosen, (
                f'swap: memory.blocks_to_swap = "auto" is {count}: about {format_bytes(needed)} of {format_bytes(free)} free, of which a tenth is '
                f"left alone{_unused(config, count)}"
            )
    raise ConfigError(
        f'memory.blocks_to_swap: "auto" finds no number that fits: {format_bytes(needed)} is needed with all blocks swapped, {format_bytes(usable)} '
        f"of the free memory may be used. Ways out: {ways_to_save(config)}"
    )


def _unused(config: RunConfig, count: int) -> str:
    """The end of a line about auto: settings of the swap that were written for nothing."""
    written = [key for key in config.set_keys() if key.startswith("memory.swap_")]
    return f"; {' and '.join(written)} have no effect" if written and not count else ""


def _with_swap(config: RunConfig, count: int) -> RunConfig:
    return config.model_copy(update={"memory": config.memory.model_copy(update={"blocks_to_swap": count})})


class _Weights(NamedTuple):
    """Where a run's weights are, in bytes.

    Attributes:
        resident: on the device. ring: of the buffers there that streamed blocks pass through, and their gradients.
        host: in main memory. trained: shapes of those there that train. pinned, staging, brought, taken: see `Estimate`.
    """

    resident: Bytes
    ring: Bytes
    host: Bytes
    trained: Counter[torch.Size]
    pinned: Bytes
    staging: Bytes
    brought: Bytes
    taken: Bytes


def _weights(config: RunConfig, plan: ModelOutline) -> _Weights:
    """Where the weights of a run are, with the blocks that it swaps."""
    spec, memory, model, dtype = config.spec, config.memory, plan.model, plan.dtype
    frozen = config.adapter.type != "none"
    dtype = torch.bfloat16 if config.train.full_half and not frozen else dtype
    freeze = freeze_of(memory, spec) if frozen else None
    streamed: dict[str, list[Bytes]] = {}
    names: set[str] = set()
    if memory.blocks_to_swap:
        totals = block_counts(model, spec.block_lists)
        number = memory.blocks_to_swap if isinstance(memory.blocks_to_swap, int) else 0
        for name, count in swapped_counts(number, totals, memory.swap_policy).items():
            names |= {f"{name}.{index}" for index in streamed_indices(totals[name], count)}
    resident, trained = 0, Counter[torch.Size]()
    seen: set[str] = set()
    for path, layer in model.named_modules():
        block = ".".join(path.split(".")[:2])
        if not isinstance(layer, nn.Linear):
            continue
        storage = freeze.storage_of(path) if freeze else None
        if storage is None and (frozen or block not in names):
            continue
        seen |= {f"{path}.weight", f"{path}.bias"}
        size = stored_bytes(layer, storage or "plain", memory.scale, dtype)
        if block in names:
            streamed.setdefault(block, []).append(size)
            if not frozen:
                trained.update(p.shape for p in layer.parameters() if p.requires_grad)
        else:
            resident += size
    resident += sum(p.numel() * dtype.itemsize for name, p in model.named_parameters() if name not in seen)
    resident += sum(b.numel() * b.element_size() for _, b in model.named_buffers())
    blocks = [sum(sizes) for sizes in streamed.values()]
    host, largest = sum(blocks), max(blocks, default=0)
    ring, returning = largest * min(memory.swap_ring, len(blocks)), 0
    if trained:
        returning = min(GRADIENT_BUFFERS, len(blocks))
    pinned = staging = 0
    if _on_gpu(config):
        pinned = sum(piece for piece, _ in pinned_pieces(blocks)) if memory.swap_pinned else 0
        staging = 2 * STAGING_BYTES if blocks and not memory.swap_pinned else 0
        staging += returning * sum(piece for piece, _ in pinned_pieces([largest] if returning else []))
    return _Weights(
        resident=resident,
        ring=ring + largest * returning,
        host=host,
        trained=trained,
        pinned=pinned,
        staging=staging,
        brought=2 * (host if trained else max(0, host - ring)),
        taken=4 * _values(trained),
    )
