"""Base weights that an adapter's file overwrites (``bias="all"``, saved embeddings), and their way back.

Such weights lie in the base model itself, so another adapter needs the originals back. They are kept from the moment
that a swap overwrites them. What PEFT overwrote when it loaded an adapter is gone, though: then the caller must bring
the originals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from ..core.errors import listing
from ..core.host import Host, canonical_path, modules_in
from ..core.journal import Journal
from ..core.plan import Action, LayerPlan, Plan
from ..core.slot import Slot
from ..core.tensors import have_same_values
from ..core.wrappers import EMBEDDINGS, has_adapter

#: on a base model: by adapter name, the original values of what that adapter overwrote, by their names
ORIGINALS = "hotswap_base_values"
#: on a config that a swap has put into a model: the base weights whose originals nobody has any more. A config that
#: PEFT has put there has no such mark: its adapter's file may have overwritten whatever it names
LOST = "_hotswap_lost"


@dataclass
class BaseChange:
    """What becomes of the base model's own weights in a swap."""

    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    #: to be kept from now on; values of the live model are copied when the swap is carried out
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    #: what is overwritten without an original to keep
    lost: frozenset[str] = frozenset()


def kept_originals(base: torch.nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The original values of base weights that this adapter overwrote in a swap."""
    return base.__dict__.get(ORIGINALS, {}).get(adapter_name, {})


def lost_originals(host: Host, adapter_name: str) -> frozenset[str]:
    """Names of base weights that the adapter in the model has overwritten, or may have, and nobody has the originals.

    Embeddings that have adapters are among them: their weights are in most files. They are mostly unchanged there, but
    that can't be seen afterwards.
    """
    config = host.configs[adapter_name]
    if (lost := config.__dict__.get(LOST)) is None:
        lost = frozenset((*overwritten_by_config(host, config), *_embeddings(host, adapter_name)))
    return lost - kept_originals(host.base, adapter_name).keys()


def follow_config(slot: Slot, config: PeftConfig, journal: Journal) -> None:
    """Notes on a config, before it is put into the model, that the base weights stay as they are."""
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


def change_base_values(plan: Plan, new: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> BaseChange:
    """Decides what to write to base weights.

    Parameters
    ----------
    new:
        What the new adapter's file brings, by the names of the base weights.
    live:
        The base weights of the live model by the same names.
    """
    host, adapter_name, given = plan.slot.host, plan.slot.adapter_name, plan.base_weights or {}
    # tied weights have several names: the first stands for all
    ids = {id(tensor): name for name, tensor in reversed(live.items())}
    first = {name: ids[id(tensor)] for name, tensor in live.items()}
    given, new, kept = (
        {first[name]: value for name, value in values.items() if name in first}
        for values in (given, new, kept_originals(host.base, adapter_name))
    )
    unknown = {first[name] for name in lost_originals(host, adapter_name) & live.keys()} - kept.keys()
    # a state dict has more in it than is asked for here; what is not read can't be wrong
    for name in sorted(unknown & given.keys()):
        value = given[name]
        if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == live[name].shape):
            kind = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value)
            plan.refuse("given_base_weights", name=name, kind=kind, shape=tuple(live[name].shape))
            return BaseChange()
    kept |= {name: given[name] for name in unknown & given.keys()}
    unknown -= given.keys()
    change = BaseChange(lost=frozenset(unknown))
    for name, value in {**kept, **new}.items():
        original = kept.get(name, live[name])
        if name in new and name not in unknown and not have_same_values(original, value):
            change.originals[name] = original
        if not have_same_values(live[name], value):
            change.copies.append((live[name], value))
    if change.copies and len(host.configs) > 1:
        plan.refuse("base_values_shared", count=len(change.copies), adapters=len(host.configs))
    if lost := sorted(unknown - new.keys()):
        plan.refuse("base_weights_lost", count=len(lost), lost=listing(lost, 3))
    return change


def embeddings_of(base: torch.nn.Module) -> list[torch.nn.Module]:
    """Where a transformers model gets its embeddings from, and puts its logits out."""
    found = []
    for name in EMBEDDINGS:
        # not every model has these
        with contextlib.suppress(NotImplementedError, AttributeError, TypeError):
            found.append(getattr(base, name)())
    return found


def _embeddings(host: Host, adapter_name: str) -> Iterator[str]:
    """Names of the embeddings that have the adapter: PEFT saves their weights, too, unless it trains single tokens."""
    config = host.configs[adapter_name]
    if config.peft_type == PeftType.TRAINABLE_TOKENS or getattr(config, "trainable_token_indices", None) is not None:
        return
    tuned = [each for each in embeddings_of(host.base) if isinstance(each, BaseTunerLayer)]
    ones = [each for each in tuned if has_adapter(each, adapter_name)]
    yield from (f"{path}.weight" for path, module in modules_in(host.base) if module in ones) if ones else ()


def embeddings_turned_off(plan: Plan) -> list[LayerPlan]:
    """What happens to embeddings that are turned off now, and were not before: PEFT saves their weights, too."""
    ids = set(map(id, embeddings_of(plan.slot.host.base)))
    off = [each for each in plan.layers if each.action is Action.OFF and each.rank_before is not None]
    return [each for each in off if id(each.layer.module) in ids]


def given_up(plan: Plan) -> bool:
    """Whether a layer is better given up than turned off: PEFT saves the weights of embeddings that are wrapped, and
    merges no grouped convolution.
    """
    off = [each.layer.tensors[0] for each in plan.layers if each.action is Action.OFF]
    return bool(embeddings_turned_off(plan)) or any(tensor.rank_step > 1 for tensor in off)


def check_embeddings(plan: Plan) -> None:
    """Refuses to turn embeddings off where the adapter's file may have replaced the weights below them."""
    names = {f"{each.path}.weight" for each in embeddings_turned_off(plan)}
    if lost := sorted(names & lost_originals(plan.slot.host, plan.slot.adapter_name) if names else ()):
        plan.refuse("embeddings_lost", lost=listing(lost, 3))
