"""A hub on this machine: the part of its HTTP interface that huggingface_hub uses to upload and to download.

Repositories are dictionaries of files. What the server was asked is kept, so that a test can read it.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """What the server was asked, and the files that it was given.

    Attributes:
        status: answer to every request; a refusal repeats the token, as a careless proxy might. silent: never answer.
        troubles: answers to the first requests, one each; then `status` counts. gate: while it is not set, requests wait.
        over: the test is over. asked: the first request is here.
        repositories: ``owner/name`` -> path -> content, for downloads. gated: of them, those that need a licence.
        downloads: paths of the files that were fetched.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.status, self.silent = 200, False
        self.troubles: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.over = threading.Event()
        self.asked = threading.Event()
        self.tokens: set[str | None] = set()
        self.created: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    """The endpoints that creating a repository, committing, listing and downloading files use."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        hub.tokens.add(self.headers.get("authorization"))
        hub.asked.set()
        if hub.silent:
            hub.over.wait()
            return
        while not hub.gate.wait(0.02) and not hub.over.is_set():
            pass
        status = hub.troubles.pop(0) if hub.troubles else hub.status
        if status != 200:
            self.answer({"error": f"refused: {self.headers.get('authorization')}"}, status)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            made = hub.created[-1]
            self.answer({"url": f"{hub.url}/{made['organization']}/{made['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", self.path):
            # Weights go to the large file storage, small texts into the commit, as on the real hub.
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [self.actions(wanted) for wanted in json.loads(body)["objects"]]
            self.answer({"transfer": "basic", "objects": objects})
        elif self.path == "/lfs/verify":
            wanted = json.loads(body)
            known = len(hub.blobs.get(wanted["oid"], b"")) == wanted["size"]
            self.answer({}, 200 if known else 404)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            hub.commits.append(self.commit([json.loads(line) for line in body.splitlines() if line]))
            self.answer({"commitUrl": f"{hub.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({"error": "unknown"}, 404)

    def do_GET(self) -> None:
        """List the files of a repository, or send one of them."""
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            files = self.files(listing[1], listing[2] or "main")
            if files is not None:
                self.answer({"id": listing[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif wanted := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = self.files(wanted[1], wanted[2])
            if files is None:
                return
            if wanted[1] in hub.gated:
                self.refuse(403, "GatedRepo")
            elif wanted[3] not in files:
                self.refuse(404, "EntryNotFound")
            else:
                if self.command == "GET":
                    hub.downloads.append(wanted[3])
                content = files[wanted[3]]
                etag = hashlib.sha256(content).hexdigest()
                self.send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """Files of a repository; None after a refusal."""
        if repo not in self.server.repositories:
            self.refuse(401, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        else:
            return self.server.repositories[repo]
        return None

    def refuse(self, status: int, code: str) -> None:
        self.send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def send(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_PUT(self) -> None:
        content = self.body()
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def actions(self, wanted: dict[str, Any]) -> dict[str, Any]:
        places = {"upload": f"/lfs/{wanted['oid']}", "verify": "/lfs/verify"}
        actions = {name: {"href": self.server.url + place} for name, place in places.items()}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": actions}

    def commit(self, lines: list[dict[str, Any]]) -> tuple[str, dict[str, bytes]]:
        """Message and files of a commit."""
        message, files = "", {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                assert (line["key"], value["encoding"]) == ("file", "base64")
                files[value["path"]] = base64.b64decode(value["content"])
        return message, files

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, value: dict[str, Any], status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status=status)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: the tests read what is printed."""


def environment(url: str, home: str) -> dict[str, str]:
    """Variables that point huggingface_hub at the server; it reads them when it is imported."""
    return {
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": home,
        "NO_PROXY": "127.0.0.1",
    }


@contextmanager
def serving() -> Iterator[Hub]:
    """A running server."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
