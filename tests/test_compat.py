"""Private names of other libraries are in ``compat`` alone, and a version without one of them breaks little."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hotswap_lab
from hotswap_lab import compat, demo, hotswap_adapter, verify_hotswap

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


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_uses_a_private_name(path):
    assert list(private_names(path)) == []


def test_such_names_are_found(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "from peft.tuners._x import Y\nfrom torch.nn.modules.conv import _ConvNd\nimport torch\ntorch._C.z()\n"
    )
    assert {*private_names(file)} >= {"peft.tuners._x.Y", "torch.nn.modules.conv._ConvNd", "torch._C.z"}


@pytest.mark.parametrize("name", compat.NAMES)
def test_every_name_is_there_today(name):
    assert getattr(compat, name) is not None


@pytest.mark.parametrize("name", compat.NAMES)
def test_lora_swaps_without_any_one_of_them(name, monkeypatch):
    getattr(compat, name)
    model, _ = demo.load("reverse")
    library = re.split(r"\W", compat.NAMES[name])[0]
    with monkeypatch.context() as older:
        older.delitem(vars(compat), name)
        older.setitem(compat.NAMES, name, compat.NAMES[name] + "_of_an_older_version")
        hotswap_adapter(model, demo.adapter_path("double"), "default")
        with pytest.raises(ImportError, match=f"which {library} .* does not have: install {library}"):
            getattr(compat, name)
    assert verify_hotswap(model, demo.adapter_path("double"), base=demo.load_base)


def test_none_of_them_is_needed_to_import_the_package():
    code = "import hotswap_lab.bench, hotswap_lab.lessons, hotswap_lab.widgets; from hotswap_lab import compat"
    code += "; assert not compat.NAMES.keys() & vars(compat).keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
