"""Replicas behind Ray Serve: a front with OpenAI's API, a register, and as many replicas as are wanted.

Ray Serve routes, scales, restarts and counts. Ours is what it asks for: a class for each of the three, and ``app``.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.metrics import Gauge
from transformers import AutoConfig, AutoTokenizer

from .. import demo
from ..core.errors import HotswapError, listing, refusal, refuse
from ..files.reading import read
from .api import openai_api
from .replica import BusyError, Options, Piece, Replica, Request
from .table import Register, Table, Version

LOG = logging.getLogger("ray.serve")
#: the names of the deployments, in a Serve config file too
FRONT, REGISTER, REPLICA = "Front", "Register", "Replica"
#: for the embedded model
DEMO: dict[str, Any] = {"base": str(demo.BASE_DIR), "adapters": str(demo.ADAPTERS_DIR), "target_rank": 48}
DEMO |= {"longest_prompt": 32, "longest_answer": 32}
#: the numbers among the arguments, with their defaults; where that is not 0, the number must be positive
NUMBERS: dict[str, int] = {"replicas": 1} | {
    each.name: each.default for each in fields(Options) if isinstance(each.default, int)
}
#: the register is asked ten times a second, and a replica for each request that the front has logged already
QUIET = {"enable_access_log": False}


class LateError(BusyError):
    """No answer within the time that a request may wait."""


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
        with in_our_words():
            asked = self._replicas.broadcast("state")
            states = await asked.results_async(return_exceptions=True, timeout_s=min(5, self._options.timeout))
        return [each for each in states if isinstance(each, dict)]  # and not of one that has just been lost


def load_replica(base: str, versions: Sequence[Version], options: Options) -> Replica:
    """A replica of a language model in a folder or on the Hub."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if base == str(demo.BASE_DIR):
        tokenizer.chat_template = "{{ messages[-1]['content'] }}" + demo.SEPARATOR
    model = demo.load_quietly(base, "auto").to("cuda" if torch.cuda.is_available() else "cpu")
    if versions:
        model = PeftModel.from_pretrained(model, versions[0].path)
    else:  # adapters that come later need layers to go into
        model = get_peft_model(model, LoraConfig(r=options.target_rank or 8, target_modules="all-linear"))
    return Replica(model, tokenizer, versions, options)


def folders_of(adapters: str | Mapping[str, str]) -> dict[str, str]:
    """Adapters by name, from a folder of them, or from ``name=path,name=path``."""
    if not isinstance(adapters, str):
        return {str(name): str(path) for name, path in adapters.items()}
    if "=" in adapters:
        return {name: path for name, _, path in (each.partition("=") for each in adapters.split(","))}
    return {path.parent.name: str(path.parent) for path in sorted(Path(adapters).glob("*/adapter_config.json"))}


def build(args: dict[str, Any]) -> Any:
    """See :func:`hotswap_lab.serving.app`. One error lists everything that is wrong with the arguments."""
    given = {"token": os.environ.get("HOTSWAP_ADMIN_TOKEN"), **({"adapters": ""} if "base" in args else DEMO), **args}
    base, adapters, token = (given.pop(each) for each in ("base", "adapters", "token"))
    name, wrong, known = base if "base" in args else "demo", [], [*NUMBERS, "package"]
    if unknown := [each for each in given if each not in known]:
        known = ["base", "adapters", "token", *known]
        wrong.append(refusal("unknown_argument", found=listing(unknown), known=", ".join(known)))

    def tried(check: Callable, *values: Any) -> Any:
        try:
            return check(*values)
        except HotswapError as error:
            wrong.extend(error.refusals)

    numbers = {each: tried(_number, each, given.get(each, default)) for each, default in NUMBERS.items()}
    replicas = numbers.pop("replicas")
    options = Options(**numbers, package=str(given.get("package", "")))
    if not wrong:
        options = tried(_for_base, options, base)
    folders = folders_of(adapters)
    if adapters and not folders:
        wrong.append(refusal("no_adapters", found=adapters))
    for each, path in folders.items():
        tried(_check_adapter, each, path, name, options.target_rank if options else 0)
    if wrong:
        raise HotswapError(*wrong)
    ongoing, queued = 2 * options.rows, options.queue
    replica = ReplicaDeployment.options(
        num_replicas=replicas, max_ongoing_requests=ongoing, max_queued_requests=queued
    ).bind(base, options)
    register = RegisterDeployment.options(user_config={"adapters": folders}).bind(name)
    front = Front.options(num_replicas=2 if replicas >= 4 else 1)
    return front.bind(name, str(token or ""), options, replica, register)


def _number(name: str, value: object) -> int:
    text, least = str(value).lower(), int(NUMBERS[name] > 0)
    with contextlib.suppress(ValueError):
        if (number := int({"true": "1", "false": "0"}.get(text, text))) >= least:
            return number
    raise refuse("bad_number", name=name, value=value, least=least)


def _for_base(options: Options, base: str) -> Options:
    try:
        config, _ = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    except Exception as error:  # of any kind: transformers has no common one
        raise refuse("no_base", base=base, error=error) from None
    return options.for_model(config)


def _check_adapter(name: str, path: str, base: str, target_rank: int) -> None:
    Version.of(name, path, base)
    config = read(path, only_config=True).config
    rank = max([getattr(config, "r", 0), *getattr(config, "rank_pattern", {}).values()])
    if target_rank and rank > target_rank:
        raise refuse("rank_above_target", name=name, rank=rank, target_rank=target_rank)
