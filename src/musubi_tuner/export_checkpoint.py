"""Write a state of a run as a checkpoint of the family's own trainer, so that training can go on there.

    python -m musubi_tuner.export_checkpoint run.toml step_5000.pt
    python -m musubi_tuner.export_checkpoint run.toml step_2000.pt --state data/output/tinyflux/tinyflux-step00002000-state

Weights, average, moments of the optimizer, update and epoch go over; what that trainer does otherwise is printed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from musubi_tuner.config import load_config
from musubi_tuner.config.command_line import Parser, split_overrides
from musubi_tuner.device import with_precision
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.stopping import exit_on_terminate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="export_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="RUN", help="run file (TOML); its settings are options too, as for train.py")
    parser.add_argument("checkpoint", metavar="FILE", help="torch file to write, such as step_N.pt")
    parser.add_argument("--state", metavar="FOLDER", help="a state of the run (default: the newest)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    passed, overrides = split_overrides(arguments, {"--state", "--overwrite", "--help"})
    options = parser.parse_args(passed)
    exit_on_terminate()
    target = Path(options.checkpoint)
    if target.exists() and not options.overwrite:
        raise ConfigError(f"{target}: is there already; choose another name, or give --overwrite")
    from musubi_tuner.training.exporting import export_checkpoint

    state = Path(options.state) if options.state else None
    for line in export_checkpoint(with_precision(load_config(options.config, overrides)), target, state):
        print(line)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
