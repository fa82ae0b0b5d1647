"""A stand-in for the Hugging Face Hub on this machine: real HTTP, real huggingface_hub, no network.

Serves ``repositories[id][revision][file] -> bytes`` the way the Hub does as far as huggingface_hub looks: commits,
small files directly, weights by a redirect to another host, private and gated repositories. And
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
from urllib.parse import unquote

#: what the Hub keeps in its large file storage, and serves from there
LARGE = (".safetensors", ".bin")


@dataclass
class Fault:
    """``kind``: a status, ``"hang"``, or ``"cut"``: nothing of a large file comes."""

    kind: int | str
    commands: tuple[str, ...] = ("GET",)


@dataclass(frozen=True)
class Request:
    command: str
    path: str
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

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # another host, as far as names go: tokens must not be sent there
        self._storage = f"http://localhost:{port}"

    def reset(self) -> None:
        """Forgets everything."""
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
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
        files |= {str(Path(subfolder, path.name)): path.read_bytes() for path in Path(folder).iterdir()}

    def commit(self, repository: str, revision: str = "main") -> str:
        """The commit that a revision is at: another one as soon as any file is another one."""
        files = self.repositories[repository][revision]
        commit = _sha1(json.dumps([repository, *sorted((name, _sha1(body)) for name, body in files.items())]).encode())
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
        path = handler.path.partition("?")[0]
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = Request(handler.command, unquote(path).strip("/"), headers)
        self.log.append(request)
        due = [each for part, each in self.faults.items() if part in request.path and request.command in each.commands]
        kind = due[0].kind if due else None
        if kind == "hang":
            self._released.wait(120)
            handler.close_connection = True
            return
        status, headers, body = (kind, {"Retry-After": "0"}, b"") if isinstance(kind, int) else self._found(request)
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        is_cut = kind == "cut" and request.path.startswith("storage/")
        if handler.command == "GET" and not is_cut:
            handler.wfile.write(body)
        handler.close_connection = handler.close_connection or is_cut
        if self.on_request:
            self.on_request(request)

    def _found(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        kind, _, rest = request.path.partition("/")
        if kind == "storage":
            digest, _, name = rest.partition("/")
            bodies = [files[name] for files in self._commits.values() if name in files]
            return 200, {}, next(body for body in bodies if _sha256(body) == digest)
        repository, revision, name = request.path.removeprefix("api/models/"), "main", ""
        if "/resolve/" in repository:
            repository, _, rest = repository.partition("/resolve/")
            revision, _, name = rest.partition("/")
        elif "/revision/" in repository:
            repository, _, revision = repository.partition("/revision/")
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if repository not in self.repositories or self.private.get(repository) not in (None, token):
            # for who may not see it, a private repository looks like one that isn't there
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if repository in self.gated and name:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        commit = self.commit(repository, revision) if revision in self.repositories[repository] else revision
        if commit not in self._commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if not name:
            return 200, {}, json.dumps(self._info(repository, commit)).encode()
        if name not in self._commits[commit]:
            return 404, {"X-Repo-Commit": commit, "X-Error-Code": "EntryNotFound"}, b""
        body = self._commits[commit][name]
        if not name.endswith(LARGE):
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{_sha1(body)}"'}, body
        linked = {"X-Linked-Size": str(len(body)), "X-Linked-ETag": f'"{_sha256(body)}"'}
        location = f"{self._storage}/storage/{_sha256(body)}/{name}"
        return 302, {"X-Repo-Commit": commit, **linked, "Location": location}, b""

    def _info(self, repository: str, commit: str) -> dict:
        siblings = []
        for name, body in self._commits[commit].items():
            file = {"rfilename": name, "size": len(body), "blobId": _sha1(body)}
            if name.endswith(LARGE):
                file["lfs"] = {"sha256": _sha256(body), "size": len(body), "pointerSize": 132}
            siblings.append(file)
        return {"id": repository, "sha": commit, "siblings": siblings}


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _sha1(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
