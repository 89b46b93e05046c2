"""Go on with a checkpoint of a family's own trainer: write it as a state of a run.

    python -m musubi_tuner.import_checkpoint step_5000.pt run.toml
    python train.py run.toml

The run file names the model (model.path may be the same file), the data and the settings; it must not change in between, as
with every run that continues. What could not be taken over is printed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from musubi_tuner.config import load_config
from musubi_tuner.config.command_line import Parser, split_overrides
from musubi_tuner.device import with_precision
from musubi_tuner.errors import EXIT_OK, run_command
from musubi_tuner.stopping import exit_on_terminate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="import_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", metavar="FILE", help="torch file that the trainer wrote: step_N.pt, final.pt, ..."
    )
    parser.add_argument("config", metavar="RUN", help="run file (TOML); its settings are options too, as for train.py")
    parser.add_argument("--fresh_optimizer", action="store_true", help="leave the moments of the optimizer behind")
    passed, overrides = split_overrides(arguments, {"--fresh_optimizer", "--help"})
    options = parser.parse_args(passed)
    exit_on_terminate()
    config = load_config(options.config, overrides)
    for finding in config.remarks:
        if finding.level == "warning":
            print(f"warning: {finding}", file=sys.stderr)
    from musubi_tuner.training.importing import import_checkpoint

    for line in import_checkpoint(
        with_precision(config), Path(options.checkpoint), moments=not options.fresh_optimizer
    ):
        print(line)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
