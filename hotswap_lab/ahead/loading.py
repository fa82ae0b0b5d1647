"""Binds compiled code to the memory of a live model, and calls it like the model.

Tests: ``tests/ahead/test_ahead.py`` and ``tests/ahead/test_ahead_checks.py``.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import compat
from ..beyond.passes import METHODS
from ..core.change import apply
from ..core.errors import listing, refused
from ..core.host import Host, hosts_in
from ..core.journal import Journal
from ..core.prepare import changes_to_prepare
from ..core.slot import room_of
from ..pools.batch import PART
from ..pools.copies import ONCE, Copies
from ..pools.proof import size_of
from ..pools.rows import RowRoom
from ..threads import locked
from .file import Tensors, inputs_in, read
from .live import Place, Watched, facts_of, form_of, named, places_in, prepared, top_of
from .proof import prove as prove_code
from .sizes import Sizes

Notes = Mapping[str, Any]


def aoti_load(path: str | os.PathLike[str], model: Any, *, prove: bool = True) -> AheadModel:
    """Bind a file of :func:`aoti_compile` to the memory of a model, without a compiler or a copy of the weights.

    Parameters
    ----------
    path:
        The file.
    model:
        A model with the same shapes and settings, with an adapter loaded, or a pool. Its weights may differ. If it
        isn't prepared yet, it is prepared for the ranks that the file was compiled with, without needing the adapters.
    prove:
        Call the model and the code once, with the inputs of :func:`aoti_compile`, and compare their outputs. That takes
        the time of two calls, and memory for a copy of the model's buffers. A model that draws random numbers can't be
        compared, nor can one whose inputs could not be written to the file, such as a cache. The types and settings of
        modules are always compared.

    Returns
    -------
    AheadModel
        Call it like the base model.

    Raises
    ------
    HotswapError
        If the file is corrupt, if it was compiled by a different version of PyTorch, for a different processor or for a
        model with different settings, or if the code's outputs differ from the model's.

    Examples
    --------
    See :func:`aoti_compile`, which makes the file.
    """
    notes, values = read(path)
    hosts, name = hosts_in(model), notes["name"]
    host = next((host for host in hosts if name in host.configs), None)
    if host is None or type(top_of(host)).__name__ != notes["base"]:
        found = listing(f"{type(top_of(host)).__name__} with {', '.join(host.configs)}" for host in hosts)
        raise refused("ahead_other_model", found=found or "no adapter", expected=f"{notes['base']} with {name!r}")
    journal = Journal()
    with locked(host.base):
        try:
            if room_of(host.base, name) is None:
                apply(changes_to_prepare(METHODS, host.root, [], adapter_name=name, ranks=notes["ranks"]), journal)
            prepared(model)
            given = inputs_in(notes["given"], values) if prove else None
            return AheadModel(os.fspath(path), host, notes, values, given)
        except BaseException:
            journal.roll_back()
            raise


class AheadModel:
    """A model that was compiled ahead of time, and runs with the weights and the adapter of a live model.

    It is called like the base model and returns the same, without gradients. Each call first checks that the model is
    still the one that was bound, and that the inputs have the compiled form. AOTInductor checks neither: it would read
    freed memory, or misread the numbers.

    Parameters
    ----------
    path, host, notes, values:
        The file, its contents, and the model.
    given:
        Inputs for comparing the code's outputs with the model's; None: no comparison.
    """

    def __init__(self, path: str, host: Host, notes: Notes, values: Tensors, given: Mapping[str, Any] | None = None):
        #: the model whose memory this reads
        self.base: torch.nn.Module = host.base
        self._top: torch.nn.Module = top_of(host)
        name: str = notes["name"]
        room = room_of(host.base, name)
        self._signature: inspect.Signature = inspect.signature(self._top.forward)
        #: checks the rows of a batch, where each row may have its own adapter
        self._batch: Any = room.batch if isinstance(room, RowRoom) else None
        if notes["rows"] and (self._batch is None or self._batch.rows != notes["rows"][0]):
            found = f"{self._batch.rows} rows" if self._batch else "no pool with rows"
            raise refused("ahead_other_model", found=found, expected=f"AdapterPool(..., rows={notes['rows'][0]})")
        copies: Any = notes["rows"][1] if notes["rows"] else ONCE
        if isinstance(copies, int):  # from an older release, where each kind of model had one order
            copies = (copies, 1) if self._batch.is_tiled else (1, copies)
        self._copies: Copies = Copies(*copies)
        _check_facts(facts_of(self._top, [at for graph in notes["graphs"] for at in graph["paths"]]), notes["facts"])
        bound: dict[str, Bound] = {}
        for number, graph in enumerate(notes["graphs"]):
            for at in graph["paths"]:
                bound[at] = Bound(path, number, graph, self._top.get_submodule(at), room, values)
        if given is not None:
            prove_code(self._top, bound, given)
        self._watched: Watched = Watched(self._top, self.base, name, bound)
        self._run: Callable[..., Any] = bound[""] if "" in bound else _around(self._top, bound)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base model's output. The inputs must have the compiled form; dynamic sizes may differ."""
        self.check()
        rows: Any = contextlib.nullcontext()
        if self._batch is not None and self._top is self.base:
            rows = self._batch.around_call((), named(self._signature, args, kwargs))
        elif self._batch is not None:  # a hook on the base model doesn't see the calls of its layers
            self._batch.check_in_graph({}, PART, size_of((), named(self._signature, args, kwargs)), self._copies)
        with torch.no_grad(), rows:
            return self._run(*args, **kwargs)

    def check(self) -> None:
        """Refuse a model that has changed after it was bound, in a way that the compiled code can't notice.

        Detects tensors and modules that were moved, replaced or reshaped, modules in training mode, hooks, a new
        ``forward``, and a new state of the adapters. Settings of modules, such as an ``eps``, are compared when a file
        is loaded, not here.
        """
        self._watched.check()
        if self._batch is not None and self._batch.copies != self._copies:
            wording = "a batch that has each row once"
            raise refused("ahead_inputs", found=f"{wording}{self._batch.copies}", expected=f"{wording}{self._copies}")


def _check_facts(found: Mapping[str, Mapping[str, str]], expected: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse a model whose settings differ from the compiled one's, because they are constants in its code."""
    for path in dict.fromkeys(["config", *expected, *found]):
        live, compiled = found.get(path, {}), expected.get(path, {})
        for key in dict.fromkeys([*compiled, *live]):
            if live.get(key) != compiled.get(key):
                key_path = key if key.startswith("config.") else f"{path}.{key}".lstrip(".")
                raise refused("ahead_other_settings", key=key_path, found=live.get(key), expected=compiled.get(key))


def _are_same(own: torch.Tensor, copy: torch.Tensor) -> bool:
    return own is copy or bool(((own == copy) | (own != own) & (copy != copy)).all())  # NaN is not equal to itself


class Bound:
    """One compiled graph, bound to the tensors of one module."""

    def __init__(self, path: str, number: int, notes: Notes, module: torch.nn.Module, room: Any, values: Tensors):
        forms, places = notes["tensors"], places_in(module, room)
        tensors = {key: places[key][0][places[key][1]] for key in forms if key in places}
        for key, form in forms.items():
            found = form_of(tensors[key]) if key in tensors else None
            if found != form:
                raise refused("ahead_other_tensor", key=key, found=found or "no such tensor", expected=form)
        self.names: list[str] = notes["names"]
        self.inputs: list[Any] = notes["inputs"]
        #: whether the code writes to tensors, as a forward with a cache does to its inputs
        self.writes: bool = notes.get("writes", True)
        self.sizes: Sizes = Sizes(notes["symbols"], notes["conditions"])
        self.places: list[Place] = [places[key] for key in forms]
        #: kept alive, because the code has only their addresses
        self.tensors: Tensors = {key: tensors[key].detach() for key in forms}
        self.tensors |= {key.partition(":")[2]: value for key, value in values.items() if key.startswith(f"{number}:")}
        # torch's own load_package runs a compiler first, to detect the processor's features
        self.code: Any = compat.AOTICompiledModel(compat.AOTIModelPackageLoader(path, str(number), False, 1, -1))
        wanted = self.code.get_constant_fqns()
        self.code.load_constants({key: self.tensors[key] for key in wanted}, check_full_update=True, user_managed=True)
        self.signature: inspect.Signature = inspect.signature(module.forward)
        forms_in_text = self.code.loader.get_call_spec()
        self.input_form: Any = compat.treespec_loads(forms_in_text[0])
        self.output_form: Any = compat.treespec_loads(forms_in_text[1])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = named(self.signature, args, kwargs)
        if given.keys() != set(self.names):
            raise refused("ahead_inputs", found=f"{listing(given)}", expected=f"the inputs {listing(self.names)}")
        given = {name: given[name] for name in self.names}
        leaves, form = compat.tree_flatten(((), given))
        if form != self.input_form:
            raise refused("ahead_inputs", found=form, expected=self.input_form)
        self._check(leaves, given)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        passed = [tensor.contiguous() for tensor in tensors]
        outputs = self.code.loader.boxed_run([*passed])
        changed = [pair for pair in zip(tensors, passed, strict=True) if self.writes and not _are_same(*pair)]
        for own, copy in changed:
            own.copy_(copy)
        return compat.tree_unflatten(outputs, self.output_form)

    def _check(self, leaves: Sequence[Any], given: Mapping[str, Any]) -> None:
        """Refuse inputs whose form differs from the compiled one."""
        sizes: dict[str, int] = {}

        def allowed(size: int, own: int | str) -> bool:
            return size == (own if isinstance(own, int) else sizes.setdefault(own, size))

        for number, (value, expected) in enumerate(zip(leaves, self.inputs, strict=True)):
            form = input_form(value)
            fits = form == expected
            if not fits and isinstance(form, list):
                fits = form[1:] == expected[1:] and len(form[0]) == len(expected[0])
                fits = fits and all(map(allowed, form[0], expected[0]))
            if not fits:
                name = [name for name in given for _ in compat.tree_flatten(given[name])[0]][number]
                raise refused("ahead_inputs", found=f"{name}: {form}", expected=f"{name}: {expected}")
        values = [sizes[symbol] for symbol in self.sizes.symbols]
        if not self.sizes.fit(*values):
            found = listing(f"{name} = {size}" for name, size in zip(self.sizes.symbols.values(), values, strict=True))
            raise refused("ahead_inputs", found=found, expected=self.sizes.broken(*values))


def input_form(value: object) -> Any:
    """The form of an input: sizes, dtype and device of a tensor; the text of any other value."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    sizes = [str(size) for size in value.shape]  # a size in an export may be a symbol, which may be a number
    grad = ["requires gradients"] if value.requires_grad else []
    return [[int(size) if size.isdecimal() else size for size in sizes], str(value.dtype), value.device.type, *grad]


class _Block(torch.nn.Module):
    """Replaces a repeated layer, and has all of its attributes."""

    def __init__(self, block: torch.nn.Module, bound: Bound):
        super().__init__()
        self.__dict__["_live"], self.__dict__["_bound"] = block, bound

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_live"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._bound(*args, **kwargs)


def _around(base: torch.nn.Module, bound: Mapping[str, Bound]) -> torch.nn.Module:
    """Copy the base model with compiled layers. All modules are shared, except those above a compiled layer."""
    copies = {"": _copy_of(base)}
    for path, graph in bound.items():
        parent, (*steps, last) = "", path.split(".")
        for step in steps:
            child = f"{parent}.{step}".lstrip(".")
            if child not in copies:
                copies[child] = copies[parent]._modules[step] = _copy_of(copies[parent]._modules[step])
            parent = child
        modules = copies[parent]._modules
        modules[last] = _Block(modules[last], graph)
    return copies[""]


def _copy_of(module: Any) -> Any:
    """Copy a module. The copy shares everything except its table of submodules."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__, _modules=dict(module._modules))
    return twin
