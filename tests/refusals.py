"""A refusal is an error of ours, and leaves alone what it was asked to change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from oracle import untouched

from hotswap_lab import AdapterPool, HotswapError, Plan


def refused(match: str | None, action: Callable, *arguments: object, **named: object) -> HotswapError:
    """Calls ``action``, which must be refused in these words, with all models that it was given left as they were."""
    given = [*arguments, *named.values(), getattr(action, "__self__", None)]
    models = [_model_of(each) for each in given]
    with contextlib.ExitStack() as stack:
        for model in models:
            if isinstance(model, torch.nn.Module):
                stack.enter_context(untouched(getattr(model, "_orig_mod", model)))
        with pytest.raises(HotswapError, match=match) as caught:
            action(*arguments, **named)
    return caught.value


def _model_of(given: object) -> object:
    if isinstance(given, Plan):
        return given.slot.host.root
    return given.model if isinstance(given, AdapterPool) else given
