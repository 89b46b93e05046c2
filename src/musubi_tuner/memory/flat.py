"""The tensors of a block in one flat buffer of bytes, so that one copy moves them all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.units import Bytes

ALIGNMENT = 256
"""Bytes; parts of a flat buffer begin at multiples of it."""


@dataclass
class Part:
    """A tensor inside its block's flat buffer."""

    start: Bytes
    end: Bytes
    dtype: torch.dtype
    shape: torch.Size

    def of(self, buffer: Tensor) -> Tensor:
        """The tensor, as a view."""
        return buffer[self.start : self.end].view(self.dtype).view(self.shape)
