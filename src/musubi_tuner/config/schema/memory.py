"""[memory]."""

from typing import Literal

from musubi_tuner.config.fields import MOST, Section, param
from musubi_tuner.config.when import is_, on

_SWAPS, _COMPILES = on("memory.blocks_to_swap"), on("memory.compile")


class MemorySection(Section):
    """Trading time for memory."""

    gradient_checkpointing: bool = param(False, "Recompute each block in the backward pass.", resume="free")
    base_storage: Literal["none", "fp8", "fp8_scaled", "int8", "nf4"] = param(
        "none", "How the weights of a frozen model are stored; none = in the precision of the computation."
    )
    fp8_scale: Literal["tensor", "row", "block"] = param(
        "block",
        "Granularity of the scales in fp8_scaled: one per tensor, per row, or per 64 columns of a row.",
        when=is_("memory.base_storage", "fp8_scaled"),
    )
    fp8_modulation: bool = param(
        False,
        "Quantise the modulation layers of the blocks too: less memory, more error.",
        when=on("memory.base_storage"),
        expert=True,
    )
    fp8_compute: bool = param(
        False,
        "Multiply in fp8 too, with base_storage fp8 or fp8_scaled and a scale per row or tensor; needs a GPU with fp8.",
        expert=True,
    )
    fp8_compute_backward: Literal["bf16", "fp8"] = param(
        "bf16",
        "With fp8_compute: precision in which the gradients of the inputs are multiplied.",
        when=on("memory.fp8_compute"),
        expert=True,
    )
    blocks_to_swap: int | Literal["auto"] = param(
        0, "Blocks whose weights stay in main memory and are streamed to the device, with gradients and optimizer state where "
        "they train; 0 = none, auto = the fewest that fit into the free memory.", resume="free", unit="blocks"
    )  # fmt: skip
    checkpoint_every: int = param(
        1, "With gradient_checkpointing: recompute every n-th block only; larger is faster and takes more memory.", ge=1,
        le=100, resume="free", when=on("memory.gradient_checkpointing") | on("memory.checkpoint_offload"), expert=True
    )  # fmt: skip
    swap_policy: Literal["single_first", "balanced"] = param(
        "single_first",
        "Which blocks are swapped: as many single ones as possible first, or both kinds alike.",
        resume="free",
        when=_SWAPS,
        expert=True,
    )
    swap_ring: int = param(
        2,
        "Device buffers for streamed blocks, each as large as a block.",
        ge=1,
        le=16,
        resume="free",
        unit="blocks",
        when=_SWAPS,
        expert=True,
    )
    swap_pinned: bool = param(
        True, "Pin the main memory of swapped blocks; false = copy through two small pinned buffers, which is slower.",
        resume="free", when=_SWAPS, expert=True
    )  # fmt: skip
    checkpoint_offload: bool = param(
        False, "Checkpoint, and keep the inputs of the blocks in main memory.",
        flat=("gradient_checkpointing_cpu_offload",), resume="free",
    )  # fmt: skip
    attention: Literal["sdpa", "flash", "xformers"] = param(
        "sdpa",
        "Attention kernel: that of torch, or on a GPU that of the package flash-attn or xformers.",
        resume="free",
    )
    compile: bool = param(
        False, "Compile the blocks with torch.compile: minutes at the start, faster steps.", resume="free"
    )
    compile_backend: str = param("inductor", "Compiler backend of torch.", resume="free", when=_COMPILES, expert=True)
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = param(
        "default",
        "Mode of the compiler. Modes with CUDA graphs do not work with blocks that are compiled separately.",
        resume="free",
        when=_COMPILES,
        expert=True,
    )
    compile_dynamic: Literal["auto", "true", "false"] = param(
        "auto",
        "Sizes in compiled code: auto = fixed at first and symbolic from the second bucket on.",
        resume="free",
        when=_COMPILES,
        expert=True,
    )
    compile_limit: int = param(
        32, "How often one kind of block may be compiled; more is an error.", flat=("compile_cache_size_limit",), ge=1, le=MOST,
        resume="free", when=_COMPILES, expert=True
    )  # fmt: skip

    @property
    def checkpoints(self) -> bool:
        """Whether blocks are recomputed; keeping their inputs elsewhere implies it."""
        return self.gradient_checkpointing or self.checkpoint_offload

    @property
    def scale(self) -> Literal["tensor", "row", "block"]:
        """What shares a scale; products in fp8 take none by block."""
        return "row" if self.fp8_compute and self.fp8_scale == "block" else self.fp8_scale
