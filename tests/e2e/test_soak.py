"""A long run with everything switched on: its memory and its open files stay what they are."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from project import REPOSITORY, clean_environment, copy_tree, write_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


@pytest.mark.parametrize(
    ("updates", "growth"),
    [(1000, 3.0), pytest.param(20_000, 1.0, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
)
@pytest.mark.timeout(600)
def test_memory_and_open_files_stay(
    updates: int, growth: float, tmp_path: Path, photographs: Path, encoders: Path, caches: Path, home: Path
) -> None:
    """growth: MiB of anonymous memory that 1,000 updates may add after the first third; what the allocator keeps comes and goes."""
    copy_tree(caches, tmp_path / "cache")
    tables = {
        "train": {"max_steps": updates, "mixed_precision": "no"},
        "save": {"every_steps": 100, "every_epochs": 0, "keep_last_steps": 2, "keep_last_states": 2, "best": True},
        "sample": {"prompts": ["a cup of coffee"], "every_steps": 100, "steps": 2, "width": 64, "height": 64},
        "validation": {"split": 0.2, "every_steps": 50},
        "log": {"every_steps": 5, "tensorboard": True},
        "general": {"resolution": 64, "batch_size": 2},
    }
    config = write_run(tmp_path, photographs, encoders, **tables)
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(
            [sys.executable, REPOSITORY / "train.py", config],
            cwd=tmp_path,
            env=clean_environment(home),
            stdout=log,
            stderr=log,
        )
    seen: list[tuple[int, float, int]] = []  # update, MiB, open files
    lines = tmp_path / "out" / "metrics.jsonl"
    while run.poll() is None:
        time.sleep(0.25)
        try:
            status = Path(f"/proc/{run.pid}/status").read_text()
            files = len(list(Path(f"/proc/{run.pid}/fd").iterdir()))
            done = lines.read_bytes().count(b"\n") * 5 if lines.exists() else 0
        except OSError:
            continue
        memory = next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0.0)
        if done and memory:
            seen.append((done, memory, files))
    assert run.returncode == 0, (tmp_path / "log").read_text()[-2000:]
    rest = [row for row in seen if row[0] > updates / 3]
    assert len(rest) > 10
    steps, memory, files = (np.array(column, float) for column in zip(*rest, strict=True))
    slope = 1000 * np.polyfit(steps, memory, 1)[0]
    seconds = np.array(
        [row["clock"]["step_seconds"] for row in map(json.loads, lines.read_text().splitlines()) if "loss/total" in row]
    )
    first, last = (np.median(part) for part in np.array_split(seconds, 3)[1:])
    print(
        f"{updates} updates: memory {memory.min():.0f} to {memory.max():.0f} MiB, {slope:+.2f} MiB per 1,000 updates; "
        f"open files {files.min():.0f} to {files.max():.0f}; an update {first:.4f} s, then {last:.4f} s"
    )
    assert slope < growth
    assert files[-len(files) // 3 :].max() <= files[: len(files) // 3].max() + 2
