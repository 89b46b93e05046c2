"""Write the weights of a TinyFlux checkpoint for another version of the model.

    python -m musubi_tuner.tinyflux_upgrade v3.safetensors tinyflux.safetensors
    python -m musubi_tuner.tinyflux_upgrade someone/tinyflux-v3 tinyflux.safetensors --ema
    python -m musubi_tuner.tinyflux_upgrade tinyflux.safetensors v3.safetensors --to v3

IN is a file, a folder, folder:name or a hub id. Training and drawing upgrade v3 files by themselves; this command leaves a
file, and says what became of every tensor. The way back drops what v3 has no place for, and says so.
"""

import argparse
import sys
from collections.abc import Sequence

from musubi_tuner.config.command_line import Parser, weights_to_write
from musubi_tuner.errors import EXIT_OK, run_command
from musubi_tuner.stopping import exit_on_terminate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="tinyflux_upgrade", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="checkpoint: file, folder, folder:name or hub id")
    parser.add_argument("output", metavar="OUT", help="file to write, .safetensors; its averaged weights get _ema")
    parser.add_argument("--to", choices=["v4", "v3"], default="v4", help="version to write (default v4)")
    parser.add_argument(
        "--ema", action="store_true", help="write the averaged weights too; they take from the model what they lack"
    )
    parser.add_argument("--ema_file", help="exact name of the averaged weights; implies --ema")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--not_neutral", action="store_true", help="start values as in a new model, instead of those that change least"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the start values (default 42)")
    parser.add_argument(
        "--lenient", action="store_true", help="write the file even if tensors are missing or of another shape"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    options = parser.parse_args(arguments)
    output = weights_to_write("", options.output, options.overwrite)
    ema = options.ema or options.ema_file is not None
    if ema:
        weights_to_write("", str(output.with_name(f"{output.stem}_ema{output.suffix}")), options.overwrite)
    exit_on_terminate()
    from musubi_tuner.models.tinyflux.upgrade_file import upgrade_file

    for line in upgrade_file(
        options.source,
        output,
        to=options.to,
        ema=ema,
        ema_file=options.ema_file,
        revision=options.revision,
        neutral=not options.not_neutral,
        seed=options.seed,
        strict=not options.lenient,
    ):
        print(line)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
