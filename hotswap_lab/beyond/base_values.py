"""Base weights that an adapter's file overwrites (``bias="all"``, saved embeddings), and restoring the originals.

Such weights belong to the base model, so the next adapter needs the originals back. A swap keeps the originals of the
weights that it overwrites. The originals of weights that PEFT overwrote when it loaded an adapter are lost, so the
caller must pass them. A file may have any base weight, and nothing in the model shows which ones PEFT has loaded. So
all weights that the caller passes for the first time are compared with the model's.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from ..core.adapter import LOST_ORIGINALS, Adapter
from ..core.change import Change, clear_gradients, copy_all
from ..core.errors import listing
from ..core.host import Host, canonical_path, modules_in
from ..core.journal import Journal
from ..core.plan import Action, Plan
from ..core.planner import only_for
from ..core.slot import Slot, begin_change, has_been_swapped
from ..core.tensors import have_same_values
from ..core.wrappers import embeddings_of, has_adapter
from .base_twin import base_tensors

#: attribute of a base model: for each adapter, the originals of the weights that it overwrote, by weight name
ORIGINALS = "hotswap_base_values"
#: among the names of weights whose originals are lost: any weight, because the caller has not passed the originals
ANY = "*"


@dataclass
class BaseChange:
    """The writes of a swap to the base model's own weights."""

    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    #: originals to keep from now on; values of the live model are copied when the swap is carried out
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    #: names of weights that are overwritten while their originals are lost
    lost: frozenset[str] = frozenset()


def kept_originals(base: torch.nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The original values of base weights that this adapter overwrote in a swap."""
    return base.__dict__.get(ORIGINALS, {}).get(adapter_name, {})


def lost_originals(host: Host, adapter_name: str) -> frozenset[str]:
    """Names of base weights that the loaded adapter has or may have overwritten, and whose originals are lost.

    They include those of adapted embeddings, which are in most files. Most are unchanged, but that can't be checked.
    ``ANY`` is among them until the caller has passed base weights once.
    """
    config = host.configs[adapter_name]
    names = config.__dict__.get(LOST_ORIGINALS)
    if names is None or not has_been_swapped(host.base, adapter_name):
        names = frozenset((ANY, *overwritten_by_config(host, config), *_embeddings(host, adapter_name)))
    return names - kept_originals(host.base, adapter_name).keys()


def overwritten_by_config(host: Host, config: PeftConfig) -> Iterator[str]:
    """Names of the base weights that PEFT overwrites when it loads an adapter with this config: its biases."""
    bias = getattr(config, "bias", "none")
    if not isinstance(bias, str) or bias == "none":
        return
    for path, module in host.base.named_modules():
        is_adapted = isinstance(module, BaseTunerLayer)
        if is_adapted or (bias == "all" and ".base_layer" not in f".{path}"):
            layer = module.get_base_layer() if is_adapted else module
            if getattr(layer, "bias", None) is not None:
                yield f"{canonical_path(path)}.bias"


def base_weight(base: torch.nn.Module, key: str) -> torch.Tensor | None:
    """The base weight for a key of a file, whether or not its layer has an adapter, here or in the file; or None."""
    path, _, name = key.rpartition(".")
    try:
        module = base.get_submodule(path.removesuffix(".base_layer"))
    except AttributeError:
        return None
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return module._parameters.get(name, module._buffers.get(name))


def base_weights_in(base: torch.nn.Module, adapter: Adapter) -> dict[str, torch.Tensor]:
    """The base weights that are also in an adapter's file, by name, with the values that the model has now."""
    keys = [key for key in adapter.tensors if ".lora_" not in key]
    weights = {_own_name(key): base_weight(base, canonical_path(key)) for key in keys}
    return {name: weight for name, weight in weights.items() if weight is not None}


def _own_name(key: str) -> str:
    """The name of a base weight in the base model, from its name in a file or in a model around it."""
    return canonical_path(key).replace(".base_layer.", ".")


def copies_for(base: torch.nn.Module, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Copies of the weights that this base model loses if PEFT loads this adapter, to pass as ``base_weights``."""
    return {name: weight.detach().clone() for name, weight in base_weights_in(base, adapter).items()}


def change_base_values(plan: Plan, new: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> BaseChange:
    """Decide which base weights to write.

    Parameters
    ----------
    new:
        The base weights in the new adapter's file, by name.
    live:
        The base weights of the live model, by the same names.
    """
    host, adapter_name = plan.slot.host, plan.slot.adapter_name
    # a model with an adapter, or with compiled layers, has longer names for them
    given = {_own_name(key): value for key, value in (plan.base_weights or {}).items()}
    # tied weights have several names, and the first is used for all
    ids = {id(tensor): name for name, tensor in reversed(live.items())}
    first = {name: ids[id(tensor)] for name, tensor in live.items()}
    given, new, kept = (
        {first[name]: value for name, value in values.items() if name in first}
        for values in (given, new, kept_originals(host.base, adapter_name))
    )
    lost = lost_originals(host, adapter_name)
    unknown = {first[name] for name in lost & live.keys()} - kept.keys()
    # if no originals are lost, the state dict is ignored
    compared = {name for name in given.keys() - kept.keys() if ANY in lost and _is_comparable(live[name])}
    for name in sorted(compared | (unknown & given.keys())):
        value, shape, is_tensor = given[name], live[name].shape, isinstance(given[name], torch.Tensor)
        if is_tensor and value.is_floating_point() and value.shape == shape and not value.is_meta:
            # an empty tensor, or one made of others (quantized), has no memory to compare
            if value.data_ptr() != live[name].data_ptr() or not value.data_ptr():
                continue
            kind = "the live model's own memory, which PEFT may have overwritten"
        else:
            kind = f"{value.dtype} of shape {tuple(value.shape)} on {value.device}" if is_tensor else type(value)
        plan.refuse("given_base_weights", name=name, kind=kind, shape=tuple(shape))
        return BaseChange()
    if ANY in lost and plan.base_weights and not given:
        plan.refuse("given_base_weights", name=next(iter(plan.base_weights)), kind="no such weight", shape="as it has")
        return BaseChange()
    kept |= {name: given[name] for name in compared if not have_same_values(live[name], given[name])}
    kept |= {name: given[name] for name in unknown & given.keys()}
    unknown -= given.keys()
    # weights that are not among the given ones count as the base model's own
    change = BaseChange(lost=frozenset(unknown) | (lost & {ANY} if plan.base_weights is None else set()))
    for name, value in {**kept, **new}.items():
        original = kept.get(name, live[name])
        if name in new and name not in unknown and not have_same_values(original, value):
            change.originals[name] = original
        if not have_same_values(live[name], value):
            change.copies.append((live[name], value))
    if change.copies and len(host.configs) > 1:
        plan.refuse("base_values_shared", count=len(change.copies), adapters=len(host.configs))
    if missing := sorted(unknown - new.keys()):
        plan.refuse("base_weights_lost", count=len(missing), lost=listing(missing, 3))
    return change


def change_to_originals(
    slot: Slot, given: Mapping[str, torch.Tensor] | None, if_any: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> Change:
    """The change that gives base weights their original values. It can be rolled back, unlike a completed swap.

    Parameters
    ----------
    given:
        The originals by name; missing weights count as unchanged. None: the originals that swaps have kept.
    if_any:
        More pairs of a target and a source, which are copied only if a base weight has other values than its original.
    """
    host, name = slot.host, slot.adapter_name
    live = base_tensors(host.base)
    plan = Plan(slot, Adapter(slot.config, {}, ""), slot.config, [])
    if given is not None:
        unchanged = lost_originals(host, name) & live.keys() - given.keys()
        plan.base_weights = {**{key: live[key].detach().clone() for key in unchanged}, **given}
    base_change = change_base_values(plan, {}, live)
    plan.raise_if_refused()
    pairs = [*base_change.copies, *if_any] if base_change.copies else []

    def put_back(journal: Journal) -> None:
        previous = [(target, target.detach().clone()) for target, _ in pairs]
        journal.record(torch.no_grad()(lambda: copy_all(previous)))
        copy_all(pairs)
        clear_gradients([target for target, _ in base_change.copies], journal)
        journal.set_item(vars(slot.config), LOST_ORIGINALS, base_change.lost)
        notes = host.base.__dict__
        journal.set_item(notes, ORIGINALS, {**notes.get(ORIGINALS, {}), name: {}})

    change = begin_change(slot)
    change.steps.append(put_back)
    return change


def _is_comparable(weight: torch.Tensor) -> bool:
    """Whether a base weight has values that can be compared: not integers, quantized, or kept elsewhere."""
    return weight.is_floating_point() and type(weight.data) is torch.Tensor and not weight.is_meta


def _embeddings(host: Host, adapter_name: str) -> Iterator[str]:
    """Names of the weights of embeddings with the adapter, which PEFT saves; none if it trains single tokens."""
    config = host.configs[adapter_name]
    if config.peft_type == PeftType.TRAINABLE_TOKENS or getattr(config, "trainable_token_indices", None) is not None:
        return
    tuned = [layer for layer in embeddings_of(host.base) if isinstance(layer, BaseTunerLayer)]
    adapted = [layer for layer in tuned if has_adapter(layer, adapter_name)]
    if adapted:
        yield from (f"{path}.weight" for path, module in modules_in(host.base) if module in adapted)


@only_for(lambda slot, _: not {layer.module for layer in slot.layers}.isdisjoint(embeddings_of(slot.host.base)))
def check_embeddings(plan: Plan) -> None:
    """Refuse to turn embeddings off where the adapter's file may have replaced their base weights, which PEFT saves."""
    embeddings = embeddings_of(plan.slot.host.base)
    off = [layer for layer in plan.layers if layer.action is Action.OFF and layer.rank_before is not None]
    names = {f"{layer.path}.weight" for layer in off if layer.layer.module in embeddings}
    if names and (lost := sorted(names & lost_originals(plan.slot.host, plan.slot.adapter_name))):
        plan.refuse("embeddings_lost", lost=listing(lost, 3))


def _vocabulary(slot: Slot, _: bool) -> str | None:
    """The local config file of a base model with a different vocabulary, or None. Never uses the network."""
    source, config = getattr(slot.config, "base_model_name_or_path", None), getattr(slot.host.base, "config", None)
    with contextlib.suppress(Exception):  # no such file, or one of a different kind of model
        if not os.path.exists(file := os.path.join(source, "config.json")):
            file = try_to_load_from_cache(source, "config.json")
        # PEFT makes the same comparison to decide whether to save embeddings with an adapter
        if isinstance(file, str) and type(config).from_pretrained(file).vocab_size != config.vocab_size:
            return file
    return None


@only_for(_vocabulary)
def note_vocabulary(plan: Plan) -> None:
    """Add a note and a warning if PEFT has probably put embeddings into the model that the new adapter doesn't bring.

    PEFT saves the embeddings with each adapter of a model whose vocabulary was resized, and loads them into the base.
    """
    slot = plan.slot
    if plan.base_weights is not None or ANY not in lost_originals(slot.host, slot.adapter_name):
        return
    embeddings = {id(module.weight) for module in embeddings_of(slot.host.base) if hasattr(module, "weight")}
    if embeddings.isdisjoint(map(id, base_weights_in(slot.host.base, plan.adapter).values())):
        text = (
            f"the model's vocabulary is not the one of {slot.once(_vocabulary, False)}, so the file of the adapter "
            "that PEFT loaded has embeddings, which stay in the model: pass base_weights={name: tensor}, a copy of the "
            "state_dict() of the base model before loading"
        )
        plan.notes.append(text)
        plan.warnings.append(text)
