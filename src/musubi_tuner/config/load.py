"""From a run file and command-line overrides to an immutable, fully resolved config. Torch-free.

Later wins: schema defaults, the family's defaults, the file, the command line. The origin of every value is kept.
All errors are collected and raised as one `ConfigError`.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from musubi_tuner.config.datasets import SHARED_KEYS, DatasetConfig, resolve_datasets
from musubi_tuner.config.diagnostics import Diagnostic, InvalidConfig, did_you_mean, error, info, warning
from musubi_tuner.config.explain import explain
from musubi_tuner.config.fields import Parameter
from musubi_tuner.config.importers import TITLES, import_options, is_typed, recognise
from musubi_tuner.config.names import answer, shown, translate, why_not
from musubi_tuner.config.other_words import plain_words
from musubi_tuner.config.paths import locate
from musubi_tuner.config.pipeline import (
    TABLE,
    Step,
    document_of,
    find_step,
    follow_problem,
    put,
    rename_aliases,
    steps_of,
    take_step_options,
)
from musubi_tuner.config.read import read_toml, toml_value
from musubi_tuner.config.rules import validate
from musubi_tuner.config.run_config import ROLE_TABLES, RunConfig, config_class, lay
from musubi_tuner.config.schema import SCHEMA_VERSION, flat_names, item_parameters, parameters, section_classes
from musubi_tuner.config.schema.cache import CacheSection
from musubi_tuner.errors import ConfigError, keep_secret
from musubi_tuner.models.registry import MODELS, foreign_family
from musubi_tuner.models.spec import ModelSpec
from musubi_tuner.optimizers import defaults_of

if TYPE_CHECKING:
    from musubi_tuner.config.importers import Imported

DATA_TABLES = ("general", "datasets")
Overrides = Mapping[str, Any]


DOCUMENT = Path("document")
"""Stands for the file of a document that has none."""
STEP = "step"
"""Key of the overrides that names a step."""


def load_steps(path: str | Path, overrides: Overrides | None = None) -> list[RunConfig]:
    """The steps of a run file, each as a run of its own; an empty list for a file without [[steps]].

    Findings about the file itself are reported once, with the first step, and only if they hold in every step: a setting that has an
    effect in one step gives no warning.

    Raises:
        ConfigError: listing all errors of all steps.
    """
    return _load_steps(Path(path), read_toml(Path(path)), overrides or {})


def _load_steps(path: Path, document: dict[str, Any], overrides: Overrides) -> list[RunConfig]:
    """See `load_steps`."""
    problems: list[Diagnostic] = []
    written = copy.deepcopy(document)
    if is_typed(document):
        _translate(document, [])  # problems with names are reported step by step
    steps, _ = _read_steps(document, _own_names(overrides, document), problems)
    if problems:
        raise InvalidConfig(str(path), problems)
    configs, wrong, refusals = [], dict[str, None](), list[Diagnostic]()
    for step in steps:
        try:
            configs.append(_load(path, copy.deepcopy(written), {**overrides, STEP: step.name}))
        except ConfigError as refused:
            wrong[str(refused)] = None
            findings = refused.findings if isinstance(refused, InvalidConfig) else []
            refusals += [each for each in findings if each not in refusals]
    if wrong:
        raise InvalidConfig(str(path), refusals, "\n".join(wrong))
    names = {dataset.name for config in configs for dataset in config.datasets}

    def concerned(key: str) -> list[RunConfig]:
        """The steps that a key concerns: those that use its data set, if it is a data set key."""
        head = key.partition(".")[0]
        return [c for c in configs if head not in names or head in {dataset.name for dataset in c.datasets}]

    kept: list[list[Diagnostic]] = []
    for config, step in zip(configs, steps):
        kept.append([])
        for found in config.findings:
            those = concerned(found.key)
            common = config is those[0] and all(found in each.findings for each in those)
            if common or found.level == "info" or _is_own(found.key, step):
                kept[-1].append(found)
    for config, findings in zip(configs, kept):
        config._findings = findings
        strict = [replace(found, level="error") for found in findings if found.level == "warning" and config.run.strict]
        if strict:
            raise InvalidConfig(f"{path}, step {config.step.name if config.step else ''}", strict)
    return configs


def load_config(path: str | Path, overrides: Overrides | None = None) -> RunConfig:
    """Read, resolve and check a run file, or one step of it.

    Args:
        path: the TOML file.
        overrides: dotted keys or flat names -> values, already typed; they override the file. ``step`` names a step: then they
            override the file but not the step, and ``steps.NAME.section.key`` overrides one step.

    Raises:
        ConfigError: listing all errors.
    """
    return _load(Path(path), read_toml(Path(path)), overrides)


def load_document(document: Mapping[str, Any], overrides: Overrides | None = None) -> RunConfig:
    """The same for a document that is already parsed; its relative paths are relative to the working directory.

    Raises:
        ConfigError: listing all errors.
    """
    return _load(DOCUMENT, copy.deepcopy(dict(document)), overrides)


def load_documents(document: Mapping[str, Any]) -> list[RunConfig]:
    """The runs of a document that is already parsed: one for each of its steps, or the only one.

    Raises:
        ConfigError: listing all errors.
    """
    return _load_steps(DOCUMENT, copy.deepcopy(dict(document)), {}) or [load_document(document)]


def _load(path: Path, document: dict[str, Any], overrides: Overrides | None) -> RunConfig:
    given = dict(overrides or {})
    problems: list[Diagnostic] = []
    overrides = _own_names(given, document)
    step, steps = None, list[Step]()
    if is_typed(document):
        _translate(document, problems)
    if document.get(TABLE) == []:
        del document[TABLE]
    if TABLE in document or (overrides or {}).get(STEP) is not None:
        document, overrides, step, steps = _choose_step(path, document, dict(overrides or {}), problems)
    imported = None
    if not is_typed(document):
        imported = _import_flat(path, document)
        document = imported.document
        problems += imported.report.diagnostics()
    problems += _version_problems(document)
    tables = {key: document.pop(key) for key in DATA_TABLES if key in document}
    origins: dict[str, str] = {}
    if imported is not None and {"max_train_epochs", "train.max_epochs"} & set(overrides or {}):
        document.get("train", {}).pop("max_steps", None)  # there, epochs take precedence over steps
    values = _collect(document, overrides or {}, origins, problems)
    of_items = values.pop(OF_ITEMS, {})
    plain_words(values, origins, problems)
    spec = _find_family(values, problems)
    if spec:
        _apply_defaults(values, spec, origins)
    for parameter in parameters():
        table = values.get(parameter.section)
        if parameter.extra("secret") and isinstance(table, dict):
            keep_secret(table.get(parameter.name))
    config, wrong = _validate(values, origins, spec, problems)
    unread: list[Diagnostic] = []
    tables = _dataset_tables(values.get("dataset_config"), tables, path, unread)
    tables = _completed(tables, step, imported, of_items, unread)
    problems += unread
    datasets = _datasets(path, tables, config, spec, problems) if spec and not _errors(unread) else []
    if config is not None and spec is not None:
        config._path, config._spec, config._datasets = path, spec, datasets
        config._tables, config._origins, config._step, config._steps = tables, origins, step, steps
        config._options = given
        in_roles = _role_problems(config, spec)
        wrong |= _hinted(problems, spec)
        problems += in_roles or validate(config, wrong)
    if (
        config is not None and config.run.strict and step is None
    ):  # a setting that has an effect in another step gives no warning
        problems = [replace(found, level="error") if found.level == "warning" else found for found in problems]
    if config is None or _errors(problems):
        raise InvalidConfig(f"{path}, step {step.name}" if step else str(path), problems)
    config._findings = problems
    return config


def _errors(problems: list[Diagnostic]) -> bool:
    """Whether one of some findings is an error."""
    return any(problem.level == "error" for problem in problems)


def _completed(
    tables: dict[str, Any], step: Step | None, imported: "Imported | None", of_items: dict[str, Any], problems: list[Diagnostic]
) -> dict[str, Any]:  # fmt: skip
    """[general] and [[datasets]] with the changes by a step, another trainer's file and the options."""
    if step is not None and step.use:
        tables = _chosen_datasets(tables, step, problems)
    if imported is not None and imported.datasets:
        tables = {"datasets": imported.datasets, **tables}
    entries, written = tables.get("datasets", []), tables.get("general", {})
    names = dict.fromkeys([*of_items, *(written if isinstance(written, dict) else ())])
    for name in names if isinstance(entries, list) and entries else ():
        if all(isinstance(entry, dict) and name in entry for entry in entries):
            problems.append(warning("NA03", f"general.{name}", "has no effect because every data set has its own"))
    general = tables.get("general", {})
    assumed = imported.general if imported is not None else {}
    if isinstance(general, dict) and (assumed or of_items):
        tables = {**tables, "general": {**assumed, **general, **of_items}}
    return tables


def _datasets(
    path: Path, tables: dict[str, Any], config: RunConfig | None, spec: ModelSpec, problems: list[Diagnostic]
) -> list[DatasetConfig]:
    """The data sets of a run, with the settings of [cache] and of the task that concern them."""
    output_dir = None if config is None else config.output_dir
    datasets, found = resolve_datasets(
        tables, spec.dataset_defaults, spec.pixel_step, lambda text: locate(text, path), output_dir, spec.finest_step
    )
    cache = config.cache if config is not None else CacheSection()
    leaves_out = spec.drops_text and (config is None or spec.task(config).denoises)
    datasets = [
        replace(
            dataset,
            text=replace(
                dataset.text, text_variants=cache.text_variants, seed=cache.seed, drop_as_empty=not leaves_out
            ),
            beside=path.parent,
            views=replace(dataset.views, latent_variants=cache.latent_variants, seed=cache.seed),
        )
        for dataset in (_checked_experts(dataset, spec, found) for dataset in datasets)
    ]
    problems += found
    return datasets


def _translate(document: dict[str, Any], problems: list[Diagnostic]) -> None:
    """Rename all keys of a run file, and of its steps, to our names, in place."""
    spec, outside = _family_of(document), document.get("dataset_config")
    rename_aliases(document, "", problems)
    translate(document, "", spec, problems, outside if isinstance(outside, str) else None)
    for where, entry in _step_tables(document):
        rename_aliases(entry, where, problems)
        translate(entry, where, spec, problems, "[general] or [[datasets]]")


def _step_tables(document: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The tables of [[steps]], each with the prefix of its keys in a message."""
    entries = document.get(TABLE)
    named = enumerate(entries if isinstance(entries, list) else [])
    return [(f"{TABLE}[{number}].", entry) for number, entry in named if isinstance(entry, dict)]


def _own_names(overrides: Overrides, document: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names of our settings, also after the name of a step; refused ones are kept as they are."""
    known = {*(parameter.key for parameter in (*parameters(), *item_parameters())), *flat_names()}
    spec, named = _family_of(document), list[tuple[bool, str, Any]]()
    for option, value in overrides.items():
        parts = option.split(".", 2)
        name = parts[2] if parts[0] == "steps" and len(parts) == 3 else option
        other = None if name in known or _table_of(name) in known else answer(name, value, spec)
        if other is not None and other.key and not other.refused:
            named.append((other.wins, option.removesuffix(name) + other.key, other.value))
        else:
            named.append((False, option, value))
    return {key: value for _, key, value in sorted(named, key=lambda each: each[0])}  # the later of one name stays


def _version_problems(document: Mapping[str, Any]) -> list[Diagnostic]:
    """A schema_version that is not ours."""
    version = document.get("schema_version", SCHEMA_VERSION)
    if version is True:  # true counts as 1 in Python
        return [error("U02", "schema_version", "is True, expected 1")]
    if isinstance(version, int) and version > SCHEMA_VERSION:
        text = f"is {version}, expected at most {SCHEMA_VERSION}; the file is for a newer version of this program"
        return [error("U06", "schema_version", text)]
    return []


def _is_own(key: str, step: Step) -> bool:
    """Whether a step itself sets a key."""
    section, _, name = key.partition(".")
    return re.split(r"[.\[]", name)[0] in step.own.get(section, {})


def _read_steps(
    document: dict[str, Any], overrides: dict[str, Any], problems: list[Diagnostic]
) -> tuple[list[Step], dict[str, Any]]:
    """The steps of a file with their options applied, and the options that were applied; both arguments may change."""
    rename_aliases(document, "", problems)
    for where, entry in _step_tables(document):
        rename_aliases(entry, where, problems)
    given = dict(overrides)
    take_step_options(document, overrides, problems)
    return steps_of(document, problems), {key: value for key, value in given.items() if key not in overrides}


def _choose_step(
    path: Path, document: dict[str, Any], overrides: dict[str, Any], problems: list[Diagnostic]
) -> tuple[dict[str, Any], dict[str, Any], Step, list[Step]]:
    """The run file of a step, the options that override it, the step, and all steps.

    Raises:
        ConfigError: if no step is named, or there is no such step.
    """
    name = overrides.pop(STEP, None)
    steps, taken = _read_steps(document, overrides, problems)
    if problems and not steps:
        raise InvalidConfig(str(path), problems)
    if name is None:
        names = ", ".join(step.name for step in steps)
        raise ConfigError(f"{path}: has steps ({names}), but this command needs one of them; add --step NAME")
    step = find_step(steps, str(name))
    if isinstance(step, str):
        raise ConfigError(f"{path}: {step}")
    # Options override the file but not the steps: values that a step sets, or takes from the previous one, are kept.
    known = {**{parameter.key: parameter for parameter in parameters()}, **flat_names()}
    laid, unlaid = copy.deepcopy(document), set[str]()
    plain = {known[key].key if key in known else key: value for key, value in overrides.items()}
    for key, value in plain.items():
        if key in known or _table_of(key) in known:
            unlaid |= set() if put(laid, key, value) else {key}
    problem = follow_problem(laid, step)
    if problem:
        problems.append(error("S01", "start", problem))
    document = document_of(laid, step)
    for key, value in list(plain.items()):
        if key not in unlaid and _get(document, key) != value and (key in known or _table_of(key) in known):
            del plain[key]
            text = f"is set by step {step.name}, so the option has no effect; to change it there: --set {TABLE}.{step.name}.{key}=..."
            if _get(step.own, key) is None and step.previous is not None:
                text = (
                    f"is taken by step {step.name} from step {step.previous.name}, so the option has no effect; to start from the file: "
                    f"--set {TABLE}.{step.name}.start=file"
                )
            if key != "run.output_dir":
                problems.append(info("S02", key, text))
    prefix = f"{TABLE}.{step.name}."
    own = {known[key].key: value for option, value in taken.items() if (key := option.removeprefix(prefix)) in known}
    return document, {**plain, **own}, step, steps


def _table_of(key: str) -> str:
    """The setting that holds a key of its table, such as ``model.geometry.width`` or ``roles.vae.optimizer.lr``."""
    return ".".join(key.split(".")[:2]) if key.startswith((_GEOMETRY, "roles.")) else ""


_GEOMETRY = "model.geometry."


def _get(document: Mapping[str, Any], key: str) -> Any:
    """Value of a dotted key; None if there is none."""
    found: Any = document
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _chosen_datasets(tables: dict[str, Any], step: Step, problems: list[Diagnostic]) -> dict[str, Any]:
    """[general] and those [[datasets]] that a step uses."""
    entries = tables.get("datasets", [])
    if not isinstance(entries, list):
        return tables
    names = [entry.get("name") for entry in entries if isinstance(entry, dict)]
    known = [name for name in names if isinstance(name, str)]
    for name in step.use:
        if known.count(name) != 1:
            text = f"no data set has this name.{did_you_mean(name, known)}"
            if name in known:
                text = f"{known.count(name)} data sets have this name"
            problems.append(error("S03", "use", f"{name!r}: {text}"))
    return {
        **tables,
        "datasets": [entry for entry in entries if isinstance(entry, dict) and entry.get("name") in step.use],
    }


def _import_flat(path: Path, document: dict[str, Any]) -> "Imported":
    """Read another tool's option file.

    Raises:
        ConfigError: if it is none that can be read.
    """
    tool = recognise(document)
    if tool in ("musubi", "kohya", "plan"):
        return import_options(document, lambda text: locate(text, path), tool)
    what = "It is not an option file of musubi-tuner or sd-scripts either"
    if tool is not None:
        what = (
            f"It is a file of {TITLES[tool]}; convert it with python -m musubi_tuner.config import {path} -o run.toml"
        )
    raise ConfigError(
        f"{path}: has no schema_version, [run] or [model], so it is not a run file. {what}; see toml/tinyflux.toml for an "
        "example"
    )


def _collect(
    document: dict[str, Any], overrides: Overrides, origins: dict[str, str], problems: list[Diagnostic]
) -> dict[str, Any]:
    """Merge file and overrides into one tree, noting origins; unknown overrides are left under their own name."""
    rename_aliases(document, "", problems)
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key in section_classes() and isinstance(value, dict):
            values[key] = copy.deepcopy(value)
            origins.update({f"{key}.{name}": "file" for name in value})
        else:
            values[key] = value
            origins[key] = "file"
    for key, value in overrides.items():
        _override(key, value, values, origins, problems)
    return values


def _override(
    key: str, value: Any, values: dict[str, Any], origins: dict[str, str], problems: list[Diagnostic]
) -> None:
    """Apply one option to the tree."""
    known = {parameter.key: parameter for parameter in parameters()}
    parameter, item = known.get(key) or flat_names().get(key), key.removeprefix("general.")
    if parameter is not None and parameter.section != "general":
        table = values.setdefault(parameter.section, {}) if parameter.section else values
        if isinstance(table, dict):
            table[parameter.name] = value
            origins[parameter.key] = "cli"
        return
    if _table_of(key) in known:
        if not put(values, key, value) and isinstance(_get(values, _table_of(key)), dict):
            problems.append(error("U02", key, f"is inside {key.rpartition('.')[0]}, which is not a table"))
        origins[_table_of(key)] = "cli"
        return
    if key in {parameter.key for parameter in item_parameters()} and key.startswith("datasets."):
        problems.append(error("U01", key, "is a setting of one data set; write it in [[datasets]]"))
        return
    if item in SHARED_KEYS:
        values.setdefault(OF_ITEMS, {})[item] = value
        return
    spec = _family_of(values)
    found = answer(key, value, spec)
    if found is None:
        reason = why_not(key, value, spec) if spec else None
        text = reason or f"unknown key.{did_you_mean(key, [*known, *flat_names(), *SHARED_KEYS])}"
        problems.append(error("NA01" if reason else "U01", key, text))
    elif found.refused:
        problems.append(error("NA01", key, found.refused))
    elif found.key:
        _override(found.key, found.value, values, origins, problems)
        problems.append(info("NA04", key, f"is read as {found.key} = {shown(found.key, found.value)}"))
    else:
        problems.append(info("NA04", key, f"is left out: {found.harmless}"))


OF_ITEMS = "general of options"
"""Key under which options of [general] are kept until the tables are resolved."""


def _family_of(document: Mapping[str, Any]) -> ModelSpec | None:
    """The family that a document names; None if it names none that is known."""
    model = document.get("model")
    arch = model.get("arch", model.get("model_type")) if isinstance(model, dict) else None
    return MODELS[arch] if isinstance(arch, str) and arch in MODELS else None


def _find_family(values: dict[str, Any], problems: list[Diagnostic]) -> ModelSpec | None:
    model = values.get("model")
    arch = model.get("arch") if isinstance(model, dict) else None
    if not isinstance(arch, str):
        return None
    if arch in MODELS:
        return MODELS[arch]
    known = [name for code in MODELS for name in (code, MODELS[code].full_name)]
    reason = foreign_family(arch) or f"is not a model family.{did_you_mean(arch, known)}"
    fix = [("model.arch", code) for code in MODELS if arch.lower() in (code, MODELS[code].full_name)]
    problems.append(error("U04", "model.arch", f"'{arch}': {reason} Supported: {', '.join(known)}", fix=fix))
    return None


def _apply_defaults(values: dict[str, Any], spec: ModelSpec, origins: dict[str, str]) -> None:
    """Fill in values of the preset and of the optimizer, then defaults of the family."""
    adapter = values.get("adapter")
    preset = adapter.get("preset") if isinstance(adapter, dict) else None
    if isinstance(adapter, dict) and isinstance(preset, str):
        for name, value in spec.adapters.presets.get(preset, {}).items():
            if name not in adapter:
                adapter[name] = value
                origins[f"adapter.{name}"] = "preset"
    optimizer = values.get("optimizer")
    chosen = optimizer.get("type") if isinstance(optimizer, dict) else None
    usual = defaults_of(chosen) if isinstance(chosen, str) else {}
    for origin, defaults in (("preset", usual), ("arch", spec.defaults)):
        for key, value in defaults.items():
            section, name = key.split(".")
            table = values.setdefault(section, {})
            if isinstance(table, dict) and name not in table:
                table[name] = value
                origins[key] = origin


PLACEHOLDER = "missing"
"""Stands for a required text that is missing, so that everything else can be checked."""


def _validate(
    values: dict[str, Any], origins: dict[str, str], spec: ModelSpec | None, problems: list[Diagnostic]
) -> tuple[RunConfig | None, set[str]]:
    """The config, with defaults in place of wrong values, so that the rules can find other errors; and the wrong keys.

    None if no config can be made: without a family, or if a whole table is missing.
    """
    model = config_class(spec.code) if spec else RunConfig
    known, wrong, said = {parameter.key for parameter in parameters()}, set[str](), set[str]()
    for _ in range(3):  # a value that takes another one's place may be wrong too
        try:
            config = model.model_validate(values)
        except ValidationError as invalid:
            values = copy.deepcopy(values)
            for item in invalid.errors(include_url=False):
                location = [str(part) for part in item["loc"]]
                if spec is None and item["type"] == "extra_forbidden" and ".".join(location) in known:
                    continue  # of a family, and the family is not known
                problem = explain(item, spec)
                if location[0] not in wrong and problem.key not in said:  # a value of two possible types fails twice
                    problems.append(problem)
                said.add(problem.key)
                wrong.add(".".join(location[:2]))
                _mend(values, location, item["type"])
                origins.pop(".".join(location[:2]), None)
            continue
        for parameter in parameters(spec):
            origins.setdefault(parameter.key, "default")
        return (config if spec else None), wrong
    return None, wrong


def _mend(values: dict[str, Any], location: list[str], kind: str) -> None:
    """Remove a wrong value, or put a placeholder for a missing one."""
    section, rest = location[0], location[1:2]
    if not rest:
        if kind == "missing":
            values[section] = {}
        else:
            values.pop(section, None)
    elif kind == "missing" and len(location) == 2:
        values[section][rest[0]] = PLACEHOLDER
    elif isinstance(values.get(section), dict):
        values[section].pop(rest[0], None)


def _hinted(problems: list[Diagnostic], spec: ModelSpec) -> set[str]:
    """Keys suggested for mistyped ones: findings of rules about them would only follow from the typing error."""
    names = {
        name
        for each in problems
        if each.code == "U01"
        for name in re.findall(r"'(\w+)'", each.reason.partition("Did you mean")[2])
    }
    return {parameter.key for parameter in parameters(spec) if parameter.name in names}


ONE_WAY = ("expert_input", "expert_time", "sol_source", "sol_spatial_norm")
"""Keys of [experts] that determine how features are made and scaled; they must be the same for all data sets."""


def _checked_experts(dataset: DatasetConfig, spec: ModelSpec, problems: list[Diagnostic]) -> DatasetConfig:
    """The data set, without its ``experts`` if they have errors."""
    found = [
        error("T11", key, f"must be the same for the whole run, because features made in different ways must not be mixed; set experts.{key}")
        for key in ONE_WAY if key in dataset.experts and key in section_classes(spec)["experts"].model_fields
    ]  # fmt: skip
    try:
        section_classes(spec)["experts"].model_validate(dict(dataset.experts))
    except ValidationError as wrong:
        for item in wrong.errors(include_url=False):
            problem = explain({**item, "loc": ("experts", *item["loc"])}, spec)
            found.append(replace(problem, keys=(problem.key.removeprefix("experts."),)))
    problems += [replace(problem, keys=(f"{dataset.name}.experts.{problem.key}",)) for problem in found]
    return replace(dataset, experts={}) if found else dataset


def _role_problems(config: RunConfig, spec: ModelSpec) -> list[Diagnostic]:
    """Unknown keys and wrong values in the tables of roles."""
    found = []
    for name, table in product(spec.task(config).roles, ROLE_TABLES):
        role = config.role_section(name)
        own = getattr(role, table) if role else {}
        for key in [key for key, value in own.items() if value is None]:
            found.append(error("U02", f"roles.{name}.{table}.{key}", "cannot be absent for a role; write a value"))
        try:
            lay(getattr(config, table), own)
        except ValidationError as wrong:
            for item in wrong.errors(include_url=False):
                problem = explain({**item, "loc": (table, *item["loc"])}, spec)
                found.append(replace(problem, keys=(f"roles.{name}.{problem.key}",)))
    return found


def _dataset_tables(
    dataset_config: Any, tables: dict[str, Any], path: Path, problems: list[Diagnostic]
) -> dict[str, Any]:
    """The [general] and [[datasets]] tables, from the run file or from the file it names."""
    if not isinstance(dataset_config, str):
        return tables
    if tables:
        problems.append(
            error("U05", "dataset_config", "is set, but the run file has its own [general] or [[datasets]]; keep one")
        )
        return tables
    source = locate(dataset_config, path)
    try:
        document = read_toml(source)
    except ConfigError as unreadable:
        problems.append(error("P01", "dataset_config", str(unreadable)))
        return {}
    for key in document:
        if key not in DATA_TABLES:
            problems.append(error("U01", f"{source}: {key}", f"unknown table or key.{did_you_mean(key, DATA_TABLES)}"))
    return {key: document[key] for key in DATA_TABLES if key in document}


def parse_value(parameter: Parameter, text: str) -> Any:
    """Parse a command-line value as the type of its setting; the schema then checks it like a value of the file."""
    annotation = parameter.field.annotation
    kinds = {part for part in (annotation, *get_args(annotation)) if isinstance(part, type)}
    literal = get_origin(annotation) is Literal
    if text == "none" and type(None) in kinds:
        return None
    if literal and any(isinstance(choice, str) for choice in get_args(annotation)):
        return text
    if str in kinds and get_origin(annotation) is not list and not text.startswith("["):
        return text
    return toml_value(text)
