"""The web page's server: its routes, in one table. It imports no torch.

Every route but the shell and the opening of a session needs one; see `security`. Errors have one form: ``{"error": {"code", "message"}}``.
"""

import asyncio
import json
import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from musubi_tuner import __version__
from musubi_tuner.config import load_document
from musubi_tuner.errors import ConfigError, UserError
from musubi_tuner.files import folder_lock, write_text
from musubi_tuner.ui import configs, form, preview, runs
from musubi_tuner.ui.configs import Configs, Conflict
from musubi_tuner.ui.pictures import Pictures
from musubi_tuner.ui.queue import Queue
from musubi_tuner.ui.security import MOST_BODY, Guard, headers

STATIC = Path(__file__).parent / "static"
OPEN = {"/api/health", "/api/session"}
"""Routes of the API that need no session."""
EVENTS_EVERY = 0.5
"""Seconds between two looks at the runs."""
HEARTBEAT = 15.0
QUEUE_EVERY = 1.0
"""Seconds between two looks at the queue."""
Next = Callable[[Request], Awaitable[Response]]


class Token(BaseModel):
    """Opens a session."""

    token: str


class Document(BaseModel):
    """A run file as tables. number: comes back with the answer, so that older answers can be told."""

    document: dict[str, Any]
    number: int = 0


class Text(BaseModel):
    """A text. name: of the file that it came from."""

    text: str
    name: str = ""


class Caption(BaseModel):
    """The caption of a picture, which has this name. tag: of what it replaces; absent = there is no file yet."""

    name: str
    text: str
    tag: str | None = None


class Replacement(BaseModel):
    """A text to replace in all captions of a data set. apply: whether it is done, or only shown."""

    find: str
    by: str = ""
    apply: bool = False


class Saved(BaseModel):
    """A config to save. tag: of what it replaces; absent = there is none yet."""

    text: str
    tag: str | None = None


class Start(BaseModel):
    """A run to start. options: flags of train.py without values."""

    text: str
    options: list[str] = Field(default_factory=list)


FLAGS = {"--fresh", "--skip_cache", "--cache_only"}
"""Options with which a run may be started."""


def failure(status: int, code: str, message: str, **details: Any) -> JSONResponse:
    """An error as an answer."""
    return JSONResponse({"error": {"code": code, "message": message, **details}}, status)


def make_app(guard: Guard, project: Path) -> FastAPI:
    """The server of a project.

    Args:
        project: folder from which relative paths of run files are meant; saved configs lie in its data/configs.
    """
    saved = Configs(project / "data" / "configs", project / "toml")
    queue = Queue(saved.folder / "queue", project)

    @asynccontextmanager
    async def working(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_turns(queue))
        yield
        task.cancel()

    app = FastAPI(
        title="musubi-tinyflux", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=working
    )
    app.include_router(_routes(guard, project, saved, queue))

    @app.middleware("http")
    async def guarded(request: Request, call_next: Next) -> Response:
        nonce = secrets.token_urlsafe(16)
        request.state.nonce = nonce
        refused = _refused(guard, request)
        answer = refused or await call_next(request)
        for name, value in headers(nonce).items():
            answer.headers.setdefault(name, value)
        answer.headers.setdefault("Cache-Control", "no-store")
        return answer

    @app.exception_handler(UserError)
    async def of_user(request: Request, problem: Exception) -> JSONResponse:
        return failure(404 if "no such" in str(problem) else 422, "refused", str(problem))

    @app.exception_handler(OSError)
    async def of_system(request: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, OSError)
        return failure(422, "files", f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem))

    @app.exception_handler(UnicodeError)
    async def of_text(request: Request, problem: Exception) -> JSONResponse:
        return failure(422, "text", f"the text, or a file that it would replace, is not UTF-8 ({problem})")

    @app.exception_handler(RequestValidationError)
    async def of_request(request: Request, problem: Exception) -> JSONResponse:
        return failure(422, "request", f"the request is not what this route takes: {problem}")

    @app.exception_handler(Conflict)
    async def of_conflict(request: Request, problem: Exception) -> JSONResponse:
        return failure(412, "conflict", str(problem), tag=problem.tag if isinstance(problem, Conflict) else None)

    return app


def _refused(guard: Guard, request: Request) -> JSONResponse | None:
    """The answer to a request that may not be served; None if it may."""
    path, method = request.url.path, request.method
    if guard.refuses_host(request.headers.get("host", "")):
        return failure(403, "host", "this is not the address of the page")
    changes = method not in ("GET", "HEAD")
    if (changes or path == "/api/events") and guard.refuses_origin(
        request.headers.get("origin"), request.headers.get("sec-fetch-site")
    ):
        return failure(403, "origin", "the request comes from another page")
    if changes:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return failure(415, "content_type", "send JSON")
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MOST_BODY:
            return failure(413, "too_large", f"send at most {MOST_BODY} bytes, and say how many")
    if not path.startswith("/api/") or path in OPEN:
        return None
    session = guard.session(request.headers.get("cookie"))
    if session is None:
        return failure(401, "session", "open the page by the address that the program printed")
    if changes and request.headers.get("x-csrf-token") != session.csrf:
        return failure(403, "csrf", "the request does not come from the page of this session")
    return None


async def _turns(queue: Queue) -> None:
    """Give the queue its turn, for ever; of several servers of a project one does."""
    with ExitStack() as held:
        is_ours = False
        while True:
            try:
                if not is_ours and queue.folder.is_dir():
                    held.enter_context(folder_lock(queue.folder, _Busy))
                    is_ours = True
                if is_ours:
                    await asyncio.to_thread(queue.turn)
            except _Busy:
                pass
            except (UserError, OSError, ValueError) as problem:
                print(f"warning: the queue: {problem}", flush=True)
            await asyncio.sleep(QUEUE_EVERY)


class _Busy(Exception):
    """Another server holds the queue."""


def _routes(guard: Guard, project: Path, saved: Configs, queue: Queue) -> APIRouter:
    """All routes; see `make_app`."""
    router = APIRouter()

    @router.get("/api/health")
    def health() -> dict[str, Any]:
        return {"ok": True, "version": __version__}

    @router.post("/api/session")
    def open_session(body: Token, request: Request) -> Response:
        address = request.client.host if request.client else ""
        if guard.is_blocked(address):
            return failure(429, "too_many", "too many wrong tokens; wait a minute")
        opened = guard.open(body.token, address)
        if opened is None:
            return failure(
                401, "token", "the token is not that of this server; open the address that the program printed"
            )
        answer = JSONResponse({"csrf": opened[1].csrf})
        answer.set_cookie(guard.cookie, opened[0], httponly=True, samesite="strict", path="/")
        return answer

    @router.get("/api/session/current")
    def current(request: Request) -> dict[str, str]:
        session = guard.session(request.headers.get("cookie"))
        return {"csrf": session.csrf if session else ""}

    @router.delete("/api/session/current")
    def close_session(request: Request) -> dict[str, bool]:
        session = guard.session(request.headers.get("cookie"))
        if session:
            guard.close(session)
        return {"ok": True}

    @router.get("/api/schema")
    def schema() -> dict[str, Any]:
        families = [
            {"code": code, "title": spec.title, "defaults": form.defaults_of(code)}
            for code, spec in form.MODELS.items()
        ]
        return {"tabs": form.tabs(), "fields": [asdict(each) for each in form.form_fields()], "families": families}

    @router.get("/api/system")
    def system() -> dict[str, Any]:
        usage = shutil.disk_usage(project)
        return {"project": str(project), "version": __version__, "disk_free": usage.free, "disk_total": usage.total}

    @router.post("/api/config/validate")
    def validate(body: Document) -> dict[str, Any]:
        return {"number": body.number, **configs.check(body.document)}

    @router.post("/api/config/preview")
    def preview_config(body: Document) -> dict[str, Any]:
        try:
            return {"number": body.number, "problem": "", **preview.preview(body.document)}
        except (UserError, OSError) as problem:  # a run file that is being typed has errors
            return {"number": body.number, "problem": str(problem)}

    one_plan = threading.Lock()

    @router.post("/api/config/plan")
    def plan(body: Text) -> Response:
        load_document(configs.from_toml(body.text))
        if not one_plan.acquire(blocking=False):
            return failure(409, "busy", "another plan is being made; try again when it is done")
        path = saved.folder / "planned" / f"{secrets.token_hex(8)}.toml"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, body.text)
            return JSONResponse(runs.plan(path, project))
        finally:
            path.unlink(missing_ok=True)
            one_plan.release()

    @router.post("/api/config/toml")
    def write_toml(body: Document) -> dict[str, str]:
        return {"text": configs.to_toml(body.document)}

    @router.post("/api/config/parse")
    def parse(body: Text) -> dict[str, Any]:
        return {"document": configs.from_toml(body.text)}

    @router.post("/api/config/import")
    def import_config(body: Text) -> dict[str, Any]:
        return configs.import_text(body.text, body.name or "config.toml", saved.folder)

    @router.get("/api/explain")
    def explain(name: str) -> dict[str, str]:
        return {"text": configs.explain(name)}

    @router.get("/api/configs")
    def list_configs() -> dict[str, list[str]]:
        return saved.names()

    @router.get("/api/configs/{name}")
    def read_config(name: str, template: bool = False) -> dict[str, Any]:
        text, tag = saved.read(name, template)
        return {"text": text, "tag": tag, "document": configs.from_toml(text)}

    @router.put("/api/configs/{name}")
    def save_config(name: str, body: Saved) -> dict[str, str]:
        configs.from_toml(body.text)
        return {"tag": saved.write(name, body.text, body.tag)}

    @router.delete("/api/configs/{name}")
    def remove_config(name: str) -> dict[str, bool]:
        saved.remove(name)
        return {"ok": True}

    opened = Pictures()

    @router.post("/api/datasets")
    def open_datasets(body: Document) -> list[dict[str, Any]]:
        return opened.open(body.document)

    @router.get("/api/datasets/{identity}")
    def list_pictures(identity: str, offset: int = 0, limit: int = 48) -> list[dict[str, Any]]:
        return opened.page(identity, offset, max(1, min(limit, 200)))

    @router.get("/api/datasets/{identity}/thumbnail")
    def thumbnail(identity: str, name: str) -> Response:
        found = opened.thumbnail(identity, name)
        return Response(found, media_type="image/webp", headers={"Cache-Control": "private, max-age=86400"})

    @router.put("/api/datasets/{identity}/caption")
    def write_caption(identity: str, body: Caption) -> dict[str, Any]:
        return opened.write_caption(identity, body.name, body.text, body.tag)

    @router.post("/api/datasets/{identity}/replace")
    def replace_text(identity: str, body: Replacement) -> dict[str, Any]:
        return opened.replace(identity, body.find, body.by, body.apply)

    @router.post("/api/datasets/{identity}/undo")
    def undo_replacement(identity: str) -> dict[str, Any]:
        return opened.undo(identity)

    @router.get("/api/queue")
    def list_queue() -> list[dict[str, Any]]:
        return queue.as_data()

    @router.post("/api/queue")
    def add_to_queue(body: Text) -> Response:
        return JSONResponse(asdict(queue.add(body.text)), 201)

    @router.delete("/api/queue/{number}")
    def remove_from_queue(number: int) -> dict[str, bool]:
        queue.remove(number)
        return {"ok": True}

    @router.post("/api/queue/{number}/{where}")
    def move_in_queue(number: int, where: Literal["up", "down"]) -> dict[str, bool]:
        queue.move(number, where == "up")
        return {"ok": True}

    @router.get("/api/runs")
    def list_runs() -> list[dict[str, Any]]:
        return [runs.summary(place) for place in runs.places()]

    @router.post("/api/runs")
    def start_run(body: Start) -> Response:
        unknown = [option for option in body.options if option not in FLAGS]
        if unknown:
            return failure(422, "options", f"{unknown[0]}: a run is started with {', '.join(sorted(FLAGS))} only")
        config = load_document(configs.from_toml(body.text))
        folder = config.locate(config.run.output_dir)
        folder = folder if folder.is_absolute() else project / folder
        now = time.strftime("%Y%m%d-%H%M%S")
        snapshot = saved.folder / "started" / f"{config.run.name}-{now}-{secrets.token_hex(2)}.toml"
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        write_text(snapshot, body.text)
        log = snapshot.with_suffix(".log")
        pid = runs.start(snapshot, log, body.options, project)
        identity = runs.wait_for(folder, pid)
        if identity is None and not runs.is_alive(pid, time.time()):
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return failure(409, "not_started", "\n".join(said[-12:]) or "the run ended at once")
        return JSONResponse({"id": identity, "pid": pid, "folder": str(folder)}, 201)

    @router.get("/api/runs/{identity}")
    def read_run(identity: str) -> dict[str, Any]:
        return runs.detail(runs.place_of(identity))

    @router.get("/api/runs/{identity}/metrics")
    def metrics(identity: str, points: int = 1000) -> dict[str, Any]:
        return runs.series(runs.place_of(identity), max(10, min(points, 20_000)))

    @router.get("/api/runs/{identity}/log")
    def log(identity: str, offset: int = -65_536, limit: int = 65_536) -> dict[str, Any]:
        return runs.log_text(runs.place_of(identity), offset, max(1, min(limit, 1 << 20)))

    @router.get("/api/runs/{identity}/picture")
    def picture(identity: str, path: str) -> FileResponse:
        return FileResponse(runs.picture(runs.place_of(identity), path))

    @router.post("/api/runs/{identity}/{what}")
    def ask(identity: str, what: str) -> Response:
        place = runs.place_of(identity)
        try:
            runs.request(place, what)
        except ConfigError as problem:
            return failure(409, "state", str(problem))
        return JSONResponse({"ok": True}, 202)

    @router.get("/api/events")
    async def events(request: Request) -> StreamingResponse:
        return StreamingResponse(_events(request), media_type="text/event-stream")

    @router.get("/assets/{name}")
    def asset(name: str) -> Response:
        path = STATIC / "assets" / name
        if path not in (STATIC / "assets").iterdir():
            return failure(404, "not_found", "no such file")
        kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".woff2": "font/woff2"}
        return FileResponse(path, media_type=kinds.get(path.suffix, "application/octet-stream"),
                            headers={"Cache-Control": "public, max-age=31536000, immutable"})  # fmt: skip

    @router.get("/{rest:path}")
    def shell(request: Request, rest: str) -> Response:
        if rest.startswith("api/"):
            return failure(404, "not_found", "no such route")
        page = (STATIC / "index.html").read_text(encoding="utf-8")
        return HTMLResponse(page.replace("__NONCE__", request.state.nonce))

    return router


async def _events(request: Request) -> AsyncIterator[str]:
    """What changes in the list of runs, as server-sent events: ``runs`` with all that changed, and a comment as heartbeat."""
    known: dict[str, str] = {}
    quiet = time.monotonic()
    while not await request.is_disconnected():
        found = await asyncio.to_thread(lambda: [runs.summary(place) for place in runs.places()])
        texts = {each["id"]: json.dumps(each, sort_keys=True) for each in found}
        changed = [each for each in found if known.get(each["id"]) != texts[each["id"]]]
        gone = sorted(set(known) - set(texts))
        if changed or gone:
            known, quiet = texts, time.monotonic()
            yield f"event: runs\ndata: {json.dumps({'runs': changed, 'gone': gone})}\n\n"
        elif time.monotonic() - quiet > HEARTBEAT:
            quiet = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(EVENTS_EVERY)
