"""Every setting of a run file, declared once: a module per TOML table, a class per table, a field per key.

The type, range, default and the one sentence of help written there make the TOML check, the command line, `--help`, `docs/parameters.md`,
the form and the resolved config; nothing is declared twice. A family's own tables are classes in ``models/<family>/settings.py`` (see
`ModelSpec.sections`), built from the parts here; a setting that a family does not have is not in its tables.

An absent optional value means off. Torch-free.
"""

import functools
from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import ConfigDict, Field
from pydantic.fields import FieldInfo

from musubi_tuner.config.fields import Parameter, Section, param
from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.config.schema.cache import CacheSection
from musubi_tuner.config.schema.demo import DemoSection
from musubi_tuner.config.schema.distributed import DistributedSection
from musubi_tuner.config.schema.ema import EmaSection
from musubi_tuner.config.schema.experts import ExpertsSection
from musubi_tuner.config.schema.hub import HubSection
from musubi_tuner.config.schema.items import OWN_KEYS, DatasetSection, GeneralSection
from musubi_tuner.config.schema.log import LogSection
from musubi_tuner.config.schema.memory import MemorySection
from musubi_tuner.config.schema.model import ModelSection
from musubi_tuner.config.schema.objective import ObjectiveSection
from musubi_tuner.config.schema.optimizer import OptimizerSection
from musubi_tuner.config.schema.resume import ResumeSection
from musubi_tuner.config.schema.roles import RolesSection
from musubi_tuner.config.schema.run import RunSection
from musubi_tuner.config.schema.sample import SampleSection
from musubi_tuner.config.schema.save import SaveSection
from musubi_tuner.config.schema.scheduler import SchedulerSection
from musubi_tuner.config.schema.train import TrainSection
from musubi_tuner.config.schema.validation import ValidationSection
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import ModelSpec

SCHEMA_VERSION = 1


class RunFile(Section):
    """A whole run file. [general] and [[datasets]] are looked up and checked together, by config/datasets.py."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, defer_build=True)

    schema_version: Literal[1] = param(SCHEMA_VERSION, "Version of this format.")
    dataset_config: str | None = param(
        None, "TOML file with [general] and [[datasets]]; or write these tables here.", path=True
    )
    run: RunSection
    model: ModelSection
    experts: ExpertsSection = Field(default_factory=ExpertsSection)
    cache: CacheSection = Field(default_factory=CacheSection)
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    scheduler: SchedulerSection = Field(default_factory=SchedulerSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    train: TrainSection = Field(default_factory=TrainSection)
    memory: MemorySection = Field(default_factory=MemorySection)
    distributed: DistributedSection = Field(default_factory=DistributedSection)
    ema: EmaSection = Field(default_factory=EmaSection)
    roles: RolesSection = Field(default_factory=RolesSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    save: SaveSection = Field(default_factory=SaveSection)
    sample: SampleSection = Field(default_factory=SampleSection)
    log: LogSection = Field(default_factory=LogSection)
    hub: HubSection = Field(default_factory=HubSection)
    resume: ResumeSection = Field(default_factory=ResumeSection)
    demo: DemoSection | None = None


AMBIGUOUS = {
    "resolution", "size", "width", "height", "steps", "warmup", "enabled", "run", "path", "weights", "unet", "release",
    "state", "private", "token", "folder", "pictures", "guidance", "loss", "workers", "geometry", "lune", "sol", "solver",
    "rank", "alpha", "include", "exclude", "split", "times", "best", "only", "merge", "comment", "shift", "dropout", "max_norm",
    "preset", "kinds", "depth", "targets", "lr_scale", "factor", "patience", "threshold", "cooldown",
}  # fmt: skip
"""Last parts of keys that are not option names by themselves, because they would be unclear or ambiguous."""

SECTION_ALIASES = {"accelerate": "distributed"}


def section_classes(spec: ModelSpec | None = None) -> dict[str, type[Section]]:
    """TOML table name -> its class, in order; of a family, or as far as all families share it."""
    tables: dict[str, type[Section]] = {}
    for name, field in RunFile.model_fields.items():
        classes = [c for c in (field.annotation, *get_args(field.annotation)) if isinstance(c, type)]
        for candidate in classes:
            if issubclass(candidate, Section):
                tables[name] = spec.sections.get(name, candidate) if spec else candidate
    return tables


def parameters(spec: ModelSpec | None = None) -> tuple[Parameter, ...]:
    """All settings of a family in the order of the file; or those that some family has, as the first one has them."""
    return _parameters(spec.code if spec else None)


@functools.cache
def _parameters(code: str | None) -> tuple[Parameter, ...]:
    tables = section_classes()
    found = [Parameter("", name, field, RunFile) for name, field in RunFile.model_fields.items() if name not in tables]
    for section, shared in tables.items():
        families = [MODELS[code]] if code else [MODELS[each] for each in MODELS]
        fields: dict[str, tuple[FieldInfo, type[Section]]] = {}
        for cls in [spec.sections.get(section, shared) for spec in families]:
            for name, field in cls.model_fields.items():
                fields.setdefault(field.alias or name, (field, cls))
        found += [Parameter(section, name, field, cls) for name, (field, cls) in fields.items()]
    return tuple(found)


def parameter_of(spec: ModelSpec, key: str) -> Parameter | None:
    """A setting of a family by its key; None if it has none like it."""
    return _by_key(spec.code).get(key)


@functools.cache
def _by_key(code: str) -> dict[str, Parameter]:
    return {parameter.key: parameter for parameter in _parameters(code)}


@functools.cache
def item_parameters() -> tuple[Parameter, ...]:
    """Settings of [general], then those that only [[datasets]] has; not among `parameters`, because their values are kept in the tables."""
    shared = [Parameter("general", name, field, GeneralSection) for name, field in GeneralSection.model_fields.items()]
    return (
        *shared,
        *(Parameter("datasets", name, DatasetSection.model_fields[name], DatasetSection) for name in OWN_KEYS),
    )


@functools.cache
def flat_names() -> Mapping[str, Parameter]:
    """Command-line names -> settings: the flat aliases, and the last part of every key where it is unique."""
    everything = parameters()
    names: dict[str, Parameter] = {}
    for parameter in everything:
        for alias in parameter.extra("flat"):
            assert alias not in names, alias
            names[alias] = parameter
    counts: dict[str, int] = {}
    for parameter in everything:
        counts[parameter.name] = counts.get(parameter.name, 0) + 1
    for parameter in everything:
        if counts[parameter.name] == 1 and parameter.name not in AMBIGUOUS:
            names.setdefault(parameter.name, parameter)
    for parameter in item_parameters():
        if parameter.section == "general":
            names.setdefault(parameter.name, parameter)
    return names
