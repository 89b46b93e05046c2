"""Encode images with the compressor of a checkpoint: python -m musubi_tuner.fluxflow_cache_latents RUN.toml [--dry_run] [--shard i/n]"""

import sys
from collections.abc import Sequence

from musubi_tuner.caching import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.main("latents", arguments, architecture="ff")


if __name__ == "__main__":
    sys.exit(main())
