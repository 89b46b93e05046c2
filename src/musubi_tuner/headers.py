"""Headers of cache files, which are safetensors, read without torch."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.errors import CacheError

DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""Safetensors dtype -> torch name."""
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file.

    Attributes:
        dtype: torch name. start, end: byte offsets from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """Header of a cache file: its tensors by key, and its metadata."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """What made the file; None for a file of another program."""
        try:
            value = json.loads(self.metadata["fingerprint"])
        except (KeyError, TypeError, ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


def read_header(path: Path) -> Header:
    """Read a header and check that the file is as long as it says.

    Raises:
        FileNotFoundError: if there is no such file.
        CacheError: if it is cut short or not a safetensors file.
    """
    with path.open("rb") as file:
        beginning = file.read(8)
        if len(beginning) < 8:
            raise CacheError(f"{path}: is cut short ({len(beginning)} bytes); delete it and run the cache job again")
        (length,) = struct.unpack("<Q", beginning)
        if length > _MAX_HEADER:
            raise CacheError(f"{path}: is not a safetensors file")
        raw = file.read(length)
        size = file.seek(0, 2)
    try:
        if len(raw) < length:
            raise ValueError("header cut short")
        content = json.loads(raw)
        metadata = content.pop("__metadata__", {})
        begin = 8 + length
        tensors = {
            key: TensorEntry(
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                begin + entry["data_offsets"][0],
                begin + entry["data_offsets"][1],
            )
            for key, entry in content.items()
        }
        if not isinstance(metadata, dict):
            raise ValueError("metadata is no object")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CacheError(f"{path}: has a broken header; delete it and run the cache job again") from error
    expected = max((entry.end for entry in tensors.values()), default=begin)
    if size != expected:
        raise CacheError(f"{path}: has {size} bytes, its header says {expected}; delete it and run the cache job again")
    return Header(tensors, metadata)
