"""The page's server: who may talk to it, what it answers, and that a run does not need it."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from musubi_tuner.config.fields import TABS
from musubi_tuner.config.schema import item_parameters, parameters
from musubi_tuner.errors import ConfigError, UserError
from musubi_tuner.ui import form, runs
from musubi_tuner.ui.__main__ import free_port, hosts_of, main, read_token
from musubi_tuner.ui.configs import Configs
from musubi_tuner.ui.curves import Parsed
from musubi_tuner.ui.pictures import Pictures, changed
from musubi_tuner.ui.queue import Queue
from musubi_tuner.ui.security import Guard
from musubi_tuner.ui.server import _turns, make_app

HOST = "127.0.0.1:7860"
TOKEN = "a-token-that-nobody-guesses-0123456789"
JSON = {"content-type": "application/json"}
RUN = '[run]\nname = "a"\noutput_dir = "out"\n[model]\narch = "tf"\n'


@pytest.fixture
def guard() -> Guard:
    return Guard(TOKEN, frozenset({HOST}), "musubi_ui_7860")


@pytest.fixture
def outside(guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A browser that has not opened the page with its token."""
    monkeypatch.setenv("MUSUBI_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return TestClient(make_app(guard, tmp_path), base_url=f"http://{HOST}")


@pytest.fixture
def client(outside: TestClient) -> TestClient:
    """A browser with a session."""
    answer = outside.post("/api/session", json={"token": TOKEN})
    assert answer.status_code == 200
    outside.headers["x-csrf-token"] = answer.json()["csrf"]
    return outside


def make_run(tmp_path: Path, name: str = "run", **values: Any) -> Path:
    """A run folder with its pointer."""
    folder = tmp_path / name
    folder.mkdir()
    run = {"id": name, "pid": os.getpid(), "started": time.time(), "phase": "train", "step": 3, "steps": 9, **values}
    (folder / "run.json").write_text(json.dumps(run))
    pointers = tmp_path / "state" / "runs"
    pointers.mkdir(parents=True, exist_ok=True)
    (tmp_path / "a.toml").write_text(RUN)
    pointer = {"folder": str(folder), "config": str(tmp_path / "a.toml"), "started": run["started"]}
    (pointers / f"{name}.json").write_text(json.dumps(pointer))
    return folder


def routes(client: TestClient) -> Iterator[tuple[str, str]]:
    """Method and path of every route, from the table."""
    found: list[Any] = list(client.app.routes)  # type: ignore[attr-defined]
    while found:
        route = found.pop()
        found += getattr(getattr(route, "original_router", None), "routes", [])
        if isinstance(route, APIRoute):
            for method in route.methods or ():
                path = (
                    route.path.replace("{identity}", "run")
                    .replace("{name}", "a")
                    .replace("{what}", "stop")
                    .replace("{number}", "1")
                    .replace("{where}", "up")
                    .replace("{rest:path}", "x")
                )
                yield method, path


def test_every_route_of_the_api_needs_a_session(outside: TestClient) -> None:
    checked = 0
    for method, path in routes(outside):
        if not path.startswith("/api/") or path in ("/api/health", "/api/session"):
            continue
        answer = outside.request(method, path, content="{}", headers=JSON)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "session", (method, path)
        checked += 1
    assert checked > 15


def test_every_route_refuses_another_host_and_another_page(client: TestClient) -> None:
    for method, path in routes(client):
        named = client.request(method, path, content="{}", headers={**JSON, "host": "evil.example:7860"})
        assert named.status_code == 403 and named.json()["error"]["code"] == "host", (method, path)
        if method != "GET":
            for foreign in (
                {"origin": "http://evil.example"},
                {"origin": "http://127.0.0.1:9999"},
                {"sec-fetch-site": "cross-site"},
            ):
                answer = client.request(method, path, content="{}", headers={**JSON, **foreign})
                assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin", (method, path)


def test_a_change_needs_the_mark_of_the_session_json_and_a_length(client: TestClient) -> None:
    body: dict[str, Any] = {"document": {}}
    assert client.post("/api/config/validate", json=body).status_code == 200
    assert (
        client.post("/api/config/validate", json=body, headers={"x-csrf-token": "other"}).json()["error"]["code"]
        == "csrf"
    )
    plain = client.post("/api/config/validate", content="{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    assert client.post("/api/config/validate", content=b"{" + b" " * (1 << 20) + b"}", headers=JSON).status_code == 413


def test_wrong_tokens_are_refused_and_counted(outside: TestClient) -> None:
    for _ in range(5):
        assert outside.post("/api/session", json={"token": "wrong"}).status_code == 401
    assert outside.post("/api/session", json={"token": TOKEN}).status_code == 429


def test_answers_carry_the_rules_of_the_browser(client: TestClient) -> None:
    answer = client.get("/api/health")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff" and "access-control-allow-origin" not in answer.headers
    cookie = client.post("/api/session", json={"token": TOKEN}).headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and cookie.startswith("musubi_ui_7860=")


def test_no_path_leads_out_of_a_run(client: TestClient, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "sample").mkdir()
    (folder / "sample" / "a.png").write_bytes(b"picture")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / "sample" / "link.png").symlink_to(tmp_path / "secret.png")
    assert client.get("/api/runs/run/picture", params={"path": "sample/a.png"}).content == b"picture"
    pieces = [
        "..",
        "/",
        "%2e%2e",
        "sample",
        "secret.png",
        "\0",
        "link.png",
        "a.png",
        str(tmp_path),
        "//",
        ".",
        "run.json",
    ]
    source = random.Random(0)
    for _ in range(2000):
        path = "/".join(source.choice(pieces) for _ in range(source.randint(1, 6)))
        answer = client.get("/api/runs/run/picture", params={"path": path})
        assert answer.content in (b"picture",) or answer.status_code in (404, 422), path
        assert b"secret" not in answer.content or answer.status_code != 200
    for name in ("a\\b", "index.html", "x" * 300):
        assert client.get(f"/assets/{name}").status_code == 404
    for name in ("../../server.py", "..%2f..%2fserver.py", "%2e%2e/%2e%2e/server.py"):
        assert b"def make_app" not in client.get(f"/assets/{name}").content


def test_every_setting_is_in_the_form_once_on_a_tab_of_the_plan(client: TestClient) -> None:
    found = client.get("/api/schema").json()
    keys = [field["key"] for field in found["fields"]]
    assert sorted(keys) == sorted({p.key for p in (*parameters(), *item_parameters())})
    assert [tab["title"] for tab in found["tabs"]] == [
        "Setup",
        "Dataset",
        "Adapter",
        "Learning rate",
        "Advanced",
        "Saving",
        "Logging",
    ]
    assert {field["tab"] for field in found["fields"]} == set(TABS)
    assert {field["kind"] for field in form.form_fields()} == {"switch", "whole", "number", "choice", "text", "value"}


def test_a_config_is_checked_as_train_checks_it(client: TestClient) -> None:
    wrong = {"run": {"name": "a", "output_dir": "out"}, "model": {"arch": "tf"}, "optimizer": {"lr": -1, "lrr": 2}}
    found = client.post("/api/config/validate", json={"document": wrong, "number": 7}).json()
    said = {(each["level"], each["keys"][0]) for each in found["diagnostics"]}
    assert found["number"] == 7 and {("error", "optimizer.lr"), ("error", "optimizer.lrr")} <= said
    parsed = client.post("/api/config/parse", json={"text": "a = ["})
    assert parsed.status_code == 422 and "not valid TOML" in parsed.json()["error"]["message"]
    assert "learning" in client.get("/api/explain", params={"name": "lr"}).json()["text"].lower()


def test_all_names_of_the_plan_are_found(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting by one of its names, or what the name means here."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "config")
    from names_of_others import PLAN

    fields = client.get("/api/schema").json()["fields"]
    names = {name for field in fields for name in (field["key"], field["name"], *field["names"])}
    explained = {name: client.get("/api/explain", params={"name": name}).json()["text"] for name in PLAN}
    assert len(PLAN) > 100 and not [name for name in PLAN if name not in names and not explained[name].strip()]


def test_configs_are_saved_and_a_second_page_does_not_overwrite(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "toml").mkdir()
    (tmp_path / "toml" / "ready.toml").write_text(RUN)
    first = client.put("/api/configs/mine", json={"text": RUN})
    assert first.status_code == 200
    assert client.get("/api/configs").json() == {"saved": ["mine"], "templates": ["ready"]}
    assert client.put("/api/configs/mine", json={"text": RUN + "#"}).status_code == 412
    second = client.put("/api/configs/mine", json={"text": RUN + "# more\n", "tag": first.json()["tag"]})
    assert second.status_code == 200
    stale = client.put("/api/configs/mine", json={"text": RUN, "tag": first.json()["tag"]})
    assert stale.status_code == 412 and stale.json()["error"]["tag"] == second.json()["tag"]
    assert client.get("/api/configs/mine").json()["text"].endswith("# more\n")
    for name in ("../x", ".hidden", "-x", "a b", "x" * 81):
        assert client.put(f"/api/configs/{name}", json={"text": RUN}).status_code in (404, 405, 422)
    assert client.delete("/api/configs/mine").status_code == 405 or client.get("/api/configs").json()["saved"] == [
        "mine"
    ]


def flow_config(tmp_path: Path, name: str = "a", epochs: int = 5) -> str:
    """A run file without errors, on 50 pictures."""
    pictures = tmp_path / "pictures"
    if not pictures.is_dir():
        pictures.mkdir()
        for number in range(50):
            Image.new("RGB", (64, 64)).save(pictures / f"{number:02d}.png")
            (pictures / f"{number:02d}.txt").write_text(f"picture {number}")
    return f"""[run]
name = "{name}"
output_dir = "out-{name}"
[model]
arch = "ff"
init = "scratch"
bert_tokenizer = "words"
[objective]
train_vae = true
[train]
max_epochs = {epochs}
[optimizer]
lr = 1e-3
[scheduler]
warmup_steps = 100
[general]
resolution = 64
batch_size = 2
num_repeats = 10
[[datasets]]
image_directory = "pictures"
"""


def test_the_calculator_shows_what_the_plan_says(client: TestClient, tmp_path: Path) -> None:
    text = flow_config(tmp_path)
    document = client.post("/api/config/parse", json={"text": text}).json()["document"]
    found = client.post("/api/config/preview", json={"document": document, "number": 3}).json()
    assert found["number"] == 3 and found["images"] == 50 and found["total"] == 1250  # 50 x 10 x 5 / 2
    assert "50 images x 10 repeats x 5 epochs / 2 = 1,250 steps" in found["sentence"]
    (bucket,) = found["buckets"]
    assert (bucket["width"], bucket["presentations"], bucket["batches"], bucket["cropped"]) == (64, 500, 250, 0)
    (curve,) = found["rates"]
    assert (
        curve["steps"][0] == 1
        and curve["steps"][-1] == 1250
        and curve["values"][0] == 0
        and max(curve["values"]) == pytest.approx(1e-3, rel=0.01)
    )
    assert found["captions"] == ["picture 0"]
    document["general"]["batch_size"] = 3
    assert (
        client.post("/api/config/preview", json={"document": document}).json()["total"] == 5 * 167
    )  # the last one is short
    document["datasets"][0]["image_directory"] = "nowhere"
    wrong = client.post("/api/config/preview", json={"document": document})
    assert wrong.status_code == 200 and "nowhere" in wrong.json()["problem"]


def test_captions_are_edited_in_their_bytes_and_replacements_put_back(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "the disk is full", "49.txt")

    text = flow_config(tmp_path)
    pictures = tmp_path / "pictures"
    (pictures / "00.txt").write_bytes(b"\xef\xbb\xbfa red ball\r\n")
    (pictures / "01.txt").write_bytes("ein Käfer".encode("latin-1"))
    (pictures / "02.txt").unlink()
    (pictures / "03.png").write_bytes(b"none")
    Image.new("RGB", (128, 64)).save(pictures / "04.png")
    document = client.post("/api/config/parse", json={"text": text}).json()["document"]
    (folder,) = client.post("/api/datasets", json={"document": document}).json()
    assert folder["count"] == 50 and folder["problem"] == ""
    at = f"/api/datasets/{folder['id']}"
    items = client.get(f"{at}?limit=5").json()
    assert [item["caption"] for item in items] == ["a red ball", None, None, "picture 3", "picture 4"]
    assert "UTF-8" in items[1]["locked"] and "not a readable image" in items[3]["problem"]
    assert items[4]["size"] == [128, 64] and items[4]["crop"][2] * 128 == pytest.approx(
        items[4]["bucket"][0] * 64 / items[4]["bucket"][1], rel=0.1
    )
    assert client.get(f"{at}/thumbnail?name=00.png").content[8:12] == b"WEBP"
    assert (
        client.get(f"{at}/thumbnail?name=03.png").status_code == 422
        and client.get(f"{at}/thumbnail?name=../run.toml").status_code == 404
    )

    def write(number: int, text: str, tag: str | None) -> int:
        return client.put(f"{at}/caption", json={"name": f"{number:02d}.png", "text": text, "tag": tag}).status_code

    (pictures / "0.png").write_bytes((pictures / "04.png").read_bytes())  # the others move on by one
    (pictures / "0.txt").write_text("first")
    client.post("/api/datasets", json={"document": document})
    before = {path.name: path.read_bytes() for path in pictures.iterdir()}
    assert write(0, "a blue ball", items[0]["tag"]) == 200
    assert write(0, "a green ball", items[0]["tag"]) == 412  # of another page
    assert write(1, "a beetle", items[1]["tag"]) == 422
    assert write(2, "a new one", None) == 200
    after = {path.name: path.read_bytes() for path in pictures.iterdir()}
    assert after.pop("00.txt") == b"\xef\xbb\xbfa blue ball\r\n" and after.pop("02.txt") == b"a new one"
    before.pop("00.txt")
    assert before == after

    def replace(apply: bool, find: str = "picture ") -> dict[str, Any]:
        return client.post(f"{at}/replace", json={"find": find, "by": "photo ", "apply": apply}).json()

    shown = replace(apply=False)
    assert shown["count"] == 47 and shown["changes"][0] == {
        "name": "03.txt",
        "before": "picture 3",
        "after": "photo 3",
    }
    assert (pictures / "03.txt").read_text() == "picture 3"
    assert replace(apply=True)["undo"] == 47 and (pictures / "03.txt").read_text() == "photo 3"
    (pictures / "05.txt").write_text("edited since")
    with monkeypatch.context() as broken:
        broken.setattr("musubi_tuner.ui.pictures.replace_file", full)
        assert "full" in client.post(f"{at}/undo", json={}).json()["error"]["message"]  # and nothing is forgotten
    client.post("/api/datasets", json={"document": document})  # a page that is opened again
    assert client.post(f"{at}/undo", json={}).json() == {"count": 46, "kept": ["05.txt"]}
    assert (pictures / "03.txt").read_text() == "picture 3" and (pictures / "05.txt").read_text() == "edited since"


def test_ten_thousand_made_up_names_lead_nowhere_else(client: TestClient, tmp_path: Path) -> None:
    """Of pictures of a run and of a data set, of configs, templates and the page's own files; links lead out of their folders."""
    secret, outside = b"# planted secret", tmp_path / "outside"
    outside.mkdir()
    document = client.post("/api/config/parse", json={"text": flow_config(tmp_path)}).json()["document"]
    sample, toml, saved = make_run(tmp_path) / "sample", tmp_path / "toml", tmp_path / "data" / "configs"
    for folder, suffix in ((sample, ".png"), (tmp_path / "pictures", ".png"), (toml, ".toml"), (saved, ".toml")):
        folder.mkdir(parents=True, exist_ok=True)
        (outside / f"secret{suffix}").write_bytes(secret)
        (folder / f"link{suffix}").symlink_to(outside / f"secret{suffix}")
        (folder / f"loop{suffix}").symlink_to(f"loop{suffix}")
        (folder / "folder").symlink_to(outside)
    (sample / "00.png").write_bytes(b"picture")
    (toml / "mine.toml").write_text(RUN)
    (saved / "mine.toml").write_text(RUN)
    (opened,) = client.post("/api/datasets", json={"document": document}).json()
    pictures, configs, place = Pictures(), Configs(saved, toml), runs.place_of("run")
    pictures.open(document)
    functions: tuple[Callable[[str], bytes], ...] = (
        lambda name: runs.picture(place, name).read_bytes(),
        lambda name: pictures.thumbnail(opened["id"], name),
        lambda name: configs.read(name)[0].encode(),
        lambda name: configs.read(name, template=True)[0].encode(),
    )
    paths = (
        ("/api/runs/run/picture", "path"),
        (f"/api/datasets/{opened['id']}/thumbnail", "name"),
        ("/api/configs/{}", ""),
        ("/api/configs/{}?template=true", ""),
        ("/assets/{}", ""),
    )
    pieces = ["..", ".", "", "%2e%2e", "..%2f", "~", "\0", "C:", "\\\\host", "CON", "a" * 300, "x" * 5000, "K\u00e4se", "\u202e", "\U0001f4be", "\ufeff",
              "sample", "sample/00.png", "00.png", "mine", "link", "sample/link.png", "link.png", "loop", "sample/loop.png", "loop.png", "folder",
              "secret", "secret.png", "outside", "run.json", str(tmp_path), str(outside / "secret.png"), "/etc/passwd", "index.html"]  # fmt: skip
    source = random.Random(0)

    def made_up() -> str:
        between = source.choice(("/", "/", "\\", "//"))
        return between.join(source.choice(pieces) for _ in range(source.choice((1, 1, 2, 3, 5))))

    returned, wrong = [0] * len(functions), set()
    for _ in range(2500):
        for number, function in enumerate(functions):
            name = made_up()
            try:
                found = function(name)
            except (UserError, OSError, UnicodeError):
                continue  # which the server answers
            except Exception as problem:
                wrong.add(f"{paths[number][0]}: {name!r}: {problem!r}")
                continue
            returned[number] += 1
            if secret in found:
                wrong.add(f"{paths[number][0]}: {name!r}: the secret")
    client = TestClient(
        client.app, base_url=str(client.base_url), cookies=client.cookies, raise_server_exceptions=False
    )
    for _ in range(100):
        for path, key in paths:
            name = made_up()
            quoted = quote(name, safe=source.choice(("", "/")))
            answer = client.get(path.format(quoted), params={key: name} if key else None)
            if answer.status_code >= 500 or secret in answer.content:
                wrong.add(f"{path}: {name!r}: {answer.status_code}")
    assert all(returned) and not wrong, "\n".join(sorted(wrong)[:20])


def test_the_plan_is_that_of_the_trainer(client: TestClient, tmp_path: Path) -> None:
    found = client.post("/api/config/plan", json={"text": flow_config(tmp_path)}).json()
    assert found["code"] == 0, found["text"]
    assert "1,250" in found["text"] and "memory" in found["text"].lower()
    assert not list((tmp_path / "data").rglob("*.toml")) and not (tmp_path / "out-a").exists()
    assert client.post("/api/config/plan", json={"text": RUN}).status_code == 422


def test_the_queue_keeps_its_order_and_goes_on_after_a_failure(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With runs that another process plays."""
    started: list[str] = []

    def start(snapshot: Path, log: Path, options: list[str], folder: Path, secrets: dict[str, str]) -> int:
        name = tomllib.loads(snapshot.read_text())["run"]["name"]
        started.append(name)
        if name == "b":
            log.write_text("error: no such picture\n")
            return 2**22 - 1
        make_run(tmp_path, f"out-{name}", id=f"out-{name}")
        return os.getpid()

    monkeypatch.setattr(runs, "start", start)
    queue = Queue(tmp_path / "data" / "configs" / "queue", tmp_path, {})
    for name in ("c", "b", "a"):
        assert client.post("/api/queue", json={"text": flow_config(tmp_path, name)}).status_code == 201
    assert client.post("/api/queue", json={"text": RUN}).status_code == 422
    assert client.post("/api/queue/3/up", json={}).status_code == 200  # c, a, b
    assert client.post("/api/queue/3/up", json={}).status_code == 200  # a, c, b
    assert client.post("/api/queue/2/up", json={}).status_code == 200  # a, b, c
    (queue.folder / "00009.json").write_text('{"number": "9", "name": "of somebody"}')
    (queue.folder / "00010.json").write_text("{")
    assert [entry["name"] for entry in client.get("/api/queue").json()["entries"]] == ["a", "b", "c"]
    queue.turn()
    queue.turn()
    assert started == ["a"]
    assert client.request("DELETE", "/api/queue/3", content="{}", headers=JSON).status_code == 422
    (tmp_path / "out-a" / "exit.json").write_text('{"reason": "finished", "code": 0}')
    queue.turn()
    Queue(queue.folder, tmp_path, {}).turn()  # as after a restart of the server
    assert started == ["a", "b", "c"]
    found = client.get("/api/queue").json()["entries"]
    assert [(entry["name"], entry["state"]) for entry in found] == [("a", "ended"), ("b", "ended"), ("c", "started")]
    assert found[0]["reason"] == "finished" and found[1]["reason"] == "failed: error: no such picture"
    assert client.request("DELETE", "/api/queue/2", content="{}", headers=JSON).status_code == 200


def test_runs_are_found_by_what_they_leave(client: TestClient, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    make_run(tmp_path, "old", pid=2**22 - 1, started=time.time() - 100)
    make_run(tmp_path, "reused", started=time.time() - 10**8)  # this process is younger than that run
    (make_run(tmp_path, "ended") / "exit.json").write_text('{"reason": "finished", "code": 0}')
    states = {run["id"]: run["state"] for run in client.get("/api/runs").json()}
    assert states == {"run": "running", "old": "lost", "reused": "lost", "ended": "finished"}
    (folder / "logs").mkdir()
    (folder / "logs" / "console.log").write_text("one\ntwo\n")
    assert client.get("/api/runs/run/log", params={"offset": 4}).json() == {"text": "two\n", "offset": 8, "size": 8}
    assert client.post("/api/runs/run/save", json={}).status_code == 202 and (folder / "control" / "save").exists()
    assert client.post("/api/runs/run/stop", json={}).status_code == 202
    assert client.get("/api/runs/run").json()["state"] == "stopping"
    assert client.post("/api/runs/ended/stop", json={}).status_code == 409
    assert client.post("/api/runs/run/dance", json={}).status_code == 409
    assert client.get("/api/runs/nobody").status_code == 404


def test_curves_keep_spikes_and_say_where_values_are_not_finite(client: TestClient, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    lines = [
        json.dumps({"step": n, "loss/total": 50.0 if n == 4321 else 1.0 + n * 1e-6, "clock": {"step_seconds": 0.1}})
        for n in range(1, 10_001)
    ]
    lines[99] = '{"step": 100, "loss/total": null, "not_finite": ["loss/total"]}'
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 10001, "lo')
    found = client.get("/api/runs/run/metrics", params={"points": 200}).json()
    curve = found["curves"]["loss/total"]
    assert len(curve["steps"]) <= 200 and max(curve["values"]) == 50.0 and curve["steps"] == sorted(curve["steps"])
    assert found["lost"] == {"loss/total": [100]} and "clock/step_seconds" in found["tags"]


def test_steps_are_one_run_with_borders(client: TestClient, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    entries = [
        {"name": name, "folder": f"{n}-{name}", "status": "finished", "step": 2}
        for n, name in enumerate(("warm", "main"), 1)
    ]
    (folder / "steps.json").write_text(json.dumps({"steps": entries}))
    for entry in entries:
        (folder / str(entry["folder"])).mkdir()
        (folder / str(entry["folder"]) / "metrics.jsonl").write_text(
            '{"step": 1, "loss/total": 2.0}\n{"step": 2, "loss/total": 1.0}\n'
        )
    found = client.get("/api/runs/run/metrics").json()
    assert found["curves"]["loss/total"]["steps"] == [1, 2, 3, 4] and found["borders"] == {"warm": 1, "main": 3}
    assert [step["name"] for step in client.get("/api/runs/run").json()["steps_of_file"]] == ["warm", "main"]


def test_a_config_that_is_wrong_is_not_started(client: TestClient) -> None:
    planned = client.post("/api/runs", json={"text": RUN, "options": ["--plan"]})  # which starts no run
    assert planned.status_code == 422 and planned.json()["error"]["code"] == "options"
    answer = client.post("/api/runs", json={"text": RUN})
    assert answer.status_code == 422 and "required" in answer.json()["error"]["message"]
    assert client.post("/api/runs", json={"text": RUN, "options": ["--set"]}).json()["error"]["code"] == "options"


def test_no_torch_is_imported_and_secrets_are_not_passed_on() -> None:
    code = "import sys, musubi_tuner.ui.server, musubi_tuner.ui.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    passed = runs.environment(
        {"PATH": "x", "CUDA_VISIBLE_DEVICES": "0", "HF_TOKEN": "t", "MY_PASSWORD": "p", "MUSUBI_RUN_FOLDER": "f"}
    )
    assert set(passed) == {"PATH", "CUDA_VISIBLE_DEVICES", "HF_TOKEN"}


def processes_with(text: bytes) -> dict[int, bool]:
    """All processes, and whether the text is in their arguments or environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found[int(folder.name)] = any(text in (folder / name).read_bytes() for name in ("cmdline", "environ"))
    return found


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at processes in /proc")
def test_the_token_is_in_no_file_log_argument_or_environment(tmp_path: Path) -> None:
    """With the server as users start it, and a run from the page and one of the queue."""
    token, project, state = "planted-token-0123456789-abcdefghijk", tmp_path / "project", tmp_path / "state"
    (project / "toml").mkdir(parents=True)
    state.mkdir()
    (state / "ui-token").write_text(token)
    small = "[model.geometry]\nvae_dim = 8\nfeature_maps_dim = 32\nflow_layers = 1\nflow_heads = 2\n[objective]"
    text = flow_config(project).replace("[objective]", small)
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("wb") as output, err.open("wb") as errors:
        server = subprocess.Popen(
            [sys.executable, "-m", "musubi_tuner.ui", "--port", str(free_port("127.0.0.1", 18_860)), "--token_file", str(state / "ui-token")],
            cwd=project, env={**os.environ, "MUSUBI_STATE_HOME": str(state)}, stdout=output, stderr=errors,
        )  # fmt: skip
    started: set[int] = set()

    def wait_for(found: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 60
        while not (answer := found()):
            assert time.monotonic() < deadline and server.poll() is None, err.read_text()
            time.sleep(0.05)
        return answer

    try:
        address = wait_for(lambda: re.search(r"open (http://\S+)/#token=", out.read_text()))[1]
        with httpx.Client(base_url=address, timeout=60) as page:
            page.headers["x-csrf-token"] = page.post("/api/session", json={"token": token}).json()["csrf"]
            document = page.post("/api/config/parse", json={"text": text}).json()["document"]
            assert not page.post("/api/config/validate", json={"document": document}).json()["diagnostics"]
            assert page.put("/api/configs/mine", json={"text": text}).status_code == 200
            assert page.post("/api/session", json={"token": token + "x"}).status_code == 401
            run = page.post("/api/runs", json={"text": text}).json()
            started.add(run["pid"])
            assert page.post("/api/queue", json={"text": text.replace("out-a", "out-b")}).status_code == 201
            queued = project / "data" / "configs" / "queue" / "00001.json"
            started.add(wait_for(lambda: json.loads(queued.read_text())["pid"]))
            found = processes_with(token.encode())
            assert {server.pid, *started} <= set(found) and not any(found.values())
            identity = wait_for(lambda: page.get("/api/runs").json())[-1]["id"]
            wait_for(lambda: page.get(f"/api/runs/{identity}/log").json()["text"])
            assert page.request("DELETE", "/api/session/current", json={}).status_code == 200
    finally:
        for number in (server.pid, *started):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        server.wait()
    files = [path for folder in (project, state) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 110  # the pictures, what was saved, what the runs have left
    assert [path for path in files if token.encode() in path.read_bytes()] == [state / "ui-token"]
    assert [line for line in out.read_text().splitlines() if token in line] == [f"open {address}/#token={token}"]
    assert token not in err.read_text()


def test_the_token_is_the_owners_alone_and_a_taken_port_gives_the_next(tmp_path: Path) -> None:
    import socket

    token = read_token(tmp_path / "deep" / "token")
    assert read_token(tmp_path / "deep" / "token") == token and len(token) > 30
    assert (tmp_path / "deep" / "token").stat().st_mode & 0o777 == 0o600
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port("127.0.0.1", port) > port


def test_a_server_for_other_machines_knows_its_names_and_wrong_addresses_are_named() -> None:
    assert hosts_of("127.0.0.1", 7860) == {"127.0.0.1:7860", "[::1]:7860", "localhost:7860"}
    assert f"{socket.gethostname().lower()}:7860" in hosts_of("0.0.0.0", 7860)
    assert {"box:80", "box"} == hosts_of("Box", 80)
    for port in (0, 70_000):
        with pytest.raises(ConfigError, match=r"--port"):
            free_port("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"--host 203.0.113.1"):
        free_port("203.0.113.1", 7860)  # of no machine


def test_requests_that_make_no_sense_are_answered_in_our_words(client: TestClient, tmp_path: Path) -> None:
    def error(method: str, path: str, content: str | bytes, **more: str) -> str:
        answer = client.request(method, path, content=content, headers={**JSON, **more})
        assert 400 <= answer.status_code < 500, answer.text
        return str(answer.json()["error"]["message"])

    assert "TOML" in error("POST", "/api/config/toml", '{"document": {"run": null}}')
    assert "not valid TOML" in error("POST", "/api/config/parse", json.dumps({"text": "a = " + "9" * 5000}))
    assert "not valid TOML" in error("POST", "/api/config/parse", json.dumps({"text": "a = " + "[" * 5000}))
    assert "what this route takes" in error("POST", "/api/config/parse", "{}")
    assert "how many" in error("POST", "/api/config/parse", "{}", **{"Content-Length": "abc"})
    assert "UTF-8" in error("PUT", "/api/configs/a", '{"text": "# \\ud800"}')
    assert not (tmp_path / "data" / "configs" / "a.toml").exists()
    (tmp_path / "data" / "configs").mkdir(parents=True, exist_ok=True)
    (tmp_path / "data" / "configs" / "b.toml").write_bytes(b"# K\xe4fer")
    assert client.get("/api/configs/b").status_code == 422
    assert client.post("/api/session", content='{"token": "\\ud800"}', headers=JSON).status_code == 401


def test_one_server_of_a_project_has_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    monkeypatch.setattr("musubi_tuner.ui.server.QUEUE_EVERY", 0.01)

    async def both() -> None:
        queues = [Queue(tmp_path, tmp_path, {}) for _ in range(2)]
        for name, queue in zip("ab", queues, strict=True):
            monkeypatch.setattr(queue, "turn", lambda name=name: turns.append(name))
        tasks = [asyncio.create_task(_turns(queue)) for queue in queues]
        await asyncio.sleep(0.3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(both())
    assert len(turns) > 2 and len(set(turns)) == 1


def test_the_types_of_the_page_are_made_from_those_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--types"]) == 0
    written = Path(form.__file__).parent / "web" / "types.json"
    assert json.loads(capsys.readouterr().out) == json.loads(written.read_text(encoding="utf-8"))


def test_the_built_page_is_the_one_that_is_committed() -> None:
    static = Path(form.__file__).parent / "static"
    page = (static / "index.html").read_text(encoding="utf-8")
    named = set(re.findall(r"/assets/([^\"]+)", page))
    assert {path.name for path in (static / "assets").iterdir()} == named and "__NONCE__" in page


def test_only_what_is_new_in_a_run_is_read(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a start that went on from an earlier state, which cuts the file, and where another start is marked."""
    parsed: list[bytes] = []
    real = Parsed.line
    monkeypatch.setattr(Parsed, "line", lambda self, line: (parsed.append(line), real(self, line))[1])
    folder = make_run(tmp_path)

    def write(mode: str, steps: range, start: int) -> None:
        with (folder / "metrics.jsonl").open(mode) as file:
            file.writelines(
                f'{{"step": {n}, "loss/total": {n + start / 10}, "clock": {{"start": {start}}}}}\n' for n in steps
            )

    def curve() -> tuple[list[int], list[int], int]:
        parsed.clear()
        found = client.get("/api/runs/run/metrics").json()
        return found["curves"]["loss/total"]["steps"], found["starts"], len(parsed)

    write("w", range(1, 5), 1)
    assert curve() == ([1, 2, 3, 4], [], 4)
    write("a", range(5, 7), 1)
    assert curve() == ([1, 2, 3, 4, 5, 6], [], 2)
    assert curve() == ([1, 2, 3, 4, 5, 6], [], 0)
    write("w", range(1, 4), 1)
    write("a", range(4, 9), 2)
    assert curve() == ([1, 2, 3, 4, 5, 6, 7, 8], [4], 8)


def test_a_run_is_resumed_as_it_was_started(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(runs, "start", lambda *given: (started.append(given), os.getpid())[1])
    monkeypatch.setattr(runs, "wait_for", lambda folder, pid: "run")
    folder = make_run(tmp_path, directory=str(tmp_path / "elsewhere"), options=["--set", "optimizer.lr=5e-05"])
    assert client.post("/api/runs/run/resume", json={}).status_code == 422  # it runs
    (folder / "exit.json").write_text(json.dumps({"code": 0, "reason": "stopped"}))
    assert client.post("/api/runs/run/resume", json={}).json()["folder"] == str(folder)
    ((config, log, options, directory, _),) = started
    assert (config, options, directory) == (
        tmp_path / "a.toml",
        ["--set", "optimizer.lr=5e-05"],
        tmp_path / "elsewhere",
    )
    assert log.parent == folder / "logs"


@pytest.mark.parametrize(
    ("how", "caption", "find", "by", "expected"),
    [
        ("replace", "a red ball, red", "red", "blue", "a blue ball, blue"),
        ("remove tag", "cat, red, red ball", "red", "", "cat, red ball"),
        ("remove tag", "red , cat", "red", "", "cat"),
        ("remove tag", "a cat, b\nc, b", "b", "", "a cat\nc"),
        ("remove tag", "a red cat", "red", "", "a red cat"),
        ("before", "a cat", "", "photo of ", "photo of a cat"),
        ("before", "photo of a cat", "", "photo of ", "photo of a cat"),
        ("after", "a cat", "", ", 4k", "a cat, 4k"),
    ],
)
def test_all_captions_are_changed_in_four_ways(how: Any, caption: str, find: str, by: str, expected: str) -> None:
    assert changed(caption, how, find, by) == expected


def test_tags_are_counted_once_per_caption(client: TestClient, tmp_path: Path) -> None:
    document = client.post("/api/config/parse", json={"text": flow_config(tmp_path)}).json()["document"]
    (opened,) = client.post("/api/datasets", json={"document": document}).json()
    for number in range(3):
        (tmp_path / "pictures" / f"{number:02d}.txt").write_text("cat, red, cat" if number else "cat")
    found = {each["tag"]: each["count"] for each in client.get(f"/api/datasets/{opened['id']}/tags").json()}
    assert (found["cat"], found["red"]) == (3, 2)
    wrong = client.post(f"/api/datasets/{opened['id']}/replace", json={"how": "before", "find": "x"})
    assert wrong.status_code == 422 and "empty" in wrong.json()["error"]["message"]


def test_a_paused_queue_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, started = Queue(tmp_path / "queue", tmp_path, {}), list[str]()
    monkeypatch.setattr(queue, "_start", lambda entry: started.append(entry.name))
    monkeypatch.setattr(
        "musubi_tuner.ui.queue.load_documents", lambda document: [SimpleNamespace(run=SimpleNamespace(name="a"))]
    )
    queue.add(RUN)
    queue.pause(True)
    queue.turn()
    assert started == [] and queue.as_data()["paused"]
    queue.pause(False)
    queue.turn()
    assert started == ["a"]


def test_a_sample_says_how_it_was_drawn_and_the_log_is_a_file(client: TestClient, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "sample").mkdir()
    text = PngInfo()
    text.add_text("prompt", "a cat")
    Image.new("RGB", (8, 8)).save(folder / "sample" / "a.png", pnginfo=text)
    assert client.get("/api/runs/run/facts", params={"path": "sample/a.png"}).json() == {"facts": {"prompt": "a cat"}}
    assert client.get("/api/runs/run/log/file").status_code == 404
    (folder / "logs").mkdir()
    (folder / "logs" / "console.log").write_text("step 1\n")
    answer = client.get("/api/runs/run/log/file")
    assert answer.text == "step 1\n" and "attachment" in answer.headers["content-disposition"]


def test_pictures_are_drawn_by_the_command_of_the_family(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path, phase="finished", pid=0)
    commands: list[list[str]] = []
    code = "import os, sys; os.makedirs('run/drawn'); open('run/drawn/a.png', 'w'); sys.exit('out of paint')"

    def launch(words: list[str], log: Path, directory: Path) -> "subprocess.Popen[bytes]":
        commands.append(words)
        with log.open("wb") as out:
            return subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=out, cwd=tmp_path)

    monkeypatch.setattr("musubi_tuner.ui.runs.launch", launch)
    begun = client.post("/api/runs/run/draw", json={"prompt": {"prompt": "a cat", "seed": None}, "images": 2})
    assert begun.status_code == 200, begun.text
    [words] = commands
    assert words[0] == "musubi_tuner.tinyflux_generate_image" and words[words.index("--images_per_prompt") + 1] == "2"
    assert json.loads(Path(words[words.index("--from_file") + 1]).read_text()) == [{"prompt": "a cat"}]
    while (state := client.get("/api/runs/run/draw").json())["state"] == "running":
        time.sleep(0.02)
    assert state == {"state": "failed", "message": "out of paint", "pictures": ["drawn/a.png"]}
    assert folder.joinpath("drawn", "a.png").is_file()


@pytest.mark.parametrize(
    ("text", "body", "reason"),
    [
        ('model = "tf"\n', {}, "has no model.arch"),
        (RUN, {"images": 65}, "images is 65, expected 1 to 64"),
        (RUN, {"prompt": {"prompt": "a cat", "sede": 1}}, "sede"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    client: TestClient, tmp_path: Path, text: str, body: dict[str, Any], reason: str
) -> None:
    make_run(tmp_path, phase="finished", pid=0)
    (tmp_path / "a.toml").write_text(text)
    answer = client.post("/api/runs/run/draw", json={"prompt": {"prompt": "a cat"}, **body})
    assert answer.status_code == 422 and reason in answer.text, answer.text


def test_too_many_open_pages_are_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("musubi_tuner.ui.server.MOST_LISTENERS", 0)
    assert client.get("/api/events").status_code == 429
