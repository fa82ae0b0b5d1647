"""What makes a LoRA layer ready for swaps in a compiled graph, beside the padded weights.

A compiled graph takes a Python float for a constant and compiles anew when it changes; a tensor's value is read at
each call. So a prepared layer keeps its scaling as a tensor. PEFT and diffusers go on writing floats, new tensors
or whole new tables into ``layer.scaling``; here, all of these end up as new values in the tensor that is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import nn

from .host import TunerLayer

#: on a layer: the adapters that are turned off there
OFF_ATTRIBUTE = "hotswap_off"
#: and those whose tensors may be larger than their rank
PADDED_ATTRIBUTE = "hotswap_padded"


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

    def replace(self, values: Mapping[str, float | torch.Tensor]) -> None:
        """Takes over all of ``values`` and forgets what is not among them."""
        for name in self.keys() - values.keys():
            del self[name]
        for name, value in values.items():
            self[name] = value


def scaling_tensor(value: float | torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A scaling as a tensor without axes: it doesn't change the precision of what it is multiplied with.

    Not in float64: PyTorch's compiler takes such tensors on the CPU for Python floats, and with torch 2.13 a graph
    that changes one of them (as diffusers' ``scale`` does) computes with the value it had before the change.
    """
    # a tensor made in inference mode could never be changed outside of it
    with torch.inference_mode(False):
        return torch.tensor(float(value), dtype=torch.float32, device=device)


class EvalFreeDropout(nn.Dropout):
    """A dropout whose ``p`` is looked at in training only, so that in eval mode no graph depends on it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout(input, self.p, True, self.inplace) if self.training and self.p else input


class _Prepared(TunerLayer if TYPE_CHECKING else object):
    """Mixed into the class of a prepared layer."""

    hotswap_original: type

    @property
    def scaling(self) -> ScalingTable:
        if "scaling" not in self.__dict__:  # some methods have none
            raise AttributeError("scaling")
        return self.__dict__["scaling"]

    @scaling.setter
    def scaling(self, values: Mapping[str, float | torch.Tensor]) -> None:
        if values is not self.__dict__["scaling"]:
            self.__dict__["scaling"].replace(values)

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> nn.Module:
        """``model.to(device)``: the scalings come along, but keep their precision."""
        result = super()._apply(fn, *args, **kwargs)
        table = self.__dict__.get("scaling", {})
        for name, tensor in table.items():
            if isinstance(tensor, torch.Tensor):
                device = fn(torch.empty(0, device=tensor.device)).device
                if device != tensor.device:
                    dict.__setitem__(table, name, scaling_tensor(tensor, device))
        return result

    def delete_adapter(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        super().delete_adapter(adapter_name, *args, **kwargs)
        # the marks of one that is deleted say nothing about another one that is loaded by the same name
        for attribute in (OFF_ATTRIBUTE, PADDED_ATTRIBUTE):
            if adapter_name in (marks := self.__dict__.get(attribute, frozenset())):
                setattr(self, attribute, marks - {adapter_name})

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        # the class is made on the fly, so a copy or a pickle has to be told how to make it again
        state = dict(self.__dict__)
        # tensors that are no part of a larger memory: a pickle would contain all of that once for each of them
        own = {name: copy.deepcopy(self._modules[name]) for name in self.adapter_layer_names if name in self._modules}
        state["_modules"] = {**self._modules, **own}
        return _new_prepared, (type(self).hotswap_original,), state


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
    cls: Any = prepared_class(original)
    return cls.__new__(cls)


def has_fixed_size(layer: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter's tensors on this layer must keep their sizes: whether it was prepared, by us or by PEFT."""
    scaling = getattr(layer, "scaling", None)
    return isinstance(scaling, dict) and isinstance(scaling.get(adapter_name), torch.Tensor)
