"""What TinyFlux is told about a picture: T5 states and CLIP's pooled text; no text is all zeros."""

from typing import Any

import torch
from torch import Tensor


def text_inputs(encoded: dict[str, Tensor], use_mask: bool) -> dict[str, Tensor]:
    """Model inputs from encoded texts.

    Args:
        encoded: ``t5_vec`` [B, L, J], ``t5_mask`` [B, L], ``clip_l_pooler`` [B, P].
        use_mask: hide padding, for models trained so.
    """
    inputs = {"t5": encoded["t5_vec"].float(), "clip": encoded["clip_l_pooler"].float()}
    if use_mask:
        inputs["text_mask"] = encoded["t5_mask"].bool()
    return inputs


def null_inputs(like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The condition that text dropout trains: zeros instead of both encodings (which an empty text is not)."""
    return {key: value if key == "text_mask" else torch.zeros_like(value) for key, value in like.items()}


def concatenate(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Join two batches of inputs, for one forward pass of both guidance branches."""
    return {key: torch.cat((first[key], second[key])) for key in first}
