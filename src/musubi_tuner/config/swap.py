"""Which blocks of a model stay in main memory. Torch-free, so that a number that is too large is reported at once."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from musubi_tuner.config.diagnostics import Diagnostic, error
from musubi_tuner.errors import ConfigError

if TYPE_CHECKING:
    from musubi_tuner.config.schema.memory import MemorySection

RESIDENT_BLOCKS = 2
"""Blocks of each list that always stay on the device."""
POLICIES = ("single_first", "balanced")


def swapped_counts(count: int, blocks: Mapping[str, int], policy: str = "single_first") -> dict[str, int]:
    """How many blocks of each list are swapped.

    Args:
        count: in all. blocks: number of blocks by list, in call order.
        policy: ``single_first`` fills the last list first; ``balanced`` is musubi-tuner's split of two lists: half the number
            from the first, and twice the rest plus one from the second.

    Raises:
        ConfigError: naming the limit.
    """
    problem = too_many(count, blocks, policy)
    if problem is not None:
        raise ConfigError(f"memory.blocks_to_swap {problem}")
    if policy == "balanced":
        first, second = blocks
        return {first: count // 2, second: (count - count // 2) * 2 + 1 if count else 0}
    wanted: dict[str, int] = {}
    for name in reversed(list(blocks)):
        wanted[name] = min(count, blocks[name] - RESIDENT_BLOCKS) if count else 0
        count -= wanted[name]
    return {name: wanted[name] for name in blocks}


def most_swapped(blocks: Mapping[str, int], policy: str) -> int:
    """The largest number of blocks that can be swapped."""
    if policy not in POLICIES:
        raise ValueError(f"unknown swap policy '{policy}'; known: {', '.join(POLICIES)}")
    limits = [max(0, total - RESIDENT_BLOCKS) for total in blocks.values()]
    if policy == "single_first":
        return sum(limits)
    first, second = limits
    return max(n for n in range(first + second + 1) if n // 2 <= first and (n - n // 2) * 2 + (n > 0) <= second)


def too_many(count: int, blocks: Mapping[str, int], policy: str) -> str | None:
    """What is wrong with a number of blocks, if something is."""
    most = most_swapped(blocks, policy)
    if count <= most:
        return None
    described = " + ".join(f"{total} {name}" for name, total in blocks.items())
    return f"is {count}, at most {most} of {described} can be swapped ({policy}; {RESIDENT_BLOCKS} of each list stay)"


def check_swap(memory: "MemorySection", blocks: Mapping[str, int]) -> list[Diagnostic]:
    """The rule of a model whose blocks are known without its checkpoint."""
    problem = too_many(memory.blocks_to_swap, blocks, memory.swap_policy) if memory.blocks_to_swap != "auto" else None
    return [error("V23", "memory.blocks_to_swap", problem, "memory.swap_policy")] if problem else []
