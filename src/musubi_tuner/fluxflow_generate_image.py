"""Draw pictures from a FluxFlow checkpoint.

    python -m musubi_tuner.fluxflow_generate_image toml/fluxflow.toml --prompt "a cat on a couch --w 512 --h 512 --d 7"
    python -m musubi_tuner.fluxflow_generate_image toml/fluxflow.toml --from_file prompts.txt --checkpoint step_5000

The run file is that of the flow; it names the autoencoder, the tokenizer and the defaults of [sample]. Without --checkpoint the run's own
output folder is used.
"""

import sys
from collections.abc import Sequence

from musubi_tuner.training import generate_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return generate_command.main("ff", __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
