"""PlanView: the dry run of a swap, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..core.errors import refuse
from ..core.host import canonical_path
from ..core.hotswap import plan_hotswap
from ..core.plan import Action, LayerPlan, Plan
from ..core.shadow import adaptable
from .view import FITS, View, escape, speaking, wrapping_row

if TYPE_CHECKING:
    import ipywidgets

#: how many layers are shown at once; a search finds the others
SHOWN = 200
#: and how many are stored with a notebook
STORED = 40

EVERYTHING = "all"


@dataclass(frozen=True)
class PlanRow:
    """What a plan says of one layer. ``rank`` reads ``8 -> 2`` where it changes; ``nbytes`` may be unknown."""

    layer: str
    action: str
    rank: str
    scaling: str
    nbytes: int | None

    @property
    def cells(self) -> tuple[str, ...]:
        return self.layer, self.action, self.rank, self.scaling, "-" if self.nbytes is None else f"{self.nbytes:,}"


COLUMNS = ("layer", "action", "rank", "scaling", "bytes written")


class PlanView(View):
    """A plan as a table: for each layer copy, pad, resize, off, add or refused, with a summary first and a search.

    Parameters
    ----------
    plan_or_model:
        A :class:`Plan`, or a model; then ``adapter`` says what would be swapped in. Nothing is written.
    adapter, adapter_name, **options:
        With a model: as for :func:`plan_hotswap`.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> from hotswap_lab.widgets import PlanView
    >>> model, _ = demo.load("reverse")
    >>> view = PlanView(model, demo.adapter_path("double"))
    >>> view.counts
    {'resize': 16, 'off': 12}
    >>> view.search, view.action = "layers.0 down", "off"
    >>> print(view.rows[0])
    PlanRow(layer='model.layers.0.mlp.down_proj', action='off', rank='8 -> off', scaling='-', nbytes=4608)

    How to read it: an action *refused* means that nothing would be written anywhere; the reasons stand below.
    """

    def __init__(
        self,
        plan_or_model: Plan | torch.nn.Module,
        adapter: object = None,
        adapter_name: str = "default",
        **options: object,
    ):
        if isinstance(plan_or_model, Plan):
            if adapter is not None:
                raise refuse(
                    "A plan is for one adapter already.",
                    found="a Plan, and an adapter beside it",
                    expected="a Plan, or a model and an adapter",
                    next_step="pass one of these",
                )
            self.plan = plan_or_model
        elif adapter is None:
            raise refuse(
                "There is no plan to show.",
                found=f"a {type(plan_or_model).__name__} without an adapter",
                expected="a Plan, or a model and the adapter that would be swapped in",
                next_step="pass plan_hotswap(model, adapter), or both to PlanView",
            )
        else:
            self.plan = plan_hotswap(plan_or_model, adapter, adapter_name, **options)
        self._all = _rows(self.plan)
        self._search, self._action = "", EVERYTHING

    @property
    def counts(self) -> dict[str, int]:
        """How many layers of each action there are."""
        return dict(Counter(row.action for row in self._all))

    @property
    def search(self) -> str:
        """Words that a layer's row must contain, all of them. May be set."""
        return self._search

    @search.setter
    def search(self, text: str) -> None:
        self._search = text or ""
        self._changed()

    @property
    def action(self) -> str:
        """The action to show, or ``"all"``. May be set."""
        return self._action

    @action.setter
    def action(self, action: str) -> None:
        if action not in self._actions:
            raise ValueError(f"action must be one of {', '.join(self._actions)}: got {action!r}")
        self._action = action
        self._changed()

    @property
    def _actions(self) -> list[str]:
        return [EVERYTHING, *self.counts]

    @property
    def rows(self) -> list[PlanRow]:
        """The rows that the search and the action leave."""
        words = self._search.lower().split()
        return [
            row
            for row in self._all
            if self._action in (EVERYTHING, row.action) and all(word in " ".join(row.cells).lower() for word in words)
        ]

    @property
    def summary(self) -> str:
        """One line: whether the swap is possible, and what happens to how many layers."""
        counted = ", ".join(f"{count} {action}" for action, count in self.counts.items())
        return f"{self.plan.title}: {self.plan.verdict}. {len(self._all)} layers: {counted}"

    def __str__(self) -> str:
        reasons = [*(f"note: {note}" for note in self.plan.notes), *map(str, self.plan.refusals)]
        rows = self.rows[:STORED]
        table = [COLUMNS, *(row.cells for row in rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([self.summary, *reasons, *lines, *self._more(len(rows))])

    def _more(self, shown: int) -> list[str]:
        more = len(self.rows) - shown
        return [f"... and {more} more layers: search for them"] if more else []

    def to_html(self) -> str:
        """The static form: summary and reasons, then the table."""
        return f"<div>{self._head()}{self._table(STORED)}</div>"

    def _head(self) -> str:
        reasons = "".join(
            f'<pre style="white-space:pre-wrap;margin:4px 0">{escape(reason)}</pre>'
            for reason in (*self.plan.notes, *self.plan.refusals)
        )
        return f"<strong>PlanView</strong>: {escape(self.summary)}{reasons}"

    def _table(self, limit: int) -> str:
        rows = self.rows[:limit]
        head = "".join(f'<th scope="col" align="left">{name}</th>' for name in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f'<td align="left">{escape(cell)}</td>' for cell in row.cells) + "</tr>" for row in rows
        )
        more = "".join(f"<div>{escape(line)}</div>" for line in self._more(len(rows)))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"

    def _build(self) -> list[ipywidgets.Widget]:
        import ipywidgets as w

        self._box = w.Text(
            description="search",
            placeholder="such as: layers.0 q_proj",
            layout=w.Layout(width="320px", max_width=FITS),
        )
        self._when_set(self._box, self._typed)
        self._menu = w.Dropdown(options=self._actions, description="action", layout=w.Layout(width="220px"))
        self._when_set(self._menu, self._picked)
        self._count, self._body = speaking(), w.HTML()
        return [w.HTML(self._head()), wrapping_row(self._box, self._menu), self._count, self._body]

    def _typed(self, change: Mapping[str, object]) -> None:
        self.search = change["new"]

    def _picked(self, change: Mapping[str, object]) -> None:
        self.action = change["new"]

    def _refresh(self) -> None:
        self._box.value, self._menu.value = self._search, self._action
        self._count.value = f"{len(self.rows)} of {len(self._all)} layers"
        self._body.value = f'<div class="hotswap-scroll" tabindex="0">{self._table(SHOWN)}</div>'


def _rows(plan: Plan) -> list[PlanRow]:
    grafted = _grafted_nbytes(plan) if plan.grafting else {}
    rows = [_row(layer, plan, grafted) for layer in plan.layers]
    if plan.refusals:
        # layers that the adapter has and the model's slot lacks are in no layer plan
        planned = {path for layer in plan.layers for path in layer.layer.paths}
        base = plan.slot.host.base
        found = (adaptable(base, canonical_path(key)) for key in plan.adapter.tensors)
        rows += [
            PlanRow(path, "refused", "-", "-", None) for path in dict.fromkeys(found) if path and path not in planned
        ]
    return rows


def _grafted_nbytes(plan: Plan) -> dict[str, int]:
    """What is written to each layer where PEFT loads the adapter beside the model: the plan counts it all together.

    What several layers share is counted in the first of them; what an added layer gets is made, not written.
    """
    graft = plan.grafting.graft
    sizes = {id(target): target.nbytes for target, _ in (*graft.copies, *plan.grafting.base.copies)}
    sizes |= {id(parameter): source.nbytes for parameter, source in graft.resizes}
    return {
        layer.path: sum(
            sizes.pop(id(tensor), 0) for tensor in (*layer.layer.module.parameters(), *layer.layer.module.buffers())
        )
        for layer in plan.layers
    }


def _row(layer: LayerPlan, plan: Plan, grafted: Mapping[str, int]) -> PlanRow:
    scaling = getattr(layer.settings, "scaling", None)
    room = [tensor.target.capacity for tensor in layer.tensors if tensor.fixed_size and tensor.target.capacity]
    too_small = bool(room) and (layer.rank_after or 0) > min(room)
    refused = too_small or (layer.action is Action.ADD and _refuses_layers(plan))
    if refused or (plan.grafting and (plan.refusals or layer.action is Action.ADD)):
        nbytes = None  # of a swap that is refused nobody has looked at everything
    elif plan.grafting:
        nbytes = grafted[layer.path]
    else:
        nbytes = sum(tensor.nbytes for tensor in layer.tensors)
    return PlanRow(
        layer.path,
        "refused" if refused else str(layer.action),
        f"{_rank(layer)}, room for {min(room)}" if too_small else _rank(layer),
        "-" if scaling is None else f"{scaling:.4g}",
        nbytes,
    )


def _refuses_layers(plan: Plan) -> bool:
    """Whether the layers that would be added are among the reasons: then a refusal names some of them."""
    added = [layer.path for layer in plan.layers if layer.action is Action.ADD]
    return any(path in refusal.found for refusal in plan.refusals for path in added)


def _rank(layer: LayerPlan) -> str:
    before, after = layer.rank_before, layer.rank_after
    if layer.settings is not None and after is None:
        return "-"  # a method without ranks
    if before == after:
        return "off" if after is None else str(after)
    return f"{'none' if before is None else before} -> {'off' if after is None else after}"
