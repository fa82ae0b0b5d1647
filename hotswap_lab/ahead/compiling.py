"""Exports a model, or each of its repeated blocks, compiles it, and records the code's assumptions.

Tests: ``tests/ahead/test_ahead.py`` and ``tests/ahead/test_ahead_checks.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .. import compat
from ..core.errors import HotswapError, listing, refused
from ..core.report import readable_bytes
from ..core.slot import room_of
from ..pools.rows import RowRoom
from ..threads import locked
from . import file
from .live import Place, copied, facts_of, form_of, kept, named, places_in, prepared
from .loading import AheadModel, input_form
from .sizes import Sizes, conditions_of

#: without weights in it; and with small tensors read from memory, not written into the code
OPTIONS = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
OPTIONS["always_keep_tensor_constants"] = True


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
    """Compile a prepared model ahead of time, to a file that :func:`aoti_load` binds to a model in any process.

    Adapters can be swapped there as usual: the file has no weights, and no number that a swap changes.

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
        Other sizes are fixed. For an export, 0 and 1 are special: a size that is 1 now stays 1, and one that is 2 or
        more now can't be 1 later. So compile a batch of 1 on its own. Conditions that the model's code sets on sizes
        (``length % 4 == 0``) are checked at each call.
    repeated_blocks:
        Compile only the layers that a model repeats, each kind of them once. Compiling takes seconds instead of
        minutes, and calls are a little slower, because the rest of the model runs without compiling. Each layer is
        exported, because only layers with the same graph and constants share code.
    progress:
        Print the times, and the allowed sizes if some are dynamic.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    HotswapError
        If the model is not prepared, if PyTorch can't export or compile it, or if the outputs of the compiled code
        differ from the model's for these inputs.

    Examples
    --------
    >>> from hotswap_lab import AdapterPool, aoti_compile, aoti_load, demo
    >>> model, tokenizer = demo.load("reverse")
    >>> family = {name: demo.adapter_path(name) for name in demo.adapter_names()}
    >>> pool = AdapterPool(model, adapters=family, progress=False)
    >>> inputs = dict(tokenizer("hotswap>", return_tensors="pt"), use_cache=False)
    >>> path = aoti_compile(pool, "demo.pt2", kwargs=inputs, progress=False)  # doctest: +SKIP
    >>> ahead = aoti_load(path, pool)  # here, or in a process with no compiler  # doctest: +SKIP
    >>> pool.swap("shout")  # `ahead` uses it from now on
    >>> logits = ahead(**inputs).logits  # doctest: +SKIP

    Notes
    -----
    Uses ``torch.export.export`` and AOTInductor. https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
    """
    start = time.monotonic()
    host, name, top = prepared(model)
    given = named(inspect.signature(top.forward), tuple(args), kwargs or {})
    room = room_of(host.base, name)
    rows = room.exporting() if isinstance(room, RowRoom) else contextlib.nullcontext()
    # an export replaces the model's tensors while it runs
    with torch.no_grad(), locked(host.base), rows:
        if repeated_blocks:
            programs = _blocks(top, room, given, dynamic_shapes is not None)
        else:
            programs = {("",): _export(top, given, _shapes(given, dynamic_shapes))}
    path, exported = Path(path), time.monotonic() - start
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # the complete file is moved to its place
        places = {paths: places_in(top.get_submodule(paths[0]), room) for paths in programs}
        for paths, program in programs.items():  # before building, refuse conditions that can't be checked later
            _notes_on(program, paths, places[paths])
        built = _build(programs, os.path.join(folder, "built.pt2"))
        # compiling adds conditions
        graphs = [_notes_on(program, paths, places[paths]) for paths, program in programs.items()]
        ranks = {layer.path: layer.tensors[0].capacity for layer in room.slot.layers}
        notes = dict(torch=torch.__version__, base=type(top).__name__, name=name, ranks=ranks, graphs=graphs)
        notes["rows"] = (room.rows, room.batch.copies) if isinstance(room, RowRoom) else None
        notes["facts"] = facts_of(top, [path for paths in programs for path in paths])
        notes["given"], values = file.describe_inputs(given)
        values |= {f"{n}:{k}": v for n, p in enumerate(programs.values()) for k, v in _lifted(p).items()}
        file.add(built, notes, values)
        compiled, proving = time.monotonic() - start - exported, time.monotonic()
        with locked(host.base):
            AheadModel(built, host, notes, values, given)
        os.replace(built, path)
    if progress:
        bound, proven = sum(len(graph["tensors"]) for graph in graphs), time.monotonic() - proving
        took = f"exported in {exported:.0f} s, compiled in {compiled:.0f} s, proven in {proven:.0f} s"
        size = f"{readable_bytes(path.stat().st_size)} without weights"
        print(f"{path.name}: {took}, {size}, {bound} tensors to bind")
        if dynamic_shapes is not None:
            sizes = Sizes(graphs[0]["symbols"], graphs[0]["conditions"])
            print(f"  sizes{' of a block' if repeated_blocks else ''}: {sizes}; all others as now")
    return path


def _shapes(given: Mapping[str, Any], dynamic: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if dynamic is not None and (unknown := dynamic.keys() - given.keys()):
        raise refused("ahead_arguments", found=f"dynamic_shapes for {listing(sorted(unknown))}, which isn't an input")
    return None if dynamic is None else {name: dynamic.get(name) for name in given}


def _export(module: torch.nn.Module, given: dict[str, Any], shapes: Any) -> torch.export.ExportedProgram:
    # Copies, because an export treats one tensor that is passed twice as one input. They are contiguous, here and in
    # each call, because the code fixes the strides of its inputs.
    given, live = copied(given), module.forward

    def forward(**arguments: Any) -> Any:
        return live(**arguments)

    # torch.export supports no sizes for inputs in a forward's **kwargs
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in given]
    forward.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    try:
        with kept(module):  # an export leaves copies where an attribute is a dict, such as PEFT's configs
            if not given.keys() <= inspect.signature(live).parameters.keys():
                module.forward = forward
            return torch.export.export(module, (), given, dynamic_shapes=shapes, strict=False)
    except HotswapError:
        raise
    except Exception as error:
        raise refused("ahead_not_exportable", error=error, name=type(module).__name__) from error


def _blocks(base: torch.nn.Module, room: Any, given: dict[str, Any], dynamic: bool) -> dict[tuple[str, ...], Any]:
    """Export one program for each kind of repeated layer, by the paths of all layers of that kind."""
    kinds = {*(getattr(base, "_repeated_blocks", None) or getattr(base, "_no_split_modules", None) or ())}
    blocks: dict[str, torch.nn.Module] = {}
    for path, module in base.named_modules():  # a block in a block is compiled with it
        if type(module).__name__ in kinds and not any(path.startswith(f"{outer}.") for outer in blocks):
            blocks[path] = module
    if not blocks:
        raise refused("ahead_no_blocks", name=type(base).__name__)
    paths, inputs_of = {block: path for path, block in blocks.items()}, {}

    def record(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs_of.setdefault(paths[block], named(inspect.signature(block.forward), args, kwargs))

    with kept(base):  # removes the hooks afterwards
        for block in blocks.values():
            block.register_forward_pre_hook(record, with_kwargs=True)
        base(**given)
    # layers of one class may still differ, so each is exported and compared with the others
    alike: dict[str, tuple[list[str], torch.export.ExportedProgram]] = {}
    for path, inputs in inputs_of.items():
        for argument, value in inputs.items():
            if not _is_plain(value):
                raise refused("ahead_arguments", found=f"a {type(value).__name__} for {argument!r} of a repeated block")
        shapes = {key: _all_dynamic(value) for key, value in inputs.items()} if dynamic else None
        program = _export(blocks[path], inputs, shapes)
        alike.setdefault(_likeness(program, places_in(blocks[path], room)), ([], program))[0].append(path)
    return {tuple(paths): program for paths, program in alike.values()}


def _likeness(program: Any, places: Mapping[str, Place]) -> str:
    """A text that is the same for two programs if they compute the same with their tensors."""
    code = [getattr(graph, "code", "") for graph in program.graph_module.modules()]  # includes branches
    constants = hashlib.sha256(safetensors.torch.save(_lifted(program))).hexdigest()
    return "\n".join([*code, str(program.graph_signature), constants, json.dumps(_notes_on(program, (), places))])


def _is_plain(value: object) -> bool:
    """Whether a value is a tensor, a plain value, or a list of these, not an object that a layer may write to."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (torch.Tensor, bool, int, float, str))


def _all_dynamic(value: object) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_all_dynamic, value))
    if not isinstance(value, torch.Tensor):
        return None
    # an export treats sizes of 0 and 1 as constants
    return {axis: torch.export.Dim.AUTO for axis, size in enumerate(value.shape) if size > 1}


def _build(programs: Mapping[tuple[str, ...], torch.export.ExportedProgram], path: str) -> str:
    files = {}
    try:
        for number, program in enumerate(programs.values()):
            args, kwargs = program.example_inputs or ((), {})
            # PyTorch 2.8 has neither guards nor the argument
            without = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
            graph = program.module(**without)
            for key, value in _lifted(program).items():  # only buffers keep their names
                delattr(graph, key)
                graph.register_buffer(key, value)
            files[str(number)] = compat.aot_compile(graph, args, kwargs, options=dict(OPTIONS))
        return compat.package_aoti(path, files)
    except Exception as error:
        raise refused("ahead_not_compilable", error=error) from error


def _notes_on(program: Any, paths: tuple[str, ...], places: Mapping[str, Place]) -> dict[str, Any]:
    """Describe one graph for a loader: the tensors to bind, and the form of its inputs."""
    signature = program.graph_signature
    wanted = {*signature.inputs_to_parameters.values(), *signature.inputs_to_buffers.values()}
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    given = program.example_inputs[1]
    examples = [(name, leaf) for name in given for leaf in compat.tree_flatten(given[name])[0]]
    inputs, symbols, conditions, sizes = [], {}, conditions_of(program), {}
    specs = [spec for spec in signature.input_specs if spec.kind.name == "USER_INPUT"]
    for spec, (name, example) in zip(specs, examples, strict=True):
        value = values[spec.arg.name] if spec.arg.name in values else getattr(spec.arg, "value", None)
        inputs.append(form := input_form(value))
        for axis, size in enumerate(form[0]) if isinstance(form, list) else ():
            if isinstance(size, str):
                if not size.isidentifier():  # an expression, such as twice the size of another input
                    form[0][axis] = f"size_{len(symbols)}"
                    conditions.append(f"Eq({form[0][axis]}, {size})")
                symbols.setdefault(form[0][axis], f"{name}.shape[{axis}]")
                sizes.setdefault(form[0][axis], example.shape[axis])
    Sizes(symbols, conditions).check(*sizes.values())
    tensors = {key: form_of(places[key][0][places[key][1]]) for key in sorted(wanted)}
    graphs = [getattr(module, "graph", program.graph) for module in program.graph_module.modules()]
    nodes = [node for graph in graphs for node in graph.nodes]
    writes = any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in nodes)
    form = dict(names=list(given), inputs=inputs, writes=writes, symbols=symbols, conditions=conditions)
    return dict(paths=paths, tensors=tensors, **form)


def _lifted(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Constant tensors that a forward creates, or reads from outside of the model's tables."""
    keys = program.graph_signature.inputs_to_lifted_tensor_constants.values()
    constants: dict[str, Any] = program.constants
    return {key: constants[key].detach().clone().contiguous() for key in keys}
