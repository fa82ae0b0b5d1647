"""What makes a LoRA layer ready for swaps in a compiled graph, beside the padded weights; and what is noted on layers.

A compiled graph takes a Python float for a constant and compiles anew when it changes; a tensor's value is read at
each call. So a prepared layer keeps its scaling as a tensor. PEFT and diffusers go on writing floats, new tensors
or whole new tables into ``layer.scaling``; here, all of these end up as new values in the tensor that is there.

A layer that the new adapter lacks stays in the model, with zeros; so do the rows beyond an adapter's own rank. So there
are two marks: that an adapter is off, and that its rank is below its tensors'.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex

import torch
from torch import nn

from . import methods
from .host import TunerLayer
from .journal import Journal
from .lora import EvalFreeDropout
from .parts import LayerSettings, SlotTensor
from .slot import Slot, SlotLayer

#: tables of dropouts on a layer
DROPOUTS = {"lora_dropout", "hira_dropout"}
#: on a layer: the adapters that are turned off there
OFF_ATTRIBUTE = "hotswap_off"
#: and those whose own rank is ``layer.r``, whatever the size of their tensors
PADDED_ATTRIBUTE = "hotswap_padded"


#: what is mixed into is a layer
_ALayer: Any = object


class ScalingTable(dict[str, Any]):
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


def scaling_tensor(value: float | torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A scaling as a tensor without axes: it doesn't change the precision of what it is multiplied with.

    Not in float64: PyTorch's compiler takes such tensors on the CPU for Python floats, and with torch 2.13 a graph
    that changes one of them (as diffusers' ``scale`` does) computes with the value it had before the change.
    """
    # a tensor made in inference mode could never be changed outside of it
    with torch.inference_mode(False):
        return torch.tensor(float(value), dtype=torch.float32, device=device)


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
        """``model.to(device)``: the scalings come along, but keep their precision."""
        table = self.__dict__.get("scaling", {})
        for name, tensor in table.items():
            if isinstance(tensor, torch.Tensor) and (device := fn(tensor.new_empty(0)).device) != tensor.device:
                dict.__setitem__(table, name, scaling_tensor(tensor, device))
        return super()._apply(fn, *args, **kwargs)

    def delete_adapter(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        super().delete_adapter(adapter_name, *args, **kwargs)
        # the marks of one that is deleted say nothing about another one that is loaded by the same name
        for attribute in (OFF_ATTRIBUTE, PADDED_ATTRIBUTE):
            mark(self, attribute, adapter_name, False, Journal())

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        # the class is made on the fly, so a copy or a pickle has to be told how to make it again
        state = dict(self.__dict__)
        # tensors that are no part of a larger memory: a pickle would contain all of that once for each of them
        own = {name: copy.deepcopy(self._modules[name]) for name in self.adapter_layer_names if name in self._modules}
        state["_modules"] = {**self._modules, **own}
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

    ``scaling`` is the tensor, without axes, that holds the layer's scaling from now on; None where it has none.
    """
    mark(layer, PADDED_ATTRIBUTE, adapter_name, True, journal)
    if scaling is not None:
        table = ScalingTable({**layer.__dict__["scaling"], adapter_name: scaling})
        journal.set_item(layer.__dict__, "scaling", table)
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


def is_off(layer: Any, adapter_name: str) -> bool:
    """Whether the adapter is turned off on this layer.

    The mark alone doesn't say so: somebody may have deleted the adapter and loaded another one by the same name,
    or written weights into it. Of a weight that is spread over processes, only the part in this one is looked at:
    for more, all of them would have to be here, and a state dict may be asked for in one of them only.
    """
    if not is_marked_off(layer, adapter_name):
        return False
    tensors = methods.method_of(layer).tensors_of(layer, adapter_name)
    return not any(tensor.memory.any() for tensor in tensors if not tensor.reads_base)


def is_marked_off(layer: Any, adapter_name: str) -> bool:
    """:func:`is_off` without a look at the weights."""
    return adapter_name in layer.__dict__.get(OFF_ATTRIBUTE, ())


def is_padded(layer: Any, adapter_name: str) -> bool:
    """Whether the adapter's tensors on this layer may be larger than its own rank, ``layer.r[adapter_name]``."""
    return adapter_name in layer.__dict__.get(PADDED_ATTRIBUTE, ())


def set_off(layer: Any, adapter_name: str, off: bool, journal: Journal) -> None:
    """Notes that the adapter is turned off on this layer, and so not trained there, or that it isn't any more."""
    mark(layer, OFF_ATTRIBUTE, adapter_name, off, journal)
    methods.rest.turn(layer, adapter_name, not off, journal)


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
    """Writes what PEFT keeps of an adapter on each of these layers, and whether it is off there (None)."""
    name, method = slot.adapter_name, slot.method
    on: list[tuple[torch.nn.Module, LayerSettings]] = []
    for layer, wanted in zip(layers, settings, strict=True):
        if wanted is None or name in layer.module.__dict__.get(OFF_ATTRIBUTE, ()):
            set_off(layer.module, name, wanted is None, journal)
        if wanted is not None:
            on.append((layer.module, wanted))
            method.write_dropout(layer.module, name, wanted.dropout, journal)
    for table, field in method.SCALAR_TABLES.items():
        # a scaling that is a tensor is written as such
        chosen = [(module.__dict__[table], wanted) for module, wanted in on]
        if table == "scaling":
            chosen = [(values, wanted) for values, wanted in chosen if not isinstance(values[name], torch.Tensor)]
        journal.set_items([values for values, _ in chosen], name, [getattr(wanted, field) for _, wanted in chosen])


def has_fixed_size(layer: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter's tensors on this layer must keep their sizes: whether it was prepared, by us or by PEFT."""
    scaling = getattr(layer, "scaling", None)
    return isinstance(scaling, dict) and isinstance(scaling.get(adapter_name), torch.Tensor)
