"""Rewrite another tool's option file as a run file: python -m musubi_tuner.config.importers FILE -o run.toml"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from musubi_tuner.config.command_line import Parser
from musubi_tuner.config.importers import Imported, import_musubi, import_published, looks_flat
from musubi_tuner.config.paths import locate
from musubi_tuner.config.read import read_toml
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.files import read_json, write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m musubi_tuner.config.importers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", help="option file of musubi-tuner (TOML), or the training_config.json of a family's own trainer"
    )
    parser.add_argument("-o", "--output", required=True, help="run file to write")
    parser.add_argument("--dataset_config", help="data set file that the run file will name")
    options = parser.parse_args(arguments)
    source, target = Path(options.file), Path(options.output)
    if target.exists():
        raise ConfigError(f"--output {target}: exists already; choose another name")
    imported = _imported(source)
    for source_key, key, value in imported.report.carried:
        print(f"carried    {source_key} -> {key} = {value!r}")
    errors = 0
    for finding in imported.report.diagnostics():
        print(f"{finding.level:<10} {finding}")
        errors += finding.level == "error"
    tables = dict(imported.document)
    if options.dataset_config is not None:
        tables["dataset_config"] = options.dataset_config
    if not imported.general:
        if "dataset_config" not in tables:
            print("note       the data set is not in this file: add dataset_config, or [[datasets]], to the run file")
    elif "dataset_config" in tables:
        print(
            "note       keys missing from the data set file take our defaults now: check resolution and enable_bucket there"
        )
    else:
        tables["general"] = imported.general
    header = f"# Made from {source.name}; keys that are not here have this program's defaults.\n\n"
    write_text(target, header + tomli_w.dumps(tables))
    print(f"{target}: written" + (f"; {errors} keys above need you" if errors else ""))
    return EXIT_OK if not errors else 1


def _imported(source: Path) -> Imported:
    """Read a file of any kind that is known.

    Raises:
        ConfigError: if it is none.
    """
    if source.suffix != ".json":
        document = read_toml(source)
        if looks_flat(document) != "musubi":
            raise ConfigError(f"{source}: is not an option file of musubi-tuner")
        return import_musubi(document, lambda text: locate(text, source))
    try:
        document = read_json(source)
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such file") from None
    imported = import_published(document) if isinstance(document, dict) else None
    if imported is None:
        raise ConfigError(
            f"{source}: is not the training_config.json of a known trainer; settings such as learning_rate and total_steps "
            "are expected"
        )
    return imported


if __name__ == "__main__":
    sys.exit(main())
