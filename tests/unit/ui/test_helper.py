"""What the page asks of a process that has torch."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.config import load_document
from musubi_tuner.errors import ConfigError
from musubi_tuner.planning.noise_density import noise_density
from musubi_tuner.ui.helper import Helper
from musubi_tuner.ui.helper_process import needs_of
from musubi_tuner.ui.runs import environment

RUN: dict[str, Any] = {
    "run": {"name": "a", "output_dir": "out"},
    "model": {"arch": "fd", "path": "none.safetensors"},
    "adapter": {"type": "lora"},
    "train": {"max_steps": 5},
    "general": {"resolution": 256},
    "datasets": [{"image_directory": "."}],
}


@pytest.fixture
def helper(tmp_path: Path) -> Iterator[Helper]:
    found = Helper(tmp_path, environment(os.environ))
    yield found
    found.end()


def test_it_stays_answers_in_order_and_comes_back_when_it_has_died(helper: Helper, tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text('[run]\nname = "a"\n')
    first = helper.ask("plan", path="wrong.toml")
    assert first["code"] == 2 and "output_dir" in first["text"] and first["needs"] == []
    begun = time.monotonic()
    assert helper.ask("plan", path="wrong.toml") == first
    assert time.monotonic() - begun < 5  # it was there
    with pytest.raises(ConfigError, match="run file"):
        helper.ask("noise", document={}, step=0)
    assert helper._process is not None
    helper._process.kill()
    helper._process.wait()
    assert helper.ask("plan", path="wrong.toml") == first


def test_lines_on_what_a_run_needs_go_with_what_follows_them() -> None:
    text = "a: TinyFlux\n  data     5 images\n           more\n  memory   about 1 GiB\n           and 2 MiB\n  disk     3 GiB\nwarning: only 1 B\n  save     x"
    assert needs_of(text) == ["memory   about 1 GiB; and 2 MiB", "disk     3 GiB", "warning: only 1 B"]


@pytest.mark.parametrize(
    ("objective", "mean"),
    [({"timestep_sampling": "uniform"}, 0.5), ({"timestep_sampling": "shift", "discrete_flow_shift": 9.0}, 0.866)],
)
def test_noise_levels_are_those_of_the_process(
    objective: dict[str, Any], mean: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("musubi_tuner.config.load.validate", lambda *_: [])
    config = load_document({**RUN, "objective": objective})
    outline = type("Outline", (), {"options": {}})
    monkeypatch.setattr(config.spec.family, "outline_model", lambda _: outline)
    shares = noise_density(config, (256, 256), 100)
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert sum((place + 0.5) / 100 * share for place, share in enumerate(shares)) == pytest.approx(mean, abs=0.005)
