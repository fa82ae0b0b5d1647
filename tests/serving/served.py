"""Replicas of the embedded model in this process, and what each adapter says by itself."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterable, Mapping, Sequence
from pathlib import Path
from unittest import mock

import models
import torch
import transformers
from peft import PeftModel

from hotswap_lab import demo
from hotswap_lab.serving import Options, Piece, Register, Replica, Request, Version

WORDS = ["hotswap", "adapter", "notebook", "kernel", "matrix", "python", "tensor", "voice"]
FAMILY = {name: demo.adapter_path(name) for name in demo.adapter_names()}
#: the embedded model has room for 64 tokens
SHORT = Options(longest_prompt=24, longest_answer=24, target_rank=48)

TEMPLATE = "{% if messages[0].role == 'tool' %}{{ raise_exception('roles must alternate') }}{% endif %}"
TEMPLATE += "{{ messages[-1]['content'] }}>"


def replica_of(paths: Mapping[str, str], options: Options = SHORT) -> Replica:
    tokenizer = demo.load_tokenizer()
    tokenizer.chat_template = TEMPLATE
    versions = [Version.of(name, path) for name, path in paths.items()]
    model = PeftModel.from_pretrained(demo.load_base(), versions[0].path)
    return Replica(model, tokenizer, versions, options)


async def text_of(pieces: AsyncIterable[Piece]) -> str:
    """The text of an answer, or of what is left of it."""
    return "".join([piece.text async for piece in pieces])


class Served(Register):
    """Replicas and their register, as what answers behind the API; a request goes to the first of them."""

    def __init__(self, paths: Mapping[str, str], options: Options = SHORT, replicas: int = 1):
        super().__init__("demo")
        self.replicas = [replica_of(paths, options) for _ in range(replicas)]
        self.answer = self.replicas[0].answer
        asyncio.run(self.change(paths))

    async def load(self, versions: Sequence[Version]) -> None:
        for replica in self.replicas:
            await asyncio.to_thread(replica.load, versions)

    async def states(self) -> list[dict]:
        return [{"replica": str(n), **replica.state} for n, replica in enumerate(self.replicas)]

    async def pieces(self, model: str, word: str, replica: int = 0, **how: object) -> list[Piece]:
        request = Request(prompt=f"{word}>", shares=self.table.shares(model, "demo"), **how)
        return [piece async for piece in self.replicas[replica].answer(request)]

    async def ask(self, model: str, word: str, replica: int = 0, **how: object) -> str:
        return "".join(piece.text for piece in await self.pieces(model, word, replica, **how))

    async def ask_all(self, models: Sequence[str], words: Sequence[str] = WORDS, **how: object) -> list[str]:
        """All at once, so that they share batches."""
        return await asyncio.gather(*(self.ask(each, word, **how) for each, word in zip(models, words, strict=False)))

    def assert_right(self, models: Sequence[str], words: Sequence[str] = WORDS, most: int | None = None) -> list[str]:
        """Each answer to requests at once, up to so many letters, is what a fresh load says."""
        said = asyncio.run(self.ask_all(models, words, max_tokens=most))
        paths = {name: version.path for name, version in self.table.versions.items()}
        assert said == [alone(paths.get(each), word)[:most] for each, word in zip(models, words, strict=False)]
        return said


@functools.cache
def alone(path: str | None, word: str) -> str:
    """What a fresh load says to a word, without a cache, a batch, or any of ours."""
    return demo.ask_all(fresh(path), demo.load_tokenizer(), [word])[0]


@functools.cache
def fresh(path: str | None) -> torch.nn.Module:
    return PeftModel.from_pretrained(demo.load_base(), path) if path else demo.load_base()


def save_random_adapter(folder: Path, seed: int, rank: int = 4) -> str:
    """An adapter that changes what the embedded model says to something of its own."""
    kind = models.Kind(demo.load_base, dict, ("q_proj", "up_proj"))
    return models.save_random_adapter(kind, folder, seed, r=rank, lora_alpha=2 * rank)


LITTLE = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LITTLE |= dict(num_key_value_heads=2, max_position_embeddings=96, pad_token_id=0, bos_token_id=None, eos_token_id=98)


def little(kind, folder, **more):
    """A random model of some kind in a folder, with two adapters, and a replica of it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**LITTLE | more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder / "base")
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder / "base")  # noqa: E731
    names = sorted({name.split(".")[-1] for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)})
    made = models.Kind(load, dict, tuple(names[:2]))
    paths = {f"r{n}": models.save_random_adapter(made, folder / f"r{n}", n, r=4, lora_alpha=16) for n in range(2)}
    versions = [Version.of(name, path) for name, path in paths.items()]
    replica = Replica(PeftModel.from_pretrained(load(), paths["r0"]), demo.load_tokenizer(), versions)
    return load, versions, replica


@contextlib.contextmanager
def logged():
    """The messages of the server's log, which chapter 09's quiet Ray turns off for the rest of the process."""
    logger, messages, handler = logging.getLogger("ray.serve"), [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    with mock.patch.multiple(
        logger, handlers=[handler], disabled=False, isEnabledFor=lambda level: level >= logging.INFO
    ):
        yield messages
