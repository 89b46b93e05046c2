"""What FLUX.1 is told about a picture: T5 states without mask, CLIP's pooled text, and the embedded guidance.

Caches of other tools carry singleton axes. They are dropped here, once, each by its position: an axis that happens to
be 1 elsewhere (one text token, a batch of one) is real.
"""

from typing import Any

import torch
from torch import Tensor

from musubi_tuner.errors import CacheError


def text_states(t5: Tensor) -> Tensor:
    """T5 states as [B, L, J], from that, [B, 1, L, J] or one text [L, J].

    Raises:
        CacheError: for any other shape.
    """
    if t5.ndim == 4 and t5.shape[1] == 1:
        t5 = t5[:, 0]
    elif t5.ndim == 2:
        t5 = t5[None]
    if t5.ndim != 3:
        raise CacheError(f"t5_vec is {list(t5.shape)}, expected [batch, tokens, width]; run the text job again")
    return t5


def pooled_text(clip: Tensor) -> Tensor:
    """Pooled text as [B, P], from that, [B, 1, P] or one text [P].

    Raises:
        CacheError: for any other shape.
    """
    if clip.ndim == 3 and clip.shape[1] == 1:
        clip = clip[:, 0]
    elif clip.ndim == 1:
        clip = clip[None]
    if clip.ndim != 2:
        raise CacheError(f"clip_l_pooler is {list(clip.shape)}, expected [batch, width]; run the text job again")
    return clip


def text_inputs(encoded: dict[str, Tensor], use_mask: bool) -> dict[str, Tensor]:
    """Model inputs from encoded texts ``t5_vec`` and ``clip_l_pooler``.

    Raises:
        ValueError: if padding is to be hidden, which FLUX.1 does not know.
    """
    if use_mask:
        raise ValueError("FLUX.1 does not hide text padding")
    return {"t5": text_states(encoded["t5_vec"]).float(), "clip": pooled_text(encoded["clip_l_pooler"]).float()}


def null_inputs(like: dict[str, Tensor]) -> dict[str, Tensor]:
    """FLUX.1 has no trained null condition.

    Raises:
        ValueError: always; a negative prompt is needed for classifier-free guidance.
    """
    raise ValueError("FLUX.1 has no null condition: give a negative prompt, be it an empty one")


def concatenate(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Join two batches of inputs, for one forward pass of both guidance branches."""
    return {key: torch.cat((first[key], second[key])) for key in first}
