"""``python -m musubi_tuner.caching ACTION CONFIG``: the cache jobs, the import of other caches, and looking after cache folders."""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from musubi_tuner.caching.care import explain, orphans_of, verify
from musubi_tuner.caching.command import main as job
from musubi_tuner.caching.file_format import KINDS
from musubi_tuner.caching.import_command import main as bring_in
from musubi_tuner.config import load_config
from musubi_tuner.config.command_line import Parser, split_overrides
from musubi_tuner.config.load import STEP, load_steps
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command

_DESCRIPTION = """Look after cache folders.

  latents, text, experts   make what is missing or out of date
  explain                  why the files of an item would be made again: every reason
  verify                   read all files, compare them by content, count what is wrong; exit code 1 if anything is
  gc                       remove files that belong to no item, after asking
  import                   take over caches of the published trainer"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in KINDS:
        return job(arguments[0], arguments[1:])
    if arguments and arguments[0] == "import":
        return bring_in(arguments[1:])
    parser = Parser(
        prog="python -m musubi_tuner.caching", description=_DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["explain", "verify", "gc", "import", *KINDS], help="what to do, see above")
    parser.add_argument("config", help="run file (TOML)")
    parser.add_argument("item", nargs="?", help="explain: a picture, an item's key, or one of its cache files")
    parser.add_argument("--yes", action="store_true", help="gc: do not ask")
    parser.add_argument("--step", metavar="NAME", help="one step of a file that has several; gc takes all of them")
    passed, overrides = split_overrides(arguments, {"--yes", "--help"})
    options = parser.parse_args(passed)
    if (options.action == "explain") != (options.item is not None):
        raise ConfigError(
            "explain: name an item" if options.action == "explain" else f"{options.item}: only explain takes an item"
        )
    if options.action == "explain":
        print("\n".join(explain(load_config(options.config, overrides), options.item)))
        return EXIT_OK
    if options.action == "verify":
        return verify(load_config(options.config, overrides))
    overrides.pop(STEP, None)  # caches of the other steps belong to the run too
    steps = load_steps(options.config, overrides)
    return collect(orphans_of(steps or [load_config(options.config, overrides)]), options.yes)


def collect(orphans: list[Path], yes: bool) -> int:
    """Remove cache files that belong to no item, after asking.

    Raises:
        ConfigError: if nobody can be asked.
    """
    if not orphans:
        print("every cache file belongs to an item; nothing to remove")
        return EXIT_OK
    for path in orphans[:10]:
        print(path)
    if len(orphans) > 10:
        print(f"... and {len(orphans) - 10} more")
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"{len(orphans)} files would be removed; run again with --yes")
        if input(f"remove these {len(orphans)} files? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return EXIT_OK
    for path in orphans:
        path.unlink(missing_ok=True)
    print(f"removed {len(orphans)} files")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
