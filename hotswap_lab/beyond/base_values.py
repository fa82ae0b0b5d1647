"""Base weights that an adapter's file overwrites (``bias="all"``, saved embeddings), and their way back.

Such weights lie in the base model itself, so another adapter needs the originals back. They are kept from the moment
that a swap overwrites them. What PEFT overwrote when it loaded an adapter is gone, though: then the caller must bring
the originals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from ..core.change import ON_CONFIG
from ..core.errors import Refusal, listing
from ..core.host import Host, canonical_path, embeddings_of
from ..core.journal import Journal
from ..core.methods import method_of
from ..core.sameness import have_same_values
from ..core.words import needs_originals

#: on a base model: by adapter name, the original values of what that adapter overwrote, by their names
ORIGINALS = "hotswap_base_values"
#: on a base model: by adapter name, an :class:`Overwritten`
OVERWRITTEN = "hotswap_overwritten"


@dataclass(frozen=True)
class Overwritten:
    """Base weights whose originals nobody has any more.

    Right as long as the config in the model is this one: another one was put there by PEFT, with whatever its adapter's
    file overwrote.
    """

    config: PeftConfig
    lost: frozenset[str]


@dataclass
class BaseChange:
    """What becomes of the base model's own weights in a swap."""

    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    #: to be kept from now on; values of the live model are copied when the swap is carried out
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    #: what is overwritten without an original to keep
    lost: frozenset[str] = frozenset()
    refusals: list[Refusal] = field(default_factory=list)

    def keep(
        self, base: torch.nn.Module, adapter_name: str, originals: dict, config: PeftConfig, journal: Journal
    ) -> None:
        """Notes the originals on the base model, and what has none; ``config`` is put into the model with it."""
        journal.set_item(base.__dict__, ORIGINALS, {**base.__dict__.get(ORIGINALS, {}), adapter_name: originals})
        note_lost(base, adapter_name, config, self.lost, journal)


def kept_originals(base: torch.nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The original values of base weights that this adapter overwrote in a swap."""
    return base.__dict__.get(ORIGINALS, {}).get(adapter_name, {})


def lost_originals(host: Host, adapter_name: str) -> frozenset[str]:
    """Names of base weights that the adapter in the model has overwritten, or may have, and nobody has the originals.

    Embeddings that have adapters are among them: their weights are in most files. They are mostly unchanged there, but
    that can't be seen afterwards.
    """
    base, config = host.base, host.configs[adapter_name]
    known = base.__dict__.get(OVERWRITTEN, {}).get(adapter_name)
    lost = frozenset() if known is None else known.lost
    if known is None or known.config is not config:
        lost = lost.union(overwritten_by_config(host, config), _embeddings(host, adapter_name))
    return lost - kept_originals(base, adapter_name).keys()


def note_lost(
    base: torch.nn.Module, adapter_name: str, config: PeftConfig, lost: frozenset[str], journal: Journal
) -> None:
    """Notes what :func:`lost_originals` is from now on, as long as this config is in the model."""
    known = {**base.__dict__.get(OVERWRITTEN, {}), adapter_name: Overwritten(config, lost)}
    journal.set_item(base.__dict__, OVERWRITTEN, known)


def follow_config(host: Host, adapter_name: str, config: PeftConfig, journal: Journal) -> None:
    """To be called before a config takes the place of the one in the model, if the base weights stay as they are."""
    note_lost(host.base, adapter_name, config, lost_originals(host, adapter_name), journal)


ON_CONFIG.append(follow_config)


def overwritten_by_config(host: Host, config: PeftConfig) -> Iterator[str]:
    """Names of the base weights that PEFT overwrites when it loads an adapter with this config: its biases."""
    bias = getattr(config, "bias", "none")
    if not isinstance(bias, str) or bias == "none":
        return
    for path, module in host.base.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            if getattr(layer, "bias", None) is not None:
                yield f"{canonical_path(path)}.bias"
        elif bias == "all" and getattr(module, "bias", None) is not None and ".base_layer" not in f".{path}":
            yield f"{canonical_path(path)}.bias"


def change_base_values(
    host: Host,
    adapter_name: str,
    new: Mapping[str, torch.Tensor],
    live: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor],
) -> BaseChange:
    """Decides what to write to base weights.

    Parameters
    ----------
    new:
        What the new adapter's file brings, by the names of the base weights.
    live:
        The base weights of the live model by the same names.
    given:
        Original values that the caller brings.
    """
    change = BaseChange()
    if refusal := _check_given(given, live):
        change.refusals.append(refusal)
        return change
    unknown = lost_originals(host, adapter_name) & live.keys()
    kept = {**kept_originals(host.base, adapter_name), **{name: given[name] for name in unknown & given.keys()}}
    unknown -= given.keys()
    change.lost = frozenset(unknown)
    for name, value in new.items():
        if value.shape != live[name].shape:
            change.refusals.append(
                Refusal(
                    "The adapter comes with base weights of another shape than the model has.",
                    found=f"{name} of shape {tuple(value.shape)}",
                    expected=f"shape {tuple(live[name].shape)}",
                    next_step="use an adapter that was made for this base model",
                )
            )
            continue
        original = kept.get(name, None if name in unknown else live[name])
        if original is not None and not have_same_values(original, value):
            change.originals[name] = original
        if not have_same_values(live[name], value):
            change.copies.append((live[name], value))
    change.copies += [
        (live[name], kept[name])
        for name in sorted(kept.keys() - new.keys())
        if not have_same_values(live[name], kept[name])
    ]
    if change.copies and len(host.configs) > 1:
        change.refusals.append(
            Refusal(
                "This swap writes to weights of the base model, which the model's other adapters go by, too.",
                found=f"{len(change.copies)} base weights that would change, with {len(host.configs)} adapters loaded",
                expected="no other adapter in the model",
                next_step="model.delete_adapter(...) the others first, or load this adapter into a model of its own",
            )
        )
    if lost := sorted(unknown - new.keys()):
        change.refusals.append(
            needs_originals(
                found=f"{len(lost)} base weights that PEFT replaced when it loaded the adapter: {listing(lost, 3)}",
                expected="their original values, or an adapter that replaces all of them, too",
                next_step="pass base_weights={name: tensor}, such as the state_dict of the base model before loading",
            )
        )
    return change


def _embeddings(host: Host, adapter_name: str) -> Iterator[str]:
    """Names of the embeddings that have the adapter: PEFT saves their weights, too, unless it trains single tokens."""
    config = host.configs[adapter_name]
    if config.peft_type == PeftType.TRAINABLE_TOKENS or getattr(config, "trainable_token_indices", None) is not None:
        return
    ids = list(map(id, embeddings_of(host.base)))
    for path, module in host.base.named_modules():
        if isinstance(module, BaseTunerLayer) and id(module) in ids:
            if not method_of(module).has_adapter(module, adapter_name):
                continue
            yield f"{canonical_path(path)}.weight"


def _check_given(given: Mapping, live: Mapping[str, torch.Tensor]) -> Refusal | None:
    """Why what the caller brings can't be the base model's own weights, or None. Other names don't matter."""
    for name in given.keys() & live.keys():
        value = given[name]
        fits = isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == live[name].shape
        if not fits:
            kind = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value)
            return Refusal(
                "What was passed as base_weights does not fit the base model.",
                found=f"{name}: {kind}",
                expected=f"a floating point tensor of shape {tuple(live[name].shape)}",
                next_step="pass the state_dict() of the base model, from before an adapter was loaded",
            )
    return None
