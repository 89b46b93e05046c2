"""What the plan of a large data set opens: each file once, each folder a few times, whatever their number."""

from collections import Counter
from typing import Any

import pytest

from musubi_tuner.planning.plan import make_plan
from opened_files import opened_below

COUNT = 60
KINDS = ("_te.safetensors", "_experts.safetensors", ".safetensors", ".png", ".txt")


@pytest.mark.long
def test_the_plan_opens_each_file_once(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(COUNT):
        project.picture(f"{number:03d}", (64, 64))
    for kind in ("latents", "text", "experts"):
        assert project.run(kind) == 0
    monkeypatch.chdir(project.root)
    with opened_below(project.root.resolve()) as opened:
        plan = make_plan(project.config(), 1, download=False, only_look=True)
    assert not plan.due and len(plan.trained) == COUNT
    kinds = Counter[str]()
    for name, count in opened.items():
        kinds[next((kind for kind in KINDS if name.endswith(kind)), "")] += count
    assert {kind: kinds[kind] for kind in KINDS} == dict.fromkeys(KINDS, COUNT)
    assert opened["os.scandir"] + opened["os.listdir"] < 12
