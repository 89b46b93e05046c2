"""The page in Chromium against the real server: the server, the browser, and typing a run file."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from project import REPOSITORY

pytest.importorskip("fastapi")
CHROMIUM = next(
    (
        path
        for path in (Path("/usr/bin/chromium"), Path("/usr/bin/chromium-browser"), Path("/usr/bin/google-chrome"))
        if path.exists()
    ),
    None,
)
if CHROMIUM is None:
    pytest.skip("the page is not tested: no Chromium here; apt-get install chromium", allow_module_level=True)
api = pytest.importorskip("playwright.sync_api")

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
SMALL = {"run.threads": 1, "demo.pictures": 48, "demo.score_prompts": 8, "train.max_steps": 400, "scheduler.warmup_steps": 5, "sample.every_steps": 200,
         "save.every_steps": 200, "objective.lune_warmup_steps": 5, "objective.sol_warmup_steps": 5, "sample.steps": 2, "log.every_steps": 1}  # fmt: skip


class Page:
    """A server with a browser that has opened its page."""

    def __init__(self, project: Path, home: Path, browser: Any, port: int) -> None:
        self.project, self.home, self.browser, self.port = project, home, browser, port
        self.heard: list[str] = []
        self.start()

    def start(self) -> None:
        """Start the server."""
        environment = {
            **os.environ,
            "MUSUBI_STATE_HOME": str(self.home),
            "PATH": "",
        }  # nothing is needed beside this Python, Node least of all
        words = [sys.executable, "-m", "musubi_tuner.ui", "--port", str(self.port)]
        self.server = subprocess.Popen(words, cwd=self.project, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        line = ""
        while not line.startswith("open "):
            line = self.server.stdout.readline()
            assert line, "the server has ended"
        self.address = line.split()[1]

    def open(self, width: int = 1280) -> Any:
        """A new tab."""
        context = self.browser.new_context(viewport={"width": width, "height": 900})
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.on(
            "console",
            lambda message: (
                self.heard.append(f"{message.type}: {message.text}") if message.type in ("error", "warning") else None
            ),
        )
        tab.on("pageerror", lambda problem: self.heard.append(f"error: {problem}"))
        tab.on(
            "request",
            lambda request: (
                None
                if f":{self.port}/" in request.url or request.url.startswith(("data:", "blob:"))
                else self.heard.append(request.url)
            ),
        )
        tab.on("dialog", lambda dialog: dialog.accept())
        tab.goto(self.address)
        tab.get_by_role("tab").first.wait_for()
        return tab

    def kill(self) -> None:
        """End the server as a crash does."""
        self.server.kill()
        self.server.wait()
        if self.server.stdout is not None:
            self.server.stdout.close()


@pytest.fixture(scope="module", name="page")
def opened_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    project = tmp_path_factory.mktemp("page")
    (project / "toml").mkdir()
    for name in ("demo.toml", "tinyflux.toml", "demo_fluxflow.toml"):
        (project / "toml" / name).write_text((REPOSITORY / "toml" / name).read_text(encoding="utf-8"), encoding="utf-8")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        found = Page(project, project / "state", browser, 17_860 + os.getpid() % 1000)
        yield found
        browser.close()
        found.kill()
        for record in (project / "data").rglob("run.json"):
            try:
                os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
            except (OSError, ValueError, KeyError):
                continue


@pytest.fixture(autouse=True)
def silent(page: Page) -> Iterator[None]:
    """Nothing on the console, no report of the policy, no request to another host, in any test."""
    page.heard.clear()
    yield
    for context in page.browser.contexts:
        context.close()
    assert page.heard == []


def load(tab: Any, template: str) -> None:
    choose(tab, f"t:{template}")


def choose(tab: Any, value: str) -> None:
    """Load a template (t:) or a saved config (s:)."""
    tab.get_by_label("Load config").select_option(value)
    tab.get_by_role("button", name="Load", exact=True).click()
    tab.get_by_text(f"Loaded {value[2:]}.").wait_for()


def small(tab: Any) -> None:
    """A small demo, through the form's text."""
    tables = tomllib.loads((REPOSITORY / "toml" / "demo.toml").read_text(encoding="utf-8"))
    for key, value in SMALL.items():
        table, name = key.split(".")
        tables[table][name] = value
    write(tab, tables)


def write(tab: Any, tables: dict[str, Any]) -> None:
    """Type a run file."""
    tab.get_by_role("button", name="View as TOML").click()
    tab.wait_for_timeout(500)
    tab.get_by_label("Run file as TOML").fill(tomli_w.dumps(tables))
    tab.get_by_role("button", name="Apply to the form").click()
    tab.get_by_text("Applied.").wait_for()
    tab.get_by_role("button", name="Form", exact=True).click()
    tab.get_by_role("button", name="Start training").wait_for()
