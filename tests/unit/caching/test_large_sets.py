"""What the plan of a large data set opens: each file once, each folder a few times, whatever their number."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.planning.plan import make_plan

COUNT = 60
opened: Counter[str] = Counter()
watched: list[str] = []


def hear(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, which cannot be removed again."""
    if watched and event in ("open", "os.scandir", "os.listdir") and isinstance(arguments[0], str | os.PathLike):
        path = str(Path(os.fspath(arguments[0])).absolute())
        if path.startswith(watched[0]):
            name = Path(path).name
            kind = next(
                (
                    end
                    for end in ("_te.safetensors", "_experts.safetensors", ".safetensors", ".png", ".txt")
                    if name.endswith(end)
                ),
                "",
            )
            opened[kind if event == "open" else event] += 1


@pytest.mark.long
def test_the_plan_opens_each_file_once(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(COUNT):
        project.picture(f"{number:03d}", (64, 64))
    for kind in ("latents", "text", "experts"):
        assert project.run(kind) == 0
    sys.addaudithook(hear)
    watched.append(str(project.root.resolve()))
    try:
        monkeypatch.chdir(project.root)
        plan = make_plan(project.config(), 1, download=False, only_look=True)
    finally:
        watched.clear()
    assert not plan.due and len(plan.trained) == COUNT
    kinds = ("_te.safetensors", "_experts.safetensors", ".safetensors", ".png", ".txt")
    assert {kind: opened[kind] for kind in kinds} == dict.fromkeys(kinds, COUNT)
    assert opened["os.scandir"] + opened["os.listdir"] < 12
