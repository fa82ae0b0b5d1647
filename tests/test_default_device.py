"""``torch.set_default_device`` makes no difference: tensors of ours are on the CPU, or where the model is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from models import KINDS, load, save_family

import hotswap_lab
from hotswap_lab import (
    AdapterPool,
    demo,
    hotswap_adapter,
    loaded,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    save_adapter,
    set_strength,
    verify_hotswap,
)
from hotswap_lab.generating import Reader

#: what takes a device, and the default one without it
MAKE = {*dir(torch)} & {
    *("tensor", "as_tensor", "asarray", "zeros", "ones", "full", "empty", "empty_strided", "arange", "range", "eye"),
    *("linspace", "logspace", "rand", "randn", "randint", "randperm", "normal", "scalar_tensor", "tril_indices"),
}
FOLDERS = {name: demo.adapter_path(name) for name in ("reverse", "sort", "caesar")}


def test_all_tensors_are_made_on_a_device_by_name():
    """But for the lessons, whose tensors are a reader's own."""
    package, found = Path(hotswap_lab.__file__).parent, []
    for file in package.rglob("*.py"):
        if "lessons" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and ast.unparse(node.func.value) == "torch" and node.func.attr in MAKE:
                named = {each.arg for each in node.keywords}
                if not named & {"device", None}:
                    found.append(f"{file.relative_to(package)}:{node.lineno}: {ast.unparse(node)}")
    assert not found


@pytest.fixture
def on_meta():
    """Imitates ``torch.set_default_device("cuda")``: a tensor without a device has no values."""
    with torch.device("meta"):
        yield


def _loaded(name: str = "reverse"):
    with torch.device("cpu"):  # transformers and PEFT make tensors without a device
        return demo.load(name)


def _ask(model, tokenizer, *words: str) -> list[str]:
    with torch.device("cpu"):
        return demo.ask_all(model, tokenizer, [*words])


def _equals_fresh_load(model, name: str) -> None:
    with torch.device("cpu"):
        assert verify_hotswap(model, FOLDERS[name])


def test_swaps(on_meta, tmp_path):
    model, tokenizer = _loaded()
    for step in range(3):
        for name in ("sort", "caesar"):
            assert plan_hotswap(model, FOLDERS[name], add_layers=True).ok
            hotswap_adapter(model, FOLDERS[name], add_layers=True)
            _equals_fresh_load(model, name)
        if step == 0:
            prepare_model_for_compiled_hotswap(model, adapters=FOLDERS.values())
    set_strength(model, 0.5)
    set_strength(model, 1.0)
    save_adapter(model, tmp_path / "saved")
    assert verify_hotswap(model, tmp_path / "saved")
    assert loaded(model)[0].strength == 1
    assert _ask(model, tokenizer, "abc") == ["def"]


def test_a_pool(on_meta):
    model, tokenizer = _loaded()
    pool = AdapterPool(model, adapters=FOLDERS, target_rank=48, progress=False)
    for name in FOLDERS:
        pool.swap(name)
        _equals_fresh_load(model, name)
        with pool.using("sort", strength=0.5):
            pass
    pool.swap({"reverse": 0.5, "sort": 0.5})
    pool.off()
    pool.swap("sort")
    _equals_fresh_load(model, "sort")
    assert _ask(model, tokenizer, "hotswap") == ["ahopstw"]


def test_rows(on_meta, tmp_path):
    """A model that makes no tensors without a device either, so that the proof of its rows is on no device."""
    kind = KINDS["linear"]
    with torch.device("cpu"):
        folders = save_family(kind, tmp_path, *(dict(r=4, target_modules=each) for each in (["first"], ["last"])))
        inputs, models = torch.randn(4, 12, dtype=torch.float64), [load(kind, each).double() for each in folders]
        models.append(load(kind, folders[0]).double())
        expected = [each(inputs) for each in models]
    names = dict(zip("ab", folders, strict=True))
    pool = AdapterPool(model := models.pop(), adapters=names, rows=4, target_rank=8, progress=False)
    pool.assign(["a", "b", None, "a"])
    found = model(inputs)
    for row, number in ((0, 0), (1, 1), (3, 0)):
        torch.testing.assert_close(found[row], expected[number][row], rtol=0, atol=1e-9)
    pool.assign([{"a": 0.5, "b": 0.5}, "b", "b", {"b": 1.0}])
    torch.testing.assert_close(model(inputs)[1:], expected[1][1:], rtol=0, atol=1e-9)
    pool.swap("b")
    torch.testing.assert_close(model(inputs), expected[1], rtol=0, atol=1e-9)
    with pool.using("a"):
        torch.testing.assert_close(model(inputs), expected[0], rtol=0, atol=1e-9)


def test_a_reader(on_meta):
    model, _ = _loaded()
    pool = AdapterPool(model, adapters=FOLDERS, rows=2, progress=False)
    reader = Reader(model, rows=2, longest=32)
    assert reader.agrees()  # tried while all rows have the same adapter
    pool.assign(["reverse", "sort"])
    text = [4, 5, 6]
    logits = reader.read([text, text])
    assert logits.shape == (2, 98)
    assert not torch.equal(*logits)
