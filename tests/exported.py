"""Exported graphs in the place of compiled ones: they check as little, need no compiler, and are made in a second.

AOTInductor's part of :mod:`hotswap_lab.ahead` is to turn a graph into machine code. All else, what is noted, refused
and proven, is the same here, so many models and sizes can be tried.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import zipfile
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from models import TINY, Kind, call, load, save_random_adapter
from oracle import assert_close, rounding_of_inductor
from torch import nn
from torch.utils import _pytree as pytree

from hotswap_lab import aoti_compile, aoti_load, compat
from hotswap_lab import prepare_model_for_compiled_hotswap as prepare
from hotswap_lab.ahead import compiling

BUILT: dict[str, torch.export.ExportedProgram] = {}


def _build(programs: dict, path: str) -> str:
    names = {}
    for number, program in enumerate(programs.values()):
        names[str(number)] = str(len(BUILT))
        BUILT[names[str(number)]] = program
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/names.json", json.dumps(names))
        archive.writestr("x/_metadata.json", "{}")
    return path


class Graph(torch.nn.Module):
    """What ``AOTICompiledModel`` does, with a graph that isn't compiled."""

    def __init__(self, program: torch.export.ExportedProgram):
        super().__init__()
        without = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
        self.graph, self.program, self.loader = program.module(**without), program, self
        self.values = [None if isinstance(each, torch.Tensor) else each for each in self._leaves()]
        self.is_tensor = [isinstance(each, torch.Tensor) for each in self._leaves()]

    def _leaves(self) -> list:
        return pytree.tree_leaves(self.program.example_inputs)

    def get_constant_fqns(self) -> list[str]:
        signature, lifted = self.program.graph_signature, compiling._lifted(self.program)
        used = {*signature.inputs_to_parameters.values(), *signature.inputs_to_buffers.values(), *lifted}
        return list(used)

    def load_constants(self, tensors: dict, **_: object) -> None:
        for name, tensor in tensors.items():
            path, _, last = name.rpartition(".")
            owner = self.graph.get_submodule(path)
            with contextlib.suppress(AttributeError):
                delattr(owner, last)
            owner.register_buffer(last, tensor)

    def get_call_spec(self) -> list[str]:
        spec = self.program.call_spec
        return [compat.treespec_dumps(each) for each in (spec.in_spec, spec.out_spec)]

    def boxed_run(self, inputs: list) -> list:
        given, filled = iter(inputs), []
        for is_tensor, value in zip(self.is_tensor, self.values, strict=True):
            filled.append(next(given) if is_tensor else value)
        args, kwargs = pytree.tree_unflatten(filled, self.program.call_spec.in_spec)
        return pytree.tree_leaves(self.graph(*args, **kwargs))


def _open(path: str, number: str, *_: object) -> Graph:
    with zipfile.ZipFile(path) as archive:
        return Graph(BUILT[json.loads(archive.read("x/names.json"))[number]])


@contextlib.contextmanager
def not_compiled() -> Iterator[None]:
    """In this block, ``aoti_compile`` writes exported graphs, and ``aoti_load`` binds them."""
    with (
        mock.patch.object(compiling, "_build", _build),
        mock.patch.object(compat, "AOTIModelPackageLoader", _open, create=True),
        mock.patch.object(compat, "AOTICompiledModel", lambda graph: graph, create=True),
    ):
        yield


# ---- what the tests do with them

FEW = TINY | dict(num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def ids(rows: int = 2, tokens: int = 9) -> dict:
    return dict(input_ids=torch.arange(rows * tokens).view(rows, tokens) % 37 + 3, use_cache=False)


def prepared(kind: Kind, folder, seed: int = 1) -> nn.Module:
    model = load(kind, save_random_adapter(kind, folder / f"adapter {seed}", seed))
    prepare(model, target_rank=8)
    return model


def file_of(model: object, folder, **options: object):
    options = dict(kwargs=ids(), progress=False) | options
    with not_compiled():
        return aoti_compile(model, folder / "model.pt2", **options)


def bind(path: object, model: object, **options: object):
    with not_compiled():
        return aoti_load(path, model, **options)


def assert_computes(code: Callable, model: nn.Module, given: dict) -> None:
    assert_close(code(**given).logits, call(model, given), rounding_of_inductor(model, given))
