"""The page in Chromium: runs that it starts, that a terminal starts, that wait in its queue, and that are compared."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from chromium import Page, api, opened_page, silent, write
from PIL import Image
from project import CAPTIONS, REPOSITORY, metrics, run_tables

__all__ = ["opened_page", "silent"]
pytestmark = pytest.mark.timeout(600)
Process = subprocess.Popen[bytes]
Start = Callable[..., Process]

GEOMETRY = {"vae_dim": 8, "downscales": 2, "attn_layers": 1, "attn_heads": 4, "down_kernel": 4, "up_kernel": 4, "mix_kernel": 3,
            "head_widths": [16, 8]}  # fmt: skip
"""Of an autoencoder that makes tens of updates a second."""
SLOW = 240_000
"""Milliseconds that a command may take beside other work."""
POINTS = 1_000_000
SPIKE = (654_321, 1000.0)


def autoencoder(name: str, pictures: str, updates: int) -> dict[str, Any]:
    """The run file of a tiny autoencoder; its paths are relative."""
    return {
        "run": {"name": name, "output_dir": f"data/{name}", "threads": 1, "device": "cpu"},
        "model": {"arch": "ff", "init": "scratch", "bert_tokenizer": "words", "geometry": GEOMETRY},
        "objective": {"train_vae": True},
        "general": {"resolution": 32, "batch_size": 2},
        "datasets": [{"image_directory": pictures}],
        "train": {"max_steps": updates, "mixed_precision": "no"},
        "scheduler": {"type": "constant", "warmup_steps": 0},
        "save": {"every_epochs": 0, "release": False},
        "log": {"every_steps": 1, "tensorboard": False},
    }


def draw(folder: Path) -> None:
    """Four tiny pictures with captions."""
    folder.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 90, 30)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")


def wait(is_so: Callable[[], bool], seconds: float = 240.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def updates(folder: Path) -> list[int]:
    """Numbers of the updates in a run's metrics, in the order of its lines."""
    return [row["step"] for row in metrics(folder)] if (folder / "metrics.jsonl").is_file() else []


def values(path: Path) -> dict[str, Any]:
    """A small file of a run's record."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def badge(tab: Any) -> Any:
    """The state of the run that is open."""
    return tab.locator("h1 + span")


def runs(tab: Any) -> None:
    """Go to the list of runs."""
    tab.get_by_role("button", name=re.compile("^Runs")).click()
    tab.get_by_role("heading", name="Runs").wait_for()


def row(tab: Any, name: str) -> Any:
    """A run of the list."""
    return tab.locator("ul > li").filter(has=tab.get_by_text(name, exact=True))


@pytest.fixture(name="in_terminal")
def started_in_terminal(page: Page) -> Iterator[Start]:
    """Start a run in a folder as a person does in a terminal, and wait for its pointer."""
    pointers, started = page.home / "runs", list[Process]()

    def start(folder: Path, *words: str) -> Process:
        before = set(pointers.glob("*.json"))
        environment = {**os.environ, "MUSUBI_STATE_HOME": str(page.home)}
        command = [sys.executable, str(REPOSITORY / "train.py"), *words]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        started.append(process)
        wait(lambda: process.poll() is not None or set(pointers.glob("*.json")) > before)
        assert process.poll() is None, "the run has ended"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_run_is_watched_from_its_caches_to_its_samples(page: Page, photographs: Path, encoders: Path) -> None:
    root = page.project / "data"
    tables = run_tables(root, photographs, encoders)
    tables["run"] |= {"name": "watched", "output_dir": str(root / "watched")}
    del tables["objective"]
    tables["experts"] = {"enable_lune": False, "enable_sol": False}
    tables["cache"] = {"latents_batch_size": 2, "text_batch_size": 4}
    tables["train"]["max_steps"] = 4
    tables["sample"] = {
        "prompts": ["a cup of coffee", "a cat"],
        "every_steps": 2,
        "steps": 2,
        "width": 64,
        "height": 64,
    }
    tab = page.open()
    write(tab, tables)
    tab.get_by_role("button", name="Start training").click()
    progress = tab.locator("div", has=tab.get_by_role("progressbar"), has_text=f" / {len(CAPTIONS)}")
    progress.filter(has=tab.get_by_text("latents", exact=True)).last.wait_for(timeout=SLOW)
    api.expect(badge(tab)).to_have_text("finished", timeout=SLOW)
    tab.get_by_role("img", name=re.compile(r"loss.total over updates\. watched: 4 points, last \d")).wait_for()
    pictures = tab.locator("figure", has_text="update 4").locator("img")
    pictures.first.wait_for()
    for picture in pictures.all():
        picture.scroll_into_view_if_needed()
        assert picture.evaluate("async (element) => (await element.decode(), element.naturalWidth)") > 0


@pytest.mark.parametrize(
    ("name", "is_of_project", "options"),
    [("by-hand", True, ()), ("elsewhere", False, ("--lr", "5e-5"))],
)
def test_a_run_of_a_terminal_is_stopped_and_resumed_as_it_was_started(
    page: Page, in_terminal: Start, tmp_path: Path, name: str, is_of_project: bool, options: tuple[str, ...]
) -> None:
    """Its paths are relative to where it was started, and options of its command line are not in the run file."""
    place = page.project if is_of_project else tmp_path
    draw(place / f"pictures-{name}")
    (place / f"{name}.toml").write_text(tomli_w.dumps(autoencoder(name, f"pictures-{name}", 5000)))
    folder = place / "data" / name
    tab = page.open()
    runs(tab)
    process = in_terminal(place, f"{name}.toml", *options)
    row(tab, name).wait_for(timeout=2000)
    row(tab, name).get_by_role("button").click()
    wait(lambda: len(updates(folder)) > 10)
    tab.get_by_role("button", name="Stop").click()
    api.expect(badge(tab)).to_have_text("stopped", timeout=SLOW)
    assert process.wait(60) == 0 and values(folder / "exit.json")["reason"] == "stopped"
    before = updates(folder)
    assert before == list(range(1, len(before) + 1))
    tab.get_by_role("button", name="Resume").click()
    api.expect(badge(tab)).to_have_text("running", timeout=60_000)
    wait(lambda: len(updates(folder)) > len(before) + 10, seconds=90)
    tab.get_by_role("button", name="Stop").click()
    api.expect(badge(tab)).to_have_text("stopped", timeout=SLOW)
    after = updates(folder)
    assert after == list(range(1, len(after) + 1)) and len(after) > len(before)  # none is made again or left out
    assert len({line["train/lr"] for line in metrics(folder)}) == 1
    runs(tab)
    api.expect(row(tab, name)).to_have_count(1)


def test_a_queue_goes_on_after_a_failure_in_the_order_of_the_page(page: Page) -> None:
    queue = page.project / "data" / "configs" / "queue"
    tab = page.open()
    for name, count in (("first", 300), ("third", 3), ("second", 3)):
        draw(page.project / f"pictures-{name}")
        write(tab, autoencoder(name, f"pictures-{name}", count))
        tab.get_by_role("button", name="Add to queue").click()
        tab.get_by_text(f"{name} waits in the queue").wait_for()
    texts = [path.read_text() for path in sorted(queue.glob("*.toml"))]
    assert [text.partition('name = "')[2].partition('"')[0] for text in texts] == ["first", "third", "second"]
    with tab.expect_response(re.compile("config/validate")):
        tab.locator('[data-key="run.name"] input').fill("edited")
    runs(tab)
    entries = tab.locator("ol > li")
    api.expect(entries).to_contain_text(["first", "third", "second"])
    tab.get_by_label("Move second up").click()
    api.expect(entries).to_contain_text(["first", "second", "third"])
    for picture in (page.project / "pictures-second").glob("*.png"):
        picture.write_bytes(b"damaged since")
    api.expect(entries).to_contain_text(
        ["firstendedfinished", "secondendedfailed: ", "thirdendedfinished"], timeout=SLOW
    )
    assert re.search(r"\d\.png", entries.nth(1).inner_text())
    assert [path.read_text() for path in sorted(queue.glob("*.toml"))] == texts
    for name, state in (("first", "finished"), ("second", "failed"), ("third", "finished")):
        api.expect(row(tab, name)).to_contain_text(f"{name} {state}")
    ended = values(page.project / "data" / "second" / "exit.json")["ended"]
    assert values(page.project / "data" / "third" / "run.json")["started"] > ended
    assert updates(page.project / "data" / "third") == [1, 2, 3]


def finished(page: Page, folder: Path, lines: str) -> None:
    """A run that has ended, with its pointer."""
    folder.mkdir()
    started = time.time()
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "pid": 0, "started": started, "phase": "finished"}))
    (folder / "exit.json").write_text(json.dumps({"id": folder.name, "code": 0, "reason": "finished"}))
    pointers = page.home / "runs"
    pointers.mkdir(parents=True, exist_ok=True)
    pointer = {"folder": str(folder), "config": str(folder / "x.toml"), "started": started}
    (pointers / f"{folder.name}.json").write_text(json.dumps(pointer))


def test_two_runs_are_compared_with_a_spike_in_a_million_points_and_losses_that_are_not_finite(
    page: Page, tmp_path: Path
) -> None:
    step, value = SPIKE
    long = "".join(f'{{"step": {n}, "loss/total": {value if n == step else 0.5}}}\n' for n in range(1, POINTS + 1))
    lost = '{{"step": {}, "loss/total": null, "not_finite": ["loss/total"]}}\n'
    short = "".join(
        lost.format(n) if n in (50, 150) else f'{{"step": {n}, "loss/total": {1 / n}}}\n' for n in range(1, 201)
    )
    finished(page, tmp_path / "spiked", long)
    finished(page, tmp_path / "broken", short)
    tab = page.open()
    runs(tab)
    tab.get_by_label("Compare spiked").check()
    tab.get_by_label("Compare broken").check()
    with tab.expect_response(re.compile("runs/spiked/metrics"), timeout=SLOW) as answer:
        tab.get_by_role("button", name="Compare 2").click()
    chart = tab.get_by_role("img", name=re.compile("^loss.total over updates"))
    chart.wait_for()
    told = chart.get_attribute("aria-label")
    assert re.search(r"spiked: \d+ points, last 0\.5", told) and "broken: 198 points, last 0.005000" in told
    for name in ("spiked", "broken"):
        assert tab.locator(".u-legend").get_by_text(name, exact=True).is_visible()
    assert tab.locator("figcaption").get_by_text("Not finite at 50, 150.").is_visible()
    curve = answer.value.json()["curves"]["loss/total"]
    assert (step, value) in zip(curve["steps"], curve["values"], strict=True)


def test_the_summary_of_a_thinned_curve_tells_the_last_value_of_the_run(page: Page, tmp_path: Path) -> None:
    losses = [*([0.4, 0.6] * 2500), 0.5]
    finished(
        page, tmp_path / "thinned", "".join(f'{{"step": {n}, "loss/total": {x}}}\n' for n, x in enumerate(losses, 1))
    )
    tab = page.open()
    runs(tab)
    row(tab, "thinned").get_by_role("button").click()
    chart = tab.get_by_role("img", name=re.compile("^loss.total over updates"))
    chart.wait_for()
    assert "last 0.5000, lowest 0.4000" in chart.get_attribute("aria-label")
