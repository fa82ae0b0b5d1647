"""Preparing: reserves room for a whole family of adapters, so that swapping them never changes a compiled graph.

Three things in a LoRA layer are fixed in a graph: the shapes of its weights, its scaling, and that it is there at
all. So weights get the highest rank of the family (zeros beyond an adapter's own rank change no output), scalings
become tensors, and layers that only other adapters of the family have are added now, turned off.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftType

from . import lora, methods
from .adapter import Adapter, member_from
from .change import Change, apply, clear_gradient, give_memory
from .compiled import blind_spot, compiled_parts, is_compiled
from .errors import HotswapError, Refusal, listing, refusal, refuse
from .guard import guard
from .host import Config, canonical_path, carriers, kind_of, modules_in
from .journal import Journal
from .room import Room, build_room
from .shadow import adaptable, attach, build_shadow_layers
from .slot import Slot, SlotLayer, room_of, slot_in
from .state_view import check_before_loading, is_off, own_rank, set_padded, set_trained, write_settings


@dataclass
class _Demand:
    """How much room one slot needs."""

    slot: Slot
    #: the rank to make room for at each layer of the slot
    capacity: dict[SlotLayer, int] = field(default_factory=dict)
    #: and at each layer that it lacks, by its path
    reserve: dict[str, int] = field(default_factory=dict)


def prepare_model_for_compiled_hotswap(
    model: torch.nn.Module,
    *,
    target_rank: int | None = None,
    config: Config | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
    adapters: Iterable[str | os.PathLike[str] | Adapter | PeftConfig] = (),
    adapter_name: str | None = None,
    **hub: Any,
) -> None:
    """Makes a model ready for swaps that never recompile it. Call it after loading the first adapter, before compiling.

    The outputs stay what they were, up to rounding: zeros are added to sums of another length. Saving
    (``save_adapter`` and ``save_pretrained`` alike) gives the adapter with its own rank and scaling, as if nothing had
    been prepared; only where an embedding is reserved, ``save_pretrained`` adds its base weight to the file of an
    adapter that is on another embedding. May be called again to make more room, before compiling anew. All or nothing:
    after an error the model is as it was. Make an optimizer only afterwards: the parameters stay the same objects but
    get other shapes.

    Parameters
    ----------
    model:
        A model with at least one LoRA adapter. All of its LoRA adapters are prepared.
    target_rank:
        The rank to make room for in every layer: the highest of all adapters that will be swapped in.
    config:
        Configs whose ``r`` and ``rank_pattern`` are set to ``target_rank``, as PEFT does, for code that makes or
        compares further adapters with them. The live configs in ``model.peft_config`` say what the loaded
        adapter is, and are what is saved: these are never changed, even when they are passed here.
    check_compiled:
        What to do if the model is compiled already: ``"error"``, ``"warn"`` or ``"ignore"``.
    adapters:
        The family: folders, Hub ids, :class:`Adapter` objects or configs. The highest rank is found for each layer,
        and layers that the loaded adapter lacks are reserved, so that any of them can be swapped in, in any order.
        Of folders and Hub ids, only the configs are read.
    adapter_name:
        Prepares only the adapter of this name.
    **hub:
        ``subfolder``, ``revision``, ``token`` and the other arguments of ``huggingface_hub.hf_hub_download``.

    Raises
    ------
    HotswapError
        If the model is compiled already, has no LoRA adapter, or can't be prepared for these ranks and layers.

    Examples
    --------
    >>> from hotswap_lab import demo, hotswap_adapter, prepare_model_for_compiled_hotswap
    >>> model, tokenizer = demo.load("caesar")                     # adapts the MLP only
    >>> family = [demo.adapter_path(name) for name in demo.adapter_names()]
    >>> prepare_model_for_compiled_hotswap(model, adapters=family)
    >>> hotswap_adapter(model, demo.adapter_path("pig_latin"), "default")   # adapts the attention only
    >>> demo.ask(model, tokenizer, "hotswap")
    'otswaphay'

    Notes
    -----
    Same call as ``peft.utils.hotswap.prepare_model_for_compiled_hotswap`` of PEFT 0.21, with its errors and
    warnings; ``adapters`` and ``adapter_name`` are new here.
    """
    next(carriers(model), None)  # says so if this is no model at all
    _check_compiled(model, check_compiled)
    family = [member_from(each, hub) for each in _as_list(adapters)]
    with guard(*(host.base for host in carriers(model))):
        apply(changes_to_prepare(model, family, target_rank=target_rank, adapter_name=adapter_name, config=config))


def changes_to_prepare(
    model: torch.nn.Module,
    family: list[Adapter],
    *,
    target_rank: int | None = None,
    adapter_name: str | None = None,
    config: Config | Mapping[str, PeftConfig] | None = None,
    may_be_compiled: bool = True,
) -> list[Change]:
    """What :func:`prepare_model_for_compiled_hotswap` writes, for adapters that are read already.

    Unless ``may_be_compiled``, a compiled model is refused if anything would have to change.
    """
    _check_target_rank(target_rank)
    changes: list[Change] = []
    refusals: list[Refusal] = []
    for slot in _slots(model, adapter_name):
        if slot.method is lora and not lora.needs_donor(slot.config):
            change, reasons = _prepare(slot, target_rank, family)
        else:
            change, reasons = methods.rest.prepare(slot, target_rank, family)
        changes.append(change)
        refusals += reasons
    if not changes:
        raise refuse("nothing_to_prepare", name=type(model).__name__)
    if refusals:
        raise HotswapError(*refusals)
    if not may_be_compiled and any(change.config is not None for change in changes):
        _check_compiled(model, "error")
    for change in changes:
        change.steps.append(functools.partial(check_before_loading, change.slot.host.base))
    if config and target_rank is not None:
        live = {id(each) for change in changes for each in change.slot.host.configs.values()}
        given = [
            each for each in (config.values() if isinstance(config, Mapping) else [config]) if id(each) not in live
        ]
        changes[0].steps.append(functools.partial(_raise_ranks, given, target_rank))
    return changes


def _raise_ranks(configs: Iterable[Config], target_rank: int, journal: Journal) -> None:
    """As PEFT does with the configs it is passed."""
    for each in configs:
        journal.set_attribute(each, "r", target_rank)
        if each.rank_pattern:
            journal.set_attribute(each, "rank_pattern", dict.fromkeys(each.rank_pattern, target_rank))


def _check_compiled(model: torch.nn.Module, check_compiled: str) -> None:
    if check_compiled not in ("error", "warn", "ignore"):
        raise refuse("unknown_check_compiled", check_compiled=check_compiled)
    if reason := blind_spot(compiled_parts(model), prepared=True):
        raise refuse("graph_would_not_notice", reason=reason)
    if check_compiled == "ignore" or not is_compiled(model):
        return
    if check_compiled == "error":
        raise refuse("prepare_before_compiling")
    warnings.warn(
        "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely "
        "result in re-compilation, hurting performance. Call the function before compiling the model.",
        stacklevel=3,
    )


def _check_target_rank(target_rank: object) -> None:
    right = isinstance(target_rank, int) and not isinstance(target_rank, bool) and target_rank > 0
    if target_rank is not None and not right:
        raise refuse("target_rank_is_no_rank", target_rank=target_rank)


def _as_list(adapters: Any) -> list:
    if isinstance(adapters, (str, os.PathLike, Adapter, PeftConfig)):
        return [adapters]
    return list(adapters.values() if isinstance(adapters, Mapping) else adapters)


def _slots(model: torch.nn.Module, adapter_name: str | None) -> Iterator[Slot]:
    for host in carriers(model):
        for name, config in host.configs.items():
            # unless they are asked for by name, adapters that can't be prepared are let be
            wanted = config.peft_type in (PeftType.LORA, *methods.rest.paddable) or name == adapter_name
            if wanted and adapter_name in (None, name):
                slot = slot_in(host, name)
                if slot.layers:
                    yield slot


def _prepare(slot: Slot, target_rank: int | None, family: list[Adapter]) -> tuple[Change, list[Refusal]]:
    """What makes room in one slot of LoRA, or why that can't be had."""
    demand = _Demand(slot)
    refusals = [*lora.unsupported(slot.config, "loaded"), *_own_demand(demand, target_rank)]
    for adapter in () if refusals else family:
        refusals += _add_demand(demand, adapter, target_rank)
    refusals += _check_base(demand)
    for layer, rank in demand.capacity.items():
        if rank % (groups := lora.rank_step(layer.module)):
            kind, next_rank, path = type(layer.module).__name__, -(-rank // groups) * groups, layer.path
            refusals.append(
                refusal(
                    "target_rank_not_for_groups", kind=kind, groups=groups, rank=rank, path=path, next_rank=next_rank
                )
            )
    return (Change(slot), refusals) if refusals else (_change_for(demand), [])


def _own_demand(demand: _Demand, target_rank: int | None) -> Iterator[Refusal]:
    """The room at each layer that the loaded adapter needs, and has already."""
    slot, name = demand.slot, demand.slot.adapter_name
    for layer in slot.layers:
        if reason := slot.method.unsupported_layer(layer.module, name, layer.tensors):
            yield refusal("layer_not_preparable", path=layer.path, reason=reason)
            return
        own = 0 if is_off(layer.module, name) else own_rank(layer.module, name, layer.tensors[0]) or 0
        if target_rank is not None and target_rank < own:
            yield refusal("target_rank_too_low", target_rank=target_rank, own=own, path=layer.path)
            return
        demand.capacity[layer] = max(layer.tensors[0].capacity or 0, target_rank or 0)


def _check_base(demand: _Demand) -> Iterator[Refusal]:
    """DoRA is turned off by the norm of the base weights, so that is not to contain another adapter."""
    slot = demand.slot
    modules = map(slot.host.base.get_submodule, demand.reserve if slot.config.use_dora else ())
    if others := {name for module in modules for name in getattr(module, "merged_adapters", ())}:
        yield refusal("merged_beside", adapter_name=slot.adapter_name, others=listing(map(repr, sorted(others))))


def _add_demand(demand: _Demand, adapter: Adapter, target_rank: int | None) -> Iterator[Refusal]:
    """Raises the room at each layer to what one adapter of the family needs there."""
    slot, base = demand.slot, demand.slot.host.base
    if problems := [*check_member(slot, adapter)] or [*_beyond_rooms(adapter.config)]:
        yield from problems
        return
    config = slot.method.resolved_config(adapter.config, slot.host)
    known = {path: layer for layer in slot.layers for path in layer.paths}
    paths = set(_targeted(slot, config))
    paths |= {path for key in adapter.tensors if (path := adaptable(base, canonical_path(key))) is not None}
    if not paths:
        yield refusal("member_has_no_layer", label=adapter.label, target_modules=adapter.config.target_modules)
    for path in paths:
        rank = slot.method.settings_for(config, path).rank
        if pointless := [*lora.pointless_rank(rank, path, base.get_submodule(path))]:
            yield from pointless
            return
        if target_rank is not None and rank > target_rank:
            label = adapter.label
            yield refusal("target_rank_below_member", label=label, target_rank=target_rank, rank=rank, path=path)
            return
        if (layer := known.get(path)) is not None:
            demand.capacity[layer] = max(demand.capacity[layer], rank)
        else:
            demand.reserve[path] = max(demand.reserve.get(path, 0), rank, target_rank or 0)


def check_member(slot: Slot, adapter: Adapter) -> Iterator[Refusal]:
    """What speaks against any adapter of a family that a slot is prepared for."""
    config, loaded = adapter.config, slot.config
    if config.peft_type != loaded.peft_type:
        old, kind = kind_of(loaded), kind_of(config)
        yield refusal("member_of_other_type", old=old, kind=kind, label=adapter.label, adapter_name=slot.adapter_name)
        return
    yield from slot.method.malformed(config)
    if slot.method is lora and lora.form_for(config) != lora.form_for(loaded):
        found, expected = (f"use_dora={each.use_dora}, lora_bias={each.lora_bias}" for each in (config, loaded))
        yield refusal("no_common_graph", found=found, expected=expected)


def _beyond_rooms(config: Config) -> Iterator[Refusal]:
    """What an adapter of the family has that the loaded one lacks, and that no graph for both could have."""
    yield from lora.unsupported(config, "new")
    if lora.needs_donor(config):
        yield refusal("member_of_another_kind", other_state=", ".join(lora.other_state(config)))


def _targeted(slot: Slot, config: Config) -> Iterator[str]:
    """The paths of all modules that a fresh load with this config would put an adapter on, a shared one once."""
    seen: set[torch.nn.Module] = set()
    for path, module in modules_in(slot.host.base):
        # what is inside a tuner layer belongs to it
        if module not in seen and path and ".base_layer" not in path and slot.method.targets(config, path):
            yield path
        seen.add(module)


def _change_for(demand: _Demand) -> Change:
    """Allocates a room beside the model, and moves the slot in when the change is carried out."""
    slot, name, capacity = demand.slot, demand.slot.adapter_name, demand.capacity
    enough = all(layer.tensors[0].capacity == rank for layer, rank in capacity.items())
    if enough and not demand.reserve and room_of(slot.host.base, name) is not None:
        return Change(slot)
    reserved: list[SlotLayer] = []
    with slot.write_mode(), torch.no_grad():
        for rank in sorted(set(demand.reserve.values())):
            paths = sorted(path for path, needed in demand.reserve.items() if needed == rank)
            reserved += (layers := _build_reserved(slot, paths, rank))
            capacity.update(dict.fromkeys(layers, rank))
        room = build_room(slot, capacity, reserved)
    change = Change(slot, slot.config)

    def move_in(journal: Journal) -> None:
        _move_tensors(room, journal)
        layers = []
        for layer in capacity:
            if layer in reserved:
                layer = dataclasses.replace(layer, module=attach(slot, layer, journal))
            layers.append(layer)
        for index, layer in enumerate(layers):
            device = layer.tensors[0].parameter.device
            lora.write_prepared(layer.module, name, room.scaling(index, device), journal)
            set_padded(layer.module, name, journal)
        write_settings(slot, layers, room.content.settings, journal)
        room.settle(dataclasses.replace(slot, layers=tuple(layers)))
        change.slot_after = room.slot

    change.steps.append(move_in)
    return change


def _build_reserved(slot: Slot, paths: list[str], rank: int) -> list[SlotLayer]:
    use_dora, lora_bias = slot.method.form_for(slot.config)
    config = type(slot.config)(r=rank, lora_alpha=rank, target_modules=paths, use_dora=use_dora, lora_bias=lora_bias)
    try:
        layers = build_shadow_layers(slot, config, paths)
    except Exception as error:
        raise refuse("layers_not_reservable", error=error, rank=rank, paths=listing(paths, 3)) from error
    for layer in layers:
        if reason := slot.method.unsupported_layer(layer.module, slot.adapter_name, layer.tensors):
            raise refuse("layer_not_reservable", path=layer.path, reason=reason)
        for tensor in layer.tensors:
            tensor.parameter.copy_(tensor.off_value())
        set_trained(layer.tensors, False, Journal())
    return layers


def _move_tensors(room: Room, journal: Journal) -> None:
    """Makes the model's parameters views of the room's memory; they stay the same objects."""
    for tensor in room.places:
        parameter, view = tensor.parameter, room.view(tensor)
        clear_gradient(parameter, journal)
        if not _swap_tensors(parameter, view, journal):
            give_memory([(parameter, view)], journal)
            room.shares_versions = False
        if tensor.size_attribute:
            journal.set_attribute(tensor.owner, tensor.size_attribute, tensor.rank_of(view.shape))


def _swap_tensors(parameter: torch.nn.Parameter, view: torch.Tensor, journal: Journal) -> bool:
    """Whether this could be done such that autograd notices a write to that memory by itself: one version counter."""
    if parameter.is_inference() or parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return False
    twin = torch.nn.Parameter(view, requires_grad=parameter.requires_grad)
    vars(twin).update(vars(parameter))
    address = view.data_ptr()

    def undo() -> None:
        if parameter.data_ptr() == address:
            torch.utils.swap_tensors(parameter, twin)

    journal.record(undo)
    try:
        torch.utils.swap_tensors(parameter, twin)
    except RuntimeError:
        # a graph or a weak reference holds on to the old tensor
        return False
    return True
