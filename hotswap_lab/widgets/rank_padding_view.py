"""RankPaddingView: what room for a higher rank is made of, what it costs, and that it changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, inject_adapter_in_model

from .. import demo
from ..core import lora
from ..core.adapter import Adapter
from ..core.errors import refuse
from ..core.host import canonical_path
from ..core.prepare import prepare_model_for_compiled_hotswap
from ..lessons.figures import FROZEN, MUTED, NEW, OFF, Canvas, Figure
from .view import FITS, View, escape, fitting, speaking, wrapping_row

if TYPE_CHECKING:
    import ipywidgets

#: the slider goes to this, or to twice the adapter's own rank
HIGHEST = 64


@dataclass(frozen=True)
class Padded:
    """One layer in a model that was prepared for ``target_rank``.

    ``nbytes`` and ``flops`` (for each token, a multiplication and an addition counted as two) are pairs: as the
    adapter is, and padded. ``adapter_nbytes`` is the same for all layers together.
    """

    own_rank: int
    target_rank: int
    inputs: int
    outputs: int
    nbytes: tuple[int, int]
    flops: tuple[int, int]
    adapter_nbytes: tuple[int, int]
    unchanged: bool

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """What is compared, without and with padding."""
        w = 2 * self.inputs * self.outputs
        return [
            ("rank", str(self.own_rank), str(self.target_rank)),
            ("memory of this layer", *(f"{each:,} bytes" for each in self.nbytes)),
            ("memory of the whole adapter", *(f"{each:,} bytes" for each in self.adapter_nbytes)),
            ("flops per token, this layer", *(f"{each:,}" for each in self.flops)),
            ("beside those of W", *(f"{each / w:.1%}" for each in self.flops)),
        ]


class RankPaddingView(View):
    """A and B of one layer, padded to a target rank, as a picture; memory and flops beside it; a slider.

    Every position of the slider makes a small model of that layer, prepares it with
    :func:`prepare_model_for_compiled_hotswap` and compares its outputs with those from before.

    Parameters
    ----------
    adapter:
        A folder, a Hub id or an :class:`Adapter`. Default: ``reverse``, which ships with the package.
    layer:
        Which layer to begin with. Default: the first one that is a plain matrix.
    target_rank:
        Where the slider begins. Default: twice the layer's own rank.

    Examples
    --------
    >>> from hotswap_lab.widgets import RankPaddingView
    >>> view = RankPaddingView(target_rank=32)
    >>> view.padded.nbytes, view.unchanged
    ((18432, 73728), True)
    >>> view.target_rank = 64
    >>> view.padded.flops
    (9216, 73728)

    How to read it: four times the rank takes four times the memory and arithmetic, and the output stays as it was.
    """

    def __init__(self, adapter: object = None, layer: str | None = None, target_rank: int | None = None):
        source = demo.adapter_path("reverse") if adapter is None else adapter
        self.adapter = source if isinstance(source, Adapter) else Adapter.load(source)
        self._pairs = _pairs(self.adapter)
        if not self._pairs:
            raise refuse(
                "There is nothing to pad.",
                found=f"{self.adapter.label}, without a pair of matrices lora_A and lora_B",
                expected="a LoRA adapter of linear layers",
                next_step="pass another adapter",
            )
        self._layer = next(iter(self._pairs))
        if layer is not None:
            self._check_layer(layer)
            self._layer = layer
        self._target = 0
        self._set_target(2 * self.own_rank if target_rank is None else target_rank)

    @property
    def layers(self) -> list[str]:
        """The layers that can be looked at."""
        return list(self._pairs)

    @property
    def layer(self) -> str:
        """The layer that is shown. May be set."""
        return self._layer

    @layer.setter
    def layer(self, path: str) -> None:
        self._check_layer(path)
        self._layer = path
        self._set_target(max(self._target, self.own_rank))

    def _check_layer(self, path: str) -> None:
        if path not in self._pairs:
            raise ValueError(f"the adapter has no layer {path!r}; layers are {', '.join(self.layers[:3])}, ...")

    @property
    def own_rank(self) -> int:
        """The adapter's own rank in this layer."""
        return self._pairs[self._layer][0].shape[0]

    @property
    def highest(self) -> int:
        """How far the slider goes."""
        return max(HIGHEST, 2 * self.own_rank)

    @property
    def target_rank(self) -> int:
        """The rank to make room for: the own rank at least. May be set."""
        return self._target

    @target_rank.setter
    def target_rank(self, rank: int) -> None:
        self._set_target(rank)

    def _set_target(self, rank: int) -> None:
        if not isinstance(rank, int) or not self.own_rank <= rank <= self.highest:
            raise ValueError(f"the target rank must be {self.own_rank} to {self.highest}: got {rank!r}")
        self._target = rank
        self.padded = self._pad()
        self._changed()

    @property
    def unchanged(self) -> bool:
        """Whether the prepared layer gave the same outputs, up to rounding."""
        return self.padded.unchanged

    def _pad(self) -> Padded:
        a, b = self._pairs[self._layer]
        own, inputs, outputs = a.shape[0], a.shape[1], b.shape[0]
        model, layer = _one_layer(a, b, lora.settings_for(self.adapter.config, self._layer))
        x = torch.randn(4, inputs, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = model(x)
            prepare_model_for_compiled_hotswap(model, target_rank=self._target)
            after = model(x)
        held = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        rank = held[0].shape[0]
        size = held[0].element_size()  # PEFT loads half precision as float32
        wholes = [
            sum((a.shape[1] + b.shape[0]) * max(a.shape[0], least) for a, b in self._pairs.values())
            for least in (0, rank)
        ]
        return Padded(
            own,
            rank,
            inputs,
            outputs,
            nbytes=((a.numel() + b.numel()) * size, sum(each.numel() for each in held) * size),
            flops=(2 * (a.numel() + b.numel()), 2 * sum(each.numel() for each in held)),
            adapter_nbytes=(wholes[0] * size, wholes[1] * size),
            unchanged=torch.allclose(before, after, rtol=1e-4, atol=1e-5 * max(1.0, before.abs().max().item())),
        )

    # ---- how it looks

    @property
    def summary(self) -> str:
        """One line: the layer, its rank, and what it is padded to."""
        return f"{self._layer}: rank {self.own_rank} in room for {self.target_rank}"

    def __str__(self) -> str:
        lines = [f"  {what + ':':29}{without} -> {padded}" for what, without, padded in self.padded.rows]
        return "\n".join([f"RankPaddingView, {self.summary}", *lines, f"  output unchanged: {self.padded.unchanged}"])

    def figure(self, numbers: bool = True) -> Figure:
        """The picture; with ``numbers``, memory and flops are in it."""
        own, rank, inputs, outputs = self.own_rank, self.padded.target_rank, self.padded.inputs, self.padded.outputs
        side, longest, top = 130, 150, 58  # of B and A: the side that is not the rank, and the slider's whole range
        canvas = Canvas(660, 400 if numbers else 262)
        length, filled = longest * rank / self.highest, longest * own / self.highest
        canvas.text(330, 26, f"B and A of {self._layer}, in room for rank {rank}", size=14)
        left = 30.0
        canvas.box(left, top, length, side, OFF, dashed=True)
        canvas.box(left, top, filled, side, NEW)
        canvas.text(left + length / 2, top - 8, "B", size=14)
        canvas.text(left, top + side + 18, f"{outputs} × {rank}", size=12, anchor="start", color=MUTED)
        canvas.text(left + longest + 24, top + side / 2 + 6, "·", size=20)
        left += longest + 50
        canvas.box(left, top, side, length, OFF, dashed=True)
        canvas.box(left, top, side, filled, NEW)
        canvas.text(left + side / 2, top - 8, "A", size=14)
        canvas.text(left + side + 8, top + 14, f"{rank} × {inputs}", size=12, anchor="start", color=MUTED)
        canvas.text(left + side + 62, top + side / 2 + 6, "=", size=20)
        left += side + 100
        canvas.box(left, top, side, side, FROZEN)
        canvas.text(left + side / 2, top + side / 2 - 2, "B · A", size=15)
        same = "unchanged" if self.unchanged else "CHANGED"
        canvas.text(left + side / 2, top + side / 2 + 18, same, size=12, color=MUTED)
        canvas.text(left + side / 2, top + side + 18, f"{outputs} × {inputs}", size=12, color=MUTED)
        y = top + longest + 40
        canvas.box(30, y - 12, 14, 14, NEW)
        canvas.text(52, y, f"the adapter's own rank, {own}", size=12, anchor="start", color=MUTED)
        canvas.box(270, y - 12, 14, 14, OFF, dashed=True)
        canvas.text(292, y, f"zeros up to rank {rank}", size=12, anchor="start", color=MUTED)
        if numbers:
            for number, (what, without, padded) in enumerate(self.padded.rows[1:], start=1):
                canvas.text(30, y + 12 + 22 * number, what, anchor="start")
                canvas.text(400, y + 12 + 22 * number, f"{without}", anchor="end", color=MUTED)
                canvas.text(410, y + 12 + 22 * number, f"→  {padded}", anchor="start")
            canvas.text(30, y + 12 + 22 * 5, f"output unchanged: {self.unchanged}", anchor="start")
        return canvas.figure(str(self))

    def to_html(self) -> str:
        """The static form: the picture and the figures below it."""
        return f"<div>{fitting(self.figure(numbers=False).svg)}{self._table()}</div>"

    def _static(self) -> dict[str, str]:
        # GitHub shows a picture that stands alone, and takes one in HTML out
        return {"image/svg+xml": self.figure().svg, "text/plain": str(self)}

    def _table(self) -> str:
        body = "".join(
            f'<tr><th scope="row" align="left">{escape(what)}</th><td align="right">{without}</td>'
            f'<td align="right">{padded}</td></tr>'
            for what, without, padded in self.padded.rows
        )
        head = '<tr><td></td><th scope="col">as it is</th><th scope="col">padded</th></tr>'
        return f"<table>{head}{body}</table><div>output unchanged: <strong>{self.unchanged}</strong></div>"

    def _build(self) -> list[ipywidgets.Widget]:
        import ipywidgets as w

        self._menu = w.Dropdown(
            options=self.layers,
            value=self._layer,
            description="layer",
            layout=w.Layout(width="400px", max_width=FITS),
        )
        self._when_set(self._menu, self._picked)
        self._slider = w.IntSlider(
            min=self.own_rank,
            max=self.highest,
            value=self._target,
            description="target rank",
            layout=w.Layout(width="400px", max_width=FITS),
        )
        self._when_set(self._slider, self._slid)
        self._picture = w.HTML()
        self._numbers = speaking()
        return [
            w.HTML(f"<strong>RankPaddingView</strong>: {escape(self.adapter.label)}"),
            wrapping_row(self._menu, self._slider),
            self._picture,
            self._numbers,
        ]

    def _picked(self, change: Mapping[str, object]) -> None:
        if change["new"] != self._layer:
            self.layer = change["new"]

    def _slid(self, change: Mapping[str, object]) -> None:
        # a page may show the range of another layer for a moment
        if change["new"] != self._target and self.own_rank <= change["new"] <= self.highest:
            self.target_rank = change["new"]

    def _refresh(self) -> None:
        self._menu.value = self._layer
        low, high, value = self.own_rank, self.highest, self._target
        with self._slider.hold_trait_notifications():  # never a minimum above the maximum in between
            self._slider.min, self._slider.max, self._slider.value = low, high, value
        self._picture.value = fitting(self.figure(numbers=False).svg)
        self._numbers.value = self._table()


def _pairs(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The matrices of each linear layer, by the layer's path."""
    pairs = {}
    for key, a in adapter.tensors.items():
        b = adapter.tensors.get(key.replace(".lora_A.", ".lora_B."))
        if key.endswith(".lora_A.weight") and a.dim() == 2 and b is not None and b.dim() == 2:
            pairs[canonical_path(key.removesuffix(".lora_A.weight"))] = a, b
    return dict(sorted(pairs.items()))


class _Layer(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.layer = torch.nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _one_layer(a: torch.Tensor, b: torch.Tensor, settings: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model of this one layer, with zeros for W so that nothing hides a change of ``B @ A``."""
    rank, alpha = a.shape[0], settings.alpha
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=settings.use_rslora, target_modules=["layer"])
    model = inject_adapter_in_model(config, _Layer(a.shape[1], b.shape[0])).eval()
    with torch.no_grad():
        model.layer.base_layer.weight.zero_()
        model.layer.lora_A["default"].weight.copy_(a)
        model.layer.lora_B["default"].weight.copy_(b)
    return model, model.layer
