"""A stand-in for the Hugging Face Hub on this machine: real HTTP, real huggingface_hub, no network.

Serves ``repositories[id][revision][file] -> bytes`` the way the Hub does as far as huggingface_hub looks: commits,
private and gated repositories. And fails the way networks and servers do, where :attr:`faults` says so.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Fault:
    """``kind``: a status, ``"hang"``, or ``"cut"``: nothing of a file comes."""

    kind: int | str
    commands: tuple[str, ...] = ("GET",)


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
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def reset(self) -> None:
        """Forgets everything."""
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        #: who has this token sees the repository
        self.private: dict[str, str] = {}
        self.gated: set[str] = set()
        #: by a part of the path
        self.faults: dict[str, Fault] = {}
        #: the command and the path of each request
        self.log: list[tuple[str, str]] = []
        self._commits: dict[str, dict[str, bytes]] = {}
        #: called with the path of each request, after it was answered
        self.on_request: Callable[[str], object] | None = None

    def add(self, repository: str, folder: str, *, revision: str = "main", subfolder: str = "") -> None:
        files = self.repositories.setdefault(repository, {}).setdefault(revision, {})
        files |= {str(Path(subfolder, path.name)): path.read_bytes() for path in Path(folder).iterdir()}

    def commit(self, repository: str, revision: str = "main") -> str:
        """The commit that a revision is at: another one as soon as any file is another one."""
        files = self.repositories[repository][revision]
        commit = _sha1(json.dumps([repository, *sorted((name, _sha1(body)) for name, body in files.items())]).encode())
        self._commits[commit] = dict(files)
        return commit

    def __enter__(self) -> StandInHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, token = unquote(handler.path.partition("?")[0]).strip("/"), handler.headers.get("Authorization", "")
        self.log.append((handler.command, path))
        due = [each for part, each in self.faults.items() if part in path and handler.command in each.commands]
        kind = due[0].kind if due else None
        if kind == "hang":
            self._released.wait(120)
            handler.close_connection = True
            return
        found = (kind, {"Retry-After": "0"}, b"") if isinstance(kind, int) else self._found(path, token)
        status, headers, body = found
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET" and kind != "cut":
            handler.wfile.write(body)
        handler.close_connection = handler.close_connection or kind == "cut"
        if self.on_request:
            self.on_request(path)

    def _found(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        repository, revision, name = path.removeprefix("api/models/"), "main", ""
        if "/resolve/" in repository:
            repository, _, rest = repository.partition("/resolve/")
            revision, _, name = rest.partition("/")
        elif "/revision/" in repository:
            repository, _, revision = repository.partition("/revision/")
        is_public = repository in self.repositories and repository not in self.private
        if not is_public and token != f"Bearer {self.private.get(repository)}":
            # without access, a private repository looks like a missing one
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if repository in self.gated and name:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        commit = self.commit(repository, revision) if revision in self.repositories[repository] else revision
        if commit not in self._commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if not name:
            files = [{"rfilename": each} for each in self._commits[commit]]
            return 200, {}, json.dumps({"id": repository, "sha": commit, "siblings": files}).encode()
        if name not in self._commits[commit]:
            return 404, {"X-Repo-Commit": commit, "X-Error-Code": "EntryNotFound"}, b""
        body = self._commits[commit][name]
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{_sha1(body)}"'}, body


def _sha1(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
