"""Pool: many adapters in memory, laid out as the model wants them, switched by name with one copy.

What people make is a :class:`hotswap_lab.AdapterPool`: this, and what only some of them need.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from peft import PeftConfig

from ..core.adapter import Adapter
from ..core.change import Change, apply
from ..core.engine import Engine
from ..core.errors import HotswapError, refuse
from ..core.host import find_host, kind_of, name_in
from ..core.journal import Journal
from ..core.lora import Lora
from ..core.planner import make_plan
from ..core.prepare import changes_to_prepare
from ..core.room import Content, Packed, Room
from ..core.slot import Slot, change_of, room_of, slot_for
from ..core.strength import check_strength, get_strength
from ..core.swap import warn_of
from ..core.tensors import SlotTensor
from ..threads import held, put_back


@dataclass(eq=False)
class Member:
    """One adapter of a pool."""

    name: str
    #: None while only its files have it, in a pool that drops some
    packed: Packed | None = None
    version: int = 1
    #: what a reader should know of it: the notes of its plan
    notes: Sequence[str] = ()


#: a tensor of the slot, and what goes there
Source = tuple[SlotTensor, torch.Tensor]


class Pool:
    """The adapters, and the room that they go into by turns."""

    #: what swaps its adapters
    engine: ClassVar[Engine]
    #: what it keeps of each adapter
    MEMBER: type[Member] = Member
    #: fields of a config that may stand for more than LoRA's own tensors
    BESIDE: Collection[str] = ()
    #: and what they go into
    room_kind: type[Room] = Room

    def __init__(
        self,
        model: torch.nn.Module,
        adapter_name: str | None = None,
        adapters: Mapping[str, object] | None = None,
        *,
        target_rank: int | None = None,
        check_compiled: Literal["error", "warn", "ignore"] = "error",
        **hub: Any,
    ):
        self.model = model
        self.adapter_name: str = name_in(model, adapter_name)
        adapter_name = self.adapter_name
        self._hub = hub
        self._members: dict[str, Member] = {}
        #: of the table of adapters. Whoever holds it never waits for a turn at the model; it is taken after that
        self._lock = threading.RLock()
        adapters = dict(adapters or {})
        base = self._check_kind(slot_for(self.engine, find_host(model, adapter_name), adapter_name)).host.base
        with held(base, computing=True):
            way_back = Journal()
            try:
                family = [self.engine.read(source, only_config=True, **hub) for source in adapters.values()]
                with held(base):
                    needs: dict[str, Any] = dict(target_rank=target_rank, check_compiled=check_compiled)
                    needs |= dict(adapter_name=adapter_name, beside=self._beside, kind=self.room_kind)
                    apply(changes_to_prepare(self.engine, model, family, **needs), way_back)
                self._room = cast(Room, room_of(base, adapter_name))
                self._fill(adapters.items())
            except BaseException:
                if not way_back.is_empty:
                    put_back(lambda: _roll_back(way_back, base), "leaves the model prepared")
                raise

    def _check_kind(self, slot: Slot) -> Slot:
        """Refuses what has no layout that adapters could be packed in."""
        name, config = slot.adapter_name, slot.config
        if not isinstance(slot.method, Lora):
            raise refuse("pool_needs_lora", adapter_name=name, kind=kind_of(config))
        if beside := [each for each in slot.method.extra_state(config) if each not in self.BESIDE]:
            raise refuse("pool_needs_lora_alone", adapter_name=name, beside=", ".join(beside))
        return slot

    def _beside(self, slot: Slot) -> list[SlotTensor]:
        """What an adapter has beside its layers."""
        return []

    def _fill(self, adapters: Iterable[tuple[str, object]]) -> None:
        for name, source in adapters:
            self.add(name, source)

    # ---- what is in it

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order they were added."""
        return list(self._members)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    @property
    def active(self) -> str | None:
        """The name of the adapter that the model computes with; None if it is off, or not one of this pool."""
        member = self._loaded if self._room.is_intact() else None
        if member is None:
            return None
        with contextlib.suppress(HotswapError):  # somebody has scaled some of the layers
            return None if self.strength == 0 else member.name
        return member.name

    @property
    def _loaded(self) -> Member | None:
        """The adapter in the room, if it is one of this pool."""
        owner = self._room.content.owner
        member = self._members.get(owner.name) if isinstance(owner, Member) else None
        return member if member is owner and not self._room.is_touched else None

    @property
    def strength(self) -> float:
        """How strongly the adapter acts: 1 as trained, 0 not at all. May be set at any time; a swap sets it to 1."""
        return get_strength(self.engine, self.model, self.adapter_name)

    @strength.setter
    def strength(self, value: float) -> None:
        with self._turn(), self._writing():
            check_strength(value, self._room.slot)
            self._apply(self._room.change_strength(value))

    def version(self, name: str) -> int:
        """How often this adapter's weights were given: 1 at first, one more with each :meth:`update`."""
        return self._member(name).version

    def _member(self, name: str) -> Member:
        if name not in self._members:
            raise refuse("not_in_pool", name=name, names=", ".join(map(repr, self._members)) or "(none)")
        return self._members[name]

    def _packed(self, member: Member) -> Packed:
        """A member's weights, wherever they have to be got from."""
        return cast(Packed, member.packed)

    # ---- adapters in and out of the pool

    def add(self, name: str, source: object) -> None:
        """Reads and packs an adapter; ``source`` as in ``adapters``. The model is not changed.

        Raises
        ------
        HotswapError
            If the name is taken, or the adapter can't be read or doesn't fit the room that was prepared.
        """
        self._check_free(name)
        member = self.MEMBER(name)
        # reading may take long, and swaps must not have to wait for it
        packed = self._read(member, source)
        with self._lock:
            self._check_free(name)
            self._make_space(member, packed)
            member.packed = packed
            self._members[name] = member

    def _check_free(self, name: str) -> None:
        if name in self._members:
            raise refuse("already_in_pool", name=name)

    def _read(self, member: Member, source: object) -> Packed:
        return self._pack(member, self.engine.read(source, **self._hub), check_targets=not isinstance(source, tuple))

    def _pack(self, member: Member, adapter: Adapter, check_targets: bool) -> Packed:
        return self._pack_layers(self._room.slot, member, adapter, check_targets)

    def _pack_layers(
        self, slot: Slot, member: Member, adapter: Adapter, check_targets: bool, beside: Sequence[Source] = ()
    ) -> Packed:
        self._check_room()
        plan = make_plan(slot, adapter, check_targets=check_targets)
        plan.raise_if_refused()
        warn_of(plan)
        member.notes = plan.notes
        sources = [
            (target, target.off_value() if source is None else source)
            for layer in plan.layers
            for target, source in zip(layer.layer.tensors, layer.sources, strict=True)
            if source is not None or target.reads_base
        ]
        content = Content(tuple([layer.settings for layer in plan.layers]), plan.config, member)
        return self._room.pack(content, [*sources, *beside])

    def _make_space(self, member: Member, packed: Packed, updated: bool = False) -> None:
        """To be called before weights are kept, by somebody who holds the lock. Here, memory is no matter."""

    def remove(self, name: str) -> None:
        """Forgets an adapter. The one that the model computes with can't be removed."""
        with self._lock:
            if self._uses(self._member(name)):
                raise refuse("adapter_in_use", name=name)
            del self._members[name]

    def update(self, name: str, state_dict: Mapping[str, torch.Tensor], config: PeftConfig | None = None) -> None:
        """Gives an adapter new weights, at once in the model if it is the one in use.

        For training loops that produce new weights at every step. Whoever reads ``pool.version(name)`` sees a new
        number as soon as the new weights are there; nobody ever sees a mixture.

        Parameters
        ----------
        state_dict:
            ``lora_A`` of shape ``(rank, in_features)`` and ``lora_B`` of shape ``(out_features, rank)`` per layer.
        config:
            Its config. Default: the one that the adapter has.
        """
        with self._turn():
            member = self._member(name)
            adapter = Adapter.from_state_dict(state_dict, config or self._packed(member).content.config)
            packed = self._pack(member, adapter, check_targets=False)

            def replace(journal: Journal) -> None:
                journal.set_attribute(member, "packed", packed)
                journal.set_attribute(member, "version", member.version + 1)

            in_model = self._uses(member)
            with self._writing() if in_model else self._lock:
                if self._members.get(name) is not member:
                    raise refuse("not_in_pool", name=name, names="of others, since it was removed meanwhile")
                change = self._change_to_updated(member, packed) if in_model else change_of(self._room.slot)
                self._make_space(member, packed, updated=True)
                change.steps.append(replace)
                apply([change])

    def _uses(self, member: Member) -> bool:
        """Whether the model computes with it."""
        return member is self._loaded

    def _change_to_updated(self, member: Member, packed: Packed) -> Change:
        """The new weights of an adapter that the model computes with, at the strength that it has."""
        return self._room.change_to(packed, self.strength)

    # ---- adapters in and out of the model

    def swap(self, name: str, strength: float = 1.0) -> None:
        """Puts an adapter into the model. ``strength`` as in :func:`hotswap_lab.set_strength`.

        Raises
        ------
        HotswapError
            If there is no such adapter, its files can't be read any more, or the model was moved or merged.
        """
        with self._turn():
            self._wanted(name)  # which may take long
            with self._writing():
                if strength != 1:
                    check_strength(strength, self._room.slot)
                # another adapter may have its name by now
                self._apply(self._room.change_to(self._wanted(name), strength))

    def _wanted(self, name: str) -> Packed:
        return self._packed(self._member(name))

    def off(self) -> None:
        """Turns the adapter off: the model computes as the base model does, until the next swap."""
        self.strength = 0

    def _turn(self) -> AbstractContextManager:
        """Nobody else swaps; the other threads may go on computing."""
        return held(self._room.slot.host.base, computing=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Nobody else computes or changes the pool. Not for what takes long."""
        with held(self._room.slot.host.base), self._lock:
            self._check_room()
            yield

    def _apply(self, change: Change) -> None:
        apply([change])

    def _check_room(self) -> None:
        if not self._room.is_intact():
            raise refuse("pool_lost_its_place")
        if self._room.slot.is_merged:
            raise refuse("merged", adapter_name=self.adapter_name)


def _roll_back(journal: Journal, base: torch.nn.Module) -> None:
    with held(base):
        journal.roll_back()
