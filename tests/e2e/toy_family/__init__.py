"""A family as small as one can be; test_toy_family.py copies it into the package."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__") or name in ("family", "options"):
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.family"), name)
