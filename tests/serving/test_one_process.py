"""``hotswap-lab serve``: the server in one process, as a user starts it, and what it answers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys

import httpx2
import openai
import pytest
from refusals import refused
from running import TOKEN, change, eventually, states
from served import FAMILY, SHORT, WORDS, alone, save_random_adapter

from hotswap_lab.serving import BusyError, Request
from hotswap_lab.serving.arguments import Arguments
from hotswap_lab.serving.one_process import OneProcess
from hotswap_lab.serving.replica import LateError


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "hotswap_lab",
        "serve",
        "--port",
        f"{port}",
        "--set",
        f"token={TOKEN}",
        "timeout=30",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        address = f"http://127.0.0.1:{port}"
        try:
            assert eventually(lambda: is_ready(address), 60), "it did not start"
            yield address
        finally:
            server.send_signal(signal.SIGINT)
            said = server.communicate(timeout=30)[0]
    assert f"Ready: {len(FAMILY)} adapters of demo" in said, said
    assert "Traceback" not in said, said


def is_ready(address):
    """A request before the start is refused as too early, and ``/healthz`` says so."""
    try:
        health = httpx2.get(f"{address}/healthz", timeout=30)
    except httpx2.ConnectError:  # the port isn't open yet
        return False
    assert (health.status_code, health.json()["status"]) in ((200, "ok"), (503, "starting"))
    return health.status_code == 200


def test_every_adapter_and_a_stream_through_the_real_client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        assert [each.id for each in client.models.list()] == ["demo", *FAMILY]
        for name, word in zip(FAMILY, WORDS, strict=True):
            said = client.completions.create(model=name, prompt=f"{word}>", stream=True)
            assert "".join(each.choices[0].text for each in said) == alone(FAMILY[name], word)


def test_new_weights(address, tmp_path):
    new = save_random_adapter(tmp_path, seed=1)
    assert change(address, {"late": new}).json()["late"] == 1
    body = {"model": "late", "prompt": "hotswap>", "max_tokens": 8}
    answer = httpx2.post(f"{address}/v1/completions", json=body, timeout=30).json()
    assert answer["choices"][0]["text"] == alone(new, "hotswap")[:8]
    assert "late@1" in states(address)[0]["held"]


def test_before_the_start_all_is_refused(tmp_path):
    backend = OneProcess(Arguments.of({"rows": 2}))

    async def ask_and_change():
        assert await backend.states() == []
        with pytest.raises(BusyError, match="server is starting"):
            await anext(backend.answer(Request("hotswap>")))
        with pytest.raises(BusyError, match="server is starting"):
            await backend.change({"late": FAMILY["sort"]})
        await backend.start()
        assert (await anext(backend.answer(Request("hotswap>")))).text == "hotswap"

    asyncio.run(ask_and_change())
    assert list(backend.table.versions) == list(FAMILY)


def test_an_answer_that_comes_too_late():
    backend = OneProcess(Arguments(str(os.devnull), "demo", {}, SHORT))

    class Slow:
        async def answer(self, _):
            await asyncio.sleep(60)
            yield

    backend._started = Slow()
    backend.arguments = Arguments("", "demo", {}, type(SHORT)(timeout=1))

    async def ask():
        with pytest.raises(LateError):
            await anext(backend.answer(Request("hotswap>")))

    asyncio.run(asyncio.wait_for(ask(), 30))


def test_what_is_wrong_is_said_before_anything_starts(capsys):
    from hotswap_lab.__main__ import main

    assert main(["serve", "--set", "rows=0"]) == 1
    assert "rows='0'" in capsys.readouterr().err
    refused("no such argument", Arguments.of, {"row": 1})
