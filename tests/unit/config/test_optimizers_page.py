"""docs/optimizers.md has the optimizers as their records have them, and snippets that load."""

import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from musubi_tuner.config import RunConfig
from musubi_tuner.optimizers import OPTIMIZERS, Argument, Optimizer, having, named, state_bytes

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SIDE = 1024
"""Of the matrix whose state the page shows."""


def number(value: float) -> str:
    if not 0 < abs(value) < 0.01:
        return f"{value:g}"
    digits, _, exponent = f"{value:e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def row(name: str, record: Optimizer) -> str:
    """Its line in the table of optimizers."""
    lr = number(record.defaults.get("optimizer.lr", 1e-4))
    size = number(round(state_bytes(name, {(SIDE, SIDE): 1}) / SIDE**2, 2))
    package = f"{record.package} (`{record.extra}`)" if record.extra else record.package
    others = ", ".join(f"`{each}`" for each in record.elsewhere if each)
    cells = [f"`{name}`{'*' if record.alone else ''}", record.about, package, lr, size, others]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def argument(name: str, each: Argument) -> str:
    """``name = default (limits)``."""
    if each.choices:
        return f'`{name} = "{each.default}"` (or {", ".join(c for c in each.choices if c != each.default)})'
    limits = re.sub(r"^(a whole number|a number|true or false|list of \d numbers) ?", "", each.expected)
    default = "absent" if each.default is None else f"`{name} = {toml(each.default)}`"
    shown = f"`{name}` absent" if each.default is None else default
    return f"{shown} ({limits})" if limits else shown


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(number(each) for each in value)}]"
    return "inf" if value == math.inf else number(value)


def argument_rows() -> list[str]:
    """Lines of the table of arguments; optimizers with the same ones share a line."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for name, record in OPTIMIZERS.items():
        betas = record.defaults.get("optimizer.betas")
        own = [f"`betas` = {toml(betas)}"] if betas else []
        own += ["one beta, the first of `betas`"] if record.betas == "momentum" else []
        own += [] if record.betas else ["no `betas`"]
        own += [] if record.eps else ["no `eps`"]
        own += [f"`eps` = {number(eps)}"] if (eps := record.defaults.get("optimizer.eps")) else []
        own += ["`weight_decay` = 0"] if record.defaults.get("optimizer.weight_decay") == 0 else []
        found = ", ".join(argument(key, each) for key, each in record.arguments.items())
        shared.setdefault((found, ", ".join(own)), []).append(f"`{name}`")
    return [f"| {', '.join(names)} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")
            for cells, names in shared.items()]  # fmt: skip


def table(heading: str) -> list[str]:
    """Rows of the table whose first column has a heading."""
    (found,) = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return str(found).splitlines()


def test_the_table_of_optimizers_is_that_of_the_records() -> None:
    assert table("`type`") == [row(name, record) for name, record in OPTIMIZERS.items()]


def test_the_table_of_arguments_is_that_of_the_records() -> None:
    assert table("optimizers") == argument_rows()


def test_names_in_the_text_are_names_of_optimizers() -> None:
    text = PAGE[: PAGE.index("| `type` |")]
    found = set(re.findall(r"`([A-Z]\w+)`", text))
    assert len(found) > 6 and {name for name in found if named(name) != name} == set()


def test_snippets_load_without_a_remark(load: Callable[..., RunConfig]) -> None:
    assert len(SNIPPETS) >= 4
    for snippet in SNIPPETS:
        tables = dict(re.findall(r"^\[(\w+)\]\n((?:[^\[\n].*\n)+)", snippet, re.MULTILINE))
        assert tables.keys() == tomllib.loads(snippet).keys()
        assert load(**tables).findings == [], snippet


def test_optimizers_that_are_stepped_one_parameter_at_a_time_are_marked() -> None:
    marked = {line.split("`")[1] for line in table("`type`") if "`*" in line}
    assert marked == set(having(lambda record: record.alone))
