"""A server in one process: one replica and its register behind OpenAI's API, without Ray."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ..core.errors import HotswapError, refusal
from .answers import Piece, Request
from .api import openai_api
from .arguments import Arguments, load_replica
from .replica import BusyError, LateError, Replica
from .table import Register, Table, Version

#: seconds for the head of a connection's first request, and for answers to end once the server is told to
HEAD_SECONDS, END_SECONDS = 30, 30
#: connections that wait, and that asyncio accepts at a time: four times as many are open before one of them is closed
WAITING, AT_A_TIME = 128, 16
#: of each process, which needs other files, too
MOST_CONNECTIONS = 800
with contextlib.suppress(ImportError):  # on Windows there is no such limit
    import resource

    MOST_CONNECTIONS = min(10_000, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100 - 4 * AT_A_TIME))


class PortError(HotswapError):
    """The server can't listen where it is told to."""


class OneProcess(Register):
    """What answers behind the API: :meth:`start` reads the model, and until then all requests are refused as too early.

    Parameters
    ----------
    arguments:
        See :meth:`Arguments.of`. There is one replica, whatever their number of replicas is.
    """

    def __init__(self, arguments: Arguments):
        super().__init__(arguments.name)
        self.arguments: Arguments = arguments
        self._started: Replica | None = None

    async def start(self) -> None:
        """Read the adapters and the model."""
        given = self.arguments
        versions = list((await super().change(given.adapters)).versions.values())
        replica = await asyncio.to_thread(load_replica, given.base, versions, given.options)
        if given.options.warm:
            print("The model is loaded. Warming up ...", flush=True)
            await replica.warm()
        self._started = replica

    @property
    def replica(self) -> Replica:
        """The replica; raises :class:`BusyError` while it is starting."""
        if self._started is None:
            raise BusyError(refusal("starting"))
        return self._started

    async def change(self, paths: Mapping[str, str | None], is_all: bool = False) -> Table:
        _ = self.replica  # what changes before the first table is there would be lost
        return await super().change(paths, is_all)

    async def load(self, versions: Sequence[Version]) -> None:
        if self._started:
            await asyncio.to_thread(self._started.load, versions)

    async def answer(self, request: Request) -> AsyncGenerator[Piece, None]:
        async with contextlib.aclosing(self.replica.answer(request)) as pieces:
            try:
                while piece := await asyncio.wait_for(anext(pieces, None), self.arguments.options.timeout):
                    yield piece
            except asyncio.TimeoutError:
                raise LateError(refusal("too_late")) from None

    async def states(self) -> list[dict[str, Any]]:
        return [self._started.state] if self._started else []


class Connection(AutoHTTPProtocol):
    """A connection, closed if no request comes in time, or if there are more than this process may have files."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.close()
        self.loop.call_later(HEAD_SECONDS, lambda: self.cycle is None and transport.close())


async def run(args: Mapping[str, Any], host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until the process is interrupted. ``args`` are those of :func:`hotswap_lab.serving.app`."""
    backend = OneProcess(Arguments.of(args))
    given = backend.arguments
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, UnicodeError) as error:
        raise PortError(refusal("no_port", host=host, port=port, error=error)) from None
    logging.getLogger("ray.serve").addHandler(logging.StreamHandler())  # the name of the log with Ray, too
    logging.getLogger("ray.serve").setLevel(logging.INFO)
    api = openai_api(backend, given.name, given.token, given.options.longest_prompt)
    limits = dict(backlog=AT_A_TIME, timeout_graceful_shutdown=END_SECONDS, http=Connection)
    server = uvicorn.Server(uvicorn.Config(api, **limits))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await backend.start()
        listener.listen(WAITING)  # uvicorn has given the system its own number, asyncio's
        if not server.should_exit:  # by Ctrl-C
            where = f"in {backend.replica.pool.model.dtype}, http://{host}:{port}/docs"
            print(f"Ready: {len(given.adapters)} adapters of {given.name} {where}", flush=True)
    except BaseException:  # of a model that can't be read, or Ctrl-C: the port is free again before it is said
        server.should_exit = True
        await serving
        raise
    await serving
