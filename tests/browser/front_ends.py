"""Notebooks in real front ends: one Jupyter server for JupyterLab, Notebook 7 and Voila, and a page of Chromium."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parent.parent.parent
FRONT_ENDS = {"lab": "lab/tree", "notebook": "notebooks"}
SETTINGS = {
    # all cells in the page, also those that can't be seen
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    # no questions that a test would have to answer
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}


#: one cell for each widget, in the order of the page
WIDGETS = {
    "panel": "panel = SwapPanel.demo()\npanel",
    "scrubber": "view = WriteScrubber()\nview",
    "guards": "guards = Guards.demo()\nguards",
    "rows": "rows = RowPanel.demo(['hotswap', 'notebook', 'adapter'])\nrows",
}
SETUP = """import warnings

warnings.filterwarnings("ignore")  # remarks of PEFT and transformers on their own affairs
from hotswap_lab import demo
from hotswap_lab.lessons import begin
from hotswap_lab.widgets import *

begin()"""


def chromium() -> str | None:
    """Where Debian's Chromium, or another one, is."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Chromium, without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


def write_notebook(path: Path, cells: Iterable[str]) -> None:
    """A notebook of code cells."""
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    cells = [new_code_cell(source) for source in cells]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@contextmanager
def jupyter(folder: Path, home: Path, theme: str = "JupyterLab Light") -> Iterator[str]:
    """A server for the notebooks in ``folder``, with settings of its own in ``home``. Gives its address."""
    settings = {**SETTINGS, "@jupyterlab/apputils-extension/themes": {"theme": theme}}
    for name, values in settings.items():
        file = home / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += [f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}", "--ServerApp.port_retries=0"]
    # for tests that ask the page's own model of the notebook what is in it
    command += ["--LabApp.expose_app_in_browser=True", "--JupyterNotebookApp.expose_app_in_browser=True"]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, (home / "server.log").read_text()
                time.sleep(0.1)
        yield f"{address}/{{path}}?token={token}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


class NotebookPage:
    """One notebook, open in a front end.

    Parameters
    ----------
    page:
        A page of Playwright.
    address:
        What :func:`jupyter` gives.
    front_end:
        ``"lab"`` or ``"notebook"``.
    name:
        The file's name.
    """

    def __init__(self, page, address: str, front_end: str, name: str):
        self.page = page
        # JupyterLab would open what the last page had open as well
        page.goto(address.format(path=f"{FRONT_ENDS[front_end]}/{name}") + ("&reset" if front_end == "lab" else ""))
        self.loaded()
        page.wait_for_function(
            "() => ['idle', 'busy'].includes("
            "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status)",
            timeout=120_000,
        )

    def loaded(self) -> None:
        """Waits until the notebook is on the page."""
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.content?.model?.cells?.length > 0", timeout=120_000
        )

    def run_cell(self, place: int) -> None:
        """Runs one cell, counted from 0, and waits for it."""
        self.start_cell(place)
        self.finish()

    def start_cell(self, place: int) -> None:
        """Begins to run one cell, counted from 0."""
        self.page.evaluate(
            """place => {
                window.jupyterapp.shell.currentWidget.content.activeCellIndex = place
                window.jupyterapp.shell.currentWidget.content.deselectAll()
            }""",
            place,
        )
        self.start("run-cell")

    def start(self, command: str) -> None:
        """Begins what a menu of the notebook does."""
        self.page.evaluate(
            """command => {
                window.ran = false
                window.jupyterapp.commands.execute(`notebook:${command}`).then(() => { window.ran = true })
            }""",
            command,
        )

    def run_all(self, timeout: float = 120) -> None:
        """Runs all cells, as the menu does, and waits for the last one."""
        self.start("run-all-cells")
        self.finish(timeout)

    def finish(self, timeout: float = 120) -> None:
        """Waits until what was begun has run."""
        # at each frame, as is usual, the question would keep the machine from running the notebook
        self.page.wait_for_function("() => window.ran", timeout=timeout * 1000, polling=300)

    def outputs(self) -> list[dict]:
        """The outputs of all cells, as they would be saved."""
        return self.page.evaluate(
            """() => [...window.jupyterapp.shell.currentWidget.content.model.cells]
                .filter(cell => cell.type === 'code').flatMap(cell => cell.outputs.toJSON())"""
        )

    def shut_down(self) -> None:
        """Ends the kernel, which would go on taking memory."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")

    def save(self) -> None:
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
