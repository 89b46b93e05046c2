"""The web page's server: its routes, in one table. It imports no torch.

Every route but the shell and the opening of a session needs one; see `security`. Errors have one form: ``{"error": {"code", "message"}}``.
"""

import asyncio
import json
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from musubi_tuner import __version__
from musubi_tuner.config import load_documents
from musubi_tuner.errors import ConfigError, UserError, keep_secret
from musubi_tuner.files import folder_lock, write_text
from musubi_tuner.ui import answers, configs, form, preview, runs
from musubi_tuner.ui.answers import Done, NotThere
from musubi_tuner.ui.configs import Configs, Conflict
from musubi_tuner.ui.curves import Curves
from musubi_tuner.ui.drawing import Drawings
from musubi_tuner.ui.folders import Folders
from musubi_tuner.ui.helper import Helper
from musubi_tuner.ui.pictures import HowToChange, Pictures
from musubi_tuner.ui.queue import Queue, folder_of
from musubi_tuner.ui.security import MOST_BODY, Guard, headers

STATIC = Path(__file__).parent / "static"
OPEN = {"/api/health", "/api/session"}
"""Routes of the API that need no session."""
EVENTS_EVERY = 0.5
"""Seconds between two looks at the runs."""
HEARTBEAT = 15.0
MOST_LISTENERS = 50
"""Pages that get events at the same time."""
QUEUE_EVERY = 1.0
"""Seconds between two looks at the queue."""
Next = Callable[[Request], Awaitable[Response]]


class Token(BaseModel):
    """Opens a session."""

    token: str


class Document(BaseModel):
    """A run file as tables. number: comes back with the answer, so that older answers can be told. step: which of its steps is meant."""

    document: dict[str, Any]
    number: int = 0
    step: int = Field(0, ge=0)


class Pair(BaseModel):
    """Two run files to compare; an empty one stands for the defaults."""

    ours: dict[str, Any]
    theirs: dict[str, Any] = Field(default_factory=dict)


class Texts(BaseModel):
    """Texts whose tokens are counted as a run file would cut them."""

    document: dict[str, Any]
    texts: list[str] = Field(max_length=200)


class Pause(BaseModel):
    """Whether the queue starts nothing for now."""

    paused: bool


class Draw(BaseModel):
    """Pictures to draw. prompt: as an object of a prompt file. checkpoint: its name; empty = the newest."""

    prompt: dict[str, Any]
    images: int = 1
    checkpoint: str = ""


class Secret(BaseModel):
    """A secret to keep until the server ends; an empty one is forgotten."""

    name: Literal["HF_TOKEN", "WANDB_API_KEY"]
    value: str


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
    """A change of all captions of a data set. apply: whether it is made, or only shown."""

    how: HowToChange = "replace"
    find: str = ""
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


def make_app(guard: Guard, project: Path, roots: tuple[Path, ...] = ()) -> FastAPI:
    """The server of a project.

    Args:
        project: folder from which relative paths of run files are meant; saved configs lie in its data/configs.
        roots: folders beside the project's whose files may be chosen.
    """
    saved = Configs(project / "data" / "configs", project / "toml")
    secret: dict[str, str] = {}
    queue = Queue(saved.folder / "queue", project, secret)
    helper = Helper(project, runs.environment(os.environ))

    @asynccontextmanager
    async def working(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_turns(queue))
        yield
        task.cancel()
        helper.end()

    app = FastAPI(
        title="musubi-tinyflux", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=working
    )
    app.include_router(_session_routes(guard))
    app.include_router(_config_routes(project, saved, helper))
    app.include_router(_data_routes(Folders((project, *roots)), helper))
    app.include_router(_run_routes(project, saved, queue, secret))
    app.include_router(_page_routes())

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
        return failure(404 if isinstance(problem, NotThere) else 422, "refused", str(problem))

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
                pass  # asked again later: the other server may have ended by then
            except (UserError, OSError, ValueError) as problem:
                print(f"warning: the queue: {problem}", flush=True)
            await asyncio.sleep(QUEUE_EVERY)


class _Busy(Exception):
    """Another server holds the queue."""


def _session_routes(guard: Guard) -> APIRouter:
    """Opening and closing of sessions."""
    router = APIRouter()

    @router.get("/api/health")
    def health() -> dict[str, Any]:
        return {"ok": True, "version": __version__}

    @router.post("/api/session", response_model=answers.Opened)
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
    def current(request: Request) -> answers.Opened:
        session = guard.session(request.headers.get("cookie"))
        return {"csrf": session.csrf if session else ""}

    @router.delete("/api/session/current")
    def close_session(request: Request) -> Done:
        session = guard.session(request.headers.get("cookie"))
        if session:
            guard.close(session)
        return {"ok": True}

    return router


def _config_routes(project: Path, saved: Configs, helper: Helper) -> APIRouter:
    """Run files: the form, checks, what they come to, saved ones."""
    router = APIRouter()

    @router.get("/api/schema", response_model=answers.Schema)
    def schema() -> Response:
        return JSONResponse(form.schema())

    @router.get("/api/system")
    def system() -> answers.System:
        usage = shutil.disk_usage(project)
        return {"project": str(project), "version": __version__, "disk_free": usage.free, "disk_total": usage.total}

    @router.post("/api/config/validate", response_model=answers.Checked)
    def validate(body: Document) -> Response:
        return JSONResponse({"number": body.number, **configs.check(body.document)})

    @router.post("/api/config/preview")
    def preview_config(body: Document) -> answers.Preview:
        try:
            return preview.preview(body.document, body.number, body.step)
        except (UserError, OSError, IndexError) as problem:  # a run file that is being typed has errors
            return {**preview.NOTHING, "number": body.number, "problem": str(problem)}

    @router.post("/api/config/noise")
    def noise(body: Document) -> answers.Density:
        try:
            shares = helper.ask("noise", document=body.document, step=body.step)
        except UserError as problem:
            return {"number": body.number, "problem": str(problem), "shares": []}
        return {"number": body.number, "problem": "", "shares": shares}

    @router.post("/api/config/plan", response_model=answers.PlanText)
    def plan(body: Text) -> Response:
        load_documents(configs.from_toml(body.text))
        path = saved.folder / "planned" / f"{secrets.token_hex(8)}.toml"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, body.text)
            return JSONResponse(helper.ask("plan", path=str(path)))
        finally:
            path.unlink(missing_ok=True)

    @router.post("/api/config/differences")
    def differences(body: Pair) -> list[answers.Difference]:
        return configs.differences(body.ours, body.theirs)

    @router.post("/api/config/toml")
    def write_toml(body: Document) -> answers.Toml:
        return {"text": configs.to_toml(body.document)}

    @router.post("/api/config/parse")
    def parse(body: Text) -> answers.Parsed:
        return {"document": configs.from_toml(body.text)}

    @router.post("/api/config/import", response_model=answers.Imported)
    def import_config(body: Text) -> Any:
        return configs.import_text(body.text, body.name or "config.toml", saved.folder)

    @router.get("/api/explain")
    def explain(name: str) -> answers.Toml:
        return {"text": configs.explain(name)}

    @router.get("/api/configs")
    def list_configs() -> answers.Names:
        return saved.names()

    @router.get("/api/configs/{name}")
    def read_config(name: str, template: bool = False) -> answers.Config:
        text, tag = saved.read(name, template)
        return {"text": text, "tag": tag, "document": configs.from_toml(text)}

    @router.put("/api/configs/{name}")
    def save_config(name: str, body: Saved) -> answers.Tag:
        configs.from_toml(body.text)
        return {"tag": saved.write(name, body.text, body.tag)}

    @router.delete("/api/configs/{name}")
    def remove_config(name: str) -> Done:
        saved.remove(name)
        return {"ok": True}

    return router


def _data_routes(folders: Folders, helper: Helper) -> APIRouter:
    """Folders, pictures and their captions."""
    router, opened = APIRouter(), Pictures()

    @router.get("/api/folders")
    def list_folder(path: str = "") -> answers.Listing:
        return folders.listing(path)

    @router.post("/api/tokens")
    def count_tokens(body: Texts) -> list[list[answers.TokenCount]]:
        try:
            found: list[list[answers.TokenCount]] = helper.ask("tokens", document=body.document, texts=body.texts)
        except UserError:  # the form says what is wrong with its encoders
            found = [[] for _ in body.texts]
        return found

    @router.post("/api/datasets")
    def open_datasets(body: Document) -> list[answers.OpenedSet]:
        return opened.open(body.document)

    @router.get("/api/datasets/{identity}")
    def list_pictures(identity: str, offset: int = 0, limit: int = 48) -> list[answers.Picture]:
        return opened.page(identity, offset, max(1, min(limit, 200)))

    @router.get("/api/datasets/{identity}/thumbnail")
    def thumbnail(identity: str, name: str) -> Response:
        found = opened.thumbnail(identity, name)
        return Response(found, media_type="image/webp", headers={"Cache-Control": "private, max-age=86400"})

    @router.put("/api/datasets/{identity}/caption")
    def write_caption(identity: str, body: Caption) -> answers.CaptionState:
        return opened.write_caption(identity, body.name, body.text, body.tag)

    @router.post("/api/datasets/{identity}/replace")
    def replace_text(identity: str, body: Replacement) -> answers.Replaced:
        return opened.change(identity, body.how, body.find, body.by, body.apply)

    @router.get("/api/datasets/{identity}/tags")
    def count_tags(identity: str) -> list[answers.TagCount]:
        return opened.tags(identity)

    @router.post("/api/datasets/{identity}/undo")
    def undo_replacement(identity: str) -> answers.Undone:
        return opened.undo(identity)

    return router


def _run_routes(project: Path, saved: Configs, queue: Queue, secret: dict[str, str]) -> APIRouter:
    """Runs: started, queued, watched, asked, drawn from."""
    router, drawings, curves = APIRouter(), Drawings(), Curves()

    @router.get("/api/secrets")
    def list_secrets() -> answers.Secrets:
        names = get_args(Secret.model_fields["name"].annotation)
        return {"set": {name: name in secret or bool(os.environ.get(name)) for name in names}}

    @router.put("/api/secrets")
    def keep(body: Secret) -> answers.Secrets:
        secret.pop(body.name, None)
        if body.value:
            keep_secret(body.value)
            secret[body.name] = body.value
        return list_secrets()

    @router.get("/api/queue")
    def list_queue() -> answers.QueueAnswer:
        return queue.as_data()

    @router.post("/api/queue", response_model=answers.Queued, status_code=201)
    def add_to_queue(body: Text) -> Response:
        return JSONResponse(asdict(queue.add(body.text)), 201)

    @router.put("/api/queue")
    def pause_queue(body: Pause) -> answers.QueueAnswer:
        queue.pause(body.paused)
        return queue.as_data()

    @router.delete("/api/queue/{number}")
    def remove_from_queue(number: int) -> Done:
        queue.remove(number)
        return {"ok": True}

    @router.post("/api/queue/{number}/{where}")
    def move_in_queue(number: int, where: Literal["up", "down"]) -> Done:
        queue.move(number, where == "up")
        return {"ok": True}

    @router.get("/api/runs")
    def list_runs() -> list[answers.Run]:
        return [runs.summary(place) for place in runs.places()]

    @router.post("/api/runs", response_model=answers.Started, status_code=201)
    def start_run(body: Start) -> Response:
        unknown = [option for option in body.options if option not in FLAGS]
        if unknown:
            return failure(422, "options", f"{unknown[0]}: a run is started with {', '.join(sorted(FLAGS))} only")
        config = load_documents(configs.from_toml(body.text))[0]
        now = time.strftime("%Y%m%d-%H%M%S")
        snapshot = saved.folder / "started" / f"{config.run.name}-{now}-{secrets.token_hex(2)}.toml"
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        write_text(snapshot, body.text)
        log = snapshot.with_suffix(".log")
        return started(snapshot, log, body.options, project, folder_of(config, project))

    def started(config: Path, log: Path, options: Sequence[str], directory: Path, folder: Path) -> Response:
        """Start a run, and wait a moment for its record."""
        pid = runs.start(config, log, options, directory, secret)
        identity = runs.wait_for(folder, pid)
        if identity is None and not runs.is_alive(pid, time.time()):
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return failure(409, "not_started", "\n".join(said[-12:]) or "the run ended at once")
        return JSONResponse({"id": identity, "pid": pid, "folder": str(folder)}, 201)

    @router.get("/api/runs/{identity}")
    def read_run(identity: str) -> answers.RunDetail:
        return runs.detail(runs.place_of(identity))

    @router.get("/api/runs/{identity}/metrics", response_model=answers.Series)
    def metrics(identity: str, points: int = 1000, tag: str = "") -> Response:
        return JSONResponse(curves.series(runs.place_of(identity), max(10, min(points, 20_000)), tag))

    @router.get("/api/runs/{identity}/log")
    def log(identity: str, offset: int = -65_536, limit: int = 65_536) -> answers.Log:
        return runs.log_text(runs.place_of(identity), offset, max(1, min(limit, 1 << 20)))

    @router.get("/api/runs/{identity}/picture")
    def picture(identity: str, path: str) -> FileResponse:
        return FileResponse(runs.picture(runs.place_of(identity), path))

    @router.get("/api/runs/{identity}/facts")
    def facts(identity: str, path: str) -> answers.PictureFacts:
        return {"facts": runs.picture_facts(runs.picture(runs.place_of(identity), path))}

    @router.get("/api/runs/{identity}/log/file")
    def log_file(identity: str) -> StreamingResponse:
        place = runs.place_of(identity)
        if not (place.folder / runs.CONSOLE).is_file():
            raise NotThere(f"{place.folder.name}: no such log")
        name = quote(f"{place.folder.name}.log")
        attached = {"Content-Disposition": f"attachment; filename*=UTF-8''{name}"}
        return StreamingResponse(runs.log_blocks(place), media_type="text/plain", headers=attached)

    @router.get("/api/runs/{identity}/draw")
    def drawing(identity: str) -> answers.Drawing:
        return drawings.state(runs.place_of(identity))

    @router.post("/api/runs/{identity}/draw")
    def draw(identity: str, body: Draw) -> answers.Drawing:
        return drawings.begin(runs.place_of(identity), body.prompt, body.images, body.checkpoint)

    @router.post("/api/runs/{identity}/resume", response_model=answers.Started, status_code=201)
    def resume(identity: str) -> Response:
        place = runs.place_of(identity)
        options = runs.options_of(place)
        return started(place.config, place.folder / "logs" / "start.log", options, place.directory, place.folder)

    @router.post("/api/runs/{identity}/end")
    def end(identity: str) -> Done:
        runs.end_now(runs.place_of(identity))
        return {"ok": True}

    @router.post("/api/runs/{identity}/{what}", response_model=Done, status_code=202)
    def ask(identity: str, what: str) -> Response:
        place = runs.place_of(identity)
        try:
            runs.request(place, what)
        except ConfigError as problem:
            return failure(409, "state", str(problem))
        return JSONResponse({"ok": True}, 202)

    listeners: set[Request] = set()

    @router.get("/api/events")
    async def events(request: Request) -> Response:
        if len(listeners) >= MOST_LISTENERS:
            return failure(429, "too_many", f"{MOST_LISTENERS} pages are open already; close one")
        return StreamingResponse(_heard(request, listeners), media_type="text/event-stream")

    return router


def _page_routes() -> APIRouter:
    """The built page; anything that is not the API's is its shell."""
    router = APIRouter()

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


async def _heard(request: Request, listeners: set[Request]) -> AsyncIterator[str]:
    """The events for one page, which is among the listeners meanwhile."""
    listeners.add(request)
    try:
        async for event in _events(request):
            yield event
    finally:
        listeners.discard(request)


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
