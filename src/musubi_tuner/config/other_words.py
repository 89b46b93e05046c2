"""Values that may be written in another way than they are kept: names of schedules, and counts as shares. Torch-free.

    scheduler.type = "wsd"            type = "warmup_stable_decay"
    scheduler.warmup_steps = "5%"     warmup_ratio = 0.05; warmup_steps = 0.05 too

They are replaced before anything else sees them, so that the same setting is the same wherever it is compared, stored or shown.
"""

from collections.abc import Iterator
from typing import Any

from musubi_tuner.config.diagnostics import Diagnostic, error, info
from musubi_tuner.config.fields import Parameter, share_of
from musubi_tuner.config.schema import parameters
from musubi_tuner.config.when import describe
from musubi_tuner.schedules import BY_NAME

Tables = dict[str, Any]


def plain_words(values: Tables, origins: dict[str, str], problems: list[Diagnostic]) -> None:
    """Replace such values of a run file, and of its roles, in place.

    Args:
        values: the tables. origins: dotted key -> where its value is from.
    """
    for prefix, tables in _places(values):
        _rename_schedule(prefix, tables.get("scheduler"), problems)
        for parameter in [parameter for parameter in parameters() if parameter.extra("as_share")]:
            taken = _take_share(prefix, tables.get(parameter.section), parameter, problems)
            origin = origins.pop(prefix + parameter.key, None) if taken else None
            if origin is not None:
                origins.setdefault(prefix + parameter.extra("as_share"), origin)


def _places(values: Tables) -> Iterator[tuple[str, Tables]]:
    """The tables of the run and of each role, with the prefix of their keys."""
    yield "", values
    roles = values.get("roles")
    for name, role in roles.items() if isinstance(roles, dict) else ():
        if isinstance(role, dict):
            yield f"roles.{name}.", role


def _rename_schedule(prefix: str, table: Any, problems: list[Diagnostic]) -> None:
    """Give a schedule that is called as in another trainer our name."""
    word = table.get("type") if isinstance(table, dict) else None
    name = BY_NAME.get(word.lower()) if isinstance(word, str) else None
    if name is not None and name != word:
        table["type"] = name
        problems.append(
            info("NA04", f"{prefix}scheduler.type", f'is read as "{name}", which {describe(word)} is called here')
        )


def _take_share(prefix: str, table: Any, parameter: Parameter, problems: list[Diagnostic]) -> bool:
    """Move a count that is written as a share to the setting of the share; whether there was one."""
    name = parameter.extra("as_share").rpartition(".")[2]
    share = share_of(table.get(parameter.name)) if isinstance(table, dict) else None
    if not share:
        if share is not None:
            table[parameter.name] = 0
        return False
    written, other = table.pop(parameter.name), table.get(name)
    if other and other != share:
        text = f"is {describe(written)}, but {name} = {describe(other)}; keep one"
        problems.append(error("V27", prefix + parameter.key, text, f"{prefix}{parameter.section}.{name}"))
    table[name] = share
    return True
