"""Less noise from libraries: lines that no user can act on, and progress bars for saving small files."""

import logging
import warnings


def quiet_libraries() -> None:
    """Call at the start of a command, before the libraries are imported."""
    # bitsandbytes, imported by transformers and diffusers, reports an optional 4-bit CPU kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Pillow warns of damaged EXIF data and the like, without the name of the file; it reads on, or raises.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


def quiet_progress() -> None:
    """Hide transformers' bars; call once it is imported anyway."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
