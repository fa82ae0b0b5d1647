"""Mixes of adapters by weight, computed exactly: their rank components are concatenated."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..core.adapter import ORIGIN
from ..core.errors import refused
from ..core.host import Config
from ..core.loaded import other_base
from ..core.lora import complete, retarget
from ..core.room import Packed, Room, State
from ..core.settings import SETTINGS, LayerSettings
from ..core.slot import Slot
from ..core.tensors import SlotTensor
from .members import Member


@dataclass(frozen=True)
class Mix:
    """Adapters of a pool, each with its weight."""

    shares: tuple[tuple[Member, float], ...]
    #: the weights of their sum, once it is packed
    bands: tuple[torch.Tensor, ...] | None = field(default=None, compare=False, repr=False)

    @property
    def weights(self) -> dict[str, float]:
        return {member.name: weight for member, weight in self.shares}


def mixed(room: Room, mix: Mix, members: Sequence[Packed]) -> Packed:
    """The sum of adapters, each times its weight, as an adapter of its own.

    ``B1 @ A1 * s1 * w1 + B2 @ A2 * s2 * w2`` is ``B @ A`` with ``A1`` above ``A2``, and the factors in ``B``. PEFT's
    ``add_weighted_adapter(combination_type="cat")`` does so, too, but only in the layers of the first adapter's config.
    """
    settings: list[LayerSettings | None] = []
    sources: list[tuple[SlotTensor, torch.Tensor]] = []
    for index, layer in enumerate(room.slot.layers):
        on = [
            (packed, own, weight)
            for packed, (_, weight) in zip(members, mix.shares, strict=True)
            if (own := packed.state.settings[index]) is not None
        ]
        rank = sum(own.rank for _, own, _ in on)
        settings.append(_of_mix(rank) if on else None)
        a, b, *more = layer.tensors
        if more or a.rank_step > 1:
            raise refused("no_mix", names=list(mix.weights), found=f"more than a lora_A and a lora_B at {layer.path}")
        if rank > (capacity := a.capacity or 0):
            ranks = zip(*([own.rank if own else 0 for own in packed.state.settings] for packed in members), strict=True)
            rooms = (each.tensors[0].capacity or 0 for each in room.slot.layers)
            most = max(*map(sum, ranks), *rooms)  # a lower target_rank would be refused for another layer
            raise refused("mix_above_room", names=[*mix.weights], rank=rank, path=layer.path, room=capacity, most=most)
        if on:
            lines = [room.view_in(packed.bands, a, own.rank) for packed, own, _ in on]
            sources.append((a, torch.cat(lines, a.rank_axis or 0)))
            scaled = [room.view_in(packed.bands, b, own.rank) * (own.scaling * weight) for packed, own, weight in on]
            sources.append((b, torch.cat(scaled, b.rank_axis or 0)))
            whole = [room.view_in(packed.bands, b, own.rank) for packed, own, _ in on]
            if not sources[-1][1].isfinite().all() and all(each.isfinite().all() for each in whole):
                raise refused("mix_overflows", weights=mix.weights, path=layer.path, dtype=whole[0].dtype)
    config = complete(_config_of(room.slot, settings, [each.state.config for each in members]), room.slot.host)
    packed = room.pack(State(tuple(settings), config), sources)
    # by the weights and not by `packed`, because that would be a circle, which only the garbage collector frees
    return replace(packed, state=replace(packed.state, owner=replace(mix, bands=packed.bands)))


def _of_mix(rank: int) -> LayerSettings:
    """The settings of a mix: a scaling of one, because those of its shares are in its weights."""
    return LayerSettings(rank=rank, alpha=rank, use_rslora=False, dropout=0.0)


def _config_of(slot: Slot, settings: Sequence[LayerSettings | None], configs: Sequence[Config]) -> Config:
    """The config that a mix of adapters with these configs is saved with."""
    like = configs[0]
    ranks = {layer.path: each.rank for layer, each in zip(slot.layers, settings, strict=True) if each is not None}
    config = copy.deepcopy(like)
    for each in configs:
        if other_base(slot, each):  # what is noted of a share is noted of the mix
            config.base_model_name_or_path = each.base_model_name_or_path
    vars(config)[ORIGIN] = "a mix", None, None
    whole = _of_mix(max(ranks.values(), default=like.r))
    for setting in SETTINGS:
        setattr(config, setting.field, getattr(whole, setting.name))
    config.rank_pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    retarget(config, ranks, slot.host.base)
    return config
