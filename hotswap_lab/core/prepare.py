"""Preparing: reserves room for a whole family of adapters, so that swapping them never changes a compiled graph.

A graph fixes three things in a LoRA layer: the shapes of its weights, its scaling, and that it exists at all. So
weights get the highest rank of the family (zeros beyond an adapter's own rank change no output), scalings become
tensors, and layers that only other adapters of the family have are added now, turned off.
"""

import copy
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftType

from . import lora
from .adapter import Adapter
from .added_layers import adaptable, attach, build_added_layers
from .change import Change
from .compiled import blind_spot, compiled_in
from .errors import HotswapError, Refusal, listing, refusal, refused
from .host import Config, canonical_path, carriers
from .journal import Journal
from .loaded import with_bases
from .memory import overwritten
from .method import Method
from .planner import misfits
from .prepared import make_prepared, ranks_before
from .room import Room, build_room
from .settings import settings_for
from .slot import Slot, SlotLayer, begin_change, keep_slot, room_left_by, room_of, slot_in
from .tensors import SlotTensor
from .writing import write_settings

#: extra state that LoRA may have; if all adapters have the same of it, a swap changes only values, as a graph requires
BESIDE_LORA = {"modules_to_save", "trainable_token_indices"}
#: types whose effect is a sum over rank components, so that zeros beyond an adapter's own rank change nothing
PADDABLE = (PeftType.LORA, PeftType.LOHA, PeftType.LOKR, PeftType.HIRA, PeftType.ADALORA)


def changes_to_prepare(
    methods: Sequence[Method],
    model: torch.nn.Module,
    family: list[Adapter],
    *,
    target_rank: int | None = None,
    adapter_name: str | None = None,
    check_compiled: str = "ignore",
    extra_tensors: Callable[[Slot], list[SlotTensor]] | None = None,
    kind: type[Room] = Room,
    ranks: Mapping[str, int] | None = None,
) -> list[Change]:
    """The changes that prepare the adapters of a model for adapters that are read already.

    ``check_compiled`` says what to do if the model is compiled and something has to change. A pool, which needs a room,
    passes ``extra_tensors``: a function that finds the tensors of an adapter outside of its layers. ``ranks`` asks for
    room by the paths of layers, like a further adapter of the family.
    """
    if target_rank is not None and (type(target_rank) is not int or target_rank < 1):
        raise refused("target_rank_is_no_rank", target_rank=target_rank)
    changes: list[Change] = []
    refusals: list[Refusal] = []
    for slot in slots_to_prepare(methods, model, adapter_name):
        if (prepare_in_place := slot.method.prepare_in_place) is None:
            extra = extra_tensors(slot) if extra_tensors else []
            space, reasons = _space_in(slot, target_rank, family, ranks or {})
            change = Change() if reasons else _change_to_room(slot, space, kind, extra)
        else:
            change, reasons = prepare_in_place(slot, target_rank, family)
        changes.append(change)
        refusals += reasons
        # in a room, the parameters would no longer be the caller's tensors, and nothing would show it
        refusals += [reason for adapter in family for reason in overwritten(slot, adapter.tensors)]
    if not changes:
        raise refused("nothing_to_prepare", name=type(model).__name__)
    if refusals:
        raise HotswapError(*refusals)
    if any(change.copies or change.resizes or change.sizes or change.steps or change.last_steps for change in changes):
        check_not_compiled(model, check_compiled)
    return changes


def raise_ranks(model: torch.nn.Module, given: Iterable[Config], target_rank: int, journal: Journal) -> None:
    """Set the ranks of the given configs, as PEFT does; but not of the model's own, which describe its adapter."""
    live = [id(config) for host in carriers(model) for config in host.configs.values()]
    for config in given:
        if id(config) not in live:
            journal.set_attribute(config, "r", target_rank)
            journal.set_attribute(config, "rank_pattern", dict.fromkeys(config.rank_pattern, target_rank))


def check_not_compiled(
    model: torch.nn.Module, check_compiled: str, found: str = "a model that is compiled already, or has compiled parts"
) -> None:
    if check_compiled not in ("error", "warn", "ignore"):
        raise refused("unknown_check_compiled", check_compiled=check_compiled)
    compiled = compiled_in(model)
    if reason := blind_spot(model, compiled, prepared=True):
        raise refused("graph_would_not_notice", reason=reason)
    if compiled and check_compiled != "ignore":
        error = refused("prepare_before_compiling", found=found)
        if check_compiled == "error":
            raise error
        warnings.warn(str(error), stacklevel=3)


def as_list(adapters: Any) -> list[Any]:
    if isinstance(adapters, (str, os.PathLike, Adapter, PeftConfig)):
        return [adapters]
    return list(adapters.values() if isinstance(adapters, Mapping) else adapters)


def slots_to_prepare(methods: Sequence[Method], model: torch.nn.Module, adapter_name: str | None) -> Iterator[Slot]:
    """The slots that are prepared: of one adapter, or of all that can be."""
    for host in carriers(model):
        for name, config in host.configs.items():
            # adapters that can't be prepared are skipped, unless they are asked for by name
            wanted = config.peft_type in PADDABLE if adapter_name is None else name == adapter_name
            if wanted and (slot := slot_in(methods, host, name)).layers:
                yield slot


def _space_in(
    slot: Slot, target_rank: int | None, family: list[Adapter], ranks: Mapping[str, int]
) -> tuple[dict[str, int], list[Refusal]]:
    """The rank to make room for, by the path of a layer that the LoRA slot has or lacks; and the refusals."""
    refusals = [*slot.method.judge(slot.config, "loaded")]
    refusals += [refusal("layer_not_preparable", path=layer.path, reason=why) for layer, why in slot.obstacles[:1]]
    if strange := set(slot.method.extra_state(slot.config)) - BESIDE_LORA:
        allowed = ", ".join(sorted(BESIDE_LORA))
        refusals.append(refusal("loaded_not_preparable", strange=", ".join(sorted(strange)), allowed=allowed))
    refusals = refusals or [reason for adapter in family for reason in _misfits(slot, adapter)]
    if refusals:
        return {}, refusals
    own = {layer.path: rank or 0 for layer, rank in zip(slot.layers, ranks_before(slot), strict=True)}
    space = {layer.path: layer.tensors[0].capacity or 0 for layer in slot.layers}
    wanted = [("the loaded adapter", own), ("the ranks to make room for", ranks)]
    for adapter in family:
        wanted.append((adapter.label, of_adapter := _ranks_of(slot, adapter)))
        if not of_adapter:
            names = adapter.config.target_modules
            reason = refusal("member_has_no_layer", label=adapter.label, target_modules=names)
            refusals += with_bases(slot, adapter.config, [reason])
    for label, ranks in wanted:
        for path, rank in ranks.items():
            if target_rank is not None and target_rank < rank:
                reason = refusal("target_rank_too_low", target_rank=target_rank, own=rank, path=path, label=label)
                refusals.append(reason)
                break
            space[path] = max(space.get(path, 0), rank, target_rank or 0)
    return space, refusals or [*slot.method.no_room(slot, space)]


def _misfits(slot: Slot, adapter: Adapter) -> Iterator[Refusal]:
    """The reasons why an adapter can't share a graph with the loaded one."""
    yield from (refusals := misfits(slot, adapter, in_graph=True))
    forms = [_form_of_extra_state(slot, config) for config in (slot.config, adapter.config)]
    if not refusals and forms[0] != forms[1]:
        yield refusal("member_of_another_form", loaded=forms[0], new=forms[1], label=adapter.label)


def _form_of_extra_state(slot: Slot, config: Config) -> str:
    """Describe the modules that an adapter saves, and the tokens that it trains: a graph has both as constants."""
    saved = tuple(getattr(config, "modules_to_save", None) or ["no module"])
    tokens = getattr(config, "trainable_token_indices", None) or "no"
    paths = listing([path for path, _ in slot.walk if path.endswith(saved)]) or "no modules"
    return f"{paths} and {listing(tokens.values() if isinstance(tokens, dict) else [tokens])} tokens"


def _ranks_of(slot: Slot, adapter: Adapter) -> dict[str, int]:
    """The rank of an adapter on each module that a fresh load would put it on; a shared module counts once."""
    base, config = slot.host.base, lora.complete(copy.deepcopy(adapter.config), slot.host)
    first_paths = {module: path for path, module in reversed(slot.walk)}.values()
    # modules inside a tuner layer belong to it
    paths = {path for path in first_paths if path and ".base_layer" not in path and lora.is_targeted(config, path)}
    paths |= {path for key in adapter.tensors if (path := adaptable(base, canonical_path(key))) is not None}
    known = {path: layer.path for layer in slot.layers for path in layer.paths}
    return {path: settings_for(config, path).rank for path in [known.get(path, path) for path in paths]}


def _change_to_room(slot: Slot, space: dict[str, int], kind: type[Room], extra: list[SlotTensor]) -> Change:
    """Allocate a room next to the model. The change moves the slot in when it is carried out."""
    capacity = {layer: space[layer.path] for layer in slot.layers}
    lacking = space.keys() - {layer.path for layer in slot.layers}
    enough = all(layer.tensors[0].capacity == rank for layer, rank in capacity.items())
    present = room_of(slot.host.base, slot.adapter_name)
    kind = type(present) if present is not None and kind is Room else kind
    if enough and not lacking and type(present) is kind:
        return Change()
    reserved = build_added_layers(slot, slot.config, {path: space[path] for path in sorted(lacking)}) if lacking else []
    capacity |= {layer: space[layer.path] for layer in reserved}
    with slot.write_mode(), torch.no_grad():
        memory = build_room(slot, capacity, reserved, kind, extra)
    change = begin_change(slot, slot.config)
    if (left := room_left_by(slot)) is not None:
        change.steps.append(functools.partial(left.unpatch_layers, is_lost=present is None))
    # the parameters become views of the room's memory, and stay the same objects
    for tensor in memory.spans:
        tensor.resize(memory.view(tensor), change)
    change.steps.append(functools.partial(_move_in, memory, list(capacity), reserved))
    change.last_steps.append(lambda journal: keep_slot(slot, memory.slot, journal))
    return change


def _move_in(room: Room, layers: list[SlotLayer], reserved: Collection[SlotLayer], journal: Journal) -> None:
    slot, name = room.slot, room.slot.adapter_name
    for index, layer in enumerate(layers):
        if layer in reserved:
            layers[index] = layer = dataclasses.replace(layer, module=attach(slot, layer, journal))
        slot.method.make_offable(layer.module, name, journal)
        make_prepared(layer.module, name, room.scaling(index, layer.tensors[0].parameter.device), journal)
    write_settings(slot, layers, room.state.settings, journal)
    moved = dataclasses.replace(slot, layers=tuple(layers))
    room.record_links(moved)
    room.patch_layers(moved, journal)
