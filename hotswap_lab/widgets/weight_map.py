"""WeightMap: a picture of an adapter's change to each layer's weight."""

from collections.abc import Sequence

import torch
from peft.utils.integrations import dequantize_module_weight

from ..core.slot import Slot, SlotLayer
from ..figures import Figure
from ..figures.tiles import CELLS, LARGE, Tile, drawn, rows_and_columns, split
from ..swap import resolve_slot
from ..threads import in_use, in_use_now
from .results import Run
from .switch import ModelSwitch, Switch, is_off, whereabouts
from .view import View, note_cell


class WeightMap(View):
    """A tile for each layer, in the adapter's color where it changes the weight, in gray where it doesn't.

    A row of tiles is a block of the model, a column a kind of layer. A tile shows the size of the change, scaling times
    B A: its root mean square in 14 by 14 parts, as a share of the weight's own root mean square. So the scale is the
    same for all adapters and models. Models with many layers have one tint for each layer. The layers of the previous
    adapter have an outline in its color.

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
    #: read at the last look: the adapter in the model, or ``"off"``, its tiles, and the numbers of parameters
    name: str = ""
    tiles: list[Tile]
    counts: dict[str, int]
    #: the previous adapter, and the paths of its layers
    previous: tuple[str, frozenset[str]] = ("", frozenset())

    def __init__(self, pool_or_model: Switch | torch.nn.Module, adapter_name: str | None = None):
        is_model = isinstance(pool_or_model, torch.nn.Module)
        self._switch = ModelSwitch(pool_or_model, {}, adapter_name) if is_model else pool_or_model
        self.model: torch.nn.Module = self._switch.model
        self.adapter_name: str = self._switch.adapter_name
        #: the root mean square of each layer's own weight, by path
        self._sizes: dict[str, float | None] = {}
        self.look()

    def look(self) -> None:
        """Read the model's numbers again. Swaps by other threads wait for the end."""
        with in_use(self.model):
            self._look()

    def look_now(self) -> None:
        """Look again if the model has changed. If a swap is writing or waiting, look a little later."""
        if self._note:
            # don't wait: a swap may wait for a thread that computes, and that thread for the end of a refresh
            with in_use_now(self.model) as is_mine:
                if is_mine:
                    self._look()
                else:
                    note_cell()

    def _look(self) -> None:
        slot = resolve_slot(self.model, self.adapter_name)
        masks = [_nonzero_components(layer) for layer in slot.layers]
        tiles = _tiles(slot, masks, self._sizes)
        name = whereabouts(self._switch) if self._switch.names else self.adapter_name
        state = dict(name=name, tiles=tiles, counts=_count(slot, masks), _seen=self._now())
        if self.name and name != self.name:
            state["previous"] = self.name, frozenset(tile.path for tile in self.tiles if tile.cells.any())
        with self._refreshes:  # all at once, or a refresh would show one adapter's name with another one's tiles
            vars(self).update(state)
        self._changed()

    @property
    def summary(self) -> str:
        """One line: the adapter, and the number of its layers."""
        self.look_now()
        active = sum(bool(tile.cells.any()) for tile in self.tiles)
        return "the adapter is off" if self.name == "off" else f"{self.name} is in {active} of {len(self.tiles)} layers"

    def figure(self, runs: Sequence[tuple[str, Run]] = (), text: str = "") -> Figure:
        """The tiles, labeled answers below them, and a bar with the numbers of the base and of the adapter."""
        answers, title = [(label, run.where, run.text, run.png) for label, run in runs], self.summary
        return drawn(self.tiles, self.name, title, self.counts, self.previous, answers, text or str(self))


# --- reading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _tiles(slot: Slot, masks: Sequence[torch.Tensor], sizes: dict[str, float | None]) -> list[Tile]:
    """A tile for each layer of the model's blocks and for each other layer of the adapter, in the model's order."""
    adapted = {layer.path: (layer, mask) for layer, mask in zip(slot.layers, masks, strict=True)}
    paths = [path for path, module in slot.walk if path in adapted or (_has_weight(module) and split(path)[0])]
    paths = [*dict.fromkeys([*paths, *adapted])]
    rows, columns = rows_and_columns(paths)
    n = CELLS if len(rows) <= LARGE[0] and len(columns) <= LARGE[1] else 1
    return [_tile(slot, path, n, sizes, adapted.get(path)) for path in paths]


def _has_weight(module: torch.nn.Module) -> bool:
    # the layer may have a different adapter
    weight = getattr(module, "base_layer", module)._parameters.get("weight")
    return weight is not None and (weight.dim() > 1 or not weight.is_floating_point())


def _tile(slot: Slot, path: str, n: int, sizes: dict[str, float | None], adapted: tuple | None) -> Tile:
    if adapted is None or is_off(adapted[0].module, slot.adapter_name):
        return Tile(path, torch.zeros(n, n, device="cpu"), "the base model alone")
    layer, mask = adapted
    cells = _rms(slot, layer, n)
    if cells is not None and path not in sizes:
        sizes[path] = _size(layer.module)
    size = None if cells is None else sizes[path]
    if size is None:  # one tint, because IA3, for example, multiplies
        is_on = any(tensor.memory.any() for tensor in layer.tensors)
        return Tile(path, torch.full((n, n), float(is_on), device="cpu"), "")
    cells = (cells / size).nan_to_num().cpu()
    if not cells.any():
        return Tile(path, cells, "the adapter is off here")
    rank, reserved = int(mask.sum()), len(mask)
    label = f"{100 * _root_mean_square(cells):.3g} % of the weight's size"
    label += f", rank {rank}" if reserved else ""
    label += f", padded to {reserved}" if rank < reserved else ""
    return Tile(path, cells, label)


def _size(module: torch.nn.Module) -> float | None:
    """The root mean square of a layer's own weight, or None if its weight isn't in memory."""
    base = getattr(module, "base_layer", module)
    weight = base._parameters.get("weight")
    return None if weight is None or weight.is_meta else _root_mean_square(dequantize_module_weight(base))


def _root_mean_square(values: torch.Tensor) -> float:
    return values.detach().float().square().mean().sqrt().item()


def _nonzero_components(layer: SlotLayer) -> torch.Tensor:
    """For each rank component, whether it is nonzero in any of the layer's tensors."""
    by_component = [t.memory.detach().movedim(t.rank_axis, 0) for t in layer.tensors if t.rank_axis is not None]
    size = min(map(len, by_component), default=0)
    masks = [(memory[:size] != 0).flatten(1).any(1) for memory in by_component]
    return torch.stack(masks).any(0) if masks else torch.zeros(0, dtype=torch.bool, device="cpu")


def _rms(slot: Slot, layer: SlotLayer, n: int) -> torch.Tensor | None:
    """The root mean square of the adapter's change to the weight, in n x n parts; None if the change isn't a sum.

    For a part of B A, it follows from the products of B's rows with one another and of A's columns. These matrices are
    r x r, so B A itself is never computed.
    """
    by_axis = {tensor.rank_axis: tensor.memory.detach().float() for tensor in layer.tensors}
    a, b = by_axis.get(0), by_axis.get(1)
    if a is not None and b is not None and len(layer.tensors) == 2 and a.shape[0] == b.shape[1]:
        columns, rows = a.flatten(1).tensor_split(n, 1), b.flatten(1).tensor_split(n, 0)
        of_a = torch.stack([part @ part.T / max(part.shape[1], 1) for part in columns]).flatten(1)
        of_b = torch.stack([part.T @ part / max(part.shape[0], 1) for part in rows]).flatten(1)
        scaling = getattr(layer.module, "scaling", {}).get(slot.adapter_name, 1.0)
        return (of_b @ of_a.T).clamp(min=0).sqrt() * abs(float(scaling))
    delta = getattr(layer.module, "get_delta_weight", None)
    if delta is None:
        return None
    squares = delta(slot.adapter_name).detach().float().flatten(1).square()
    return torch.nn.functional.adaptive_avg_pool2d(squares[None], n)[0].sqrt()


def _count(slot: Slot, masks: Sequence[torch.Tensor]) -> dict[str, int]:
    """The numbers of the base's parameters, of the adapter's, and of the zeros that pad it."""
    allocated, used = 0, 0
    for layer, mask in zip(slot.layers, masks, strict=True):
        for tensor in layer.tensors:
            size, axis = tensor.memory.numel(), tensor.rank_axis
            length = None if axis is None else tensor.memory.shape[axis]
            allocated += size
            used += size // length * int(mask.sum()) if length == len(mask) else size
    adapter = {id(tensor.parameter) for layer in slot.layers for tensor in layer.tensors}
    modules = (getattr(module, "base_layer", module) for _, module in slot.walk)
    parameters = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    base = sum(parameter.numel() for key, parameter in parameters.items() if key not in adapter)
    return {"base": base, "adapter": used, "padding": allocated - used}
