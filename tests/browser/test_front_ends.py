"""The notebooks and the widgets in a real browser: JupyterLab 4, Notebook 7 and Voila, in Chromium.

Each chapter is run in JupyterLab and in Notebook, all widgets are clicked in both, and one page is served by Voila.
"""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from front_ends import FRONT_ENDS, ROOT, NotebookPage, chromium, jupyter, open_browser, write_notebook
from lengths import few_of
from playwright.sync_api import expect

CHAPTERS = sorted(path.name for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
#: what shows that a chapter has any
IMPORTS_WIDGETS = "from hotswap_lab.widgets import"
WIDGET = "application/vnd.jupyter.widget-view+json"

pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium")

#: one cell for each widget, in the order in which they stand on the page
WIDGETS = {
    "panel": "panel = SwapPanel.demo()\npanel",
    "scrubber": "view = WriteScrubber()\nview",
    "guards": "guards = Guards.demo()\nguards",
    "rows": "rows = RowPanel.demo(['hotswap', 'notebook', 'adapter'])\nrows",
    "lattice": "lattice = StrengthLattice.demo(strengths=(0, 0.5, 1))\nlattice",
}
SETUP = """import warnings

warnings.filterwarnings("ignore")  # remarks of PEFT and transformers on their own affairs
from hotswap_lab import demo
from hotswap_lab.lessons import begin
from hotswap_lab.widgets import *

begin()"""

BUSY = """import time

from hotswap_lab import in_use

answers, end = set(), time.monotonic() + 60
while panel.answer and panel.active != "sort" and time.monotonic() < end:
    with in_use(panel):
        answers.add(list(panel.generate("hotswap"))[-1])
print(panel.active, answers <= {demo.TASKS[name]("hotswap") for name in panel.names} | {"hotswap"})"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the notebooks, and one more with every widget."""
    folder = tmp_path_factory.mktemp("notebooks")
    for front_end in FRONT_ENDS:
        # a folder for each: two pages with the same file would share a kernel
        shutil.copytree(
            ROOT / "notebooks", folder / front_end, ignore=shutil.ignore_patterns("solutions", ".*", "*.py")
        )
    stored = folder / "stored"
    shutil.copytree(ROOT / "notebooks", stored, ignore=shutil.ignore_patterns("solutions", ".*", "*.py"))
    for path in set(folder.rglob("*.ipynb")) - set(stored.iterdir()):
        notebook = nbformat.read(path, as_version=4)
        # what takes minutes, and is stored
        notebook.cells = [cell for cell in notebook.cells if "nbval-skip" not in cell.metadata.get("tags", [])]
        nbformat.write(notebook, path)
    cells = (SETUP, *WIDGETS.values(), "panel.active, panel.strength", BUSY)
    for front_end in FRONT_ENDS:
        write_notebook(folder / f"{front_end}.ipynb", cells)
    write_notebook(folder / "voila.ipynb", cells[:2])
    return folder


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    with jupyter(folder, tmp_path_factory.mktemp("home")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    # for this module only: as long as Playwright runs, an event loop seems to run in this thread
    with open_browser() as browser:
        yield browser


@pytest.fixture
def new_page(browser):
    pages = []

    def new_page(**options):
        pages.append(browser.new_page(**options))
        pages[-1].set_default_timeout(30_000)
        return pages[-1]

    yield new_page
    for page in pages:
        page.close()


@pytest.fixture(scope="module", params=FRONT_ENDS)
def widgets(request, browser, address):
    """The notebook with every widget, run in one of the front ends; for each widget what is on the page."""
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    notebook = NotebookPage(page, address, request.param, f"{request.param}.ipynb")
    notebook.run_all()
    assert [output for output in notebook.outputs() if output["output_type"] == "error"] == []
    live = page.locator(".hotswap-live")
    expect(live).to_have_count(len(WIDGETS))
    yield {"notebook": notebook, "page": page, **{name: live.nth(place) for place, name in enumerate(WIDGETS)}}
    notebook.shut_down()
    page.close()


#: those with widgets: of the others, there is no more to see in a browser than nbval compares. Chapter 05 has a panel
#: like chapter 00's, with a model that takes minutes, and chapter 11 only pictures of maps
WITH_WIDGETS = [
    path
    for path in CHAPTERS
    if path[:2] not in ("05", "11") and IMPORTS_WIDGETS in (ROOT / "notebooks" / path).read_text()
]
NEEDS_RAY = "09_beyond_one_machine.ipynb"
#: in JupyterLab; Notebook 7 has the same engine, so it runs the first chapter and the page with every widget
RUNS = [*((name, "lab") for name in WITH_WIDGETS), ("00_start_here.ipynb", "notebook")]


@pytest.mark.parametrize("run", few_of(RUNS, [("00_start_here.ipynb", "lab")]), ids="-".join)
def test_a_chapter_runs_without_an_error(run, new_page, address):
    name, front_end = run
    if name == NEEDS_RAY and not (find_spec("ray") and find_spec("openai")):
        pytest.skip('needs pip install "ray[serve]" openai')
    page = new_page()
    notebook = NotebookPage(page, address, front_end, f"{front_end}/{name}")
    notebook.run_all(timeout=300)
    outputs, live = notebook.outputs(), page.locator(".hotswap-live")
    assert [output for output in outputs if output["output_type"] == "error"] == []
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    if any(WIDGET in output.get("data", {}) for output in outputs):
        live.first.wait_for(state="attached")
    assert live.count() > 0
    notebook.shut_down()


# ---- SwapPanel


@pytest.mark.long
def test_the_panel_by_keyboard(widgets):
    panel, page = widgets["panel"], widgets["page"]
    answer = panel.locator(".hotswap-answer")
    panel.get_by_role("textbox", name="prompt").fill("hotswap")
    panel.get_by_role("radio", name="double").focus()
    page.keyboard.press("ArrowDown")
    no_vowels = panel.get_by_role("radio", name="no_vowels")
    expect(answer).to_contain_text("h*tsw*p")
    expect(no_vowels).to_be_focused()  # a button that is grayed out for a while would lose it
    expect(no_vowels).to_be_checked()
    assert panel.locator(".hotswap-choices [tabindex='0']").count() == 1
    panel.get_by_role("button", name="Compare with this").press("Enter")
    handle = panel.get_by_role("slider", name="strength")
    handle.focus()
    page.keyboard.press("ArrowLeft")
    expect(answer).to_contain_text("no_vowels at strength 0.95")
    expect(panel).not_to_contain_text("busy")
    expect(handle).to_be_focused()  # after a run, too
    page.keyboard.press("Home")
    expect(panel).to_contain_text("the adapter is off")
    expect(answer.locator(".hotswap-text")).to_have_text("hotswap")
    expect(panel.locator(".hotswap-kept")).to_have_text("no_vowelsh*tsw*p")
    widgets["notebook"].run_cell(len(WIDGETS) + 1)
    assert widgets["notebook"].outputs()[-2]["data"]["text/plain"] == "(None, 0.0)"
    tile = panel.locator(".hotswap-tile").first  # its numbers, on focus
    tile.focus()
    expect(tile.locator("text")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(panel.locator(".hotswap-tile").nth(1).locator("text")).to_be_visible()


@pytest.mark.long
def test_the_lattice_by_click_and_by_keyboard(widgets):
    lattice = widgets["lattice"]
    lattice.get_by_role("button", name="Fill").click()
    cell = lattice.locator("[data-choose='shout@1.0']")
    expect(cell).to_have_text("HOTSWAP!", timeout=60_000)
    expect(lattice).not_to_contain_text("busy", timeout=60_000)
    cell.click()
    expect(cell).to_have_text("● HOTSWAP!")
    expect(cell).to_be_focused()  # though the table was drawn anew
    lattice.locator("[data-choose='sort@1.0']").press("Enter")
    expect(lattice.locator("[data-choose='sort@1.0']")).to_have_text("● ahopstw")


@pytest.mark.long
def test_clicks_while_a_cell_computes_tear_nothing_and_the_last_one_counts(widgets):
    """They come at once, in a thread of the kernel: JupyterLab 4.4 and later don't wait for the end of the cell."""
    panel, notebook = widgets["panel"], widgets["notebook"]
    for name in ("double", "off"):  # ipykernel 7.4: not the first click of all
        panel.get_by_role("radio", name=name).click()
        expect(panel.get_by_role("radio", name=name)).to_be_checked()
    expect(panel).to_contain_text("the adapter is off")
    expect(panel).not_to_contain_text("busy")
    notebook.start_cell(len(WIDGETS) + 2)  # it asks the model again and again, until the last click has been obeyed
    for name in ("shout", "pig_latin", "sort"):
        panel.get_by_role("radio", name=name).click()
    notebook.finish()
    assert notebook.outputs()[-1].get("text") == "sort True\n", notebook.outputs()
    expect(panel.get_by_role("radio", name="sort")).to_be_checked()
    expect(panel).not_to_contain_text("busy")
    expect(panel.locator(".hotswap-answer")).to_contain_text("sort")


# ---- WriteScrubber and Guards


@pytest.mark.long
def test_the_write_and_the_guards_by_keyboard_and_nothing_jumps(widgets):
    page, scrubber, guards = (widgets[name] for name in ("page", "scrubber", "guards"))
    before = [each.evaluate(PLACES) for each in (scrubber, guards)]
    scrubber.get_by_role("slider", name="step").focus()
    for key, answer in (("ArrowRight", "otswapay"), ("End", "hotswaphotswap"), ("Home", "otswaphay")):
        page.keyboard.press(key)
        expect(scrubber.locator("svg text[font-weight=bold]")).to_have_text(answer)
    guards.get_by_text("shout", exact=True).first.focus()
    page.keyboard.press("Enter")
    expect(guards.locator(".hotswap-picture svg").first).to_contain_text("✗ scaling was 2, is 1: 14 layers")
    expect(guards).not_to_contain_text("busy")
    assert guards.locator(".hotswap-picture svg").first.inner_html().count("every guard holds") == 2  # and in its title
    assert [each.evaluate(PLACES) for each in (scrubber, guards)] == before


# ---- all widgets

#: where each control and each part that shows something is in its widget, and how large it is
PLACES = """box => [...box.querySelectorAll('select, input, button, .hotswap-picture, .hotswap-answer')].map(each => {
    const {x, y, width, height} = each.getBoundingClientRect(), from = box.getBoundingClientRect()
    return [x - from.x, y - from.y, width, height]
})"""


@pytest.mark.long
def test_no_control_moves_when_another_adapter_becomes_active_or_an_answer_comes(widgets):
    """Or the next click would hit another one than was aimed at."""
    panel, rows = widgets["panel"], widgets["rows"]
    places = []
    for name in ("no_vowels", "caesar", "off"):  # the longest and one of the shortest
        panel.get_by_role("radio", name=name).click()
        expect(panel.locator(".hotswap-picture")).to_contain_text("the adapter is off" if name == "off" else name)
        expect(panel).not_to_contain_text("busy")
        places.append(panel.evaluate(PLACES))
        panel.get_by_role("button", name="Compare with this").click()
    assert places[0] == places[1] == places[2]
    rows.get_by_role("textbox", name="asked").first.fill("kernel")
    before = rows.evaluate(PLACES)
    rows.get_by_role("button", name="Answer all").click()
    expect(rows).to_contain_text("kernel")  # the text of an answer, but not of a box
    assert rows.evaluate(PLACES) == before


@pytest.mark.long
def test_every_control_has_a_name(widgets):
    for name in WIDGETS:
        snapshot = widgets[name].aria_snapshot()
        nameless = re.findall(
            r"^\s*- (?:button|radio|slider|textbox|combobox)(?!.* \"|.*\").*$", snapshot, re.MULTILINE
        )
        assert nameless == [], name


@pytest.mark.long
def test_a_phone(widgets):
    page = widgets["page"]
    before = page.viewport_size
    page.set_viewport_size({"width": 390, "height": 844})
    page.evaluate("() => window.jupyterapp.shell.collapseLeft?.()")  # JupyterLab's list of files
    page.wait_for_timeout(500)
    try:
        for name in WIDGETS:
            too_wide = widgets[name].evaluate(
                "box => [...box.querySelectorAll('button, input, textarea, select, .hotswap-answer')]"
                ".filter(each => !each.closest('.hotswap-scroll'))"  # these are in a table that scrolls
                ".filter(each => each.getBoundingClientRect().right > box.getBoundingClientRect().right + 1).length"
            )
            assert too_wide == 0, name
    finally:
        page.set_viewport_size(before)


# ---- without a kernel; these come last, since they end the kernel


@pytest.mark.long
def test_the_static_form_is_hidden_while_it_is_live_and_there_after_a_restart(widgets):
    notebook, page = widgets["notebook"], widgets["page"]
    outputs = page.locator(".jp-OutputArea-child:has(+ .jp-OutputArea-child .hotswap-live)")
    expect(outputs).to_have_count(len(WIDGETS))
    assert not any(outputs.nth(place).is_visible() for place in range(len(WIDGETS)))
    notebook.run_all()  # once more, so that what is stored is what was clicked
    notebook.save()
    notebook.shut_down()
    page.reload()
    notebook.loaded()
    expect(page.locator(".hotswap-live")).to_have_count(0)
    shown = page.locator(".jp-OutputArea-child").filter(visible=True)  # JupyterLab has other notebooks open, behind
    expect(shown.filter(has_text="One batch, another adapter in each row").first).to_be_visible()
    assert shown.locator("img").count() > 0  # the panel's picture
    expect(shown.filter(has_text="Loading widget")).to_have_count(0)


# ---- a fresh clone, which JupyterLab doesn't trust


def pictures_in(path: Path) -> int:
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    stored = [output.get("data", {}) for output in outputs]
    drawn = sum(data.get("text/html", "").count('src="data:image/png') for data in stored)  # by a panel
    return drawn + sum("image/svg+xml" in data for data in stored)


@pytest.mark.parametrize("name", few_of(CHAPTERS, CHAPTERS[:1]))
def test_stored_pictures_are_shown_without_trust(address, browser, name):
    page = browser.new_page()
    NotebookPage(page, address, "lab", f"stored/{name}").shut_down()
    cells = "[...window.jupyterapp.shell.currentWidget.content.model.cells].filter(cell => cell.type === 'code')"
    assert not page.evaluate(f"() => {cells}.some(cell => cell.trusted && cell.outputs.length)")
    images = page.locator(".jp-OutputArea-output img[src^='data:image/png']")
    expect(images).to_have_count(pictures_in(ROOT / "notebooks" / name))
    is_drawn = "images => images.map(image => image.complete && image.naturalWidth > 100)"
    assert all(page.evaluate(is_drawn, images.element_handles()))
    page.close()


# ---- in Voila, which runs a notebook and shows what it puts out


@pytest.mark.long
@pytest.mark.parametrize("has_kernel", [True, False])
def test_voila(address, new_page, has_kernel):
    page = new_page(viewport={"width": 1100, "height": 900})
    if not has_kernel:
        page.route_web_socket("**/channels*", lambda socket: socket.close())
    page.goto(address.format(path="voila/render/voila.ipynb"), timeout=120_000)
    static, panel = (
        page.locator(".jp-OutputArea-output img, .jp-OutputArea-output > svg"),
        page.locator(".hotswap-live"),
    )
    if not has_kernel:
        expect(static.first).to_be_visible()
        assert panel.count() == 0
        return
    panel.get_by_role("radio", name="shout").click(timeout=60_000)
    expect(panel.locator(".hotswap-answer")).to_contain_text("HOTSWAP!")
    expect(panel.get_by_role("radio", name="shout")).to_be_checked()
