"""What makes a LoRA layer ready for swaps in a compiled graph, besides the padded weights; and what is noted on layers.

A compiled graph takes a Python float for a constant and compiles anew when it changes; a tensor's value is read at
each call. So a prepared layer keeps its scaling as a tensor. PEFT and diffusers go on writing floats, new tensors
or whole new tables into ``layer.scaling``; here, all of these end up as new values in the tensor that is there.

A layer that the new adapter lacks stays in the model, with zeros; so do the rows beyond an adapter's own rank. So there
are two marks: that an adapter is off, and that its rank is below its tensors'.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from multiprocessing.context import get_spawning_popen
from typing import Any, SupportsIndex

import torch
from torch import nn

from .engine import Method
from .host import TunerLayer
from .journal import Journal
from .lora import SCALAR_TABLES, EvalFreeDropout, write_dropout
from .slot import Slot, SlotLayer
from .tensors import OFF_ATTRIBUTE, PADDED_ATTRIBUTE, SCALING, LayerSettings, SlotTensor, is_shared, shared_as

#: tables of dropouts on a layer
DROPOUTS = {"lora_dropout", "hira_dropout"}


#: what is mixed into is a layer
_ALayer: Any = object


class ScalingTable(MutableMapping[str, Any]):
    """``layer.scaling`` of a prepared layer: the scaling of a prepared adapter is a buffer of the layer.

    Reading an entry gives ``buffer[0, 0]``, a tensor without axes, so that it doesn't change the precision of what it
    is multiplied with. Writing an entry fills the buffer.

    >>> layer = torch.nn.Linear(1, 1)
    >>> table = ScalingTable({"default": 2.0, "other": 1.0}, layer._buffers)
    >>> layer._buffers["hotswap_scaling_default"] = torch.tensor([[2.0]])
    >>> table["default"] = 0.5
    >>> dict(table), layer.hotswap_scaling_default
    ({'default': tensor(0.5000), 'other': 1.0}, tensor([[0.5000]]))
    """

    def __init__(self, floats: dict[str, Any], buffers: dict[str, torch.Tensor | None]):
        #: of adapters that are not prepared, their scalings; of the others, only the names
        self.floats = floats
        #: the layer's own table, which compilers, exports and ``functional_call`` know the buffers by
        self.buffers = buffers

    def __getitem__(self, name: str) -> Any:
        buffer = self.buffers.get(SCALING + name)
        return self.floats[name] if buffer is None else buffer[0, 0]

    def __setitem__(self, name: str, value: float | torch.Tensor) -> None:
        buffer = self.buffers.get(SCALING + name)
        if buffer is None:
            self.floats[name] = value
        elif isinstance(value, torch.Tensor):
            # no float() here: diffusers scales inside of its forward, so this may run in a compiled graph
            buffer[0, 0].copy_(value)
        else:
            buffer.fill_(value)

    def __delitem__(self, name: str) -> None:
        del self.floats[name]
        self.buffers.pop(SCALING + name, None)

    def __contains__(self, name: object) -> bool:
        return name in self.floats

    def __iter__(self) -> Iterator[str]:
        return iter(self.floats)

    def __len__(self) -> int:
        return len(self.floats)

    def copy(self) -> dict[str, float]:
        """The values at this time: ``peft.helpers.rescale_adapter_scale`` puts them back when it ends."""
        return {name: float(value) for name, value in self.items()}


def new_scalings(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Zeros for scalings, as exact as the Python floats that they stand for. Metal has no float64.

    With two axes or more: PyTorch's compiler takes a float64 tensor without axes on the CPU for a Python float.
    """
    # a tensor made in inference mode could never be changed outside of it
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


class _Prepared(_ALayer):
    """Mixed into the class of a prepared layer."""

    hotswap_original: type

    @property
    def scaling(self) -> ScalingTable:
        if "scaling" not in self.__dict__:  # some methods have none
            raise AttributeError("scaling")
        return self.__dict__["scaling"]

    @scaling.setter
    def scaling(self, values: Mapping[str, float | torch.Tensor]) -> None:
        for name, value in values.items():
            self.__dict__["scaling"][name] = value

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> nn.Module:
        """``model.to(...)``: scalings go to another device and into shared memory, but keep their precision."""
        scalings = {key: each for key, each in self._buffers.items() if key.startswith(SCALING)}
        moved = [fn(each.new_empty(1, dtype=torch.float32)) for each in scalings.values()]
        if any(map(is_shared, moved)):
            self._check_sharing()
        for key in scalings:
            del self._buffers[key]
        try:
            super()._apply(fn, *args, **kwargs)
        finally:
            self._buffers.update(scalings)
        for (key, buffer), like in zip(scalings.items(), moved, strict=True):
            if like.device == buffer.device:
                shared_as([like], buffer)
            else:
                self._buffers[key] = new_scalings((1, 1), like.device).copy_(buffer)
        return self

    def _check_sharing(self) -> None:
        """Refuses other processes where a pool's rows compute: which rows are assigned, only its own process knows."""
        for each in self.__dict__.get("lora_variant", {}).values():
            if getattr(each, "is_of_a_room", False):
                each.refuse_sharing()

    def delete_adapter(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        super().delete_adapter(adapter_name, *args, **kwargs)
        # the marks of one that is deleted say nothing about another one that is loaded by the same name
        for attribute in (OFF_ATTRIBUTE, PADDED_ATTRIBUTE):
            mark(self, attribute, adapter_name, False, Journal())

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        # the class is made on the fly, so a copy or a pickle has to be told how to make it again
        state = dict(self.__dict__)
        if get_spawning_popen() is None:
            # tensors that are no part of a larger memory: a pickle would contain all of that once for each of them
            tables = {*self.adapter_layer_names} & self._modules.keys()
            state["_modules"] = {**self._modules, **{name: copy.deepcopy(self._modules[name]) for name in tables}}
            scalings = {key: each.clone() for key, each in self._buffers.items() if key.startswith(SCALING)}
            state["_buffers"] = {**self._buffers, **scalings}
        else:  # to a process that is started, and gets the very memory, as with any model
            self._check_sharing()
        if isinstance(table := state.get("scaling"), ScalingTable):
            state["scaling"] = ScalingTable(table.floats, state["_buffers"])
        if "lora_variant" in state:  # a copy has no room
            state["lora_variant"] = {
                name: each for name, each in state["lora_variant"].items() if not getattr(each, "is_of_a_room", False)
            }
        return _new_prepared, (type(self).hotswap_original,), state


@functools.cache
def prepared_class(original: type) -> type:
    """The class of a prepared layer: a subclass of ``original`` of the same name.

    ``torch.nn.utils.parametrize`` changes a module's class in the same way.

    >>> from peft.tuners.lora import Linear
    >>> prepared_class(Linear).__name__, issubclass(prepared_class(Linear), Linear)
    ('Linear', True)
    """
    if issubclass(original, _Prepared):
        return original
    attributes = {"__module__": original.__module__, "__doc__": original.__doc__, "hotswap_original": original}
    return type(original.__name__, (_Prepared, original), attributes)


def _new_prepared(original: type) -> nn.Module:
    cls: Any = prepared_class(original)
    return cls.__new__(cls)


def make_prepared(layer: TunerLayer, adapter_name: str, scaling: torch.Tensor | None, journal: Journal) -> None:
    """Makes whatever a compiled graph would take for a constant a thing that it reads anew, or does not look at.

    ``scaling``, of shape (1, 1), becomes the layer's buffer that holds its scaling; None where it has none. The buffer
    is not persistent: the state dict of a prepared model is that of a fresh load, and PEFT's ``save_pretrained`` would
    take any key with the adapter's name for a part of the adapter.
    """
    mark(layer, PADDED_ATTRIBUTE, adapter_name, True, journal)
    if scaling is not None:
        key, hidden = SCALING + adapter_name, layer._non_persistent_buffers_set
        journal.set_attribute(layer, "_non_persistent_buffers_set", hidden | {key})
        journal.set_item(layer._buffers, key, scaling)
        if not isinstance(table := layer.__dict__["scaling"], ScalingTable):
            journal.set_item(layer.__dict__, "scaling", ScalingTable(table, layer._buffers))
    journal.set_attribute(layer, "__class__", prepared_class(type(layer)))
    for table in DROPOUTS & layer._modules.keys():
        present: Any = layer._modules[table]
        if adapter_name in present and not isinstance(present[adapter_name], EvalFreeDropout):
            dropout = EvalFreeDropout(p=getattr(present[adapter_name], "p", 0.0))
            journal.set_item(present, adapter_name, dropout.train(layer.training))


# ---- what is noted on a layer


def mark(layer: TunerLayer, attribute: str, adapter_name: str, value: bool, journal: Journal) -> None:
    """Notes something of an adapter on a layer, or that it holds no longer."""
    before = layer.__dict__.get(attribute, frozenset())
    after = before | {adapter_name} if value else before - {adapter_name}
    if after != before:
        journal.set_item(layer.__dict__, attribute, after)


def is_off(layer: Any, adapter_name: str, tensors: Iterable[SlotTensor]) -> bool:
    """Whether the adapter is turned off on this layer, where it has these tensors.

    The mark alone doesn't say so: the user may have deleted the adapter and loaded another one by the same name,
    or written weights into it. Of a weight that is spread over processes, only the part in this one is looked at:
    for more, all of them would have to be here, and a state dict may be asked for in one of them only.
    """
    if not is_marked_off(layer, adapter_name):
        return False
    return not any(tensor.memory.any() for tensor in tensors if not tensor.reads_base)


def is_marked_off(layer: Any, adapter_name: str) -> bool:
    """:func:`is_off` without a look at the weights."""
    return adapter_name in layer.__dict__.get(OFF_ATTRIBUTE, ())


def is_padded(layer: Any, adapter_name: str) -> bool:
    """Whether the adapter's tensors on this layer may be larger than its own rank, ``layer.r[adapter_name]``."""
    return adapter_name in layer.__dict__.get(PADDED_ATTRIBUTE, ())


def set_off(method: Method, layer: Any, adapter_name: str, off: bool, journal: Journal) -> None:
    """Notes that the adapter is turned off on this layer, and so not trained there, or that it isn't any more."""
    mark(layer, OFF_ATTRIBUTE, adapter_name, off, journal)
    method.turn(layer, adapter_name, not off, journal)


def own_rank(layer: Any, adapter_name: str, tensor: SlotTensor) -> int | None:
    """The rank of the adapter on this layer, which is that of its tensors unless these are padded."""
    capacity = tensor.capacity
    if capacity is not None and adapter_name in layer.__dict__.get(PADDED_ATTRIBUTE, ()):
        return min(layer.r[adapter_name], capacity)
    return capacity


def rank_before(layer: Any, adapter_name: str, tensor: SlotTensor) -> int | None:
    """:func:`own_rank`; None where the adapter is turned off."""
    # as is_marked_off(); asked for at each layer in each swap
    off = adapter_name in layer.__dict__.get(OFF_ATTRIBUTE, ())
    return None if off else own_rank(layer, adapter_name, tensor)


def write_settings(
    slot: Slot, layers: Iterable[SlotLayer], settings: Iterable[LayerSettings | None], journal: Journal
) -> None:
    """Writes what PEFT keeps of an adapter on these layers but for the scaling, and whether it is off there (None)."""
    name, method = slot.adapter_name, slot.method
    on: list[tuple[torch.nn.Module, LayerSettings]] = []
    for layer, wanted in zip(layers, settings, strict=True):
        if wanted is None or name in layer.module.__dict__.get(OFF_ATTRIBUTE, ()):
            set_off(method, layer.module, name, wanted is None, journal)
        if wanted is not None:
            on.append((layer.module, wanted))
            write_dropout(layer.module, name, wanted.dropout, journal)
    for table, field in SCALAR_TABLES.items():
        journal.set_items([module.__dict__[table] for module, _ in on], name, [getattr(each, field) for _, each in on])
