"""RankPaddingView: shows how padding to a higher rank works, what it costs, and that outputs stay the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, inject_adapter_in_model

from .. import demo
from ..core import lora
from ..core.errors import refuse
from ..core.host import canonical_path
from ..core.report import readable_bytes
from ..figures import Canvas, Figure
from ..figures.palette import ADAPTER, BASE, MUTED, OFF
from ..files.reading import Adapter
from ..swap import prepare_model_for_compiled_hotswap
from .view import FITS, View, wrapping_row

if TYPE_CHECKING:
    import ipywidgets

#: the slider's end, unless twice the adapter's highest rank is larger
HIGHEST = 64
#: bytes of each number, since PEFT loads half precision as float32
NBYTES = 4


class RankPaddingView(View):
    """A picture of a layer's A and B padded to a target rank, with their memory and flops, and a slider for the rank.

    For every position of the slider, it makes a small model of that layer, prepares it with
    :func:`prepare_model_for_compiled_hotswap` and compares its outputs with those from before.

    Parameters
    ----------
    adapter:
        A folder, a Hub id or an :class:`Adapter`. Default: ``reverse``, which ships with the package.
    layer:
        The first layer to show. Default: the first linear layer.
    target_rank:
        The slider's first position. Default: twice the layer's own rank.

    Examples
    --------
    >>> from hotswap_lab.widgets import RankPaddingView
    >>> view = RankPaddingView(target_rank=32)
    >>> view.nbytes, view.unchanged
    ((18432, 73728), True)
    >>> view.target_rank = 64
    >>> view.flops
    (9216, 73728)

    How to read it: four times the rank takes four times the memory and arithmetic, and the output stays the same.
    """

    def __init__(self, adapter: object = None, layer: str | None = None, target_rank: int | None = None):
        source = demo.adapter_path("reverse") if adapter is None else adapter
        self.adapter: Adapter = source if isinstance(source, Adapter) else Adapter.load(source)
        self._pairs = _pairs(self.adapter)
        if not self._pairs:
            raise refuse("nothing_to_pad", label=self.adapter.label)
        self._target = 0
        self.layer = next(iter(self._pairs)) if layer is None else layer
        self.target_rank = 2 * self.own_rank if target_rank is None else target_rank

    @property
    def layers(self) -> list[str]:
        """The layers that can be shown."""
        return list(self._pairs)

    @property
    def layer(self) -> str:
        """The layer that is shown. Can be set."""
        return self._layer

    @layer.setter
    def layer(self, path: str) -> None:
        if path not in self._pairs:
            raise ValueError(f"the adapter has no layer {path!r}; layers are {', '.join(self.layers[:3])}, ...")
        self._layer = path
        self.target_rank = max(self._target, self.own_rank)

    @property
    def own_rank(self) -> int:
        """The adapter's own rank in this layer."""
        return self._pairs[self._layer][0].shape[0]

    @property
    def highest(self) -> int:
        """The slider's end."""
        return max(HIGHEST, *(2 * a.shape[0] for a, _ in self._pairs.values()))

    @property
    def target_rank(self) -> int:
        """The rank to make room for, at least the adapter's own. Can be set."""
        return self._target

    @target_rank.setter
    def target_rank(self, rank: int) -> None:
        if not isinstance(rank, int) or not self.own_rank <= rank <= self.highest:
            raise ValueError(f"the target rank must be {self.own_rank} to {self.highest}: got {rank!r}")
        self._target = rank
        #: whether the prepared layer gave the same outputs, up to rounding
        self.unchanged: bool = self._is_unchanged()

    def _is_unchanged(self) -> bool:
        a, b = self._pairs[self._layer]
        settings = lora.settings_for(self.adapter.config, self._layer)
        options = dict(r=self.own_rank, lora_alpha=settings.alpha, use_rslora=settings.use_rslora)
        linear = torch.nn.Linear(a.shape[1], b.shape[0], bias=False)
        model = torch.nn.Sequential(linear).eval()
        inject_adapter_in_model(LoraConfig(**options, target_modules=["0"]), model)
        x = torch.randn(4, a.shape[1], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            linear.weight.zero_()  # so that the base output can't hide a change of B @ A
            model[0].lora_A["default"].weight.copy_(a)
            model[0].lora_B["default"].weight.copy_(b)
            before = model(x)
            prepare_model_for_compiled_hotswap(model, target_rank=self._target)
            return torch.allclose(before, model(x), rtol=1e-4, atol=1e-5 * max(1.0, before.abs().max().item()))

    # ---- numbers: with the adapter's own rank, and padded

    @property
    def nbytes(self) -> tuple[int, int]:
        """The bytes of this layer's A and B: with the own rank, and padded."""
        return self._count(NBYTES, self._layer)

    @property
    def flops(self) -> tuple[int, int]:
        """The operations of this layer's A and B for each token: a multiplication and an addition for each number."""
        return self._count(2, self._layer)

    def _count(self, factor: int, *layers: str) -> tuple[int, int]:
        pairs = [self._pairs[layer] for layer in layers]
        return tuple(
            factor * sum(max(a.shape[0], rank) * (a.shape[1] + b.shape[0]) for a, b in pairs)
            for rank in (0, self._target)
        )

    @property
    def _table(self) -> list[tuple[str, str, str]]:
        a, b = self._pairs[self._layer]
        of_w = 2 * a.shape[1] * b.shape[0]
        return [
            ("rank", str(self.own_rank), str(self._target)),
            ("memory of this layer", *map(readable_bytes, self.nbytes)),
            ("memory of the whole adapter", *map(readable_bytes, self._count(NBYTES, *self._pairs))),
            ("flops per token, this layer", *(f"{each:,}" for each in self.flops)),
            ("compared with W's own", *(f"{each / of_w:.1%}" for each in self.flops)),
        ]

    # ---- text, picture and controls

    @property
    def summary(self) -> str:
        """One line: the layer, its rank, and the padded rank."""
        return f"{self._layer}: rank {self.own_rank} in room for {self._target}"

    def __str__(self) -> str:
        lines = [f"  {what + ':':29}{own} -> {padded}" for what, own, padded in self._table]
        return "\n".join([f"RankPaddingView, {self.summary}", *lines, f"  output unchanged: {self.unchanged}"])

    def figure(self) -> Figure:
        """A picture of padded A and B, their product, and their memory and flops."""
        a, b = self._pairs[self._layer]
        longest, top = 150, 58
        scale = longest / max(*a.shape, *b.shape, self.highest)
        # a rank too thin to be seen is drawn larger
        is_true = scale * self.own_rank >= 2
        thick = scale if is_true else longest / self.highest
        room, own, most = (thick * rank for rank in (self._target, self.own_rank, self.highest))
        outputs, inputs = scale * b.shape[0], scale * a.shape[1]
        product = f"B · A, {'unchanged' if self.unchanged else 'CHANGED'}"
        low = top + max(outputs, most)
        canvas = Canvas(660, int(low) + 192)
        canvas.text(330, 26, f"B and A of {self._layer}, in room for rank {self._target}", size=14)
        for name, left, whole, filled, color, shape in (
            ("B", 30, (room, outputs), (own, outputs), ADAPTER, f"{b.shape[0]} × {self._target}"),
            ("A", 230, (inputs, room), (inputs, own), ADAPTER, f"{self._target} × {a.shape[1]}"),
            (product, 460, (inputs, outputs), (inputs, outputs), BASE, f"{b.shape[0]} × {a.shape[1]}"),
        ):
            canvas.box(left, top, *whole, OFF, dashed=True)
            canvas.box(left, top, *filled, color)
            canvas.text(left, top - 8, name, size=14, anchor="start")
            canvas.text(left, low + 18, shape, size=12, anchor="start", color=MUTED)
        canvas.text(204, (top + low) / 2, "·", size=20)
        canvas.text(422, (top + low) / 2, "=", size=20)
        legend = f"Filled: the adapter's own rank, {self.own_rank}. Dashed: zeros up to rank {self._target}. "
        legend += "Drawn to scale." if is_true else "Ranks are not to scale."
        canvas.text(30, low + 50, legend, size=12, anchor="start", color=MUTED)
        for number, (what, own, padded) in enumerate(self._table[1:], start=1):
            y = low + 50 + 26 * number
            canvas.text(30, y, what, anchor="start")
            canvas.text(400, y, own, anchor="end", color=MUTED)
            canvas.text(410, y, f"→  {padded}", anchor="start")
        return canvas.figure(str(self))

    def _controls(self) -> list[ipywidgets.Widget]:
        import ipywidgets as w

        wide = w.Layout(width="400px", max_width=FITS)
        self._menu = w.Dropdown(options=self.layers, description="layer", layout=wide)
        self._when_set(self._menu, lambda layer: setattr(self, "layer", layer))
        self._slider = w.IntSlider(max=self.highest, description="target rank", layout=wide)
        # for a moment, the page may still have another layer's range
        self._when_set(self._slider, lambda rank: setattr(self, "target_rank", max(rank, self.own_rank)))
        return [wrapping_row(self._menu, self._slider)]

    def _refresh(self) -> None:
        super()._refresh()
        self._menu.value = self._layer
        self._slider.min, self._slider.value = self.own_rank, self._target
        self._status.value = f"output unchanged: <strong>{self.unchanged}</strong>"


def _pairs(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each linear layer, by the layer's path."""
    pairs = {}
    for key, a in adapter.tensors.items():
        b = adapter.tensors.get(key.replace(".lora_A.", ".lora_B."))
        if key.endswith(".lora_A.weight") and a.dim() == 2 and b is not None and b.dim() == 2:
            pairs[canonical_path(key.removesuffix(".lora_A.weight"))] = a, b
    return dict(sorted(pairs.items()))
