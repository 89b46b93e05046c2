"""Parts that several flow transformers share: positions and rotary embedding."""

import torch
from torch import Tensor


def image_positions(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Position of every image token, row by row: (0, row, column), [height * width, 3] int64."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate adjacent pairs of the last axis of x [..., tokens, d] in float32; dtype of x is kept."""
    cos, sin = rope
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
