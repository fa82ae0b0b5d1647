"""Compiles a prepared model ahead of time, to a file that still follows swaps in the process that loads it.

``torch.export`` and AOTInductor turn a model into machine code that a process without a compiler loads in a moment.
The weights stay outside: the code is bound to the memory of a live model. A prepared model writes each adapter to the
same memory (:mod:`hotswap_lab.core.arena`), and its scalings are buffers, so the code reads the adapter in force.

AOTInductor checks nothing. So :class:`AheadModel` looks before each call for changes that the code can't notice: a
model that was moved or changed, an adapter that is disabled, inputs of another form.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import operator
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from . import compat
from .core.change import apply
from .core.compiled import unwrap_compiled
from .core.errors import HotswapError, listing, refuse
from .core.host import Host, carriers
from .core.journal import Journal
from .core.prepare import changes_to_prepare
from .core.report import readable_bytes
from .core.slot import room_of
from .engine import ENGINE
from .pools.batch import PART
from .pools.layers import READ
from .pools.proof import size_of
from .threads import held

#: added to PyTorch's records in the file: a description of it, and values that the code needs but no model has
NOTES, VALUES = "hotswap_lab/notes.json", "hotswap_lab/values.safetensors"
#: without weights in it; and with small tensors read from memory, not written into the code
OPTIONS = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
OPTIONS["always_keep_tensor_constants"] = True
#: a table of a module, and a name in it: where a tensor is found each time
Place = tuple[Mapping[str, Any], str]
Notes = Mapping[str, Any]
Tensors = Mapping[str, torch.Tensor]


def aoti_compile(
    model: Any,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Mapping[str, Any] | None = None,
    repeated_blocks: bool = False,
    progress: bool = True,
) -> Path:
    """Compiles a prepared model ahead of time, to a file that :func:`aoti_load` binds to a model in any process.

    Adapters are swapped there as ever: the file has no weights in it, and none of the numbers that a swap changes.

    Parameters
    ----------
    model:
        A model that :func:`hotswap_lab.prepare_model_for_compiled_hotswap` has prepared, or an
        :class:`~hotswap_lab.AdapterPool`; not compiled, in eval mode, its adapter active.
    path:
        The file to write, which ends in ``.pt2``.
    args, kwargs:
        Inputs as for the base model. Numbers, strings and so on become part of the code.
    dynamic_shapes:
        As for ``torch.export.export``, by the names of the arguments: ``{"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}``.
        What is not named keeps the size that it has.
    repeated_blocks:
        Compiles only the layers of which a model has many, each kind of them once. That takes seconds where the whole
        model takes minutes, and is a little slower. What is around them is computed as without compiling.
    progress:
        Prints one line that says what it took.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    HotswapError
        If the model is not prepared, or PyTorch can't export or compile it.

    Examples
    --------
    >>> from hotswap_lab import AdapterPool, aoti_compile, aoti_load, demo
    >>> model, tokenizer = demo.load("reverse")
    >>> family = {name: demo.adapter_path(name) for name in demo.adapter_names()}
    >>> pool = AdapterPool(model, adapters=family, progress=False)
    >>> inputs = dict(tokenizer("hotswap>", return_tensors="pt"), use_cache=False)
    >>> path = aoti_compile(pool, "demo.pt2", kwargs=inputs, progress=False)  # doctest: +SKIP
    >>> ahead = aoti_load(path, pool)  # here, or in a process with no compiler  # doctest: +SKIP
    >>> pool.swap("shout")  # what `ahead` computes with from now on
    >>> logits = ahead(**inputs).logits  # doctest: +SKIP

    Notes
    -----
    Uses ``torch.export.export`` and AOTInductor. https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
    """
    start = time.monotonic()
    host, name, top = _prepared(model)
    given = _named(inspect.signature(top.forward), tuple(args), kwargs or {})
    room = room_of(host.base, name)
    rows = room.exporting() if hasattr(room, "batch") else contextlib.nullcontext()
    # an export puts other tensors into the model while it runs
    with torch.no_grad(), held(host.base), rows:
        if repeated_blocks:
            programs = _blocks(top, room, given, dynamic_shapes is not None)
        else:
            programs = {("",): _export(top, given, _shapes(given, dynamic_shapes))}
    path, exported = Path(path), time.monotonic() - start
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # the file is moved to its place when it is complete
        graphs = [
            _notes_on(each, paths, _places(top.get_submodule(paths[0]), room)) for paths, each in programs.items()
        ]
        built = _build(programs, os.path.join(folder, "built.pt2"))
        ranks = {layer.path: layer.tensors[0].capacity for layer in room.slot.layers}
        notes = dict(torch=torch.__version__, base=type(top).__name__, name=name, ranks=ranks, graphs=graphs)
        notes["rows"] = (room.rows, room.batch.copies) if hasattr(room, "batch") else None
        values = {f"{n}:{k}": v for n, p in enumerate(programs.values()) for k, v in _lifted(p).items()}
        _add(built, {NOTES: json.dumps(notes).encode(), VALUES: safetensors.torch.save(values)})
        os.replace(built, path)
    if progress:
        bound, seconds = sum(len(each["tensors"]) for each in graphs), time.monotonic() - start
        print(
            f"{path.name}: exported in {exported:.0f} s, compiled in {seconds - exported:.0f} s, "
            f"{readable_bytes(path.stat().st_size)} without weights, {bound} tensors to bind"
        )
    return path


def aoti_load(path: str | os.PathLike[str], model: Any) -> AheadModel:
    """Binds a file of :func:`aoti_compile` to the memory of a model. Needs no compiler, and copies no weights.

    Parameters
    ----------
    path:
        The file.
    model:
        A model of the same form, with an adapter loaded, or a pool. It may have other weights. If it is not prepared
        yet, it is prepared for the ranks that the file was compiled with: no family of adapters has to be at hand.

    Returns
    -------
    AheadModel
        To be called as the base model is called.

    Raises
    ------
    HotswapError
        If the file was compiled by another version of PyTorch, for another processor, or for another model.

    Examples
    --------
    See :func:`aoti_compile`, which makes the file.
    """
    notes, values = _read(path)
    hosts, name = _hosts(model), notes["name"]
    host = next((each for each in hosts if name in each.configs), None)
    if host is None or type(_top(host)).__name__ != notes["base"]:
        found = listing(f"{type(_top(each)).__name__} with {', '.join(each.configs)}" for each in hosts)
        raise refuse("ahead_other_model", found=found or "no adapter", expected=f"{notes['base']} with {name!r}")
    journal = Journal()
    with held(host.base):
        try:
            if room_of(host.base, name) is None:
                apply(changes_to_prepare(ENGINE, host.root, [], adapter_name=name, ranks=notes["ranks"]), journal)
            _prepared(model)
            return AheadModel(os.fspath(path), host, notes, values)
        except BaseException:
            journal.roll_back()
            raise


class AheadModel:
    """A model that was compiled ahead of time, and computes with the weights and the adapter of a live model.

    It is called like the base model and returns the same, without gradients. Each call first checks that the model is
    still the one that was bound, and that the inputs have the form that was compiled. AOTInductor checks neither: it
    would read freed memory, or take numbers for others.

    Parameters
    ----------
    path, host, notes, values:
        The file, its contents, and the model.
    """

    def __init__(self, path: str, host: Host, notes: Notes, values: Tensors):
        #: the model whose memory this reads
        self.base: torch.nn.Module = host.base
        self._top: torch.nn.Module = _top(host)
        self._name: str = notes["name"]
        room = room_of(host.base, self._name)
        self._signature: inspect.Signature = inspect.signature(self._top.forward)
        #: how the rows of a batch are checked, where each may have an adapter of its own
        self._batch: Any = getattr(room, "batch", None)
        self._copies: int = notes["rows"][1] if notes["rows"] else 1
        if notes["rows"] and (self._batch is None or self._batch.rows != notes["rows"][0]):
            found = f"{self._batch.rows} rows" if self._batch else "no pool with rows"
            raise refuse("ahead_other_model", found=found, expected=f"AdapterPool(..., rows={notes['rows'][0]})")
        self._layers: list[Any] = [each for each in host.base.modules() if isinstance(each, BaseTunerLayer)]
        bound: dict[str, _Bound] = {}
        for number, graph in enumerate(notes["graphs"]):
            for at in graph["paths"]:
                bound[at] = _Bound(path, number, graph, self._top.get_submodule(at), room, values)
        #: of each bound tensor: a module's table, the name in it, and the address of its memory
        self._places: list[Place] = [each for b in bound.values() for each in b.places]
        self._pointers: list[int] = [table[key].data_ptr() for table, key in self._places]
        links = [(each._modules, key, child) for each in self._top.modules() for key, child in each._modules.items()]
        self._links: tuple[tuple[Any, ...], ...] = tuple(zip(*links, strict=True))
        self._run: Callable[..., Any] = bound[""] if "" in bound else _around(self._top, bound)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the base model's output. The inputs have the form that was compiled; dynamic sizes may differ."""
        self.check()
        rows: Any = contextlib.nullcontext()
        if self._batch is not None and self._top is self.base:
            rows = self._batch.entered((), _named(self._signature, args, kwargs))
        elif self._batch is not None:  # the layers are called from around the model, which a hook there does not see
            total = size_of((), _named(self._signature, args, kwargs))
            self._batch.check_in_graph({}, PART, total, self._copies)
        with torch.no_grad(), rows:
            return self._run(*args, **kwargs)

    def check(self) -> None:
        """Refuses a model that has changed since it was bound, in a way that the compiled code can't notice."""
        if reason := _unfit(self.base, self._layers, self._name):
            raise refuse("ahead_state", found=reason, name=self._name)
        if self._batch is not None and self._batch.copies != self._copies:
            found = f"a batch that has each row {self._batch.copies} times"
            raise refuse("ahead_inputs", found=found, expected=f"each row {self._copies} times")
        try:
            same = [table[key].data_ptr() for table, key in self._places] == self._pointers
        except (KeyError, AttributeError):
            same = False
        tables, names, modules = self._links
        if not (same and all(map(operator.is_, map(dict.get, tables, names), modules))):
            raise refuse("ahead_moved")


def _unfit(base: torch.nn.Module, layers: Sequence[Any], name: str) -> str | None:
    """Describe a state of the model that the compiled code would compute wrongly, or None."""
    if base.training:
        return "training mode"
    for layer in layers:
        if layer.disable_adapters:
            return "adapters that are disabled"
        if layer.merged_adapters:
            return f"an adapter that is merged, {layer.merged_adapters[0]!r}"
        if layer.active_adapters != [name]:
            return f"the active adapters {layer.active_adapters}"
    return None


def _hosts(model: Any) -> list[Host]:
    """The carriers of adapters in a model, or in a pool's."""
    root = model if isinstance(model, torch.nn.Module) else model.model
    return [host for host in carriers(root) if host.configs]


def _top(host: Host) -> torch.nn.Module:
    """The module to compile: the base model, or the module that the user has put around the adapter's model."""
    root = unwrap_compiled(host.root)
    return host.base if root is host.carrier else root


def _prepared(model: Any) -> tuple[Host, str, torch.nn.Module]:
    """The model that carries the prepared adapter, the adapter's name, and the module to compile."""
    hosts = _hosts(model)
    found = [(host, name) for host in hosts for name in host.configs if room_of(host.base, name) is not None]
    if len(found) != 1:
        raise refuse("ahead_not_prepared", found=listing(repr(name) for _, name in found) or "none")
    ((host, name),) = found
    layers = [each for each in host.base.modules() if isinstance(each, BaseTunerLayer)]
    if reason := _unfit(host.base, layers, name):
        raise refuse("ahead_state", found=reason, name=name)
    return host, name, _top(host)


# ---- compiling


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, the defaults of those that are not passed included."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    named = bound.arguments
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and named.pop(parameter.name, ()):
            raise refuse("ahead_arguments", found=f"arguments without a name, in *{parameter.name}")
    return named


def _shapes(given: Mapping[str, Any], dynamic: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if dynamic is not None and (unknown := dynamic.keys() - given.keys()):
        raise refuse("ahead_arguments", found=f"dynamic_shapes for {listing(sorted(unknown))}, which is no input")
    return None if dynamic is None else {name: dynamic.get(name) for name in given}


def _export(module: torch.nn.Module, given: dict[str, Any], shapes: Any) -> torch.export.ExportedProgram:
    # An export takes one tensor that is passed twice for one input. And the code reads inputs as they lie in memory
    # here, so they are made contiguous, here and in each call.
    leaves, form = compat.tree_flatten(given)
    copies = [
        each.clone(memory_format=torch.contiguous_format) if isinstance(each, torch.Tensor) else each for each in leaves
    ]
    given = compat.tree_unflatten(copies, form)
    before = [(each, dict(each.__dict__)) for each in module.modules()]
    try:
        return torch.export.export(module, (), given, dynamic_shapes=shapes, strict=False)
    except HotswapError:
        raise
    except Exception as error:
        raise refuse("ahead_not_exportable", error=error, name=type(module).__name__) from error
    finally:
        # an export leaves copies where an attribute is a dict, such as PEFT's configs, which several modules share
        for each, attributes in before:
            each.__dict__.clear()
            each.__dict__.update(attributes)


def _blocks(base: torch.nn.Module, room: Any, given: dict[str, Any], dynamic: bool) -> dict[tuple[str, ...], Any]:
    """One exported program for each kind of repeated layer, by the paths of all layers of that kind."""
    kinds = {*(getattr(base, "_repeated_blocks", None) or getattr(base, "_no_split_modules", None) or ())}
    blocks = {path: each for path, each in base.named_modules() if type(each).__name__ in kinds}
    if not blocks:
        raise refuse("ahead_no_blocks", name=type(base).__name__)
    paths, seen = {block: path for path, block in blocks.items()}, {}

    def note(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(paths[block], _named(inspect.signature(block.forward), args, kwargs))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks.values()]
    try:
        base(**given)
    finally:
        for hook in hooks:
            hook.remove()
    alike: dict[str, list[str]] = {}
    for path in seen:
        forms = {key: _form(table[name]) for key, (table, name) in _places(blocks[path], room).items()}
        alike.setdefault(repr(forms), []).append(path)
    programs = {}
    for paths in alike.values():
        inputs = seen[paths[0]]
        for argument, value in inputs.items():
            if not _is_plain(value):
                raise refuse("ahead_arguments", found=f"a {type(value).__name__} for {argument!r} of a repeated block")
        shapes = {key: _all_dynamic(value) for key, value in inputs.items()} if dynamic else None
        programs[tuple(paths)] = _export(blocks[paths[0]], inputs, shapes)
    return programs


def _is_plain(value: object) -> bool:
    """Whether a value is a tensor, a number and so on, or made of such: no object that a layer may write to."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (torch.Tensor, bool, int, float, str))


def _all_dynamic(value: object) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_all_dynamic, value))
    if not isinstance(value, torch.Tensor):
        return None
    # an export takes sizes of 0 and 1 for constants
    return {axis: torch.export.Dim.AUTO for axis, size in enumerate(value.shape) if size > 1}


def _build(programs: Mapping[tuple[str, ...], torch.export.ExportedProgram], path: str) -> str:
    files = {}
    try:
        for number, program in enumerate(programs.values()):
            args, kwargs = program.example_inputs or ((), {})
            # PyTorch 2.8 makes no guards, and has no argument for them
            without = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
            graph = program.module(**without)
            for key, value in _lifted(program).items():  # only buffers keep their names
                delattr(graph, key)
                graph.register_buffer(key, value)
            files[str(number)] = compat.aot_compile(graph, args, kwargs, options=dict(OPTIONS))
        return compat.package_aoti(path, files)
    except Exception as error:
        raise refuse("ahead_not_compilable", error=error) from error


def _notes_on(program: Any, paths: tuple[str, ...], places: Mapping[str, Place]) -> dict[str, Any]:
    """The description of one graph for a loader: the tensors to bind, and the form of its inputs."""
    signature, ranges = program.graph_signature, {}
    wanted = {*signature.inputs_to_parameters.values(), *signature.inputs_to_buffers.values()}
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    inputs = []
    for spec in signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            value = values[spec.arg.name] if spec.arg.name in values else getattr(spec.arg, "value", None)
            inputs.append(_input(value))
    for symbol, allowed in program.range_constraints.items():
        ranges[str(symbol)] = [int(allowed.lower), int(allowed.upper) if allowed.upper.is_Integer else None]
    sizes = {size for each in inputs if isinstance(each, list) for size in each[0] if isinstance(size, str)}
    if dependent := sorted(size for size in sizes if not size.isidentifier()):
        raise refuse("ahead_arguments", found=f"sizes that depend on one another, {listing(dependent)}")
    tensors = {key: _form(places[key][0][places[key][1]]) for key in sorted(wanted)}
    names = list((program.example_inputs or ((), {}))[1])
    return dict(paths=paths, tensors=tensors, names=names, inputs=inputs, ranges=ranges)


def _input(value: object) -> Any:
    """The form of an input: sizes, dtype and device of a tensor; the value itself of anything else."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    sizes = [str(each) for each in value.shape]  # an export's size may be a symbol, and that a number
    grad = ["requires gradients"] if value.requires_grad else []
    return [[int(each) if each.isdecimal() else each for each in sizes], str(value.dtype), value.device.type, *grad]


def _form(tensor: torch.Tensor) -> list[Any]:
    """The properties of a tensor that compiled code relies on."""
    return [list(tensor.shape), list(tensor.stride()), str(tensor.dtype), tensor.device.type]


def _places(module: torch.nn.Module, room: Any) -> dict[str, Place]:
    """All tensors that code may be bound to, by their names in an export; tied ones by each of their names."""
    found: dict[str, Place] = {}
    for path, each in module.named_modules(remove_duplicate=False):
        before = f"{path}." if path else ""
        for table in (each._parameters, each._buffers):
            found |= {before + name: (table, name) for name, tensor in table.items() if tensor is not None}
        own = each.__dict__.get("lora_variant", {}).get(room.slot.adapter_name) if hasattr(room, "batch") else None
        if own is not None:
            found |= {before + buffer: (own.__dict__, name) for name, buffer in READ.items()}
    return found


def _lifted(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Tensors that a forward makes of nothing, or finds elsewhere than in the model's tables."""
    keys = program.graph_signature.inputs_to_lifted_tensor_constants.values()
    return {key: torch.as_tensor(program.constants[key]).detach().clone().contiguous() for key in keys}


def _add(path: str, records: Mapping[str, bytes]) -> None:
    """Adds records to PyTorch's archive."""
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        for name, content in records.items():
            archive.writestr(f"{root}/{name}", content)


# ---- loading


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the description and the values of a file; refuse one that can't be run here."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = {name.partition("/")[2]: name for name in archive.namelist()}
            notes, values = json.loads(archive.read(records[NOTES])), archive.read(records[VALUES])
            built = json.loads(archive.read(next(each for each in records.values() if each.endswith("_metadata.json"))))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise refuse("ahead_no_package", path=os.fspath(path), error=error) from error
    if notes["torch"] != torch.__version__:
        raise refuse("ahead_versions", found=f"torch {notes['torch']}", expected=f"torch {torch.__version__}")
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    needs = built.get("AOTI_CPU_ISA", "").lower().replace("avx512 ", "avx512_f ").split()
    if lacking := [each for each in needs if has.get(each) is False]:
        raise refuse("ahead_versions", found=f"code that uses {listing(lacking)}", expected="what this processor has")
    return notes, safetensors.torch.load(values)


class _Bound:
    """One compiled graph, bound to the tensors of one module."""

    def __init__(self, path: str, number: int, notes: Notes, module: torch.nn.Module, room: Any, values: Tensors):
        forms, places = notes["tensors"], _places(module, room)
        tensors = {key: places[key][0][places[key][1]] for key in forms if key in places}
        for key, form in forms.items():
            found = _form(tensors[key]) if key in tensors else None
            if found != form:
                raise refuse("ahead_other_tensor", key=key, found=found or "no such tensor", expected=form)
        self.names, self.inputs, self.ranges = notes["names"], notes["inputs"], notes["ranges"]
        self.places: list[Place] = [places[key] for key in forms]
        #: kept, since the code has nothing but their addresses
        self.tensors: dict[str, torch.Tensor] = {key: tensors[key].detach() for key in forms}
        self.tensors |= {key.partition(":")[2]: each for key, each in values.items() if key.startswith(f"{number}:")}
        # torch's own load_package runs a compiler first, to find out what the processor can do
        self.code: Any = compat.AOTICompiledModel(compat.AOTIModelPackageLoader(path, str(number), False, 1, -1))
        wanted = self.code.get_constant_fqns()
        self.code.load_constants({key: self.tensors[key] for key in wanted}, check_full_update=True, user_managed=True)
        self.signature: inspect.Signature = inspect.signature(module.forward)
        specs = [compat.treespec_loads(each) for each in self.code.loader.get_call_spec()]
        self.input_form, self.output_form = specs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = _named(self.signature, args, kwargs)
        if given.keys() != set(self.names):
            raise refuse("ahead_inputs", found=f"{listing(given)}", expected=f"the inputs {listing(self.names)}")
        given = {name: given[name] for name in self.names}
        leaves, form = compat.tree_flatten(((), given))
        if form != self.input_form:
            raise refuse("ahead_inputs", found=form, expected=self.input_form)
        self._check(leaves, given)
        run = self.code.loader.boxed_run if hasattr(self.code.loader, "boxed_run") else self.code.loader.run
        outputs = run([each.contiguous() for each in leaves if isinstance(each, torch.Tensor)])
        return compat.tree_unflatten(outputs, self.output_form)

    def _check(self, leaves: Sequence[Any], given: Mapping[str, Any]) -> None:
        """Refuses inputs of another form than those that were compiled."""
        sizes: dict[str, int] = {}

        def allowed(size: int, own: int | str) -> bool:
            low, high = self.ranges.get(own, (0, None)) if isinstance(own, str) else (own, own)
            return low <= size <= (size if high is None else high) and sizes.setdefault(str(own), size) == size

        for number, (value, expected) in enumerate(zip(leaves, self.inputs, strict=True)):
            found = _input(value)
            fits = found == expected
            if not fits and isinstance(found, list) and isinstance(expected, list):
                fits = found[1:] == expected[1:] and len(found[0]) == len(expected[0])
                fits = fits and all(map(allowed, found[0], expected[0]))
            if not fits:
                name = [name for name in given for _ in compat.tree_flatten(given[name])[0]][number]
                expected = f"{name}: {expected} with sizes in {self.ranges}"
                raise refuse("ahead_inputs", found=f"{name}: {found}", expected=expected)


class _Block(torch.nn.Module):
    """Takes the place of a repeated layer, and has all of its attributes."""

    def __init__(self, block: torch.nn.Module, bound: _Bound):
        super().__init__()
        self.__dict__["_live"], self.__dict__["_bound"] = block, bound

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_live"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._bound(*args, **kwargs)


def _around(base: torch.nn.Module, bound: Mapping[str, _Bound]) -> torch.nn.Module:
    """The base model once more, with compiled layers: its own modules but for those on the way to them."""
    copies = {"": _copy_of(base)}
    for path, each in bound.items():
        *way, last = path.split(".")
        for depth, step in enumerate(way, 1):
            above, at = ".".join(way[: depth - 1]), ".".join(way[:depth])
            if at not in copies:
                copies[at] = copies[above]._modules[step] = _copy_of(copies[above]._modules[step])
        parent = copies[".".join(way)]
        parent._modules[last] = _Block(parent._modules[last], each)
    return copies[""]


def _copy_of(module: Any) -> Any:
    """A module that shares all but its table of modules."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__, _modules=dict(module._modules))
    return twin
