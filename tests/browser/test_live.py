"""The site's first page, on which a model runs: its answers are PyTorch's, in Chromium.

By itself, and, where ``SITE`` names the folder of the built site, on the site and in its single file:
``SITE=docs/_build/html pytest -m "long or not long" tests/browser/test_live.py``.
"""

from __future__ import annotations

import base64
from itertools import permutations

import numpy as np
import pytest
from front_ends import chromium, open_browser
from lengths import few_of
from live_model import CLOSE, Reference, read_in

from hotswap_lab import demo
from hotswap_lab.demo.tasks import sample_words

pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium")

NAMES = demo.adapter_names()
WORDS = [*dict.fromkeys(["hotswap", "a", "notebooks", *sample_words(60, seed=7, held_out=True)])][:50]
HALFWAY_WORDS = ["hotswap", "elephant", "kernel", "i", "adapterbox"]
ASK = """({name, strength, words, texts}) => {
    memory.swap(packed[name ?? "reverse"], null, name ? strength : 0)
    const logits = texts.map(text => model.logits(text, memory).map(each => [...each]))
    return [words.map(word => model.answer(word, memory)), logits]
}"""
BYTES = """new Promise(done => {
    const reader = new FileReader()
    reader.onload = () => done(reader.result.split(",")[1])
    reader.readAsDataURL(new Blob([memory.numbers]))
})"""
STOP = """([before, after, step, words]) => {
    memory.stop(packed[before], packed[after], step)
    return [words.map(word => model.answer(word, memory)), stepsOf(packed[before], packed[after])]
}"""


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def model(browser):
    """An empty page with the model."""
    page = browser.new_page()
    read_in(page)
    return page


@pytest.fixture(scope="module")
def reference():
    return Reference()


@pytest.mark.parametrize("much", few_of([(1, 2), (0, 50), (0.5, 50), (1, 50)], [(1, 2)]), ids=str)
@pytest.mark.parametrize("name", [None, *NAMES])
def test_answers_and_logits_are_those_of_pytorch(model, reference, name, much):
    """At this strength, for so many words; a base has no strength, so it is asked the same each time."""
    strength, words = much[0], WORDS[: much[1]]
    fresh = demo.load_base() if name is None else demo.load(name)[0]
    for module in fresh.modules() if name else ():
        if hasattr(module, "set_scale"):
            module.set_scale("default", strength)
    expected = reference.answers(words, fresh)
    texts = [f"{word}>{answer}" for word, answer in zip(words, expected, strict=True)]
    found, logits = model.evaluate(ASK, dict(name=name, strength=strength, words=words, texts=texts))
    for text, each in zip(texts, logits, strict=True):
        assert np.abs(np.array(each) - reference.logits(text, fresh)).max() < CLOSE, text
    for word, *both in zip(words, expected, found, strict=True):
        assert both[0] == both[1] or reference.are_as_likely(word, *both)
    assert strength != 1 or found == [*map(demo.TASKS[name or "copy"], words)]


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_has_the_same_bytes(model, reference, name):
    """After a swap from the adapter with most rows, as in the library: the same layout, padding and scalings."""
    for each in ("sort", name):
        reference.pool.swap(each)
    swap = "name => { memory.swap(packed.sort); memory.swap(packed[name], packed.sort) }"
    model.evaluate(swap, name)
    numbers, scalings = reference.memory()
    assert base64.b64decode(model.evaluate(BYTES)) == numbers.tobytes()
    assert model.evaluate("[...memory.scalings]") == scalings.tolist()


PAIRS = [*permutations(NAMES, 2)]


@pytest.mark.parametrize("pair", few_of(PAIRS, [("double", "caesar")]), ids="-".join)
def test_each_step_of_a_swap_gives_the_answers_of_the_same_bytes(model, reference, pair):
    before, after = pair
    step, last = 0, 1
    while step <= last:
        found, last = model.evaluate(STOP, [before, after, step, HALFWAY_WORDS])
        reference.stop(before, after, step)
        expected = reference.answers(HALFWAY_WORDS)
        for word, *both in zip(HALFWAY_WORDS, expected, found, strict=True):
            assert both[0] == both[1] or reference.are_as_likely(word, *both), (step, word, *both)
        step += 1
    assert found == [demo.TASKS[after](word) for word in HALFWAY_WORDS]


@pytest.mark.parametrize("word", ["", "Hello", "two words", "elevenchars", "naïve", "a>"])
def test_a_page_asks_no_other_words(model, word):
    assert not model.evaluate("isWord", word)
    assert model.evaluate("isWord", "adapterbox")
