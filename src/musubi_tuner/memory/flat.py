"""The tensors of a block in one flat buffer of bytes, so that one copy moves them all; and the buffers of blocks in few pieces."""

from collections.abc import Sequence
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


PIECE_LIMIT = 2 << 30
"""Bytes. A piece is taken whole before its blocks move in, so larger ones would need that much more main memory."""


def pinned_pieces(sizes: Sequence[Bytes]) -> list[tuple[Bytes, int]]:
    """Pieces of pinned memory for blocks in a row: the size of each, and how many blocks it holds.

    torch pins powers of two: 36 blocks of 270 MiB one by one would take 18 GiB for 9.5. In pieces that are filled as well as
    possible they take 10.5.
    """
    found: list[tuple[Bytes, int]] = []
    left = list(sizes)
    while left:
        piece, best = 1 << (left[0] - 1).bit_length(), (0.0, 0, 0)
        while True:
            filled = count = 0
            while count < len(left) and filled + left[count] <= piece:
                filled, count = filled + left[count], count + 1
            best = max(best, (filled / piece, piece, count))
            if piece >= PIECE_LIMIT or count == len(left):
                break
            piece *= 2
        found.append(best[1:])
        left = left[best[2] :]
    return found
