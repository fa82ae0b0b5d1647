"""``hotswap-lab serve``: the server in one process, as a user starts it, and what it answers."""

from __future__ import annotations

import asyncio
import os
import re
import socket

import pytest
import served
from both_kinds import BothKinds
from lengths import long
from replica_faults import ADAPTERS
from running import one_process
from served import FAMILY, SHORT
from test_api import CHAT, CHATS, TEXT, sent

from hotswap_lab import demo
from hotswap_lab.__main__ import main
from hotswap_lab.serving import BusyError, Register, Request
from hotswap_lab.serving.api import openai_api
from hotswap_lab.serving.arguments import Arguments
from hotswap_lab.serving.one_process import OneProcess
from hotswap_lab.serving.replica import LateError


@pytest.fixture(scope="module")
def address():
    with one_process(adapters=ADAPTERS, timeout=30) as address:
        yield address


@pytest.mark.long
class TestOneProcess(BothKinds):
    pass


def test_before_the_start_all_is_refused(tmp_path):
    backend = OneProcess(Arguments.of({"rows": 2}))

    async def ask_and_change():
        assert await backend.states() == []
        with pytest.raises(BusyError, match="server is starting"):
            await anext(backend.answer(Request(prompt="hotswap>")))
        with pytest.raises(BusyError, match="server is starting"):
            await backend.change({"late": FAMILY["sort"]})
        await backend.start()
        assert (await anext(backend.answer(Request(prompt="hotswap>")))).text == "hotswap"

    asyncio.run(ask_and_change())
    assert list(backend.table.versions) == list(FAMILY)


def test_all_that_needs_the_model_starts_at_the_same_time(monkeypatch):
    """The table is there before the model is."""
    backend = OneProcess(Arguments.of({"rows": 2}))
    api, asked = openai_api(backend, "demo"), {"model": "shout", "prompt": "hotswap>", "messages": [CHAT]}
    calls = [("/healthz", None), ("/v1/models", None)]
    calls += [
        (path, {name: asked[name] for name in ("model", field)})
        for path, field in ((TEXT, "prompt"), (CHATS, "messages"))
    ]
    asyncio.run(Register.change(backend, FAMILY))
    assert [sent(api, *each).status_code for each in calls] == [503] * 4
    monkeypatch.setattr(backend, "_started", served.replica_of(FAMILY))
    assert [sent(api, *each).status_code for each in calls] == [200] * 4


@pytest.mark.long
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
            await anext(backend.answer(Request(prompt="hotswap>")))

    asyncio.run(asyncio.wait_for(ask(), 30))


def test_what_is_wrong_is_said_before_anything_starts(capsys):
    assert main(["serve", "--set", "rows=0"]) == 1
    assert "rows='0'" in capsys.readouterr().err
    assert main(["serve", str(demo.BASE_DIR), "/nowhere"]) == 1
    assert "next:     check the path, or leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", None), long("a" * 70, 0)])
def test_where_it_cannot_listen(capsys, monkeypatch, host, port):
    """One line and the exit code of wrong use, before a model is loaded."""
    monkeypatch.setattr("hotswap_lab.serving.one_process.load_replica", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1] if port is None else port
        with pytest.raises(SystemExit, match="2"):
            main(["serve", "--host", host, f"--port={port}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"hotswap-lab serve: error: .* {host}, port {port}. \w+: .*; pass another --port or --host", line
    )
