"""Commit: executes a plan, and nothing but the plan, entirely or not at all.

Three steps. *Stage*: every tensor that is needed is allocated, cast and moved beside the model; whatever can
fail for want of memory fails here. *Reversible writes*: scalars, config, resized and added layers, each noted
in a journal that takes it back if a later one fails. *The copy*: all values go to their addresses in one call
that has nothing left to fail at. It is the last thing done, so there is never a copy to take back.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .base_values import lost_originals, note_lost
from .building import give_memory
from .errors import HotswapError, refuse
from .grafting import Grafting, forget_places, note_former_layers
from .interrupts import let_through
from .journal import Journal
from .merging import merged_beside, merged_where_read
from .parts import SlotTensor
from .plan import Action, LayerPlan, Plan, TensorPlan
from .prepared_layer import has_fixed_size
from .room import Content, clear_gradient, room_of
from .shadow import attach
from .shards import is_sharded, local_part, note_writes, shard
from .state_view import set_off, set_padded
from .turns import swaps_of, writing

#: models whose user has been told that swaps recompile
_warned: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


@dataclass
class _Staged:
    """All tensors that a commit writes, of the dtype and on the device where they go."""

    targets: list[torch.Tensor] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)
    resized: list[tuple[SlotTensor, torch.Tensor]] = field(default_factory=list)
    #: parameters of a graft that get another shape
    reshaped: list[tuple[torch.nn.Parameter, torch.Tensor]] = field(default_factory=list)
    #: base weights as they were before an adapter overwrote them
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    #: the DTensors among the parameters; the targets are this process's parts of them
    sharded: list[torch.Tensor] = field(default_factory=list)
    #: where the slot has a room: what will be in it, and the rows of its memory that this takes
    content: Content | None = None
    used: list[int] | None = None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.targets.append(target)
        self.sources.append(source)

    def zero(self, target: torch.Tensor) -> None:
        # a single zero, repeated without taking memory
        self.copy(target, target.new_zeros(()).expand(target.shape))

    def cast(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """:meth:`copy` of a source that is cast and moved here, where an error does no harm yet."""
        self.copy(target, source.detach().to(target.device, target.dtype))


def commit(plan: Plan) -> None:
    """Carries out a plan.

    Parameters
    ----------
    plan:
        What :func:`hotswap_lab.plan_hotswap` returned. It is tied to the model's state at that time: make it
        and commit it without changing the model in between.

    Raises
    ------
    HotswapError
        If the plan was refused. Whatever is raised, from here or from below, the model is as it was.

    Examples
    --------
    >>> from hotswap_lab import commit, demo, plan_hotswap
    >>> model, tokenizer = demo.load("reverse")
    >>> commit(plan_hotswap(model, demo.adapter_path("caesar"), "default"))
    >>> demo.ask(model, tokenizer, "abc")
    'def'
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"commit() takes what plan_hotswap gives, a Plan: got a {type(plan).__name__}")
    commit_together([plan])


def commit_together(plans: Sequence[Plan]) -> None:
    """Carries out several plans, all of them or none: the parts of a pipeline, each with its own adapter.

    Raises
    ------
    HotswapError
        If any of them was refused. Whatever is raised, every model is as it was.
    """
    for plan in plans:
        plan.raise_if_refused()
    if plans:
        bases = [plan.slot.host.base for plan in plans]
        with swaps_of(*bases):
            _commit_together(plans, bases)


def _commit_together(plans: Sequence[Plan], bases: Sequence[torch.nn.Module]) -> None:
    for plan in plans:
        if plan.will_recompile:
            _warn_of_recompiling(plan)
    _check_fresh(plans)
    staged = [_stage(plan) for plan in plans]
    let_through()
    targets = [target for each in staged for target in each.targets]
    sources = [source for each in staged for source in each.sources]
    journal = Journal()
    inference = any(target.is_inference() for target in targets)
    with writing(*bases), torch.inference_mode(inference), torch.no_grad():
        _check_fresh(plans)  # whoever was waited for may have merged, or trained
        try:
            for plan, each in zip(plans, staged, strict=True):
                _write(plan, each, journal)
            note_writes(parameter for each in staged for parameter in each.sharded)
            if targets:
                torch._foreach_copy_(targets, sources)
        except BaseException:
            journal.roll_back()
            raise
        for plan in plans:
            if plan.room is not None:
                plan.room.note_written()


def _check_fresh(plans: Sequence[Plan]) -> None:
    for plan in plans:
        if plan.is_stale():
            raise refuse(
                "The model has changed since this swap was planned.",
                found=f"the adapter {plan.slot.adapter_name!r} swapped, trained, merged, moved or prepared since, "
                "or others loaded, deleted or activated",
                expected="the model as it was when the plan was made",
                next_step="make the plan again",
            )
        reads_base = plan.grafting is None and (plan.room is None or plan.room.reads_base)
        off = [each.layer for each in plan.layers if each.settings is None] if reads_base else []
        if others := merged_where_read(plan.slot.host, off):
            raise HotswapError(merged_beside(plan.slot.adapter_name, others))


def _write(plan: Plan, staged: _Staged, journal: Journal) -> None:
    """Everything of one plan but the values of tensors, undoable."""
    room = plan.room or room_of(plan.slot.host.base, plan.slot.adapter_name)
    with plan.slot.write_mode():
        if room is not None and plan.room is None:
            # it can't follow what is about to be written
            journal.record(lambda: room.settle_in(Journal()))
            room.leave()
        for target, fresh in staged.resized:
            _resize(target, fresh, journal)
        if plan.grafting is not None:
            _write_graft(plan, staged, journal)
        elif staged.content is not None:
            plan.room.enter(staged.content, staged.used, journal)
        else:
            lost = lost_originals(plan.slot.host, plan.slot.adapter_name)
            note_lost(plan.slot.host.base, plan.slot.adapter_name, plan.config, lost, journal)
            for layer in plan.layers:
                _write_layer(plan, layer, journal)
        if staged.content is None:
            journal.set_item(plan.slot.host.configs, plan.slot.adapter_name, plan.config)


def _warn_of_recompiling(plan: Plan) -> None:
    base = plan.slot.host.base
    if base in _warned:
        return
    _warned.add(base)
    warnings.warn(
        f"Swapping {plan.adapter.label} in changes shapes or numbers that the model was compiled for: its next call "
        "compiles again. Call prepare_model_for_compiled_hotswap after loading the first adapter and before "
        "compiling, to swap without recompiling. (Said once for this model.)",
        stacklevel=6,
    )


def _stage(plan: Plan) -> _Staged:
    staged = _Staged()
    with plan.slot.write_mode(), torch.no_grad():
        if plan.grafting is not None:
            _stage_graft(staged, plan.grafting)
            return staged
        if plan.room is not None:
            _stage_room(staged, plan)
            return staged
        for layer in plan.layers:
            for write in layer.tensors:
                _stage_tensor(staged, write)
        _stage_scalings(staged, plan)
    return staged


def _stage_graft(staged: _Staged, grafting: Grafting) -> None:
    for target, source in (*grafting.graft.copies, *grafting.base.copies):
        staged.cast(target, source)
    for parameter, source in grafting.graft.resizes:
        fresh = source.to(parameter.device, parameter.dtype, copy=True)
        staged.reshaped.append((parameter, fresh.contiguous()))
    # copies: what is in the base model now is about to be overwritten
    staged.originals = {name: value.detach().clone() for name, value in grafting.base.originals.items()}


def _stage_room(staged: _Staged, plan: Plan) -> None:
    """Into a room: first zeros wherever something else might be left, then the tensors, then all scalings."""
    room, staged.content = plan.room, plan.content
    ranks = [settings.rank if settings else 0 for settings in staged.content.settings]
    staged.used = room.rows_for(ranks)
    for memory in room.to_clear(ranks):
        staged.zero(memory)
    for layer in plan.layers:
        for write in layer.tensors:
            if write.source is not None:
                own = room.own_view(write.target, write.target.rank_of(write.source.shape))
                # cast and moved here, where an error does no harm yet
                source = write.source if not write.source.requires_grad else write.source.detach()
                source = source.to(own.device, own.dtype)
                staged.copy(own, write.target.split(source))
            elif write.target.off is not None:
                staged.cast(room.view(write.target), write.target.off())
    scalings = room.scalings_of(staged.content)
    for vector in room.scalings:
        staged.copy(vector, scalings)


def _stage_tensor(staged: _Staged, write: TensorPlan) -> None:
    target, parameter, source = write.target, write.target.parameter, write.source
    if is_sharded(parameter):
        staged.sharded.append(parameter)
        _stage_shard(staged, write)
        return
    if source is None:
        staged.cast(parameter, target.off_value())
        return
    source = source.detach()
    if not write.keeps_address:
        # always a copy: a model that shared memory with the caller's state dict would change with it
        fresh = source.to(parameter.device, parameter.dtype, copy=True)
        staged.resized.append((target, fresh.contiguous()))
        return
    source = source.to(parameter.device, parameter.dtype)
    rank = target.rank_of(source.shape)
    if rank == target.capacity:
        staged.copy(parameter, source)
    else:
        staged.copy(target.own(parameter, rank), target.split(source))
        staged.zero(target.padding(parameter, rank))


def _stage_shard(staged: _Staged, write: TensorPlan) -> None:
    """Of a parameter that is spread over processes, each writes what it holds."""
    target, parameter, source = write.target, write.target.parameter, write.source
    if source is None:
        staged.zero(local_part(parameter))
    elif write.keeps_address:
        padded = target.rank_of(source.shape) != target.capacity
        whole = target.padded(source, target.capacity) if padded else source
        staged.copy(local_part(parameter), local_part(shard(whole, parameter)))
    else:
        staged.resized.append((target, shard(source, parameter)))


def _stage_scalings(staged: _Staged, plan: Plan) -> None:
    """The scalings that are tensors are written with all others, in the one copy."""
    by_device: dict[torch.device, list[tuple[torch.Tensor, float]]] = {}
    for layer in plan.layers:
        if layer.settings is not None and has_fixed_size(layer.layer.module, plan.slot.adapter_name):
            target = layer.layer.module.scaling[plan.slot.adapter_name]
            by_device.setdefault(target.device, []).append((target, layer.settings.scaling))
    for pairs in by_device.values():
        target = pairs[0][0]
        values = torch.tensor([value for _, value in pairs], dtype=target.dtype, device=target.device)
        for (target, _), value in zip(pairs, values.unbind(), strict=True):
            staged.copy(target, value)


def _resize(target: SlotTensor, fresh: torch.Tensor, journal: Journal) -> None:
    # the gradient first: it must have the shape of its parameter at all times
    clear_gradient(target.parameter, journal)
    give_memory(target.parameter, fresh, journal)
    if target.size_attribute:
        journal.set_attribute(target.owner, target.size_attribute, target.rank_of(fresh.shape))


def _write_graft(plan: Plan, staged: _Staged, journal: Journal) -> None:
    graft, host = plan.grafting.graft, plan.slot.host
    for parameter in graft.parameters:
        clear_gradient(parameter, journal)
    for parameter, fresh in staged.reshaped:
        give_memory(parameter, fresh, journal)
    for step in (*graft.steps, *graft.silent_steps):
        step(journal)
    for parameter, value in plan.grafting.requires_grad:
        clear_gradient(parameter, journal)
        journal.set_attribute(parameter, "requires_grad", value)
    plan.grafting.base.keep(host.base, plan.slot.adapter_name, staged.originals, plan.config, journal)
    if plan.grafting.places is not None:
        plan.grafting.places.keep(plan.slot, plan.config, journal)
    else:
        forget_places(plan.slot, journal)
    note_former_layers(host.base, plan.slot.adapter_name, graft.unwrapped, journal)
    names = getattr(host.tuner, "targeted_module_names", None)
    if graft.added and names is not None:
        journal.set_attribute(host.tuner, "targeted_module_names", [*dict.fromkeys([*names, *graft.added])])


def _write_layer(plan: Plan, layer: LayerPlan, journal: Journal) -> None:
    name, module, method = plan.slot.adapter_name, layer.layer.module, plan.slot.method
    for tensor in layer.layer.tensors:
        clear_gradient(tensor.parameter, journal)
    fixed = has_fixed_size(module, name)
    if fixed:
        set_padded(module, name, journal)
    set_off(module, name, layer.settings is None, journal)
    journal.clear(method.cache_of(module, name))
    if layer.settings is not None:
        for table, value in method.scalars(layer.settings).items():
            if table != "scaling" or not fixed:
                journal.set_item(getattr(module, table), name, value)
        method.write_dropout(module, name, layer.settings.dropout, journal)
    if layer.action is Action.ADD:
        attach(plan.slot, layer.layer, journal)
