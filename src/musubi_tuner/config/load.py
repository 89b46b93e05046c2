"""From a run file and command-line overrides to an immutable, fully resolved config. Torch-free.

Later wins: schema defaults, the family's defaults, the file, the command line. The origin of every value is kept.
Everything that is wrong is collected and raised as one `ConfigError`.
"""

import copy
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from musubi_tuner.config.datasets import SHARED_KEYS, DatasetConfig, resolve_datasets
from musubi_tuner.config.diagnostics import NOT_BUILT, Diagnostic, did_you_mean, format_problems
from musubi_tuner.config.fields import Parameter, Section
from musubi_tuner.config.importers import import_musubi, looks_flat
from musubi_tuner.config.model_sections import RoleSection
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
from musubi_tuner.config.read import read_toml
from musubi_tuner.config.rules import validate
from musubi_tuner.config.run_config import ROLE_TABLES, RunConfig, config_class, lay
from musubi_tuner.config.schema import flat_names, parameters, section_classes
from musubi_tuner.errors import ConfigError, keep_secret
from musubi_tuner.models.registry import MODELS, RESERVED
from musubi_tuner.models.spec import ModelSpec

if TYPE_CHECKING:
    from musubi_tuner.config.importers import Imported

DATA_TABLES = ("general", "datasets")
Overrides = Mapping[str, Any]


STEP = "step"
"""Among overrides: the name of the step that is meant."""


def load_steps(path: str | Path, overrides: Overrides | None = None) -> list[RunConfig]:
    """The steps of a run file, each as the run that it is; none for a file without [[steps]].

    Findings on what the file says are those of the first step, and only if they hold in every step: what acts in one of them is
    no mistake of the others.

    Raises:
        ConfigError: listing everything that is wrong, in all steps.
    """
    problems: list[Diagnostic] = []
    steps, _ = _read_steps(read_toml(Path(path)), dict(overrides or {}), problems)
    if problems:
        raise ConfigError(format_problems(str(path), problems))
    configs, wrong = [], dict[str, None]()
    for step in steps:
        try:
            configs.append(load_config(path, {**(overrides or {}), STEP: step.name}))
        except ConfigError as error:
            wrong[str(error)] = None
    if wrong:
        raise ConfigError("\n".join(wrong))
    names = {dataset.name for config in configs for dataset in config.datasets}

    def concerned(key: str) -> list[RunConfig]:
        """The steps that a key is for: those that use its data set, if it is a key of one."""
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
    return configs


def load_config(path: str | Path, overrides: Overrides | None = None) -> RunConfig:
    """Read, resolve and check a run file, or one step of it.

    Args:
        path: the TOML file.
        overrides: dotted keys or flat names -> values, already typed; they win over the file. ``step`` names the step of a file
            that has some: there they lay over the file before the step does, and ``steps.NAME.section.key`` over one step.

    Raises:
        ConfigError: listing everything that is wrong.
    """
    path, given = Path(path), dict(overrides or {})
    document = read_toml(path)
    problems: list[Diagnostic] = []
    step, steps = None, list[Step]()
    if document.get(TABLE) == []:
        del document[TABLE]
    if TABLE in document or (overrides or {}).get(STEP) is not None:
        document, overrides, step, steps = _choose_step(path, document, dict(overrides or {}), problems)
    imported = None
    if not {"schema_version", "run", "model"} & set(document):
        imported = _import_flat(path, document)
        document = imported.document
        problems += imported.report.diagnostics()
    if document.get("schema_version") is True:  # true counts as 1 in Python
        problems.append(Diagnostic("error", "schema_version", "is True, expected 1"))
    tables = {key: document.pop(key) for key in DATA_TABLES if key in document}
    origins: dict[str, str] = {}
    if imported is not None and {"max_train_epochs", "train.max_epochs"} & set(overrides or {}):
        document.get("train", {}).pop("max_steps", None)  # there, epochs win over steps
    values = _collect(document, overrides or {}, origins, problems)
    spec = _find_family(values, problems)
    if spec:
        _apply_defaults(values, spec, origins)
    for parameter in parameters():
        table = values.get(parameter.section)
        if parameter.extra("secret") and isinstance(table, dict):
            keep_secret(table.get(parameter.name))
    config = _validate(values, origins, spec, problems)
    datasets: list[DatasetConfig] = []
    # A mistyped dataset key is reported along with a mistyped [train] key: the tables are checked even when others failed.
    before = len(problems)
    tables = _dataset_tables(values.get("dataset_config"), tables, path, problems)
    if step is not None and step.use:
        tables = _chosen_datasets(tables, step, problems)
    if imported is not None:
        tables = {**tables, "general": {**imported.general, **tables.get("general", {})}}
    if spec and len(problems) == before:
        output_dir = None if config is None else config.output_dir
        datasets, found = resolve_datasets(
            tables, spec.dataset_defaults, spec.pixel_step, lambda text: locate(text, path), output_dir
        )
        datasets = [_checked_experts(dataset, spec, found) for dataset in datasets]
        problems += found
    if config is not None and spec is not None:
        config._path, config._spec, config._datasets = path, spec, datasets
        config._tables, config._origins, config._step, config._steps = tables, origins, step, steps
        config._options = given
        wrong = _role_problems(config, spec)
        meant = {name for each in problems for name in re.findall(r"unknown key\. Did you mean '(\w+)'", each.message)}
        problems += wrong or [each for each in validate(config) if each.key.rpartition(".")[2] not in meant]
    errors = [problem for problem in problems if problem.level == "error"]
    if errors or config is None:
        raise ConfigError(format_problems(f"{path}, step {step.name}" if step else str(path), errors))
    config._findings = [problem for problem in problems if problem.level != "error"]
    return config


def _is_own(key: str, step: Step) -> bool:
    """Whether a step itself sets a key."""
    section, _, name = key.partition(".")
    return re.split(r"[.\[]", name)[0] in step.own.get(section, {})


def _read_steps(
    document: dict[str, Any], overrides: dict[str, Any], problems: list[Diagnostic]
) -> tuple[list[Step], dict[str, Any]]:
    """The steps of a file with their options in them, and the options that are left; both arguments may change."""
    rename_aliases(document, "", problems)
    entries = document.get(TABLE)
    for number, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict):
            rename_aliases(entry, f"{TABLE}[{number}].", problems)
    given = dict(overrides)
    take_step_options(document, overrides, problems)
    return steps_of(document, problems), {key: value for key, value in given.items() if key not in overrides}


def _choose_step(
    path: Path, document: dict[str, Any], overrides: dict[str, Any], problems: list[Diagnostic]
) -> tuple[dict[str, Any], dict[str, Any], Step, list[Step]]:
    """The run file that a step is, the options that lay over it, the step, and all steps.

    Raises:
        ConfigError: if no step is named, or there is no such step.
    """
    name = overrides.pop(STEP, None)
    steps, taken = _read_steps(document, overrides, problems)
    if problems and not steps:
        raise ConfigError(format_problems(str(path), problems))
    if name is None:
        names = ", ".join(step.name for step in steps)
        raise ConfigError(f"{path}: has steps ({names}), and this command needs one of them: --step NAME")
    step = find_step(steps, str(name))
    if isinstance(step, str):
        raise ConfigError(f"{path}: {step}")
    # Options lay over the file before the steps do: what a step says itself, or takes over from the one before, stays.
    known = {**{parameter.key: parameter for parameter in parameters()}, **flat_names()}
    laid, unlaid = copy.deepcopy(document), set[str]()
    plain = {known[key].key if key in known else key: value for key, value in overrides.items()}
    for key, value in plain.items():
        if key in known or _table_of(key) in known:
            unlaid |= set() if put(laid, key, value) else {key}
    problem = follow_problem(laid, step)
    if problem:
        problems.append(Diagnostic("error", "start", problem))
    document = document_of(laid, step)
    for key, value in list(plain.items()):
        if key not in unlaid and _get(document, key) != value and (key in known or _table_of(key) in known):
            del plain[key]
            text = f"step {step.name} sets this itself; to change it there: --set {TABLE}.{step.name}.{key}=..."
            if _get(step.own, key) is None and step.previous is not None:
                text = (
                    f"step {step.name} takes this from step {step.previous.name}; to start as the file says: "
                    f"--set {TABLE}.{step.name}.start=file"
                )
            if key != "run.output_dir":
                problems.append(Diagnostic("info", key, text))
    prefix = f"{TABLE}.{step.name}."
    own = {known[key].key: value for option, value in taken.items() if (key := option.removeprefix(prefix)) in known}
    return document, {**plain, **own}, step, steps


def _table_of(key: str) -> str:
    """The setting that is a table, of a key inside it, such as ``model.geometry.width`` or ``roles.vae.optimizer.lr``."""
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
    names = [entry.get("name") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    known = [name for name in names if isinstance(name, str)]
    for name in step.use:
        if known.count(name) != 1:
            text = f"no data set has this name.{did_you_mean(name, known)}"
            if name in known:
                text = f"{known.count(name)} data sets have this name"
            problems.append(Diagnostic("error", "use", f"{name!r}: {text}"))
    return {
        **tables,
        "datasets": [entry for entry in entries if isinstance(entry, dict) and entry.get("name") in step.use],
    }


def _import_flat(path: Path, document: dict[str, Any]) -> "Imported":
    """Read another tool's option file.

    Raises:
        ConfigError: if it is none that can be read.
    """
    tool = looks_flat(document)
    if tool == "musubi":
        return import_musubi(document, lambda text: locate(text, path))
    what = (
        "Option files of sd-scripts (kohya) are not read yet" if tool else "It is not a musubi-tuner option file either"
    )
    raise ConfigError(
        f"{path}: has neither schema_version nor [run] nor [model], so it is not a run file. {what}; toml/tinyflux.toml shows "
        "the form expected here"
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
    known = {parameter.key: parameter for parameter in parameters()}
    flat = flat_names()
    overridden: dict[str, Any] = {}
    for key, value in overrides.items():
        parameter = known.get(key) or flat.get(key)
        if parameter is None:
            if _table_of(key) in known:
                if not put(values, key, value) and isinstance(_get(values, _table_of(key)), dict):
                    problems.append(
                        Diagnostic("error", key, f"is inside {key.rpartition('.')[0]}, which is not a table")
                    )
                origins[_table_of(key)] = "cli"
            elif any(key.rpartition(".")[2] in names for names in _foreign_keys()):
                overridden[key] = value
            else:
                reason = NOT_BUILT.get(key.rpartition(".")[2], f"unknown key.{did_you_mean(key, [*known, *flat])}")
                problems.append(Diagnostic("error", key, reason))
            continue
        target = values
        if parameter.section:
            if not isinstance(values.get(parameter.section, {}), dict):
                continue
            target = values.setdefault(parameter.section, {})
        target[parameter.name] = value
        origins[parameter.key] = "cli"
    for key, value in overridden.items():
        section, _, name = key.rpartition(".")
        table = values.setdefault(section, {}) if section in section_classes() else values
        if isinstance(table, dict):
            table[name if table is not values else key] = value
    return values


def _foreign_keys() -> list[Mapping[str, Any]]:
    """Keys of other trainers that a family explains."""
    return [MODELS[code].foreign_keys for code in MODELS]


def _find_family(values: dict[str, Any], problems: list[Diagnostic]) -> ModelSpec | None:
    model = values.get("model")
    arch = model.get("arch") if isinstance(model, dict) else None
    if not isinstance(arch, str):
        return None
    if arch in MODELS:
        return MODELS[arch]
    known = [name for code in MODELS for name in (code, MODELS[code].full_name)]
    reason = f"{RESERVED[arch]}." if arch in RESERVED else f"is not a model family.{did_you_mean(arch, known)}"
    problems.append(Diagnostic("error", "model.arch", f"'{arch}': {reason} Supported: {', '.join(known)}"))
    return None


def _apply_defaults(values: dict[str, Any], spec: ModelSpec, origins: dict[str, str]) -> None:
    """Fill in what a preset says, then what the family says."""
    adapter = values.get("adapter")
    preset = adapter.get("preset") if isinstance(adapter, dict) else None
    if isinstance(adapter, dict) and isinstance(preset, str):
        for name, value in spec.adapters.presets.get(preset, {}).items():
            if name not in adapter:
                adapter[name] = value
                origins[f"adapter.{name}"] = "preset"
    for key, value in spec.defaults.items():
        section, name = key.split(".")
        table = values.setdefault(section, {})
        if isinstance(table, dict) and name not in table:
            table[name] = value
            origins[key] = "arch"


def _validate(
    values: dict[str, Any], origins: dict[str, str], spec: ModelSpec | None, problems: list[Diagnostic]
) -> RunConfig | None:
    """The config; without its unknown keys where nothing else is wrong, so that the rules find what else there is."""
    model = config_class(spec.code) if spec else RunConfig
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        known = {parameter.key for parameter in parameters()}
        found = error.errors(include_url=False)
        unknown = [tuple(map(str, item["loc"])) for item in found if item["type"] == "extra_forbidden"]
        for item in found:
            if spec is None and item["type"] == "extra_forbidden" and ".".join(map(str, item["loc"])) in known:
                continue  # of a family, and the family is not known
            problem = _explain(item, spec)
            if problem.key not in {other.key for other in problems}:  # a value of two possible types fails twice
                problems.append(problem)
        if spec is None or len(unknown) < len(found) or max(map(len, unknown)) > 2:
            return None
        values = copy.deepcopy(values)
        for *tables, name in unknown:
            del (values[tables[0]] if tables else values)[name]
            origins.pop(".".join([*tables, name]), None)
        config = model.model_validate(values)
    for parameter in parameters(spec):
        origins.setdefault(parameter.key, "default")
    return config


ONE_WAY = ("expert_input", "expert_time", "sol_source", "sol_spatial_norm")
"""Keys of [experts] that say how features are made and scaled; a model learns from features of one making."""


def _checked_experts(dataset: DatasetConfig, spec: ModelSpec, problems: list[Diagnostic]) -> DatasetConfig:
    """The dataset, without its ``experts`` if something is wrong in there."""
    found = [
        Diagnostic("error", key, f"is one for the whole run: features made in different ways must not be mixed. Set experts.{key}")
        for key in ONE_WAY if key in dataset.experts and key in section_classes(spec)["experts"].model_fields
    ]  # fmt: skip
    try:
        section_classes(spec)["experts"].model_validate(dict(dataset.experts))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            problem = _explain({**item, "loc": ("experts", *item["loc"])}, spec)
            found.append(replace(problem, key=problem.key.removeprefix("experts.")))
    problems += [replace(problem, key=f"{dataset.name}.experts.{problem.key}") for problem in found]
    return replace(dataset, experts={}) if found else dataset


def _role_problems(config: RunConfig, spec: ModelSpec) -> list[Diagnostic]:
    """Unknown keys and wrong values in the tables of roles."""
    found = []
    for name, table in product(spec.task(config).roles, ROLE_TABLES):
        role = config.role_section(name)
        own = getattr(role, table) if role else {}
        for key in [key for key, value in own.items() if value is None]:
            found.append(
                Diagnostic("error", f"roles.{name}.{table}.{key}", "cannot be absent for one role; write a value")
            )
        try:
            lay(getattr(config, table), own)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                problem = _explain({**item, "loc": (table, *item["loc"])}, spec)
                found.append(replace(problem, key=f"roles.{name}.{problem.key}"))
    return found


def _explain(item: Any, spec: ModelSpec | None) -> Diagnostic:
    """One pydantic finding in our words."""
    location = [str(part) for part in item["loc"] if not str(part).startswith(("list[", "function-"))]
    by_key = {parameter.key: parameter for parameter in parameters(spec)}
    key = ".".join(location[:2])
    parameter = by_key.get(key)
    if item["type"] == "missing" and len(location) == 4:
        return Diagnostic("error", f"{key}[{location[2]}]", f"has no {location[3]}")
    if item["type"] == "missing":
        return Diagnostic("error", key, f"is required. {parameter.help if parameter else ''}".strip())
    if item["type"] == "extra_forbidden":
        return Diagnostic("error", ".".join(location), _unknown_key(location, item["input"], spec))
    if parameter is None:
        return Diagnostic("error", key, f"is {item['input']!r}, expected a table")
    inner = parameter.field.annotation
    if len(location) > 2 and isinstance(inner, type) and issubclass(inner, Section):
        key = ".".join(location[:3])
        parameter = Parameter(f"{location[0]}.{location[1]}", location[2], inner.model_fields[location[2]])
    nested = [part for part in get_args(parameter.field.annotation) if isinstance(part, type)]
    if len(location) == 4 and nested and issubclass(nested[0], Section):
        parameter = Parameter(f"{key}[{location[2]}]", location[3], nested[0].model_fields[location[3]])
        key = parameter.key
    value = "***" if parameter.extra("secret") else repr(item["input"])
    return Diagnostic("error", key, f"is {value}, expected {_expected(parameter)}{_suggest(parameter, item['input'])}")


def _unknown_key(location: list[str], value: Any, spec: ModelSpec | None) -> str:
    name, key = location[-1], ".".join(location)
    if location[0] == "roles" and len(location) == 3:
        table = next((p.section for p in parameters(spec) if p.section in ROLE_TABLES and p.name == name), None)
        inside = f" It is written [roles.{location[1]}.{table}] {name}." if table else ""
        return f"unknown key.{inside or did_you_mean(name, RoleSection.model_fields)}"
    reason = spec.why_not(key, value) if spec else None
    if reason:
        return reason
    if name in NOT_BUILT:
        return NOT_BUILT[name]
    if name in SHARED_KEYS and name not in section_classes().get(location[0], Section).model_fields:
        return "unknown key. It is about items, so it belongs in [general] or [[datasets]]."
    if len(location) == 1:
        tables = [*section_classes(), "general", "datasets", "schema_version", "dataset_config"]
        kind = "table" if isinstance(value, dict) else "key"
        extra = f" It is written [{flat.section}] {flat.name}." if (flat := flat_names().get(name)) else ""
        return f"unknown {kind}.{did_you_mean(name, tables)}{extra}"
    owners = [each.title for each in map(MODELS.__getitem__, MODELS) if key in {p.key for p in parameters(each)}]
    if spec and owners:
        return f"is a setting of {' and '.join(owners)}; {spec.title} has none like it"
    own = [parameter.name for parameter in parameters(spec) if parameter.section == location[0]]
    hint = did_you_mean(name, own)
    flat = flat_names().get(name)
    if flat and not hint:
        hint = f" It is written [{flat.section}] {flat.name}."
    if not hint:
        elsewhere = [p.key for p in parameters(spec) if p.name == name]
        hint = f" Did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(name, flat_names())
    return f"unknown key.{hint}"


def _expected(parameter: Parameter) -> str:
    text = parameter.type_name
    limits = []
    for constraint in parameter.field.metadata:
        for name, words in (
            ("ge", "at least"),
            ("gt", "above"),
            ("le", "at most"),
            ("lt", "below"),
            ("multiple_of", "a multiple of"),
            ("min_length", "length at least"),
            ("max_length", "length at most"),
            ("pattern", "matching"),
        ):
            limit = getattr(constraint, name, None)
            if limit is not None:
                limits.append(f"{words} {limit}")
    words = {"int": "a whole number", "float": "a number", "text": "a text"}.get(text, text)
    return f"{words} {' and '.join(limits)}".strip()


def _suggest(parameter: Parameter, value: Any) -> str:
    annotation = parameter.field.annotation
    if get_origin(annotation) is Literal and isinstance(value, str) and isinstance(get_args(annotation)[0], str):
        return "." + did_you_mean(value, [str(choice) for choice in get_args(annotation)])
    return ""


def _dataset_tables(
    dataset_config: Any, tables: dict[str, Any], path: Path, problems: list[Diagnostic]
) -> dict[str, Any]:
    """The [general] and [[datasets]] tables, from the run file or from the file it names."""
    if not isinstance(dataset_config, str):
        return tables
    if tables:
        problems.append(
            Diagnostic(
                "error", "dataset_config", "is set, but the run file has its own [general] or [[datasets]]; keep one"
            )
        )
        return tables
    source = locate(dataset_config, path)
    try:
        document = read_toml(source)
    except ConfigError as error:
        problems.append(Diagnostic("error", "dataset_config", str(error)))
        return {}
    for key in document:
        if key not in DATA_TABLES:
            problems.append(
                Diagnostic("error", f"{source}: {key}", f"unknown table or key.{did_you_mean(key, DATA_TABLES)}")
            )
    return {key: document[key] for key in DATA_TABLES if key in document}


def parse_value(parameter: Parameter, text: str) -> Any:
    """Read a command-line value as the type of its setting; the schema then checks it like a file's value."""
    annotation = parameter.field.annotation
    kinds = {part for part in (annotation, *get_args(annotation)) if isinstance(part, type)}
    literal = get_origin(annotation) is Literal
    if text == "none" and type(None) in kinds:
        return None
    if literal and any(isinstance(choice, str) for choice in get_args(annotation)):
        return text
    if str in kinds and get_origin(annotation) is not list and not text.startswith("["):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
