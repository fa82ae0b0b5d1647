"""The difference between a live model and a freshly loaded one: the writes that make them equal.

PEFT has loaded the new adapter onto a twin of the live base model, so both are trees around the same base modules.
They are walked in parallel. An object of the fresh load that has a counterpart of the same form in the live model is
not copied: the live one stays, and gets its values. Other objects are copied into the live model, and the copies refer
to its own objects. Objects that the fresh load lacks are removed. Entries of other adapters are never read.

Say LoRA with r=4 on ``q_proj`` and ``v_proj`` is swapped for DoRA with r=6 on ``q_proj``. On ``q_proj``, ``lora_A`` and
``lora_B`` stay the same parameters and are resized, so an optimizer still has them. ``r["default"]`` and
``use_dora["default"]`` get new values. The live layer has no ``lora_magnitude_vector["default"]``, so it gets a copy.
``v_proj`` has no wrapper in the fresh load: the live one is taken off, or only emptied if another adapter is on it.
A :class:`Graft` records all changes, to be written later.
"""

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper

from ..core import wrappers
from ..core.change import Step
from ..core.compiled import unwrap_compiled
from ..core.host import Host
from ..core.journal import MISSING, Journal
from ..core.lora import EvalFreeDropout
from ..core.memory import conflicting_writes, overlapping
from ..core.plan import Action, LayerPlan, Plan
from ..core.prepared import is_marked_off, is_off, keep_off, mark
from ..core.settings import SCALAR_TABLES
from ..core.slot import SlotLayer
from ..core.tensors import OFF_ATTRIBUTE, PREPARED_ATTRIBUTE, are_interchangeable, is_prepared
from ..core.wrappers import Table, is_wrapper
from .base_twin import FreshId, LiveId
from .base_values import BaseChange
from .fresh_adapter import FreshAdapter

#: an object that belongs to one adapter although it isn't stored under its name: AdaLoRA's budget of ranks
BUDGET = "rankallocator"
#: the ends of paths to tables that no forward reads
BOOKKEEPING = tuple(f": {table}" for table in (*SCALAR_TABLES, "alpha", "lora_bias"))
#: the names of the weights that PEFT freezes, by adapter name
FROZEN = "frozen_peft_weight_names"
#: types of attributes that are compared in an adapter's own modules; values of other types belong to one object
PLAIN = (bool, int, float, str, type(None), tuple)
#: and those that are compared in wrappers and tuners
COMPARED = (*PLAIN, dict, torch.dtype, torch.nn.Module)


class Target(NamedTuple):
    """A tensor of the live model, and the table and key under which it is found."""

    table: MutableMapping[str, Any]
    key: str
    tensor: torch.Tensor


class WholeSettings(NamedTuple):
    """The rank and scaling of a layer of any method, for reports; None where it has none."""

    rank: int | None
    scaling: float | None


@dataclass
class Graft:
    """Everything to write: values in place, parameters of other shapes, and changes of tables and attributes."""

    #: pairs of a live tensor and its new values
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    #: pairs of a live parameter and a tensor of another shape
    resizes: list[tuple[torch.nn.Parameter, torch.Tensor]] = field(default_factory=list)
    #: all other writes, undoable
    steps: list[Step] = field(default_factory=list)
    #: for reports, one entry for each module with the adapter
    layers: list[LayerPlan] = field(default_factory=list)
    #: paths of modules that need a new tuner layer
    added: list[str] = field(default_factory=list)
    #: paths of modules that lose their tuner layer
    unwrapped: list[str] = field(default_factory=list)
    #: descriptions of the differences beyond values of tensors
    differences: list[str] = field(default_factory=list)
    #: live parameters of the adapter
    parameters: list[torch.nn.Parameter] = field(default_factory=list)
    #: the live target of each tensor of the fresh load
    target_of: dict[FreshId, Target] = field(default_factory=dict)
    #: pairs of a table and its plain value under the adapter's name
    scalars: list[tuple[MutableMapping[str, Any], object]] = field(default_factory=list)
    #: of the scalars, the scalings: a table and its value
    scalings: list[tuple[MutableMapping[str, Any], float]] = field(default_factory=list)
    #: the writes to the base model's own weights, and the new ``requires_grad`` of the parameters where it changes
    base: BaseChange = field(default_factory=BaseChange)
    requires_grad: list[tuple[torch.nn.Parameter, bool]] = field(default_factory=list)

    @property
    def writes_values_only(self) -> bool:
        """Whether shapes, tables and attributes all stay, so that a compiled graph stays valid."""
        return all(text.endswith(BOOKKEEPING) for text in self.differences)

    @property
    def nbytes(self) -> int:
        """The bytes that are written to the model's tensors."""
        written = [target for target, _ in (*self.copies, *self.base.copies)]
        return sum(tensor.nbytes for tensor in (*written, *(source for _, source in self.resizes)))


def difference(plan: Plan, fresh: FreshAdapter) -> Graft:
    """The writes that make the live model equal to the fresh load. Refuses the plan where that is impossible."""
    comparison = _Comparison(plan, fresh)
    comparison.roots()
    comparison.finish()
    return comparison.graft


class _Comparison:
    """The walk over both trees. It identifies objects by their ``id()``.

    Two tables decide how an object of the fresh load is transferred. If it is in ``live_of``, it already has a live
    counterpart. If its candidate is in ``matched``, that is the counterpart of a different object, and the live model
    gets a copy, the same one in all places. Say the fresh load has one ``W`` for an embedding and the head, because of
    ``ensure_weight_tying``, and the live model has ``A`` and ``B``, one for each:

    1. At the embedding, ``W`` is new: ``A`` gets its values, ``live_of[W] = A``, and ``A`` is matched.
    2. At the head, ``W`` is in ``live_of``, and the live object is ``B``: ``A`` replaces it.

    On the way back, the live model has ``A`` twice, and the fresh load ``V`` and ``W``. At the embedding ``A`` gets the
    values of ``V``. At the head it would get those of ``W``, too, and the last write would stay in both. But ``A`` is
    matched, so the head gets a copy of ``W`` (``tests/core/test_memory.py``, ``test_pairs_on_a_tied_base``, from
    "saved, tied" to "saved").

    The keys are ids because tensors compare by value, and because ``live_of`` is the memo of ``copy.deepcopy`` in
    :meth:`finish`: a copy then refers to the live objects. ``kept`` keeps all objects alive, so that ids stay unique.
    """

    def __init__(self, plan: Plan, fresh: FreshAdapter):
        self.plan, self.fresh, self.graft = plan, fresh, Graft()
        self.host, self.name = host, name = plan.slot.host, plan.slot.adapter_name
        self.method, self.others = plan.slot.method, set(host.configs) - {name}
        self.is_mixed = isinstance(host.tuner, MixedModel)  # layers of several methods may wrap one another
        model, self.active = fresh.model, activity_of(host)
        #: the live counterpart of each of the fresh load's modules and tensors: of the base at first, then of all kept
        self.live_of: dict[FreshId, object] = dict(fresh.twin.live_of)
        #: live objects with a counterpart; some methods share modules between layers
        self.matched: set[LiveId] = set()
        #: the fresh load's wrappers that the live model gets a copy of
        self.new: set[FreshId] = set()
        self.kept = [*model.modules()]
        self.own = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in self.live_of]
        #: a table, a key in it, and the fresh load's object to copy there
        self.puts: list[tuple[Table, str, object]] = []
        #: live wrappers that the fresh load lacks; removed last, when all the tables that they share are known
        self.rest: list[tuple[torch.nn.Module, str]] = []
        #: live tensors that keep their shapes, their values after the swap, and where they are
        self.values: list[tuple[torch.Tensor, torch.Tensor, str]] = []
        #: whether the wrapper being compared is in training mode
        self.training = host.base.training

    # ---- the walk

    def roots(self) -> None:
        live, model = self.host.carrier, self.fresh.model
        tuner = model.base_model
        live_tuner = live.base_model if isinstance(live, PeftModel) else live
        if tuner is not self.fresh.twin.model and isinstance(live_tuner, type(tuner)):
            self._pair(live_tuner, tuner, "")
        self.live_of.setdefault(id(tuner), live_tuner)
        if isinstance(live, PeftModel):
            self._pair(live, model, "")
        self._base(self.host.base, self.fresh.twin.model, "")

    def _base(self, live: torch.nn.Module, fresh: torch.nn.Module, path: str) -> None:
        """Compare two modules of the base model."""
        if id(live) in self.matched:
            return
        self.matched.add(id(live))
        absent = [{name: child is None for name, child in module._modules.items()} for module in (live, fresh)]
        # another layer may have the same class and the same weights, so the twin's record decides
        if absent[0] != absent[1] or self.live_of.get(id(fresh)) is not live:
            self._refuse(path, "other modules of the base model there than in a fresh load")
            return
        for name, child in fresh._modules.items():
            if child is not None:
                self._place(live, name, child, f"{path}.{name}" if path else name)

    def _place(self, parent: torch.nn.Module, name: str, fresh: torch.nn.Module, path: str) -> None:
        """Compare one location in the base model: the wrappers around its module, then the module."""
        present, core = wrappers.peel(parent._modules[name])
        around, fresh_core = wrappers.peel(fresh)
        rest, new = list(present), []
        for wrapper in around:
            match = next((live for live in rest if wrappers.are_alike(live, wrapper)), None)
            if match is None:
                new.append(wrapper)
            else:
                rest.remove(match)
                before, resizes = wrappers.rank_of(match, self.name), len(self.graft.resizes)
                action = Action.COPY if wrappers.has_adapter(match, self.name) else Action.ADD
                self._pair(match, wrapper, path)
                if len(self.graft.resizes) > resizes:
                    action = Action.RESIZE
                self._report(path, match, action, before, wrapper)
        staying = [wrapper for wrapper in rest if self._stays(wrapper)]
        self._check_place(path, new, staying)
        for wrapper in new:
            self.new.add(id(wrapper))
            self._adopt_state(wrapper, core.training)
            if not isinstance(wrapper, AuxiliaryTrainingWrapper):  # the config names those, so they need no add_layers
                self.graft.added.append(path)
            self._report(path, wrapper, Action.ADD, None, wrapper)
        self.rest += [(wrapper, path) for wrapper in rest]
        wanted = [self.live_of.get(id(wrapper), wrapper) for wrapper in around]
        chain = [wrapper for wrapper in present if wrapper in wanted or wrapper in staying]
        if [wrapper for wrapper in chain if wrapper in wanted] != wanted:
            # PEFT puts a wrapper that is loaded later around those that are there
            chain = wanted + staying if self.is_mixed else staying + wanted
        holders = [(parent, name), *map(wrappers.holder_of_inside, chain)]
        for outer, (holder, key), module in zip([parent, *chain], holders, [*chain, core], strict=True):
            if id(outer) in self.new:
                holder._modules[key] = module
            elif unwrap_compiled(holder._modules[key]) is not module:
                self._put(holder._modules, key, module, f"{path}: wrapped otherwise")
        if len(chain) < len(present):
            self.graft.unwrapped.append(path)
        self._base(core, fresh_core, path)

    def _check_place(self, path: str, new: list[torch.nn.Module], staying: list[torch.nn.Module]) -> None:
        if new and staying and not (self.is_mixed and isinstance(staying[0], BaseTunerLayer)):
            first = staying[0], new[0]
            kinds = [f"{'tied ' if wrappers.is_tied(wrapper) else ''}{type(wrapper).__name__}" for wrapper in first]
            self._refuse(path, f"a {kinds[0]} that stays there, where a {kinds[1]} would have to be put")
        if self.others and any(isinstance(wrapper, LNTuningLayer) for wrapper in (*new, *staying)):
            self._refuse(path, "a layer that fails, unlike a fresh one, where the active adapter is not on it")

    def _stays(self, wrapper: torch.nn.Module) -> bool:
        """Whether a live wrapper stays without this adapter: for other adapters, or because it is prepared."""
        if not wrappers.has_adapter(wrapper, self.name) or is_prepared(wrapper, self.name):
            return True
        return any(wrappers.has_adapter(wrapper, other) for other in self.others)

    def _remove(self, wrapper: torch.nn.Module, path: str) -> None:
        """Remove the adapter from a live wrapper, or turn it off there."""
        if not wrappers.has_adapter(wrapper, self.name):
            return
        was_off = is_off(wrapper, self.name, self.method.tensors_of(wrapper, self.name) or ())
        if not was_off:
            self._report(path, wrapper, Action.OFF, wrappers.rank_of(wrapper, self.name))
        if is_prepared(wrapper, self.name):
            if not was_off:
                self._turn_off(wrapper)
        elif self._stays(wrapper):
            for attribute, table in wrappers.entries_under(wrapper, self.name):
                if id(table) not in self.matched:
                    self._delete(table, f"{path}: {attribute}")
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                self._set_presence(wrapper, False, path)
            self.graft.steps.append(lambda journal: mark(wrapper, OFF_ATTRIBUTE, self.name, False, journal))

    def _turn_off(self, wrapper: BaseTunerLayer) -> None:
        for target in self.method.tensors_of(wrapper, self.name) or ():
            self.graft.parameters.append(target.parameter)
            self.graft.copies.append((target.parameter, target.parameter.new_zeros(()).expand(target.parameter.shape)))
        self.graft.steps.append(lambda journal: mark(wrapper, OFF_ATTRIBUTE, self.name, True, journal))
        self.graft.steps.append(lambda journal: keep_off(self.method, wrapper, journal))
        self.graft.steps.append(lambda journal: self.method.turn(wrapper, self.name, False, journal))

    def _report(self, path: str, module: torch.nn.Module, action: Action, before: int | None, after=None) -> None:
        settings = after and WholeSettings(wrappers.rank_of(after, self.name), wrappers.scaling_of(after, self.name))
        self.graft.layers.append(LayerPlan(SlotLayer(path, module, ()), action, before, settings, ()))

    # ---- two modules of the same form

    def _pair(self, live: torch.nn.Module, fresh: torch.nn.Module, path: str, own: bool = False) -> None:
        """Compare two modules completely: wrappers or tuners of PEFT, or the adapter's ``own`` modules."""
        if id(fresh) in self.live_of:
            return
        self._match(live, fresh)
        skipped = None
        if not own:
            holder, name = wrappers.holder_of_inside(fresh)
            skipped = name if holder is fresh else None
            self.training = live.training
            if is_prepared(live, self.name):
                self._pad(live, fresh)
            self._freeze(live, fresh)
        for attribute, value in fresh.__dict__.items():
            if attribute not in wrappers.NOT_COMPARED and (not own or isinstance(value, PLAIN)):
                self._attribute(live, attribute, value, path, own)
        for attribute, value in fresh._modules.items():
            present = live._modules.get(attribute)
            if value is None or (not own and (attribute == skipped or id(value) in self.live_of)):
                continue
            if not own and wrappers.is_table(present):
                self._table(live, attribute, value, f"{path}: {attribute}")
            elif is_wrapper(present):
                self._pair(present, value, path)
            else:
                self._part(live._modules, attribute, value, f"{path}: {attribute}")
        for table in ("_parameters", "_buffers"):
            for key, value in fresh.__dict__[table].items():
                if value is not None:
                    self._part(live.__dict__[table], key, value, path)
        if not own:
            self._presence(live, fresh, path)

    def _match(self, live: object, fresh: object) -> None:
        self.live_of[id(fresh)] = live
        self.matched.add(id(live))

    def _presence(self, live: torch.nn.Module, fresh: torch.nn.Module, path: str) -> None:
        """Add the adapter to a wrapper's set of them, and remove it from tables that a fresh load lacks."""
        known = {attribute for attribute, _ in wrappers.tables_of(fresh)}
        for attribute, table in wrappers.entries_under(live, self.name):
            if attribute not in known:
                self._delete(table, f"{path}: {attribute}")
        if isinstance(live, AuxiliaryTrainingWrapper) and self.name not in live._adapters:
            self._set_presence(live, True, path)
        if is_marked_off(live, self.name):
            # all other differences where an adapter is off have been compared
            self.graft.steps.append(lambda journal: mark(live, OFF_ATTRIBUTE, self.name, False, journal))

    def _attribute(self, live: torch.nn.Module, attribute: str, value: object, path: str, own: bool) -> None:
        present, where = live.__dict__.get(attribute, MISSING), f"{path}: {attribute}"
        if isinstance(value, dict) and isinstance(present, MutableMapping):
            if attribute == "scaling" and isinstance(scaling := value.get(self.name), (int, float)):
                self.graft.scalars.append((present, scaling))
                self.graft.scalings.append((present, scaling))
                if not isinstance(now := present.get(self.name), torch.Tensor) and now != scaling:
                    self.graft.differences.append(where)
            else:
                self._entry(present, value, where)
        elif attribute == BUDGET or (present is MISSING and isinstance(value, COMPARED)):
            self._put(live.__dict__, attribute, value, where)
        elif isinstance(value, COMPARED) and not self._are_equal(present, value):
            if not own and any(wrappers.has_adapter(live, other) for other in self.others):
                self._refuse(path, f"{attribute}={present!r}, which other adapters there use, and {value!r} wanted")
            else:
                self._put(live.__dict__, attribute, value, where)

    def _table(self, live: torch.nn.Module, attribute: str, fresh: torch.nn.Module, path: str) -> None:
        present = live._modules[attribute]
        mine, wanted = wrappers.stores_of(present)[0], wrappers.stores_of(fresh)[0]
        if {self.name, *self.others}.intersection(mine) or self.name in wanted:
            self._match(present, fresh)
            self._entry(present, fresh, path)
            # the names of buffers that are left out of state dicts, and so of saved files
            left_out = present._non_persistent_buffers_set - fresh._buffers.keys() | fresh._non_persistent_buffers_set
            if left_out != present._non_persistent_buffers_set:
                self.graft.steps.append(
                    lambda journal: journal.set_attribute(present, "_non_persistent_buffers_set", left_out)
                )
        elif not self.others:  # a table for all adapters, such as indices by kind of layer
            self._part(live._modules, attribute, fresh, path)
        elif not all(wrappers.are_equal(mine.get(key, MISSING), wanted[key]) for key in wanted):
            self._refuse(path, "something that it shares with the model's other adapters, and needs to be different")

    def _entry(self, live: object, fresh: object, path: str) -> None:
        """Compare the entries of two tables under the adapter's name."""
        wanted = wrappers.stores_of(fresh)[0]
        if self.name in wanted:
            value = wanted[self.name]
            if isinstance(value, (bool, int, float, str)):
                self.graft.scalars.append((live, value))
            self._part(live, self.name, value, path)
        elif self.name in wrappers.stores_of(live)[0]:
            self._delete(live, path)

    # ---- one entry of a table

    def _part(self, table: Table, key: str, fresh: object, path: str) -> None:
        live = wrappers.stores_of(table)[0].get(key, MISSING)
        if isinstance(fresh, (torch.nn.Module, torch.Tensor)):
            if id(fresh) in self.live_of:
                if self.live_of[id(fresh)] is not live:
                    self._put(table, key, fresh, path)
            elif isinstance(live, EvalFreeDropout):
                if live.p != (p := getattr(fresh, "p", 0.0)):
                    self.graft.steps.append(lambda journal: journal.set_attribute(live, "p", p))
            elif id(live) in self.matched:
                self._put_new(table, key, fresh, path)
            elif isinstance(fresh, torch.Tensor):
                self._tensor(table, key, live, fresh, path)
            elif isinstance(live, torch.nn.Module) and wrappers.have_same_form(live, fresh):
                self._pair(live, fresh, path, own=True)
            else:
                self._put_new(table, key, fresh, path)
        elif not self._are_equal(live, fresh):
            self._put(table, key, fresh, path)

    def _tensor(self, table: Table, key: str, live: object, fresh: torch.Tensor, path: str) -> None:
        is_parameter, values = isinstance(live, torch.nn.Parameter), fresh.detach()
        if type(live) is not type(fresh) or (live.shape != fresh.shape and not is_parameter):
            self._put_new(table, key, fresh, path)
            return
        if live.is_meta or fresh.is_meta:
            self._refuse(path, "a tensor without data (on the meta device)")
            return
        self._match(live, fresh)
        self.graft.target_of[id(fresh)] = Target(wrappers.stores_of(table)[0], key, live)
        if is_parameter:
            self.graft.parameters.append(live)
        if live.shape == fresh.shape:
            self.values.append((live, values, path))
            if not are_interchangeable(live, values):
                self.graft.copies.append((live, values))
        else:
            self.graft.resizes.append((live, values))
            self.graft.differences.append(f"{path} has shape {tuple(live.shape)}, fresh {tuple(fresh.shape)}")

    def _pad(self, live: BaseTunerLayer, fresh: BaseTunerLayer) -> None:
        """Pad the fresh load's tensors to the rank that the live ones were prepared for, if that is higher."""
        targets = {tensor.key: tensor for tensor in self.method.tensors_of(live, self.name) or ()}
        for source in self.method.tensors_of(fresh, self.name) or ():
            parameter, target = source.parameter, targets.get(source.key)
            if target and target.fits(parameter.shape) and (source.capacity or 0) < (target.capacity or 0):
                parameter.data = target.padded(parameter.detach(), target.capacity)
                if source.size_attribute:
                    setattr(source.owner, source.size_attribute, target.capacity)
        self.graft.steps.append(lambda journal: mark(live, PREPARED_ATTRIBUTE, self.name, True, journal))

    def _freeze(self, live: torch.nn.Module, fresh: torch.nn.Module) -> None:
        """Follow PEFT, which freezes some weights of a few kinds of LoRA, such as MiCA's ``lora_B``."""
        before, after = (set(getattr(wrapper, FROZEN, {}).get(self.name, ())) for wrapper in (live, fresh))
        tensors = self.method.tensors_of(live, self.name) if before != after else None
        trained = any(tensor.parameter.requires_grad for tensor in tensors or ())
        for tensor in tensors or ():
            if (name := tensor.key.partition(".")[0]) in before ^ after:
                self.graft.requires_grad.append((tensor.parameter, trained and name not in after))

    def _are_equal(self, live: object, fresh: object) -> bool:
        if isinstance(live, (list, tuple)) and isinstance(fresh, (list, tuple)):
            live, fresh = list(live), [self.live_of.get(id(item), item) for item in fresh]
        return wrappers.are_equal(live, self.live_of.get(id(fresh), fresh))

    def _part_memory(self) -> None:
        """Separate tensors that share memory, as in tied layers, but need different values."""
        is_apart = self.plan.slot.room is not None
        for group in [] if is_apart else overlapping([live for live, *_ in self.values]):
            writes = [self.values[number] for number in group]
            for number in conflicting_writes([(live, values) for live, values, _ in writes]):
                live, values, path = writes[number]
                self.graft.copies = [pair for pair in self.graft.copies if pair[0] is not live]
                self.graft.resizes.append((live, values))
                self.graft.differences.append(f"{path} shares memory with another tensor, unlike a fresh one")

    # ---- recording differences

    def _put_new(self, table: Table, key: str, fresh: torch.nn.Module | torch.Tensor, path: str) -> None:
        for module in wrappers.own_modules(fresh) if isinstance(fresh, torch.nn.Module) else ():
            module.training = self.training
        self._put(table, key, fresh, path)

    def _put(self, table: Table, key: str, fresh: object, path: str) -> None:
        self.puts.append((table, key, fresh))
        self.graft.differences.append(path)

    def _delete(self, table: object, path: str) -> None:
        for store in wrappers.stores_of(table):
            self.graft.steps.append(lambda journal, store=store: journal.remove(store, self.name))
        self.graft.differences.append(path)

    def _set_presence(self, wrapper: AuxiliaryTrainingWrapper, present: bool, path: str) -> None:
        """Record on a live wrapper whether it has the adapter, and whether that is active there."""
        adapters = wrapper._adapters | {self.name} if present else wrapper._adapters - {self.name}
        self._put(wrapper.__dict__, "_adapters", adapters, f"{path}: _adapters")
        if self.name in self.active[0]:
            for module in dict.fromkeys((wrapper, wrappers.holder_of_inside(wrapper)[0])):
                self._put(module.__dict__, "_active_adapter", self.name if present else [], f"{path}: active adapter")

    def _refuse(self, path: str, found: str) -> None:
        self.plan.refuse("not_in_place", path=path, found=found)

    def _adopt_state(self, wrapper: torch.nn.Module, training: bool) -> None:
        """Give a wrapper that will be added the state of the live ones: active adapters, enabled, training."""
        active, disabled = self.active
        for module in wrappers.own_modules(wrapper):
            module.training = training
        for module in dict.fromkeys((wrapper, wrappers.holder_of_inside(wrapper)[0])):
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                # on a saved module, only one adapter can be active, and it must be one that it has
                own = self.name if self.name in active else []
                module._active_adapter = own if isinstance(wrapper, AuxiliaryTrainingWrapper) else list(active)
                module._disable_adapters = disabled

    def finish(self) -> None:
        """Remove the adapter from wrappers that the fresh load lacks, and make the steps that copy its objects."""
        for wrapper, path in self.rest:
            self._remove(wrapper, path)
        self._part_memory()
        live = (*self.host.base.modules(), *self.host.base.parameters())
        memo = {id(item): item for item in (*live, *self.own, self.fresh.config)} | self.live_of
        trained = any(parameter.requires_grad for parameter in self.graft.parameters)
        if self.graft.parameters and not trained:  # PEFT leaves an adapter frozen while another one is active
            for tensor in self.own:
                tensor.requires_grad_(False)
        for module in self.kept:  # PEFT keeps tensors there that are part of a graph, which Python can't copy
            tied = getattr(module, "kwargs", {}).get("tied_adapter") or {}
            tied.update({key: tensor.detach() for key, tensor in tied.items()})
        for table, key, fresh in self.puts:
            values = copy.deepcopy(fresh, memo), None
            for store, value in zip(wrappers.stores_of(table), values, strict=False):
                self.graft.steps.append(partial(Journal.set_item, table=store, key=key, value=value))


def activity_of(host: Host) -> tuple[list[str], bool]:
    """The active adapters of a model, and whether they are disabled."""
    for path, module in host.base.named_modules():
        # the layer inside a wrapper for trained tokens has active adapters of its own
        if isinstance(module, BaseTunerLayer) and not path.endswith(".token_adapter"):
            return list(getattr(host.tuner, "active_adapters", module.active_adapters)), module.disable_adapters
    active = getattr(host.carrier, "active_adapters", list(host.configs))
    return list(active) if isinstance(active, list) else list(host.configs), False
