"""Over real sockets: connections that send nothing, half a request, or read no answer."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import subprocess
import sys

import httpx2
import pytest
from lengths import eventually
from running import free_port

from hotswap_lab import demo
from hotswap_lab.__main__ import main

#: the server as a user starts it, but with less patience, and few files
START = """import resource, sys
from hotswap_lab.serving import api, one_process
one_process.HEAD_SECONDS, one_process.END_SECONDS, api.BODY_SECONDS = 2, 2, 60
one_process.MOST_CONNECTIONS = 60
resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))
from hotswap_lab.__main__ import main
sys.exit(main(sys.argv[1:]))"""
ADAPTER = f"shout={demo.adapter_path('shout')}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A started server: its process, its port, and the file of its log."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-c", START, "serve", "--port", f"{port}", "--set", f"adapters={ADAPTER}", "warm=0"]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            assert eventually(lambda: "Ready" in log.read_text() or process.poll() is not None, 90), log.read_text()
            yield process, port, log
        finally:
            process.kill()


def half_a_body(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    return connection


def answers_never_read(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.settimeout(2)
    with contextlib.suppress(OSError):  # the server reads no more
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000)
    return connection


@pytest.mark.long
def test_a_connection_without_a_request_is_closed(server):
    with contextlib.ExitStack() as stack:
        connections = []
        for sent in (b"", b"GET /healthz HTT", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"):
            connections += [stack.enter_context(socket.create_connection(("127.0.0.1", server[1]), timeout=20))]
            connections[-1].sendall(sent)
        assert [each.recv(1) for each in connections] == [b""] * 3


@pytest.mark.long
def test_more_connections_than_files(server):
    _, port, log = server
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 600:
        pytest.skip("this process may not have as many itself")
    with contextlib.ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        assert eventually(lambda: is_healthy(port), 20)
    assert "Too many open files" not in log.read_text()


def is_healthy(port: int) -> bool:
    with contextlib.suppress(httpx2.HTTPError):
        return httpx2.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200
    return False


@pytest.mark.long
def test_a_server_ends_whatever_its_clients_do(server):
    """The last test with it."""
    process, port, _ = server
    with half_a_body(port), answers_never_read(port):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM  # which a shell, and docs/serving.md, call 143
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_port_that_another_program_has_is_said_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("hotswap_lab.serving.one_process.load_replica", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["serve", "--port", f"{port}"])
        printed = capsys.readouterr()
        assert f"can't listen at 127.0.0.1, port {port}" in printed.err
        assert "Ready" not in printed.out + printed.err
