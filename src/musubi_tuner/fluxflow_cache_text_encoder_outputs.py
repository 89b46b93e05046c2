"""Encode captions for FluxFlow: python -m musubi_tuner.fluxflow_cache_text_encoder_outputs RUN.toml [--dry_run] [--shard i/n]"""

import sys
from collections.abc import Sequence

from musubi_tuner.caching import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.main("text", arguments, architecture="ff")


if __name__ == "__main__":
    sys.exit(main())
