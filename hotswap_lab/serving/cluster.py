"""Replicas behind Ray Serve: a front with OpenAI's API, a register, and as many replicas as are wanted.

Ray Serve routes, scales, restarts and counts. Ours is what it asks for: a class for each of the three, and ``app``.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.metrics import Gauge
from transformers import AutoTokenizer

from .. import demo
from ..core.errors import HotswapError, refusal, refuse
from .api import openai_api
from .replica import BusyError, Options, Piece, Replica, Request
from .table import Register, Table, Version

#: what the deployments are called, in a Serve config file too
FRONT, REGISTER, REPLICA = "Front", "Register", "Replica"
#: for the embedded model
DEMO: dict[str, Any] = {
    "adapters": str(demo.ADAPTERS_DIR),
    "target_rank": 48,
    "longest_prompt": 32,
    "longest_answer": 32,
}


@contextlib.contextmanager
def in_our_words() -> Iterator[None]:
    """Raises what a call of another deployment raised there, or why there was no answer."""
    try:
        yield
    except (RayActorError, DeploymentUnavailableError):
        raise BusyError(refusal("replica_lost")) from None
    except BackPressureError:
        raise BusyError(refusal("too_many_wait")) from None
    except RayTaskError as error:  # which is one of those, too, if that was raised there
        raise error.cause from None


@serve.deployment(name=REGISTER, ray_actor_options={"num_cpus": 0})
class RegisterDeployment(Register):
    """The register. Its ``user_config`` are the adapters: ``{"adapters": {name: path}}``."""

    async def reconfigure(self, config: dict[str, Any]) -> None:
        try:
            await self.change(config["adapters"], is_all=True)
        except HotswapError:
            if not self.table.number:
                raise
            # raised, it would have Serve end the register, and then nobody would answer
            logging.getLogger("ray.serve").exception("The adapters stay as they are.")

    async def load(self, versions: Sequence[Version]) -> None:
        if self.table.number:  # the replicas wait for the first table
            with in_our_words():
                loading = serve.get_deployment_handle(REPLICA).broadcast("load", versions)
                for error in await loading.results_async(return_exceptions=True):
                    if isinstance(error, RayTaskError):  # one that is lost will read the table that is in force then
                        raise error


@serve.deployment(name=REPLICA)
class ReplicaDeployment:
    """One replica of perhaps many, with its own copy of the model."""

    async def __init__(self, base: str, options: Options):
        table = await serve.get_deployment_handle(REGISTER).adopt.remote()
        self._replica = await asyncio.to_thread(load_replica, base, list(table.versions.values()), options)
        self._gauges = {name: Gauge(f"hotswap_lab_{name}") for name in self._replica.counts}

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
        for name, gauge in self._gauges.items():
            gauge.set(self._replica.counts[name])

    async def load(self, versions: Sequence[Version]) -> None:
        await asyncio.to_thread(self._replica.load, versions)

    async def state(self) -> dict[str, Any]:
        return {"replica": serve.get_replica_context().replica_id.unique_id, **self._replica.state}


@serve.deployment(name=FRONT, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000)
@serve.ingress()
class Front:
    """OpenAI's API: knows the table in force, and asks a replica, or another one if that is lost."""

    async def __init__(self, name: str, token: str | None, is_gathering: bool, replicas: Any, register: Any):
        self._name, self._token, self._is_gathering = name, token, is_gathering
        self._replicas, self._register = replicas, register
        self.table: Table = await register.adopt.remote()
        self._following = asyncio.create_task(self._follow())

    def __serve_build_asgi_app__(self) -> Any:
        return openai_api(self, self._name, self._token)

    async def _follow(self) -> None:
        while await asyncio.sleep(0.1, True):
            with contextlib.suppress(Exception):  # the register may be starting anew, and is told then what it was
                if await self._register.number.remote() != self.table.number:
                    self.table = self.table.or_later(await self._register.adopt.remote(self.table))

    async def answer(self, request: Request) -> AsyncGenerator[Piece, None]:
        key = next(iter(request.shares)).key if self._is_gathering and request.shares else ""
        handle = self._replicas.options(stream=True, multiplexed_model_id=key)
        for is_last in (False, True):
            has_begun = False
            try:
                with in_our_words():
                    async for piece in handle.answer.remote(request):
                        has_begun = True
                        yield piece
                return
            except BusyError:
                if has_begun or is_last:
                    raise

    async def change(self, paths: Mapping[str, str | None]) -> Table:
        with in_our_words():
            # one that has just started anew would change an older table, and nobody would take that
            await self._register.adopt.remote(self.table)
            self.table = self.table.or_later(await self._register.change.remote(paths))
        return self.table

    async def states(self) -> list[dict[str, Any]]:
        with in_our_words():
            states = await self._replicas.broadcast("state").results_async(return_exceptions=True)
        return [each for each in states if isinstance(each, dict)]  # and not of one that has just been lost


def load_replica(base: str, versions: Sequence[Version], options: Options) -> Replica:
    """A replica of a language model in a folder or on the Hub."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if base == str(demo.BASE_DIR):
        tokenizer.chat_template = "{{ messages[-1]['content'] }}" + demo.SEPARATOR
    model = demo.load_quietly(base, "auto").to("cuda" if torch.cuda.is_available() else "cpu")
    return Replica(PeftModel.from_pretrained(model, versions[0].path), tokenizer, versions, options)


def folders_of(adapters: str | Mapping[str, str]) -> dict[str, str]:
    """Adapters by name, from a folder of them, or from ``name=path,name=path``."""
    if not isinstance(adapters, str):
        return dict(adapters)
    if "=" in adapters:
        return dict(each.split("=", 1) for each in adapters.split(","))
    return {path.parent.name: str(path.parent) for path in sorted(Path(adapters).glob("*/adapter_config.json"))}


def build(args: dict[str, Any]) -> Any:
    """See :func:`hotswap_lab.serving.app`."""
    given = args if "base" in args else {"base": str(demo.BASE_DIR), **DEMO, **args}
    named = {"replicas": 1, "token": os.environ.get("HOTSWAP_ADMIN_TOKEN"), "adapters": "", **given}
    base, replicas, token, adapters = (named.pop(name) for name in ("base", "replicas", "token", "adapters"))
    if not (folders := folders_of(adapters)):
        raise refuse("no_adapters", found=adapters or "none")
    options = Options(**{name: int(value) for name, value in named.items()})
    ongoing = {"max_ongoing_requests": 2 * options.rows, "max_queued_requests": options.queue}
    replica = ReplicaDeployment.options(num_replicas=int(replicas), **ongoing).bind(base, options)
    register = RegisterDeployment.options(user_config={"adapters": folders}).bind()
    name = base if "base" in args else "demo"
    return Front.bind(name, token, options.held > 0, replica, register)
