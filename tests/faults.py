"""Faults at every line: runs something and raises at the n-th line of the package that it comes to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

import hotswap_lab

PACKAGE = str(Path(hotswap_lab.__file__).parent)


class Fault(BaseException):
    """No code that catches Exception gets to see this one."""


def run_with_fault(action: Callable[[], object], step: int) -> bool:
    """Runs ``action`` and raises at the ``step``-th line of the package; False if there are fewer lines.

    The roll-back itself is left alone: it is what is tested.
    """
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name == "roll_back":
            return None
        if event == "line" and not _in_roll_back(frame):
            count += 1
            if count == step:
                raise Fault
        return trace

    sys.settrace(trace)
    try:
        action()
    except Fault:
        return True
    finally:
        sys.settrace(None)
        # a trace function can raise between the last line of a with block and its __exit__, as nothing else can
        torch.set_grad_enabled(True)
    return False


def count_lines(action: Callable[[], object]) -> int:
    """How many lines of the package ``action`` runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return count


def _in_roll_back(frame) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "roll_back":
            return True
        frame = frame.f_back
    return False
