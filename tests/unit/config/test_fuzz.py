"""Mutated run files: whatever a file says, the answer is a config or our own error, and each finding names a key of the file."""

import copy
import os
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.config import load_document
from musubi_tuner.config.diagnostics import InvalidConfig
from musubi_tuner.config.foreign import FOREIGN
from musubi_tuner.config.schema import item_parameters, parameters
from musubi_tuner.errors import ConfigError

ROOT = Path(__file__).parents[3]
FILES = [
    tomllib.loads((ROOT / "toml" / f"{name}.toml").read_text(encoding="utf-8"))
    for name in ("tinyflux", "tinyflux_lora", "flux_dev")
]
NAMES = [
    *(parameter.name for parameter in (*parameters(), *item_parameters())),
    *(name for name in FOREIGN if "." not in name),
]
VALUES: list[Any] = [0, 1, -1, 3, 2**40, 0.5, -0.1, 1e30, float("nan"), float("inf"), True, False, "", "auto", "none", "a/b", "\x00", [], [1], ["x"],
                     {}, {"a": 1}, [{}], None]  # fmt: skip


def mutated(source: random.Random) -> dict[str, Any]:
    """A good file with one to four keys added, changed, removed or misspelt."""
    document = copy.deepcopy(source.choice(FILES))
    document.pop("dataset_config", None)
    document["datasets"] = [{"image_directory": "images"}]
    for _ in range(source.randint(1, 4)):
        tables = [key for key, value in document.items() if isinstance(value, dict)]
        table = document[source.choice(tables)] if tables else document
        kind = source.randrange(6)
        if kind == 0 and table:
            table.pop(source.choice(list(table)))
        elif kind == 1 and table:
            table[source.choice(list(table))] = copy.deepcopy(source.choice(VALUES))
        elif kind == 2 and table:
            name = source.choice(list(table))
            at = source.randrange(len(name))
            table[name[:at] + source.choice("abcxyz_") + name[at + 1 :]] = table.pop(name)
        elif kind == 3:
            table[source.choice(NAMES)] = copy.deepcopy(source.choice(VALUES))
        elif kind == 4:
            document[source.choice([*document, *NAMES])] = copy.deepcopy(source.choice(VALUES))
        else:
            own = (
                document["datasets"][0]
                if isinstance(document.get("datasets"), list) and document["datasets"]
                else document
            )
            own[source.choice(NAMES)] = copy.deepcopy(source.choice(VALUES))
    return document


def keys_of(document: Any, before: str = "") -> set[str]:
    """Dotted keys of a document, tables too."""
    found = set()
    for key, value in document.items() if isinstance(document, dict) else ():
        found |= {f"{before}{key}", *keys_of(value, f"{before}{key}.")}
        for number, entry in enumerate(value if isinstance(value, list) else ()):
            found |= {f"{before}{key}[{number}]", *keys_of(entry, f"{before}{key}[{number}].")}
    return found


def check(document: dict[str, Any], known: set[str]) -> None:
    try:
        findings = load_document(document).findings
    except InvalidConfig as problem:
        findings = problem.findings
        assert any(found.level == "error" for found in findings)
    except ConfigError as problem:
        assert "is not a run file" in str(problem) or "has steps" in str(problem), problem
        return
    written = keys_of(document)
    sets = document["datasets"] if isinstance(document.get("datasets"), list) else []
    written |= {f"{entry['name']}." for entry in sets if isinstance(entry, dict) and isinstance(entry.get("name"), str)}
    for found in findings:
        assert found.code and found.reason, found
        names = {key for key in found.keys if key}
        near = {
            key
            for key in names
            if key in written or key in known or key.partition("[")[0] in ("datasets", "steps", "use", "start")
        }
        assert not names or near or any(key.startswith(tuple(written)) for key in names), found


def run(count: int, seed: int, folder: Path) -> None:
    os.chdir(folder)
    source = random.Random(seed)
    known = {parameter.key for parameter in (*parameters(), *item_parameters())} | {
        parameter.section for parameter in parameters()
    }
    for number in range(count):
        document = mutated(source)
        try:
            check(document, known)
        except Exception:
            print(f"mutation {number}: {document}")
            raise


@pytest.mark.long
def test_six_hundred_mutated_files_end_in_our_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(600, 0, tmp_path)


@pytest.mark.slow
def test_twenty_thousand_mutated_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(20_000, 1, tmp_path)
