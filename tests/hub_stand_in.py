"""A stand-in for the Hugging Face Hub on this machine: real HTTP, real huggingface_hub, no network.

Serves ``repositories[id][revision][file] -> bytes`` the way the Hub does as far as ``hf_hub_download`` looks.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class StandInHub:
    """Use as a context manager; ``url`` is what ``HF_ENDPOINT`` must be set to."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repository: str, folder: str, *, revision: str = "main", subfolder: str = "") -> None:
        files = self.repositories.setdefault(repository, {}).setdefault(revision, {})
        for path in Path(folder).iterdir():
            files[f"{subfolder}/{path.name}" if subfolder else path.name] = path.read_bytes()

    def __enter__(self) -> StandInHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = unquote(request.path.partition("?")[0]).strip("/")
        self.requests.append((request.command, path))
        repository, _, rest = path.removeprefix("api/models/").partition("/resolve/")
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        # for who may not see it, a private repository looks like one that isn't there
        hidden = self.private.get(repository) not in (None, token)
        if repository not in self.repositories or hidden:
            return self._send(request, 401 if hidden else 404, {"X-Error-Code": "RepoNotFound"}, b"", with_body)
        revision, _, file = rest.partition("/")
        files = self.repositories[repository].get(revision)
        if files is None:
            return self._send(request, 404, {"X-Error-Code": "RevisionNotFound"}, b"", with_body)
        if file not in files:
            return self._send(request, 404, {"X-Error-Code": "EntryNotFound"}, b"", with_body)
        body = files[file]
        commit = hashlib.sha1(json.dumps([repository, revision]).encode()).hexdigest()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit}
        return self._send(request, 200, headers, body, with_body)

    def _send(self, request, status: int, headers: dict[str, str], body: bytes, with_body: bool) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if with_body:
            request.wfile.write(body)
