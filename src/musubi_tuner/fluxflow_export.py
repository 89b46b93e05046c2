"""Write a FluxFlow checkpoint as the files of the published program (0.4 to 0.5.1).

    python -m musubi_tuner.fluxflow_export data/output/fluxflow -o published
    python -m musubi_tuner.fluxflow_export data/output/fluxflow:step_5000 -o published --raw_weights

FOLDER gets flxflow_final.safetensors, text_encoder.safetensors and D_img.safetensors, each if the checkpoint has its parts, with identical keys.
Flags of ff-v2 change what is computed: the published program reads such files only in part, and a line says so.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from musubi_tuner.config.command_line import Parser
from musubi_tuner.errors import EXIT_OK, ConfigError, NoAverageError, run_command
from musubi_tuner.fluxflow_output import write_weights
from musubi_tuner.models.fluxflow.geometry import FluxFlowConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m musubi_tuner.fluxflow_export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="run folder, folder:name, file, or hub id")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="folder to write into; made if it is not there"
    )
    parser.add_argument("--raw_weights", action="store_true", help="the trained weights, not their average")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = parser.parse_args(arguments)

    from musubi_tuner.models.fluxflow.checkpoint import load_checkpoint
    from musubi_tuner.models.fluxflow.state_dict import published_tensors, read_system

    try:
        file = load_checkpoint(options.checkpoint, ema=not options.raw_weights)
    except NoAverageError:
        print(f"note: {options.checkpoint} has no averaged weights; those of the model are written")
        file = load_checkpoint(options.checkpoint)
    system, folder = read_system(file), Path(options.output)
    assert system.geometry is not None
    files = published_tensors(system.parts)
    there = [name for name in files if (folder / name).exists()]
    if there and not options.overwrite:
        raise ConfigError(
            f"--output {folder}: {', '.join(there)} exists already; choose another folder, or add --overwrite"
        )
    for name, count in write_weights(system, folder).items():
        print(f"{folder / name}: {count} tensors")
    differing = [
        key
        for key, value in system.geometry.to_dict().items()
        if _is_flag(key) and value != getattr(FluxFlowConfig(), key)
    ]
    if differing:
        print(
            f"note: the published program does not know {', '.join(differing)} and computes something else with these files"
        )
    return EXIT_OK


def _is_flag(key: str) -> bool:
    return key in ("latent_skip", "down_shortcut", "pair_residual", "up_skip", "p_pre", "rgb_norm", "rotary", "controls", "flow_head",
                   "latent_space", "text_mode")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
