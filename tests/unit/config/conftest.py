"""A small project folder, and run files that differ from a good one in the lines a test names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.errors import ConfigError

GOOD = {
    "run": {"name": '"cat"', "output_dir": '"out"'},
    "model": {
        "arch": '"tf"',
        "path": '"model.safetensors"',
        "vae_path": '"vae.safetensors"',
        "clip_path": '"clip.safetensors"',
        "t5_path": '"t5.safetensors"',
    },
    "experts": {"unet": '"unet.safetensors"'},
    "train": {"max_steps": "2000"},
}
DATA = '[[datasets]]\nimage_directory = "images"\n'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: every file that the good run file names, and a folder of images."""
    for name in ("model", "vae", "clip", "t5", "unet"):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(project: Path) -> Callable[..., Path]:
    """Write a run file.

    Keywords: ``top`` lines before all tables, ``without`` dotted keys to leave out, ``data`` the dataset tables, and
    for every table the lines to write there; a line replaces the good file's line of the same key.
    """

    def writer(*, top: str = "", without: tuple[str, ...] = (), data: str = DATA, **tables: str) -> Path:
        text = ["schema_version = 1", top]
        for table in [*GOOD, *(name for name in tables if name not in GOOD)]:
            own = tables.get(table, "")
            written = {line.partition("=")[0].strip() for line in own.splitlines()}
            text.append(f"[{table}]")
            text += [
                f"{key} = {value}"
                for key, value in GOOD.get(table, {}).items()
                if key not in written and f"{table}.{key}" not in without
            ]
            text.append(own)
        path = project / "run.toml"
        path.write_text("\n".join([*text, data]), encoding="utf-8")
        return path

    return writer


@pytest.fixture
def load(write: Callable[..., Path]) -> Callable[..., RunConfig]:
    """Write a run file as `write` does, and load it with ``overrides``."""

    def loader(overrides: Mapping[str, Any] | None = None, **changes: Any) -> RunConfig:
        return load_config(write(**changes), overrides)

    return loader


@pytest.fixture
def problems(write: Callable[..., Path]) -> Callable[..., list[str]]:
    """Write a run file as `write` does, and return the problems that loading it reports, one text each."""

    def collect(overrides: Mapping[str, Any] | None = None, **changes: Any) -> list[str]:
        path = write(**changes)
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        head, *found = str(caught.value).split("\n  ")
        assert head == f"{path}: {len(found)} problem{'s' if len(found) > 1 else ''}"
        return found

    return collect


@pytest.fixture
def warnings_of(load: Callable[..., RunConfig]) -> Callable[..., list[str]]:
    """Write a run file as `write` does, and return what loading it warns of, one text each."""

    def collect(**changes: Any) -> list[str]:
        findings = load(**changes).findings
        assert {finding.level for finding in findings} <= {"warning"}
        return [str(finding) for finding in findings]

    return collect
