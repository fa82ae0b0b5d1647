"""Streams of FastAPI and Gradio with the real packages: many clients at once, each with its own adapter.

Every step of every stream is computed with the adapter that its request names. No request hangs. A plain generator may
be refused in time; an ``async def`` generator never is.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import KINDS, call, load, save_random_adapter

from hotswap_lab import AdapterPool, ModelInUseError
from hotswap_lab.threads import turns

KIND = KINDS["linear"]
NAMES = ("one", "two", "three")
#: more clients than a server has threads, which are 40
CLIENTS, REQUESTS, STEPS = 60, 80, 3


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """With a short limit for plain generators, which wait in all threads that a server has."""
    monkeypatch.setattr(turns, "STREAM_LIMIT", 1.0)
    folders = {name: save_random_adapter(KIND, tmp_path / name, seed, r=2 + seed) for seed, name in enumerate(NAMES)}
    return AdapterPool(load(KIND, folders["one"]), adapters=folders, progress=False)


def answers(pool: AdapterPool) -> Callable[[], str]:
    """What tells by its outputs alone which adapter the model computes with."""
    expected = {}
    for name in NAMES:
        pool.swap(name)
        expected[name] = call(pool.model, KIND.inputs())
    assert len({float(each.abs().sum()) for each in expected.values()}) == len(NAMES)

    def answer() -> str:
        found = call(pool.model, KIND.inputs())
        return next((name for name in NAMES if torch.equal(found, expected[name])), "torn")

    return answer


def stream(pool: AdapterPool, way: str) -> Callable:
    """A plain or an async generator, as in the recipes, that yields all of its text so far."""
    answer = answers(pool)

    def plain(name: str):
        with pool.using(name):
            text = ""
            for _ in range(STEPS):
                yield (text := f"{text} {answer()}")

    async def awaiting(name: str):
        async with pool.using(name):
            text = ""
            for _ in range(STEPS):
                yield (text := f"{text} {await asyncio.to_thread(answer)}")

    return plain if way == "plain" else awaiting


@contextlib.contextmanager
def served_by_fastapi(stream: Callable) -> Iterator[Callable[[str], str]]:
    fastapi = pytest.importorskip("fastapi")
    from fastapi.responses import StreamingResponse
    from fastapi.testclient import TestClient

    app = fastapi.FastAPI()

    @app.get("/{name}")
    def endpoint(name: str):
        steps = stream(name)
        lines = (
            (f"{each}\n" async for each in steps) if hasattr(steps, "__aiter__") else (f"{each}\n" for each in steps)
        )
        return StreamingResponse(lines)

    with TestClient(app) as client:  # one event loop for all of them
        yield lambda name: client.get(f"/{name}").text.splitlines()[-1]


@contextlib.contextmanager
def served_by_gradio(stream: Callable) -> Iterator[Callable[[str], str]]:
    gradio = pytest.importorskip("gradio")
    from gradio_client import Client

    with gradio.Blocks() as app:
        box, out = gradio.Textbox(), gradio.Textbox()
        box.submit(stream, box, out, api_name="stream", concurrency_limit=None)
    _, address, _ = app.queue(max_size=None).launch(
        prevent_thread_lock=True, quiet=True, show_error=True, server_name="127.0.0.1", max_threads=40
    )
    free = queue.SimpleQueue()
    for _ in range(CLIENTS):  # made before, because this takes a thread of the server, too
        free.put(Client(address, verbose=False, httpx_kwargs={"timeout": 120}))

    def ask(name: str) -> str:
        client = free.get(timeout=120)
        try:
            return client.submit(name, api_name="/stream").result(timeout=120)
        finally:
            free.put(client)

    try:
        yield ask
    finally:
        app.close()


@pytest.mark.long
@pytest.mark.parametrize("way", ["plain", "async"])
@pytest.mark.parametrize("served", [served_by_fastapi, served_by_gradio])
def test_streams(pool, served, way, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")

    def request(number: int) -> str:
        name = NAMES[number % len(NAMES)]
        try:
            return "right" if ask(name).split() == [name] * STEPS else "wrong"
        except Exception as error:
            is_refused = isinstance(error, ModelInUseError) or "in use by a stream" in str(error)
            return "refused" if is_refused else repr(error)

    with served(stream(pool, way)) as ask, ThreadPoolExecutor(CLIENTS) as workers:
        found = Counter(workers.map(request, range(REQUESTS)))
    assert found.keys() <= {"right", "refused"}, found
    assert found["right"] >= (REQUESTS if way == "async" else 1), found
    pool.swap("two")
    assert answers(pool)() == NAMES[-1]
