"""PlanView: a table of what a swap would do to each layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..core.errors import refuse
from ..core.host import canonical_path
from ..core.plan import Action, LayerPlan, Plan
from ..core.report import bare_html_table, readable_bytes, text_table
from ..core.shadow import adaptable
from ..engine import plan_hotswap
from .view import FITS, View, escape, wrapping_row

if TYPE_CHECKING:
    import ipywidgets

#: how many layers are shown at once; a search finds the others
SHOWN = 100

EVERYTHING = "all"


@dataclass(frozen=True)
class PlanRow:
    """A line of the table, for one layer.

    ``rank`` is ``8 -> 2`` if it changes. ``nbytes`` is None if the swap is refused, or if only the total is known.
    """

    layer: str
    action: str
    rank: str
    scaling: str
    nbytes: int | None

    @property
    def cells(self) -> tuple[str, ...]:
        written = "-" if self.nbytes is None else readable_bytes(self.nbytes)
        return self.layer, self.action, self.rank, self.scaling, written


COLUMNS = ("layer", "action", "rank", "scaling", "written")


class PlanView(View):
    """A plan as a table with a summary and a search: each layer is copy, pad, resize, off, add or refused.

    Parameters
    ----------
    plan_or_model:
        A :class:`Plan`, or a model, together with ``adapter``. Nothing is written to it.
    adapter, adapter_name, **options:
        For a model: as for :func:`plan_hotswap`.

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

    How to read it: an action *refused* means that nothing would be written anywhere. The reasons are listed, too.
    """

    def __init__(
        self,
        plan_or_model: Plan | torch.nn.Module,
        adapter: object = None,
        adapter_name: str | None = None,
        **options: object,
    ):
        is_plan = isinstance(plan_or_model, Plan)
        if is_plan != (adapter is None):
            kind = type(plan_or_model).__name__
            raise refuse("plan_has_an_adapter", kind=kind) if is_plan else refuse("no_plan_to_show", kind=kind)
        self.plan: Plan = plan_or_model if is_plan else plan_hotswap(plan_or_model, adapter, adapter_name, **options)
        self._all = _rows(self.plan)
        #: words that all have to be in a layer's line
        self.search = ""
        self._action = EVERYTHING

    @property
    def counts(self) -> dict[str, int]:
        """The number of layers for each action."""
        return dict(Counter(row.action for row in self._all))

    @property
    def action(self) -> str:
        """The action to show, or ``"all"``. Can be set."""
        return self._action

    @action.setter
    def action(self, action: str) -> None:
        actions = [EVERYTHING, *self.counts]
        if action not in actions:
            raise ValueError(f"action must be one of {', '.join(actions)}: got {action!r}")
        self._action = action

    @property
    def rows(self) -> list[PlanRow]:
        """The lines that match the search and the action."""
        words = (self.search or "").lower().split()
        return [
            row
            for row in self._all
            if self._action in (EVERYTHING, row.action) and all(word in " ".join(row.cells).lower() for word in words)
        ]

    @property
    def summary(self) -> str:
        """One line: whether the swap is possible, and how many layers get each action."""
        counted = ", ".join(f"{count} {action}" for action, count in self.counts.items())
        return f"{self.plan.title}: {self.plan.verdict}. {len(self._all)} layers: {counted}"

    @property
    def _reasons(self) -> list[str]:
        return [*(f"note: {note}" for note in self.plan.notes), *map(str, self.plan.refusals)]

    def _shown(self) -> tuple[list[tuple[str, ...]], list[str]]:
        """The first lines, and a note if there are more of them, or none."""
        rows = self.rows
        if not rows:
            kind = f" and has the action {self.action}" if self.action != EVERYTHING else ""
            return [], [f"no layer matches {self.search!r}{kind}"] if self._all else []
        more = [f"... and {len(rows) - SHOWN} more layers: search for them"] if len(rows) > SHOWN else []
        return [row.cells for row in rows[:SHOWN]], more

    def __str__(self) -> str:
        rows, more = self._shown()
        table = text_table(COLUMNS, rows) if rows else []
        return "\n".join([self.summary, *self._reasons, *table, *more])

    def _inside(self) -> str:
        rows, more = self._shown()
        reasons = "".join(
            f'<pre style="white-space:pre-wrap;margin:4px 0">{escape(each)}</pre>' for each in self._reasons
        )
        table = f'<div class="hotswap-scroll" tabindex="0">{bare_html_table(COLUMNS, rows)}</div>' if rows else ""
        return reasons + table + "".join(f"<div>{escape(line)}</div>" for line in more)

    def _controls(self) -> list[ipywidgets.Widget]:
        import ipywidgets as w

        wide = w.Layout(width="320px", max_width=FITS)
        self._box = w.Text(description="search", placeholder="such as: layers.0 q_proj", layout=wide)
        self._when_set(self._box, lambda text: setattr(self, "search", text))
        options = [EVERYTHING, *self.counts]
        self._menu = w.Dropdown(options=options, description="action", layout=w.Layout(width="220px"))
        self._when_set(self._menu, lambda action: setattr(self, "action", action))
        return [wrapping_row(self._box, self._menu)]

    def _refresh(self) -> None:
        super()._refresh()
        self._box.value, self._menu.value = self.search or "", self._action
        self._status.value = f"{len(self.rows)} of {len(self._all)} layers"


def _rows(plan: Plan) -> list[PlanRow]:
    rows = [_row(layer, plan) for layer in plan.layers]
    if plan.refusals:
        # the plan has no entries for layers that the adapter has and the model's slot lacks
        planned = {path for layer in plan.layers for path in layer.layer.paths}
        found = (adaptable(plan.slot.host.base, canonical_path(key)) for key in plan.adapter.tensors)
        rows += [
            PlanRow(path, "refused", "-", "-", None) for path in dict.fromkeys(found) if path and path not in planned
        ]
    return rows


def _row(layer: LayerPlan, plan: Plan) -> PlanRow:
    _, rank, scaling = layer.row
    padded = layer.layer.tensors if layer.action is Action.PAD else ()
    room = [tensor.capacity for tensor in padded if tensor.capacity]
    too_small = bool(room) and (layer.rank_after or 0) > min(room)
    refused = too_small or (layer.action is Action.ADD and plan.refusals)
    return PlanRow(
        layer.path,
        "refused" if refused else str(layer.action),
        f"{rank}, room for {min(room)}" if too_small else "-" if rank == "none" else rank,
        scaling,
        # if PEFT loads the adapter next to the model, the plan has only the total
        None if plan.refusals or plan.differences is not None else layer.nbytes,
    )
