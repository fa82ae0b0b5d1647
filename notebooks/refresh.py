"""Runs the notebooks and stores their outputs in the one form that is committed.

    python notebooks/refresh.py                 # all of them
    python notebooks/refresh.py 00_start_here   # only those whose name contains this
    python notebooks/refresh.py --pictures      # only the pictures, without running a cell

Stored: outputs, without widget state or anything else that changes from run to run. Cells are numbered from 1,
since nbval compares only cells that have a number. JupyterLab shows no SVG in a notebook that it does not trust, as
those of a fresh clone, so each picture is stored as PNG, too. That takes Chromium.

The address of the repository, in the first cell of each notebook and in README's badges, is taken from
pyproject.toml: it is changed there, and then here by running this script. The version is set in the package. For a
release, this script makes pyproject.toml link to its tag, and README give the command for the package index.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import sys
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

from hotswap_lab.figures import palette

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
#: of a notebook, pictures included
MAX_BYTES = 400_000
SVG, PNG = "image/svg+xml", "image/png"
#: pixels of a PNG for each of its SVG
SCALE = 2
#: what README says of the package index before the first release, and from then on
BEFORE, AFTER = "It is not on the package index yet.", "`pip install hotswap_lab` installs the library alone."
WIDGET = "application/vnd.jupyter.widget-view+json"


def repository() -> str:
    """The address in pyproject.toml, without a slash at the end."""
    text = (ROOT / "pyproject.toml").read_text()
    return re.search(r'^Repository = "https://github.com/(.+?)/?"$', text, re.MULTILINE).group(1)


def with_address(text: str) -> str:
    """``text`` with every mention of the repository's address set to what pyproject.toml says."""
    return re.sub(
        r"(git\+https://github\.com/|mybinder\.org/v2/gh/|colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+",
        lambda match: match.group(1) + repository(),
        text,
    )


def version() -> str:
    """The version of the package."""
    text = (ROOT / "hotswap_lab" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def with_version(text: str, version: str) -> str:
    """README or pyproject.toml as it is for this version. A development version has no tag to link to.

    >>> with_version("hotswap_lab/HEAD/", "0.2.0"), with_version("hotswap_lab/v$HFPR_VERSION/", "0.3.0.dev0")
    ('hotswap_lab/v$HFPR_VERSION/', 'hotswap_lab/HEAD/')
    """
    tag = "HEAD" if "dev" in version else "v$HFPR_VERSION"
    text = re.sub(r"(hotswap_lab/(?:blob/)?)(?:HEAD|v\$HFPR_VERSION)/(?=\\\d|$)", rf"\1{tag}/", text)
    one, other = (AFTER, BEFORE) if version == "0.1.0.dev0" else (BEFORE, AFTER)
    return text.replace(one, other)


def notebooks() -> list[Path]:
    return sorted(path for path in FOLDER.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Takes out what changes from run to run."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    number = 0
    for cell in notebook.cells:
        cell.source = with_address(cell.source)
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            number += 1
            cell.execution_count = number
            # the live form of a widget has no kernel to live in; its static form is an output of its own
            cell.outputs = [each for each in _merged(cell.outputs) if list(each.get("data", {})) != [WIDGET]]
            for output in cell.outputs:
                if output.output_type in ("execute_result", "display_data"):
                    output.metadata = {PNG: output.metadata[PNG]} if SVG in output.data and PNG in output.data else {}
                if output.output_type == "execute_result":
                    output.execution_count = number


def _merged(outputs: list) -> list:
    """Printed text in one piece: in how many it arrives depends on the machine's load."""
    merged: list = []
    for output in outputs:
        if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def _pictures(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The outputs with an SVG."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if SVG in output.get("data", {})]


def add_pngs(notebook: nbformat.NotebookNode, former: nbformat.NotebookNode) -> None:
    """Puts a PNG next to each SVG: that of the former notebook, if it was drawn from the same one."""
    drawn = [each for each in _pictures(former) if each.metadata.get(PNG, {}).get("of") == digest(each.data[SVG])]
    known = {each.data[SVG]: (each.data[PNG], each.metadata[PNG]) for each in drawn}
    missing = {each.data[SVG] for each in _pictures(notebook)} - known.keys()
    if missing:
        known |= _drawn(sorted(missing))
    for each in _pictures(notebook):
        each.data[PNG], size = known[each.data[SVG]]
        # nbconvert's classic template makes the text form the image's `alt`; JupyterLab 4.6 has no way to set one
        each.metadata = {PNG: {**size, "alt": each.data["text/plain"], "of": digest(each.data[SVG])}}


def digest(svg: str) -> str:
    """What a PNG notes of the SVG that it was drawn from: it could be an older one's."""
    return hashlib.sha256(svg.encode()).hexdigest()[:12]


def _drawn(svgs: list[str]) -> dict[str, tuple[str, dict[str, int]]]:
    """For each SVG, its PNG with 256 colors, and the width and height in a notebook."""
    from playwright.sync_api import sync_playwright

    drawn = {}
    with sync_playwright() as playwright:
        browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(
            device_scale_factor=SCALE
        )
        for svg in svgs:
            page.set_content(f"<body style='margin: 0'>{svg}</body>")
            shot = page.locator("svg").first.screenshot(omit_background=True)
            image, data = Image.open(io.BytesIO(shot)), io.BytesIO()
            _with_few_colors(image).save(data, "PNG", optimize=True)
            size = dict(zip(("width", "height"), (each // SCALE for each in image.size), strict=True))
            drawn[svg] = base64.b64encode(data.getvalue()).decode() + "\n", size
    return drawn


def _with_few_colors(image):
    """An image with at most 256 colors. An octree would draw padding in the color of the card, so both are kept."""
    few, pixels = image.quantize(253, Image.Quantize.FASTOCTREE), np.asarray(image)
    index, colors = np.array(few), few.getpalette("RGBA")
    for color in (palette.CARD, palette.OFF, palette.WHITE):
        rgba = [*bytes.fromhex(color[1:]), 255]
        index[(pixels == rgba).all(-1)] = len(colors) // 4
        colors += rgba
    few = Image.fromarray(index, "P")
    few.putpalette(colors, "RGBA")
    return few


def refresh(path: Path, *, run: bool = True) -> None:
    notebook, former = (nbformat.read(path, as_version=4) for _ in range(2))
    if run:
        NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
        ).execute()
        clean(notebook)
    add_pngs(notebook, former)
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > MAX_BYTES:
        raise SystemExit(f"{path.name} has {len(text.encode()):,} bytes; at most {MAX_BYTES:,} are committed")
    path.write_text(text)
    print(f"{path.relative_to(ROOT)}: {len(text.encode()):,} bytes")


def draw_first() -> None:
    """The picture of README as PNG, for pages that show no SVG: the package index, and previews of links."""
    svg, png = (FOLDER / "pictures" / f"first.{kind}" for kind in ("svg", "png"))
    ((data, _),) = _drawn([svg.read_text()]).values()
    png.write_bytes(base64.b64decode(data))


def main(wanted: list[str]) -> None:
    for path in (ROOT / "README.md", ROOT / "pyproject.toml"):
        path.write_text(with_version(with_address(path.read_text()), version()))
    run, wanted = "--pictures" not in wanted, [name for name in wanted if name != "--pictures"]
    for path in notebooks():
        if not wanted or any(name in str(path) for name in wanted):
            refresh(path, run=run)
    if not wanted:
        draw_first()


if __name__ == "__main__":
    main(sys.argv[1:])
