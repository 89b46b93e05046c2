"""Compiled blocks: torch.compile of the whole forward of a block.

Blocks of one list are alike, so one compilation serves all of them; what differs (weights, adapters, the buffers of streamed
blocks) are inputs of the compiled code. With buckets of several sizes the second size makes sizes symbolic, and no
further ones compile again. The tree of modules and its names stay as they are.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn

from musubi_tuner.config.schema.memory import MemorySection
from musubi_tuner.errors import ConfigError

DYNAMIC = {"auto": None, "true": True, "false": False}


def compile_blocks(model: nn.Module, block_lists: Sequence[str], memory: MemorySection) -> None:
    """Compile the forward of every block of the named lists; it happens at their first call.

    Before checkpointing and swapping, which stay outside of compiled code.
    """
    import torch._dynamo.config

    # Without this, the limit would turn compilation off in silence.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Each block is a graph of its own, between which gradients are reduced anyway; older releases refuse to split graphs that recompute.
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = memory.compile_limit
    for name in block_lists:
        for block in getattr(model, name):
            compiled = torch.compile(
                block.forward,
                backend=memory.compile_backend,
                mode=None if memory.compile_mode == "default" else memory.compile_mode,
                dynamic=DYNAMIC[memory.compile_dynamic],
            )
            block.forward = _explained(compiled, memory)


def check_backend(memory: MemorySection) -> None:
    """Check the name of the compiler.

    Raises:
        ConfigError: listing those that torch knows.
    """
    if not memory.compile:
        return
    import torch._dynamo  # seconds

    if memory.compile_backend not in (known := torch._dynamo.list_backends(exclude_tags=())):
        raise ConfigError(f"memory.compile_backend: '{memory.compile_backend}' is unknown; known: {', '.join(known)}")


def check_compiler(memory: MemorySection, device: torch.device) -> None:
    """Compile one small function, which takes seconds: a missing compiler shows before anything is encoded or loaded.

    Raises:
        ConfigError: if it cannot be compiled.
    """
    compiled = torch.compile(lambda values: values * 2 + 1, backend=memory.compile_backend)
    _explained(compiled, memory)(torch.ones(16, device=device))


def check_float8(memory: MemorySection, device: torch.device) -> None:
    """Check that compiled code on a device reads float8: the Triton of older torch does not on GPUs below compute capability 8.9.

    Raises:
        ConfigError: with the ways out.
    """
    from torch._dynamo.exc import ShortenTraceback

    codes = torch.ones(16, 16, device=device).to(torch.float8_e4m3fn)
    try:
        torch.compile(lambda values: values.float() * 2, backend=memory.compile_backend)(codes)
    except (ShortenTraceback, RuntimeError) as problem:
        reason = str(getattr(problem, "inner_exception", problem)).strip().splitlines()[:1]
        raise ConfigError(
            f"memory.compile: the compiler of torch {torch.__version__} does not read float8 on {device} ({''.join(reason)}). Use a "
            f'newer torch, memory.base_storage = "int8" or "nf4" instead of "{memory.base_storage}", or memory.compile = false'
        ) from problem


def _explained(compiled: Callable[..., Any], memory: MemorySection) -> Callable[..., Any]:
    """Calls compiled code; what goes wrong in the compiler becomes a mistake that names its key."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, ShortenTraceback

    @wraps(compiled)
    def calling(*args: Any) -> Any:
        try:
            return compiled(*args)
        except FailOnRecompileLimitHit as problem:
            raise ConfigError(
                f"memory.compile: a block was compiled {memory.compile_limit} times, and another input asks for more. Set "
                'memory.compile_dynamic = "true", use fewer buckets, or raise memory.compile_limit'
            ) from problem
        except ShortenTraceback as problem:  # a compiler that fails, and one that is not there
            reason = str(getattr(problem, "inner_exception", problem)).strip().splitlines()[:1]
            raise ConfigError(
                f"memory.compile: {memory.compile_backend} cannot compile here ({''.join(reason)}). It needs a C++ compiler on a "
                "CPU and Triton on a GPU; install them, or set memory.compile = false"
            ) from problem

    return calling
