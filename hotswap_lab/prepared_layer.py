"""What makes a LoRA layer ready for swaps in a compiled graph, beside the padded weights.

A compiled graph takes a Python float for a constant and compiles anew when it changes; a tensor's value is read at
each call. So a prepared layer keeps its scaling as a tensor. PEFT and diffusers go on writing floats, new tensors
or whole new tables into ``layer.scaling``; here, all of these end up as new values in the tensor that is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping

import torch
import torch.nn.functional as F
from torch import nn

from .journal import Journal

#: on a layer: the adapters that are turned off there
OFF_ATTRIBUTE = "hotswap_off"
#: and those whose tensors may be larger than their rank
PADDED_ATTRIBUTE = "hotswap_padded"


class ScalingTable(dict):
    """``layer.scaling`` of a prepared layer: writing an entry fills the tensor that is there.

    >>> table = ScalingTable({"default": scaling_tensor(2.0, "cpu")})
    >>> tensor = table["default"]
    >>> table["default"] = 0.5
    >>> table["default"] is tensor, float(tensor)
    (True, 0.5)
    """

    def __setitem__(self, name: str, value: float | torch.Tensor) -> None:
        tensor = self.get(name)
        if not isinstance(tensor, torch.Tensor):
            super().__setitem__(name, value)
        elif isinstance(value, torch.Tensor):
            # no float() here: diffusers scales inside of its forward, so this may run in a compiled graph
            if value is not tensor:
                tensor.copy_(value)
        else:
            tensor.fill_(value)

    def copy(self) -> dict[str, float]:
        """The values at this time: ``peft.helpers.rescale_adapter_scale`` puts them back when it ends."""
        return {name: float(value) for name, value in self.items()}

    def replace(self, values: Mapping[str, float | torch.Tensor]) -> None:
        """Takes over all of ``values`` and forgets what is not among them."""
        for name in self.keys() - values.keys():
            del self[name]
        for name, value in values.items():
            self[name] = value


def scaling_tensor(value: float, device: torch.device | str) -> torch.Tensor:
    """A scaling as a tensor without axes: it doesn't change the precision of what it is multiplied with.

    Not in float64: PyTorch's compiler takes such tensors on the CPU for Python floats, and with torch 2.13 a graph
    that changes one of them (as diffusers' ``scale`` does) computes with the value it had before the change.
    """
    # a tensor made in inference mode could never be changed outside of it
    with torch.inference_mode(False):
        return torch.tensor(float(value), dtype=torch.float32, device=device)


class EvalFreeDropout(nn.Dropout):
    """A dropout whose ``p`` is looked at in training only, so that in eval mode no graph depends on it."""

    #: where ``p`` is looked up while the layer has a seat in a room
    seat = None

    @property
    def p(self) -> float:
        return self._own_p if self.seat is None else self.seat.dropout

    @p.setter
    def p(self, value: float) -> None:
        self._own_p = value

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout(input, self.p, True, self.inplace) if self.training and self.p else input

    def __reduce_ex__(self, protocol: int) -> tuple:
        state = {key: value for key, value in self.__dict__.items() if key != "seat"}
        return _new, (type(self),), {**state, "_own_p": self.p}


#: on a layer: its places in rooms, by adapter name
SEATS = "hotswap_seats"
#: the tables that are looked up in a room, and the name of their value among a layer's settings
LIVE_TABLES = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "use_rslora"}


class LiveTable(MutableMapping):
    """``layer.r`` and its like on a layer with a seat: looks its values up in the room."""

    def __init__(self, seats: dict, field: str, values: Mapping):
        self._seats, self._field, self._values = seats, field, dict(values)

    def __getitem__(self, name: str) -> object:
        seat = self._seats.get(name)
        settings = None if seat is None else seat.settings
        return self._values[name] if settings is None else getattr(settings, self._field)

    def __setitem__(self, name: str, value: object) -> None:
        self._leave(name)
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        self._leave(name)
        del self._values[name]

    def _leave(self, name: str) -> None:
        # somebody made another adapter of this name: what the room says no longer holds for this layer
        if (seat := self._seats.pop(name, None)) is not None:
            seat.room.dirty = True

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(dict(self))

    def copy(self) -> dict:
        return dict(self)


def take_seat(layer: nn.Module, adapter_name: str, seat: object, journal: Journal) -> None:
    """Lets a prepared layer look its values up in a room, undoably."""
    seats = dict(layer.__dict__.get(SEATS, {}))
    seats[adapter_name] = seat
    journal.set_item(layer.__dict__, SEATS, seats)
    for table, field in LIVE_TABLES.items():
        values = layer.__dict__[table]
        journal.set_item(layer.__dict__, table, LiveTable(seats, field, values))
    journal.set_item(layer.lora_dropout[adapter_name].__dict__, "seat", seat)


def leave_seat(layer: nn.Module, adapter_name: str) -> None:
    """Writes what a room says of a layer into its own tables."""
    seat = layer.__dict__[SEATS].pop(adapter_name)
    if (settings := seat.settings) is None:
        layer.__dict__[OFF_ATTRIBUTE] = layer.__dict__.get(OFF_ATTRIBUTE, frozenset()) | {adapter_name}
    else:
        layer.__dict__[OFF_ATTRIBUTE] = layer.__dict__.get(OFF_ATTRIBUTE, frozenset()) - {adapter_name}
        for table, field in LIVE_TABLES.items():
            layer.__dict__[table]._values[adapter_name] = getattr(settings, field)
    dropout = layer.lora_dropout._modules.get(adapter_name)
    if isinstance(dropout, EvalFreeDropout) and dropout.__dict__.pop("seat", None) is not None:
        dropout.p = seat.dropout


class _Prepared:
    """Mixed into the class of a prepared layer."""

    @property
    def scaling(self) -> ScalingTable:
        if "scaling" not in self.__dict__:  # some methods have none
            raise AttributeError("scaling")
        return self.__dict__["scaling"]

    @scaling.setter
    def scaling(self, values: Mapping[str, float | torch.Tensor]) -> None:
        if values is not self.__dict__["scaling"]:
            self.__dict__["scaling"].replace(values)

    def _apply(self, fn: Callable, *args: object, **kwargs: object) -> nn.Module:
        """``model.to(device)``: the scalings come along, but keep their precision."""
        self._tell_rooms("dirty")
        result = super()._apply(fn, *args, **kwargs)
        table = self.__dict__.get("scaling", {})
        for name, tensor in table.items():
            if isinstance(tensor, torch.Tensor):
                device = fn(torch.empty(0, device=tensor.device)).device
                if device != tensor.device:
                    dict.__setitem__(table, name, scaling_tensor(tensor, device))
        return result

    def merge(self, *args: object, **kwargs: object) -> None:
        self._tell_rooms("may_be_merged")
        super().merge(*args, **kwargs)

    def update_layer(self, *args: object, **kwargs: object) -> None:
        self._tell_rooms("dirty")
        super().update_layer(*args, **kwargs)

    def delete_adapter(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        self._tell_rooms("dirty")
        super().delete_adapter(adapter_name, *args, **kwargs)
        # the marks of one that is deleted say nothing about another one that is loaded by the same name
        for attribute in (OFF_ATTRIBUTE, PADDED_ATTRIBUTE):
            if adapter_name in (marks := self.__dict__.get(attribute, frozenset())):
                self.__dict__[attribute] = marks - {adapter_name}

    def _tell_rooms(self, flag: str) -> None:
        for seat in self.__dict__.get(SEATS, {}).values():
            setattr(seat.room, flag, True)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # the class is made on the fly, so a copy or a pickle has to be told how to make it again
        return _new_prepared, (type(self).hotswap_original,), _state_without_room(self)


def _state_without_room(layer: nn.Module) -> dict:
    """What a copy of the layer is made from: tables of its own, and tensors that are no part of a larger memory.

    A pickle would contain that whole memory once for each tensor.
    """
    state = dict(layer.__dict__)
    seats = state.pop(SEATS, None)
    if not seats:
        return state
    for table in LIVE_TABLES:
        state[table] = dict(state[table])
    off = {name for name, seat in seats.items() if seat.settings is None}
    state[OFF_ATTRIBUTE] = state.get(OFF_ATTRIBUTE, frozenset()) - seats.keys() | off
    state["_modules"] = dict(state["_modules"])
    for table in layer.adapter_layer_names:
        if isinstance(getattr(layer, table), (nn.ModuleDict, nn.ParameterDict)):
            state["_modules"][table] = _table_without_room(getattr(layer, table), seats)
    return state


def _table_without_room(table: nn.ModuleDict | nn.ParameterDict, seats: Mapping) -> nn.Module:
    twin = copy.copy(table)
    if isinstance(table, nn.ParameterDict):
        twin._keys = dict(table._keys)
        twin._parameters = {
            name: _own_memory(parameter) if name in seats else parameter
            for name, parameter in table._parameters.items()
        }
        return twin
    twin._modules = dict(table._modules)
    for name in seats.keys() & table.keys():
        module = copy.copy(table[name])
        module._parameters = {key: _own_memory(parameter) for key, parameter in table[name]._parameters.items()}
        twin._modules[name] = module
    return twin


def _own_memory(parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    copied = parameter.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copied, requires_grad=parameter.requires_grad)


_classes: dict[type, type] = {}


def prepared_class(original: type) -> type:
    """The class of a prepared layer: a subclass of ``original`` of the same name.

    ``torch.nn.utils.parametrize`` changes a module's class in the same way.

    >>> from peft.tuners.lora import Linear
    >>> prepared_class(Linear).__name__, issubclass(prepared_class(Linear), Linear)
    ('Linear', True)
    """
    if issubclass(original, _Prepared):
        return original
    if original not in _classes:
        attributes = {"__module__": original.__module__, "__doc__": original.__doc__, "hotswap_original": original}
        _classes[original] = type(original.__name__, (_Prepared, original), attributes)
    return _classes[original]


def _new_prepared(original: type) -> nn.Module:
    return _new(prepared_class(original))


def _new(cls: type) -> nn.Module:
    return cls.__new__(cls)


def has_fixed_size(layer: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter's tensors on this layer must keep their sizes: whether it was prepared, by us or by PEFT."""
    scaling = getattr(layer, "scaling", None)
    return isinstance(scaling, dict) and isinstance(scaling.get(adapter_name), torch.Tensor)
