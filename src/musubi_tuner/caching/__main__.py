"""``python -m musubi_tuner.caching ACTION CONFIG``: the cache jobs, the import of other caches, and the removal of files that
belong to no item."""

import sys
from collections.abc import Sequence

from musubi_tuner.caching.command import main as job
from musubi_tuner.caching.file_format import KINDS
from musubi_tuner.caching.import_command import main as bring_in
from musubi_tuner.caching.status import find_orphans
from musubi_tuner.config import load_config
from musubi_tuner.config.command_line import Parser, split_overrides
from musubi_tuner.data.sources import scan
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in KINDS:
        return job(arguments[0], arguments[1:])
    if arguments and arguments[0] == "import":
        return bring_in(arguments[1:])
    parser = Parser(prog="python -m musubi_tuner.caching", description="Look after cache folders.")
    actions = ["gc", "import", *KINDS]
    parser.add_argument(
        "action",
        choices=actions,
        help="gc: remove files that belong to no item; import: take over caches of the published trainer; others: that cache job",
    )
    parser.add_argument("config", help="run file (TOML)")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    passed, overrides = split_overrides(arguments, {"--yes", "--help"})
    options = parser.parse_args(passed)
    config = load_config(options.config, overrides)
    items = scan(config.datasets, config.spec.code).items
    roots = [dataset.cache_directory for dataset in config.datasets]
    orphans = [path for kind in KINDS for path in find_orphans(items, kind, config.spec.code, roots)]
    if not orphans:
        print("every cache file belongs to an item; nothing to remove")
        return EXIT_OK
    for path in orphans[:10]:
        print(path)
    if len(orphans) > 10:
        print(f"... and {len(orphans) - 10} more")
    if not options.yes:
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
