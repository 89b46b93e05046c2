"""Writing safetensors so that a full disk is an operating-system error, and files have the user's permissions."""

import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from musubi_tuner.files import encodable


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: with the system's number, where the library hides it in a text.
    """
    try:
        save_file(tensors, path, {key: encodable(value) for key, value in metadata.items()} if metadata else metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    if os.name == "posix":
        # The library creates files that only their owner may read.
        mask = os.umask(0o022)
        os.umask(mask)
        path.chmod(0o666 & ~mask)
