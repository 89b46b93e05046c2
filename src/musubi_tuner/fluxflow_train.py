"""Train from a YAML file or the flags of the published FluxFlow trainer: fluxflow-train --config X.yaml, or --data_path images --train_vae ...

The settings become a run file, <output_path>/fluxflow.toml, which is trained as train.py trains it; run the command again to continue. Flags
lay over the file. --validate-pipeline and --plan show the plan and end. What the file says that this program does otherwise is printed.
At the end the files of the published trainer are laid out in <output_path>, with --generate_diagrams the diagrams too, and with
--training_states its training_states.pt.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from musubi_tuner.config.diagnostics import InvalidConfig
from musubi_tuner.config.importers.documents import read_document
from musubi_tuner.config.importers.read import pairs
from musubi_tuner.config.importers.report import Imported
from musubi_tuner.config.write import dataset_toml
from musubi_tuner.errors import ConfigError, run_command
from musubi_tuner.files import write_text
from musubi_tuner.fluxflow_output import GRAPH, lay_out
from musubi_tuner.models.fluxflow.trainer_names import SECTIONS
from musubi_tuner.models.fluxflow.trainer_settings import read_settings
from musubi_tuner.runner import command

PLAN = ("validate_pipeline", "plan", "dry_run")
HELP = ("-h", "--help")
EXTRAS = ("generate_diagrams", "training_states")
"""Settings of what is made at the end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or any(word in HELP for word in words):
        print(__doc__)
        return 0
    made: list[str] = []
    extras: dict[str, bool] = {}
    code = run_command(lambda: _write(words, made, extras))
    if code or "--plan" in made:
        return code or command.main(made, architecture="ff")
    return command.main(made, architecture="ff") or run_command(lambda: _lay_out(Path(made[0]).parent, extras))


def _lay_out(folder: Path, extras: dict[str, bool]) -> int:
    """Write the files of the published trainer, and draw."""
    lay_out(folder, folder, states=extras["training_states"])
    if extras["generate_diagrams"]:
        from musubi_tuner.fluxflow_graphs import draw_all

        for path in draw_all(folder / GRAPH, folder / GRAPH):
            print(path)
    return 0


def _write(words: Sequence[str], made: list[str], extras: dict[str, bool]) -> int:
    """Write the run file, and say what the runner is called with, and what is made at the end.

    Raises:
        ConfigError: if the settings cannot be translated.
    """
    options = dict(pairs(list(words)))
    plans = any(options.pop(name, False) for name in PLAN)
    config = options.pop("config", None)
    document: dict[str, Any] = {}
    if config is not None:
        if not Path(str(config)).is_file():
            raise ConfigError(f"--config {config}: no such file")
        found = read_document(Path(str(config)))
        if not isinstance(found, dict):
            raise ConfigError(f"--config {config}: holds no table of keys and values")
        document = found
    for section in SECTIONS:
        table = document.get(section)
        if isinstance(table, dict):
            document[section] = {key: value for key, value in table.items() if key not in options}
    sections = [table for name in SECTIONS if isinstance(table := document.get(name), dict)]
    for name in EXTRAS:
        given = options.pop(name, None)
        extras[name] = bool(given) if given is not None else any(bool(t.get(name)) for t in (document, *sections))
    imported = read_settings({**document, **options})
    if imported is None:
        raise ConfigError(
            "no settings of FluxFlow were found: give --config X.yaml, or a mode such as --train_vae with --data_path and --output_path"
        )
    findings = list(imported.report.diagnostics())
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        raise InvalidConfig(str(config or "fluxflow-train"), errors)
    for finding in findings:
        print(f"{finding.level:<10} {finding}")
    path = _place(imported)
    tables = dict(imported.document)
    if imported.general:
        tables["general"] = imported.general
    header = f"# Made by fluxflow-train from {config or 'its flags'}.\n\n"
    try:
        text = "\n".join([header + tomli_w.dumps(tables), *map(dataset_toml, imported.datasets)])
    except TypeError as problem:
        raise ConfigError(f"{config or 'fluxflow-train'}: holds a value that a run file cannot ({problem})") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    print(f"run file: {path}")
    made += [str(path), *(["--plan"] if plans else [])]
    return 0


def _place(imported: Imported) -> Path:
    """Where the run file goes: beside the output, whose paths it holds as seen from here."""
    for entry in imported.datasets:
        for key in ("image_directory", "captions_file"):
            if key in entry:
                entry[key] = str(_path(key, entry[key]))
    output = _path("output_path", imported.document["run"]["output_dir"])
    imported.document["run"]["output_dir"] = str(output)
    given = imported.document["model"].get("path")
    if given is not None and _path("model_checkpoint", given).exists():
        imported.document["model"]["path"] = str(_path("model_checkpoint", given))
    return output / "fluxflow.toml"


def _path(key: str, value: Any) -> Path:
    """A path as seen from here.

    Raises:
        ConfigError: for what is no path.
    """
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key}: is {value!r}, expected a path")
    return Path(value).expanduser().absolute()


if __name__ == "__main__":
    sys.exit(main())
