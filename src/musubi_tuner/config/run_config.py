"""A checked run file as a value. Torch-free."""

import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, create_model

from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.config.diagnostics import Diagnostic
from musubi_tuner.config.fields import Section
from musubi_tuner.config.paths import expand, locate
from musubi_tuner.config.pipeline import Step, unfinished_step
from musubi_tuner.config.schema import RunFile
from musubi_tuner.config.schema.experts import ExpertsSection, Sd15Teachers
from musubi_tuner.config.schema.model import ClipAndT5
from musubi_tuner.config.schema.roles import RoleSection
from musubi_tuner.errors import ConfigError
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import Latents, ModelSpec
from musubi_tuner.optimizers import defaults_of

ROLE_TABLES = ("optimizer", "scheduler", "ema")
"""Tables that a role may change for itself."""

_ATTRIBUTES = {"from": "from_"}
"""Keys that Python takes no attribute for."""


def lay(section: Section, own: Mapping[str, Any]) -> Section:
    """A table with some of its keys changed, checked like a file's.

    Raises:
        pydantic.ValidationError: for an unknown key or a wrong value.
    """
    return type(section).model_validate({**section.model_dump(by_alias=True), **own})


class RunConfig(RunFile):
    """A checked run file: its sections as attributes, and what was derived from them."""

    _path: Path = PrivateAttr()
    _spec: ModelSpec = PrivateAttr()
    _datasets: list[DatasetConfig] = PrivateAttr(default_factory=list)
    _tables: dict[str, Any] = PrivateAttr(default_factory=dict)
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _findings: list[Diagnostic] = PrivateAttr(default_factory=list)
    _step: Step | None = PrivateAttr(default=None)
    _steps: list[Step] = PrivateAttr(default_factory=list)
    _options: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def step(self) -> Step | None:
        """The step of the file that this is; None for a file without steps."""
        return self._step

    @property
    def steps(self) -> list[Step]:
        """All steps of the file."""
        return self._steps

    @property
    def waits_for(self) -> Step | None:
        """The step before from which this one starts and which is not finished; None if this one can start."""
        return unfinished_step(self._step, self.output_dir.parent, [self.model.path, self.adapter.init_from])

    @property
    def words(self) -> str:
        """Arguments by which a command means this run: the file, and its step."""
        return shlex.quote(str(self._path)) + (f" --step {shlex.quote(self._step.name)}" if self._step else "")

    @property
    def path(self) -> Path:
        """The run file."""
        return self._path

    @property
    def spec(self) -> ModelSpec:
        """The model family."""
        return self._spec

    @property
    def latents(self) -> Latents:
        """Size of the run's latents."""
        spec = self._spec
        return spec.latents(self) if spec.latents else Latents(spec.latent_channels, spec.vae_factor)

    @property
    def datasets(self) -> list[DatasetConfig]:
        """The resolved datasets, in order."""
        return self._datasets

    @property
    def dataset_tables(self) -> dict[str, Any]:
        """[general] and [[datasets]] as they were written."""
        return self._tables

    @property
    def is_precached(self) -> bool:
        """Whether all data sets are caches without pictures."""
        return bool(self.datasets) and all(dataset.precached for dataset in self.datasets)

    @property
    def origins(self) -> dict[str, str]:
        """Dotted key -> default, arch, preset, file or cli."""
        return self._origins

    @property
    def findings(self) -> list[Diagnostic]:
        """Warnings and notes found while loading."""
        return self._findings

    @property
    def remarks(self) -> list[Diagnostic]:
        """Findings to print, without that of the average, of which the plan shows more, because it reads the state."""
        return [found for found in self._findings if found.code != "V74"]

    @property
    def keeps_best(self) -> bool:
        """Whether the best weights so far are kept: as save.best says, else where there is a validation loss."""
        return bool(self.validation.split) if self.save.best is None else self.save.best

    @property
    def warms_average(self) -> bool:
        """Whether a new average starts with less memory: as ema.warmup says, else where it starts as good weights that train on."""
        if self.ema.warmup != "auto":
            return self.ema.warmup
        # Warm-up would forget an average that comes from the checkpoint at once.
        return self.ema.init == "model" and (self.model.init == "checkpoint" or self.adapter.type != "none")

    @property
    def options(self) -> dict[str, Any]:
        """Overrides of the command line, as they were given."""
        return self._options

    def role_section(self, name: str) -> RoleSection | None:
        """[roles.<name>]; None if the family has no such role."""
        own = getattr(self.roles, name, None)
        return own if isinstance(own, RoleSection) else None

    def role_keys(self, name: str) -> set[str]:
        """Keys of [optimizer], [scheduler], [ema] and train.max_grad_norm that a role sets for itself."""
        own = self.role_section(name)
        if own is None:
            return set()
        limit = {"train.max_grad_norm"} if own.max_grad_norm is not None else set()
        return limit | {f"{table}.{key}" for table in ROLE_TABLES for key in getattr(own, table)}

    def for_role(self, name: str) -> "RunConfig":
        """The run as it is for one of its roles: [roles.<name>] over [optimizer], [scheduler], [ema] and train.max_grad_norm.

        Raises:
            pydantic.ValidationError: if a key there is unknown or has a wrong value; a loaded config raises none.
        """
        own = self.role_section(name)
        if own is None:
            return self
        usual: dict[str, dict[str, Any]] = {table: {} for table in ROLE_TABLES}
        if own.optimizer.get("type", self.optimizer.type) != self.optimizer.type:
            # What the run's optimizer brings along is nothing for another one.
            plain = type(self.optimizer)()
            for key in (key for key in defaults_of(self.optimizer.type) if key.startswith("optimizer.")):
                usual["optimizer"][key.split(".")[1]] = getattr(plain, key.split(".")[1])
            usual["optimizer"]["args"] = {}
            for key, value in defaults_of(str(own.optimizer["type"])).items():
                usual[key.split(".")[0]][key.split(".")[1]] = value
        tables: dict[str, Any] = {
            table: lay(getattr(self, table), {**usual[table], **getattr(own, table)}) for table in ROLE_TABLES
        }
        if own.max_grad_norm is not None:
            tables["train"] = self.train.model_copy(update={"max_grad_norm": own.max_grad_norm})
        return self.model_copy(update=tables)

    @property
    def frozen(self) -> list[str]:
        """Roles that stay as they are."""
        return self.get("roles.freeze") or []

    def experts_of(self, dataset: DatasetConfig) -> ExpertsSection:
        """[experts] as it applies to the images of a data set."""
        return self.experts.model_copy(update=dict(dataset.experts))

    def dataset_groups(self) -> list[list[int]]:
        """Numbers of the datasets, those with the same [experts] together."""
        groups: dict[str, list[int]] = {}
        for number, dataset in enumerate(self._datasets):
            groups.setdefault(self.experts_of(dataset).model_dump_json(), []).append(number)
        return list(groups.values())

    def limited_to(self, numbers: Sequence[int]) -> "RunConfig":
        """The run over one of `dataset_groups`, with the [experts] of those datasets."""
        datasets = [self._datasets[number] for number in numbers]
        return self.model_copy(update={"experts": self.experts_of(datasets[0])}).over(datasets)

    def over(self, datasets: Sequence[DatasetConfig]) -> "RunConfig":
        """The same settings over other data sets."""
        found = self.model_copy()
        found._datasets = list(datasets)
        return found

    def set_keys(self) -> list[str]:
        """Keys that a person set, in the file or on the command line."""
        return [key for key, origin in self._origins.items() if origin in ("file", "cli")]

    def get(self, key: str) -> Any:
        """Value of a dotted key, also inside a table such as model.geometry; None if it is absent, or no setting of the family."""
        found: Any = self
        for name in key.split("."):
            found = found.get(name) if isinstance(found, Mapping) else getattr(found, _ATTRIBUTES.get(name, name), None)
        return found

    @property
    def sd15(self) -> Sd15Teachers:
        """[experts] of a family that has teachers."""
        assert isinstance(self.experts, Sd15Teachers)
        return self.experts

    @property
    def clip_and_t5(self) -> ClipAndT5:
        """[model] of a family with these text encoders."""
        assert isinstance(self.model, ClipAndT5)
        return self.model

    def require(self, architecture: str | None) -> None:
        """Refuse a run of another family; None accepts all.

        Raises:
            ConfigError: naming both families.
        """
        if architecture is not None and MODELS[architecture].code != self.spec.code:
            raise ConfigError(
                f"{self._path}: model.arch is {self.spec.full_name}, this command is for {MODELS[architecture].full_name}"
            )

    def locate(self, text: str) -> Path:
        """A path of the file, found as `paths.locate` says."""
        return locate(text, self._path)

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return expand(self.run.output_dir)

    @property
    def log_folder(self) -> Path:
        """Where its events go."""
        if self.log.dir is None:
            return self.output_dir / "logs"
        return expand(self.log.dir) / f"{self.log.prefix}{self.run.name}"


@cache
def config_class(code: str) -> type[RunConfig]:
    """The class of run files of a family, with the tables that it has for itself."""
    tables: dict[str, Any] = {
        name: (cls, ... if RunFile.model_fields[name].is_required() else Field(default_factory=cls))
        for name, cls in MODELS[code].sections.items()
    }
    return create_model("RunConfig", __base__=RunConfig, **tables)
