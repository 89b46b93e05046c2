"""Work with run files: python -m musubi_tuner.config {validate,import,migrate,export,explain,schema,resolve} ..."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from musubi_tuner.config import Diagnostic, RunConfig, load_config
from musubi_tuner.config.command_line import Parser, split_overrides
from musubi_tuner.config.diagnostics import InvalidConfig, error
from musubi_tuner.config.explain_key import explain_key
from musubi_tuner.config.exporters import PROGRAMS, export
from musubi_tuner.config.importers import TITLES, Imported
from musubi_tuner.config.importers.read import has_subsets, read_foreign
from musubi_tuner.config.json_schema import json_schema
from musubi_tuner.config.load import STEP, load_steps
from musubi_tuner.config.pipeline import TABLE
from musubi_tuner.config.read import read_toml
from musubi_tuner.config.when import describe
from musubi_tuner.config.write import dataset_toml, resolved_toml
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.files import write_text
from musubi_tuner.models.registry import MODELS

EXIT_LOST = 1
"""An import has errors that a person must settle."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m musubi_tuner.config", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def add(name: str, text: str, do: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(do=do)
        return one

    one = add("validate", "Check a run file without starting it; exit code 2 if there is an error.", _validate)
    one.add_argument("file")
    one.add_argument("--json", action="store_true", help="print the findings as JSON")
    one = add("import", "Make a run file from a file or a command line of another trainer.", _import)
    one.add_argument("file", help="option file or job file (TOML, JSON, YAML), or a text file with the command")
    one.add_argument("-o", "--output", required=True, help="run file to write")
    one.add_argument("--from", dest="tool", choices=["auto", *TITLES, "shell", "seed-json"], default="auto")
    one.add_argument("--dataset", help="data set file to copy into the run file")
    one.add_argument("--dataset_config", help="data set file that the run file is to refer to")
    one.add_argument("--json", action="store_true", help="print the report as JSON")
    one = add("migrate", "The same as import with its default options.", _import)
    one.add_argument("file")
    one.add_argument("-o", "--output", required=True, help="run file to write")
    one.set_defaults(tool="auto", dataset=None, dataset_config=None, json=False)
    one = add("export", "Write a run file as an option file of another trainer.", _export)
    one.add_argument("file")
    one.add_argument("--to", choices=PROGRAMS, required=True)
    one.add_argument("-o", "--output", required=True, help="file to write")
    one = add("explain", "Explain a setting, or what a name of another trainer means here.", _explain)
    one.add_argument("key")
    one = add("schema", "Print the settings as JSON Schema, for editors.", _schema)
    one.add_argument("--arch", choices=list(MODELS), default=None, help="only those of one family")
    one = add("resolve", "Print a run file with all settings and where their values come from.", _resolve)
    one.add_argument("file")
    chosen = next((word for word in arguments if word in commands.choices), None)
    words, overrides = split_overrides(arguments, _own_options(commands.choices[chosen]) if chosen else set())
    options = parser.parse_args(words)
    options.overrides = overrides
    if overrides and options.do not in (_validate, _export, _resolve):
        raise ConfigError(f"{options.command}: takes no settings of a run; remove {', '.join(overrides)}")
    return options.do(options)  # type: ignore[no-any-return]


def _own_options(command: argparse.ArgumentParser) -> set[str]:
    return {option for action in command._actions for option in action.option_strings}


def _new_file(option: str) -> Path:
    """The file that ``--output`` names.

    Raises:
        ConfigError: if it is there, or its folder is not.
    """
    target = Path(option)
    if target.exists():
        raise ConfigError(f"--output {target}: exists already; choose another name")
    if not target.parent.is_dir():
        raise ConfigError(f"--output {target}: there is no folder {target.parent}; create it first")
    return target


def as_data(found: Diagnostic) -> dict[str, Any]:
    """A finding as plain values."""
    fix = [{"key": key, "value": value} for key, value in found.fix]
    return {"code": found.code, "level": found.level, "keys": list(found.keys), "reason": found.reason, "fix": fix}


def _validate(options: argparse.Namespace) -> int:
    path = Path(options.file)
    try:
        configs = _read(path, options.overrides)
    except ConfigError as problem:
        if not options.json:
            raise
        found = problem.findings if isinstance(problem, InvalidConfig) else [error("P01", str(path), str(problem))]
        print(json.dumps([as_data(finding) for finding in found], indent=2, ensure_ascii=False))
        return ConfigError.exit_code
    found = [finding for config in configs for finding in config.findings]
    if options.json:
        print(json.dumps([as_data(finding) for finding in found], indent=2, ensure_ascii=False))
        return EXIT_OK
    for finding in found:
        print(f"{finding.level:<8} {finding.code:<5} {finding}")
    warnings = sum(finding.level == "warning" for finding in found)
    count = "1 warning" if warnings == 1 else f"{warnings} warnings"
    print(f"{path}: good" + (f", with {count}" if warnings else ""))
    return EXIT_OK


def _read(path: Path, overrides: dict[str, Any]) -> list[RunConfig]:
    several = TABLE in read_toml(path) and STEP not in overrides
    return load_steps(path, overrides) if several else [load_config(path, overrides)]


def _import(options: argparse.Namespace) -> int:
    source, target = Path(options.file), _new_file(options.output)
    if options.dataset and options.dataset_config:
        raise ConfigError(
            "--dataset copies the data sets into the run file, and --dataset_config refers to their file; give only one"
        )
    tool = {"auto": None, "seed-json": "plan"}.get(options.tool, options.tool)
    if options.dataset_config and has_subsets(Path(options.dataset_config)):
        options.dataset, options.dataset_config = (
            options.dataset_config,
            None,
        )  # our run files cannot refer to that form
    imported = read_foreign(source, tool, Path(options.dataset) if options.dataset else None)
    report, errors = imported.report, 0
    if options.dataset_config:
        report.leave_out("datasets", f"the data sets are those of {options.dataset_config}")
    if options.json:
        plain = json.loads(json.dumps(report.as_data(), default=str), parse_constant=str)  # JSON has no NaN
        print(json.dumps(plain, indent=2, ensure_ascii=False))
    for source_key, key, value in () if options.json else report.carried:
        print(f"carried    {source_key} -> {key} = {value!r}")
    for finding in report.diagnostics():
        errors += finding.level == "error"
        if not options.json:
            print(f"{finding.level:<10} {finding}")
    note = _say if not options.json else _silent
    tables = _tables(imported, options.dataset_config, note)
    header = f"# Made from {source.name}; keys that are not here have the defaults of this program.\n\n"
    datasets = tables.pop("datasets", [])
    try:
        text = "\n".join([header + tomli_w.dumps(tables), *map(dataset_toml, datasets)])
    except TypeError as problem:
        raise ConfigError(f"{source}: its data sets hold a value that a run file cannot ({problem})") from None
    write_text(target, text)
    note(f"{target}: written" + (f"; errors above to fix: {errors}" if errors else ""))
    if not errors:
        try:
            for finding in load_config(target).findings:
                if finding.level == "warning":
                    note(f"{finding.level:<10} {finding}")
        except ConfigError as problem:
            note(f"{target} cannot start yet: {problem}")
    return EXIT_OK if not errors else EXIT_LOST


def _say(text: str) -> None:
    print(text)


def _silent(text: str) -> None:
    """Prints nothing: the output is the JSON report."""


def _tables(imported: Imported, dataset_config: str | None, note: Callable[[str], None]) -> dict[str, Any]:
    """The run file as tables."""
    tables = dict(imported.document)
    if dataset_config is not None:
        tables["dataset_config"] = dataset_config
    if "dataset_config" in tables:
        if imported.general:
            assumed = ", ".join(f"{key} = {describe(value)}" for key, value in imported.general.items())
            note(f"note       add to [general] of the data set file, unless it sets them: {assumed}")
        return tables
    if imported.general:
        tables["general"] = imported.general
    if imported.datasets:
        tables["datasets"] = imported.datasets
    else:
        note("note       the source file has no data sets: add dataset_config or [[datasets]] to the run file")
    return tables


def _export(options: argparse.Namespace) -> int:
    target = _new_file(options.output)
    config = load_config(options.file, options.overrides)
    written, lost = export(config, options.to)
    write_text(target, written)
    for key, reason in lost:
        print(f"left out   {key}: {reason}")
    print(f"{target}: written for {TITLES[options.to]}" + (f"; left out: {len(lost)}" if lost else ""))
    return EXIT_OK


def _explain(options: argparse.Namespace) -> int:
    print(explain_key(options.key))
    return EXIT_OK


def _schema(options: argparse.Namespace) -> int:
    print(json.dumps(json_schema(options.arch), indent=2, ensure_ascii=False))
    return EXIT_OK


def _resolve(options: argparse.Namespace) -> int:
    print(resolved_toml(load_config(options.file, options.overrides)), end="")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
