"""Caches of another program, as the import sees them: columns of tensors with one row per item.

A family whose published trainer has cache files of its own describes them so (`PublishedTrainer.open_caches`);
`caching/importing.py` gives the rows to the items of a data set and writes our files. Rows stay in the mapped files until
one is asked for.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch import Tensor


class Rows:
    """Tensors of several parts, one row per item, one part after the other; never joined in memory.

    Args:
        parts: [n_i, ...] each, of one row shape and dtype. count: rows that are finished; None = all.

    Raises:
        ValueError: if the parts differ, or hold fewer rows than ``count``.
    """

    def __init__(self, parts: Sequence[Tensor], count: int | None = None) -> None:
        self.parts = list(parts)
        if len({(tuple(part.shape[1:]), part.dtype) for part in parts}) != 1:
            kinds = sorted({f"{list(part.shape[1:])} {part.dtype}" for part in parts})
            raise ValueError(f"rows are of different kinds: {', '.join(kinds) or 'there are none'}")
        self._ends = list(accumulate(len(part) for part in parts))
        self.count = self._ends[-1] if count is None else count
        if self.count > self._ends[-1]:
            raise ValueError(f"holds {self._ends[-1]} rows of {self.count}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        return tuple(self.parts[0].shape[1:])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Tensor:
        """One row, in memory of its own."""
        if not 0 <= row < self.count:
            raise IndexError(row)
        part = bisect_right(self._ends, row)
        return self.parts[part][row - (self._ends[part - 1] if part else 0)].clone()


@dataclass
class ForeignKind:
    """What there is for one kind of cache file.

    Attributes:
        columns: plain name of our tensor -> rows. shared: plain name -> tensor that every file holds.
        total: rows of the complete build; None where nothing says so.
        facts: what made the rows, as entries of a fingerprint; what is not known is left out.
    """

    columns: dict[str, Rows]
    total: int | None
    facts: dict[str, Any]
    shared: dict[str, Tensor] = field(default_factory=dict)

    @property
    def finished(self) -> int:
        """Rows that every column has."""
        return min(len(rows) for rows in self.columns.values())


@dataclass
class ForeignCaches:
    """The caches of one data set.

    Attributes:
        form: in words, with the place. identity: 16 hex digits that change with the files.
        kinds: by kind of cache file. masks: loss masks [n, H, W] beside the latents.
        prompts: of the rows of text and teachers, as far as they are kept. notes: lines for the person.
    """

    form: str
    identity: str
    kinds: Mapping[str, ForeignKind]
    masks: Rows | None = None
    prompts: Sequence[str] | None = None
    notes: Sequence[str] = ()
