"""Attention of all transformers, with the kernel that [memory] asks for."""

import importlib
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.errors import ConfigError

Attention = Literal["sdpa", "flash", "xformers"]
EXPLICIT_ATTENTION_TOKENS = 256
"""Up to so many keys, attention on a CPU is computed without the fused kernel."""


_PACKAGES = {"flash": ("flash_attn", "flash-attn"), "xformers": ("xformers.ops", "xformers")}
_kernel: Any = None
"""Function of another package that `attend` calls on a GPU, with q, k, v [B, T, A, d]; None = torch's own."""


def use_attention(name: Attention, device: torch.device) -> None:
    """Choose the kernel of attention for this process.

    Raises:
        ConfigError: if the package is missing or the device is not a GPU.
    """
    global _kernel
    if name == "sdpa":
        _kernel = None
        return
    module, package = _PACKAGES[name]
    if device.type != "cuda":
        raise ConfigError(f'memory.attention: "{name}" runs on GPUs only, but this run is on {device.type}; use "sdpa"')
    try:
        found = importlib.import_module(module)
    except ImportError as problem:
        raise ConfigError(
            f'memory.attention: "{name}" needs the package {package}, which cannot be imported ({problem}). Install it for this '
            'torch, or use "sdpa"'
        ) from problem
    _kernel = found.flash_attn_func if name == "flash" else found.memory_efficient_attention


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Softmax attention of [B, A, T, d]; returns [B, T, A d].

    Few tokens on a CPU are computed as written: the backward pass of the flash kernel in bfloat16 takes about three
    times as long there (76 tokens, 2 heads of 64, 2 cores).

    Raises:
        ConfigError: for a mask with a kernel that takes none.
    """
    if _kernel is not None and q.device.type == "cuda":
        if key_mask is not None:
            raise ConfigError('memory.attention: hidden padding (model.t5_attn_mask) needs "sdpa"')
        return _kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).flatten(2)
    if q.device.type == "cpu" and k.shape[2] <= EXPLICIT_ATTENTION_TOKENS:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask, float("-inf"))
        out = logits.float().softmax(dim=-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
    return out.transpose(1, 2).flatten(2)
