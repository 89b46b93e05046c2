"""The list of what TinyFlux must do (tests/acceptance.toml) is complete, and every test that it names exists."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
ENTRIES: dict[str, Any] = tomllib.loads((TESTS / "acceptance.toml").read_text(encoding="utf-8"))

ROWS = 94
"""Rows of the users' checklist: 64 of its table, 15 of v4.2, 9 to be converted, 3 facts of data sets, 3 that were missing."""
DEFECTS = {"A": 13, "B": 5, "C": 12, "D": 15, "E": 10, "F": 11, "G": 11, "H": 7}
"""Defects of the published code by group: model, flow, caches, trainer, experts, checkpoints, LoRA, sampling."""
LEFT_OUT = {26}
"""A row about a method that nothing called: averages by a pattern of keys taken from the model."""
IDS = [f"R{number:02d}" for number in range(1, ROWS + 1) if number not in LEFT_OUT] + [
    f"{group}{number}" for group, count in DEFECTS.items() for number in range(1, count + 1)
]


@cache
def defined_tests(file: str) -> set[str]:
    """Tests of a file, ``name`` or ``Class::name``."""
    found: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str = "") -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                collect(node.body, f"{node.name}::")
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.add(prefix + node.name)

    collect(ast.parse((TESTS / file).read_text(encoding="utf-8")).body)
    return found


def problem_of(test: str) -> str | None:
    """What is wrong with the name of a test; None if it exists."""
    match = re.fullmatch(r"((?:unit|golden|e2e)/[\w/]+\.py)::([\w:]+)", test)
    if match is None:
        return "is no test function of the default suite"
    file, name = match.groups()
    if not (TESTS / file).is_file():
        return "is in a file that does not exist"
    return None if name in defined_tests(file) else "does not exist"


def test_every_row_and_defect_is_listed_in_order() -> None:
    assert list(ENTRIES) == IDS
    assert len(IDS) == 93 + 84


def test_every_entry_says_what_is_wanted() -> None:
    assert [name for name, entry in ENTRIES.items() if set(entry) != {"wanted", "tests"}] == []
    # One sentence on one line.
    assert [name for name, entry in ENTRIES.items() if not re.fullmatch(r"\S.{9,118}\.", entry["wanted"])] == []


def test_every_entry_names_tests_and_they_exist() -> None:
    assert [name for name, entry in ENTRIES.items() if not entry["tests"]] == []
    assert [name for name, entry in ENTRIES.items() if len(set(entry["tests"])) < len(entry["tests"])] == []
    named = [(name, test) for name, entry in ENTRIES.items() for test in entry["tests"]]
    assert [(name, test, problem) for name, test in named if (problem := problem_of(test))] == []


def test_every_promise_of_the_readme_names_a_test_that_exists() -> None:
    page = (TESTS.parent / "README.md").read_text(encoding="utf-8")
    table = page.partition("| Promise | Test that keeps it |")[2].partition("\n\n")[0]
    named = re.findall(r"`([^`]+)` \|", table)
    assert len(named) > 10
    assert [(test, problem) for test in named if (problem := problem_of(test))] == []


@pytest.mark.parametrize(
    ("test", "problem"),
    [
        ("unit/test_acceptance_list.py::test_every_entry_says_what_is_wanted", None),
        ("unit/caching/test_job.py::TestBatches::test_items_are_sorted_and_cut", None),
        ("unit/caching/test_job.py::test_items_are_sorted_and_cut", "does not exist"),
        ("unit/test_acceptance_list.py::test_nothing", "does not exist"),
        ("unit/test_acceptance_list.py::problem_of", "does not exist"),
        ("unit/test_nothing.py::test_nothing", "is in a file that does not exist"),
        ("slow/test_compile.py::test_unknown_backend", "is no test function of the default suite"),
        (
            "unit/test_acceptance_list.py::test_names_of_tests_are_checked[x]",
            "is no test function of the default suite",
        ),
        ("unit/test_acceptance_list.py", "is no test function of the default suite"),
    ],
)
def test_names_of_tests_are_checked(test: str, problem: str | None) -> None:
    assert problem_of(test) == problem
