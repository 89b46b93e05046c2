"""Train a LoRA on FLUX.1-dev: python -m musubi_tuner.flux_dev_train_network RUN.toml; the same as train.py RUN.toml."""

import sys
from collections.abc import Sequence

from musubi_tuner.runner import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.main(arguments, architecture="fd")


if __name__ == "__main__":
    sys.exit(main())
