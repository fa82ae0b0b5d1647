"""A stand-in for the Hugging Face Hub on this machine: real HTTP, real huggingface_hub, no network.

Serves ``repositories[id][revision][file] -> bytes`` the way the Hub does as far as huggingface_hub looks: commits,
small files directly, weights by a redirect to another host, private and gated repositories, the list of models. And
fails the way networks and servers do, where :attr:`faults` says so.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

#: what the Hub keeps in its large file storage, and serves from there
LARGE = (".safetensors", ".bin")
#: the names of the Hub's API for what is in ``StandInHub.about``, with what it says where nothing is said
ABOUT = {"downloads": 0, "gated": False, "lastModified": "2025-01-31T12:00:00.000Z", "tags": []}


@dataclass
class Fault:
    """``kind``: a status, ``"hang"``, or ``"cut"``: nothing of a large file comes."""

    kind: int | str
    commands: tuple[str, ...] = ("GET",)


@dataclass(frozen=True)
class Request:
    command: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]


class StandInHub:
    """Use as a context manager; ``url`` is what ``HF_ENDPOINT`` must be set to."""

    def __init__(self) -> None:
        self.reset()
        self._released = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub._answer(self)

            def do_GET(self) -> None:
                hub._answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # another host, as far as names go: tokens must not be sent there
        self._storage = f"http://localhost:{port}"

    def reset(self) -> None:
        """Forgets everything."""
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        #: what the API says of a repository, beside its files
        self.about: dict[str, dict] = {}
        #: who has this token sees the repository
        self.private: dict[str, str] = {}
        self.gated: set[str] = set()
        #: by a part of the path
        self.faults: dict[str, Fault] = {}
        self.log: list[Request] = []
        self._commits: dict[str, dict[str, bytes]] = {}
        #: called with each request, after it was answered
        self.on_request: Callable[[Request], object] | None = None

    def add(self, repository: str, folder: str, *, revision: str = "main", subfolder: str = "") -> None:
        files = self.repositories.setdefault(repository, {}).setdefault(revision, {})
        for path in Path(folder).iterdir():
            files[f"{subfolder}/{path.name}" if subfolder else path.name] = path.read_bytes()

    def commit(self, repository: str, revision: str = "main") -> str:
        """The commit that a revision is at: another one as soon as any file is another one."""
        files = self.repositories[repository][revision]
        listing = [repository, *sorted((name, hashlib.sha1(body).hexdigest()) for name, body in files.items())]
        commit = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self._commits[commit] = dict(files)
        return commit

    @property
    def requests(self) -> list[tuple[str, str]]:
        return [(request.command, request.path) for request in self.log]

    def __enter__(self) -> StandInHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, query = handler.path.partition("?")
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = Request(handler.command, unquote(path).strip("/"), parse_qs(query), headers)
        self.log.append(request)
        due = [each for part, each in self.faults.items() if part in request.path and request.command in each.commands]
        kind = due[0].kind if due else None
        if kind == "hang":
            self._released.wait(120)
            handler.close_connection = True
        elif isinstance(kind, int):
            self._send(handler, kind, {"Retry-After": "0"})
        elif request.path == "api/models":
            self._list(handler, request)
        elif request.path.startswith("api/models/"):
            repository, _, revision = request.path.removeprefix("api/models/").partition("/revision/")
            if (commit := self._find(handler, request, repository, revision or "main")) is not None:
                self._send(handler, 200, {}, json.dumps(self._info(repository, commit)).encode())
        elif request.path.startswith("storage/"):
            _, digest, name = request.path.split("/", 2)
            bodies = (files[name] for files in self._commits.values() if name in files)
            body = next(body for body in bodies if _sha256(body) == digest)
            self._send(handler, 200, {}, body, shown=0 if kind == "cut" else len(body))
        else:
            self._resolve(handler, request)
        if self.on_request:
            self.on_request(request)

    def _find(self, handler: BaseHTTPRequestHandler, request: Request, repository: str, revision: str) -> str | None:
        """The commit of a revision; None if an answer was sent instead."""
        if not self._is_visible(repository, request):
            # for who may not see it, a private repository looks like one that isn't there
            return self._send(handler, 401, {"X-Error-Code": "RepoNotFound"})
        if repository in self.gated and "/resolve/" in request.path:
            return self._send(handler, 403, {"X-Error-Code": "GatedRepo"})
        if revision in self.repositories[repository]:
            return self.commit(repository, revision)
        if revision in self._commits:
            return revision
        return self._send(handler, 404, {"X-Error-Code": "RevisionNotFound"})

    def _is_visible(self, repository: str, request: Request) -> bool:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        return repository in self.repositories and self.private.get(repository) in (None, token)

    def _resolve(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        repository, _, rest = request.path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if (commit := self._find(handler, request, repository, revision)) is None:
            return
        headers = {"X-Repo-Commit": commit}
        if name not in self._commits[commit]:
            self._send(handler, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        elif name.endswith(LARGE):
            body = self._commits[commit][name]
            headers["X-Linked-Size"], headers["X-Linked-ETag"] = str(len(body)), f'"{_sha256(body)}"'
            headers["Location"] = f"{self._storage}/storage/{_sha256(body)}/{name}"
            self._send(handler, 302, headers)
        else:
            body = self._commits[commit][name]
            self._send(handler, 200, {**headers, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}, body)

    def _list(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        def value(key: str, default: object) -> str:
            return request.query.get(key, [str(default)])[0]

        tags = set(request.query.get("filter", []))
        found = [self._info(name, self.commit(name)) for name in self.repositories if self._is_visible(name, request)]
        found = [info for info in found if tags <= set(info["tags"])]
        found.sort(key=lambda info: info.get(value("sort", "id")), reverse="sort" in request.query)
        page = found[: int(value("limit", 1000))]
        for info in page:  # sizes are told of one repository only
            info["siblings"] = [{"rfilename": file["rfilename"]} for file in info["siblings"]]
        self._send(handler, 200, {}, json.dumps(page).encode())

    def _info(self, repository: str, commit: str) -> dict:
        siblings = []
        for name, body in self._commits[commit].items():
            file = {"rfilename": name, "size": len(body), "blobId": hashlib.sha1(body).hexdigest()}
            if name.endswith(LARGE):
                file["lfs"] = {"sha256": _sha256(body), "size": len(body), "pointerSize": 132}
            siblings.append(file)
        return {**ABOUT, **self.about.get(repository, {}), "id": repository, "sha": commit, "siblings": siblings}

    def _send(self, handler, status: int, headers: Mapping[str, str], body: bytes = b"", shown: int | None = None):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body[:shown])
            handler.close_connection = shown is not None and shown < len(body)


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
