"""Commit: carries plans out, entirely or not at all."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Iterable, Sequence

import torch

from .change import apply
from .errors import HotswapError, refusal
from .guard import guard
from .plan import Plan

#: models whose user has been told that swaps recompile
_warned: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def commit(plan: Plan) -> None:
    """Carries out a plan.

    Parameters
    ----------
    plan:
        What :func:`hotswap_lab.plan_hotswap` returned. It is for the model as it was then: what would be written now is
        decided again, and refused where that is something else.

    Raises
    ------
    HotswapError
        If the plan was refused. Whatever is raised, from here or from below, the model is as it was.

    Examples
    --------
    >>> from hotswap_lab import commit, demo, plan_hotswap
    >>> model, tokenizer = demo.load("reverse")
    >>> commit(plan_hotswap(model, demo.adapter_path("caesar"), "default"))
    >>> demo.ask(model, tokenizer, "abc")
    'def'
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"commit() takes what plan_hotswap gives, a Plan: got a {type(plan).__name__}")
    commit_together([plan])


def commit_together(plans: Sequence[Plan]) -> None:
    """Carries out several plans, all of them or none: the parts of a pipeline, each with its own adapter.

    Raises
    ------
    HotswapError
        If any of them was refused. Whatever is raised, every model is as it was.
    """
    for plan in plans:
        plan.raise_if_refused()
    with guard(*(plan.slot.host.base for plan in plans)):
        carry_out([_decided_again(plan) for plan in plans])


def _decided_again(plan: Plan) -> Plan:
    now = plan.again()
    if plan.told not in (None, now.answer):
        changed = refusal("model_changed_since_plan", adapter_name=plan.slot.adapter_name, verdict=now.verdict)
        raise HotswapError(changed, *now.refusals)
    # the one that has been shown, unless somebody has changed it since
    is_same = plan.config.to_dict() == now.config.to_dict()
    return dataclasses.replace(now, config=plan.config) if is_same else now


def carry_out(plans: Iterable[Plan]) -> None:
    """Writes what was just decided. Nobody else uses the models from before that on."""
    plans = list(plans)
    for plan in plans:
        plan.raise_if_refused()
        if plan.will_recompile:
            _warn_of_recompiling(plan)
    apply([plan.change() for plan in plans])


def _warn_of_recompiling(plan: Plan) -> None:
    base = plan.slot.host.base
    if base in _warned:
        return
    _warned.add(base)
    warnings.warn(
        f"Swapping {plan.adapter.label} in changes shapes or numbers that the model was compiled for: its next call "
        "compiles again. Call prepare_model_for_compiled_hotswap after loading the first adapter and before "
        "compiling, to swap without recompiling. (Said once for this model.)",
        stacklevel=4,
    )
