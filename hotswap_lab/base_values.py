"""Base weights that an adapter's file overwrites (``bias="all"``, saved embeddings), and their way back.

Such weights lie in the base model itself, so another adapter needs the originals back. They are kept from the moment
that a swap overwrites them. What PEFT overwrote when it loaded the first adapter is gone, though: then the caller must
bring the originals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from .errors import Refusal, listing
from .host import Host, canonical_path
from .journal import Journal

#: on a base model: by adapter name, the original values of what that adapter overwrote, by their names
ORIGINALS = "hotswap_base_values"


@dataclass
class BaseChange:
    """What becomes of the base model's own weights in a swap."""

    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    #: to be kept from now on; values of the live model are copied when the swap is carried out
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    def keep(self, base: torch.nn.Module, adapter_name: str, originals: dict, journal: Journal) -> None:
        """Notes the originals on the base model; none, too: then it is known that nothing is overwritten."""
        journal.set_item(base.__dict__, ORIGINALS, {**base.__dict__.get(ORIGINALS, {}), adapter_name: originals})


def kept_originals(base: torch.nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The original values of base weights that this adapter overwrote in a swap."""
    return base.__dict__.get(ORIGINALS, {}).get(adapter_name, {})


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
    kept = {**kept_originals(host.base, adapter_name)}
    by_peft = adapter_name not in host.base.__dict__.get(ORIGINALS, {})
    unknown = set(overwritten_by_config(host, host.configs[adapter_name]) if by_peft else ()) & live.keys()
    if found := sorted(unknown & given.keys()):
        kept |= {name: given[name] for name in found}
        unknown -= set(found)
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
        if original is not None and not _same(original, value):
            change.originals[name] = original
        if not _same(live[name], value):
            change.copies.append((live[name], value))
    for name in kept.keys() - new.keys():
        if kept[name].shape == live[name].shape and not _same(live[name], kept[name]):
            change.copies.append((live[name], kept[name]))
    if lost := sorted(unknown - new.keys()):
        change.refusals.append(
            Refusal(
                "The adapter in the model has overwritten weights of the base model, and the new one needs them back.",
                found=f"{len(lost)} base weights that PEFT replaced at the first load: {listing(lost, 3)}",
                expected="their original values, or an adapter that replaces all of them, too",
                next_step="pass base_weights={name: tensor}, such as the state_dict of the base model before loading",
            )
        )
    return change


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.detach(), second.detach().to(first.device, first.dtype))
