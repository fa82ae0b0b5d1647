"""Replicas behind Ray Serve: a front with OpenAI's API, a register, and any number of replicas.

Ray Serve routes, scales, restarts and counts. This module has a class for each of the three deployments.
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
#: no access log: each front asks the register ten times a second, and logs the requests that it sends to replicas
QUIET = {"enable_access_log": False}


@contextlib.contextmanager
def ray_errors_translated() -> Iterator[None]:
    """Replace Ray's errors by the error that a deployment raised, or by a refusal with the reason."""
    try:
        yield
    except (RayActorError, DeploymentUnavailableError):
        raise BusyError(refusal("replica_lost")) from None
    except BackPressureError:
        raise BusyError(refusal("too_many_wait")) from None
    except asyncio.TimeoutError:
        raise LateError(refusal("too_late")) from None
    except RayTaskError as error:  # it is also one of the above, if a deployment raised one of those
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
            # an error here would make Serve stop the register
            LOG.exception("The adapters stay as they are.")

    async def load(self, versions: Sequence[Version]) -> None:
        if self.table.number:  # the replicas wait for the first table
            with ray_errors_translated():
                loading = serve.get_deployment_handle(REPLICA).broadcast("load", versions)
                for error in await loading.results_async(return_exceptions=True):
                    if isinstance(error, RayTaskError):  # a lost replica reads the current table when it restarts
                        raise error


@serve.deployment(name=REPLICA, logging_config=QUIET)
class ReplicaDeployment:
    """A replica with its own copy of the model."""

    async def __init__(self, base: str, options: Options):
        table = await serve.get_deployment_handle(REGISTER).adopt.remote()
        self._replica = await asyncio.to_thread(load_replica, base, list(table.versions.values()), options)
        if options.warm:
            await self._replica.warm()

        @serve.multiplexed(max_num_models_per_replica=self._replica.held)
        async def hold(key: str) -> str:
            """Serve sends a request with a key to a replica that was called with it."""
            return key

        self._hold = hold

    async def answer(self, request: Request) -> AsyncGenerator[Piece, None]:
        if key := serve.get_multiplexed_model_id():
            await self._hold(key)
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
    """OpenAI's API: has the current table, and asks a replica, or another one if that is lost."""

    async def __init__(self, name: str, token: str | None, options: Options, replicas: Any, register: Any):
        self._name, self._token, self._options = name, token, options
        self._replicas, self._register = replicas, register
        self.table: Table = await register.adopt.remote()
        self._following = asyncio.create_task(self._follow())

    def __serve_build_asgi_app__(self) -> Any:
        return openai_api(self, self._name, self._token, self._options.longest_prompt)

    async def _follow(self) -> None:
        while await asyncio.sleep(0.1, True):
            with contextlib.suppress(Exception):  # the register may be restarting; it adopts this table then
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
                with ray_errors_translated():
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
                    with contextlib.suppress(Exception):  # it raises again the error that ended the call
                        pieces.cancel()

    async def change(self, paths: Mapping[str, str | None]) -> Table:
        with ray_errors_translated():
            # otherwise a register that has just restarted would change an older table, and the fronts would ignore it
            await self._register.adopt.remote(self.table)
            await self.adopt(await asyncio.wait_for(self._register.change.remote(paths), self._options.timeout))
            # the next request may go to another front
            fronts = serve.get_deployment_handle(FRONT).broadcast("adopt", self.table)
            await fronts.results_async(return_exceptions=True, timeout_s=self._options.timeout)
        return self.table

    async def states(self) -> list[dict[str, Any]]:
        states: list[Any] = []
        with contextlib.suppress(BusyError), ray_errors_translated():  # while the first replica is starting
            replies = self._replicas.broadcast("state")
            states = await replies.results_async(return_exceptions=True, timeout_s=min(5, self._options.timeout))
        return [state for state in states if isinstance(state, dict)]  # a lost replica has an error instead


def build(args: dict[str, Any]) -> Any:
    """See :func:`hotswap_lab.serving.app`."""
    arguments = Arguments.of(args)
    options = arguments.options
    most = dict(max_ongoing_requests=2 * options.rows, max_queued_requests=options.queue)
    replica = ReplicaDeployment.options(num_replicas=arguments.replicas, **most).bind(arguments.base, options)
    register = RegisterDeployment.options(user_config={"adapters": arguments.adapters}).bind(arguments.name)
    front = Front.options(num_replicas=2 if arguments.replicas >= 4 else 1)
    return front.bind(arguments.name, arguments.token, options, replica, register)
