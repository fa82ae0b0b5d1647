"""README stays short, and every link in it leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}


def anchors_of(path: Path) -> set[str]:
    """What a link to this file may have after its #."""
    if path.suffix == ".ipynb":  # as Jupyter makes them
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
        return {title.strip().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", "\n".join(cells), re.MULTILINE)}
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 160


def test_the_contents_have_every_section():
    readme = PAGES["README.md"]
    contents, _, rest = readme.partition("\n## ")
    titles = re.findall(r"^## (.+)$", "## " + rest, re.MULTILINE)
    linked = re.findall(r"\[([^\]]+)\]\(#", contents)
    assert [" ".join(title.split()) for title in linked] == titles


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page])
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        path = ROOT / (file or page)
        assert path.exists(), link
        assert not anchor or anchor in anchors_of(path), link


def test_code_is_code():
    """Whatever is shown compiles, and imports what there is."""
    import hotswap_lab
    import hotswap_lab.widgets

    for page, text in PAGES.items():
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            compile(block, page, "exec")
            for module, names in re.findall(r"^from (hotswap_lab[\w.]*) import (.+)$", block, re.MULTILINE):
                for name in names.split(", "):
                    assert hasattr(hotswap_lab.widgets if module.endswith("widgets") else hotswap_lab, name), name
