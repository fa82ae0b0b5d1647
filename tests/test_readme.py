"""README stays short, and every link in it, and in the other pages, leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
OTHERS = [ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", ROOT / "training" / "README.md"]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


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
    assert len(README.read_text().splitlines()) <= 160


def test_the_contents_have_every_section():
    contents, _, rest = README.read_text().partition("\n## ")
    titles = re.findall(r"^## (.+)$", "## " + rest, re.MULTILINE)
    linked = re.findall(r"\[([^\]]+)\]\(#", contents)
    assert [" ".join(title.split()) for title in linked] == titles


@pytest.mark.parametrize(
    "page", [README, CONTRIBUTING, *OTHERS, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)]+)\)", text_of(page))
    assert links or page in OTHERS or page.parent.name == "solutions"
    for link in links:
        file, _, anchor = link.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), link
        assert not anchor or anchor in anchors_of(path), link


def test_code_is_code():
    """Whatever is shown compiles, and imports what there is."""
    import hotswap_lab
    import hotswap_lab.widgets

    for page in (README, CONTRIBUTING):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            compile(block, page, "exec")
            for module, names in re.findall(r"^from (hotswap_lab[\w.]*) import (.+)$", block, re.MULTILINE):
                for name in names.split(", "):
                    assert hasattr(hotswap_lab.widgets if module.endswith("widgets") else hotswap_lab, name), name
