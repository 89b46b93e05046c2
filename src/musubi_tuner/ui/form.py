"""The settings as data for a form: every key once, in tabs, with what a control needs to know. Torch-free."""

from functools import cache
from types import UnionType
from typing import Any

from musubi_tuner.config.fields import TABS, Parameter, Section
from musubi_tuner.config.foreign import FOREIGN
from musubi_tuner.config.schema import flat_names, item_parameters, parameters
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import ModelSpec
from musubi_tuner.ui.answers import FamilyEntry, FormField, Kind, OwnWords, Schema, Tab

TITLES = ("Setup", "Dataset", "Adapter", "Learning rate", "Advanced", "Saving", "Logging")
"""Of the tabs, in their order."""
FAMILY = "model.arch"
"""Its choices are the families."""


def kind_of(parameter: Parameter) -> Kind:
    """Which control a setting has."""
    if parameter.key == FAMILY:
        return "choice"
    kinds = {kind for kind in parameter.kinds if kind is not type(None) and not isinstance(kind, UnionType)}
    tables = any(
        getattr(k, "__origin__", k) in (list, dict) or (isinstance(k, type) and issubclass(k, Section)) for k in kinds
    )
    numbers = {int, float} & {kind for kind in kinds if isinstance(kind, type)}
    if parameter.choices:
        return "value" if tables or numbers else "choice"  # a word, or something else
    if kinds == {bool}:
        return "switch"
    if tables or bool in kinds:
        return "value"  # written as TOML
    if int in kinds and str not in kinds and float not in kinds:
        return "whole"
    if float in kinds and str not in kinds:
        return "number"
    return "text" if kinds <= {str} else "value"


def choices_of(parameter: Parameter) -> list[Any]:
    """What a list offers."""
    if parameter.key == FAMILY:
        return list(MODELS)
    return [*parameter.choices, *((True, False) if parameter.choices and bool in parameter.kinds else ())]


def own_of(parameter: Parameter) -> OwnWords:
    """What a family may say otherwise of a setting."""
    return {"help": parameter.help, "choices": choices_of(parameter), "kind": kind_of(parameter)}


def plain(value: Any) -> Any:
    """A default as JSON."""
    if isinstance(value, Section):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


@cache
def form_fields() -> tuple[FormField, ...]:
    """All settings of all families, then those of data sets."""
    other: dict[str, list[str]] = {}
    for name, parameter in flat_names().items():
        other.setdefault(parameter.key, []).append(name)
    for name, entry in FOREIGN.items():
        if entry.key:
            other.setdefault(entry.key, []).append(name)
    own = {code: {parameter.key: parameter for parameter in parameters(MODELS[code])} for code in MODELS}
    found = []
    for parameter in (*parameters(), *item_parameters()):
        items = parameter.section in ("general", "datasets")
        low = next((limit for name in ("ge", "gt") if (limit := parameter.limit(name)) is not None), None)
        high = next((limit for name in ("le", "lt") if (limit := parameter.limit(name)) is not None), None)
        found.append(
            FormField(
                key=parameter.key,
                name=parameter.name,
                table=parameter.section,
                tab=parameter.tab,
                label=parameter.label,
                help=parameter.help,
                kind=kind_of(parameter),
                unit=parameter.extra("unit"),
                default=None if parameter.required else plain(parameter.default),
                required=parameter.required,
                expert=parameter.expert,
                secret=parameter.extra("secret"),
                path=parameter.extra("path"),
                choices=choices_of(parameter),
                low=low,
                high=high,
                step=parameter.extra("step"),
                names=sorted(set(other.get(parameter.key, [])) - {parameter.name}),
                families=list(MODELS) if items else [code for code in MODELS if parameter.key in own[code]],
                free=parameter.extra("resume") == "free",
                own={
                    code: own_of(settings[parameter.key])
                    for code, settings in own.items()
                    if parameter.key in settings and own_of(settings[parameter.key]) != own_of(parameter)
                },
            )
        )
    return tuple(found)


@cache
def schema() -> Schema:
    """Everything that the form is made of."""
    families: list[FamilyEntry] = [
        {
            "code": code,
            "full_name": spec.full_name,
            "title": spec.title,
            "defaults": defaults_of(code),
            "roles": roles_of(spec),
        }
        for code, spec in MODELS.items()
    ]
    tabs: list[Tab] = [{"name": name, "title": title} for name, title in zip(TABS, TITLES, strict=True)]
    return {"tabs": tabs, "fields": list(form_fields()), "families": families}


def roles_of(spec: ModelSpec) -> list[str]:
    """Modules of a family that have tables of their own in [roles]."""
    return [
        parameter.name for parameter in parameters(spec) if parameter.section == "roles" and parameter.name != "freeze"
    ]


def defaults_of(code: str) -> dict[str, Any]:
    """Defaults of a family, where they are not those of the shared schema."""
    spec = MODELS[code]
    return {**{key: plain(value) for key, value in spec.defaults.items()},
            **{f"general.{key}": plain(value) for key, value in spec.dataset_defaults.items()}}  # fmt: skip
