"""Every line of docs/python.md, run in its order in one program."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from project import REPOSITORY, clean_environment, copy_tree, write_run


def test_the_page_runs_as_it_stands(
    tmp_path: Path, photographs: Path, encoders: Path, caches: Path, home: Path
) -> None:
    copy_tree(caches, tmp_path / "cache")
    tables = {
        "save": {"release": True, "state": True},
        "train": {"max_steps": 9},
        "sample": {"width": 64, "height": 64},
    }
    config = write_run(tmp_path, photographs, encoders, **tables)
    assert config.name == "run.toml"
    blocks = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(blocks) > 4
    (tmp_path / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=clean_environment(home), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "['photos.safetensors', 'photos_ema.safetensors']" in said
    assert "(64, 64, 3) uint8" in said
    assert any(re.fullmatch(r"4 \d+", line) for line in said)  # the step, and the width
    assert "torch.Size([2, 64, 16])" in said
    assert torch.load(tmp_path / "step_4.pt", weights_only=True)["step"] == 4
