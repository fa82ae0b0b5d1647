"""The public functions: PEFT's names and signatures, the dry run, and carrying a plan out.

Each takes an engine first. :mod:`hotswap_lab.engine` binds them to the one that the package uses.
"""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig

from .adapter import Adapter
from .change import apply
from .engine import Engine
from .errors import HotswapError, refusal
from .host import Host, find_host, name_in
from .plan import Plan
from .planner import make_plan
from .slot import slot_for

RECOMPILES = (
    "this changes shapes or numbers that the model was compiled for, and its next call compiles again; to swap without "
    "recompiling, call prepare_model_for_compiled_hotswap after loading the first adapter and before compiling"
)
#: the warnings that were shown already, by base model
_said: weakref.WeakKeyDictionary[torch.nn.Module, set[str]] = weakref.WeakKeyDictionary()


def hotswap_adapter(
    engine: Engine,
    model: torch.nn.Module,
    model_name_or_path: str | os.PathLike[str] | Adapter,
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    *,
    add_layers: bool = False,
    base_weights: Mapping[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Replace a loaded adapter with another one, in place.

    The adapter keeps its name. Afterwards the model is the same as one into which ``PeftModel.from_pretrained`` loaded
    the new adapter: same outputs, config, scalings and saved files. Ranks, alphas, rsLoRA and the patterns of both may
    differ. Layers that the new adapter lacks are turned off. If the rank stays the same, so do the memory addresses; in
    a prepared model they always do. A scale that was set before (``set_scale``, ``scale_layer``) is reset, as after a
    fresh load: set it again if you still want it.

    Parameters
    ----------
    model:
        A ``PeftModel``, a model with injected adapters, or either of them compiled.
    model_name_or_path:
        A folder with the new adapter, the id of a Hub repository, or an :class:`Adapter` read before.
    adapter_name:
        The name of the loaded adapter to replace, such as ``"default"``. It may be active, inactive or
        disabled, but not merged.
    torch_device:
        The device to read the file to. Default: CPU; the tensors are copied to the model's devices anyway.
    add_layers:
        Whether layers that the loaded adapter lacks are added. Not possible in a compiled model.
    base_weights:
        The base model's own values by name, such as its ``state_dict()`` from before. Only needed if PEFT overwrote
        weights of the base model when it loaded an adapter, and the new one doesn't: with ``bias="all"`` or
        ``"lora_only"``, and for embeddings that the adapter is on, since its file has their weights, changed or not.
        Values that a swap overwrites are remembered.
    **kwargs:
        ``key_mapping`` and ``allow_nonfinite`` of :meth:`Adapter.load`; ``subfolder``, ``revision``, ``token``,
        ``cache_dir`` and the other arguments of ``huggingface_hub.hf_hub_download``.

    Raises
    ------
    HotswapError
        If the swap is refused. The model is untouched then. The error is both a ``ValueError`` and a ``RuntimeError``.

    Examples
    --------
    >>> from hotswap_lab import demo, hotswap_adapter
    >>> model, tokenizer = demo.load("reverse")
    >>> demo.ask(model, tokenizer, "hotswap")
    'pawstoh'
    >>> hotswap_adapter(model, demo.adapter_path("pig_latin"), adapter_name="default")
    >>> demo.ask(model, tokenizer, "hotswap")
    'otswaphay'

    Notes
    -----
    Same call as ``peft.utils.hotswap.hotswap_adapter`` of PEFT 0.21, which this replaces.
    """
    host = find_host(model, adapter_name)
    # if other threads compute, the swap may have to wait, and the file would be in use meanwhile
    for_one_swap = not engine.lock.is_shared(host.base)
    adapter = _read(engine, host, model_name_or_path, torch_device, kwargs, for_one_swap=for_one_swap)
    with engine.lock.held(host.base):
        slot = slot_for(engine, host, adapter_name)
        carry_out([make_plan(slot, adapter, add_layers=add_layers, base_weights=base_weights)])


def hotswap_adapter_from_state_dict(
    engine: Engine,
    model: torch.nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
    *,
    add_layers: bool = False,
    base_weights: Mapping[str, torch.Tensor] | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Replace a loaded adapter with tensors from memory, in place.

    Parameters
    ----------
    model:
        As in :func:`hotswap_adapter`.
    state_dict:
        ``lora_A`` of shape ``(rank, in_features)`` and ``lora_B`` of shape ``(out_features, rank)`` for each
        layer. Keys with or without the adapter's name, with or without ``base_model.model.``. It is only read.
    adapter_name:
        The name of the loaded adapter to replace.
    config:
        Gives rank, alpha and the patterns. The keys of ``state_dict`` decide which layers are targeted; if ``config``
        says otherwise, the model's copy of it is made to agree.
    parameter_prefix:
        Accepted because PEFT has it. Keys are matched exactly, so it is not needed.
    add_layers, base_weights:
        As in :func:`hotswap_adapter`.
    allow_nonfinite:
        Whether NaN and infinity are accepted.

    Raises
    ------
    HotswapError
        If the swap is refused. The model is untouched then.

    Examples
    --------
    >>> from hotswap_lab import Adapter, demo, hotswap_adapter_from_state_dict
    >>> model, tokenizer = demo.load("reverse")
    >>> new = Adapter.load(demo.adapter_path("caesar"))
    >>> hotswap_adapter_from_state_dict(model, new.tensors, "default", new.config)
    >>> demo.ask(model, tokenizer, "abc")
    'def'

    Notes
    -----
    Same call as ``peft.utils.hotswap.hotswap_adapter_from_state_dict`` of PEFT 0.21.
    """
    host = find_host(model, adapter_name)
    adapter = Adapter.from_state_dict(state_dict, config, allow_nonfinite=allow_nonfinite)
    with engine.lock.held(host.base):
        slot = slot_for(engine, host, adapter_name)
        carry_out([make_plan(slot, adapter, add_layers=add_layers, check_targets=False, base_weights=base_weights)])


def plan_hotswap(
    engine: Engine,
    model: torch.nn.Module,
    model_name_or_path: str | os.PathLike[str] | Adapter,
    adapter_name: str | None = None,
    torch_device: str | torch.device | None = None,
    *,
    add_layers: bool = False,
    base_weights: Mapping[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> Plan:
    """The dry run of :func:`hotswap_adapter`: a plan of what would be written, or of why nothing can be.

    Takes the same arguments and never changes the model. A swap that can't be done is reported in
    ``Plan.refusals``; only files that can't be read at all, or an unknown adapter name, raise an error.

    Parameters
    ----------
    model, model_name_or_path, adapter_name, torch_device, add_layers, base_weights, **kwargs:
        As for :func:`hotswap_adapter`. The default of ``adapter_name`` is the only adapter in the model.

    Returns
    -------
    Plan
        Prints as a table, as text and in a notebook; ``commit(plan)`` carries it out.

    Raises
    ------
    HotswapError
        If the files can't be read or the model has no such adapter.

    Examples
    --------
    >>> from hotswap_lab import demo, plan_hotswap
    >>> model, _ = demo.load("caesar")
    >>> plan = plan_hotswap(model, demo.adapter_path("pig_latin"))
    >>> plan.ok
    False
    >>> print(plan.refusals[0].next_step)
    pass add_layers=True to add them, or load first the adapter that targets most layers
    """
    adapter_name = name_in(model, adapter_name)
    host = find_host(model, adapter_name)
    adapter = _read(engine, host, model_name_or_path, torch_device, kwargs)
    with engine.lock.held(host.base) if _changes_while_computing(host) else contextlib.nullcontext():
        slot = slot_for(engine, host, adapter_name)
        return make_plan(slot, adapter, add_layers=add_layers, base_weights=base_weights).kept()


def _changes_while_computing(host: Host) -> bool:
    """Whether a forward changes the data that a plan is made from, for a moment or for good.

    Layers around single parameters (``target_parameters``) give the module another class while it computes, and move
    its parameters; OFT with ``coft`` writes to its weights.
    """
    configs = host.configs.values()
    return any(getattr(each, "target_parameters", None) or getattr(each, "coft", False) for each in configs)


def _read(
    engine: Engine,
    host: Host,
    source: str | os.PathLike[str] | Adapter,
    torch_device: str | torch.device | None,
    arguments: dict[str, Any],
    for_one_swap: bool = False,
) -> Adapter:
    if isinstance(source, Adapter):
        if arguments or torch_device is not None:
            raise TypeError("arguments for reading an adapter were passed with an Adapter that is already read")
        return source
    # some transformers models bring a mapping from the keys of their older versions; a fresh load applies it
    arguments.setdefault("key_mapping", getattr(host.base, "_checkpoint_conversion_mapping", None) or None)
    return engine.read(source, for_one_swap=for_one_swap, torch_device=torch_device, **arguments)


# ---- carrying plans out


def commit(*plans: Plan) -> None:
    """Carry out one plan; or several, all of them or none, such as the components of a pipeline with an adapter each.

    Parameters
    ----------
    *plans:
        Results of :func:`hotswap_lab.plan_hotswap`. Each was made for the model as it was then, so it is decided again
        now, and refused if the outcome is another one.

    Raises
    ------
    HotswapError
        If a plan was refused. After any error, of this or another kind, every model is as it was.

    Examples
    --------
    >>> from hotswap_lab import commit, demo, plan_hotswap
    >>> model, tokenizer = demo.load("reverse")
    >>> commit(plan_hotswap(model, demo.adapter_path("caesar"), "default"))
    >>> demo.ask(model, tokenizer, "abc")
    'def'
    """
    for plan in plans:
        if not isinstance(plan, Plan):
            raise TypeError(f"commit() takes what plan_hotswap gives, a Plan: got a {type(plan).__name__}")
        plan.raise_if_refused()
    if plans:
        with plans[0].slot.engine.lock.held(*(plan.slot.host.base for plan in plans)):
            carry_out([_decided_again(plan) for plan in plans])


def _decided_again(plan: Plan) -> Plan:
    name = plan.slot.adapter_name
    slot = slot_for(plan.slot.engine, find_host(plan.slot.host.root, name), name)
    now = make_plan(
        slot, plan.adapter, add_layers=plan.add_layers, check_targets=plan.check_targets, base_weights=plan.base_weights
    )
    if plan.told not in (None, now.answer):
        changed = refusal("model_changed_since_plan", adapter_name=name, verdict=now.verdict)
        raise HotswapError(changed, *now.refusals)
    return now


def carry_out(plans: Sequence[Plan]) -> None:
    """Write plans that were just made. The caller has kept other threads out of the models since before that."""
    for plan in plans:
        plan.raise_if_refused()
        warn_of(plan)
    apply([plan.change() for plan in plans])


def warn_of(plan: Plan) -> None:
    """Show the warnings of a plan, each once for each model."""
    said = _said.setdefault(plan.slot.host.base, set())
    for text in [*plan.warnings, *([RECOMPILES] if plan.will_recompile else [])]:
        if text not in said:
            said.add(text)
            warnings.warn(f"{plan.title}: {text}. (Said once for this model.)", stacklevel=4)
