"""A refusal is an error of ours, and leaves alone what it was asked to change; asked again, it is the same."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracle import assert_same, files_in, untouched

from hotswap_lab import AdapterPool, HotswapError, Plan


def refused(match: str | None, action: Callable, *arguments: object, **named: object) -> HotswapError:
    """Calls ``action`` twice: it must be refused in these words, both times in the same ones.

    All models, pools, plans and folders are left as they were: those that are given to it, and those it belongs to.
    So are the filters of all loggers.
    """
    function = getattr(action, "__func__", action)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    given = [*arguments, *named.values(), getattr(action, "__self__", None), *cells]
    paths = [Path(each) for each in given if isinstance(each, (str, os.PathLike)) and os.path.isabs(each)]
    models = [model for each in given for model in _models_of(each)]
    texts = []
    with contextlib.ExitStack() as stack:
        for model in {id(each): each for each in models}.values():
            stack.enter_context(untouched(getattr(model, "_orig_mod", model)))
        stack.enter_context(_kept(paths))
        filters = _filters()
        for _ in range(2):
            with pytest.raises(HotswapError, match=match) as caught:
                action(*arguments, **named)
            texts.append(str(caught.value))
        assert _filters() == filters
    assert texts[1] == texts[0], "refused in other words the second time"
    return caught.value


def _filters() -> dict[str, list]:
    loggers = logging.root.manager.loggerDict.items()
    return {name: [*each.filters] for name, each in loggers if getattr(each, "filters", None)}


@contextlib.contextmanager
def _kept(paths: list[Path]) -> Iterator[None]:
    """The block leaves these files and folders alone, and makes none where there are none."""

    def now() -> dict:
        return {str(path): [[each.exists() for each in (path, *path.parents)], files_in(path)] for path in paths}

    before = now()
    yield
    assert_same(now(), before)


def _models_of(given: object) -> list:
    if isinstance(given, (torch.nn.Module, AdapterPool)):
        return [given]
    if isinstance(given, Plan):
        return [given.slot.host.root]
    parts = getattr(given, "components", None)  # a pipeline's
    return [each for each in parts.values() if isinstance(each, torch.nn.Module)] if isinstance(parts, dict) else []
