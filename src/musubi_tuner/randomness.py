"""Random numbers that belong to what they are drawn for.

Every draw has a key, such as (seed, "noise", epoch, presentation index): the same key gives the same numbers
whatever the number of loader workers, processes or restarts, and no draw moves any other. `keyed_seed` is torch-free.
"""

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Key = int | str


def keyed_seed(*key: Key) -> int:
    """A 63-bit seed from a key; any change of any part gives an unrelated seed."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1


def keyed_random(*key: Key) -> random.Random:
    """A private generator for shuffling."""
    return random.Random(keyed_seed(*key))


def generator(*key: Key) -> "torch.Generator":
    """A private CPU generator."""
    import torch

    return torch.Generator().manual_seed(keyed_seed(*key))


def normal(shape: tuple[int, ...], *key: Key) -> "Tensor":
    """Standard normal numbers, float32 on the CPU."""
    import torch

    return torch.randn(shape, generator=generator(*key), dtype=torch.float32)


def uniform(*key: Key) -> float:
    """One uniform number in [0, 1)."""
    return keyed_random(*key).random()


def seed_layers(*key: Key) -> None:
    """Seed torch's global generators, which only dropout layers use, before a forward pass."""
    import torch

    torch.manual_seed(keyed_seed(*key))
