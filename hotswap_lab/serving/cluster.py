"""Replicas behind Ray Serve: a front with OpenAI's API, a register, and as many replicas as are wanted.

Ray Serve routes, scales, restarts and counts. Ours is what it asks for: a class for each of the three, and ``app``.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from ..core.errors import HotswapError, refusal
from .answers import Piece, Request
from .api import openai_api
from .arguments import Arguments, folders_of, load_replica
from .replica import BusyError, LateError, Options
from .table import Register, Table, Version

LOG = logging.getLogger("ray.serve")
#: the names of the deployments, in a Serve config file too
FRONT, REGISTER, REPLICA = "Front", "Register", "Replica"
#: the register is asked ten times a second, and a replica for each request that the front has logged already
QUIET = {"enable_access_log": False}


@contextlib.contextmanager
def in_our_words() -> Iterator[None]:
    """Turns Ray's errors into the one that a deployment raised, or a refusal that says why no answer came."""
    try:
        yield
    except (RayActorError, DeploymentUnavailableError):
        raise BusyError(refusal("replica_lost")) from None
    except BackPressureError:
        raise BusyError(refusal("too_many_wait")) from None
    except asyncio.TimeoutError:
        raise LateError(refusal("too_late")) from None
    except RayTaskError as error:  # which is one of those, too, if that was raised there
        raise error.cause from None


@serve.deployment(name=REGISTER, ray_actor_options={"num_cpus": 0}, logging_config=QUIET)
class RegisterDeployment(Register):
    """The register. Its ``user_config`` are the adapters: ``{"adapters": {name: path}}``."""

    async def reconfigure(self, config: dict[str, Any]) -> None:
        try:
            table = await self.change(folders_of(config["adapters"]), is_all=True)
            LOG.info("user_config: %s", ", ".join(map(str, table.versions.values())) or "no adapters")
        except HotswapError:
            if not self.table.number:
                raise
            # raising it here would make Serve stop the register
            LOG.exception("The adapters stay as they are.")

    async def load(self, versions: Sequence[Version]) -> None:
        if self.table.number:  # the replicas wait for the first table
            with in_our_words():
                loading = serve.get_deployment_handle(REPLICA).broadcast("load", versions)
                for error in await loading.results_async(return_exceptions=True):
                    if isinstance(error, RayTaskError):  # one that is lost will read the table that is in force then
                        raise error


@serve.deployment(name=REPLICA, logging_config=QUIET)
class ReplicaDeployment:
    """One replica of perhaps many, with its own copy of the model."""

    async def __init__(self, base: str, options: Options):
        table = await serve.get_deployment_handle(REGISTER).adopt.remote()
        self._replica = await asyncio.to_thread(load_replica, base, list(table.versions.values()), options)
        if options.warm:
            await self._replica.warm()

        @serve.multiplexed(max_num_models_per_replica=self._replica.held)
        async def note(key: str) -> str:
            """Serve sends a request that names a key to a replica that has noted it."""
            return key

        self._note = note

    async def answer(self, request: Request) -> AsyncGenerator[Piece, None]:
        if key := serve.get_multiplexed_model_id():
            await self._note(key)
        async with contextlib.aclosing(self._replica.answer(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def load(self, versions: Sequence[Version]) -> None:
        await asyncio.to_thread(self._replica.load, versions)

    async def state(self) -> dict[str, Any]:
        return {"replica": serve.get_replica_context().replica_id.unique_id, **self._replica.state}


@serve.deployment(name=FRONT, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000)
@serve.ingress()
class Front:
    """OpenAI's API: knows the table in force, and asks a replica, or another one if that is lost."""

    async def __init__(self, name: str, token: str | None, options: Options, replicas: Any, register: Any):
        self._name, self._token, self._options = name, token, options
        self._replicas, self._register = replicas, register
        self.table: Table = await register.adopt.remote()
        self._following = asyncio.create_task(self._follow())

    def __serve_build_asgi_app__(self) -> Any:
        return openai_api(self, self._name, self._token, self._options.longest_prompt)

    async def _follow(self) -> None:
        while await asyncio.sleep(0.1, True):
            with contextlib.suppress(Exception):  # the register may be restarting, and adopts this table then
                if await self._register.number.remote() != self.table.number:
                    await self.adopt(await self._register.adopt.remote(self.table))

    async def adopt(self, table: Table) -> None:
        self.table = self.table.or_later(table)

    async def answer(self, request: Request) -> AsyncGenerator[Piece, None]:
        key = next(iter(request.shares)).key if self._options.held and request.shares else ""
        handle = self._replicas.options(stream=True, multiplexed_model_id=key)
        for is_last in (False, True):
            pieces, has_begun, has_ended = handle.answer.remote(request), False, False
            try:
                with in_our_words():
                    while piece := await asyncio.wait_for(anext(pieces, None), self._options.timeout):
                        has_begun = True
                        yield piece
                has_ended = True
                return
            except BusyError as error:
                if has_begun or is_last or isinstance(error, LateError):
                    raise
            finally:
                if not has_ended:
                    with contextlib.suppress(Exception):  # it raises the error that ended the call again
                        pieces.cancel()

    async def change(self, paths: Mapping[str, str | None]) -> Table:
        with in_our_words():
            # a register that has just restarted would otherwise change an older table, which the fronts ignore
            await self._register.adopt.remote(self.table)
            await self.adopt(await asyncio.wait_for(self._register.change.remote(paths), self._options.timeout))
            # the next request may go to another front
            fronts = serve.get_deployment_handle(FRONT).broadcast("adopt", self.table)
            await fronts.results_async(return_exceptions=True, timeout_s=self._options.timeout)
        return self.table

    async def states(self) -> list[dict[str, Any]]:
        states: list[Any] = []
        with contextlib.suppress(BusyError), in_our_words():  # while the first replica is starting
            asked = self._replicas.broadcast("state")
            states = await asked.results_async(return_exceptions=True, timeout_s=min(5, self._options.timeout))
        return [each for each in states if isinstance(each, dict)]  # and not of one that has just been lost


def build(args: dict[str, Any]) -> Any:
    """See :func:`hotswap_lab.serving.app`."""
    given = Arguments.of(args)
    options = given.options
    most = dict(max_ongoing_requests=2 * options.rows, max_queued_requests=options.queue)
    replica = ReplicaDeployment.options(num_replicas=given.replicas, **most).bind(given.base, options)
    register = RegisterDeployment.options(user_config={"adapters": given.adapters}).bind(given.name)
    front = Front.options(num_replicas=2 if given.replicas >= 4 else 1)
    return front.bind(given.name, given.token, options, replica, register)
