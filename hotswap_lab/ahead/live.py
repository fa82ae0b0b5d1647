"""The parts of a live model that compiled code depends on: modules and their settings, tensors, adapter state.

Tests: ``tests/ahead/test_ahead_checks.py``.
"""

import contextlib
import copy
import dataclasses
import enum
import functools
import inspect
import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.hooks import RemovableHandle

from .. import compat
from ..beyond.guards import state_kept
from ..compat import ADAPTER_STATE
from ..core.compiled import unwrap_compiled
from ..core.errors import listing, refused
from ..core.host import Host, hosts_in
from ..core.slot import room_of
from ..pools.layers import READ
from ..pools.rows import RowRoom

#: the location of a tensor: a table of a module, and a name in it
Place = tuple[dict[str, Any], str]
#: settings that no forward reads; dtypes are compared tensor by tensor
LABELS = {"architectures", "auto_map", "dtype", "torch_dtype", "id2label", "label2id", "problem_type"}
LABELS |= {"finetuning_task", "task_specific_params", "name_or_path", "transformers_version", "training"}
LABELS |= {"gradient_checkpointing", "generation_config", "tokenizer_class"}
#: set on a layer where an adapter has been off
LABELS |= {"merge", "delete_adapter"}
#: token ids that generating reads, and in models that aren't causal also the forward
ENDS = {"bos_token_id", "eos_token_id", "pad_token_id", "padding_idx"}
#: the module of hooks that transformers adds in a forward; they do nothing unless it asks for their output
QUIET_HOOKS = "transformers.utils.output_capturing"
#: whether adapters are disabled, which ones are merged, and which are active
TUNER_STATE = operator.itemgetter(*ADAPTER_STATE)
IS_TRAINING = operator.attrgetter("training")
#: how code reads a tensor's memory: ``weight.data = weight.data.t()`` changes the last three only
READS = (torch.Tensor.data_ptr, torch.Tensor.size, torch.Tensor.stride, operator.attrgetter("dtype"))
CONTAINERS = (torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.ParameterDict, torch.nn.ParameterList)


def top_of(host: Host) -> torch.nn.Module:
    """The module to compile: the base model, or a module of the user's around the adapter's model."""
    return host.base if (root := unwrap_compiled(host.root)) is host.carrier else root


def prepared(model: Any) -> tuple[Host, str, torch.nn.Module]:
    """The model that carries the prepared adapter, the adapter's name, and the module to compile."""
    hosts = hosts_in(model)
    adapters = [(host, name) for host in hosts for name in host.configs if room_of(host.base, name) is not None]
    if len(adapters) != 1:
        raise refused("ahead_not_prepared", found=listing(repr(name) for _, name in adapters) or "none")
    ((host, name),) = adapters
    top = top_of(host)
    if reason := unfit(top, tuner_layers(host.base), name):
        raise refused("ahead_state", found=reason, name=name)
    return host, name, top


def tuner_layers(base: torch.nn.Module) -> list[Any]:
    return [module for module in base.modules() if isinstance(module, BaseTunerLayer)]


def unfit(top: torch.nn.Module, layers: Sequence[Any], name: str) -> str | None:
    """Describe a state of the model that the compiled code would ignore, or None."""
    for layer in layers:
        if layer.disable_adapters:
            return "adapters that are disabled"
        if layer.merged_adapters:
            return f"an adapter that is merged, {layer.merged_adapters[0]!r}"
        if layer.active_adapters != [name]:
            return f"the active adapters {layer.active_adapters}"
    for path, module in top.named_modules():
        if module.training:
            return f"training mode in {path or type(top).__name__}"
    return None


def named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, including defaults."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and arguments.pop(parameter.name, ()):
            raise refused("ahead_arguments", found=f"arguments without a name, in *{parameter.name}")
    return arguments


# ---- tensors


def form_of(tensor: torch.Tensor) -> list[Any]:
    """The properties of a tensor that compiled code relies on."""
    return [list(tensor.shape), list(tensor.stride()), str(tensor.dtype), tensor.device.type]


def places_in(module: torch.nn.Module, room: Any) -> dict[str, Place]:
    """The locations of all tensors that code may be bound to, by their names in an export. Tied ones have several."""
    places: dict[str, Place] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for table in (child._parameters, child._buffers):
            places |= {prefix + name: (table, name) for name, tensor in table.items() if tensor is not None}
        if isinstance(room, RowRoom) and (variant := vars(child).get("lora_variant", {}).get(room.slot.adapter_name)):
            places |= {prefix + buffer: (vars(variant), name) for name, buffer in READ.items()}
    return places


def copied(values: Any) -> Any:
    """Contiguous copies of all tensors in nested lists, tuples and dicts."""
    leaves, form = compat.tree_flatten(values)
    copies = [leaf.clone(memory_format=torch.contiguous_format) if torch.is_tensor(leaf) else leaf for leaf in leaves]
    return compat.tree_unflatten(copies, form)


@contextlib.contextmanager
def kept(module: torch.nn.Module) -> Iterator[None]:
    """Restore attributes, buffers and hooks of all modules, and random numbers, after a block that runs or exports.

    When transformers is first asked for hidden states, it adds hooks and sets an attribute. If only the attribute were
    restored, it would add them again, and return each state twice.
    """
    tables: list[dict[str, Any]] = [child.__dict__ for child in module.modules()]
    tables += [value for table in tables for value in table.values() if type(value) in (dict, OrderedDict)]
    previous = [(table, dict(table)) for table in tables]
    try:
        with state_kept(module):
            yield
    finally:
        for table, entries in previous:
            table.clear()
            table.update(entries)


# ---- modules and their settings


def facts_of(top: torch.nn.Module, paths: Sequence[str]) -> dict[str, dict[str, str]]:
    """The types and plain settings that a forward may read, as text, by module path.

    The adapters' own modules are left out, because a swap changes their settings. Their tensors are compared instead.
    """
    facts: dict[str, dict[str, str]] = {}
    config = getattr(top, "config", None)
    seen = {id(config)}
    is_causal = any(type(child).__name__.endswith(("ForCausalLM", "LMHeadModel")) for child in top.modules())
    labels = LABELS | ENDS if is_causal else LABELS

    def walk(path: str, module: torch.nn.Module) -> None:
        settings = {"type": type(module).__name__}
        for name, value in module.__dict__.items():
            if name == "config" and id(value) not in seen:
                seen.add(id(value))
                settings |= _config(value, labels)
            elif name.startswith("_") or name in labels or (name == "forward" and not _is_own(module, value)):
                continue
            elif (text := _plain(value)) is not None:
                settings[name] = text
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if hooks := [str(_plain(hook)) for hook in hooks if _is_loud(hook)]:
            settings["hooks"] = listing(hooks)
        facts[path] = settings
        below = {"base_layer": module.base_layer} if isinstance(module, BaseTunerLayer) else module._modules
        for name, child in below.items():
            if isinstance(child, torch.nn.Module):
                walk(f"{path}.{name}" if path else name, child)

    for path in paths:
        walk(path, top.get_submodule(path))
    return facts | {"config": _config(config, labels)}


def _config(value: Any, labels: set[str], prefix: str = "config") -> dict[str, str]:
    """The settings of a config and of configs in it: ``{"config.rope_theta": "10000.0"}``."""
    if callable(getattr(value, "to_dict", None)):
        value = value.to_dict()
    elif dataclasses.is_dataclass(value):
        value = vars(value)
    settings: dict[str, str] = {}
    for name, entry in value.items() if isinstance(value, Mapping) else ():
        name = str(name)
        if name.startswith("_") or name in labels:
            continue
        if isinstance(entry, Mapping):
            settings |= _config(entry, labels, f"{prefix}.{name}")
        elif (text := _plain(entry)) is not None:
            settings[f"{prefix}.{name}"] = text
    return settings


def _plain(value: object) -> str | None:
    """The text of a number, string, function or type, or of a list of these; None for anything else."""
    if isinstance(value, (list, tuple)):
        parts = [_plain(item) for item in value]
        return None if None in parts else f"[{', '.join(map(str, parts))}]"
    if isinstance(value, functools.partial):
        return _plain(value.func)
    if inspect.isroutine(value) or isinstance(value, type):
        return value.__qualname__
    is_plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype, enum.Enum))
    return repr(value) if is_plain else None


def _is_loud(hook: Any) -> bool:
    """Whether a hook may have an effect, unlike transformers' own."""
    return getattr(hook, "__module__", None) != QUIET_HOOKS


def _is_own(module: torch.nn.Module, forward: Any) -> bool:
    """Whether a module's ``forward`` differs from its class's, which older transformers store in the module, too."""
    return forward is not None and forward != MethodType(type(module).forward, module)


class Watched:
    """The state of a live model when code was bound to it, to be compared before each call.

    The code itself can't notice a change.
    """

    def __init__(self, top: torch.nn.Module, base: torch.nn.Module, name: str, blocks: Mapping[str, Any]):
        self.top: torch.nn.Module = top
        self.name: str = name
        self.layers: list[Any] = tuner_layers(base)
        places: list[Place] = [place for block in blocks.values() for place in block.places]
        self._modules: list[torch.nn.Module] = [*top.modules()]
        #: the tables of tensors and of modules. Dicts compare entries by identity first, so a replaced tensor goes
        #: unnoticed only if it has one element and an equal value
        self._tables: list[dict[str, Any]] = list({id(table): table for table, _ in places}.values())
        self._tables += [module._modules for module in self._modules if module._modules]
        self._entries: list[dict[str, Any]] = [dict(table) for table in self._tables]
        self._single: list[Any] = [(table, key, table[key]) for table, key in places if table[key].numel() == 1]
        self._tensors: list[torch.Tensor] = [table[key] for table, key in places]
        self._memory: list[list[Any]] = self._memory_now()
        self._layers = [layer.__dict__ for layer in self.layers]
        self._states = [tuple(map(copy.copy, TUNER_STATE(layer))) for layer in self._layers]
        self._attributes = [module.__dict__ for module in self._modules if not isinstance(module, CONTAINERS)]
        # hooks outside of the repeated blocks still run
        compiled = [module for path in blocks for module in top.get_submodule(path).modules()]
        self._hooks = [table for module in compiled for table in (module._forward_hooks, module._forward_pre_hooks)]
        self._code: list[list[Any]] = self._code_now()
        self._look()

    def _memory_now(self) -> list[list[Any]]:
        # `map` because a comprehension is slower, and models have thousands of tensors
        return [list(map(read, self._tensors)) for read in READS]

    def _is_replaced(self) -> bool:
        try:
            if self._tables != self._entries:
                return True
        except RuntimeError:  # two different tensors were compared
            return True
        return any(table.get(key) is not tensor for table, key, tensor in self._single)

    def _code_now(self) -> list[list[Any]]:
        """The forwards that differ from their classes', and the hooks."""
        forwards = [module.__dict__.get("forward") for module in self._modules]
        hooks = [list(filter(_is_loud, table.values())) if table else [] for table in self._hooks]
        return [[own for module, own in zip(self._modules, forwards, strict=True) if _is_own(module, own)], *hooks]

    def _look(self) -> None:
        self._hooked = [table for table in self._hooks if table]
        self._signs: list[Any] = self._signs_now()

    def _signs_now(self) -> list[Any]:
        """Values that change whenever :meth:`_code_now` does: every new hook, in any model, gets the next id."""
        forwards = [attributes["forward"] for attributes in self._attributes if "forward" in attributes]
        return [RemovableHandle.next_id, *forwards, *[len(table) for table in self._hooked]]

    def check(self) -> None:
        """Refuse a model that has changed."""
        differs = any(map(IS_TRAINING, self._modules)) or list(map(TUNER_STATE, self._layers)) != self._states
        if differs and (reason := unfit(self.top, self.layers, self.name)):
            raise refused("ahead_state", found=reason, name=self.name)
        if self._memory_now() != self._memory or self._is_replaced():
            raise refused("ahead_moved", found="tensors or modules that were moved, replaced or resized since")
        if self._signs_now() != self._signs:
            if self._code_now() != self._code:
                raise refused("ahead_moved", found="a forward or a hook that was added or removed since")
            self._look()
