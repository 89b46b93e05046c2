"""What a setting is made of: `param` declares one, `Section` is a table of them, `Parameter` is one as help and docs see it."""

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Dtype = Literal["float32", "bfloat16", "float16"]
AutoDtype = Literal["auto", "float32", "bfloat16", "float16"]


def param(
    default: Any,
    help: str,
    *,
    flat: tuple[str, ...] = (),
    resume: Literal["fixed", "free"] = "fixed",
    secret: bool = False,
    path: bool = False,
    **constraints: Any,
) -> Any:
    """One setting: its default (``...`` = required), its sentence, and pydantic constraints such as ge and le."""
    extra: Any = {"flat": list(flat), "resume": resume, "secret": secret, "path": path}
    return Field(default, description=help, json_schema_extra=extra, repr=not secret, **constraints)


class Section(BaseModel):
    """Base of all tables: immutable, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class Parameter:
    """One setting, as the generators of help, flags and documentation see it."""

    section: str
    name: str
    field: FieldInfo

    @property
    def key(self) -> str:
        """Dotted TOML path."""
        return f"{self.section}.{self.name}" if self.section else self.name

    def extra(self, name: str) -> Any:
        """A fact given to `param`."""
        assert isinstance(self.field.json_schema_extra, dict)
        return self.field.json_schema_extra[name]

    @property
    def help(self) -> str:
        """Its sentence."""
        return self.field.description or ""

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.field.is_required()

    @property
    def type_name(self) -> str:
        """Type as a person would write it: "int", "one of a, b", "list of float"."""
        return _type_name(self.field.annotation)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        choices = ", ".join(str(choice) for choice in get_args(annotation))
        return f"one of {choices}" if len(get_args(annotation)) > 1 else choices
    if get_origin(annotation) is list:
        item = get_args(annotation)[0]
        return "list of " + ("tables" if isinstance(item, type) and issubclass(item, Section) else _type_name(item))
    if get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, Section)):
        return "table"
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if parts:
        return " or ".join(_type_name(part) for part in parts)
    return {"str": "text", "bool": "true or false"}.get(annotation.__name__, annotation.__name__)
