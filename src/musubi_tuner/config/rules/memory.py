"""Rules of [memory]: settings that exclude each other, and what a device does not support."""

from collections.abc import Iterator

from musubi_tuner.config.diagnostics import Diagnostic, error, warning
from musubi_tuner.config.rules.rule import Rules
from musubi_tuner.config.run_config import RunConfig
from musubi_tuner.optimizers import OPTIMIZERS

MEMORY = Rules()
rule = MEMORY.rule


@rule("V21", "memory.base_storage adapter.type")
def _storage(config: RunConfig) -> Iterator[Diagnostic]:
    storage = config.memory.base_storage
    if storage != "none" and config.adapter.type == "none":
        text = f'is "{storage}", which is for frozen models, but this run trains the model itself; write "none", or train an adapter'
        yield error("V21", "memory.base_storage", text, "adapter.type", fix=[("memory.base_storage", "none")])


@rule("V23", "memory.blocks_to_swap")
def _count(config: RunConfig) -> Iterator[Diagnostic]:
    blocks = config.memory.blocks_to_swap
    if isinstance(blocks, int) and blocks < 0:
        yield error("V23", "memory.blocks_to_swap", f'is {blocks}, expected 0 or more, or "auto"')


@rule("V21", "memory.fp8_compute memory.base_storage memory.fp8_scale train.mixed_precision run.device")
def _products(config: RunConfig) -> Iterator[Diagnostic]:
    memory = config.memory
    if not memory.fp8_compute:
        return
    if memory.base_storage not in ("fp8", "fp8_scaled"):
        text = f'needs memory.base_storage = "fp8_scaled" or "fp8", but it is "{memory.base_storage}"; change one'
        yield error("V21", "memory.fp8_compute", text, "memory.base_storage")
    if config.train.mixed_precision not in ("bf16", "auto"):
        text = f'computes in bf16, but train.mixed_precision is "{config.train.mixed_precision}"; set that to "bf16"'
        fix = [("train.mixed_precision", "bf16")]
        yield error("V21", "memory.fp8_compute", text, "train.mixed_precision", fix=fix)
    if config.run.device in ("cpu", "mps"):
        text = (
            f'needs a GPU that multiplies float8 numbers, but run.device is "{config.run.device}"; set it to false: fp8 storage '
            "works on every device"
        )
        yield error("P07", "memory.fp8_compute", text, "run.device", fix=[("memory.fp8_compute", False)])
    if memory.fp8_scale == "block" and "memory.fp8_scale" in config.set_keys():
        text = 'is "block", which fp8 multiplication does not support; a scale per row is used instead'
        yield warning("V21", "memory.fp8_scale", text, "memory.fp8_compute", fix=[("memory.fp8_scale", "row")])


@rule("V25", "memory.attention run.device model.t5_attn_mask train.mixed_precision")
def _attention(config: RunConfig) -> Iterator[Diagnostic]:
    kernel = config.memory.attention
    if kernel == "sdpa":
        return
    plain = [("memory.attention", "sdpa")]
    if config.run.device in ("cpu", "mps"):
        text = f'"{kernel}" runs on GPUs only, but run.device is "{config.run.device}"; use "sdpa"'
        yield error("V25", "memory.attention", text, "run.device", fix=plain)
    if config.get("model.t5_attn_mask"):
        text = f'"{kernel}" does not support masks, but model.t5_attn_mask is true; use "sdpa"'
        yield error("V25", "memory.attention", text, "model.t5_attn_mask", fix=plain)
    if kernel == "flash" and config.train.mixed_precision == "no":
        text = '"flash" computes in bf16 or fp16, but train.mixed_precision is "no"; change that, or use "sdpa"'
        yield error("V25", "memory.attention", text, "train.mixed_precision", fix=plain)


@rule("V87", "memory.compile memory.compile_mode memory.compile_backend")
def _compiler(config: RunConfig) -> Iterator[Diagnostic]:
    memory = config.memory
    if memory.compile and memory.compile_mode != "default" and memory.compile_backend != "inductor":
        text = f'is for compile_backend = "inductor", but that is "{memory.compile_backend}"; remove one of them'
        yield error("V87", "memory.compile_mode", text, "memory.compile_backend")


@rule(
    "V87",
    "memory.compile memory.blocks_to_swap memory.gradient_checkpointing memory.checkpoint_offload memory.checkpoint_every "
    "adapter.type",
)
def _compiled_and_swapped(config: RunConfig) -> Iterator[Diagnostic]:
    memory = config.memory
    if not (memory.compile and memory.blocks_to_swap):
        return
    if config.adapter.type == "none":
        text = (
            "cannot be combined with memory.blocks_to_swap while the model itself trains: compiled code cannot stream weights that "
            "change; turn one of them off"
        )
    elif not memory.checkpoints:
        text = (
            "with memory.blocks_to_swap needs memory.gradient_checkpointing = true: compiled code keeps the weights of a block "
            "until its backward pass"
        )
    elif memory.checkpoint_every > 1:
        text = (
            f"with memory.blocks_to_swap needs memory.checkpoint_every = 1, but it is {memory.checkpoint_every}: compiled code keeps "
            "the weights of a block that is not recomputed until its backward pass; set it to 1, or turn one of the others off"
        )
    else:
        return
    yield error("V87", "memory.compile", text, "memory.blocks_to_swap")


@rule("V24", "memory.checkpoint_offload memory.gradient_checkpointing")
def _offload_recomputes(config: RunConfig) -> Iterator[Diagnostic]:
    memory = config.memory
    written = "memory.gradient_checkpointing" in config.set_keys()
    if memory.checkpoint_offload and written and not memory.gradient_checkpointing:
        text = "recomputes blocks, but memory.gradient_checkpointing is false; remove one"
        fix = [("memory.gradient_checkpointing", True)]
        yield error("V24", "memory.checkpoint_offload", text, "memory.gradient_checkpointing", fix=fix)


@rule("V22", "memory.checkpoint_offload memory.blocks_to_swap adapter.type run.device")
def _offload(config: RunConfig) -> Iterator[Diagnostic]:
    memory = config.memory
    if memory.checkpoint_offload and memory.blocks_to_swap and config.adapter.type == "none":
        text = "cannot be combined with memory.blocks_to_swap while the model itself trains; turn one of them off"
        yield error("V22", "memory.checkpoint_offload", text, "memory.blocks_to_swap")
    if memory.checkpoint_offload and config.run.device == "mps":
        text = "is not supported on mps; turn it off"
        yield error("P07", "memory.checkpoint_offload", text, "run.device", fix=[("memory.checkpoint_offload", False)])


@rule("V88", "memory.blocks_to_swap adapter.type optimizer.type train.mixed_precision run.device")
def _swapped_blocks(config: RunConfig) -> Iterator[Diagnostic]:
    if not config.memory.blocks_to_swap:
        return
    if config.adapter.type == "none" and OPTIMIZERS[config.optimizer.type].on_device:
        text = (
            f'"{config.optimizer.type}" runs on the device only, but memory.blocks_to_swap keeps trained blocks and their optimizer state '
            'in main memory; use "AdamW"'
        )
        yield error("V88", "optimizer.type", text, "memory.blocks_to_swap", fix=[("optimizer.type", "AdamW")])
    if config.adapter.type == "none" and config.train.mixed_precision == "fp16":
        text = '"fp16" does not work with trained blocks in main memory: its loss scale is applied on the device; use "bf16"'
        fix = [("train.mixed_precision", "bf16")]
        yield error("V88", "train.mixed_precision", text, "memory.blocks_to_swap", fix=fix)
    if config.run.device == "mps":
        text = "is not supported on mps; set it to 0"
        yield error("P07", "memory.blocks_to_swap", text, "run.device", fix=[("memory.blocks_to_swap", 0)])
