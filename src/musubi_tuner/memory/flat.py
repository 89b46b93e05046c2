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

    torch pins powers of two: 36 blocks of 270 MiB one by one would take 18 GiB for 9.5. Of all ways to cut the row into pieces
    this is one that takes least, and of those the one with the fewest pieces; these 36 take 10.5 GiB.
    """
    # Of the last 0, 1, 2 ... blocks: bytes and number of their pieces, and the first of these.
    least: list[tuple[Bytes, int, tuple[Bytes, int]]] = [(0, 0, (0, 0))]
    for start in reversed(range(len(sizes))):
        filled, ways = 0, []
        for count, size in enumerate(sizes[start:], 1):
            filled += size
            piece = 1 << (filled - 1).bit_length()
            if count > 1 and piece > PIECE_LIMIT:
                break
            rest = least[-count]
            ways.append((piece + rest[0], 1 + rest[1], (piece, count)))
        least.append(min(ways))
    found = []
    start = 0
    while start < len(sizes):
        found.append(least[len(sizes) - start][2])
        start += found[-1][1]
    return found
