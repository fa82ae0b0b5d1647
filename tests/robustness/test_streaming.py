"""Streams of FastAPI and Gradio with the real packages: many clients at once, each with its own adapter.

Every step of every stream is computed with the adapter that its request names. No request hangs. A plain generator may
be refused in time; an ``async def`` generator never is.
"""

from __future__ import annotations

import asyncio
import queue
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import KINDS, call, load, save_random_adapter

from hotswap_lab import AdapterPool, ModelInUseError
from hotswap_lab.threads import turns

KIND = KINDS["linear"]
NAMES = ("one", "two", "three")
REQUESTS, STEPS = 100, 3


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


def streams(pool: AdapterPool) -> tuple[Callable[[str], Iterator[str]], Callable[[str], AsyncIterator[str]]]:
    """A plain and an async generator, as in the recipes."""
    answer = answers(pool)

    def plain(name: str) -> Iterator[str]:
        with pool.using(name):
            for _ in range(STEPS):
                yield answer()

    async def awaiting(name: str) -> AsyncIterator[str]:
        async with pool.using(name):
            for _ in range(STEPS):
                yield await asyncio.to_thread(answer)

    return plain, awaiting


def check(found: Counter, way: str, pool: AdapterPool) -> None:
    assert found.total() == REQUESTS
    assert not found["wrong"], found
    assert found["right"] >= (REQUESTS if way == "async" else 1), found
    pool.swap("two")
    assert answers(pool)() == NAMES[-1]


@pytest.mark.parametrize("clients", [30, 60])
@pytest.mark.parametrize("way", ["plain", "async"])
def test_fastapi(pool, way, clients):
    httpx = pytest.importorskip("httpx")
    fastapi = pytest.importorskip("fastapi")
    from fastapi.responses import StreamingResponse

    app, found = fastapi.FastAPI(), Counter()
    plain, awaiting = streams(pool)

    @app.get("/plain/{name}")
    def plain_endpoint(name: str):
        return StreamingResponse(f"{each} " for each in plain(name))

    @app.get("/async/{name}")
    async def async_endpoint(name: str):
        return StreamingResponse(each + " " async for each in awaiting(name))

    async def request(client, number: int) -> None:
        name = NAMES[number % len(NAMES)]
        try:
            text = (await client.get(f"/{way}/{name}")).text
        except ModelInUseError:
            found["refused"] += 1
        else:
            found["right" if text.split() == [name] * STEPS else "wrong"] += 1

    async def everything() -> None:
        free = asyncio.Semaphore(clients)

        async def one(number: int) -> None:
            async with free:
                await request(client, number)

        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", timeout=None
        ) as client:
            await asyncio.gather(*map(one, range(REQUESTS)))

    asyncio.run(asyncio.wait_for(everything(), 120))
    check(found, way, pool)


@pytest.mark.parametrize("clients", [30, 60])
@pytest.mark.parametrize("way", ["plain", "async"])
def test_gradio(pool, way, clients, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio")
    from gradio_client import Client

    plain, awaiting = streams(pool)

    def stream(name: str):
        text = ""
        for each in plain(name):
            text += each + " "
            yield text

    async def stream_awaiting(name: str):
        text = ""
        async for each in awaiting(name):
            text += each + " "
            yield text

    with gradio.Blocks() as app:
        box, out = gradio.Textbox(), gradio.Textbox()
        function = stream if way == "plain" else stream_awaiting
        box.submit(function, box, out, api_name="stream", concurrency_limit=None)
    _, address, _ = app.queue(max_size=None).launch(
        prevent_thread_lock=True, quiet=True, show_error=True, server_name="127.0.0.1", max_threads=40
    )
    found, free = Counter(), queue.SimpleQueue()
    for _ in range(clients):  # made before, since this takes a thread of the server, too
        free.put(Client(address, verbose=False, httpx_kwargs={"timeout": 120}))

    def request(number: int) -> None:
        name = NAMES[number % len(NAMES)]
        client = free.get()
        try:
            text = client.submit(name, api_name="/stream").result(timeout=120)
            outcome = "right" if text.split() == [name] * STEPS else "wrong"
        except Exception as error:
            outcome = "refused" if "in use by a stream" in str(error) else repr(error)
        free.put(client)
        found[outcome] += 1

    try:
        with ThreadPoolExecutor(clients) as workers:
            list(workers.map(request, range(REQUESTS)))
    finally:
        app.close()
    assert found.keys() <= {"right", "wrong", "refused"}, found
    check(found, way, pool)
