"""What TinyFlux is told about a picture: T5 states and CLIP's pooled text; no text is all zeros."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from musubi_tuner.encoders.text import TextEncoder


def encode_t5(encoder: "TextEncoder", texts: Sequence[str]) -> Tensor:
    """T5 states of texts, the model's ``encoder_hidden_states``: [B, L, J] float32 on the CPU, padded to the encoder's length."""
    return encoder.encode(texts).states


def encode_clip(encoder: "TextEncoder", texts: Sequence[str]) -> Tensor:
    """CLIP's pooled texts, the model's ``pooled_projections``: [B, P] float32 on the CPU.

    Raises:
        ValueError: for an encoder that gives no pooled text, such as T5.
    """
    pooled = encoder.encode(texts).pooled
    if pooled is None:
        raise ValueError("this encoder gives no pooled text; encode_clip needs CLIP")
    return pooled


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
