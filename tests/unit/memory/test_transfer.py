"""Copies through two small buffers: all bytes arrive, in order, whatever the sizes."""

import torch
from torch import Tensor

from musubi_tuner.memory.transfer import HostTransfer, StagedTransfer, transfer_for

CPU = torch.device("cpu")


def random_bytes(size: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_sizes_around_the_buffer() -> None:
    engine = StagedTransfer(CPU, HostTransfer(), size=64)
    sources = [random_bytes(size, size) for size in (0, 1, 63, 64, 65, 128, 1000)]
    targets = [torch.empty(len(source), dtype=torch.uint8) for source in sources]
    for key, (target, source) in enumerate(zip(targets, sources)):
        engine.submit(key, target, source, engine.record())
    for key in reversed(range(len(sources))):
        engine.wait(key)
        engine.wait(key)  # does nothing
    engine.sync()
    assert all(torch.equal(target, source) for target, source in zip(targets, sources))


def test_later_copy_into_the_same_target_wins() -> None:
    engine = StagedTransfer(CPU, HostTransfer(), size=16)
    target = torch.empty(200, dtype=torch.uint8)
    for seed in range(5):
        engine.submit(0, target, random_bytes(200, seed), None)
    engine.wait(0)
    engine.sync()
    assert torch.equal(target, random_bytes(200, 4))


def test_pageable_memory_goes_through_staging() -> None:
    assert isinstance(transfer_for(CPU, pinned=False), StagedTransfer)
    assert isinstance(transfer_for(CPU), HostTransfer)
