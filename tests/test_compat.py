"""Private names of other libraries are in ``compat`` alone, and a version without one of them breaks little."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from models import call
from oracle import assert_close

import hotswap_lab
from hotswap_lab import compat, demo, hotswap_adapter

PACKAGE = Path(hotswap_lab.__file__).parent
LIBRARIES = ("torch", "peft", "transformers", "diffusers")
#: what a private module or name looks like in a path
PRIVATE = re.compile(rf"({'|'.join(LIBRARIES)})(\.\w+)*\._[a-zA-Z]\w*")


def private_names(path: Path):
    """The private names of other libraries that a file imports, or reaches through their modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
            names = [f"{node.module}.{each.name}" for each in node.names]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        yield from filter(PRIVATE.match, names)


def test_no_other_file_uses_a_private_name(tmp_path):
    file = tmp_path / "one_that_does.py"
    file.write_text("from peft.tuners._x import Y\nimport torch\ntorch._C.z()\n")
    assert {*private_names(file)} >= {"peft.tuners._x.Y", "torch._C.z"}
    used = [(path.name, name) for path in PACKAGE.rglob("*.py") for name in private_names(path)]
    assert used == []


def test_lora_swaps_without_any_one_of_them(monkeypatch):
    inputs, model = torch.arange(12)[None], demo.load("reverse")[0].double()
    expected = [call(demo.load(new)[0].double(), {"input_ids": inputs}) for new in ("double", "shout")]
    assert not torch.allclose(*expected, atol=0.1)
    for number, name in enumerate(compat.NAMES):
        getattr(compat, name)
        new, library = demo.adapter_path(("double", "shout")[number % 2]), re.split(r"\W", compat.NAMES[name])[0]
        with monkeypatch.context() as older:
            older.delitem(vars(compat), name)
            older.setitem(compat.NAMES, name, compat.NAMES[name] + "_of_an_older_version")
            hotswap_adapter(model, new, "default")
            with pytest.raises(ImportError, match=f"which {library} .* does not have: install {library}"):
                getattr(compat, name)
        assert_close(call(model, {"input_ids": inputs}), expected[number % 2])
