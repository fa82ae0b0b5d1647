"""WeightMap: what the adapter adds to each layer's weight, as a picture that a swap repaints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from .. import demo
from ..core.host import name_in
from ..core.slot import Slot, SlotLayer
from ..core.tensors import SlotTensor
from ..figures.tiles import CELLS, LARGE, Counts, Tile, drawn, split
from ..pools.adapter_pool import AdapterPool
from ..swap import get_strength, resolve_slot
from ..threads import in_use
from .switch import demo_pool, switch_for, whereabouts
from .work import WorkingView

if TYPE_CHECKING:
    import ipywidgets

    from ..figures import Figure


class WeightMap(WorkingView):
    """A tile for each layer, in the adapter's color where it changes the weight, in gray where it does not.

    A row of tiles is a block of the model, a column a kind of layer. A tile shows what the adapter adds to the weight:
    scaling times B A, the root mean square in 14 by 14 parts of it. Models with many layers have one tint for each.

    Parameters
    ----------
    pool_or_model:
        An :class:`AdapterPool`, or a model with an adapter. With a pool, or with ``adapters``, the live form has a
        button that swaps the next adapter in.
    answer:
        A text to show below, or a function without parameters that gives it, called after each swap.
    before:
        A copy of ``model.state_dict()`` from before a swap: the numbers that have changed since are counted. True: take
        one now, and before each swap by the button. It takes as much memory as the model. Default: nothing is compared.
    adapters, adapter_name:
        For a model, as for :class:`SwapPanel`.

    Examples
    --------
    >>> from hotswap_lab.widgets import WeightMap
    >>> map = WeightMap.demo()
    >>> map.swap("pig_latin")
    >>> print(map)
    WeightMap: pig_latin is in 16 of 28 layers
    hotswap → otswaphay
    base: 963,968 numbers, 0 of them changed | adapter: 131,072 numbers, all new, and 92,160 of padding

    How to read it: the darkest cell is where the adapter changes a weight most. Gray is the base model alone.
    """

    #: what was read at the last look: the adapter in the model, or ``"off"``, and ``shown``, the text below the tiles
    name: str
    tiles: list[Tile]
    counts: Counts
    strength: float
    shown: str

    def __init__(
        self,
        pool_or_model: AdapterPool | torch.nn.Module,
        answer: str | Callable[[], str] | None = None,
        before: Mapping[str, torch.Tensor] | bool | None = None,
        *,
        adapters: Mapping[str, object] | None = None,
        adapter_name: str | None = None,
    ):
        alone = isinstance(pool_or_model, torch.nn.Module) and not adapters
        self._switch = None if alone else switch_for(pool_or_model, adapters, adapter_name)
        self.model: torch.nn.Module = pool_or_model if alone else self._switch.model
        self.adapter_name: str = name_in(self.model, adapter_name) if alone else self._switch.adapter_name
        self.answer = answer
        self._compares = before is True
        with in_use(self.model):
            self.before: Mapping[str, torch.Tensor] | None = self._copy() if before is True else before or None
            self._look()

    @classmethod
    def demo(cls, prompt: str = "hotswap") -> WeightMap:
        """Make a map of the embedded model, with all of its adapters.

        >>> WeightMap.demo().shown
        'hotswap → pawstoh'
        """
        pool, tokenizer = demo_pool()
        return cls(pool, lambda: f"{prompt} → {demo.ask(pool.model, tokenizer, prompt)}", before=True)

    # ---- actions

    def look(self) -> None:
        """Read the model's numbers, and ask for the answer, again. Swaps by other threads wait meanwhile."""
        with in_use(self.model):
            self._look()

    def _look(self) -> None:
        slot = resolve_slot(self.model, self.adapter_name)
        masks, strength = [_in_use(layer) for layer in slot.layers], 1.0
        with contextlib.suppress(ValueError):  # layers of different strengths, or a method that has none
            strength = get_strength(self.model, self.adapter_name)
        shown = str((self.answer() if callable(self.answer) else self.answer) or "")
        counts = _count(slot, masks, self.model, self.before)
        name = self.adapter_name if self._switch is None else whereabouts(self._switch)
        seen = dict(name=name, tiles=_tiles(slot, masks), counts=counts, strength=strength, shown=shown)
        with self._refreshes:  # all at once, or a refresh would show one adapter's name with another one's tiles
            vars(self).update(seen)
        self._changed()

    def swap(self, name: str | None = None) -> None:
        """Swap an adapter in (None: the next one), and look again."""
        self._run(lambda: self._swap(name))

    def start(self) -> None:
        """Swap the next adapter in, in a thread of its own, as the button does; one further for each call meanwhile."""
        waiting = self._next
        name = self._after(waiting[0] if waiting else self._present or self._switch.active)
        self._come(name, partial(self._swap, name))

    def _work(self) -> None:
        self._swap(None)

    def _after(self, name: str | None) -> str:
        names = [*self._switch.names]
        return names[(names.index(name) + 1) % len(names) if name in names else 0]

    def _swap(self, name: str | None) -> None:
        name = name or self._after(self._switch.active)
        self.doing: str = f"swapping {name} in, as soon as no other thread computes with the model"
        if self._compares:
            with in_use(self.model):
                self.before = self._copy()
        self.swap_seconds: float | None = self._when_free(lambda: self._switch.swap(name))
        self.doing = f"looking at {name}"
        self.look()

    def _copy(self) -> dict[str, torch.Tensor]:
        return {key: tensor.detach().clone() for key, tensor in self.model.state_dict().items()}

    # ---- text, picture and controls

    @property
    def summary(self) -> str:
        """One line: the adapter, and in how many of the layers it is."""
        active = sum(bool(tile.cells.any()) for tile in self.tiles)
        return f"{self.name} is in {active} of {len(self.tiles)} layers"

    def _lines(self) -> list[str]:
        return [*filter(None, [self.shown]), " | ".join(self.counts.lines)]

    def figure(self) -> Figure:
        """The tiles, the answer, and a bar with the numbers of the base and of the adapter."""
        return drawn(self.tiles, self.name, self.strength, self.shown, self.counts, str(self))

    def _controls(self) -> list[ipywidgets.Widget]:
        self._with_stop()  # of no other control, since the button stays enabled
        label, tooltip = "Swap the next adapter in", "and paint what it changes"
        swap = self._button(label, tooltip, self.start, each_counts=True, button_style="primary")
        return [swap] if self._switch else []


# --- reading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _tiles(slot: Slot, masks: Sequence[torch.Tensor]) -> list[Tile]:
    """A tile for each layer of the model's blocks, with the adapter or without, in the model's order."""
    having = {layer.path: each for each in zip(slot.layers, masks, strict=True) for layer in each[:1]}
    paths = [path for path, module in slot.walk if path in having or _has_weight(module)]
    paths = [path for path in dict.fromkeys([*paths, *having]) if path in having or split(path)[0]]
    sizes = (len({split(path)[axis] for path in paths}) for axis in (0, 1))
    n = CELLS if all(size <= most for size, most in zip(sizes, LARGE, strict=True)) else 1
    return [_tile(slot, path, n, *having.get(path, (None, None))) for path in paths]


def _has_weight(module: torch.nn.Module) -> bool:
    # another adapter may be on a layer
    weight = getattr(module, "base_layer", module)._parameters.get("weight")
    return weight is not None and (weight.dim() > 1 or not weight.is_floating_point())


def _tile(slot: Slot, path: str, n: int, layer: SlotLayer | None, mask: torch.Tensor | None) -> Tile:
    if layer is None or mask is None:
        return Tile(path, torch.zeros(n, n), f"{path}: the base model alone")
    cells = _rms(slot, layer, n).nan_to_num().cpu()
    if not cells.any():
        return Tile(path, cells, f"{path}: the adapter is off here")
    rank, room = int(mask.sum()), len(mask)
    return Tile(path, cells, path + (f": rank {rank}{f', padded to {room}' if rank < room else ''}" if room else ""))


def _in_use(layer: SlotLayer) -> torch.Tensor:
    """For each rank component, whether any of the layer's tensors has a number there that is not zero."""
    ranked = [each for each in layer.tensors if each.rank_axis is not None]
    size = min((each.memory.shape[each.rank_axis] for each in ranked), default=0)
    masks = [(each.memory.detach().movedim(each.rank_axis, 0)[:size] != 0).flatten(1).any(1) for each in ranked]
    return torch.stack(masks).any(0) if masks else torch.zeros(0, dtype=torch.bool)


def _without_padding(tensor: SlotTensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if tensor.rank_axis is None:
        return values
    components = values.movedim(tensor.rank_axis, 0)
    return components[mask.to(values.device)] if len(components) == len(mask) else components


def _rms(slot: Slot, layer: SlotLayer, n: int) -> torch.Tensor:
    """The root mean square of what the adapter adds to the weight, in n x n parts of it.

    That of a part of B A needs only the products of B's rows with one another, and of A's columns. These matrices are
    r x r, so the weight itself is never computed.
    """
    by_axis = {tensor.rank_axis: tensor.memory.detach().float() for tensor in layer.tensors}
    a, b = by_axis.get(0), by_axis.get(1)
    if a is not None and b is not None and len(layer.tensors) == 2 and a.shape[0] == b.shape[1]:
        columns, rows = a.flatten(1).tensor_split(n, 1), b.flatten(1).tensor_split(n, 0)
        of_a = torch.stack([each @ each.T / max(each.shape[1], 1) for each in columns]).flatten(1)
        of_b = torch.stack([each.T @ each / max(each.shape[0], 1) for each in rows]).flatten(1)
        scaling = getattr(layer.module, "scaling", {}).get(slot.adapter_name, 1.0)
        return (of_b @ of_a.T).clamp(min=0).sqrt() * abs(float(scaling))
    delta = getattr(layer.module, "get_delta_weight", None)
    if delta is None:  # IA3, for example, multiplies: one tint
        return torch.full((n, n), float(any(tensor.memory.any() for tensor in layer.tensors)))
    squares = delta(slot.adapter_name).detach().float().flatten(1).square()
    return torch.nn.functional.adaptive_avg_pool2d(squares[None], n)[0].sqrt()


def _count(
    slot: Slot, masks: Sequence[torch.Tensor], model: torch.nn.Module, before: Mapping[str, torch.Tensor] | None
) -> Counts:
    owned = [(tensor, mask) for layer, mask in zip(slot.layers, masks, strict=True) for tensor in layer.tensors]
    adapter = {id(tensor.parameter): partial(_without_padding, tensor, mask=mask) for tensor, mask in owned}
    modules = (getattr(module, "base_layer", module) for _, module in slot.walk)
    base = {id(each): each for module in modules for each in module._parameters.values() if each is not None}
    base = {key: each for key, each in base.items() if key not in adapter}
    used = sum(adapter[id(tensor.parameter)](tensor.memory).numel() for tensor, _ in owned)
    sizes = sum(each.numel() for each in base.values()), used, sum(tensor.memory.numel() for tensor, _ in owned) - used
    if before is None:
        return Counts(*sizes)
    changed = [0, 0]
    for key, tensor in model.named_parameters():
        if id(tensor) in base or id(tensor) in adapter:
            # of a prepared model, a state dict has the tensors without their padding
            own = adapter.get(id(tensor), lambda values: values)
            now, then = own(tensor.detach()), before.get(key)
            then = None if then is None else own(then.to(now.device))
            is_new = then is None or then.shape != now.shape
            changed[id(tensor) in adapter] += now.numel() if is_new else int((now != then).sum())
    return Counts(*sizes, (changed[0], changed[1]))
