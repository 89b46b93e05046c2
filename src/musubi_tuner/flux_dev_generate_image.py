"""Draw pictures with FLUX.1-dev and LoRA.

    python -m musubi_tuner.flux_dev_generate_image toml/flux_dev.toml --prompt "a cat on a mat --w 768 --h 512 --d 7"
    python -m musubi_tuner.flux_dev_generate_image toml/flux_dev.toml --from_file prompts.txt --lora_weight a.safetensors b.safetensors --lora_multiplier 0.8 0.5

The run file names the base, the encoders and the defaults of [sample]. Without --lora_weight the LoRA of the run is used.
"""

import sys
from collections.abc import Sequence

from musubi_tuner.training import generate_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return generate_command.main("fd", __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
