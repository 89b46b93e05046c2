"""Draw pictures from a TinyFlux checkpoint.

    python -m musubi_tuner.tinyflux_generate_image toml/demo.toml --prompt "a red circle on the left of a white background"
    python -m musubi_tuner.tinyflux_generate_image toml/tinyflux.toml --from_file prompts.txt --checkpoint step_5000

The run file names the encoders, the objective (its shift bends the sampling times too) and the defaults of [sample].
Without --checkpoint the run's own output folder is used.
"""

import sys
from collections.abc import Sequence

from musubi_tuner.training import generate_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return generate_command.main("tf", __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
