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

#: seconds for the head of a connection's first request, and for answers to end when the server is stopped
HEAD_SECONDS, END_SECONDS = 30, 30
#: connections that may wait, and that asyncio accepts at a time: four times as many are open before one is closed
WAITING, AT_A_TIME = 128, 16
#: the limit of each process, which needs files for other things, too
MOST_CONNECTIONS = 800
with contextlib.suppress(ImportError):  # Windows has no such limit
    import resource

    MOST_CONNECTIONS = min(10_000, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100 - 4 * AT_A_TIME))


class PortError(HotswapError):
    """The server can't listen at this host and port."""


class OneProcess(Register):
    """The backend of the API. :meth:`start` reads the model; until then, all requests are refused as too early.

    Parameters
    ----------
    arguments:
        See :meth:`Arguments.of`. There is one replica; their number of replicas is ignored.
    """

    def __init__(self, arguments: Arguments):
        super().__init__(arguments.name)
        self.arguments: Arguments = arguments
        self._started: Replica | None = None

    async def start(self) -> None:
        """Read the adapters and the model."""
        arguments = self.arguments
        versions = list((await super().change(arguments.adapters)).versions.values())
        replica = await asyncio.to_thread(load_replica, arguments.base, versions, arguments.options)
        if arguments.options.warm:
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
        _ = self.replica  # a change before the first table would be lost
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
    arguments = backend.arguments
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, UnicodeError) as error:
        raise PortError(refusal("no_port", host=host, port=port, error=error)) from None
    logging.getLogger("ray.serve").addHandler(logging.StreamHandler())  # the name of the log with Ray, too
    logging.getLogger("ray.serve").setLevel(logging.INFO)
    api = openai_api(backend, arguments.name, arguments.token, arguments.options.longest_prompt)
    limits = dict(backlog=AT_A_TIME, timeout_graceful_shutdown=END_SECONDS, http=Connection)
    server = uvicorn.Server(uvicorn.Config(api, **limits))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await backend.start()
        listener.listen(WAITING)  # uvicorn has set asyncio's number
        if not server.should_exit:  # by Ctrl-C
            where = f"in {backend.replica.pool.model.dtype}, http://{host}:{port}/docs"
            print(f"Ready: {len(arguments.adapters)} adapters of {arguments.name} {where}", flush=True)
    except BaseException:  # a model that can't be read, or Ctrl-C: the port is free again before the message
        server.should_exit = True
        await serving
        raise
    await serving
