"""How paths of a run file are read. Torch-free."""

import re
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w./-]+)?")


def locate(text: str, config_path: Path) -> Path:
    """Find a path of a run file.

    A relative path means the current directory; if nothing is there, the project that the run file belongs to
    (its folder, or the parent of a folder called toml). Nothing anywhere: the current directory.
    """
    path = Path(text).expanduser()
    if path.is_absolute() or path.exists():
        return path
    folder = config_path.resolve().parent
    project = folder.parent if folder.name == "toml" else folder
    return project / path if (project / path).exists() else path


def is_repository(text: str) -> bool:
    """Whether a text has the form ``owner/name``."""
    return ":" not in text and _HUB_ID.fullmatch(text) is not None


def is_hub_id(text: str) -> bool:
    """Whether a text can only mean ``owner/name`` or ``owner/name:file`` on the hub, not a local path.

    A text that ends like a weights file, or that exists, is a path; so is everything with more than one slash
    before the colon.
    """
    if Path(text).expanduser().exists() or not _HUB_ID.fullmatch(text):
        return False
    return ":" in text or not text.endswith(WEIGHT_SUFFIXES)
