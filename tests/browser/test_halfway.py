"""The swap that stops halfway, in Chromium: by mouse, keyboard and touch, on a phone, dark, and without JavaScript.

By itself, and, where ``SITE`` names the folder of the built site, on the pages that have it:
``SITE=docs/_build/html pytest -m "long or not long" tests/browser/test_halfway.py``.
"""

from __future__ import annotations

import json
import re
import runpy

import pytest
from front_ends import ROOT, chromium, open_browser
from lengths import few_of, long
from playwright.sync_api import expect
from site_pages import COLORS, SIZES, TOO_WIDE, opening, pages
from test_palette import contrast

from hotswap_lab.figures.palette import adapter_color

pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium")

MAKE = runpy.run_path(str(ROOT / "docs" / "halfway" / "make.py"))
DATA = json.loads((ROOT / "docs" / "halfway" / "data.json").read_text())
CHAPTERS = ("00_start_here", "01_uncompiled_swap", "02_rank_padding", "03_compiled_swap")
PAGES = pages("index.html", *(f"notebooks/{name}.html" for name in CHAPTERS))
#: by itself, on the first page and in one chapter: in the others it only has another width and other neighbors
WHERE = list(dict.fromkeys((*PAGES[:2], PAGES[-1])))
#: where each element is, from the top of the part and from left to right
PLACES = """box => [...box.querySelectorAll('*')]
    .filter(each => each.getClientRects().length && !each.closest('.halfway-line') && each.tagName !== 'I')
    .filter(each => !each.matches('code, span, strong, wbr, br, em'))
    .filter(each => !each.closest('.halfway-guess div, details, pre, select'))
    .map(each => {
        const {top, bottom, left, right} = each.getBoundingClientRect(), from = box.getBoundingClientRect().top
        return each.matches('p p, .halfway-tries p') ? left : [each.tagName, top - from, bottom - from, left, right]
    })"""
CUT = """box => [...box.querySelectorAll('button, output, p, .halfway-base, .halfway-tries > div')]
    .filter(each => each.getClientRects().length && !each.matches('.halfway-says'))
    .filter(each => each.scrollWidth > each.clientWidth || each.scrollHeight > each.clientHeight + 1)
    .map(each => each.outerHTML)"""


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(params=few_of(WHERE, ["", WHERE[-1]]), ids=lambda path: path or "alone")
def opened(request, browser, tmp_path):
    """A function that opens a page and returns it, with the part."""
    with opening(browser, tmp_path, "halfway", request.param) as opened:
        yield opened


def steps(pair: int = 0, order: str = "rows", word: str = "hotswap") -> list[str]:
    return [answers[DATA["words"].index(word)] for answers in DATA["pairs"][pair][order]]


def rgb(color: str) -> str:
    return "rgb({}, {}, {})".format(*bytes.fromhex(color[1:]))


def revealed(opened, *how):
    """A page whose line was moved by one step, and back."""
    page, part = opened(*how)
    part.get_by_role("slider").press("ArrowDown")
    part.get_by_role("slider").press("ArrowUp")
    return page, part


@pytest.mark.parametrize(
    ("guess", "key"),
    [
        *(
            ("pawstoh", ""),
            long("hotswap", "Space"),
            long("an error", ""),
            long("otswaphay", "Space"),
            long("otswaphay", ""),
        ),
        *(long("pawstoh", "Space"), long("hotswap", ""), long("an error", "Space")),
    ],
)
def test_the_answer_is_hidden_until_the_guess(opened, guess, key):
    _, part = opened()
    answer, buttons = (
        part.locator(".halfway-answer"),
        part.get_by_role("group", name="Guess first").get_by_role("button"),
    )
    expect(answer).to_have_text("?")
    expect(part.locator(".halfway-ribbon :is(.before, .after, .neither, .base)")).to_have_count(0)
    assert "hotswap." not in part.get_by_role("slider").get_attribute("aria-valuetext")
    button, right = buttons.filter(has_text=guess), guess == "hotswap"
    button.press(key) if key else button.click()
    expect(answer).to_have_text("hotswap")
    feedback = part.get_by_role("group", name="Guess first").get_by_role("status")
    expect(feedback).to_contain_text("Right, at step 6: hotswap." if right else f"At step 6: hotswap, not {guess}.")
    expect(feedback).to_contain_text("Neither adapter's; no error.")
    expect(part.get_by_role("slider")).to_be_focused()  # and not on a button that is off now
    for each in buttons.all():
        expect(each).to_be_disabled()
    expect(part.locator(".halfway-yes")).to_have_text("hotswap")
    expect(part.locator(".halfway-no")).to_have_text([] if right else [guess])
    part.get_by_role("combobox", name="order").select_option("layers")  # at whose step 6 there is another answer
    expect(feedback).to_be_empty()


@pytest.mark.long
@pytest.mark.parametrize("how", ["guess", "line", "request"])
def test_another_word_or_swap_gives_a_new_guess(opened, how):
    _, part = opened()
    line, answer, buttons = (
        part.get_by_role("slider"),
        part.locator(".halfway-answer"),
        part.get_by_role("group", name="Guess first").get_by_role("button"),
    )
    for number, word in ((0, "elephant"), (2, "elephant"), (2, "hello")):
        if how == "guess":
            buttons.first.click()
        elif how == "line":
            line.press("End")
        else:
            part.get_by_role("button", name="no lock").click()
        expect(answer).not_to_have_text("?")
        part.get_by_role("combobox", name="swap").select_option(str(number))
        part.get_by_role("combobox", name="word").select_option(word)
        expect(answer).to_have_text("?")
        expect(line).to_have_attribute("aria-valuetext", "Step 6 of 33. Guess, or move the line.")
        expect(part.locator(".halfway-says")).to_have_text("Step 6 of 33. Guess, or move the line.")
        expect(part.locator("[value=none] + div p")).to_be_hidden()  # it would say the answer
        expect(part.get_by_role("group", name="Guess first").get_by_role("status")).to_have_text("")
        own = [steps(number, word=word)[at] for at in (0, -1, 6)]
        assert buttons.all_text_contents() == [*dict.fromkeys([*own, "an error"])]
        expect(buttons.first).to_be_enabled()


@pytest.mark.long
def test_memory_answer_and_ribbon_move_together_by_keyboard(opened):
    _, part = opened()
    line, rows = part.get_by_role("slider", name="step of the swap"), part.locator(".halfway-bars i")
    line.press("Home")
    found = []
    for step in range(34):
        found.append(part.locator(".halfway-answer").text_content())
        expect(line).to_have_attribute("aria-valuenow", str(step))
        expect(line).to_have_attribute("aria-valuetext", re.compile(rf"^{found[-1]}\. Step {step} of 33: "))
        expect(part.locator(".halfway-bars .after")).to_have_count(step)  # pig_latin fills all 32 rows
        expect(part.locator(".halfway-bars .before")).to_have_count(max(8 - step, 0) + (step < 33))
        expect(part.locator(".halfway-ribbon i").nth(step)).to_have_class(re.compile("here"))
        whose = "before" if found[-1] == "pawstoh" else "after" if found[-1] == "otswaphay" else "base|neither"
        expect(part.locator(".halfway-ribbon .here")).to_have_class(re.compile(whose))
        line.press(("ArrowDown", "ArrowRight")[step % 2])
    assert found == steps()
    expect(rows).to_have_count(33)
    texts = {
        0: "this is reverse",
        6: "the base's answer, the word itself",
        24: "neither reverse",
        32: "not all of pig_latin",
        33: "is pig_latin",
    }
    for step, text in texts.items():
        line.press("Home")
        for _ in range(step):
            line.press("ArrowRight")
        expect(part.locator(".halfway-verdict")).to_contain_text(text)
    line.press("ArrowUp")
    line.press("PageUp")
    expect(line).to_have_attribute("aria-valuenow", "27")
    base, own = (part.locator(each).bounding_box() for each in (".halfway-base", ".halfway-bars"))
    sizes = DATA["sizes"]
    assert base["width"] * base["height"] / (own["width"] * own["height"]) == pytest.approx(
        sizes["weight"] / sizes["rows"], 0.01
    )
    color = "each => getComputedStyle(each).backgroundColor"
    assert rows.first.evaluate(color) == rgb(adapter_color("pig_latin"))


@pytest.mark.long
@pytest.mark.parametrize("touch", [False, True])
def test_the_line_and_the_ribbon_can_be_dragged(opened, touch):
    page, part = opened("phone" if touch else "wide", has_touch=touch)
    part.locator(".halfway-memory").scroll_into_view_if_needed()
    line, answer = part.get_by_role("slider"), part.locator(".halfway-answer")
    bars, handle = (part.locator(each).bounding_box() for each in (".halfway-bars", ".halfway-line b"))
    page.mouse.move(handle["x"] + 8, handle["y"] + 8)
    page.mouse.down()
    for step in (10, 20, 33, 99, 1):
        page.mouse.move(bars["x"] + 5, bars["y"] + bars["height"] * step / 33, steps=3)
        expect(answer).to_have_text(steps()[min(step, 33)])
    page.mouse.up()
    page.mouse.move(bars["x"] + 5, bars["y"] + bars["height"])
    expect(line).to_have_attribute("aria-valuenow", "1")
    expect(line).to_be_focused()
    expect(part.get_by_text("You moved the line")).to_be_visible()
    if touch:
        page.touchscreen.tap(bars["x"] + 5, bars["y"] + bars["height"] * 3 / 33)
        expect(line).to_have_attribute("aria-valuenow", "3")
    part.locator(".halfway-ribbon").scroll_into_view_if_needed()
    ribbon = part.locator(".halfway-ribbon").bounding_box()
    page.mouse.click(ribbon["x"] + ribbon["width"] * 24.5 / 34, ribbon["y"] + 10)
    expect(line).to_have_attribute("aria-valuenow", "24")


@pytest.mark.long
def test_each_swap_word_and_order(opened):
    _, part = revealed(opened)
    answer, line = part.locator(".halfway-answer"), part.get_by_role("slider")
    swaps, words, orders = (part.get_by_role("combobox", name=name, exact=True) for name in ("swap", "word", "order"))
    for number, pair in enumerate(DATA["pairs"]):
        swaps.select_option(str(number))
        for order, word in (("rows", "hello"), ("layers", "hello"), ("layers", "kernel"), ("rows", "kernel")):
            orders.select_option(order)
            words.select_option(word)
            line.press("ArrowDown")
            line.press("ArrowUp")
            orders.select_option("layers" if order == "rows" else "rows")
            orders.select_option(order)
            expect(answer).to_have_text(steps(number, order, word)[6])
            says = part.locator(".halfway-says")
            expect(says).to_contain_text(f"{steps(number, order, word)[6]}. Step 6 of {33 if order == 'rows' else 28}")
            expect(part.locator(".halfway-ends")).to_contain_text(steps(number, order, word)[0])
            used = [DATA["adapters"][pair[each]]["ranks"] for each in ("before", "after")]
            new = sum(map(bool, used[1][:6])) if order == "layers" else min(6, used[1][0])
            old = sum(map(bool, used[0][6:])) if order == "layers" else max(used[0][0] - 6, 0)
            what = "layers" if order == "layers" else "rows"
            legend = part.locator("figure .halfway-legend")
            all_of = [sum(map(bool, each)) if order == "layers" else each[0] for each in used]
            expect(legend).to_contain_text(f"{new} of {pair['after']}'s {all_of[1]} {what}")
            expect(legend).to_contain_text(f"{old} of {pair['before']}'s {all_of[0]} {what}")
            zeros = (22 if order == "layers" else 26) - old, 6 - new
            expect(legend).to_contain_text("which add nothing: {} not yet written, {} written".format(*zeros))
            expect(part.locator(".halfway-bars .done")).to_have_count(zeros[1])
            expect(part.locator(".halfway-bars .room:not(.done)")).to_have_count(zeros[0])
    # the pictures of the compiled model are those of reverse and pig_latin, whatever is chosen
    color = "all => all.map(each => getComputedStyle(each).backgroundColor)"
    boxes = part.locator(".halfway-boxes b").evaluate_all(color)
    assert boxes == [rgb(adapter_color(name)) for name in ("reverse", "pig_latin")] * 2
    orders.select_option("layers")
    line.press("End")
    expect(line).to_have_attribute("aria-valuenow", "28")
    expect(answer).to_have_text(steps(3, "layers", "kernel")[-1])
    expect(part.locator("pre").first).to_contain_text("[:28]:")


#: by the value of a button: its name, and what it shows
RESULTS = {
    "none": ("no lock", ["gets hotswap at once: neither adapter's answer"]),
    "reload": ("reload", [f"{DATA['measured']['waits'][0]['reload']:g}\xa0ms", "gets otswaphay"]),
    "using": ("pool.using", [f"{DATA['measured']['waits'][0]['using']:g}\xa0ms", "gets otswaphay"]),
    "without": (
        "no room",
        [
            *DATA["measured"]["without"]["guards"],
            "first guard that failed",
            f"1 recompile: the next call took {DATA['measured']['without']['seconds']:g}\xa0s",
        ],
    ),
    "with": (
        "room for 32",
        [
            "every guard holds",
            "Same shape, same address",
            f"0 recompiles: the next call took {DATA['measured']['with']['seconds'] * 1000:g}\xa0ms",
        ],
    ),
    "loop": (
        "loop by hand",
        [DATA["damage"]["loop"]["error"], "10 of pig_latin's 16", DATA["damage"]["loop"]["answers"][0]],
    ),
    "refused": (
        "hotswap_lab",
        [DATA["damage"]["refused"]["error"].split("\n")[0], "nothing written", "answers pawstoh"],
    ),
}


@pytest.mark.long
@pytest.mark.parametrize(("size", "key"), [("wide", ""), ("phone", "Enter"), ("wide", "Enter"), ("phone", "")])
def test_each_button_shows_its_result_and_its_code(opened, key, size):
    _, part = opened(size)
    for value, (name, texts) in RESULTS.items():
        button, result = part.get_by_role("button", name=name, exact=True), part.locator(f"[value={value}] + div")
        expect(result.locator("p").last).to_be_hidden()
        expect(button).to_have_attribute("aria-pressed", "false")
        button.press(key) if key else button.click()
        expect(button).to_have_attribute("aria-pressed", "true")
        for each in result.locator("p").all():
            expect(each).to_be_visible()
        says = part.locator(".halfway-says")
        for text in texts:
            expect(result).to_contain_text(text)
            expect(says).to_contain_text(text)
        code = part.locator("details", has=part.page.locator(f"pre[data-code={value}]"))
        assert code.locator("pre").text_content() == MAKE["filled_in"](MAKE["CODE"][value], VALUES)
        expect(code.locator("summary")).to_have_text(f"the code: {name}")
    shown = [part.locator(f"[value={value}] + div p").last.is_visible() for value in RESULTS]
    assert shown == ([True] * 7 if size == "wide" else [False, False, True, False, True, False, True])


VALUES = {"before": "reverse", "after": "pig_latin", "word": "hotswap", "step": 6}


@pytest.mark.long
def test_what_a_request_gets_follows_the_line(opened):
    _, part = revealed(opened)
    part.get_by_role("button", name="no lock").click()
    result = part.locator("[value=none] + div")
    part.get_by_role("button", name="pool.using").click()
    waits = part.locator("[value=using] + div")
    part.get_by_role("slider").press("End")
    expect(waits).to_contain_text("pig_latin is whole: it gets otswaphay, without waiting")
    part.get_by_role("slider").press("ArrowUp")
    expect(waits).to_contain_text("until pig_latin is whole, then gets otswaphay")
    for keys, text in (
        (["End"], "gets otswaphay at once. The swap is over: move the line back."),
        (["ArrowUp"], "gets otswaphay at once: right, though"),
        (["Home"], "gets pawstoh at once: reverse's answer, and no error."),
        (["ArrowDown"], "gets pawatoh at once: neither"),
    ):
        for key in keys:
            part.get_by_role("slider").press(key)
        expect(result).to_contain_text(text)
    part.get_by_role("combobox", name="word").select_option("kernel")
    expect(part.locator("[value=using] + div p")).to_contain_text(f"gets {steps(word='kernel')[-1]}")
    expect(part.locator("[value=loop] + div")).to_contain_text(DATA["damage"]["loop"]["answers"][3])


@pytest.mark.long
def test_the_code_can_be_copied(opened):
    page, part = opened()
    for summary in part.locator("summary").all():
        summary.press("Enter")
    for button, pre in zip(part.locator("details button").all(), part.locator("pre").all(), strict=True):
        button.click()
        expect(button).to_have_text("copied")
        assert page.evaluate("() => String(getSelection())").strip() == pre.text_content()
        expect(pre).to_be_visible()


@pytest.mark.long
@pytest.mark.parametrize("opened", PAGES, indirect=True)
@pytest.mark.parametrize(("size", "scheme"), [("phone", "dark"), ("tablet", "dark"), ("wide", "light")])
def test_nothing_moves_or_is_cut_and_all_can_be_read(opened, size, scheme):
    page, part = opened(size, scheme)
    before = part.evaluate(PLACES)
    part.get_by_role("button", name="pawstoh").click()
    for value in RESULTS:
        part.locator(f"[value={value}]").click()
    for number, order, word in (
        (0, "rows", "hotswap"),
        (2, "rows", "elephant"),
        (1, "layers", "umbrella"),
        (2, "rows", "orange"),
    ):
        for name, choice in (("swap", str(number)), ("order", order), ("word", word)):
            part.get_by_role("combobox", name=name, exact=True).select_option(choice)
        longest = max(steps(number, order, word), key=len)
        part.get_by_role("slider").press("Home")
        for _ in range(steps(number, order, word).index(longest)):
            part.get_by_role("slider").press("ArrowDown")
        expect(part.locator(".halfway-answer")).to_have_text(longest)
        assert part.evaluate(PLACES) == before, longest
        assert part.evaluate(CUT) == []
    texts = ".halfway-note, .halfway-yes, .halfway-no"
    texts += ", .halfway-verdict, .halfway-answer, .halfway-wrong, .halfway-right, .part-small, figcaption, code"
    for text in part.locator(texts).all():
        assert contrast(*text.evaluate(COLORS)) >= 4.5, text.text_content()
    assert not page.evaluate(TOO_WIDE)


@pytest.mark.long
def test_the_toggle_of_the_theme_moves_it(opened):
    page, part = revealed(opened)
    color = "each => getComputedStyle(each).backgroundColor"
    light = part.evaluate(color), part.locator(".halfway-bars .after").first.evaluate(color)
    page.evaluate("document.body.dataset.theme = 'dark'")
    dark = part.evaluate(color), part.locator(".halfway-bars .after").first.evaluate(color)
    assert light[0] != dark[0]
    assert light[1] != dark[1]


@pytest.mark.long
def test_a_still_picture_without_javascript(browser, tmp_path):
    with opening(browser, tmp_path, "halfway", "") as opened:
        _, part = revealed(opened)
        for value in RESULTS:
            part.locator(f"[value={value}]").click()
        live = part.evaluate("each => each.innerText")
        marks = ".halfway-bars i, .halfway-ribbon i"
        kinds = part.locator(marks).evaluate_all("all => all.map(each => each.className)")
        for size in SIZES:
            _, part = opened(size, java_script_enabled=False)
            assert part.locator(marks).evaluate_all("all => all.map(each => each.className)") == kinds
            for text in (
                ".halfway-answer",
                ".halfway-verdict",
                ".halfway-tries p",
                "figcaption",
                ".halfway-legend span",
            ):
                for each in part.locator(text).all():
                    expect(each).to_be_visible()
                    assert each.inner_text() in live
            expect(part.get_by_role("combobox")).to_have_count(0)
            expect(part.locator("noscript p")).to_be_visible()


@pytest.mark.long
def test_without_motion(browser, tmp_path):
    with opening(browser, tmp_path, "halfway", "") as opened:
        moving = (
            "all => all.map(each => getComputedStyle(each).transitionDuration).filter(each => each !== '0s').length"
        )
        marks = ".halfway-line, .halfway-tries i"
        found = [
            opened(reduced_motion=how)[1].locator(marks).evaluate_all(moving) for how in ("reduce", "no-preference")
        ]
        assert found[0] == 0 < found[1]


@pytest.mark.long
def test_it_comes_before_the_map(browser, tmp_path):
    for name in [each for each in PAGES if each.endswith(("index.html", "00_start_here.html"))]:
        with opening(browser, tmp_path, "halfway", name) as opened:
            page, part = opened()
            assert part.bounding_box()["y"] < page.locator(".alive").bounding_box()["y"]
