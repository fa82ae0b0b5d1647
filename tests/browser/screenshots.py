"""Pictures of the widgets in JupyterLab: python tests/browser/screenshots.py FOLDER

In the light and the dark theme and as wide as a phone. The folder is not committed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from front_ends import SETUP, WIDGETS, NotebookPage, jupyter, open_browser, write_notebook

CELLS = WIDGETS | {
    "panel": "panel = SwapPanel.demo()\npanel.choose('sort')\npanel.pin()\npanel.choose('pig_latin')\npanel",
    "scrubber": "view = WriteScrubber()\nview.go(6)\nview",
}
LOOKS = {
    "light": ("JupyterLab Light", {"width": 1200, "height": 900}),
    "dark": ("JupyterLab Dark", {"width": 1200, "height": 900}),
    "phone": ("JupyterLab Light", {"width": 390, "height": 844}),
}


def main(target: Path) -> None:
    """Takes all pictures."""
    target.mkdir(parents=True, exist_ok=True)
    for look, (theme, size) in LOOKS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder, home = Path(temporary, "notebooks"), Path(temporary, "home")
            folder.mkdir()
            home.mkdir()
            write_notebook(folder / "widgets.ipynb", [SETUP, *CELLS.values()])
            with open_browser() as browser, jupyter(folder, home, theme) as address:
                page = browser.new_page(viewport=size)
                opened = NotebookPage(page, address, "lab", "widgets.ipynb")
                page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
                opened.run_all()
                for place, name in enumerate(CELLS):
                    widget = page.locator(".hotswap-live").nth(place)
                    widget.scroll_into_view_if_needed()
                    page.wait_for_timeout(400)
                    widget.screenshot(path=target / f"{name}_{look}.png")
                page.locator(".hotswap-live").first.scroll_into_view_if_needed()
                page.screenshot(path=target / f"page_{look}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
