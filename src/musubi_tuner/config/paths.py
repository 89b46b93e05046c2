"""How paths of a run file are read. Torch-free."""

import re
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w./-]+)?")
_PUBLISHED = re.compile(r"hub(:[\w./-]+)?")
_CHECKPOINT = re.compile(r"final|best|latest|(step|epoch)_\d+")


def expand(text: str) -> Path:
    """A path with the home folder in place of ``~``; that of a user who is not known stays as it is written."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def is_there(path: Path) -> bool:
    """Whether a path exists; what no path can be, such as a prompt of 300 letters, does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def locate(text: str, config_path: Path) -> Path:
    """Find a path of a run file.

    A relative path means the current directory; if nothing is there, the project that the run file belongs to
    (its folder, or the parent of a folder called toml). Nothing anywhere: the current directory.
    """
    path = expand(text)
    if path.is_absolute() or is_there(path):
        return path
    folder = config_path.resolve().parent
    project = folder.parent if folder.name == "toml" else folder
    there = is_there(project / path) or (run_checkpoint(text)[0] is None and run_checkpoint(str(project / path))[0])
    return project / path if there else path


def run_checkpoint(text: str) -> tuple[Path | None, str]:
    """Folder and name of ``folder:name``, a checkpoint of a run folder; None if there is no such folder."""
    before, colon, name = text.rpartition(":")
    folder = expand(before)
    return (
        folder if colon and before and not is_there(Path(text)) and is_there(folder) and folder.is_dir() else None
    ), name


def exists(path: Path) -> bool:
    """Whether a path, or the run folder of ``folder:name``, is there."""
    return is_there(path) or run_checkpoint(str(path))[0] is not None


def is_checkpoint_name(text: str) -> bool:
    """Whether a text names a checkpoint within a run folder."""
    return _CHECKPOINT.fullmatch(text) is not None


def is_published(text: str) -> bool:
    """Whether a text means a family's own repository: ``hub`` or ``hub:file``, and no local path."""
    return _PUBLISHED.fullmatch(text) is not None and not is_there(Path(text)) and run_checkpoint(text)[0] is None


def is_repository(text: str) -> bool:
    """Whether a text has the form ``owner/name``."""
    return ":" not in text and _HUB_ID.fullmatch(text) is not None


def is_hub_id(text: str) -> bool:
    """Whether a text can only mean ``owner/name`` or ``owner/name:file`` on the hub, not a local path.

    A text that ends like a weights file, or that exists, is a path; so is everything with more than one slash
    before the colon, and ``folder:name`` with a folder that exists.
    """
    if is_there(expand(text)) or not _HUB_ID.fullmatch(text) or run_checkpoint(text)[0] is not None:
        return False
    return ":" in text or not text.endswith(WEIGHT_SUFFIXES)
