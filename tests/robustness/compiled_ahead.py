"""One more way of use in architectures.py: compiled ahead of time, whole and by blocks, at several sizes, elsewhere.

Every answer is that of the live model, or it was refused. Nothing but a few refusals is right at any time: that PyTorch
can't export the model, or that the file is for other sizes or settings.
"""

from __future__ import annotations

import contextlib
import inspect
from functools import partial
from typing import TYPE_CHECKING

import torch
from exported import not_compiled
from models import answer, call, load
from torch import nn

from hotswap_lab import aoti_compile, aoti_load, hotswap_adapter
from hotswap_lab import prepare_model_for_compiled_hotswap as prepare

if TYPE_CHECKING:
    from architectures import Case

#: whether AOTInductor is used: a minute for each model; otherwise, graphs are exported and not compiled
COMPILED = False


def ahead(case: Case) -> None:
    with contextlib.nullcontext() if COMPILED else not_compiled():
        case.load_family(("plain", "plain", "dora"))
        if case.done("preparing", prepare, case.model, adapters=case.folders.values()):
            for by_blocks in (False, True):
                _one_way(case, by_blocks)


def _one_way(case: Case, by_blocks: bool) -> None:
    way = "by blocks" if by_blocks else "whole"
    # compiled code rounds otherwise where a model computes in float32
    same = partial(case.same, tolerance=1e-5) if COMPILED else case.same
    given = _inputs(case, 2, 4)
    sizes = {key: {axis: torch.export.Dim.AUTO for axis, size in enumerate(each.shape) if size > 1}
             for key, each in given.items() if isinstance(each, torch.Tensor)}  # fmt: skip
    shapes = sizes if case.draw.random() < 0.8 else None
    options = dict(kwargs=given, dynamic_shapes=shapes, repeated_blocks=by_blocks, progress=False)
    path = f"{case.folder}/{way}.pt2"
    if not case.done(f"compiling {way}", aoti_compile, case.model, path, **options):
        return
    case.report.figures[f"files, {way}"] += 1
    if not case.done("binding", aoti_load, path, case.model):
        return
    code = case.result
    for number, name in enumerate(case.draw.choices([*case.folders], k=6)):
        hotswap_adapter(case.model, case.folders[name], "default")
        inputs = _inputs(case, case.draw.randint(1, 4), case.draw.choice([4, 5, 7]) if number else 4)
        try:
            expected = call(load(case.kind, case.folders[name]), inputs)
        except Exception:  # sizes that the model doesn't take
            continue
        if case.done("a call", partial(answer, code), inputs):
            case.report.figures["calls compared"] += 1
            same(f"{way}: a call", case.result, expected)
    other, setting = _other(case)
    if other is None:
        return
    if case.done("binding another model", aoti_load, path, other, prove=False):
        bound = case.result
        if case.done("a call", partial(answer, bound), given):
            same(f"{way}: another {setting}", case.result, call(other, given))


def _inputs(case: Case, rows: int, tokens: int) -> dict:
    given = case.kind.of(rows, tokens).inputs()
    if (pixels := given.get("pixel_values")) is not None and case.kind.takes == "pixel_values" and tokens > 4:
        size = case.draw.choice([16, 17, 20])
        given["pixel_values"] = torch.randn(rows, 3, size, size, dtype=pixels.dtype)
    if "use_cache" in inspect.signature(case.model.get_base_model().forward).parameters:
        given["use_cache"] = False
    return given


def _other(case: Case) -> tuple[nn.Module | None, str]:
    """The same weights with one number of a module or the config changed, and its name."""
    model = load(case.kind, case.folders["a"])
    base = model.get_base_model()
    if case.draw.random() < 0.5:
        modules = [(path, each) for path, each in base.named_modules() if "lora_" not in path and "dropout" not in path]
        found = [(each, name) for _, each in modules for name, value in vars(each).items()
                 if type(value) is float and not name.startswith("_")]  # fmt: skip
        if not found:
            return None, ""
        module, name = case.draw.choice(found)
        setattr(module, name, getattr(module, name) * 1.5 + 0.1)
        return model, name
    numbers = [name for name, value in base.config.to_dict().items() if type(value) is float and "drop" not in name]
    if not numbers:
        return None, ""
    name = case.draw.choice(numbers)
    changed = type(base.config).from_dict(base.config.to_dict() | {name: getattr(base.config, name) * 1.5 + 0.1})
    twin = type(base)(changed).to(case.kind.dtype).eval()
    try:
        twin.load_state_dict(case.kind.base().state_dict(), strict=False)
    except RuntimeError:  # a number of which sizes are made
        return None, ""
    return load(_Kind(twin), case.folders["a"]), name


class _Kind:
    def __init__(self, model: nn.Module):
        self.base = lambda: model
