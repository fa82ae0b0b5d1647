"""Memory that tensors share, and the two invariants of a swap about it. Plans are checked for both.

**No two targets overlap in memory, unless they get the same values.** Otherwise the last write stays in both. Layers
that were tied, by ``ensure_weight_tying`` or by the user, would all compute with the weights of one of them. A
parameter that PEFT gives to several layers, as VB-LoRA does, is one target. Which targets overlap is found once for a
slot, and again where addresses have changed; their values are compared for each plan.

**No source overlaps a target.** Otherwise a copy reads values that another copy of the same swap has written. If PEFT
made the tensors of the caller's dict the model's parameters (``low_cpu_mem_usage``, diffusers), every swap writes to
that dict, and a swap back to adapter A from it would silently be adapter B.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from peft.utils import AuxiliaryTrainingWrapper

from .adapter import WHEN
from .errors import Refusal, refusal
from .host import canonical_path
from .slot import Slot, has_been_swapped
from .tensors import SlotTensor, have_same_values, named_tensors
from .wrappers import entries_under

# ---- targets


def overlaps_in(slot: Slot, *_: object) -> list[list[SlotTensor]]:
    """The tensors of a slot that overlap in memory, in groups, of LoRA with those of the layers' other adapters."""
    tensors, others = slot.tensors, slot.host.configs.keys() - {slot.adapter_name}
    if slot.method.is_lora:
        of_others = [slot.method.tensors_of(layer.module, name) for layer in slot.layers for name in others]
        tensors = [*tensors, *chain.from_iterable(filter(None, of_others))]
    else:  # in LoRA, one parameter in two layers is the user's doing
        tensors = list(dict(zip(slot.parameters, tensors, strict=True)).values())
    parameters = [tensor.owner._parameters[tensor.name] for tensor in tensors]  # the property would be slower
    return [[tensors[number] for number in group] for group in overlapping(parameters)]


def overlapping(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """The numbers of tensors that may overlap in memory, in groups. Tensors without memory are in none.

    >>> one, other = torch.zeros(4, 6), torch.zeros(2, 2)
    >>> overlapping([one, other, one.t(), one[:2], one[2:]]), overlapping([one[:, :3], other, one[:, 3:]])
    ([[0, 2, 3, 4]], [])
    >>> overlapping([other[:1, :1].expand(3, 2), other[:1, :1]])  # one value, repeated
    [[0, 1]]
    """
    spans = []
    for number, tensor in enumerate(tensors):
        if start := tensor.data_ptr():
            # most are contiguous, and _span is slow
            size = tensor.nbytes
            span = (start, start + size, size, size) if tensor.is_contiguous() else _span(tensor)
            spans.append((*span, number))
    groups = []
    for group in _touching(spans):
        # views side by side in one memory, such as those that a room has left, overlap only if their columns do
        first, _, pitch, *_ = group[0]
        columns = [((start - first) % pitch, width, number) for start, _, _, width, number in group]
        have_equal_pitch = all(span[2] == pitch for span in group)
        if have_equal_pitch and all(left + width <= pitch for left, width, _ in columns):
            groups += _touching([(left, left + width, number) for left, width, number in columns])
        else:
            groups.append(group)
    return [sorted(number for *_, number in group) for group in groups]


def _span(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """Return a tensor's first address, the one behind its last, its longest stride (in bytes), and the width of the
    memory that is repeated at this stride."""
    size, start = tensor.element_size(), tensor.data_ptr()
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    axes = sorted((stride * size, length) for stride, length in strides if stride and length > 1)
    *inner, (pitch, count) = [(size, 1), *axes]  # (size, 1): a tensor of one element has no axis
    width = size + sum(stride * (length - 1) for stride, length in inner)
    return start, start + width + pitch * (count - 1), pitch, width


def _touching(spans: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """The spans that overlap others, in groups; each begins with its first address and the one behind its last."""
    groups: list[list[tuple[int, ...]]] = []
    end = 0
    for span in sorted(spans):
        if span[0] < end:
            groups[-1].append(span)
        else:
            groups.append([span])
            end = 0
        end = max(end, span[1])
    return [group for group in groups if len(group) > 1]


def conflicting_writes(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
    """Return the numbers of the pairs whose value can't be written to their target without changing an earlier one.

    Each pair is a target and its value. All are tried in a copy of the memory that the targets share.

    >>> one = torch.zeros(2, 3)
    >>> conflicting_writes([(one, torch.ones(2, 3)), (one.t(), torch.ones(3, 2)), (one[1:], torch.zeros(1, 3))])
    [2]
    """
    targets = [target.detach() for target, _ in pairs]
    start = min((target.data_ptr() for target in targets), default=0)
    size = max((_span(target)[1] for target in targets), default=0) - start
    scratch = torch.zeros(size, dtype=torch.uint8, device=targets[0].device if targets else None)

    def in_scratch(target: torch.Tensor) -> torch.Tensor:
        offset = (target.data_ptr() - start) // target.element_size()
        empty = torch.empty(0, dtype=target.dtype, device=target.device)
        return empty.set_(scratch.untyped_storage(), offset, target.shape, target.stride())

    written: list[tuple[torch.Tensor, torch.Tensor]] = []
    conflicts: list[int] = []
    for number, (target, value) in enumerate(pairs):
        before, view = scratch.clone(), in_scratch(target)
        view.copy_(value)
        # the new one is checked, too: elements of one target may share memory
        if all(have_same_values(present, wanted) for present, wanted in (*written, (view, value))):
            written.append((view, value))
        else:
            scratch.copy_(before)
            conflicts.append(number)
    return conflicts


# ---- sources


def own_tensors(slot: Slot, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return those of ``tensors`` that are in a memory of the slot's adapter."""
    memory = {_storage(tensor) for _, tensor in _named_tensors(slot)} - {None}
    return {key: tensor for key, tensor in tensors.items() if _storage(tensor) in memory}


def overwritten(slot: Slot, tensors: Mapping[str, torch.Tensor]) -> list[Refusal]:
    """The refusal of tensors that are their own targets, if a swap has written to them: they hold another adapter."""
    # another model may have been swapped with this config
    is_swapped = WHEN in vars(slot.config) and has_been_swapped(slot.host.base, slot.adapter_name)
    if not is_swapped or not (own := own_tensors(slot, tensors)):
        return []
    live = {_plain_name(slot, key): _view(tensor) for key, tensor in _named_tensors(slot)}
    keys = []
    for key, source in own.items():
        # prompts have other names in a file
        targets = [live[name]] if (name := _plain_name(slot, key)) in live else live.values()
        if _view(source) in targets:
            keys.append(key)
    return [refusal("source_overwritten", count=len(keys), key=keys[0], adapter_name=slot.adapter_name)] if keys else []


def _named_tensors(slot: Slot) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an adapter, with its saved modules and trained tokens; of other methods, all of the model."""
    if not slot.method.is_lora:  # some keep their tensors in no layer
        yield from named_tensors(slot.host.carrier)
        return
    for layer in slot.layers:
        yield from zip(layer.keys, [tensor.parameter for tensor in layer.tensors], strict=True)
    for path, module in slot.walk:
        if isinstance(module, AuxiliaryTrainingWrapper):
            for attribute, table in entries_under(module, slot.adapter_name):
                entry = table[slot.adapter_name]
                named = entry.named_parameters() if isinstance(entry, torch.nn.Module) else [(attribute, entry)]
                yield from ((f"{path}.{name}", value) for name, value in named if isinstance(value, torch.Tensor))


def _plain_name(slot: Slot, key: str) -> str:
    """One name for a tensor, from its key in a file or its name in a model."""
    left_out = slot.adapter_name, "modules_to_save", "token_adapter"
    return ".".join(part for part in canonical_path(key).split(".") if part not in left_out)


def _view(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _storage(tensor: torch.Tensor) -> int | None:
    """The address of a tensor's storage; None for tensors that have none, or several."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return tensor.untyped_storage().data_ptr() if plain else None
