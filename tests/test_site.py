"""The site has every notebook and every public name, README stays short, and every link leads somewhere.

CI, which has Sphinx, checks that the site builds without a warning.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from lengths import long

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


refresh = load("../notebooks/refresh")


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
    assert sorted(" ".join(conf.TASKS.values()).split()) == sorted(bound - {"demo"})
    assert ".. autoexception:: hotswap_lab.HotswapError" in pages["HotswapError"]
    for model in (api.AskedText, api.AskedChat):
        for name in model.model_fields:  # described, and with its type
            assert pages["fields"].count(f"``{name}``") >= 2
    assert '"``temperature``", "number, maximum 2, minimum 0"' in pages["fields"]
    shown = re.findall(r"rubric:: (\w+)\n\n.*json\n((?:\n .*)+)", pages["commands"])
    assert {name: json.loads(text) for name, text in shown} == load("commands").schemas()


def without_docstring(value: type) -> list[str]:
    """Public members without a docstring, inherited ones included, unless a class of another package has them."""
    missing = []
    for owner in value.__mro__:
        for name, member in (
            vars(owner).items() if owner.__module__.split(".")[0] == value.__module__.split(".")[0] else ()
        ):
            member = getattr(member, "__func__", member)  # of a class method or a static method
            is_described = callable(member) or isinstance(member, (property, functools.cached_property))
            if name[0] != "_" and is_described and not (member.__doc__ or inspect.getdoc(getattr(value, name))):
                missing.append(f"{owner.__name__}.{name}")
    return missing


def test_members_of_public_classes_have_docstrings(conf):
    for module in map(
        importlib.import_module, ["hotswap_lab", *("hotswap_lab." + name for name in conf.MODULES.split())]
    ):
        for name in conf.public(module):
            value = getattr(module, name)
            assert value.__doc__, name
            assert not isinstance(value, type) or without_docstring(value) == [], module.__name__


def test_every_kind_of_member_is_looked_at():
    class Base:
        def inherited(self): ...

        def _private(self): ...

    class Own(Base):
        @classmethod
        def of_class(cls): ...

        @staticmethod
        def static(): ...

        @functools.cached_property
        def cached(self): ...

        @property
        def computed(self): ...

        number = 3

    assert without_docstring(Own) == ["Own.of_class", "Own.static", "Own.cached", "Own.computed", "Base.inherited"]


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
    assert len(text.split()) <= 900
    above, _, _ = re.sub(r"\]\([^)]*\)", "]", text).partition("<picture>")  # what is seen first
    assert len(re.findall(r"\w\S*", above)) <= 80


@pytest.mark.parametrize(
    "name",
    ["swapping", "many_adapters", "rows", "pipelines", "training", "upgrading", long("compiled"), long("ahead")],
)
def test_the_blocks_of_a_page_run(name, tmp_path, monkeypatch):
    """In their order, in an empty folder, with what the page itself imports."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{name}.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    assert blocks


@pytest.mark.long
def test_the_call_on_the_servers_page_is_answered():
    from running import TOKEN, one_process

    (call,) = re.findall(r"^```bash\n(curl.*?)^```", (DOCS / "serving.md").read_text(), re.MULTILINE | re.DOTALL)
    with one_process(adapters={name: hotswap_lab.demo.adapter_path(name) for name in ("shout", "sort")}) as address:
        command = ["bash", "-c", call.replace("localhost:8000", address)]
        done = subprocess.run(
            command, env={**os.environ, "HOTSWAP_ADMIN_TOKEN": TOKEN}, capture_output=True, timeout=60
        )
    assert done.returncode == 0, done.stderr


def test_a_page_of_a_task_begins_with_a_block():
    (listed,) = re.findall(r":caption: Use\n\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    tasks = listed.split("notebooks/")[0].split()[1:]
    assert len(tasks) == 8
    for name in tasks:
        assert re.match(r"# .+\n\n```(python|bash)\n", (DOCS / f"{name}.md").read_text()), name


def test_readme_and_the_links_on_the_index_are_those_of_the_version():
    """``notebooks/refresh.py`` writes both. A release links to its tag; before the first one, there is none."""
    version = hotswap_lab.__version__
    readme, project = README.read_text(), (ROOT / "pyproject.toml").read_text()
    assert refresh.version() == version
    for text in (readme, project):
        assert refresh.with_version(text, version) == text
        assert refresh.with_version(refresh.with_version(text, "0.1.0"), "0.1.0.dev0") == text
    released = refresh.with_version(project, "0.1.0")
    assert (released.count("v$HFPR_VERSION/\\"), project.count("v$HFPR_VERSION"), project.count("/HEAD/\\")) == (
        3,
        0,
        3,
    )
    assert "`pip install hotswap_lab`" in refresh.with_version(readme, "0.1.0")


def test_the_changelog_has_one_unreleased_section_and_links_to_tags_that_exist():
    text = (ROOT / "CHANGELOG.md").read_text()
    first, *releases = re.findall(r"^## (?!What is public)(.+)$", text, re.MULTILINE)
    assert first == "Unreleased"
    assert all(re.fullmatch(r"\[[\d.]+\] - \d{4}-\d\d-\d\d", each) for each in releases)
    released = {f"v{each[1:].partition(']')[0]}" for each in releases}
    assert set(re.findall(r"(v\d+\.\d+\.\d+)", "".join(re.findall(r"^\[.+\]: .+$", text, re.MULTILINE)))) <= released
    kinds = ["Breaking", "Removed", "Added", "Changed", "Deprecated", "Fixed", "Security"]
    headings = re.findall(r"^### (.+)$", text.partition("## Unreleased")[2].partition("\n## ")[0], re.MULTILINE)
    assert headings == [each for each in kinds if each in headings]
    assert {"Breaking", "Removed"} <= {*headings}


@pytest.mark.parametrize("path", hotswap_lab._REMOVED)
def test_a_name_that_was_removed_says_what_to_use(path):
    module, _, name = path.rpartition(".")
    with pytest.raises(ImportError, match=f"{path} was removed: "):
        exec(f"from {module} import {name}", {})
    assert f"{path.removeprefix('hotswap_lab.')}" in (DOCS / "upgrading.md").read_text()
    with pytest.raises(ImportError, match="cannot import name 'neither'"):
        exec(f"from {module} import neither", {})
    assert not hasattr(importlib.import_module(module), "neither")


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text_of(page)):
        file, _, anchor = link.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), link
        assert not anchor or anchor in anchors_of(path), link


def test_code_is_code():
    """Whatever is shown compiles, and imports what there is."""
    for page in PAGES[:2]:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            compile(block, page, "exec")
            for module, names in re.findall(r"^from (hotswap_lab[\w.]*) import (.+)$", block, re.MULTILINE):
                for name in names.split(", "):
                    assert hasattr(hotswap_lab.widgets if module.endswith("widgets") else hotswap_lab, name), name
