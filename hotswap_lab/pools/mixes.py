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
from ..core.tensors import SlotTensor, is_finite
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
    """Return the sum of adapters, each times its weight, as a new adapter.

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
            ranks = zip(*(packed.state.ranks for packed in members), strict=True)
            needed = [sum(filter(None, ranks_of_layer)) for ranks_of_layer in ranks]
            # a lower target_rank would be refused for another layer
            most = max(*needed, *(layer.tensors[0].capacity or 0 for layer in room.slot.layers))
            raise refused("mix_above_room", names=[*mix.weights], rank=rank, path=layer.path, room=capacity, most=most)
        if on:
            all_a, all_b = ([room.view_in(packed.bands, x, own.rank) for packed, own, _ in on] for x in (a, b))
            scaled_b = [one_b * (own.scaling * weight) for one_b, (_, own, weight) in zip(all_b, on, strict=True)]
            sources += (a, torch.cat(all_a, a.rank_axis or 0)), (b, torch.cat(scaled_b, b.rank_axis or 0))
            if not all(map(is_finite, scaled_b)) and all(map(is_finite, all_b)):
                raise refused("mix_overflows", weights=mix.weights, path=layer.path, dtype=all_b[0].dtype)
    config = complete(_config_of(room.slot, settings, [packed.state.config for packed in members]), room.slot.host)
    packed = room.pack(State(tuple(settings), config), sources)
    # by the weights and not by `packed`, because that would be a circle, which only the garbage collector frees
    return replace(packed, state=replace(packed.state, owner=replace(mix, bands=packed.bands)))


def _of_mix(rank: int) -> LayerSettings:
    """The settings of a mix: a scaling of one, because its weights include those of its shares."""
    return LayerSettings(rank=rank, alpha=rank, use_rslora=False, dropout=0.0)


def _config_of(slot: Slot, settings: Sequence[LayerSettings | None], configs: Sequence[Config]) -> Config:
    """The config that a mix of adapters with these configs is saved with."""
    ranks = {layer.path: own.rank for layer, own in zip(slot.layers, settings, strict=True) if own is not None}
    config = copy.deepcopy(configs[0])
    for share in configs:
        if other_base(slot, share):  # a note about a share is one about the mix
            config.base_model_name_or_path = share.base_model_name_or_path
    vars(config)[ORIGIN] = "a mix", None, None
    whole = _of_mix(max(ranks.values(), default=config.r))
    for setting in SETTINGS:
        setattr(config, setting.field, getattr(whole, setting.name))
    config.rank_pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    retarget(config, ranks, slot.host.base)
    return config
