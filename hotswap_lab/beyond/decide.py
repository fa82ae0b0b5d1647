"""Decides a swap by a donor: what PEFT makes of the new adapter on a stand-in, compared with the live model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig, PeftType

from ..core.adapter import Adapter
from ..core.change import Change, clear_gradient
from ..core.errors import Refusal, listing
from ..core.journal import Journal
from ..core.slot import Slot
from ..core.words import merged_beside, unexpected_keys
from . import general
from .base_values import BaseChange, change_base_values, kept_originals, lost_originals
from .difference import difference
from .donor import Donor, load_donor
from .graft import Graft
from .places import Places, find_places, forget_places, places_of
from .replication import other_layers
from .wrappers import wrappers_in

if TYPE_CHECKING:
    from ..core.plan import Plan

#: on a base model: by adapter name, the paths of modules that had the adapter before and may have it again
FORMER_LAYERS = "hotswap_former_layers"


def former_layers(base: torch.nn.Module, adapter_name: str) -> frozenset[str]:
    """Where the adapter was before a swap took it away: there it may come back without being asked for."""
    return base.__dict__.get(FORMER_LAYERS, {}).get(adapter_name, frozenset())


def note_former_layers(base: torch.nn.Module, adapter_name: str, paths: Iterable[str], journal: Journal) -> None:
    """Adds to :func:`former_layers`."""
    if paths := former_layers(base, adapter_name).union(paths) - former_layers(base, adapter_name):
        present = base.__dict__.get(FORMER_LAYERS, {})
        paths |= former_layers(base, adapter_name)
        journal.set_item(base.__dict__, FORMER_LAYERS, {**present, adapter_name: paths})


@dataclass
class Grafting:
    """A decided graft, or why there is none."""

    config: PeftConfig
    graft: Graft = field(default_factory=Graft)
    base: BaseChange = field(default_factory=BaseChange)
    refusals: list[Refusal] = field(default_factory=list)
    #: where the tensors of an adapter with the same config would go
    places: Places | None = None
    #: what PEFT said when it could not load the adapter
    cause: Exception | None = None
    #: base weights whose ``requires_grad`` changes, too
    requires_grad: list[tuple[torch.nn.Parameter, bool]] = field(default_factory=list)

    @property
    def writes_values_only(self) -> bool:
        return self.graft.writes_values_only

    @property
    def nbytes(self) -> int:
        """The bytes that are written to the model's tensors."""
        written = [target for target, _ in (*self.graft.copies, *self.base.copies)]
        return sum(each.nbytes for each in (*written, *(source for _, source in self.graft.resizes)))

    def change_for(self, plan: Plan) -> Change:
        """All that is to be written to the live model."""
        slot, graft = plan.slot, self.graft
        stays = self.writes_values_only and slot.room is None and slot.method is not general
        change = Change(slot, plan.config, slot_after=slot if stays else None)
        for target, source in (*graft.copies, *self.base.copies):
            change.copy(target, source)
        for parameter, source in graft.resizes:
            change.resize(parameter, source)
        # copies: what is in the base model now is about to be overwritten
        originals = {name: value.detach().clone() for name, value in self.base.originals.items()}
        change.steps += [
            *(lambda journal, each=each: clear_gradient(each, journal) for each in graft.parameters),
            *graft.steps,
            *graft.silent_steps,
            lambda journal: self._note(slot, plan.config, originals, journal),
        ]
        return change

    def _note(self, slot: Slot, config: PeftConfig, originals: dict[str, torch.Tensor], journal: Journal) -> None:
        """What is to be known when the next adapter comes."""
        host, name = slot.host, slot.adapter_name
        for parameter, value in self.requires_grad:
            clear_gradient(parameter, journal)
            journal.set_attribute(parameter, "requires_grad", value)
        self.base.keep(host.base, name, originals, config, journal)
        if self.places is not None:
            self.places.keep(slot, config, journal)
        else:
            forget_places(slot, journal)
        note_former_layers(host.base, name, self.graft.unwrapped, journal)
        names = getattr(host.tuner, "targeted_module_names", None)
        if self.graft.added and names is not None:
            journal.set_attribute(host.tuner, "targeted_module_names", [*dict.fromkeys([*names, *self.graft.added])])


def decide_graft(
    slot: Slot,
    adapter: Adapter,
    *,
    add_layers: bool,
    base_weights: Mapping[str, torch.Tensor] | None = None,
    default_targets: bool = False,
) -> Grafting:
    """Loads a donor and compares. Writes nothing to the model. Arguments as in :func:`planning.make_plan`."""
    name, host = slot.adapter_name, slot.host
    config = copy.deepcopy(adapter.config)
    config.inference_mode = slot.config.inference_mode
    if default_targets and getattr(config, "target_modules", "") is None:
        config.target_modules = copy.copy(slot.config.target_modules)
    grafting = Grafting(config)
    if refusal := other_layers(slot.config, config):
        grafting.refusals.append(refusal)
        return grafting
    known = places_of(slot)
    if known is not None and not base_weights and not kept_originals(host.base, name) and known.fit(slot, adapter):
        grafting.config = known.completed(config, slot.config.inference_mode)
        grafting.graft = known.graft(adapter)
        grafting.places = known
        grafting.base.lost = lost_originals(host, name)
        return grafting
    if slot.method is general and (others := _merged(host.base) - {name}):
        # most methods start from the base weights: their singular vectors, their clusters, a copy
        grafting.refusals.append(merged_beside(name, sorted(others)))
        return grafting
    try:
        with slot.write_mode():
            donor = load_donor(host, config, adapter.tensors, name, half_precision=_keeps_half_precision(slot))
    except Exception as error:
        grafting.cause = error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        grafting.refusals.append(
            Refusal(
                "PEFT can't load this adapter on the base model.",
                found=f"{type(error).__name__}: {' '.join(lines[:3])}",
                expected="an adapter that was made for this base model",
                next_step="check the adapter with PeftModel.from_pretrained on a fresh base model",
            )
        )
        return grafting
    grafting.config = donor.config
    if refusal := _depends_on_class(slot, donor):
        grafting.refusals.append(refusal)
        return grafting
    grafting.refusals += _incomplete(donor, adapter)
    grafting.graft = difference(host, donor, name)
    grafting.refusals += grafting.graft.obstacles
    former = former_layers(host.base, name)
    if (added := [path for path in grafting.graft.added if path not in former]) and not add_layers:
        grafting.refusals.append(
            Refusal(
                "Hot swapping the adapter did not succeed, it is on layers that the loaded adapter lacks.",
                found=f"{len(added)} layers: {listing(added, 3)}",
                expected=f"layers of the loaded adapter {name!r}",
                next_step="pass add_layers=True to add them, or load first the adapter that targets most layers",
            )
        )
    live = donor.live_values
    grafting.base = change_base_values(host, name, donor.base_values, live, base_weights or {})
    grafting.refusals += grafting.base.refusals
    if not grafting.refusals:
        grafting.places = find_places(slot, adapter, donor, grafting.graft)
    if not config.inference_mode:
        twins = dict(donor.stand_in.model.named_parameters())
        for path in {*grafting.base.originals, *donor.base_values, *(n for n in live if n.endswith("bias"))}:
            if path in twins and live[path].requires_grad != twins[path].requires_grad:
                grafting.requires_grad.append((live[path], twins[path].requires_grad))
    return grafting


def _merged(base: torch.nn.Module) -> set[str]:
    """The names of all adapters that are merged into base weights."""
    return {name for _, wrapper in wrappers_in(base) for name in getattr(wrapper, "merged_adapters", ())}


def _keeps_half_precision(slot: Slot) -> bool:
    """Whether the live adapter has the precision of a half-precision base: ``autocast_adapter_dtype=False``."""
    return any(tensor.parameter.dtype in (torch.float16, torch.bfloat16) for tensor in slot.tensors)


def _depends_on_class(slot: Slot, donor: Donor) -> Refusal | None:
    """Why the live model's class computes something else with this adapter than that of a fresh load, or None."""
    host, config = slot.host, donor.config
    live, fresh = type(host.carrier), type(donor.model)
    by_class = config.is_prompt_learning or config.peft_type == PeftType.POLY
    by_class = by_class or getattr(config, "alora_invocation_tokens", None)
    if host.is_peft_model and by_class and live is not fresh:
        return Refusal(
            "The adapter is for another task than the model was loaded for.",
            found=f"a {live.__name__}",
            expected=f"a {fresh.__name__}, as task_type={config.task_type!r} asks for: it prepares the inputs",
            next_step="load this adapter with PeftModel.from_pretrained on a fresh base model",
        )
    if config.peft_type == PeftType.ADAPTION_PROMPT:
        tuner = host.carrier.base_model
        if len(host.configs) > 1 or not getattr(tuner, "_enabled", True):
            return Refusal(
                "An adaption prompt can be swapped only while it is in the model.",
                found=f"the adapters {listing(host.configs)}, of which PEFT keeps the inactive ones outside",
                expected="this adapter alone, enabled",
                next_step="enable it, and delete the others",
            )
    return None


def _incomplete(donor: Donor, adapter: Adapter) -> list[Refusal]:
    refusals = []
    if donor.unexpected:
        refusals.append(
            unexpected_keys(
                donor.unexpected,
                found=f"{len(donor.unexpected)} tensors that a fresh load would ignore",
                expected=f"tensors only for what the adapter's config targets, {_targets(adapter.config)}",
                next_step="check that config and weights belong together, and to this base model; or pass key_mapping",
            )
        )
    if donor.missing:
        refusals.append(
            Refusal(
                "The adapter is incomplete.",
                found=f"no values for {listing(donor.missing, 3)}",
                expected="values for every tensor that its config calls for",
                next_step="get a complete copy of the adapter",
            )
        )
    return refusals


def _targets(config: PeftConfig) -> str:
    return f"target_modules={getattr(config, 'target_modules', None)!r}"
