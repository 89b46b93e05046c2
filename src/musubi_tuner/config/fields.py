"""What a setting is made of: `param` declares one, `Section` is a table of them, `Parameter` is one as all readers see it."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from musubi_tuner.config.when import When

Dtype = Literal["float32", "bfloat16", "float16"]
AutoDtype = Literal["auto", "float32", "bfloat16", "float16"]

TABS = ("setup", "dataset", "adapter", "learning rate", "advanced", "saving", "logging")
"""Pages of a form, in order; every setting is on one."""
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of",
          "min_length": "length at least", "max_length": "length at most"}  # fmt: skip
"""Constraints of a field, in words."""

MOST = 10**9
"""Limit of counts that have no other; a number with more digits is a slip, and arithmetic with it would fail."""


def param(
    default: Any,
    help: str,
    *,
    flat: tuple[str, ...] = (),
    resume: Literal["fixed", "free"] = "fixed",
    secret: bool = False,
    path: bool = False,
    unit: str = "",
    label: str = "",
    tab: str = "",
    expert: bool = False,
    step: float | None = None,
    neutral: Any = ...,
    when: When | None = None,
    rule: str = "",
    accepts: str = "",
    as_share: str = "",
    **constraints: Any,
) -> Any:
    """One setting: its default (``...`` = required), its sentence, and pydantic constraints such as ge and le.

    Args:
        flat: other names of it, accepted as options and in files. resume: "free" may change between starts of one run.
        secret: never printed, stored or logged. path: a file or folder.
        unit: what a number counts. label: words for a form; "" = its name. tab: one of `TABS`; "" = that of its table.
        expert: a form shows it on demand. step: by which a form changes a number.
        neutral: value that means "off"; ``...`` = false, absent, or 0 where it may be 0.
        when: condition under which it has an effect. rule: code of the warning if it does not hold; "" = the usual one.
        accepts: what a pattern asks for, in words that follow "of".
        as_share: a count may also be written as a share, 0.05 or "5%", which stands for this setting; see `share_of`.
    """
    extra: Any = {
        "flat": list(flat), "resume": resume, "secret": secret, "path": path, "unit": unit, "label": label, "tab": tab,
        "expert": expert, "step": step, "neutral": neutral, "when": when, "rule": rule, "accepts": accepts, "as_share": as_share,
    }  # fmt: skip
    return Field(default, description=help, json_schema_extra=extra, repr=not secret, **constraints)


SHARE = r"^\s*(\d{1,2}(\.\d*)?|\.\d+)\s*%\s*$"
"""A share as a text: a percentage below 100."""


def share_of(value: Any) -> float | None:
    """The share that a number below 1 or a text such as "5%" stands for; None if a value is something else."""
    if isinstance(value, str) and re.match(SHARE, value, re.ASCII):
        return float(f"{value.strip().rstrip('%').strip()}e-2")  # 7% is 0.07, and 7 / 100 may round to another number
    if isinstance(value, float) and 0 <= value < 1:
        return value
    return None


class Section(BaseModel):
    """Base of all tables: immutable, no unknown keys, no silent conversion between types.

    Attributes:
        tab: page of a form on which its settings are. expert: they are shown on demand.
        acts_when: condition under which its settings have an effect, except those in the condition.
    """

    # Built when first used: help and most commands need a few tables at most.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)
    tab: ClassVar[str] = "advanced"
    expert: ClassVar[bool] = False
    acts_when: ClassVar[When | None] = None

    @field_validator("*")
    @classmethod
    def _named(cls, value: Any, info: ValidationInfo) -> Any:
        """No path is empty, which would be the current folder, or has a NUL character, which no file system takes."""
        extra = cls.model_fields[info.field_name or ""].json_schema_extra
        if isinstance(value, str) and (not value or "\0" in value) and isinstance(extra, dict) and extra["path"]:
            raise ValueError("expected a path")
        return value


@dataclass(frozen=True)
class Parameter:
    """One setting, as the generators of help, flags, forms and documentation see it."""

    section: str
    name: str
    field: FieldInfo
    table: type[Section] = Section

    @cached_property
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
    def label(self) -> str:
        """Words for a form."""
        words = self.name.replace("_", " ")
        return self.extra("label") or words[:1].upper() + words[1:]

    @property
    def tab(self) -> str:
        """Page of a form."""
        return self.extra("tab") or self.table.tab

    @property
    def expert(self) -> bool:
        """Whether a form shows it on demand."""
        return self.extra("expert") or self.table.expert

    @property
    def when(self) -> When | None:
        """Condition under which it has an effect: its own and that of its table; None = always."""
        own, whole = self.extra("when"), self.table.acts_when
        if whole is None or self.key in whole.about():
            return own
        return whole if own is None else whole & own

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.field.is_required()

    @property
    def default(self) -> Any:
        """Its default in the shared schema; families may have another."""
        return self.field.get_default(call_default_factory=True)

    @property
    def kinds(self) -> set[Any]:
        """Types that it may have."""
        return {self.field.annotation, *get_args(self.field.annotation)}

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values that it may have; empty = not a choice."""
        for kind in (self.field.annotation, *get_args(self.field.annotation)):
            if get_origin(kind) is Literal:
                return get_args(kind)
        return ()

    def limit(self, name: str) -> Any:
        """A constraint by its name in pydantic; None if there is none."""
        return next((value for each in self.field.metadata if (value := getattr(each, name, None)) is not None), None)

    @property
    def neutral(self) -> tuple[Any, ...]:
        """Values that mean "off", the first of which a file can hold; empty = it cannot be off."""
        said = self.extra("neutral")
        if said is not ...:
            return (said,)
        if bool in self.kinds and type(None) not in self.kinds:
            return (False,)
        number = bool({int, float} & self.kinds) and bool not in self.kinds
        zero = (0,) if number and self.limit("gt") is None and (self.limit("ge") in (None, 0)) else ()
        nothing = (None,) if type(None) in self.kinds else ()
        return (*zero, *nothing, *(("none",) if "none" in self.choices else ()))

    def is_neutral(self, value: Any) -> bool:
        """Whether a value means "off"."""
        return any(
            value is each or (value == each and isinstance(value, bool) == isinstance(each, bool))
            for each in self.neutral
        )

    @property
    def type_name(self) -> str:
        """Type as a person would write it: "int", "one of a, b", "list of float"."""
        return _type_name(self.field.annotation)

    @property
    def written_as(self) -> str:
        """Its type with the other form that it may be written in."""
        return self.type_name + (" or share" if self.extra("as_share") else "")

    @property
    def expected(self) -> str:
        """What a value must be, in words, with its limits."""
        words = {"int": "a whole number", "float": "a number", "text": "a text"}.get(self.type_name, self.type_name)
        limits = [f"{text} {limit}" for name, text in LIMITS.items() if (limit := self.limit(name)) is not None]
        if words == "a text":
            limits = [f"of {self.extra('accepts')}"] if self.limit("pattern") is not None else []
        share = ', or a share such as 0.05 or "5%"' if self.extra("as_share") else ""
        return f"{words} {' and '.join(limits)}".strip() + share


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
