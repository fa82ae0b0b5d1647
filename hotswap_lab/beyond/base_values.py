"""Base weights that an adapter's file overwrites (``bias="all"``, saved embeddings), and restoring the originals.

Such weights belong to the base model, so the next adapter needs the originals back. A swap keeps the originals of the
weights that it overwrites. The originals of weights that PEFT overwrote when it loaded an adapter are lost, so the
caller must pass them. A file may have any base weight, and nothing in the model says which ones PEFT has loaded, so all
weights that the caller passes are compared with the model's, until a swap has had the chance to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from ..core.adapter import Adapter
from ..core.errors import listing
from ..core.host import Host, canonical_path, modules_in
from ..core.journal import Journal
from ..core.lora import NOTED
from ..core.plan import Action, Plan
from ..core.planner import only_for
from ..core.slot import Slot, has_been_swapped
from ..core.tensors import have_same_values
from ..core.wrappers import EMBEDDINGS, has_adapter, peel

#: attribute of a base model: for each adapter, the originals of the weights that it overwrote, by weight name
ORIGINALS = "hotswap_base_values"
#: attribute of a config that a swap put into a model: the names of base weights whose originals are lost. A config that
#: PEFT put there lacks it: the adapter's file may have overwritten any weight that the config names
LOST = NOTED
#: among the names of weights whose originals are lost: any weight, since nothing has compared the base with its own
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
    ``ANY`` is among them until the caller has passed all base weights once.
    """
    config = host.configs[adapter_name]
    if (lost := config.__dict__.get(LOST)) is None or not has_been_swapped(host.base, adapter_name):
        lost = frozenset((ANY, *overwritten_by_config(host, config), *_embeddings(host, adapter_name)))
    return lost - kept_originals(host.base, adapter_name).keys()


def follow_config(slot: Slot, config: PeftConfig, journal: Journal) -> None:
    """Mark a config that is about to be put into the model: this swap leaves the base weights as they are."""
    config.__dict__[LOST] = lost_originals(slot.host, slot.adapter_name)


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


def copies_for(base: torch.nn.Module, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Copies of the base weights that are also in an adapter's file, by name: the originals, if PEFT loads it next."""
    found = {}
    for key in map(canonical_path, adapter.tensors):
        if (weight := base_weight(base, key)) is not None:
            found[key.replace(".base_layer.", ".")] = weight.detach().clone()
    return found


def base_tensors(base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights and buffers of a base model by their names, without those of PEFT's wrappers."""
    tensors, paths = {}, [("", peel(base)[1])]
    while paths:
        path, module = paths.pop()
        own = (*module._parameters.items(), *module._buffers.items())
        tensors |= {f"{path}{name}": tensor for name, tensor in own if tensor is not None}
        children = ((name, child) for name, child in module._modules.items() if child is not None)
        paths += [(f"{path}{name}.", peel(child)[1]) for name, child in children]
    return tensors


def change_base_values(plan: Plan, new: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> BaseChange:
    """Decide which base weights to write.

    Parameters
    ----------
    new:
        The base weights in the new adapter's file, by name.
    live:
        The base weights of the live model, by the same names.
    """
    host, adapter_name, given = plan.slot.host, plan.slot.adapter_name, plan.base_weights or {}
    # tied weights have several names, of which the first is used for all
    ids = {id(tensor): name for name, tensor in reversed(live.items())}
    first = {name: ids[id(tensor)] for name, tensor in live.items()}
    given, new, kept = (
        {first[name]: value for name, value in values.items() if name in first}
        for values in (given, new, kept_originals(host.base, adapter_name))
    )
    lost = lost_originals(host, adapter_name)
    unknown = {first[name] for name in lost & live.keys()} - kept.keys()
    # once nothing is lost any more, a state dict is not even looked at
    compared = {name for name in given.keys() - kept.keys() if ANY in lost and _is_comparable(live[name])}
    for name in sorted(compared | (unknown & given.keys())):
        value, shape = given[name], live[name].shape
        if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == shape):
            kind = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value)
        elif _is_comparable(live[name]) and value.data_ptr() == live[name].data_ptr() and value.numel():
            kind = "the live model's own memory, which PEFT may have overwritten"
        else:
            continue
        plan.refuse("given_base_weights", name=name, kind=kind, shape=tuple(shape))
        return BaseChange()
    if ANY in lost and plan.base_weights and not given:
        plan.refuse("given_base_weights", name=next(iter(plan.base_weights)), kind="no such weight", shape="as it has")
        return BaseChange()
    kept |= {name: given[name] for name in compared if not have_same_values(live[name], given[name])}
    kept |= {name: given[name] for name in unknown & given.keys()}
    unknown -= given.keys()
    are_all = given.keys() >= {first[name] for name, each in live.items() if isinstance(each, torch.nn.Parameter)}
    change = BaseChange(lost=frozenset(unknown) | (set() if are_all else lost & {ANY}))
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


def _is_comparable(weight: torch.Tensor) -> bool:
    """Whether a base weight has values that can be compared: not integers, quantized, or kept elsewhere."""
    return weight.is_floating_point() and type(weight.data) is torch.Tensor and not weight.is_meta


def embeddings_of(base: torch.nn.Module) -> list[torch.nn.Module]:
    """The input and output embeddings of a transformers model."""
    found = []
    for name in EMBEDDINGS:
        # not every model has these
        with contextlib.suppress(NotImplementedError, AttributeError, TypeError):
            found.append(getattr(base, name)())
    return found


def _embeddings(host: Host, adapter_name: str) -> Iterator[str]:
    """Names of the weights of embeddings that have the adapter, since PEFT saves those; none if it trains tokens."""
    config = host.configs[adapter_name]
    if config.peft_type == PeftType.TRAINABLE_TOKENS or getattr(config, "trainable_token_indices", None) is not None:
        return
    tuned = [each for each in embeddings_of(host.base) if isinstance(each, BaseTunerLayer)]
    ones = [each for each in tuned if has_adapter(each, adapter_name)]
    yield from (f"{path}.weight" for path, module in modules_in(host.base) if module in ones) if ones else ()


@only_for(lambda slot, _: not {layer.module for layer in slot.layers}.isdisjoint(embeddings_of(slot.host.base)))
def check_embeddings(plan: Plan) -> None:
    """Refuse to turn embeddings off where the adapter's file may have replaced their base weights, which PEFT saves."""
    embeddings = embeddings_of(plan.slot.host.base)
    off = [each for each in plan.layers if each.action is Action.OFF and each.rank_before is not None]
    names = {f"{each.path}.weight" for each in off if each.layer.module in embeddings}
    if lost := sorted(names & lost_originals(plan.slot.host, plan.slot.adapter_name) if names else ()):
        plan.refuse("embeddings_lost", lost=listing(lost, 3))
