"""A server in processes of its own: with Ray, or as ``hotswap-lab serve``."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2
from lengths import eventually
from prometheus_client.parser import text_string_to_metric_families

from hotswap_lab.lessons.serving import QUIET, start_ray

os.environ["OMP_NUM_THREADS"] = "1"

TOKEN = "secret"


@contextlib.contextmanager
def running(**args: Any) -> Iterator[str]:
    """The address of a server of the embedded model that runs as long as the block."""
    import ray
    from ray import serve

    from hotswap_lab.serving import app

    for is_last in (False, False, True):
        try:
            address = start_ray(cpus=max(2, int(args.get("replicas", 1))))
            break
        except Exception:  # where a machine has more to do, Ray's own processes don't wait long for each other
            ray.shutdown()
            if is_last:
                raise
    try:
        serve.run(app({"token": TOKEN, **args}), logging_config=QUIET)
        yield address
    finally:
        serve.shutdown()
        ray.shutdown()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def one_process(**args: Any) -> Iterator[str]:
    """The address of ``hotswap-lab serve``, as a user starts it, once it answers; at the end it is interrupted."""
    port = free_port()
    adapters = {"adapters": ",".join(map("=".join, args.pop("adapters").items()))}
    given = [f"{name}={value}" for name, value in {"token": TOKEN, **adapters, **args}.items()]
    command = [sys.executable, "-m", "hotswap_lab", "serve", "--port", f"{port}", "--set", *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        address = f"http://127.0.0.1:{port}"
        try:
            assert eventually(lambda: _is_ready(address), 60), "it did not start"
            yield address
        finally:
            server.send_signal(signal.SIGINT)
            said = server.communicate(timeout=30)[0]
    assert f"Ready: {adapters['adapters'].count('=')} adapters of " in said, said
    assert "Traceback" not in said, said


def _is_ready(address: str) -> bool:
    """A request before the start is refused as too early, and ``/healthz`` says so."""
    try:
        health = httpx2.get(f"{address}/healthz", timeout=30)
    except httpx2.ConnectError:  # the port isn't open yet
        return False
    assert (health.status_code, health.json()["status"]) in ((200, "ok"), (503, "starting"))
    return health.status_code == 200


def states(address: str) -> list[dict]:
    """The states of all replicas; none if there is none that answers."""
    return httpx2.get(f"{address}/healthz", timeout=30).json().get("replicas", [])


def change(address: str, adapters: Mapping[str, str | None]) -> httpx2.Response:
    """The answer to an admin call that changes adapters."""
    header = {"Authorization": f"Bearer {TOKEN}"}
    return httpx2.post(f"{address}/admin/adapters", json=adapters, headers=header, timeout=60)


def numbers(text: str) -> dict[tuple[str, ...], float]:
    """What ``/metrics`` says: the values by their names and labels."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(each.name.removeprefix("hotswap_lab_"), *each.labels.values()): each.value for each in samples}
