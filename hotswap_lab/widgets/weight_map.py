"""WeightMap: what the adapter adds to each layer's weight, as a picture."""

from collections.abc import Sequence

import torch
from peft.utils.integrations import dequantize_module_weight

from ..core.slot import Slot, SlotLayer
from ..figures import Figure
from ..figures.tiles import CELLS, LARGE, Tile, drawn, split
from ..swap import resolve_slot
from ..threads import in_use, in_use_now
from .results import Run
from .switch import ModelSwitch, Switch, is_off, whereabouts
from .view import View, note_cell


class WeightMap(View):
    """A tile for each layer, in the adapter's color where it changes the weight, in gray where it does not.

    A row of tiles is a block of the model, a column a kind of layer. A tile shows what the adapter adds to the weight:
    scaling times B A, the root mean square in 14 by 14 parts of it, as a share of the weight's own. So all adapters of
    all models have the same scale. Models with many layers have one tint for each. Tiles where the previous adapter was
    have an outline in its color.

    Parameters
    ----------
    pool_or_model:
        An :class:`AdapterPool`, or a model with an adapter.
    adapter_name:
        For a model with several adapters: the one to show.

    Examples
    --------
    >>> from hotswap_lab import demo, hotswap_adapter
    >>> from hotswap_lab.widgets import WeightMap
    >>> model, _ = demo.load("pig_latin")
    >>> map = WeightMap(model)
    >>> print(map)
    WeightMap: default is in 16 of 28 layers
    >>> hotswap_adapter(model, demo.adapter_path("shout"), "default", add_layers=True)
    >>> map.look()
    >>> print(map)
    WeightMap: default is in 14 of 28 layers

    How to read it: the strongest color is where the adapter changes a weight most. Gray is the base model alone.
    """

    title = "What the adapter adds to each layer"
    #: what was read at the last look: the adapter in the model, or ``"off"``, its tiles, and the numbers of both
    name: str = ""
    tiles: list[Tile]
    counts: dict[str, int]
    #: the adapter before this one, and the layers where it was
    previous: tuple[str, frozenset[str]] = ("", frozenset())

    def __init__(self, pool_or_model: Switch | torch.nn.Module, adapter_name: str | None = None):
        is_model = isinstance(pool_or_model, torch.nn.Module)
        self._switch = ModelSwitch(pool_or_model, {}, adapter_name) if is_model else pool_or_model
        self.model: torch.nn.Module = self._switch.model
        self.adapter_name: str = self._switch.adapter_name
        #: the size of each layer's own weight
        self._sizes: dict[str, float | None] = {}
        self.look()

    def look(self) -> None:
        """Read the model's numbers again. Swaps by other threads wait meanwhile."""
        with in_use(self.model):
            self._look()

    def look_now(self) -> None:
        """Look if the model has changed, unless a swap is writing, or waits: then a little later."""
        if self._note:
            # a swap may wait for a thread that computes, and that thread for the end of a refresh
            with in_use_now(self.model) as is_mine:
                if is_mine:
                    self._look()
                else:
                    note_cell()

    def _look(self) -> None:
        slot = resolve_slot(self.model, self.adapter_name)
        masks = [_in_use(layer) for layer in slot.layers]
        tiles = _tiles(slot, masks, self._sizes)
        name = whereabouts(self._switch) if self._switch.names else self.adapter_name
        seen = dict(name=name, tiles=tiles, counts=_count(slot, masks), _seen=self._now())
        if name != self.name and self.name:
            seen["previous"] = self.name, frozenset(each.path for each in self.tiles if each.cells.any())
        with self._refreshes:  # all at once, or a refresh would show one adapter's name with another one's tiles
            vars(self).update(seen)
        self._changed()

    @property
    def summary(self) -> str:
        """One line: the adapter, and in how many of the layers it is."""
        self.look_now()
        active = sum(bool(tile.cells.any()) for tile in self.tiles)
        return "the adapter is off" if self.name == "off" else f"{self.name} is in {active} of {len(self.tiles)} layers"

    def figure(self, said: Sequence[tuple[str, Run]] = (), text: str = "") -> Figure:
        """The tiles, and a bar with the numbers of the base and of the adapter; below them, what was ``said``."""
        answers, title = [(label, run.where, run.text, run.png) for label, run in said], self.summary
        return drawn(self.tiles, self.name, title, self.counts, self.previous, answers, text or str(self))


# --- reading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _tiles(slot: Slot, masks: Sequence[torch.Tensor], sizes: dict[str, float | None]) -> list[Tile]:
    """A tile for each layer of the model's blocks, with the adapter or without, in the model's order."""
    having = {layer.path: each for each in zip(slot.layers, masks, strict=True) for layer in each[:1]}
    paths = [path for path, module in slot.walk if path in having or _has_weight(module)]
    paths = [path for path in dict.fromkeys([*paths, *having]) if path in having or split(path)[0]]
    counts = (len({split(path)[axis] for path in paths}) for axis in (0, 1))
    n = CELLS if all(count <= most for count, most in zip(counts, LARGE, strict=True)) else 1
    return [_tile(slot, path, n, sizes, having.get(path)) for path in paths]


def _has_weight(module: torch.nn.Module) -> bool:
    # another adapter may be on a layer
    weight = getattr(module, "base_layer", module)._parameters.get("weight")
    return weight is not None and (weight.dim() > 1 or not weight.is_floating_point())


def _tile(slot: Slot, path: str, n: int, sizes: dict[str, float | None], having: tuple | None) -> Tile:
    if having is None or is_off(having[0].module, slot.adapter_name):
        return Tile(path, torch.zeros(n, n, device="cpu"), "the base model alone")
    layer, mask = having
    cells = _rms(slot, layer, n)
    if cells is not None and path not in sizes:
        sizes[path] = _size(layer.module)
    size = None if cells is None else sizes[path]
    if size is None:  # IA3, for example, multiplies: one tint
        return Tile(path, torch.full((n, n), float(any(each.memory.any() for each in layer.tensors)), device="cpu"), "")
    cells = (cells / size).nan_to_num().cpu()
    if not cells.any():
        return Tile(path, cells, "the adapter is off here")
    rank, room = int(mask.sum()), len(mask)
    ranked = f", rank {rank}{f', padded to {room}' if rank < room else ''}" if room else ""
    return Tile(path, cells, f"{100 * _root_mean_square(cells):.3g} % of the weight's size{ranked}")


def _size(module: torch.nn.Module) -> float | None:
    """The root mean square of a layer's own weight, or None if it has none in memory."""
    base = getattr(module, "base_layer", module)
    weight = base._parameters.get("weight")
    return None if weight is None or weight.is_meta else _root_mean_square(dequantize_module_weight(base))


def _root_mean_square(values: torch.Tensor) -> float:
    return values.detach().float().square().mean().sqrt().item()


def _in_use(layer: SlotLayer) -> torch.Tensor:
    """For each rank component, whether any of the layer's tensors has a number there that is not zero."""
    ranked = [each for each in layer.tensors if each.rank_axis is not None]
    size = min((each.memory.shape[each.rank_axis] for each in ranked), default=0)
    masks = [(each.memory.detach().movedim(each.rank_axis, 0)[:size] != 0).flatten(1).any(1) for each in ranked]
    return torch.stack(masks).any(0) if masks else torch.zeros(0, dtype=torch.bool, device="cpu")


def _rms(slot: Slot, layer: SlotLayer, n: int) -> torch.Tensor | None:
    """The root mean square of what the adapter adds to the weight, in n x n parts of it; None if it doesn't add.

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
    if delta is None:
        return None
    squares = delta(slot.adapter_name).detach().float().flatten(1).square()
    return torch.nn.functional.adaptive_avg_pool2d(squares[None], n)[0].sqrt()


def _count(slot: Slot, masks: Sequence[torch.Tensor]) -> dict[str, int]:
    held, used = 0, 0
    for layer, mask in zip(slot.layers, masks, strict=True):
        for memory, axis in ((each.memory, each.rank_axis) for each in layer.tensors):
            size, length = memory.numel(), -1 if axis is None else memory.shape[axis]
            held += size
            used += size // length * int(mask.sum()) if length == len(mask) else size
    own = {id(tensor.parameter) for layer in slot.layers for tensor in layer.tensors}
    modules = (getattr(module, "base_layer", module) for _, module in slot.walk)
    base = {id(each): each.numel() for module in modules for each in module._parameters.values() if each is not None}
    return {"base": sum(size for key, size in base.items() if key not in own), "adapter": used, "padding": held - used}
