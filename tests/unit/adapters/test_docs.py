"""docs/adapters.md says of the types what their records say."""

from pathlib import Path

import pytest

from benchmark_programs import load_benchmark
from musubi_tuner.adapter_types import ADAPTERS, NORM

PAGE = Path(__file__).parents[3] / "docs" / "adapters.md"


def code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def row(*cells: str) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != NORM])
def test_a_type_is_described_as_its_record_says(name: str) -> None:
    record = ADAPTERS[name]
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    formula = record.formula.replace("|", r"\|")
    assert row(f"`{name}`", record.about, formula, code(record.uses), code(record.elsewhere)) in lines
    written = ADAPTERS[record.written_as or name]
    parts = f"as `{record.written_as}`" if record.written_as else code(record.leaves)
    assert any(line.startswith(row(f"`{name}`", f"`{written.prefix}`", parts)) for line in lines)


def test_norms_are_described_as_their_record_says() -> None:
    record = ADAPTERS[NORM]
    assert row("`train_norm`", f"`{record.prefix}`", code(record.leaves)) in PAGE.read_text(encoding="utf-8")


@pytest.mark.long
def test_numbers_of_parameters_are_those_of_the_published_models() -> None:
    assert load_benchmark("adapter_types").sizes() in PAGE.read_text(encoding="utf-8")
