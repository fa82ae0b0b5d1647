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
from typing import Literal

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from ..beyond import general
from ..beyond.prepare import check_member, decide_general
from ..threads import writing
from . import lora
from .adapter import Adapter, load_config
from .change import Change, apply, clear_gradient, give_memory
from .compiled import blind_spot, compiled_parts, is_compiled
from .errors import HotswapError, Refusal, listing, refuse
from .host import canonical_path, carriers
from .interrupts import let_through
from .journal import Journal
from .parts import SlotTensor
from .room import Room, build_room
from .shadow import adaptable, attach, build_shadow_layers
from .slot import Slot, SlotLayer, room_of, slot_in
from .state_view import check_before_loading, is_off, own_rank, set_padded, set_trained, write_settings
from .words import merged_beside, too_low

NOTHING_FOUND = (
    "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
    "the first adapter and before loading the second adapter."
)


@dataclass
class _Preparation:
    """What will be written to one slot."""

    slot: Slot
    #: the rank to make room for at each layer of the slot
    capacity: dict[SlotLayer, int] = field(default_factory=dict)
    #: and at each layer that it lacks
    reserve: dict[str, int] = field(default_factory=dict)
    #: layers for these, not yet in the model
    reserved: list[SlotLayer] = field(default_factory=list)
    #: what becomes of the slot; None if it is in such a room already
    room: Room | None = None


def prepare_model_for_compiled_hotswap(
    model: torch.nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
    adapters: Iterable[str | os.PathLike | Adapter | PeftConfig] = (),
    adapter_name: str | None = None,
    **hub: object,
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
    family = [_family_member(each, hub) for each in _as_list(adapters)]
    with writing(*(host.base for host in carriers(model))):
        apply(changes_to_prepare(model, family, target_rank=target_rank, adapter_name=adapter_name, config=config))


def changes_to_prepare(
    model: torch.nn.Module,
    family: list[Adapter],
    *,
    target_rank: int | None = None,
    adapter_name: str | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    may_be_compiled: bool = True,
) -> list[Change]:
    """What :func:`prepare_model_for_compiled_hotswap` writes, for adapters that are read already.

    Unless ``may_be_compiled``, a compiled model is refused if anything would have to change.
    """
    _check_target_rank(target_rank)
    slots = list(_slots(model, adapter_name))
    with_room = [slot for slot in slots if slot.method is lora and not lora.needs_donor(slot.config)]
    preparations = [_Preparation(slot) for slot in with_room]
    others = [decide_general(slot, target_rank, family) for slot in slots if slot not in with_room]
    if not slots:
        raise refuse(
            NOTHING_FOUND,
            found=f"a {type(model).__name__} without LoRA layers",
            expected="a model into which a LoRA adapter was loaded",
            next_step="load the adapter that targets most layers, then prepare the model",
        )
    refusals = [refusal for preparation in preparations for refusal in _decide(preparation, target_rank, family)]
    refusals += [refusal for _, reasons in others for refusal in reasons]
    if refusals:
        raise HotswapError(*refusals)
    changes = []
    for preparation in preparations:
        let_through()
        _stage(preparation)
        changes.append(_change_for(preparation))
    if not may_be_compiled and any(change.config is not None for change in changes):
        _check_compiled(model, "error")
    changes += [change for change, _ in others]
    for change in changes:
        change.steps.append(functools.partial(check_before_loading, change.slot.host.base))
    if target_rank is not None:
        changes[0].steps.append(functools.partial(_update_configs, config, preparations, target_rank))
    return changes


def _check_compiled(model: torch.nn.Module, check_compiled: str) -> None:
    if check_compiled not in ("error", "warn", "ignore"):
        raise refuse(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead.",
            found=f"check_compiled={check_compiled!r}",
            expected="'error', 'warn' or 'ignore'",
            next_step="pass one of these",
        )
    if reason := blind_spot(compiled_parts(model), prepared=True):
        raise refuse(
            "A model compiled this way would never notice a swap.",
            found=reason,
            expected="compiled graphs that read the weights at each call",
            next_step="turn it off before compiling",
        )
    if check_compiled == "ignore" or not is_compiled(model):
        return
    if check_compiled == "error":
        raise refuse(
            "Call prepare_model_for_compiled_hotswap *before* compiling the model",
            found="a model that is compiled, or has compiled parts",
            expected="a model that is not: preparing changes the shapes that graphs were compiled for",
            next_step="load, prepare, compile, swap, in this order; or pass check_compiled='warn' or 'ignore'",
        )
    warnings.warn(
        "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely "
        "result in re-compilation, hurting performance. Call the function before compiling the model.",
        stacklevel=3,
    )


def _check_target_rank(target_rank: object) -> None:
    right = isinstance(target_rank, int) and not isinstance(target_rank, bool) and target_rank > 0
    if target_rank is not None and not right:
        raise refuse(
            "The target rank is not a rank.",
            found=f"target_rank={target_rank!r}",
            expected="a positive whole number",
            next_step="pass the highest rank of all adapters that will be swapped in",
        )


def _as_list(adapters: object) -> list:
    if isinstance(adapters, (str, os.PathLike, Adapter, PeftConfig)):
        return [adapters]
    return list(adapters.values() if isinstance(adapters, Mapping) else adapters)


def _family_member(adapter: str | os.PathLike | Adapter | PeftConfig, hub: Mapping[str, object]) -> Adapter:
    if isinstance(adapter, Adapter):
        return adapter
    if isinstance(adapter, PeftConfig):
        return Adapter(adapter, {}, "a config")
    return Adapter(load_config(adapter, **hub), {}, os.fspath(adapter))


def _slots(model: torch.nn.Module, adapter_name: str | None) -> Iterator[Slot]:
    for host in carriers(model):
        for name, config in host.configs.items():
            # unless they are asked for by name, adapters that can't be prepared are let be
            wanted = config.peft_type in (PeftType.LORA, *general.PADDABLE) or name == adapter_name
            if wanted and adapter_name in (None, name):
                slot = slot_in(host, name)
                if slot.layers:
                    yield slot


def _decide(preparation: _Preparation, target_rank: int | None, family: list[Adapter]) -> Iterator[Refusal]:
    """Finds the room that is needed at each layer; yields why it can't be had."""
    slot, name = preparation.slot, preparation.slot.adapter_name
    yield from slot.method.unsupported(slot.config, "loaded")
    for layer in slot.layers:
        if reason := slot.method.unsupported_layer(layer.module, name, layer.tensors):
            yield Refusal(
                f"The layer {layer.path} can't be prepared.",
                found=reason,
                expected="plain lora_A and lora_B parameters on the layer",
                next_step="prepare the model with another adapter loaded",
            )
            return
        own = 0 if is_off(layer.module, name) else own_rank(layer.module, name, layer.tensors[0])
        if target_rank is not None and target_rank < own:
            yield too_low(target_rank, own, layer.path)
            return
        preparation.capacity[layer] = max(layer.tensors[0].capacity, target_rank or 0)
    for adapter in family:
        yield from _add_demand(preparation, adapter, target_rank)
    yield from _check_base(preparation)
    for layer, rank in preparation.capacity.items():
        groups = slot.method.rank_step(layer.module)
        if rank % groups:
            yield Refusal(
                f"Trying to pad a {type(layer.module).__name__} LoRA adapter with groups={groups} to target rank "
                f"{rank}, but the target rank is not divisible by {groups}. Please choose a target rank that is "
                f"divisible by {groups}.",
                found=f"a grouped convolution at {layer.path}",
                expected=f"a multiple of {groups}",
                next_step=f"pass target_rank={-(-rank // groups) * groups}",
            )


def _check_base(preparation: _Preparation) -> Iterator[Refusal]:
    """DoRA is turned off by the norm of the base weights, so that is not to contain another adapter."""
    slot = preparation.slot
    modules = map(slot.host.base.get_submodule, preparation.reserve if slot.config.use_dora else ())
    if others := {name for module in modules for name in getattr(module, "merged_adapters", ())}:
        yield merged_beside(slot.adapter_name, sorted(others))


def _add_demand(preparation: _Preparation, adapter: Adapter, target_rank: int | None) -> Iterator[Refusal]:
    """Raises the room at each layer to what one adapter of the family needs there."""
    slot = preparation.slot
    if problems := [*check_member(slot, adapter)] or [*_beyond_rooms(adapter.config)]:
        yield from problems
        return
    config = slot.method.resolved_config(adapter.config, slot.host)
    known = {path: layer for layer in slot.layers for path in layer.paths}
    paths = set(_targeted(slot, config))
    paths |= {path for key in adapter.tensors if (path := adaptable(slot.host.base, canonical_path(key))) is not None}
    if not paths:
        yield Refusal(
            f"{adapter.label} has no layer in this model.",
            found=f"target_modules={adapter.config.target_modules!r}",
            expected="names of layers of the base model",
            next_step="check that all adapters were made for the same base model",
        )
        return
    for path in paths:
        rank = slot.method.settings_for(config, path).rank
        if pointless := [*lora.pointless_rank(rank, path, slot.host.base.get_submodule(path))]:
            yield from pointless
            return
        if target_rank is not None and rank > target_rank:
            yield Refusal(
                f"The target rank is lower than the rank of {adapter.label}.",
                found=f"target_rank={target_rank}, and rank {rank} at {path}",
                expected=f"a target rank of {rank} at least",
                next_step="leave target_rank out: the ranks are taken from `adapters`",
            )
            return
        if (layer := known.get(path)) is not None:
            preparation.capacity[layer] = max(preparation.capacity[layer], rank)
        else:
            preparation.reserve[path] = max(preparation.reserve.get(path, 0), rank, target_rank or 0)


def _beyond_rooms(config: PeftConfig) -> Iterator[Refusal]:
    """What an adapter of the family has that the loaded one lacks, and that no graph for both could have."""
    yield from lora.unsupported(config, "new")
    if lora.needs_donor(config):
        yield Refusal(
            "The model can't be prepared for an adapter that is of another kind than the loaded one.",
            found=f"{', '.join(lora.other_state(config))}, which the loaded adapter lacks",
            expected="adapters with the same tensors beside those of LoRA",
            next_step="load such an adapter first, or swap in a model that is not compiled",
        )


def _targeted(slot: Slot, config: PeftConfig) -> Iterator[str]:
    """The paths of all modules that a fresh load with this config would put an adapter on."""
    stack: list[tuple[str, torch.nn.Module]] = [("", slot.host.base)]
    seen: set[torch.nn.Module] = set()
    while stack:
        path, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        if path and slot.method.targets(config, path):
            yield path
        # what is inside a tuner layer belongs to it
        if not isinstance(module, BaseTunerLayer):
            prefix = f"{path}." if path else ""
            children = [(canonical_path(prefix + name), child) for name, child in module.named_children()]
            # in the order of the model: a shared module counts by its first path
            stack += reversed(children)


def _stage(preparation: _Preparation) -> None:
    """Allocates everything beside the model."""
    slot, name = preparation.slot, preparation.slot.adapter_name
    present = room_of(slot.host.base, name)
    enough = all(layer.tensors[0].capacity == rank for layer, rank in preparation.capacity.items())
    if present is not None and enough and not preparation.reserve:
        return
    with slot.write_mode(), torch.no_grad():
        for rank in sorted(set(preparation.reserve.values())):
            paths = sorted(path for path, needed in preparation.reserve.items() if needed == rank)
            for layer in _build_reserved(slot, paths, rank):
                preparation.reserved.append(layer)
                preparation.capacity[layer] = rank
        preparation.room = build_room(slot, preparation.capacity, reserved=preparation.reserved)


def _build_reserved(slot: Slot, paths: list[str], rank: int) -> list[SlotLayer]:
    use_dora, lora_bias = slot.method.form_for(slot.config)
    config = type(slot.config)(r=rank, lora_alpha=rank, target_modules=paths, use_dora=use_dora, lora_bias=lora_bias)
    try:
        layers = build_shadow_layers(slot, config, paths)
    except Exception as error:
        raise refuse(
            "Layers that the loaded adapter lacks can't be reserved.",
            found=f"{type(error).__name__}: {error}",
            expected=f"layers that PEFT can put LoRA of rank {rank} on: {listing(paths, 3)}",
            next_step="leave out the adapters that target them",
        ) from error
    for layer in layers:
        if reason := slot.method.unsupported_layer(layer.module, slot.adapter_name, layer.tensors):
            raise refuse(
                f"The layer {layer.path} can't be reserved.",
                found=reason,
                expected="a layer with plain lora_A and lora_B",
                next_step="leave out the adapters that target it",
            )
        for tensor in layer.tensors:
            tensor.parameter.copy_(tensor.off_value())
        set_trained(layer.tensors, False, Journal())
    return layers


def _change_for(preparation: _Preparation) -> Change:
    slot, name, room = preparation.slot, preparation.slot.adapter_name, preparation.room
    if room is None:
        return Change(slot)
    change = Change(slot, slot.config)

    def write(journal: Journal) -> None:
        for layer in slot.layers:
            for tensor in layer.tensors:
                clear_gradient(tensor.parameter, journal)
        for tensor in room.places:
            if not _move_in(tensor, room.view(tensor), journal):
                room.shares_versions = False
        layers = []
        for index, layer in enumerate(preparation.capacity):
            if layer in preparation.reserved:
                layer = dataclasses.replace(layer, module=attach(slot, layer, journal))
            layers.append(layer)
            device = layer.tensors[0].parameter.device
            slot.method.write_prepared(layer.module, name, room.scaling(index, device), journal)
            set_padded(layer.module, name, journal)
        write_settings(slot, layers, room.content.settings, journal)
        room.settle(dataclasses.replace(slot, layers=tuple(layers)))
        change.slot_after = room.slot

    change.steps.append(write)
    return change


def _move_in(tensor: SlotTensor, view: torch.Tensor, journal: Journal) -> bool:
    """Makes the model's parameter a view of a room's memory; the parameter stays the same object.

    Returns whether autograd notices a write to that memory by itself: whether they have one version counter.
    """
    parameter = tensor.parameter
    shared = _swap_tensors(parameter, view, journal)
    if not shared:
        give_memory([(parameter, view)], journal)
    if tensor.size_attribute:
        journal.set_attribute(tensor.owner, tensor.size_attribute, tensor.rank_of(view.shape))
    return shared


def _swap_tensors(parameter: torch.nn.Parameter, view: torch.Tensor, journal: Journal) -> bool:
    if parameter.is_inference() or parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return False
    twin = torch.nn.Parameter(view, requires_grad=parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
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


def _update_configs(
    config: PeftConfig | Mapping[str, PeftConfig] | None,
    preparations: list[_Preparation],
    target_rank: int,
    journal: Journal,
) -> None:
    if not config:
        return
    live = {id(each) for preparation in preparations for each in preparation.slot.host.configs.values()}
    for each in config.values() if isinstance(config, Mapping) else [config]:
        if id(each) in live:
            continue
        journal.set_attribute(each, "r", target_rank)
        if each.rank_pattern:
            journal.set_attribute(each, "rank_pattern", dict.fromkeys(each.rank_pattern, target_rank))
