"""SwapPanel: everything a click does, done from Python, and by clicks on its controls."""

from __future__ import annotations

import itertools
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from IPython.display import Audio
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from refusals import refused
from shown import WORD, click, folders, live, panel_with

from hotswap_lab import Adapter, AdapterPool, demo, hotswap_adapter, verify_hotswap
from hotswap_lab.demo import digits
from hotswap_lab.figures.palette import light
from hotswap_lab.lessons.diffusion import Drawn
from hotswap_lab.widgets import SwapPanel
from hotswap_lab.widgets.results import Run
from hotswap_lab.widgets.text import text_stream

#: what is done, one after the other; then what is said to be active, and the answer
WALK = [
    ("adapter", "shout", "shout is active at strength 1", "shout: HOTSWAP!"),
    ("adapter", "no_vowels", "no_vowels is active at strength 1", "no_vowels: h*tsw*p"),
    ("prompt", "notebook", "no_vowels is active at strength 1", "no_vowels: n*t*b**k"),
    ("prompt", WORD, "no_vowels is active at strength 1", "no_vowels: h*tsw*p"),
    ("strength", 0.5, "no_vowels is active at strength 0.5", "no_vowels at strength 0.5: hotsw*p"),
    # a swap sets the strength to 1
    ("adapter", "shout", "shout is active at strength 1", "shout: HOTSWAP!"),
    ("adapter", None, "the adapter is off", "no adapter: hotswap"),
    ("adapter", "shout", "shout is active at strength 1", "shout: HOTSWAP!"),
]


#: the color, the name and the text of an answer
SHOWN = re.compile(r'background:(#\w+)">(no adapter|\w+)<.*pre-wrap">([^<]*)<')


@pytest.fixture
def panel():
    return SwapPanel.demo(WORD)


@pytest.fixture(params=["pool", "model"])
def either(request):
    """A panel for a pool, and one for a model."""
    model, tokenizer = demo.load("reverse")
    adapters = folders("reverse", "no_vowels", "shout")

    def ask(word):
        return demo.ask(model, tokenizer, word)

    if request.param == "pool":
        return SwapPanel(AdapterPool(model, adapters=adapters, progress=False), ask, prompt=WORD)
    return SwapPanel(model, ask, adapters=adapters, prompt=WORD)


def click_on(panel, what, value):
    """After which the page shows what has become of it."""
    live(panel)
    if what == "adapter":
        click(panel, value or "off")
    elif what == "strength":
        panel._slider.value = value
    else:
        panel._box.value = value
        panel._run_button.click()
    assert panel.wait(60)
    assert panel._radios.value == (panel.active or "off")
    assert (panel._slider.value, panel._box.value) == (panel.strength, panel.prompt)
    assert f">{panel.answer.result}<" in panel._answer.value
    assert re.search(r"<span>swap .* m?s.*</span><span></span>", panel._status.value)  # and is not busy


def test_a_walk(either):
    for what, value, active, answer in WALK:
        click_on(either, what, value)
        assert str(either).splitlines() == [f"SwapPanel: 3 adapters, {active}", answer]
        assert answer.rpartition(": ")[2] in either.to_html()
        assert either.swaps[-1] > 0
    assert verify_hotswap(either.model, demo.adapter_path("shout"))
    hotswap_adapter(either.model, demo.adapter_path("vowels_up"), "default")
    assert "another adapter is active at strength 1" in str(either)
    either.active, result = "no_vowels", either.answer.result
    either.strength = 0.75
    live(either)
    assert either._slider.value == 0.75
    assert either.answer.result == result  # neither runs
    either.active = None
    assert either.active is None


def test_an_answer_is_compared_with_the_one_that_was_pinned(panel):
    """Not with that of the last click."""
    assert live(panel)._pin_button.disabled
    for name in ("sort", "shout"):
        panel.choose(name)
        if name == "sort":
            panel._pin_button.click()
    panel.prompt = "notebook"
    panel.choose("double")
    assert str(panel).splitlines()[1:] == ["double: notebooknotebook", "compared with sort: ahopstw"]
    assert "asked <code>hotswap</code>" in panel._kept.value
    assert all(each in panel.figure().svg for each in ("notebooknotebook", "ahopstw", "compared with sort, asked"))


def test_the_answer_grows_and_belongs_to_its_name_and_color_all_the_time(panel, monkeypatch):
    monkeypatch.setattr("hotswap_lab.widgets.work.SHOW_EVERY", -1.0)
    seen, answers = [], {"shout": "HOTSWAP!", "sort": "ahopstw", "no adapter": WORD}
    live(panel)._answer.observe(lambda change: seen.extend(SHOWN.findall(change["new"])), "value")
    for name in ("shout", "sort", "off"):
        click(panel, name)
    for color, name, answer in seen:
        assert color == light(None if name == "no adapter" else name)
        assert answers[name].startswith(answer)
    growing = [answer for _, name, answer in dict.fromkeys(seen) if name == "shout" and answer]
    assert growing == ["HOTSWAP!"[:length] for length in range(1, 9)]


def test_the_stream_says_what_ask_says_up_to_its_limit():
    model, tokenizer = demo.load("shout")
    assert list(text_stream(model, tokenizer, template="{}>")(WORD))[-1] == demo.ask(model, tokenizer, WORD)
    assert torch.is_grad_enabled()
    assert list(text_stream(model, tokenizer, template="{}>", max_new_tokens=3)(WORD))[-1] == "HOT"
    model.generation_config.eos_token_id = tokenizer("W")["input_ids"]
    assert list(text_stream(model, tokenizer, template="{}>")(WORD))[-1] == "HOTS"
    model.generation_config.eos_token_id = tokenizer("H")["input_ids"]
    assert list(text_stream(model, tokenizer, template="{}>")(WORD)) == [""]


def test_an_adapter_without_a_strength_has_no_slider():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(use_dora=True, target_modules=["0"]))
    adapter = Adapter.from_state_dict(get_peft_model_state_dict(model), model.peft_config["default"])
    panel = live(SwapPanel(model, str, adapters={"dora": adapter}))
    assert panel._slider.disabled
    click(panel, "dora")
    assert str(panel).splitlines()[0] == "SwapPanel: 1 adapter, dora is active"


def test_a_long_run_can_be_stopped_and_does_not_block():
    started = threading.Event()

    def generate(prompt):
        for number in itertools.count():
            yield f"{prompt} {number}"
            started.set()

    panel = live(panel_with(generate, "reverse", "sort"))
    panel.start()
    assert started.wait(30)
    assert panel.busy
    assert not panel.wait(timeout=0.01)
    assert panel._run_button.disabled
    assert not panel._stop_button.disabled
    assert not panel._radios.disabled  # a click on one of them comes next
    refused("busy", setattr, panel, "active", "sort")
    panel._stop_button.click()
    assert panel.wait(30)
    assert (panel.answer.done, panel.error) == (False, None)
    assert panel.answer.result.startswith(WORD)
    assert not panel._run_button.disabled
    panel.active, panel.generate = "sort", str.upper
    assert panel.run() == WORD.upper()


@pytest.mark.parametrize("way", ["stop", "Jupyter's interrupt"])
def test_a_run_in_a_cell_can_be_stopped_too(way):
    def generate(prompt):
        yield "so far"
        if way != "stop":
            raise KeyboardInterrupt
        panel.stop()
        yield "more"
        yield "never"

    panel = panel_with(generate, "reverse")
    if way == "stop":
        assert panel.run() is None
    else:
        with pytest.raises(KeyboardInterrupt):
            panel.run()
    assert panel.answer.text == ("more ..." if way == "stop" else "so far ...")
    assert not panel.busy


def test_errors_are_shown_in_full_and_break_nothing(either):
    either.choose("no_vowels")
    good = either.generate

    def bad(prompt):
        raise RuntimeError("no <b>luck</b>\nsecond line")

    either.generate = bad
    with pytest.raises(RuntimeError, match="luck"):
        live(either).run()
    either.start()  # as a click: shown, not raised
    assert either.wait(30)
    # the message, the traceback, and for screen readers
    for part in ("RuntimeError: no &lt;b&gt;luck&lt;/b&gt;\nsecond line", "in bad", 'role="alert"'):
        assert part in either._problem.value
    assert "error: RuntimeError" in str(either)
    assert either.answer.result == ""  # no old answer next to a prompt that has none
    either.generate = good
    assert either.choose("shout") == "HOTSWAP!"
    assert either.error is None
    assert either._problem.value == ""


def test_a_refused_swap_leaves_model_and_panel_as_they_were():
    panel = panel_with(str, "pig_latin")
    panel._switch.adapters["a picture's"] = digits.path("inverted")
    panel.choose("pig_latin")
    click(panel, "a picture's")
    assert "expected: tensors only for layers of the loaded adapter" in panel._problem.value
    refused(None, setattr, panel, "active", "a picture's")
    refused("No adapter is called", setattr, panel, "active", "nobody")
    assert panel.active == "pig_latin"


def test_whatever_jupyter_shows_can_be_an_answer():
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    panel = panel_with(lambda prompt: red, "sort", prompt="a <red> one")
    panel.choose("sort")
    assert 'src="data:image/png;base64,' in live(panel)._answer.value
    assert "the image for “a &lt;red&gt; one” with sort" in panel._answer.value
    assert "href='data:image/png" in panel.figure().svg.partition("asked “a &lt;red&gt; one”")[2]
    assert "an image (Image)" in str(panel)
    output = SimpleNamespace(images=[blue])  # as a pipeline of diffusers gives it
    drawn = Drawn(torch.ones(2, 4, 4))  # its own `images` are a tensor
    for result in (output, drawn, [blue]):
        assert "data:image/png" in Run("p", "sort", result=result, done=True).shown
    panel.generate = lambda prompt: Audio([0.0, 0.5] * 50, rate=8000)
    panel.run()
    assert "<audio" in panel._answer.value
    assert str(panel).endswith("sort: Audio")


def test_the_pool_may_grow_and_a_prompt_be_impossible(panel):
    count = len(live(panel)._radios.options)
    panel._switch.add("again", demo.adapter_path("sort"))
    click(panel, "again")
    assert (len(panel._radios.options), panel.active) == (count + 1, "again")
    panel._box.value = "widget"
    panel._box._handle_string_msg(None, {"event": "submit"}, [])  # the key Enter, where a prompt has one line
    assert panel.wait(60)
    assert (panel.answer.prompt, panel.answer.result) == ("widget", "degitw")
    for panel.prompt, word in (("", "empty"), ("é", "does not know all")):
        refused(word, panel.run)
        assert panel.answer.result == ""
    panel.run_on_swap = False
    click(panel, "shout")
    assert (panel.active, panel.answer.label) == ("shout", "again")
    panel = panel_with(str, "sort", run_on_swap=False)
    click(panel, "sort")
    assert (panel.active, panel.answer) == ("sort", None)
    panel.swaps.extend(number / 1000 for number in range(30))
    assert "swap 29 ms, median of 20: 19.5 ms" in live(panel)._status.value
    assert panel._status.value.count("<circle") == 20


def test_the_map_follows(panel, monkeypatch):
    seen = [live(panel)._picture.value]
    for name, strength in (("shout", 1), ("shout", 0.5), (None, 0)):
        panel.choose(name)
        panel.strength = strength
        seen.append(panel._picture.value)
    assert len({*seen}) == 4
    assert "shout is in 14 of 28 layers" in seen[1]
    assert "the adapter is off" in seen[3]
    hotswap_adapter(panel.model, demo.adapter_path("sort"), "default")
    with monkeypatch.context() as patched:
        patched.setattr(panel.map, "_look", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            panel._changed()
    assert "another adapter is in 28" in live(panel)._picture.value
