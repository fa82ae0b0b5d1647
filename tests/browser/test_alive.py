"""The part of the site that is alive without a kernel, in Chromium: by mouse and keyboard, on a phone, light and dark.

By itself, and, where ``SITE`` names the folder of the built site, on the pages that have it:
``SITE=docs/_build/html pytest tests/browser/test_alive.py``.
"""

from __future__ import annotations

import json
import re

import pytest
from front_ends import ROOT, chromium, open_browser
from lengths import long
from playwright.sync_api import expect
from site_pages import COLORS, SITE, TOO_WIDE, opening, pages
from test_palette import contrast

from hotswap_lab import demo
from hotswap_lab.figures.palette import adapter_color

pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium")

DATA = json.loads((ROOT / "docs" / "alive" / "data.json").read_text())
#: the place of strength 1 in lists
AS_TRAINED = DATA["strengths"].index(1)
PAGES = pages("index.html", "notebooks/00_start_here.html")
#: how far below the top of the part each of its elements begins and ends, and where they are from left to right
PLACES = """box => [box, ...box.querySelectorAll('*')].filter(each => each.getClientRects().length).map(each => {
    const {top, bottom, left, right} = each.getBoundingClientRect(), from = box.getBoundingClientRect().top
    return each.closest('.alive-answer') ? top - from : [top - from, bottom - from, left, right]
})"""
CUT = """box => [...box.querySelectorAll('.alive-answer, pre, select, fieldset span')]
    .filter(each => each.scrollWidth > each.clientWidth || each.scrollHeight > each.clientHeight).length"""
#: for each layer, whether any pixel of its tile has a color
PAINTED = """map => [...map.querySelectorAll('canvas')].map(each =>
    each.getContext('2d').getImageData(0, 0, each.width, each.height).data.some(Boolean))"""


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(params=PAGES, ids=lambda path: path or "alone")
def opened(request, browser, tmp_path):
    """A function that opens a page and returns it, with the part that is alive."""
    with opening(browser, tmp_path, "alive", request.param) as opened:
        yield opened


def stored(name: str, strength: float, word: str) -> str:
    return DATA["adapters"][name]["answers"][DATA["strengths"].index(strength)][DATA["words"].index(word)]


def test_each_button_shows_its_adapter(opened):
    _, part = opened()
    answer, time = part.locator(".alive-answer output"), part.locator(".alive-time")
    for name in reversed(demo.adapter_names()):
        part.get_by_text(name, exact=True).click()
        expect(part.get_by_role("radio", name=name)).to_be_checked()
        expect(part.get_by_role("radio", checked=True)).to_have_count(1)
        expect(answer).to_have_text(demo.TASKS[name]("hotswap"))
        expect(answer).to_have_css("color", "rgb({}, {}, {})".format(*bytes.fromhex(adapter_color(name)[1:])))
        expect(time).to_contain_text(f"took {DATA['measured']['swap'][name][AS_TRAINED]:g} ms")
        expect(part.locator("pre")).to_contain_text(f'pool.swap("{name}", strength=1)')
        layers = DATA["adapters"][name]["tiles"]
        assert part.locator(".alive-map").evaluate(PAINTED) == [path in layers for path in DATA["layers"]]
        expect(part.get_by_role("img")).to_have_accessible_name(re.compile(f"{name} is in {len(layers)} of 28 layers"))


def test_by_keyboard(opened):
    page, part = opened()
    answer, names = part.locator(".alive-answer output"), demo.adapter_names()
    part.get_by_role("radio", checked=True).focus()
    page.keyboard.press("ArrowRight")
    following = names[names.index("reverse") + 1]
    expect(part.get_by_role("group", name="adapter").get_by_role("radio", name=following)).to_be_focused()
    expect(answer).to_have_text(demo.TASKS[following]("hotswap"))
    page.keyboard.press("Tab")
    slider = part.get_by_role("slider", name="strength", exact=True)
    expect(slider).to_be_focused()
    expect(slider).to_have_attribute("aria-valuetext", "1: as trained")
    for strength in (0.75, 0.5):
        page.keyboard.press("ArrowLeft")
        expect(answer).to_have_text(stored(following, strength, "hotswap"))
    took = DATA["measured"]["strength"][following][DATA["strengths"].index(0.5)]
    expect(part.get_by_role("status").last).to_contain_text(f"change of strength took {took:g} ms")
    page.keyboard.press("Tab")
    expect(part.get_by_role("combobox", name="word")).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(answer).to_have_text(stored(following, 0.5, DATA["words"][1]))
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "0: off")
    expect(answer).to_have_text(DATA["words"][1])
    assert not any(part.locator(".alive-map").evaluate(PAINTED))


@pytest.mark.long
@pytest.mark.parametrize("size", ["phone", "wide"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_moves_or_is_cut_and_all_can_be_read(opened, size, scheme):
    page, part = opened(size, scheme)
    answer = part.locator(".alive-answer output")
    before = part.evaluate(PLACES)
    for name in demo.adapter_names():
        part.get_by_text(name, exact=True).click()
        for strength, text in ((0, "hello"), (1, "elephant")):
            part.get_by_role("slider").fill(str(strength))
            part.get_by_role("combobox").select_option(text)
            expect(answer).to_have_text(stored(name, strength, text))
            assert part.evaluate(PLACES) == before, (name, text)
            assert part.evaluate(CUT) == 0, (name, text)
        assert contrast(*answer.evaluate(COLORS)) >= 4.5, name
    assert not page.evaluate(TOO_WIDE)


@pytest.mark.parametrize("size", ["wide", long("phone")])
def test_the_map_and_readmes_picture_follow_the_theme(opened, size):
    page, part = opened(size)
    readme = bool(page.locator("picture").count())  # which only the first page of the site has
    assert readme == page.url.endswith("index.html")
    assert dark_pictures(page) == [False] * readme
    color = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 1, 1).data].slice(0, 3)"
    light = part.locator("canvas").first.evaluate(color)
    page.evaluate("document.body.dataset.theme = 'dark'")
    page.wait_for_function(f"before => String(({color})(document.querySelector('canvas'))) !== before", arg=str(light))
    assert sum(part.locator("canvas").first.evaluate(color)) > sum(light)
    assert dark_pictures(page) == [True] * readme


def dark_pictures(page) -> list[bool]:
    """Of each of README's pictures that is seen, whether it is the dark one."""
    shown = [each for each in page.locator("picture img").all() if each.is_visible()]
    return [each.evaluate("image => image.currentSrc.includes('dark')") for each in shown]


@pytest.mark.parametrize("opened", PAGES[-1:], indirect=True)
def test_no_page_is_wider_than_a_phone(opened):
    """What is too wide, such as a table, scrolls inside of itself."""
    page, _ = opened("phone")
    for path in sorted(SITE.rglob("*.html")) if SITE != ROOT else []:
        page.goto(path.as_uri())
        assert not page.evaluate(TOO_WIDE), path
