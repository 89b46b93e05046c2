"""Blocks in few pieces of pinned memory, which torch rounds up to powers of two."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from musubi_tuner.memory import transfer
from musubi_tuner.memory.flat import PIECE_LIMIT, pinned_pieces
from musubi_tuner.memory.transfer import block_buffers

MIB = 1 << 20


def test_blocks_of_flux_take_little_more_than_their_size() -> None:
    """One by one they would take 35 GiB."""
    sizes = [648 * MIB] * 17 + [270 * MIB] * 36
    pieces = pinned_pieces(sizes)
    assert sum(count for _, count in pieces) == 53
    assert sum(size for size, _ in pieces) < 1.1 * sum(sizes)
    assert sum(size for size, _ in pinned_pieces([270 * MIB] * 36)) == 10.5 * 1024 * MIB


@example([257 * MIB, 771 * MIB])
@given(st.lists(st.integers(1, 3 * PIECE_LIMIT // MIB).map(lambda size: size * MIB), max_size=40))
def test_every_block_has_a_place_and_pieces_are_never_worse_than_one_each(sizes: list[int]) -> None:
    pieces = pinned_pieces(sizes)
    assert sum(count for _, count in pieces) == len(sizes)
    left = list(sizes)
    for size, count in pieces:
        assert count > 0 and size == 1 << (size - 1).bit_length() and sum(left[:count]) <= size
        assert size <= PIECE_LIMIT or size == 1 << (left[0] - 1).bit_length()
        del left[:count]
    assert sum(size for size, _ in pieces) <= sum(1 << (size - 1).bit_length() for size in sizes)


@pytest.mark.parametrize("pinned", [True, False])
def test_buffers_of_blocks_do_not_overlap(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []

    def buffer(size: int, wanted: bool, advice: str) -> Tensor:
        asked.append((size, wanted))
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(transfer, "host_buffer", buffer)
    sizes = [256, 512, 256, 768, 256]
    buffers = list(block_buffers(sizes, pinned, "advice"))
    assert [len(each) for each in buffers] == sizes
    for number, each in enumerate(buffers, 1):
        each.fill_(number)
    assert all(bool((each == number).all()) for number, each in enumerate(buffers, 1))
    expected = [(size, True) for size, _ in pinned_pieces(sizes)] if pinned else [(size, False) for size in sizes]
    assert asked == expected and (len(asked) < len(sizes)) is pinned
