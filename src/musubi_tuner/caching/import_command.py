"""Take over caches that the published trainer of a family made, instead of encoding everything again.

    python -m musubi_tuner.caching import RUN.toml caches/portraits
    python -m musubi_tuner.caching import RUN.toml caches/latents caches/encodings --dataset 1
    python -m musubi_tuner.caching import RUN.toml caches/sportfashion_latents_1000.pt caches/encodings

SOURCE is a folder with encodings.pt, lune.pt and sol.pt, a folder of a build in shards (state.json), the progress files of an
interrupted build, or files named SET_latents_N.pt, SET_encodings_N.pt and so on: one or several folders of them, and one file
to say which set is meant. Files that need code to unpickle are not opened.

The caches name no images. Row n belongs to the n-th image of the dataset: of a folder by file name, of a JSONL file by line.
The numbers must agree, and the prompts, where they are kept, with the captions. The images must be there: a dataset that
exists only as caches cannot be trained from. Latents of 64x64 need resolution = 512 and enable_bucket = false.

Run it again to continue an interrupted import. Nothing is encoded; what the caches lack is made by the cache jobs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from musubi_tuner.caching.file_format import KINDS
from musubi_tuner.config import load_config
from musubi_tuner.config.command_line import Parser, split_overrides
from musubi_tuner.device import set_threads
from musubi_tuner.errors import ConfigError
from musubi_tuner.stopping import exit_on_terminate


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        prog="python -m musubi_tuner.caching import",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="run file (TOML)")
    parser.add_argument("sources", metavar="SOURCE", nargs="+", type=Path, help="folder or file of the caches")
    parser.add_argument("--dataset", type=int, metavar="N", help="number of the [[datasets]] entry, from 0")
    parser.add_argument("--only", metavar="KINDS", default=",".join(KINDS), help="some of latents,text,experts")
    parser.add_argument("--replace", action="store_true", help="write over files that were not imported from here")
    parser.add_argument("--dry_run", action="store_true", help="check everything and say what would be written")
    own = {"--dataset", "--only", "--replace", "--dry_run", "--help"}
    passed, overrides = split_overrides(arguments, own)
    options = parser.parse_args(passed)
    kinds = [kind for kind in KINDS if kind in options.only.split(",")]
    if len(kinds) != len(options.only.split(",")):
        raise ConfigError(f"--only is {options.only!r}, expected some of {','.join(KINDS)}, separated by commas")
    exit_on_terminate()
    config = load_config(options.config, overrides)
    for finding in config.remarks:
        if finding.level == "warning":
            print(f"warning: {finding}", file=sys.stderr)
    from musubi_tuner.caching.importing import ImportOptions, import_caches

    set_threads(config.run.threads, 1)
    return import_caches(
        config, options.sources, ImportOptions(options.dataset, kinds, options.replace, options.dry_run)
    )
