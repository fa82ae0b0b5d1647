"""The site has every notebook and every public name, README stays short, and every link leads somewhere.

CI, which has Sphinx, checks that the site builds without a warning.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest

import hotswap_lab
import hotswap_lab.widgets
from hotswap_lab.serving import api

ROOT = Path(__file__).parent.parent
DOCS, README = ROOT / "docs", ROOT / "README.md"
PAGES = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "training/README.md"))]
NOTEBOOKS = [path for path in (ROOT / "notebooks").rglob("*.ipynb") if path.parts[-2][0] != "."]


def load(name: str):
    """A file of ``docs`` as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def conf():
    return load("conf")


def test_every_public_name_has_a_page(conf):
    bound = set(
        re.findall(r"^ +from .* import \w+ as (\w+)$", (ROOT / "hotswap_lab/__init__.py").read_text(), re.MULTILINE)
    )
    assert len(bound) > 20
    pages = conf.pages()
    assert bound <= set(pages)
    assert all(f"   {name}\n" in pages["index"] for name in pages.keys() - {"index"})
    assert ".. autoexception:: hotswap_lab.HotswapError" in pages["HotswapError"]
    for model in (api.AskedText, api.AskedChat):
        for name in model.model_fields:  # described, and with its type
            assert pages["fields"].count(f"``{name}``") >= 2
    assert '"``temperature``", "number, maximum 2, minimum 0"' in pages["fields"]
    shown = re.findall(r"rubric:: (\w+)\n\n.*json\n((?:\n .*)+)", pages["commands"])
    assert {name: json.loads(text) for name, text in shown} == load("commands").schemas()


def test_members_of_public_classes_have_docstrings(conf):
    for name in conf.public(hotswap_lab):
        value = getattr(hotswap_lab, name)
        assert value.__doc__, name
        for member, function in vars(value).items() if isinstance(value, type) else ():
            is_public = member[0] != "_" and (callable(function) or isinstance(function, property))
            assert not is_public or function.__doc__, f"{name}.{member}"


def test_modules_that_users_are_told_of_have_a_page(conf):
    told = README.read_text() + "".join(path.read_text() for path in NOTEBOOKS if path.stem.startswith("recipes"))
    modules = set(re.findall(r"from hotswap_lab\.([\w.]+) import", told))
    # for readers of the code, and for the chapters
    assert {"serving", "widgets"} <= modules - {"core", "lessons"} <= {*conf.MODULES.split()}


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"><a href="b.html#there"><a href="#here"><a href="http://x">')
    (tmp_path / "b.html").write_text('<a href="a.html#here"><a href="a.html#gone"><img src="c.png">')
    assert load("check_links").broken(tmp_path) == ["a.html: b.html#there", "b.html: a.html#gone", "b.html: c.png"]


# --- README and the other pages


def text_of(path: Path) -> str:
    """What is prose in it: no code."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors_of(path: Path) -> set[str]:
    """What a link to this file may have after its #."""
    titles = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
    if path.suffix == ".ipynb":  # as Jupyter makes them
        return {title.strip().replace(" ", "-") for title in titles}
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short():
    text = README.read_text()
    assert len(text.split()) <= 1700
    above, _, _ = re.sub(r"\]\([^)]*\)", "]", text).partition("<picture>")  # what is seen first
    assert len(re.findall(r"\w\S*", above)) <= 80


def test_the_contents_have_every_section():
    contents, _, rest = README.read_text().partition("\n## ")
    titles = re.findall(r"^## (.+)$", "## " + rest, re.MULTILINE)
    linked = re.findall(r"\[([^\]]+)\]\(#", contents)
    assert [" ".join(title.split()) for title in linked] == titles


def test_links_lead_somewhere():
    for page in [*PAGES, *NOTEBOOKS]:
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text_of(page)):
            file, _, anchor = link.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), (page, link)
            assert not anchor or anchor in anchors_of(path), (page, link)


def test_code_is_code():
    """Whatever is shown compiles, and imports what there is."""
    for page in PAGES[:2]:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            compile(block, page, "exec")
            for module, names in re.findall(r"^from (hotswap_lab[\w.]*) import (.+)$", block, re.MULTILINE):
                for name in names.split(", "):
                    assert hasattr(hotswap_lab.widgets if module.endswith("widgets") else hotswap_lab, name), name
