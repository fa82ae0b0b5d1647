"""The oracle of the tests: one comparison of everything that a user could observe. A fresh load by PEFT is the truth.

:func:`observe` turns a model into plain values by name: every tensor with its dtype, device, flags and gradient; what
PEFT keeps for each adapter on each layer; which adapters are active, disabled or merged; modes, hooks and configs.
:func:`assert_equals` compares these with those of a fresh load, and with them outputs in evaluation and in training,
gradients, and saved files byte for byte, for the adapter in question and for its neighbors. :func:`snapshot` and
:func:`assert_untouched` are stricter: the same objects at the same addresses. ``test_oracle.py`` damages a model in
many ways, each of which must be noticed. Nothing of ``hotswap_lab`` is used but the names of its marks, and
``save_adapter``, which is tested.

Numbers are compared in float64, where a tolerance of 1e-9 leaves only the order of sums. Where a model can't be in
float64, :func:`rounding` measures what is allowed on this processor.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import os
import tempfile
import threading
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from operator import attrgetter
from pathlib import Path

import torch
from models import Kind, answer, call, converted, load
from peft import PeftConfig
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict

from hotswap_lab.core.tensors import OFF_ATTRIBUTE, PREPARED_ATTRIBUTE

TABLES = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias")
#: parts of names that wrappers add: PEFT's around layers and saved modules, and PyTorch's compiler
WRAPPERS = {"base_layer", "original_module", "token_adapter", "_orig_mod"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
WRAPPED = (BaseTunerLayer, AuxiliaryTrainingWrapper)


# ---- equal to a fresh load


def assert_equals_fresh_load(
    model,
    kind: Kind,
    folder: str,
    adapter_name: str = "default",
    *,
    prepared: bool = False,
    margin: float = 1000,
    activated: bool = False,
    **load_kwargs,
) -> None:
    """:func:`assert_equals` with a fresh load of ``folder``.

    ``activated``: PEFT's ``set_adapter`` was called, which lets what it activates be trained.
    """
    fresh = load(kind, folder, adapter_name, **load_kwargs)
    if activated:
        fresh.set_adapter(adapter_name)
    assert_equals(model, fresh, kind, adapter_name, prepared=prepared, margin=margin)


def assert_equals(
    model,
    fresh,
    kind: Kind,
    adapter_name: str = "default",
    *,
    prepared: bool = False,
    tolerance: float | None = None,
    margin: float = 1000,
    training: bool = True,
) -> None:
    """``model`` equals ``fresh`` in everything that a user could observe of the adapters that ``fresh`` has.

    The tensors and modules of a ``prepared`` model have other sizes than a fresh load's, and more buffers.
    ``training``: what they give in training, too, which some architectures draw with random numbers of their own.
    """
    tolerance = rounding(fresh, kind.inputs()) if tolerance is None else tolerance
    assert_same_outputs(model, fresh, kind, tolerance, margin)
    live, expected = (observe(each, adapter_name, prepared) for each in (model, fresh))
    assert_same(live, expected, may_have_more=True)
    assert_no_more_is_saved(model, fresh, live.keys() - expected.keys(), prepared)
    assert_off_is_off(model, adapter_name, live, expected, prepared)
    names = [adapter_name, *(name for name in _configs(fresh) if name != adapter_name)]
    for name in names:
        if name != adapter_name:
            with active(model, name), active(fresh, name):
                assert_same_outputs(model, fresh, kind, tolerance, margin=0)
        assert_same_files(model, fresh, name)
    if not (training and (_is_special_in_training(model) or _is_special_in_training(fresh))):
        return
    live, expected = (trained(each, kind, prepared) for each in (model, fresh))
    assert live.keys() >= expected.keys(), expected.keys() - live.keys()
    for key, value in expected.items():
        limit = 10 * tolerance * value.abs().max().item()
        relative = 10 * tolerance
        torch.testing.assert_close(
            live[key], value, rtol=relative, atol=limit, msg=lambda text, key=key: f"{key}: {text}"
        )


def assert_no_more_is_saved(model, fresh, keys: set[tuple], prepared: bool) -> None:
    """Layers that are off or reserved are in no state dict; other adapters are, and what a prepared layer has."""
    others = _configs(model).keys() - _configs(fresh).keys()
    tables = {
        table.split(".")[0]
        for module in model.modules()
        if isinstance(module, WRAPPED)
        for table in module.adapter_layer_names
    }
    for parts in (set(key[1].split(".")) for key in keys if key[0] == "state"):
        assert parts & others or (prepared and not parts & tables), f"more in the state dict: {parts}"


def assert_off_is_off(model, adapter_name: str, live: dict, expected: dict, prepared: bool) -> None:
    """Where a fresh load has nothing of the adapter, nothing is trained; and nowhere else is it marked as off."""
    for key, value in live.items():
        if key not in expected and key[0] == "tensor" and adapter_name in (parts := key[1].split(".")):
            may_be_trained, _, has_no_gradient = (value if prepared else value[0])[2]
            may_be_trained &= not {"lora_A", "lora_B"} & {*parts}  # which have no gradient while both are zero
            assert (has_no_gradient, may_be_trained) == (True, False), f"{key[1]} is off and is trained"
    on = {name(key[1]) for key in expected if key[0] == "table" and key[3] == adapter_name}
    for path, module in model.named_modules():
        off, prepared_for = (vars(module).get(each, ()) for each in (OFF_ATTRIBUTE, PREPARED_ATTRIBUTE))
        assert {*off, *prepared_for} <= _configs(model).keys(), f"{path} has marks of adapters that are gone"
        assert adapter_name not in off or name(path) not in on, f"{path} is marked as off"


#: of the largest output: what sums in another order may change in float64, and what is visible
TOLERANCE, VISIBLE = 1e-9, 1e-5
#: how many times as far as from float64 two models may be from each other that round otherwise
ROUNDINGS = 3


def rounding(model: torch.nn.Module, inputs: object) -> float:
    """What a model that computes the same may differ by, relative to the largest output.

    Outside of float64 this is measured: a multiple of what this model's outputs are off those of its float64 copy.
    """
    outputs = call(model, inputs)
    dtypes = {each.dtype for each in (outputs, *model.parameters())}
    if dtypes == {torch.float64}:
        return TOLERANCE
    exact = call(copy.deepcopy(model).double(), converted(inputs, torch.float64))
    off = (outputs.double() - exact).abs().max().item() / exact.abs().max().item()
    return ROUNDINGS * max(off, *(torch.finfo(each).eps for each in dtypes if each.is_floating_point))


def rounding_of_inductor(model: torch.nn.Module, inputs: object) -> float:
    """What compiled code may differ by: it rounds otherwise what a model computes in float32 anyway, as its ropes."""
    single = converted(inputs, torch.float32)
    return rounding(copy.deepcopy(model).float(), single)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """``tolerance`` is relative to the largest number, and is given where it isn't of float64."""
    if tolerance is None:
        assert expected.dtype == torch.float64, f"measure the tolerance of {expected.dtype}"
        tolerance = TOLERANCE
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def assert_same_outputs(model, fresh, kind: Kind, tolerance: float | None = None, margin: float = 1000) -> None:
    """``margin``: how many times what is visible the adapter changes the outputs by, at least; 0 for any change."""
    expected = call(fresh, kind.inputs())
    scale = expected.abs().max().item()
    tolerance = rounding(fresh, kind.inputs()) if tolerance is None else tolerance
    if margin:
        without = _without_adapter(kind)
        # a test that passes whatever the adapter does is worth nothing; prompts even make the outputs longer
        change = (expected - without).abs().max().item() if expected.shape == without.shape else scale
        least = max(margin * VISIBLE, 2 * tolerance) * scale
        assert change > least, f"the adapter changes the outputs by {change} only"
    assert_close(call(model, kind.inputs()), expected, tolerance)


@functools.cache
def _without_adapter(kind: Kind) -> torch.Tensor:
    return call(kind.base(), kind.inputs())


def _is_special_in_training(model) -> bool:
    dropouts = (module for path, module in model.named_modules() if "lora_" in path or "dropout" in path)
    return any(each.requires_grad for each in model.parameters()) or any(getattr(each, "p", 0) for each in dropouts)


def trained(model, kind: Kind, prepared: bool) -> dict[str, torch.Tensor]:
    """The outputs in training, and all gradients, with the same random numbers in each dropout. Changes nothing.

    Zeros around the tensors of a ``prepared`` model have no gradient, so there the norms are compared.
    """
    parameters = {name(key): each for key, each in model.named_parameters()}
    before = [(module, module.training) for module in model.modules()]
    gradients = [(each, each.grad) for each in parameters.values()]
    buffers = [(each, each.clone()) for each in model.buffers()]
    handles = [
        handle
        for path, module in model.named_modules()
        if isinstance(getattr(module, "p", None), float) and "Dropout" in type(module).__name__
        for handle in _seeded(module, name(path))
    ]
    needs_gradients = any(each.requires_grad for each in parameters.values())
    try:
        with torch.random.fork_rng(), torch.set_grad_enabled(needs_gradients):
            torch.manual_seed(7)
            model.train()
            for each in parameters.values():
                each.grad = None
            outputs = answer(model, kind.inputs())
            if outputs.requires_grad:
                outputs.square().mean().backward()
        found = {key: each.grad for key, each in parameters.items() if each.grad is not None}
        return {
            "outputs": outputs.detach(),
            **({key: each.norm() for key, each in found.items()} if prepared else found),
        }
    finally:
        for handle in handles:
            handle.remove()
        for module, training in before:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _seeded(module: torch.nn.Module, path: str) -> list:
    """Makes a dropout draw by its name: whether other layers draw before it makes no difference."""
    states = []

    def seed(*_: object) -> None:
        states.append(torch.get_rng_state())
        torch.default_generator.manual_seed(zlib.crc32(path.encode()))

    def give_back(*_: object) -> None:
        torch.set_rng_state(states.pop())

    return [module.register_forward_pre_hook(seed), module.register_forward_hook(give_back)]


@contextlib.contextmanager
def active(model, adapter_name: str) -> Iterator[None]:
    """Another adapter computes for a while."""
    before = list(model.active_adapters)
    flags = [(each, each.requires_grad) for each in model.parameters()]
    tuner = model.base_model if hasattr(model.base_model, "set_adapter") else model
    try:
        model.set_adapter(adapter_name)
        yield
    finally:
        model.set_adapter(before[0]) if len(before) == 1 else tuner.set_adapter(before)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


# ---- what can be observed


def name(path: str) -> str:
    """The path of a module or tensor as it is without wrappers."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def _configs(model) -> dict[str, PeftConfig]:
    return dict(getattr(model, "peft_config", None) or {})


def observe(model, adapter_name: str = "default", prepared: bool = False) -> dict[tuple, object]:
    """All that a user could see of a model's adapters in plain values, by what it is and where."""
    found: dict[tuple, object] = {("active",): list(getattr(model, "active_adapters", ()))}
    found["mode",] = model.training
    for adapter, config in _configs(model).items():
        found["config", adapter] = config_of(config)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for key, tensor in tensors:
        found["tensor", name(key)] = _flags(tensor) if prepared else plain(tensor)
    for key, tensor in model.state_dict().items():
        found["state", name(key)] = plain(tensor)
    for path, module in model.named_modules(remove_duplicate=False):
        found["modes", name(path)] = module.training
        if not prepared:
            hooks = [type(hook).__name__ for table in HOOKS for hook in getattr(module, table).values()]
            found["hooks", name(path)] = [*found.get(("hooks", name(path)), ()), *hooks]
        if isinstance(module, WRAPPED):
            found["computes", path] = plain([module.active_adapters, module.disable_adapters, module.merged_adapters])
            for adapter in _configs(model) or [adapter_name]:
                found |= {
                    ("table", path, table, adapter): entry for table, entry in tables_of(module, adapter, prepared)
                }
    found["disabled",] = {module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer)}
    return found


def tables_of(module: torch.nn.Module, adapter_name: str, prepared: bool = False) -> Iterator[tuple[str, object]]:
    """What PEFT keeps of an adapter on a layer: parameters, buffers, scalars. Of a prepared layer, the scalars."""
    tables = TABLES if isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer) else ()
    for table in tables if prepared else {*module.adapter_layer_names, *module.other_param_names, *tables}:
        try:
            entries = attrgetter(table)(module)
        except AttributeError:  # variants of LoRA bring tables of their own
            continue
        if hasattr(entries, "keys") and adapter_name in entries:
            entry = entries[adapter_name]
            if isinstance(entry, torch.nn.Module):
                yield table, (repr(entry), plain(dict(entry.state_dict())))
            else:
                yield table, entry.item() if prepared and torch.is_tensor(entry) else plain(entry)


def config_of(config: PeftConfig) -> dict:
    """For some architectures PEFT makes a set of what the file has as a list."""
    return {
        key: sorted(map(str, value)) if isinstance(value, (list, tuple, set)) and _is_of_names(value) else plain(value)
        for key, value in config.to_dict().items()
    }


def _is_of_names(values) -> bool:
    return all(isinstance(each, str) for each in values)


def _flags(tensor: torch.Tensor) -> tuple:
    flags = tensor.requires_grad, isinstance(tensor, torch.nn.Parameter), tensor.grad is None
    return str(tensor.dtype), str(tensor.device), flags


def plain(value: object) -> object:
    """Something that can be compared: tensors by their bits (NaN equals NaN, -0.0 is not 0.0), the rest by content."""
    if isinstance(value, torch.Tensor):
        gradient = None if value.grad is None else plain(value.grad)
        if value.is_meta:
            return _flags(value), tuple(value.shape), gradient
        if type(value.data) is not torch.Tensor:  # quantized by a library
            return _flags(value), tuple(value.shape), repr(value), gradient
        data = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # a view of one number has strides
        return _flags(value), tuple(value.shape), data.view(-1).view(torch.uint8).numpy().tobytes(), gradient
    if isinstance(value, Mapping):
        return [(str(key), plain(each)) for key, each in value.items()]  # in their order
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, float):
        return value if value == value else "NaN"
    if value is None or isinstance(value, (bool, int, str, torch.dtype)):
        return value
    if isinstance(value, Path):
        return files_in(value) if value.is_dir() else str(value)
    if isinstance(value, PeftConfig):
        return config_of(value)
    return type(value).__qualname__


def differences(one: object, other: object, path: str = "") -> Iterator[str]:
    """Where two plain values differ, a line for each place."""
    if one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            yield from differences(one.get(key, "nothing"), other.get(key, "nothing"), f"{path}[{key}]")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(left, right, f"{path}[{number}]")
    else:
        yield f"  {path}: {str(one)[:150]} -> {str(other)[:150]}"


def assert_same(live: dict, expected: dict, may_have_more: bool = False) -> None:
    """``may_have_more``: layers that are off, other adapters, and what a prepared layer has are in ``live`` alone."""
    live = {key: value for key, value in live.items() if key in expected} if may_have_more else live
    found = list(differences(live, expected))
    assert not found, f"{len(found)} differences\n" + "\n".join(found[:12])


def assert_same_tables(model, fresh, adapter_name: str, prepared: bool = False) -> None:
    """All that PEFT keeps of one adapter is the same on each layer that ``fresh`` has it on."""
    live, expected = (
        {
            (path, table): entry
            for path, module in each.named_modules()
            if isinstance(module, WRAPPED)
            for table, entry in tables_of(module, adapter_name, prepared)
        }
        for each in (model, fresh)
    )
    assert_same(live, expected, may_have_more=True)


def assert_same_tensors(live: Mapping, fresh: Mapping) -> None:
    """The same names in any order, and the same bits."""
    assert_same(*({key: _bits(each[key]) for key in sorted(each)} for each in (live, fresh)))


def _bits(tensor: torch.Tensor) -> object:
    return str(tensor.dtype), plain(tensor.detach())[1:3]


# ---- files


def assert_same_files(model, fresh, adapter_name: str) -> None:
    """PEFT's ``save_pretrained`` and our ``save_adapter`` write the same bytes for both."""
    from hotswap_lab import save_adapter

    assert_same_tensors(
        get_peft_model_state_dict(model, adapter_name=adapter_name),
        get_peft_model_state_dict(fresh, adapter_name=adapter_name),
    )
    with tempfile.TemporaryDirectory() as folder:
        contents = []
        for number, each in enumerate((model, fresh)):
            target = Path(folder, str(number))
            if hasattr(each, "save_pretrained") and hasattr(each, "base_model"):
                each.save_pretrained(target / "PEFT", selected_adapters=[adapter_name])
            save_adapter(each, target / "ours", adapter_name)
            contents.append({key: _in_order(key, value) for key, value in files_in(target).items()})
        assert_same(*contents)
        one, *others = (value for key, value in contents[1].items() if key.endswith("adapter_config.json"))
        assert all(each == one for each in others), list(differences(others, [one]))


def _in_order(path: str, content: bytes | None) -> object:
    """A set comes to a file in any order."""
    if not path.endswith("adapter_config.json"):
        return content
    return {
        key: sorted(value) if isinstance(value, list) and _is_of_names(value) else plain(value)
        for key, value in json.loads(content).items()
    }


def files_in(folder: str | Path) -> dict[str, bytes | None]:
    """The contents of all files in a folder by their paths; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


# ---- untouched


def contents(model: torch.nn.Module) -> dict:
    """All that makes up a model, as plain values: weights, flags, gradients, tables in their order, configs, hooks."""
    found: dict[str, object] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[path] = (
            type(module).__qualname__,
            {
                # hooks are kept under numbers that count up
                key: plain([*value.values()] if "_hooks" in key and isinstance(value, dict) else value)
                for key, value in vars(module).items()
                if key not in ("_modules", "config", "peft_config")
            },
        )
    for path, module in model.named_modules():
        if isinstance(configs := module.__dict__.get("peft_config"), dict):
            found[f"{path}: configs"] = [(each, plain(config.to_dict())) for each, config in configs.items()]
    return found


def identities(model: torch.nn.Module) -> dict:
    """What a failed operation must not exchange either: objects and their addresses."""
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        found[path] = id(module), type(module)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found[f"{path}.{key}"] = id(parameter), parameter.data_ptr(), parameter.stride(), id(parameter.grad)
        if isinstance(configs := module.__dict__.get("peft_config"), dict):
            found[f"{path}: configs"] = id(configs), {each: id(config) for each, config in configs.items()}
        if isinstance(module, BaseTunerLayer) and isinstance(scaling := module.__dict__.get("scaling"), Mapping):
            tensors = {key: value for key, value in scaling.items() if torch.is_tensor(value)}
            found[f"{path}: scaling"] = {key: value.data_ptr() for key, value in tensors.items()}
    return found


#: where else on a module this package has objects of its own
OURS = (*HOOKS, "_state_dict_hooks", "peft_config", "lora_variant")
#: attributes of this package's objects that a snapshot leaves out, with the reasons
LEFT_OUT = {
    "_results _own_views": "results, which are worked out again where they are missing",
    "_links _addresses _bases host": "where everything was at the last look; a look may be through another wrapper",
    "_hotswap_lost": "noted on a config at the first look, whatever becomes of the swap",
    "Learned.sides": "memory for the next update",
    "Member.used Members._uses": "which member of a pool was looked at last, for its order of dropping",
}
#: and what two models differ in that were made and swapped in the same way
ONE_OF_MANY = {
    "_hotswap_when": "the time of a swap",
    "_versions number hooks": "counted for all models of a process, or for all that was ever written",
}


def notes(value: object, which: bool = True, seen: dict[int, tuple] | None = None, path: str = "") -> object:
    """What this package keeps in a value: its own objects by their contents, others by what and ``which`` they are."""
    seen = {} if seen is None else seen
    go = functools.partial(notes, which=which, seen=seen)
    if isinstance(value, (torch.nn.Module, torch.nn.Parameter)):
        return type(value).__qualname__, which and id(value)
    if isinstance(value, torch.Tensor):
        return which and value.data_ptr(), plain(value)
    if isinstance(value, functools.partial):
        return [go(each, path=path) for each in (value.func, value.args, value.keywords)]
    if inspect.ismethod(value):
        return value.__qualname__, go(value.__self__, path=path)
    if isinstance(value, (set, frozenset)):
        return sorted(str(go(each)) for each in value)
    is_config, is_ours = isinstance(value, PeftConfig), type(value).__module__.startswith("hotswap_lab")
    if not (is_ours or is_config or isinstance(value, (Mapping, list, tuple, threading.local))):
        return plain(value)
    if id(value) in seen:
        return f"the same as {seen[id(value)][0]}"
    seen[id(value)] = path, value  # which is kept meanwhile, so that no other object gets its id
    entries = list(getattr(value, "__dict__", {}).items())
    if isinstance(value, threading.local):  # an attribute that was never set reads as None
        entries = [(key, each) for key, each in entries if each is not None]
    if isinstance(value, Mapping):
        entries += [(str(go(key)), each) for key, each in value.items()]
    elif isinstance(value, (list, tuple)):
        entries += enumerate(value)
    left_out = {*" ".join(LEFT_OUT | ({} if which else ONE_OF_MANY)).split(), *_cached(kind := type(value))}
    if getattr(value, "is_in_files", False):  # whether a member of a pool is in memory, too, doesn't count
        left_out.add("packed")
    kept = [(key, each) for key, each in entries if left_out.isdisjoint((key, f"{kind.__name__}.{key}"))]
    found = {key: go(each, path=f"{path}.{key}") for key, each in kept}
    return {"": (type(value).__qualname__, which and (is_ours or is_config) and id(value), [*found]), **found}


def _cached(kind: type) -> set[str]:
    return {name for each in kind.__mro__ for name, entry in vars(each).items() if isinstance(entry, cached_property)}


def notes_on(model: torch.nn.Module, which: bool = True) -> object:
    """The :func:`notes` on all modules."""
    ours = {
        path: {
            # hooks are kept under numbers that count up
            key: [*each.values()] if isinstance(each, OrderedDict) else each
            for key, each in vars(module).items()
            if key in OURS or key.startswith("hotswap")
        }
        for path, module in model.named_modules()
    }
    return notes(ours, which)


def snapshot(model: object) -> dict:
    """Everything of a model, or of a pool, that a refused operation must leave alone, bit for bit.

    Left out are the model's own config, which no swap may reach, and what ``LEFT_OUT`` names.
    """
    if not isinstance(model, torch.nn.Module):
        return {"own": notes(model), **snapshot(model.model)}
    return {
        "contents": contents(model),
        "objects": identities(model),
        "saved": list(model.state_dict()),
        "notes": notes_on(model),
    }


def assert_untouched(model: object, before: dict) -> None:
    assert_same(snapshot(model), before)


@contextlib.contextmanager
def untouched(*models: object) -> Iterator[None]:
    """The block leaves these models and pools alone, whether it ends well or with an error."""
    before = [snapshot(model) for model in models]
    try:
        yield
    finally:
        for model, each in zip(models, before, strict=True):
            assert_untouched(model, each)


def surroundings() -> dict:
    """What an operation must leave alone outside of its models: the process's settings, threads, and open files."""
    return dict(
        environment=dict(os.environ),
        folder=os.getcwd(),
        gradients=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(),
        dtype=str(torch.get_default_dtype()),
        modes=torch._C._len_torch_function_stack(),
        randomness=torch.get_rng_state().numpy().tobytes(),
        filters=list(warnings.filters),
        threads=set(threading.enumerate()),
        files=_open_files(),
    )


def _open_files() -> list[str]:
    """What this process has open, where the system says so."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # that of the folder itself
                found.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(found)


def assert_nothing_left(before: dict, now: dict, what: str = "") -> dict:
    """No file is left open, and no thread; the surroundings ``now`` without these, to compare with those ``before``.

    A file or a thread of an earlier test (nbval leaves many to the garbage collector) may end in the meantime.
    """
    left = collections.Counter(now["files"]) - collections.Counter(before["files"])
    assert not left, f"{what}: left open: {list(left)}"
    assert now["threads"] <= before["threads"], f"{what}: left {threading.enumerate()}"
    return {**now, "files": before["files"], "threads": before["threads"]}


@contextlib.contextmanager
def nothing_else_changes(*arguments: object, may_warn: bool = False) -> Iterator[None]:
    """The block changes nothing outside of its models: nothing of the process, no argument, and it warns of nothing."""

    def now() -> dict:
        given = [vars(each) if dataclasses.is_dataclass(each) else each for each in arguments]
        return {**surroundings(), "arguments": plain(given)}

    before = now()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        yield
        assert list(warnings.filters) == filters
    assert_same(assert_nothing_left(before, now()), before)
    assert may_warn or not caught, [str(each.message) for each in caught]
