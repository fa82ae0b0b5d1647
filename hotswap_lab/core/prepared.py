"""Prepared LoRA layers, whose scaling and dropout are not constants of a graph; and marks that are kept on layers.

A compiled graph treats a Python float as a constant and is recompiled when it changes; a tensor's value is read at
each call. So a prepared layer keeps its scaling as a tensor. PEFT and diffusers still write floats, new tensors or
whole new tables to ``layer.scaling``; here, all of these become new values in the existing tensor.

A layer that the new adapter lacks stays in the model, filled with zeros; so do the components beyond an adapter's own
rank. So there are two marks: that an adapter is off, and that its rank is below its tensors'.

Tests: ``tests/core/test_prepare.py`` and ``tests/core/test_compiled_swaps.py``.
"""

import copy
import functools
from collections import UserDict
from collections.abc import Callable, Iterable
from multiprocessing.context import get_spawning_popen
from typing import Any, SupportsIndex

import torch
from torch import nn

from .change import watch_optimizers
from .errors import refused
from .host import TunerLayer
from .journal import Journal
from .lora import EvalFreeDropout
from .method import Method
from .slot import Slot
from .tensors import OFF_ATTRIBUTE, PREPARED_ATTRIBUTE, ROOM_ATTRIBUTE, SCALING, SlotTensor, is_shared, shared_as

#: tables of dropouts on a layer
DROPOUTS = {"lora_dropout", "hira_dropout"}


#: the base of a mixin, typed as the layer that it is mixed into
_ALayer: Any = object


class ScalingTable(UserDict[str, Any]):
    """``layer.scaling`` of a prepared layer, which stores the scaling of a prepared adapter in a buffer of the layer.

    Reading an entry gives ``buffer[0, 0]``, a 0-dimensional tensor, so that it doesn't change the precision of the
    tensor that it is multiplied with. Writing an entry fills the buffer.

    >>> layer = torch.nn.Linear(1, 1)
    >>> table = ScalingTable({"default": 2.0, "other": 1.0}, layer._buffers)
    >>> layer._buffers["hotswap_scaling_default"] = torch.tensor([[2.0]])
    >>> table["default"] = 0.5
    >>> table, layer.hotswap_scaling_default
    ({'default': tensor(0.5000), 'other': 1.0}, tensor([[0.5000]]))
    """

    def __init__(self, floats: dict[str, Any], buffers: dict[str, torch.Tensor | None]):
        #: the scalings of adapters that are not prepared; of prepared ones, only the names matter
        self.data = floats
        #: the layer's own table of buffers, which compilers, exports and ``functional_call`` use
        self.buffers = buffers

    def __getitem__(self, key: str) -> Any:
        buffer = self.buffers.get(SCALING + key)
        return self.data[key] if buffer is None else buffer[0, 0]

    def __setitem__(self, key: str, item: float | torch.Tensor) -> None:
        buffer = self.buffers.get(SCALING + key)
        if buffer is None:
            self.data[key] = item
        elif isinstance(item, torch.Tensor):
            # no float() here: diffusers scales inside of its forward, so this may run in a compiled graph
            buffer[0, 0].copy_(item)
        else:
            buffer.fill_(item)

    def __delitem__(self, key: str) -> None:
        del self.data[key]
        self.buffers.pop(SCALING + key, None)

    def __repr__(self) -> str:
        return repr(dict(self))

    def copy(self) -> dict[str, float]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The current values as floats, which ``peft.helpers.rescale_adapter_scale`` puts back when it ends."""
        return {name: float(value) for name, value in self.items()}


def new_scalings(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Zeros for scalings, as exact as the Python floats that they replace. Metal has no float64.

    Use at least two axes: PyTorch's compiler treats a 0-dimensional float64 tensor on the CPU as a Python float.
    """
    # a tensor made in inference mode could never be changed outside of it
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


class _Prepared(_ALayer):
    """A mixin for the class of a prepared layer, which :func:`make_prepared` gives to the layer at run time.

    Say PEFT's ``rescale_adapter_scale(model, 0.5)`` comes to a prepared ``Linear`` of LoRA, compiled before. It assigns
    ``layer.scaling = {"default": 1.0}`` when it ends. A plain layer would then have a new table, of Python floats: the
    model is compiled again, and later swaps write to memory that no layer reads. Here, the memory gets the value 1.0
    (``test_pefts_own_ways_to_set_a_strength_do_not_recompile`` in ``tests/core/test_compiled_swaps.py``). PEFT has made
    the layer already, and it has to stay the same object, so only another class reaches an assignment, a move and a
    pickle of it.

    A class made at run time can't be found by its name, so a pickle contains how to make it again. ``__reduce_ex__``
    checks the purpose of the pickle. A new process (``spawn``) must get the same memory: with a copy, it would answer
    with the old adapter after a swap here (``tests/core/test_processes.py``,
    ``test_a_pool_goes_on_and_is_seen_by_a_process_that_was_spawned_and_has_compiled``). A file must not: all tensors
    are views of one memory, which a pickle would have once for each of them, 24 MB instead of 4 for the demo's model
    (``tests/core/test_prepare.py``, ``test_row_j_of_one_memory_holds_rank_component_j_of_each_parameter``).
    """

    hotswap_original: type
    scaling: ScalingTable

    def __setattr__(self, name: str, value: Any) -> None:
        """A new table of scalings becomes new values in the old one.

        A property would do, were it not for PyTorch 2.8 and 2.9, whose compiler takes a property that reads the
        instance's own entry of the same name for a call of itself.
        """
        if name == "scaling":
            self.scaling.update(value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> nn.Module:
        """Move scalings to another device or into shared memory, as by ``model.to(...)``, but keep their precision."""
        scalings = {key: buffer for key, buffer in self._buffers.items() if key.startswith(SCALING)}
        moved = [fn(buffer.new_empty(1, dtype=torch.float32)) for buffer in scalings.values()]
        if any(map(is_shared, moved)):
            self._check_sharing()
        for key in scalings:
            del self._buffers[key]
        try:
            super()._apply(fn, *args, **kwargs)
        finally:
            self._buffers.update(scalings)
        for (key, buffer), like in zip(scalings.items(), moved, strict=True):
            # a scaling is not saved, and has to outlast a move to the meta device, as the Python float does
            device = torch.device("cpu") if like.is_meta else like.device
            if device == buffer.device:
                shared_as([like], buffer)
            else:
                self._buffers[key] = new_scalings((1, 1), device).copy_(buffer)
        return self

    def _check_sharing(self) -> None:
        """Refuse sharing of a layer that computes with more than its own tensors: other processes lack the rest."""
        if self.__dict__.get(ROOM_ATTRIBUTE):
            raise refused("not_shared")

    def delete_adapter(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        super().delete_adapter(adapter_name, *args, **kwargs)
        # the marks of a deleted adapter don't apply to another one that is loaded under the same name
        for attribute in (OFF_ATTRIBUTE, PREPARED_ATTRIBUTE, ROOM_ATTRIBUTE):
            mark(self, attribute, adapter_name, False, Journal())

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        # the class is made at run time, so a copy or a pickle must contain how to make it again
        state = dict(self.__dict__)
        if get_spawning_popen() is None:
            # copied out of the room's memory: a pickle would contain all of that memory once for each tensor
            tables = {*self.adapter_layer_names} & self._modules.keys()
            state["_modules"] = {**self._modules, **{name: copy.deepcopy(self._modules[name]) for name in tables}}
            scalings = {key: buffer.clone() for key, buffer in self._buffers.items() if key.startswith(SCALING)}
            state["_buffers"] = {**self._buffers, **scalings}
        else:  # to a new process, which gets the same memory, as with any model
            self._check_sharing()
        if isinstance(table := state.get("scaling"), ScalingTable):
            state["scaling"] = ScalingTable(table.data, state["_buffers"])
        if of_room := state.pop(ROOM_ATTRIBUTE, None):  # a copy has none
            for name in of_room:
                self.lora_variant[name].check_copying(name)
            state["lora_variant"] = {key: value for key, value in self.lora_variant.items() if key not in of_room}
        return _new_prepared, (type(self).hotswap_original,), state


@functools.cache
def prepared_class(original: type) -> type:
    """The class of a prepared layer: a subclass of ``original`` with the same name.

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
    watch_optimizers()  # in a new process, the layer's parameters still share one memory
    cls: Any = prepared_class(original)
    return cls.__new__(cls)


def make_prepared(layer: TunerLayer, adapter_name: str, scaling: torch.Tensor | None, journal: Journal) -> None:
    """Prepare a layer, so that a graph reads its scaling at each call and, in eval mode, does not use its dropout.

    ``scaling``, of shape (1, 1), becomes the buffer that holds the layer's scaling; None if the layer has none. The
    buffer is not persistent, so that the state dict of a prepared model is that of a fresh load. Also, PEFT's
    ``save_pretrained`` would save any key with the adapter's name as a part of the adapter.
    """
    mark(layer, PREPARED_ATTRIBUTE, adapter_name, True, journal)
    if scaling is not None:
        key, hidden = SCALING + adapter_name, layer._non_persistent_buffers_set
        journal.set_attribute(layer, "_non_persistent_buffers_set", hidden | {key})
        journal.set_item(layer._buffers, key, scaling)
        if not isinstance(table := layer.__dict__["scaling"], ScalingTable):
            journal.set_item(layer.__dict__, "scaling", ScalingTable(table, layer._buffers))
    journal.set_attribute(layer, "__class__", prepared_class(type(layer)))
    for table in DROPOUTS & layer._modules.keys():
        present: Any = layer._modules[table]
        if not isinstance(present[adapter_name], EvalFreeDropout):
            dropout = EvalFreeDropout(p=getattr(present[adapter_name], "p", 0.0))
            journal.set_item(present, adapter_name, dropout.train(layer.training))


# ---- marks on a layer


def mark(layer: TunerLayer, attribute: str, adapter_name: str, value: bool, journal: Journal) -> None:
    """Set or remove a mark of an adapter on a layer."""
    before = layer.__dict__.get(attribute, frozenset())
    after = before | {adapter_name} if value else before - {adapter_name}
    if after != before:
        journal.set_item(layer.__dict__, attribute, after)


def keep_off(method: Method, layer: TunerLayer, journal: Journal) -> None:
    """Have a layer leave an adapter that is off out of merges, keep it off in new memory, and drop the mark with it.

    These are attributes of its own: another class would recompile a layer that is not prepared.
    """
    if "merge" not in layer.__dict__:
        journal.set_item(layer.__dict__, "merge", functools.partial(merge_what_is_on, layer, method))
        journal.set_item(layer.__dict__, "_apply", functools.partial(move_and_keep_off, layer, method))
        journal.set_item(layer.__dict__, "delete_adapter", functools.partial(delete_with_mark, layer))


def move_and_keep_off(layer: Any, method: Method, *args: Any, **kwargs: Any) -> Any:
    """``_apply`` of a layer, with zeros again where ``model.to_empty(...)`` leaves any values."""
    off = [name for name in layer.__dict__[OFF_ATTRIBUTE] if is_off(layer, name, method.tensors_of(layer, name) or ())]
    type(layer)._apply(layer, *args, **kwargs)
    for name in off:
        for tensor in method.tensors_of(layer, name) or ():
            if not tensor.is_zero:
                with torch.inference_mode(tensor.parameter.is_inference()), torch.no_grad():
                    tensor.memory.zero_()
    return layer


def delete_with_mark(layer: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """PEFT's ``delete_adapter`` of a layer. An adapter that is loaded under the same name later is not off there."""
    type(layer).delete_adapter(layer, adapter_name, *args, **kwargs)
    mark(layer, OFF_ATTRIBUTE, adapter_name, False, Journal())


def merge_what_is_on(
    layer: Any, method: Method, safe_merge: bool = False, adapter_names: list[str] | None = None
) -> None:
    """PEFT's ``merge`` of a layer, without adapters that are off there, because a fresh load's layer doesn't have them.

    PEFT notes the adapters that are merged into a layer, and skips all others there as long as one is.
    """
    if not isinstance(adapter_names, str):  # which PEFT refuses
        names = layer.active_adapters if adapter_names is None else adapter_names
        off = {name for name in names if is_off(layer, name, method.tensors_of(layer, name) or ())}
        off -= layer.__dict__.get(ROOM_ATTRIBUTE, frozenset())  # the layer computes with rows, which can't be merged
        adapter_names = [name for name in names if name not in off]
        if off and not adapter_names:
            return
    type(layer).merge(layer, safe_merge, adapter_names)


def is_off(layer: Any, adapter_name: str, tensors: Iterable[SlotTensor]) -> bool:
    """Whether the adapter, with these tensors, is turned off on this layer.

    The mark alone doesn't decide it: the user may have deleted the adapter and loaded another one under the same name,
    or written weights into it. Of a weight that is sharded over processes, only the local shard is checked: checking
    the others takes a call in every process, but a state dict may be requested in one of them only.
    """
    return is_marked_off(layer, adapter_name) and all(tensor.is_zero for tensor in tensors)


def is_marked_off(layer: Any, adapter_name: str) -> bool:
    """:func:`is_off` by the mark alone, without a look at the weights."""
    return adapter_name in layer.__dict__.get(OFF_ATTRIBUTE, ())


def own_rank(layer: Any, adapter_name: str, tensor: SlotTensor) -> int | None:
    """The rank of the adapter on this layer, which is that of its tensors unless they are padded."""
    capacity = tensor.capacity
    if capacity is not None and adapter_name in layer.__dict__.get(PREPARED_ATTRIBUTE, ()):
        return min(layer.r[adapter_name], capacity)
    return capacity


def ranks_before(slot: Slot) -> list[int | None]:
    """The :func:`own_rank` of the adapter on each layer; None where it is turned off."""
    name, ranks = slot.adapter_name, []
    for layer in slot.layers:
        off = name in layer.module.__dict__.get(OFF_ATTRIBUTE, ())
        ranks.append(None if off else own_rank(layer.module, name, layer.tensors[0]))
    return ranks
