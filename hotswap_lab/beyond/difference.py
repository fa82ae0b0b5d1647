"""The difference between a live model and a freshly loaded donor: what to write so that there is none.

Both models are walked side by side, wrapper by wrapper. Where both have an entry of the same form under the adapter's
name, the live one stays the object it is and gets new values; otherwise the entry is replaced. Entries of other
adapters are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper

from ..core.compiled import unwrap_compiled
from ..core.errors import Refusal
from ..core.host import Host, is_embedding
from ..core.journal import MISSING
from ..core.methods import method_of
from ..core.parts import SlotTensor
from ..core.prepared import EvalFreeDropout
from ..core.sameness import are_equal, have_same_bits, have_same_form
from ..core.state_view import is_marked_off, is_off, is_padded, set_off
from ..core.words import merged_beside
from . import general
from .donor import Donor
from .graft import Extent, Graft, Step, WrapperChange
from .wrappers import (
    NOT_COMPARED,
    WRAPPERS,
    are_alike,
    core_of,
    direct_tensors,
    entries_of,
    has_adapter,
    holder_of_inside,
    is_table,
    keys_of,
    own_modules,
    peel,
    rank_of,
    scaling_of,
    wrappers_in,
)

#: objects that belong to one adapter although they don't lie under its name: AdaLoRA's budget of ranks
OBJECTS_OF_ADAPTERS = {"rankallocator"}
#: layers whose forward fails where the active adapter is not on them, though another one is
FOR_ALL_OR_NONE = (LNTuningLayer,)
#: tables that no forward reads
BOOKKEEPING = {"r", "alpha", "lora_alpha", "use_rslora", "lora_bias"}


def difference(host: Host, donor: Donor, adapter_name: str) -> Graft:
    """What makes the adapter called ``adapter_name`` in the live model the donor's. Writes nothing."""
    comparison = _Comparison(donor, adapter_name, host)
    comparison.roots(host.carrier, host.base)
    comparison.check_leaks()
    return comparison.graft


class _Comparison:
    def __init__(self, donor: Donor, adapter_name: str, host: Host):
        self.donor, self.name = donor, adapter_name
        self._base_model = host.base
        self._adapter_names = set(host.configs)
        self._active, self._disabled = activity_of(host)
        self.graft = Graft()
        self._seen: set[tuple[int, int]] = set()
        #: from ids of the donor's parts to their counterparts in the live model
        self._counterparts: dict[int, object] = {
            **donor.stand_in.live_modules,
            **donor.stand_in.live_tensors,
        }
        #: ids of live tensors and modules that have a counterpart already
        self._taken: set[int] = set()
        #: the donor's wrappers that go into the live model
        self._added: list[torch.nn.Module] = []
        self._placed: list[object] = []
        self._change = Extent.NONE
        #: whether files name base weights, and so must see the same layers wrapped as a fresh load has
        self._names_bases = getattr(donor.config, "bias", "none") == "all"
        #: whether the wrapper at hand is in training mode
        self._training = host.base.training
        self._live_ids = set(map(id, (*host.base.modules(), *host.base.parameters())))
        #: the tensors of the wrapper at hand that may be larger than their rank, by the ids of their parameters
        self._padded: dict[int, SlotTensor] = {}
        #: in a mixed model, layers of several methods are around one another
        self._is_mixed = isinstance(host.tuner, MixedModel)
        #: removals come last, when it is known which tables the remaining wrappers share
        self._removals: list[Callable[[], None]] = []
        self._shared: set[int] = set()

    # ---- the walk

    def roots(self, live_root: torch.nn.Module, live_base: torch.nn.Module) -> None:
        donor_model = self.donor.model
        if type(live_root).__name__.startswith("PeftModel") and hasattr(live_root, "base_model"):
            self._wrapper(live_root, donor_model, "", skip=("base_model",))
        tuner = donor_model.base_model
        live_tuner = getattr(live_root, "base_model", live_root) if live_root is not live_base else None
        if tuner is not self.donor.stand_in.model and isinstance(live_tuner, type(tuner)):
            self._wrapper(live_tuner, tuner, "", skip=("model",))
        self._base(live_base, self.donor.stand_in.model, "")
        self._shared = set(map(id, self._counterparts.values()))
        for remove in self._removals:
            remove()
        for wrapper in self._added:
            self._adopt_state(wrapper)
        if self.graft.parameters and not any(parameter.requires_grad for parameter in self.graft.parameters):
            self._freeze()  # PEFT leaves an adapter frozen while another one is active

    def _base(self, live: torch.nn.Module, donor: torch.nn.Module, path: str) -> None:
        """Two modules of the base model."""
        live = unwrap_compiled(live)
        if (id(live), id(donor)) in self._seen:
            return
        self._seen.add((id(live), id(donor)))
        if self.donor.stand_in.live_modules.get(id(donor)) is not live:
            # of the same class and with the same weights, it may be another layer
            self._obstacle(path, "another module of the base model there than in a fresh load")
            return
        for name, donor_child in donor._modules.items():
            live_child = live._modules.get(name)
            if donor_child is None and live_child is None:
                continue
            where = f"{path}.{name}" if path else name
            if donor_child is None or live_child is None:
                self._obstacle(where, "a module that only one of the two models has")
                continue
            self._place(live, name, live_child, donor_child, where)
        for name in live._modules.keys() - donor._modules.keys():
            self._obstacle(f"{path}.{name}" if path else name, "a module that only the live model has")

    def _place(self, parent: torch.nn.Module, name: str, live: torch.nn.Module, donor: torch.nn.Module, path: str):
        """One place in the base model, with whatever wrappers are around the module there."""
        live_wrappers, live_core = peel(live)
        donor_wrappers, donor_core = peel(donor)
        unmatched, ours = list(live_wrappers), []
        for wrapper in donor_wrappers:
            match = next((each for each in unmatched if are_alike(each, wrapper)), None)
            if match is not None:
                unmatched.remove(match)
                self._count(match, wrapper, path)
            ours.append(match)
        staying = [each for each in unmatched if not self._goes(each)]
        if staying and None in ours and not (self._is_mixed and isinstance(staying[0], BaseTunerLayer)):
            new = donor_wrappers[ours.index(None)]
            self._obstacle(path, f"{_kind(staying[0])} that stays there, where {_kind(new)} would have to be put")
        else:
            added = [wrapper if match is None else None for wrapper, match in zip(donor_wrappers, ours, strict=True)]
            chain = [each for each in live_wrappers if each in staying or each in ours]
            if None in ours or [each for each in chain if each in ours] != ours:
                wanted = [match or new for match, new in zip(ours, added, strict=True)]
                # PEFT puts what is loaded later around what is there
                chain = wanted + staying if self._is_mixed else staying + wanted
            for wrapper in filter(None, added):
                self._add(wrapper, path)
            self._link(parent, name, chain, live, live_core, path)
        for wrapper in unmatched:
            self._removals.append(lambda wrapper=wrapper: self._remove(wrapper, path))
        self._base(live_core, donor_core, path)

    def _link(self, parent, name: str, chain: list, live: torch.nn.Module, core: torch.nn.Module, path: str) -> None:
        """Puts the wrappers around one another, and the outermost into the model, where they aren't already."""
        if chain == peel(live)[0]:
            return
        if len(chain) < len(peel(live)[0]):
            self.graft.unwrapped.append(path)
        for table, key, module in zip(
            [parent._modules, *(holder_of_inside(each)[0]._modules for each in chain)],
            [name, *(holder_of_inside(each)[1] for each in chain)],
            [*chain, core],
            strict=True,
        ):
            if table is not parent._modules and self._is_new(table):
                table[key] = module  # not in the model yet
            elif table.get(key) is not module:
                self._set(table, key, module, f"{path}: wrapped otherwise")

    def _is_new(self, table: dict) -> bool:
        return any(holder_of_inside(each)[0]._modules is table for each in self._added)

    def _goes(self, wrapper: torch.nn.Module) -> bool:
        """Whether nothing is on a live wrapper once this adapter is off it."""
        if not has_adapter(wrapper, self.name) or (is_off(wrapper, self.name) and not self._names_bases):
            return False
        if any(has_adapter(wrapper, other) for other in self._adapter_names - {self.name}):
            return False
        return not self._can_be_zeroed(wrapper)

    def _count(self, live: torch.nn.Module, donor: torch.nn.Module, path: str) -> None:
        rank_before, existed = rank_of(live, self.name), has_adapter(live, self.name)
        self._change = Extent.NONE
        self._wrapper(live, donor, path)
        if not has_adapter(donor, self.name) and not existed:
            return
        change = self._change if existed else Extent.ADDED
        self.graft.changes.append(
            WrapperChange(path, live, change, rank_before, rank_of(donor, self.name), scaling_of(donor, self.name))
        )

    # ---- wrappers

    def _wrapper(self, live: torch.nn.Module, donor: torch.nn.Module, path: str, skip: tuple[str, ...] = ()) -> None:
        """Two modules that PEFT put there, alike."""
        if (id(live), id(donor)) in self._seen:
            return
        self._seen.add((id(live), id(donor)))
        self._counterparts[id(donor)] = live
        self._training = live.training
        self._padded = (
            {id(target.parameter): target for target in method_of(live).tensors_of(live, self.name)}
            if isinstance(live, BaseTunerLayer) and is_padded(live, self.name)
            else {}
        )
        holder, inner = holder_of_inside(donor)
        skip = (*skip, *((inner,) if holder is donor and isinstance(donor, WRAPPERS) else ()))
        for attribute, value in donor.__dict__.items():
            if attribute not in NOT_COMPARED and attribute not in skip:
                self._attribute(live, attribute, value, path)
        for attribute, value in donor._modules.items():
            if attribute in skip or value is None:
                continue
            present = live._modules.get(attribute)
            if is_table(value) and (present is None or is_table(present)):
                self._table(live, attribute, present, value, path)
            elif isinstance(value, WRAPPERS) and isinstance(present, WRAPPERS):
                self._wrapper(present, value, path)
            elif id(value) not in self._counterparts:
                self._owned(live._modules, attribute, present, value, f"{path}.{attribute}")
        self._leftovers(live, donor, path)
        for table in ("_parameters", "_buffers"):
            for key, value in donor.__dict__[table].items():
                if value is not None and id(value) not in self._counterparts:
                    self._value(live.__dict__[table], key, live.__dict__[table].get(key, MISSING), value, path)
        self._persistence(live, donor)
        if isinstance(live, AuxiliaryTrainingWrapper) and (self.name in live._adapters) != (
            self.name in donor._adapters
        ):
            self._set_presence(live, self.name in donor._adapters, path)
        if is_marked_off(live, self.name) and has_adapter(donor, self.name):
            self.graft.silent_steps.append(lambda journal: set_off(live, self.name, False, journal))

    def _leftovers(self, live: torch.nn.Module, donor: torch.nn.Module, path: str) -> None:
        """Tables that only the live wrapper has: variants of LoRA bring their own."""
        for attribute in live.__dict__.keys() - donor.__dict__.keys():
            table = live.__dict__[attribute]
            if isinstance(table, MutableMapping) and attribute not in NOT_COMPARED and self.name in table:
                self._delete(table, self.name, f"{path}: {attribute}")
        for attribute in live._modules.keys() - donor._modules.keys():
            table = live._modules[attribute]
            if is_table(table) and self.name in (entries := entries_of(table)):
                self._delete(entries, self.name, f"{path}: {attribute}")
                if (keys := keys_of(table)) is not None:
                    self._delete(keys, self.name, f"{path}: {attribute}")

    def _attribute(self, live: torch.nn.Module, attribute: str, value: object, path: str) -> None:
        present = live.__dict__.get(attribute, MISSING)
        if attribute in ("scaling", "r", "lora_alpha", "use_rslora") and present is MISSING:
            present = getattr(live, attribute, MISSING)
        if isinstance(value, dict):
            table = present
            if present is MISSING:
                self._set(live.__dict__, attribute, self._translated(value), f"{path}: {attribute}")
            elif self.name in value or self.name in table:
                self._entry(table, value, f"{path}: {attribute}")
        elif isinstance(value, (bool, int, float, str, torch.dtype, torch.device, tuple, set, frozenset, type(None))):
            if present is not MISSING and present == value:
                return
            if present is not MISSING and self._is_shared(live):
                self._obstacle(path, f"{attribute}={present!r}, which other adapters there go by, and {value!r} wanted")
            else:
                self._set(live.__dict__, attribute, value, f"{path}: {attribute}")
        elif present is MISSING or attribute in OBJECTS_OF_ADAPTERS:
            self._set(live.__dict__, attribute, self._translated(value), f"{path}: {attribute}")
        elif not are_equal(present, value) and id(value) not in self._counterparts:
            self._obstacle(path, f"another {attribute} ({type(value).__name__}) than a fresh load has")

    def _is_shared(self, live: torch.nn.Module) -> bool:
        """Whether other adapters are there, too, and go by the same attributes."""
        others = self._adapter_names - {self.name}
        return bool(others) and (not isinstance(live, WRAPPERS) or any(has_adapter(live, other) for other in others))

    def _table(self, live: torch.nn.Module, attribute: str, present: object, value: torch.nn.Module, path: str):
        if present is None:
            self._set(live._modules, attribute, value, f"{path}: {attribute}")
            return
        if (id(present), id(value)) in self._seen:
            return
        self._seen.add((id(present), id(value)))
        self._counterparts[id(value)] = present
        live_entries, entries, where = entries_of(present), entries_of(value), f"{path}: {attribute}"
        if self.name in entries or self.name in live_entries:
            self._entry(live_entries, entries, where, keys_of(present))
        elif not self._adapter_names & live_entries.keys():
            self._shared_table(live_entries, entries, where, keys_of(present))
        self._persistence(present, value)

    def _persistence(self, live: torch.nn.Module, donor: torch.nn.Module) -> None:
        """Which of the donor's buffers are left out of state dicts, and so of what is saved."""
        before = live._non_persistent_buffers_set
        after = (before - donor._buffers.keys()) | (donor._non_persistent_buffers_set & donor._buffers.keys())
        if after != before:
            self.graft.silent_steps.append(
                lambda journal: journal.set_attribute(live, "_non_persistent_buffers_set", after)
            )

    def _shared_table(self, live: MutableMapping, donor: MutableMapping, path: str, keys: dict | None) -> None:
        """A table that all adapters of a model share, such as indices by kind of layer."""
        if self._adapter_names <= {self.name}:
            for key in donor:
                self._value(live, key, live.get(key, MISSING), donor[key], path)
                if keys is not None and key not in keys:
                    self._set(keys, key, None, path)
            for key in live.keys() - donor.keys():
                self._delete(live, key, path)
        elif any(not are_equal(live.get(key, MISSING), donor[key]) for key in donor):
            self._obstacle(path, "something that it shares with the model's other adapters, and needs to be different")

    def _entry(self, live: MutableMapping, donor: MutableMapping, path: str, keys: dict | None = None) -> None:
        """What two tables have under the adapter's name."""
        if self.name in donor:
            self._value(live, self.name, live.get(self.name, MISSING), donor[self.name], path)
            if keys is not None and self.name not in keys:
                self._set(keys, self.name, None, path)
        elif self.name in live:
            self._delete(live, self.name, path)
            if keys is not None:
                self._delete(keys, self.name, path)

    # ---- values

    def _value(self, table: MutableMapping, key: str, live: object, donor: object, path: str) -> None:
        if isinstance(donor, torch.nn.Module):
            self._owned(table, key, live, donor, path)
        elif isinstance(donor, torch.Tensor):
            self._tensor(table, key, live, donor, path)
        elif isinstance(live, torch.Tensor) and live.ndim == 0 and isinstance(donor, (int, float)):
            if float(live) != donor:
                self.graft.copies.append((live, torch.tensor(float(donor))))
                self._note(Extent.VALUES)
        elif not are_equal(live, donor := self._translated(donor)):
            if path.rpartition(" ")[2] in BOOKKEEPING:
                self.graft.silent_steps.append(lambda journal: journal.set_item(table, key, donor))
                self.graft.differences.append(path)
                self._note(Extent.VALUES)
            else:
                self._set(table, key, donor, path)

    def _owned(self, table: MutableMapping, key: str, live: object, donor: torch.nn.Module, path: str) -> None:
        """Modules that are the adapter's own through and through."""
        if (known := self._counterparts.get(id(donor))) is not None:
            if known is not live:
                self._set(table, key, known, path)
            return
        if isinstance(live, EvalFreeDropout):
            if live.p != (p := getattr(donor, "p", 0.0)):
                self.graft.silent_steps.append(lambda journal: journal.set_attribute(live, "p", p))
            return
        if not isinstance(live, torch.nn.Module) or not have_same_form(live, donor) or id(live) in self._taken:
            self._counterparts[id(donor)] = donor
            self._set(table, key, donor, path)
            return
        self._pair(live, donor)
        for name, value in donor.__dict__.items():
            if name in NOT_COMPARED:
                continue
            if isinstance(value, (bool, int, float, str, type(None), tuple)):
                is_size = any(each.owner is live and each.size_attribute == name for each in self._padded.values())
                if getattr(live, name, MISSING) != value and not is_size:
                    self._step(
                        lambda journal, name=name, value=value: journal.set_attribute(live, name, value),
                        f"{path}.{name}",
                    )
            elif name == "_dora_cache":
                self.graft.caches.append(live._dora_cache)
                self.graft.silent_steps.append(lambda journal: journal.clear(live._dora_cache))
        for name, value in donor._parameters.items():
            if value is not None:
                self._tensor(live._parameters, name, live._parameters[name], value, path)
        for name, value in donor._buffers.items():
            if value is not None:
                self._tensor(live._buffers, name, live._buffers[name], value, path)
        for name, value in donor._modules.items():
            if value is not None:
                self._owned(live._modules, name, live._modules[name], value, f"{path}.{name}")

    def _tensor(self, table: MutableMapping, key: str, live: object, donor: torch.Tensor, path: str) -> None:
        if (known := self._counterparts.get(id(donor))) is not None:
            if known is not live:
                self._set(table, key, known, path)
            return
        same_kind = isinstance(live, torch.Tensor) and type(live) is type(donor)
        if not same_kind or id(live) in self._taken:
            self._counterparts[id(donor)] = donor
            self._set(table, key, donor, path)
            return
        if live.device.type == "meta":
            self._obstacle(path, "a tensor without data (on the meta device)")
            return
        self._pair(live, donor)
        self.graft.in_place[id(donor)] = table, key, live
        if isinstance(live, torch.nn.Parameter):
            self.graft.parameters.append(live)
        values = donor.detach()
        if live.shape == donor.shape:
            if not have_same_bits(live, values):
                self.graft.copies.append((live, values))
                self._note(Extent.VALUES)
        elif (target := self._padded.get(id(live))) is not None and target.fits(values.shape):
            self._pad(target, values, path)
        elif isinstance(live, torch.nn.Parameter):
            self.graft.resizes.append((live, values))
            self.graft.differences.append(f"{path} has shape {tuple(live.shape)}, fresh {tuple(donor.shape)}")
            self._note(Extent.SHAPES)
        else:
            self._set(table, key, donor, path)

    def _pad(self, target: SlotTensor, values: torch.Tensor, path: str) -> None:
        """Writes a tensor of a lower rank into one that was prepared for higher ranks."""
        rank, parameter = target.rank_of(values.shape), target.parameter.detach()
        if rank > target.capacity:
            self.graft.obstacles.append(
                Refusal(
                    "The adapter's rank is higher than the model was prepared for.",
                    found=f"rank {rank} at {path}",
                    expected=f"rank {target.capacity} at most",
                    next_step=f"before compiling, prepare the model with target_rank={rank}",
                )
            )
            return
        padding = target.padding(parameter, rank)
        self.graft.copies += [
            (target.own(parameter, rank), target.split(values)),
            (padding, values.new_zeros(()).expand(padding.shape)),
        ]
        self._note(Extent.VALUES)

    def _pair(self, live: object, donor: object) -> None:
        """Notes that the live part becomes what the donor's is. Some methods share parts between layers."""
        self._counterparts[id(donor)] = live
        self._taken.add(id(live))

    # ---- wrappers that come and go

    def _add(self, wrapper: torch.nn.Module, path: str) -> None:
        """Takes over one of the donor's wrappers."""
        holder, inner = holder_of_inside(wrapper)
        for module in dict.fromkeys((wrapper, holder)):
            # what the adapters of a model share
            for table in (module.__dict__, module._modules):
                for attribute, value in list(table.items()):
                    if attribute != inner and (known := self._counterparts.get(id(value))) is not None:
                        table[attribute] = known
        self._counterparts[id(wrapper)] = wrapper
        self._added.append(wrapper)
        self._placed.append(wrapper)
        if isinstance(wrapper, FOR_ALL_OR_NONE) and (others := self._adapter_names - {self.name}):
            self._stranded(path, min(others))
        if not isinstance(wrapper, AuxiliaryTrainingWrapper):  # those are asked for by name, in the config
            self.graft.added.append(path)
        self.graft.changes.append(
            WrapperChange(
                path, wrapper, Extent.ADDED, None, rank_of(wrapper, self.name), scaling_of(wrapper, self.name)
            )
        )

    def _remove(self, wrapper: torch.nn.Module, path: str) -> None:
        """Takes the adapter off a live wrapper."""
        if not has_adapter(wrapper, self.name) or (is_off(wrapper, self.name) and not self._names_bases):
            return
        self.graft.changes.append(WrapperChange(path, wrapper, Extent.REMOVED, rank_of(wrapper, self.name), None, None))
        if isinstance(wrapper, FOR_ALL_OR_NONE) and any(
            has_adapter(wrapper, other) for other in self._adapter_names - {self.name}
        ):
            self._stranded(path, self.name)
        if self._can_be_zeroed(wrapper):
            for target in method_of(wrapper).tensors_of(wrapper, self.name):
                if target.off is not None and (others := set(wrapper.merged_adapters) - {self.name}):
                    self.graft.obstacles.append(merged_beside(self.name, sorted(others)))
                    return
                self.graft.parameters.append(target.parameter)
                self.graft.copies.append((target.parameter, target.off_value()))
            self.graft.silent_steps.append(lambda journal: set_off(wrapper, self.name, True, journal))
            return
        for module in dict.fromkeys((wrapper, holder_of_inside(wrapper)[0])):
            for attribute, value in module.__dict__.items():
                if isinstance(value, MutableMapping) and attribute not in NOT_COMPARED and self.name in value:
                    self._delete(value, self.name, f"{path}: {attribute}")
            for attribute, value in module._modules.items():
                if value is None or not is_table(value) or id(value) in self._shared:
                    continue
                if self.name in (entries := entries_of(value)):
                    self._delete(entries, self.name, f"{path}: {attribute}")
                    if (keys := keys_of(value)) is not None:
                        self._delete(keys, self.name, f"{path}: {attribute}")
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            self._set_presence(wrapper, False, path)

    def _adopt_state(self, wrapper: torch.nn.Module) -> None:
        """Gives a wrapper that is about to be added the state of those that are there: active, enabled, training."""
        training = core_of(wrapper).training
        for module in own_modules(wrapper):
            module.training = training
        for module in dict.fromkeys((wrapper, holder_of_inside(wrapper)[0])):
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                # of these, only one adapter can be active, and only one that is there
                module._active_adapter = self.name if self.name in self._active else []
                module._disable_adapters = self._disabled
            elif isinstance(module, BaseTunerLayer):
                module._active_adapter = list(self._active)
                module._disable_adapters = self._disabled

    def _freeze(self) -> None:
        for placed in self._placed:
            modules = own_modules(placed) if isinstance(placed, torch.nn.Module) else ()
            tensors = [placed] if isinstance(placed, torch.nn.Parameter) else []
            for tensor in (*tensors, *(each for module in modules for each in direct_tensors(module))):
                if isinstance(tensor, torch.nn.Parameter) and id(tensor) not in self._live_ids:
                    tensor.requires_grad_(False)

    def _set_presence(self, wrapper: AuxiliaryTrainingWrapper, present: bool, path: str) -> None:
        """Notes on a live wrapper that the adapter is there, or isn't, and with that whether it is active."""
        adapters = wrapper._adapters - {self.name} | ({self.name} if present else set())
        self._step(lambda journal: journal.set_attribute(wrapper, "_adapters", adapters), f"{path}: _adapters")
        if self.name in self._active:
            for module in dict.fromkeys((wrapper, holder_of_inside(wrapper)[0])):
                self._step(
                    lambda journal, module=module: journal.set_attribute(
                        module, "_active_adapter", self.name if present else []
                    ),
                    f"{path}: active adapter",
                )

    def _can_be_zeroed(self, wrapper: torch.nn.Module) -> bool:
        """Whether the adapter can stay on the layer, turned off: then its memory is there for the next one."""
        if isinstance(wrapper, BaseTunerLayer) and is_padded(wrapper, self.name):
            return True
        if not isinstance(wrapper, LoraLayer) or (method := method_of(wrapper)) is general:
            return False
        if is_embedding(self._base_model, wrapper) or self._names_bases:
            return False  # PEFT saves the weights of embeddings that are wrapped
        return method.unsupported_layer(wrapper, self.name, method.tensors_of(wrapper, self.name)) is None

    # ---- what was found

    def _set(self, table: MutableMapping, key: str, value: object, path: str) -> None:
        if isinstance(value, torch.nn.Module) and id(value) not in self._live_ids:
            for module in own_modules(value):
                module.training = self._training
        if isinstance(value, (torch.nn.Module, torch.Tensor)):
            self._placed.append(value)
        self._step(lambda journal: journal.set_item(table, key, value), path)

    def _delete(self, table: MutableMapping, key: str, path: str) -> None:
        self._step(lambda journal: journal.delete_item(table, key), path)

    def _step(self, step: Step, difference: str) -> None:
        self.graft.steps.append(step)
        self.graft.differences.append(difference)
        self._note(Extent.VALUES)

    def _note(self, change: Extent) -> None:
        self._change = max(self._change, change)

    def _obstacle(self, path: str, found: str) -> None:
        self.graft.obstacles.append(
            Refusal(
                f"The adapter can't be swapped in place at {path}.",
                found=found,
                expected="the same modules in the live model as in a fresh load",
                next_step="load the adapter with PeftModel.from_pretrained on a fresh base model",
            )
        )

    def _stranded(self, path: str, name: str) -> None:
        found = f"a layer that fails where the active adapter is not on it, as {name!r} would not be after the swap"
        self._obstacle(path, found)

    def _translated(self, value: object) -> object:
        """``value`` with the stand-in's modules and tensors replaced by those of the live model."""
        if isinstance(value, (torch.nn.Module, torch.Tensor)):
            return self._counterparts.get(id(value), value)
        if isinstance(value, (list, tuple)) and any(
            isinstance(each, (torch.nn.Module, torch.Tensor)) for each in value
        ):
            return type(value)(map(self._translated, value))
        return value

    def check_leaks(self) -> None:
        """Nothing of the stand-in may get into the live model, where it would go on living beside its original."""
        strangers = self.donor.stand_in.live_modules.keys() | self.donor.stand_in.live_tensors.keys()
        shared = {id(parameter) for parameter, _ in self.donor.stand_in.shared}
        for placed in self._placed:
            parts = [placed]
            if isinstance(placed, torch.nn.Module):
                parts = [*own_modules(placed)]
                parts += [tensor for module in parts for tensor in direct_tensors(module)]
            if any(id(part) in strangers - shared and not self._is_live(part) for part in parts):
                self._obstacle(type(placed).__name__, "a part of the adapter that holds on to parts of the base model")

    def _is_live(self, part: object) -> bool:
        return self.donor.stand_in.live_tensors.get(id(part)) is part


def _kind(wrapper: torch.nn.Module) -> str:
    """What a wrapper is called in messages: the method of PEFT and its class, as in ``a lora Embedding``."""
    kind = getattr(type(wrapper), "hotswap_original", type(wrapper))
    package = kind.__module__.split(".")
    return f"a {package[2]} {kind.__name__}" if "tuners" in package else f"a {kind.__name__}"


def activity_of(host: Host) -> tuple[list[str], bool]:
    """Which adapters a model computes with, and whether they are disabled."""
    for path, module in wrappers_in(host.base):
        # the layer inside of a wrapper for trained tokens is active only where its own adapter is
        if isinstance(module, BaseTunerLayer) and not path.endswith(".token_adapter"):
            return list(getattr(host.tuner, "active_adapters", module.active_adapters)), module.disable_adapters
    active = getattr(host.carrier, "active_adapters", list(host.configs))
    return list(active) if isinstance(active, list) else list(host.configs), False
