"""How a model is made to fit: compile blocks -> checkpoint -> swap. What comes before it is in `assemble`.

Checkpointing wraps the compiled block, and swapping that: the
recomputation must happen while the block's weights are there, and neither belongs in compiled code.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from musubi_tuner.config import RunConfig
from musubi_tuner.config.schema.memory import MemorySection
from musubi_tuner.config.swap import swapped_counts
from musubi_tuner.errors import ConfigError
from musubi_tuner.memory.activation_offload import ActivationOffload
from musubi_tuner.memory.attention import use_attention
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.memory.checkpointing import checkpoint_blocks
from musubi_tuner.memory.compiling import check_backend, check_compiler, check_float8, compile_blocks
from musubi_tuner.memory.fp8_compute import compute_in_fp8, require_fp8
from musubi_tuner.memory.storage import Freeze
from musubi_tuner.memory.transfer import transfer_for
from musubi_tuner.models.spec import ModelSpec


def freeze_of(memory: MemorySection, spec: ModelSpec, device: torch.device | None = None) -> Freeze | None:
    """How a run stores the Linear layers of its frozen model; None = as ordinary layers."""
    if memory.base_storage == "none" and not memory.blocks_to_swap:
        return None
    quantized = f"{spec.quantizable}|{spec.modulation}" if memory.fp8_modulation else spec.quantizable
    blocks = "|".join(spec.block_lists)
    return Freeze(
        storage="plain" if memory.base_storage == "none" else memory.base_storage,
        quantized=quantized,
        plain=rf"({blocks})\.\d+\..*" if memory.blocks_to_swap else None,
        scale=memory.scale,
        quantize_on=device if device is not None and device.type == "cuda" else None,
    )


def check_machine(config: RunConfig, device: torch.device) -> None:
    """Check what [memory] asks of this machine, before anything big is loaded or encoded.

    Args:
        config: with the precision of this machine, see `device.with_precision`.

    Raises:
        ConfigError: if a package, a kind of product or a compiler is missing.
    """
    memory = config.memory
    use_attention(memory.attention, device)
    if memory.attention == "flash" and config.train.mixed_precision == "no":
        # Where "no" is written, the rules of the config say it; this is what "auto" has become here.
        raise ConfigError(
            'memory.attention: "flash" computes in bf16 or fp16, but train.mixed_precision = "auto" is "no" on this device, which '
            'only emulates bfloat16; write train.mixed_precision = "fp16", or use "sdpa"'
        )
    for key in ("blocks_to_swap", "checkpoint_offload"):
        if getattr(memory, key) not in ("auto", 0, False):
            transfer_for(device, f"memory.{key}")
    if memory.fp8_compute:
        require_fp8(device)
    check_backend(memory)
    if memory.compile:
        check_compiler(memory, device)
    reads_float8 = memory.base_storage in ("fp8", "fp8_scaled") and not memory.fp8_compute
    if memory.compile and reads_float8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        check_float8(memory, device)


def ways_to_save(config: RunConfig, on_device: bool = True) -> str:
    """What a run that does not fit into the memory of its device, or else into main memory, may still do; a list in words."""
    memory, ways = config.memory, []
    if config.spec.ways_to_save is not None:
        return "; ".join(config.spec.ways_to_save(config))
    if not memory.checkpoints:
        ways.append("turn on memory.gradient_checkpointing")
    elif memory.checkpoint_every > 1:
        ways.append("lower memory.checkpoint_every")
    if not on_device:
        ways += ["lower memory.blocks_to_swap"] if memory.blocks_to_swap else []
    elif memory.blocks_to_swap == 0:
        ways.append('set memory.blocks_to_swap = "auto"')
    elif memory.blocks_to_swap != "auto":
        ways.append("raise memory.blocks_to_swap")
    if config.adapter.type != "none" and memory.base_storage == "none":
        ways.append('set memory.base_storage = "fp8_scaled"')
    return ", ".join([*ways, "lower the resolution or the batch size of the data sets"])


def compose_memory(
    model: nn.Module, memory: MemorySection, spec: ModelSpec, device: torch.device
) -> tuple[BlockSwap | None, list[str]]:
    """Compile, checkpoint and swap the blocks of a model that lies in main memory, and bring the rest to the device.

    Returns:
        The swap, if there is one, and lines for the person.

    Raises:
        ConfigError: if this machine lacks what a setting needs.
    """
    lines: list[str] = []
    use_attention(memory.attention, device)
    if memory.fp8_compute:
        require_fp8(device)
        lines += compute_in_fp8(model, backward=memory.fp8_compute_backward == "fp8")
    if memory.compile:
        check_backend(memory)
        compile_blocks(model, spec.block_lists, memory)
        lines.append("compile: every kind of block is compiled at its first call, which can take minutes")
    if memory.checkpoints:
        offload = ActivationOffload(device) if memory.checkpoint_offload else None
        if offload is not None and device.type == "cpu":
            lines.append("warning: memory.checkpoint_offload saves nothing here: this device computes in main memory")
        checkpoint_blocks(model, spec.block_lists, memory.checkpoint_every, offload)
        total = sum(block_counts(model, spec.block_lists).values())
        if memory.checkpoint_every > total:
            lines.append(
                f"warning: memory.checkpoint_every is {memory.checkpoint_every}, and the model has {total} blocks: only the first of "
                "them is recomputed"
            )
    if not memory.blocks_to_swap:
        model.to(device)
        return None, lines
    if memory.blocks_to_swap == "auto":
        raise ValueError('blocks_to_swap = "auto" must be resolved first, see planning.estimate.resolve_swap')
    counts = swapped_counts(memory.blocks_to_swap, block_counts(model, spec.block_lists), memory.swap_policy)
    if device.type == "cpu":
        lines.append("warning: memory.blocks_to_swap saves nothing here: this device computes in main memory")
    streamed = sum(counts.values())
    if memory.swap_ring > streamed and "swap_ring" in memory.model_fields_set:
        lines.append(
            f"warning: memory.swap_ring is {memory.swap_ring}, and {streamed} block(s) are streamed: there are no more buffers than "
            "blocks"
        )
    swap = BlockSwap(model, counts, device, ring=memory.swap_ring, pinned=memory.swap_pinned, bind=memory.compile)
    return swap, lines


def block_counts(model: nn.Module, block_lists: Sequence[str]) -> Mapping[str, int]:
    """Number of blocks by list, in call order."""
    return {name: len(getattr(model, name)) for name in block_lists}
