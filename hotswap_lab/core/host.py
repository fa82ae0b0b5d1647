"""Finds the module that carries the adapters, in any model that a user passes.

A user may pass a ``PeftModel``, a bare tuner model, a model that adapters were injected into, one of these
compiled, or a module that contains one of these. Adapter files name their tensors relative to the base
model, so everything else starts from that module.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from .compiled import COMPILED, unwrap_compiled
from .errors import listing, refused

#: one of PEFT's layers: a module, with the tables of its method
TunerLayer = Any
#: a PeftConfig; those of different methods have few attributes in common
Config = Any
#: the start of every key in PEFT's files; the rest is the path in the base model
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Host:
    """The base model of an adapter, with the live table of adapter configs."""

    #: the model that the user passed, with all of its wrappers
    root: torch.nn.Module
    #: never a compiled wrapper: turns and rooms are looked up by it, and the user may compile the model at any time
    base: torch.nn.Module
    configs: dict[str, Config]
    tuner: BaseTuner | None
    #: whether the keys of saved files start with ``base_model.model.``
    is_peft_model: bool
    #: the module that PEFT made around the base model; the base model itself if adapters were injected
    carrier: torch.nn.Module


def kind_of(config: Config) -> str:
    """The name of a config's PEFT type.

    >>> from peft import LoraConfig
    >>> config = LoraConfig()
    >>> name = kind_of(config)
    >>> config.peft_type = "LORA"  # as code that doesn't use PEFT's enum may leave it
    >>> name, kind_of(config)
    ('LORA', 'LORA')
    """
    return getattr(config.peft_type, "value", config.peft_type)


def canonical_path(key: str) -> str:
    """A module path or tensor key relative to the base model, without the prefixes of wrappers.

    >>> canonical_path("_orig_mod.base_model.model.lin.lora_A.weight")
    'lin.lora_A.weight'
    """
    key = key.removeprefix(f"{COMPILED}.").removeprefix(PEFT_PREFIX)
    if COMPILED in key:
        key = ".".join(part for part in key.split(".") if part != COMPILED)
    return key


def key_in_file(key: str) -> str:
    """A tensor's key as PEFT writes it to a file: with its prefix, and without the prefixes of other wrappers."""
    return key if key.startswith("base_model.") else PEFT_PREFIX + canonical_path(key)


def _carrier(root: torch.nn.Module, module: torch.nn.Module) -> Host | None:
    if isinstance(module, PeftModel):
        inner: Any = unwrap_compiled(module.base_model)
        # like `get_base_model`, which fails if no adapter is left
        base = unwrap_compiled(inner if module._is_prompt_learning else inner.model)
        return Host(root, base, module.peft_config, inner if isinstance(inner, BaseTuner) else None, True, module)
    if isinstance(module, BaseTuner):
        return Host(root, unwrap_compiled(module.model), module.peft_config, module, False, module)
    configs = module.__dict__.get("peft_config")
    return Host(root, module, configs, None, False, module) if isinstance(configs, dict) else None


def carriers(model: torch.nn.Module) -> Iterator[Host]:
    """All modules that carry adapters, outermost first. Modules inside a carrier belong to it."""
    if not isinstance(model, torch.nn.Module):
        raise refused("not_a_model", name=type(model).__name__)
    queue = deque([model])
    while queue:
        module = unwrap_compiled(queue.popleft())
        if (host := _carrier(model, module)) is not None:
            yield host
        else:
            queue.extend(module.children())


def hosts_in(owner: object) -> list[Host]:
    """The carriers that have adapters, in a model, or in an object that has models as attributes."""
    models = [owner]
    if not isinstance(owner, torch.nn.Module):
        models = [*getattr(owner, "__dict__", {}).values(), getattr(owner, "model", None)]  # a panel's is found
    modules = dict.fromkeys(model for model in models if isinstance(model, torch.nn.Module))
    return [host for module in modules for host in carriers(module) if host.configs]


def name_in(model: torch.nn.Module, adapter_name: str | None) -> str:
    """``adapter_name``; if it is None, the name of the only adapter, or else ``"default"``.

    >>> from hotswap_lab import demo
    >>> name_in(demo.load("reverse")[0], None)
    'default'
    """
    if adapter_name is not None:
        return adapter_name
    names = {name for host in carriers(model) for name in host.configs}
    return names.pop() if len(names) == 1 else "default"


def find_host(model: torch.nn.Module, adapter_name: str) -> Host:
    """The carrier of the adapter called ``adapter_name``.

    Raises
    ------
    HotswapError
        If nothing in ``model`` carries an adapter of that name, or if more than one module does.
    """
    if not isinstance(adapter_name, str):
        raise refused("no_name", kind=type(adapter_name).__name__)
    if not (hosts := list(carriers(model))):
        raise refused("no_adapters_in_model", name=type(model).__name__)
    if not (matching := [host for host in hosts if adapter_name in host.configs]):
        names = sorted({name for host in hosts for name in host.configs})
        present = f"the adapters {listing(map(repr, names))}" if names else "no adapter that is left"
        raise refused("no_such_adapter", adapter_name=adapter_name, found=present)
    # PEFT stores adapters in the base's layers by their names: those of a model inside would be taken for these prompts
    if matching[0].configs[adapter_name].is_prompt_learning and (inner := _carrier(model, matching[0].base)):
        matching += [inner] * (adapter_name in inner.configs)
    if len(matching) > 1:
        kinds = listing(type(host.base).__name__ for host in matching)
        raise refused("several_such_adapters", adapter_name=adapter_name, matching=kinds)
    return matching[0]


def modules_in(base: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """All modules of a base model with their canonical paths, in the model's order, shared ones once per path.

    ``named_modules`` is several times slower: it nests one generator per level and goes into the adapters' own small
    modules. A tuner layer around another one (``PeftMixedModel``) adds no level: adapter files name the inner one by
    the path of the layer that both adapt.
    """
    modules: list[tuple[str, torch.nn.Module]] = []
    stack: list[tuple[str, torch.nn.Module]] = [("", base)]
    while stack:
        path, module = stack.pop()
        modules.append((path, module))
        if isinstance(module, BaseTunerLayer):
            while isinstance(module := module._modules.get("base_layer"), BaseTunerLayer):
                modules.append((path, module))
            if module is None:
                continue
            path = f"{path}.base_layer"
        for name, child in reversed(module._modules.items()):
            if child is not None:
                child_path = f"{path}.{name}" if path else name
                stack.append((path if name == COMPILED else child_path, child))
    return modules
