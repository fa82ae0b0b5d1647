"""Commit: carries plans out, entirely or not at all."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

import torch

from .change import apply
from .decide import make_plan
from .errors import HotswapError, refusal
from .guard import guard
from .host import find_host
from .plan import Plan
from .slot import slot_for

RECOMPILES = (
    "this changes shapes or numbers that the model was compiled for, and its next call compiles again; to swap without "
    "recompiling, call prepare_model_for_compiled_hotswap after loading the first adapter and before compiling"
)
#: by base model, what its user has been warned of
_said: weakref.WeakKeyDictionary[torch.nn.Module, set[str]] = weakref.WeakKeyDictionary()


def commit(*plans: Plan) -> None:
    """Carries out a plan; or several, all of them or none: the parts of a pipeline, each with its own adapter.

    Parameters
    ----------
    *plans:
        What :func:`hotswap_lab.plan_hotswap` returned. It is for the model as it was then: what would be written now is
        decided again, and refused where that is something else.

    Raises
    ------
    HotswapError
        If a plan was refused. Whatever is raised, from here or from below, every model is as it was.

    Examples
    --------
    >>> from hotswap_lab import commit, demo, plan_hotswap
    >>> model, tokenizer = demo.load("reverse")
    >>> commit(plan_hotswap(model, demo.adapter_path("caesar"), "default"))
    >>> demo.ask(model, tokenizer, "abc")
    'def'
    """
    for plan in plans:
        if not isinstance(plan, Plan):
            raise TypeError(f"commit() takes what plan_hotswap gives, a Plan: got a {type(plan).__name__}")
        plan.raise_if_refused()
    with guard(*(plan.slot.host.base for plan in plans)):
        carry_out([_decided_again(plan) for plan in plans])


def _decided_again(plan: Plan) -> Plan:
    name = plan.slot.adapter_name
    slot = slot_for(find_host(plan.slot.host.root, name), name)
    now = make_plan(
        slot, plan.adapter, add_layers=plan.add_layers, check_targets=plan.check_targets, base_weights=plan.base_weights
    )
    if plan.told not in (None, now.answer):
        changed = refusal("model_changed_since_plan", adapter_name=name, verdict=now.verdict)
        raise HotswapError(changed, *now.refusals)
    return now


def carry_out(plans: Sequence[Plan]) -> None:
    """Writes what was just decided. Nobody else uses the models from before that on."""
    for plan in plans:
        plan.raise_if_refused()
        warn_of(plan)
    apply([plan.change() for plan in plans])


def warn_of(plan: Plan) -> None:
    """Says what has to be said once for each model."""
    said = _said.setdefault(plan.slot.host.base, set())
    for text in [*plan.warnings, *([RECOMPILES] if plan.will_recompile else [])]:
        if text not in said:
            said.add(text)
            warnings.warn(f"{plan.title}: {text}. (Said once for this model.)", stacklevel=4)
