"""The page in Chromium: its form, its runs, its rules."""

import json
import os
import re
import time
import tomllib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from chromium import Page, load, opened_page, silent, small, write
from PIL import Image
from project import ForkServer

__all__ = ["opened_page", "silent"]


def test_seven_tabs_in_the_order_of_the_plan_and_errors_say_why_start_waits(page: Page) -> None:
    tab = page.open()
    titles = [re.sub(r"\d.*", "", text).strip() for text in tab.get_by_role("tab").all_inner_texts()]
    assert titles == ["Setup", "Dataset", "Adapter", "Learning rate", "Advanced", "Saving", "Logging"]
    start = tab.get_by_role("button", name=re.compile("^Start"))
    tab.get_by_text(re.compile(r"Start \(mend \d+ errors first\)")).wait_for()
    assert start.is_disabled()
    assert tab.get_by_text("is required; or set init").is_visible()
    load(tab, "demo")
    tab.get_by_role("button", name="Start training").wait_for()
    assert start.is_enabled()
    rate = tab.get_by_role("tab", name=re.compile("Learning rate"))
    rate.click()
    tab.locator('[data-key="optimizer.lr"] input').fill("-1")
    tab.get_by_text(re.compile("is -1")).wait_for()
    assert "1 error" in rate.inner_text()
    tab.get_by_label("Reset optimizer.lr").click()
    tab.get_by_role("button", name="Start training").wait_for()


def test_settings_are_found_by_names_of_other_trainers(page: Page) -> None:
    tab = page.open()
    search = tab.get_by_label(re.compile("Search settings"))
    for words, key in (
        ("network_dim", "adapter.rank"),
        ("learning rate", "optimizer.lr"),
        ("--flip_aug", "general.flip_aug"),
    ):
        search.fill(words)
        tab.locator(f'[data-key="{key}"]').wait_for()
    search.fill("color_aug")
    tab.get_by_text(re.compile("Change hue or gamma")).first.wait_for()


def test_settings_of_a_family_come_and_go_and_values_survive(page: Page) -> None:
    tab = page.open()
    load(tab, "demo")
    tab.get_by_role("button", name="Start training").wait_for()
    tab.get_by_role("tab", name=re.compile("Advanced")).click()
    tab.locator('[data-key="experts.resolution"]').wait_for()
    tab.get_by_role("tab", name=re.compile("Setup")).click()
    tab.locator('[data-key="model.arch"] select').select_option(label="ff")
    tab.wait_for_timeout(800)
    tab.locator('[data-key="model.arch"] select').select_option(label="tf")
    tab.get_by_role("button", name="Start training").wait_for()
    tab.get_by_role("tab", name=re.compile("Advanced")).click()
    assert tab.locator('[data-key="experts.resolution"] input').input_value() == "64"


def test_the_calculator_follows_the_data(page: Page) -> None:
    pictures = page.project / "fifty"
    pictures.mkdir()
    for number in range(50):
        Image.new("RGB", (64, 64)).save(pictures / f"{number:02d}.png")
        (pictures / f"{number:02d}.txt").write_text("a picture")
    tables = {
        "run": {"name": "fifty", "output_dir": "data/fifty"},
        "model": {"arch": "ff", "init": "scratch", "bert_tokenizer": "words"},
        "objective": {"train_vae": True},
        "train": {"max_epochs": 5},
        "general": {"resolution": 64, "batch_size": 2, "num_repeats": 10},
        "datasets": [{"image_directory": "fifty"}],
    }
    tab = page.open()
    write(tab, tables)
    tab.get_by_role("tab", name=re.compile("Dataset")).click()
    tab.get_by_text("Total training steps: 1,250").wait_for()
    tab.locator('[data-key="general.num_repeats"] input').fill("20")
    tab.get_by_text("Total training steps: 2,500").wait_for()
    tab.get_by_role("tab", name=re.compile("Learning rate")).click()
    tab.get_by_role("img", name=re.compile("learning rate over updates")).wait_for()
    tab.get_by_role("button", name="Plan", exact=True).click()
    plan = tab.get_by_role("dialog").locator("pre")
    plan.wait_for(timeout=60_000)
    assert "= 2,500 steps" in plan.inner_text() and "memory" in plan.inner_text()


def vae_run(name: str, *, train: dict[str, int], **general: str) -> dict[str, Any]:
    """Run file of a small VAE on the pictures of a folder of the run's name."""
    return {
        "run": {"name": name, "output_dir": f"data/{name}"},
        "model": {"arch": "ff", "init": "scratch", "bert_tokenizer": "words"},
        "objective": {"train_vae": True},
        "train": train,
        "general": {"resolution": 64, **general},
        "datasets": [{"image_directory": name}],
    }


def test_captions_are_edited_beside_their_pictures(page: Page) -> None:
    tab = page.open()
    folder = page.project / "captioned"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (96, 64)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red ball {number}\n")
    write(tab, vae_run("captioned", train={"max_epochs": 5}))
    tab.get_by_role("tab", name=re.compile("Dataset")).click()
    tab.get_by_role("button", name="Show the pictures").click()
    tab.get_by_label("Caption of 1.png").fill("a blue ball")
    tab.get_by_text("saved", exact=True).wait_for()
    assert [(folder / f"{number}.txt").read_text() for number in range(3)] == [
        "a red ball 0\n", "a blue ball\n", "a red ball 2\n",
    ]  # fmt: skip
    (folder / "0.txt").write_text("written in an editor")
    tab.get_by_label("Caption of 0.png").fill("typed on the page")
    tab.get_by_text("changed elsewhere", exact=True).wait_for()
    assert (folder / "0.txt").read_text() == "written in an editor"
    assert page.heard and all("412" in heard for heard in page.heard)  # which Chromium itself reports
    page.heard.clear()
    tab.get_by_role("button", name="Change all captions").click()
    tab.get_by_label("Find").fill("ball")
    tab.get_by_label("Replace with").fill("cube")
    tab.get_by_role("button", name="Show what changes").click()
    tab.get_by_text("2 captions would change.").wait_for()
    tab.get_by_role("button", name="Change", exact=True).click()
    tab.get_by_text("2 captions were changed.").wait_for()
    assert (folder / "2.txt").read_text() == "a red cube 2\n"
    tab.get_by_role("button", name="Put back").click()
    tab.get_by_text("2 captions are as they were.").wait_for()
    assert (folder / "2.txt").read_text() == "a red ball 2\n"


def test_a_config_is_saved_loaded_and_kept_from_a_second_page(page: Page) -> None:
    tab, other = page.open(), page.open()
    load(tab, "tinyflux")
    tab.get_by_role("button", name="Save config").click()
    tab.get_by_label("Name", exact=True).last.fill("mine")
    tab.get_by_role("button", name="Save", exact=True).click()
    tab.get_by_text("Saved as mine.").wait_for()
    assert "[run]" in (page.project / "data" / "configs" / "mine.toml").read_text()
    other.get_by_role("button", name="Save config").click()
    other.get_by_label("Name", exact=True).last.fill("mine")
    other.get_by_role("button", name="Save", exact=True).click()
    other.get_by_text(re.compile("was saved by another page")).wait_for()
    page.heard.clear()  # Chromium reports the 412 of the conflict
    tab.reload()
    tab.get_by_role("tab").first.wait_for()
    assert tab.locator('[data-key="run.name"] input').input_value() == "tinyflux"  # the draft


@pytest.mark.timeout(600)
def test_a_run_is_started_watched_and_survives_the_server(page: Page) -> None:
    tab = page.open()
    small(tab)
    tab.get_by_role("button", name="Start training").click()
    tab.get_by_text(re.compile("running|stopping")).first.wait_for()
    folder = page.project / "data" / "demo" / "run"
    deadline = time.monotonic() + 240
    while not (folder / "metrics.jsonl").is_file() or (folder / "metrics.jsonl").read_text().count("\n") < 20:
        assert time.monotonic() < deadline, tab.inner_text("main")
        time.sleep(0.5)
    tab.get_by_role("img", name=re.compile("loss.total over updates")).wait_for()
    tab.context.close()
    before = (folder / "metrics.jsonl").read_text().count("\n")
    for _ in range(20):  # the server dies, the run goes on
        page.kill()
        page.start()
    assert (folder / "metrics.jsonl").read_text().count("\n") > before
    tab = page.open()
    tab.get_by_role("button", name=re.compile("^Runs")).click()
    tab.get_by_role("listitem").get_by_text("running").wait_for()
    tab.get_by_role("listitem").get_by_role("button").click()
    tab.get_by_role("button", name="Stop").click()
    tab.get_by_text("stopped", exact=True).first.wait_for(timeout=120_000)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in lines if "loss/total" in row]
    assert steps == list(range(1, len(steps) + 1))  # no line lost
    assert json.loads((folder / "exit.json").read_text())["reason"] == "stopped"


def test_steps_and_roles_are_edited_in_the_form(page: Page) -> None:
    tab = page.open()
    (page.project / "steps").mkdir()
    Image.new("RGB", (64, 64)).save(page.project / "steps" / "a.png")
    write(tab, vae_run("steps", train={"max_steps": 5}, missing_caption="empty"))
    for _ in range(2):
        tab.get_by_role("button", name="Add a step").click()
    tab.get_by_role("textbox", name="Name", exact=True).first.fill("second")
    tab.get_by_role("tab", name=re.compile("Dataset")).click()
    length = tab.locator('[data-key="train.max_steps"] input')
    assert length.input_value() == "" and length.get_attribute("placeholder") == "5"
    length.fill("9")
    tab.get_by_text("Total training steps: 9").wait_for()
    tab.get_by_label("Role", exact=True).select_option("vae")
    tab.get_by_role("tab", name=re.compile("Learning rate")).click()
    tab.locator('[data-key="optimizer.lr"] input').fill("-1")
    tab.get_by_role("button", name=re.compile(r"2\. second.*1 error")).wait_for()
    tab.get_by_role("button", name="1. step-1").click()
    tab.get_by_role("button", name="1 error, 0 warnings").click()
    tab.get_by_role("button", name=re.compile(r"steps\[1\]\.roles\.vae\.optimizer\.lr")).click()
    tab.locator('[data-key="optimizer.lr"] input:focus').fill("0.5")
    tab.get_by_role("button", name="Start training").wait_for()
    tab.get_by_role("button", name="Earlier").click()
    tab.get_by_role("button", name="View as TOML").click()
    tab.wait_for_function("() => document.querySelector('#toml').value.includes('step-1')")
    found = tomllib.loads(tab.get_by_label("Run file as TOML").input_value())
    assert found["train"] == {"max_steps": 5}
    second = {"name": "second", "train": {"max_steps": 9}, "roles": {"vae": {"optimizer": {"lr": 0.5}}}}
    assert found["steps"] == [second, {"name": "step-1"}]


def test_samples_are_looked_at_by_prompt_and_update_with_the_arrow_keys(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    (folder / "sample").mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"id": "s1", "name": "drawn", "pid": 0, "started": 1.0, "phase": "finished"})
    )
    (folder / "exit.json").write_text(json.dumps({"code": 0, "reason": "finished"}))
    for step in (10, 20, 30):
        for number in (0, 1):
            Image.new("RGB", (64, 64), (8 * step, 99 * number, 0)).save(
                folder / "sample" / f"drawn_{step:08d}_{number:02d}.png"
            )
        (folder / "sample" / f"prompts_step_{step}.txt").write_text("0: a cat\n1: a dog\n")
    (page.home / "runs").mkdir(parents=True, exist_ok=True)
    (page.home / "runs" / "s1.json").write_text(
        json.dumps({"folder": str(folder), "config": str(folder / "x.toml"), "started": 1.0})
    )
    tab = page.open()
    tab.get_by_role("button", name=re.compile("^Runs")).click()
    tab.get_by_role("listitem").filter(has_text="drawn").get_by_role("button").click()
    tab.get_by_label("Pictures of").select_option("a dog")
    tab.get_by_alt_text("a dog, update 30").wait_for()
    pictures = tab.get_by_role("group", name=re.compile("^Pictures"))
    pictures.focus()
    tab.keyboard.press("ArrowLeft")
    tab.get_by_alt_text("a dog, update 20").wait_for()
    tab.get_by_label("Update", exact=True).fill("0")
    tab.get_by_alt_text("a dog, update 10").wait_for()
    pictures.focus()
    tab.keyboard.press("ArrowRight")
    tab.get_by_label("Beside another one").check()
    tab.get_by_label("The other one").select_option("update 30")
    assert [each.get_attribute("alt") for each in pictures.get_by_role("img").all()] == [
        "a dog, update 30",
        "a dog, update 20",
    ]
    assert all(pictures.get_by_role("img").evaluate_all("found => found.map(each => each.naturalWidth === 64)"))
    (page.home / "runs" / "s1.json").unlink()


def test_an_imported_file_says_what_became_of_its_keys(page: Page, tmp_path: Path) -> None:
    other = tmp_path / "config.yaml"
    other.write_text(
        "training:\n  batch_size: 3\n  output_path: out\n  train_vae: true\n  use_bucketts: 1\ndata:\n  data_path: images\n"
    )
    tab = page.open()
    tab.get_by_label("File to import").set_input_files(other)
    report = tab.get_by_role("dialog")
    report.get_by_text("training.batch_size → general.batch_size = 3").wait_for()
    assert report.get_by_role("heading", name=re.compile("Unknown")).is_visible()
    assert report.get_by_text(re.compile("use_bucketts")).is_visible()
    tab.keyboard.press("Escape")
    tab.get_by_role("tab", name=re.compile("Dataset")).click()
    assert tab.locator('[data-key="general.batch_size"] input').input_value() == "3"


def test_a_path_is_chosen_from_the_folders_of_the_project(page: Page) -> None:
    tab = page.open()
    tab.get_by_label("Browse for Output dir").click()
    tab.get_by_role("button", name="toml/").click()
    tab.get_by_role("button", name=re.compile("^demo.toml")).click()
    assert tab.locator('[data-key="run.output_dir"] input').input_value() == "toml/demo.toml"


def test_a_run_of_a_terminal_is_there(page: Page, server: ForkServer, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "run.json").write_text(
        json.dumps({"id": "t1", "pid": os.getpid(), "started": time.time(), "phase": "train", "step": 5, "steps": 10})
    )
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss/total": {1 / n}}}\n' for n in range(1, 6)))
    tab = page.open()
    tab.get_by_role("button", name=re.compile("^Runs")).click()
    pointers = page.home / "runs"
    pointers.mkdir(parents=True, exist_ok=True)
    (pointers / "t1.json").write_text(
        json.dumps({"folder": str(folder), "config": str(folder / "x.toml"), "started": time.time()})
    )
    tab.get_by_text("elsewhere", exact=True).wait_for(timeout=2000)
    (pointers / "t1.json").unlink()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_tab(page: Page, theme: str, tmp_path: Path) -> None:
    """Each tab and page is kept as a picture beside pytest's other files."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab = page.open(1180)
    tab.emulate_media(color_scheme=theme)
    found: dict[str, str] = {}

    def look(name: str) -> None:
        tab.screenshot(path=tmp_path / f"{name}-{theme}.png", full_page=True)
        for violation in axe.run(tab).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                nodes = "; ".join(node["html"][:160] for node in violation["nodes"][:3])
                found[f"{name}: {violation['id']}"] = f"{violation['help']}: {nodes}"

    load(tab, "demo")
    tab.get_by_role("tab", name="Learning rate").click()
    tab.locator('[data-key="optimizer.lr"] input').fill("-1")
    tab.get_by_text("1 error,").wait_for()
    for each in tab.get_by_role("tab").all():
        each.click()
        look(re.sub(r"\d.*", "", each.inner_text()).split()[0].lower())
    tab.get_by_role("button", name="1 error,").click()
    look("found")
    tab.keyboard.press("Escape")
    tab.get_by_role("button", name="View as TOML").click()
    look("toml")
    tab.get_by_role("button", name=re.compile("^Runs")).click()
    tab.get_by_role("heading", name="Runs").wait_for()
    look("runs")
    runs = tab.get_by_role("listitem").get_by_role("button")
    if runs.count():
        runs.first.click()
        tab.get_by_role("heading", name="Log").wait_for()
        look("run")
    assert not found, "\n".join(f"{key}: {value}" for key, value in found.items())


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_nothing_scrolls_sideways(page: Page, width: int) -> None:
    tab = page.open(width)
    load(tab, "demo")
    for name in ("Setup", "Dataset", "Advanced"):
        tab.get_by_role("tab", name=re.compile(name)).click()
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
    tab.get_by_role("button", name=re.compile("^Runs")).click()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_page_is_used_by_keyboard_alone(page: Page) -> None:
    tab = page.open()
    load(tab, "demo")
    tab.get_by_role("button", name="Start training").wait_for()
    tab.locator("body").click(position={"x": 2, "y": 300})
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "search"
    tab.keyboard.press("Alt+4")
    assert "Learning rate" in tab.locator('[role=tab][data-state="active"]').inner_text()
    tab.locator('[role=tab][data-state="active"]').focus()
    tab.keyboard.press("ArrowRight")
    tab.locator('[role=tab][data-state="active"]', has_text="Advanced").wait_for()
    assert "Advanced" in tab.locator('[role=tab][data-state="active"]').inner_text()
    tab.locator("body").click(position={"x": 2, "y": 300})
    tab.keyboard.press("g")
    tab.keyboard.press("j")
    tab.get_by_role("heading", name="Runs").wait_for()


def test_without_the_token_nothing_is_shown(page: Page) -> None:
    context = page.browser.new_context()
    tab = context.new_page()
    tab.goto(page.address.partition("#")[0])
    tab.get_by_text("Open the page by the address that the program printed").wait_for()
    assert tab.get_by_role("tab").count() == 0


def test_a_page_on_another_port_can_do_nothing(page: Page, tmp_path: Path) -> None:
    """Cookies know no ports, so it has that of the session; what it sends is refused all the same."""
    (tmp_path / "index.html").write_text("<title>other</title>")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        context = page.browser.new_context()
        own, tab = context.new_page(), context.new_page()
        own.goto(page.address)
        own.get_by_role("tab").first.wait_for()
        tab.goto(f"http://127.0.0.1:{other.server_port}/")
        answers = tab.evaluate(
            """async (server) => {
                const ask = async (path, init) => {
                    try { return (await fetch(server + path, {credentials: 'include', ...init})).type; } catch (problem) { return problem.name; }
                };
                const body = JSON.stringify({text: '[run]\\nname = "evil"', tag: null});
                return [
                    await ask('/api/runs', {}),
                    await ask('/api/configs/evil', {method: 'PUT', headers: {'content-type': 'application/json'}, body}),
                    await ask('/api/queue', {method: 'POST', mode: 'no-cors', headers: {'content-type': 'text/plain'}, body}),
                ];
            }""",
            f"http://127.0.0.1:{page.port}",
        )
        other.shutdown()
    assert answers == ["TypeError"] * 3
    assert not (page.project / "data" / "configs" / "evil.toml").exists()
    assert not list((page.project / "data" / "configs" / "queue").glob("*evil*"))
    assert own.evaluate("fetch('/api/queue').then((answer) => answer.json())")["entries"] == []
