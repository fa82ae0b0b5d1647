"""The notebooks and the widgets in a real browser: JupyterLab 4, Notebook 7 and Voila, in Chromium.

Each chapter is run in JupyterLab and in Notebook, all widgets are clicked in both, and one page is served by Voila.
"""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest
from front_ends import FRONT_ENDS, ROOT, SETUP, WIDGETS, NotebookPage, chromium, jupyter, open_browser, write_notebook
from PIL import Image
from playwright.sync_api import expect

from hotswap_lab import figures
from hotswap_lab.figures import palette
from hotswap_lab.figures.png import address as address_of
from hotswap_lab.figures.png import png

CHAPTERS = sorted(path.name for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))

pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium")

BUSY = """import time

from hotswap_lab import in_use

answers, end = set(), time.monotonic() + 60
while panel.answer and panel.active != "sort" and time.monotonic() < end:
    with in_use(panel):
        answers.add(list(panel.generate("hotswap"))[-1])
print(panel.active, answers <= {demo.TASKS[name]("hotswap") for name in panel.names} | {"hotswap"})"""


#: two of each on one model, and a cell that swaps by Python, now and in a thread
VIEWS = [
    f"""{SETUP}
import threading
from hotswap_lab import Adapter
from hotswap_lab.widgets.switch import demo_pool
pool, tokenizer = demo_pool(rows=4)
double = Adapter.load(demo.adapter_path("double"))
views = []
def show(kind):
    for _ in range(2):
        if kind is SwapPanel:
            views.append(SwapPanel(pool, tokenizer=tokenizer, template="{{}}" + demo.SEPARATOR, prompt="hotswap"))
            views[-1].choose("reverse")
        elif kind is RowPanel:
            views.append(RowPanel(pool, lambda words: demo.ask_all(pool.model, tokenizer, words), prompts=["hotswap"]))
            views[-1].choose(0, "sort"), views[-1].run()
        else:
            model, inputs = pool.model, pool.model.get_base_model().dummy_inputs
            views.append(WeightMap(pool) if kind is WeightMap else Guards({{"it": model}}, {{"sort": "..."}}, inputs))
        display(views[-1])""",
    "for kind in (SwapPanel, WeightMap, RowPanel, Guards): show(kind)",
    "pool.swap('shout'), pool.update('sort', double.tensors, double.config)",
    "threading.Timer(1, pool.swap, ['pig_latin']).start()",
    "pool.model.base_model.disable_adapter_layers()",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the notebooks for each front end, because two pages with one file would share a kernel, and more."""
    folder, ignored = tmp_path_factory.mktemp("notebooks"), shutil.ignore_patterns("solutions", ".*", "*.py")
    cells = (SETUP, *WIDGETS.values(), "panel.active, panel.strength", BUSY)
    for front_end in FRONT_ENDS:
        shutil.copytree(ROOT / "notebooks", folder / front_end, ignore=ignored)
        write_notebook(folder / f"{front_end}.ipynb", cells)
    write_notebook(folder / "voila.ipynb", cells[:2])
    write_notebook(folder / "views.ipynb", VIEWS)
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


#: those that run: of the others, a browser shows nothing that nbval does not compare. Chapters 02 to 05 have
#: widgets like those of the page with every widget, and models that take minutes
WITH_WIDGETS = [
    name
    for name in CHAPTERS
    if name[:2] not in ("02", "03", "04", "05")
    and "hotswap_lab.widgets import" in (ROOT / "notebooks" / name).read_text()
]
#: in JupyterLab; Notebook 7 has the same engine, so it runs the first chapter and the page with every widget
RUNS = [*((name, "lab") for name in CHAPTERS), ("00_start_here.ipynb", "notebook")]


def pictures_in(notebook: nbformat.NotebookNode) -> int:
    stored = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    drawn = sum(data.get("text/html", "").count('src="data:image/png') for data in stored)  # by a panel
    return drawn + sum("image/svg+xml" in data for data in stored)


@pytest.mark.long
@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_a_chapter_shows_its_pictures_without_trust_and_runs_without_an_error(run, new_page, address, folder):
    """As in a fresh clone, which JupyterLab doesn't trust."""
    name, front_end = run
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    # what takes minutes, and is stored
    notebook.cells = [cell for cell in notebook.cells if "nbval-skip" not in cell.metadata.get("tags", [])]
    nbformat.write(notebook, folder / front_end / name)
    page, count = new_page(), pictures_in(notebook)
    notebook = NotebookPage(page, address, front_end, f"{front_end}/{name}")
    cells = "[...window.jupyterapp.shell.currentWidget.content.model.cells].filter(cell => cell.type === 'code')"
    assert not page.evaluate(f"() => {cells}.some(cell => cell.trusted && cell.outputs.length)")
    images = page.locator(".jp-OutputArea-output img[src^='data:image/png']")
    expect(images).to_have_count(count)
    is_drawn = "images => images.map(image => image.complete && image.naturalWidth > 100)"
    assert all(page.evaluate(is_drawn, images.element_handles()))
    if name in WITH_WIDGETS:
        notebook.run_all(timeout=300)
        outputs = notebook.outputs()
        assert [each for each in outputs if each["output_type"] == "error" or each.get("name") == "stderr"] == []
        page.locator(".hotswap-live").first.wait_for(state="attached")
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
    word = scrubber.locator(".hotswap-word")
    scrubber.get_by_role("slider", name="step").focus()
    for key, answer in (("ArrowRight", "pawatoh"), ("End", "otswaphay"), ("Home", "pawstoh")):
        page.keyboard.press(key)
        expect(word).to_have_text(answer)
    scrubber.get_by_role("button", name="another").press("Enter")
    expect(scrubber).to_contain_text("You said another. It is hotswap.")
    expect(word).to_have_text("hotswap")
    for how, gets in (("no lock", "it gets hotswap"), ("pool.using", "ms, then gets otswaphay")):
        scrubber.get_by_role("button", name=how).press("Enter")
        expect(scrubber).to_contain_text(gets)
    expect(word).to_have_text("hotswap")
    guards.get_by_text("shout", exact=True).first.focus()
    page.keyboard.press("Enter")
    expect(guards.locator(".hotswap-picture svg").first).to_contain_text("✗ scaling was 2, is 1: 14 layers")
    expect(guards).not_to_contain_text("busy")
    expect(guards.locator(".hotswap-picture svg").nth(1)).to_contain_text("every guard holds")
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
    rows.get_by_role("textbox", name="request 0").first.fill("kernel")
    before = rows.evaluate(PLACES)
    rows.get_by_role("button", name="Answer all").click()
    expect(rows).to_contain_text("kernel")  # the text of an answer, but not of a box
    assert rows.evaluate(PLACES) == before


@pytest.mark.long
def test_on_a_phone_nothing_is_too_wide_and_every_control_has_a_name(widgets):
    page = widgets["page"]
    before = page.viewport_size
    page.set_viewport_size({"width": 390, "height": 844})
    page.evaluate("() => window.jupyterapp.shell.collapseLeft?.()")  # JupyterLab's list of files
    page.wait_for_timeout(500)
    try:
        for name in WIDGETS:
            too_wide = widgets[name].evaluate(
                "box => [...box.querySelectorAll('button, input, textarea, select, .hotswap-answer, '"
                " + '.hotswap-picture svg')]"
                ".filter(each => !each.closest('.hotswap-scroll'))"  # these are in a table that scrolls
                ".filter(each => each.getBoundingClientRect().right > box.getBoundingClientRect().right + 1).length"
            )
            assert too_wide == 0, name
            controls = r"^\s*- (?:button|radio|slider|textbox|combobox)(?!.* \"|.*\").*$"
            assert re.findall(controls, widgets[name].aria_snapshot(), re.MULTILINE) == [], name
    finally:
        page.set_viewport_size(before)


# ---- without a kernel; these come last, because they end the kernel


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


# ---- several views of one model


@pytest.mark.long
def test_two_of_each_say_the_same_of_one_model_whoever_changes_it(address, new_page):
    """By a click, by a cell, by a thread, and by PEFT; within a second, and some for the machine."""
    page = new_page(viewport={"width": 900, "height": 900})
    notebook = NotebookPage(page, address, "lab", "views.ipynb")
    for place in (0, 1):
        notebook.run_cell(place)
    views, soon = page.locator(".hotswap-live"), 2_500
    expect(views).to_have_count(8)
    panels, maps, rows, guards = ([views.nth(2 * place), views.nth(2 * place + 1)] for place in range(4))

    def expect_all(name: str, old: list, now: str) -> None:
        for each in panels:
            expect(each.get_by_role("radio", name=name)).to_be_checked(timeout=soon)
        for each in (*panels, *maps):
            expect(each.locator(".hotswap-picture")).to_contain_text(now, timeout=soon)
            expect(each.locator(".hotswap-picture")).to_have_attribute("data-note", "", timeout=soon)
        for each in (*panels, *rows, *guards):
            says = expect(each).to_contain_text if each in old else expect(each).not_to_contain_text
            says("changed since", timeout=soon)
        for each in (*panels, *rows):
            expect(each.locator(".hotswap-old")).to_have_count(int(each in old), timeout=soon)
        for each in guards:  # the second one has seen what the first one did
            expect(each.locator(".hotswap-picture")).to_have_attribute("data-note", re.compile("changed"), timeout=soon)

    panels[0].get_by_role("radio", name="sort").click()
    expect(panels[0].locator(".hotswap-answer")).to_contain_text("ahopstw")
    expect_all("sort", [panels[1], *guards], "sort is in 28")
    for cell, name, now in ((2, "shout", "shout is in 14"), (3, "pig_latin", "pig_latin is in 16")):
        notebook.run_cell(cell)
        page.wait_for_timeout(1000 * (cell == 3))
        expect_all(name, [*panels, *rows, *guards], now)
    notebook.run_cell(4)
    expect_all("off", [*panels, *rows, *guards], "the adapter is off")
    panels[1].get_by_role("button", name="Run").click()
    expect(panels[1].locator(".hotswap-answer")).to_contain_text("no adapterhotswap")
    expect_all("off", [panels[0], *rows, *guards], "the adapter is off")
    assert [each for each in notebook.outputs() if each["output_type"] == "error"] == []
    notebook.shut_down()


@pytest.mark.long
def test_a_figure_has_the_theme_of_its_page_and_a_photo_in_it_its_own_colors(new_page):
    page, canvas = new_page(), figures.Canvas(40, 20)
    photo = f"<image x='0' y='0' width='20' height='20' href='{address_of(png([[0]], [palette.WHITE]))}'/>"
    canvas.shapes.append(photo)
    svg = canvas.figure("a photo, and the card")._repr_mimebundle_()["image/svg+xml"]
    image = f'<img src="data:image/svg+xml,{quote(svg)}">'
    for theme, card in (("light", 251), ("dark", 20)):
        page.set_content(f'<body style="margin: 0; color-scheme: {theme}">{image}</body>')
        pixels = Image.open(io.BytesIO(page.locator("img").screenshot())).convert("L")
        assert abs(pixels.getpixel((30, 10)) - card) < 10
        assert pixels.getpixel((10, 10)) > 230


# ---- one panel, also in Voila, which runs a notebook and shows what it puts out


@pytest.mark.long
@pytest.mark.parametrize("where", ["JupyterLab", "Voila", "Voila without a kernel"])
def test_a_panel_is_live(address, new_page, where):
    page = new_page(viewport={"width": 1100, "height": 900})
    panel = page.locator(".hotswap-live")
    if where == "JupyterLab":
        NotebookPage(page, address, "lab", "voila.ipynb").run_all()
    else:
        if "without" in where:
            page.route_web_socket("**/channels*", lambda socket: socket.close())
        page.goto(address.format(path="voila/render/voila.ipynb"), timeout=120_000)
    if "without" in where:
        expect(page.locator(".jp-OutputArea-output img, .jp-OutputArea-output > svg").first).to_be_visible()
        assert panel.count() == 0
    else:
        panel.get_by_role("radio", name="shout").click(timeout=60_000)
        expect(panel.locator(".hotswap-answer")).to_contain_text("HOTSWAP!")
        expect(panel.get_by_role("radio", name="shout")).to_be_checked()
