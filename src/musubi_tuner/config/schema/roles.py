"""[roles]: how modules that train on their own differ from the tables of the run."""

from typing import Any, Literal

from pydantic import create_model

from musubi_tuner.config.fields import Section, param


class RoleSection(Section):
    """How one role is trained: keys that override the tables of the same name."""

    optimizer: dict[str, Any] = param({}, "Keys of [optimizer] that differ.")
    scheduler: dict[str, Any] = param({}, "Keys of [scheduler] that differ.")
    ema: dict[str, Any] = param({}, "Keys of [ema] that differ.")
    max_grad_norm: float | None = param(None, "As train.max_grad_norm.", ge=0)


class RolesSection(Section):
    """[roles] of a family with one role: empty."""

    tab = "learning rate"
    expert = True


def roles_section(*names: str) -> type[RolesSection]:
    """[roles] of a family whose modules train on their own, under these names."""
    text = "Keys of [optimizer], [scheduler] and [ema], and max_grad_norm, that differ for this role."
    tables: Any = {name: (RoleSection, param(RoleSection(), text)) for name in names}
    kept = param([], "Roles that are not trained.")
    doc = (
        "How each role is trained: [roles.<role>.optimizer], .scheduler and .ema override the tables of the same name."
    )
    role: Any = Literal[names]
    return create_model("RolesSection", __base__=RolesSection, __doc__=doc, freeze=(list[role], kept), **tables)
