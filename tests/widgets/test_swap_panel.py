"""SwapPanel: everything a click does, done from Python, and by clicks on its controls."""

from __future__ import annotations

import itertools
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from refusals import refused

from hotswap_lab import Adapter, AdapterPool, demo, get_strength, hotswap_adapter, verify_hotswap
from hotswap_lab.demo import digits
from hotswap_lab.lessons.diffusion import Drawn
from hotswap_lab.widgets import SwapPanel
from hotswap_lab.widgets.results import Run
from hotswap_lab.widgets.text import text_stream

WORD = "hotswap"


def folders(*names):
    return {name: demo.adapter_path(name) for name in names}


@pytest.fixture
def panel():
    return SwapPanel.demo(WORD)


@pytest.fixture(params=["pool", "model"])
def either(request):
    """A panel for a pool, and one for a model."""
    model, tokenizer = demo.load("reverse")
    adapters = folders("reverse", "sort", "shout")

    def ask(word):
        return demo.ask(model, tokenizer, word)

    if request.param == "pool":
        return SwapPanel(AdapterPool(model, adapters=adapters, progress=False), ask, prompt=WORD)
    return SwapPanel(model, ask, adapters=adapters, prompt=WORD)


def click(panel, name):
    panel.box  # noqa: B018 - makes the controls
    panel._refresh()
    button = next(each for each in panel._buttons.children if each.description[2:] == name)
    button.click()
    assert panel.wait(60)


def test_a_swap_and_a_run(either):
    assert either.names == ["reverse", "sort", "shout"]
    assert (either.prompt, either.strength, either.busy) == (WORD, 1, False)
    either.active = "sort"
    assert either.active == "sort"
    assert either.after is None
    assert either.swap_seconds > 0
    assert verify_hotswap(either._switch.model, demo.adapter_path("sort"))
    assert either.run() == demo.TASKS["sort"](WORD)
    assert either.after.state == "done"
    assert either.after.seconds > 0


def test_before_and_after_are_of_the_same_prompt(either):
    either.choose("sort")
    either.choose("shout")
    assert (either.before.where, either.before.result) == ("sort", "ahopstw")
    assert (either.after.where, either.after.result) == ("shout", "HOTSWAP!")
    either.prompt = "notebook"
    either.run()
    assert either.before is None
    assert either.after.result == "NOTEBOOK!"
    either.run()  # the same again has nothing new to be compared with
    assert either.before is None


def test_off(either):
    either.choose("sort")
    assert either.choose(None) == WORD  # the base model copies
    assert either.active is None
    assert "the adapter is off" in str(either)
    assert either.after.label == "no adapter"
    either.choose("sort")
    either.active = None
    assert either.active is None


def test_strength(either):
    either.active = "shout"
    either.strength = 0.5
    assert get_strength(either._switch.model) == 0.5
    either.run()
    assert either.after.label == "shout at strength 0.5"
    either.active = "shout"  # a swap sets it to 1
    assert either.strength == 1


def test_a_swap_elsewhere_is_noticed(either):
    either.active = "sort"
    hotswap_adapter(either._switch.model, demo.adapter_path("vowels_up"), "default")
    assert either.active is None
    assert "another adapter is active" in str(either)


def test_clicks(panel):
    click(panel, "shout")
    assert panel.active == "shout"
    assert panel.after.result == "HOTSWAP!"
    click(panel, "pig_latin")
    assert (panel.before.result, panel.after.result) == ("HOTSWAP!", "otswaphay")
    names = [button.description for button in panel._buttons.children]
    assert [name for name in names if name[0] == "●"] == ["● pig_latin"]
    click(panel, "off")
    assert panel.after.result == WORD
    assert panel._buttons.children[-1].description == "● off"


def test_the_slider_and_the_box_follow_and_lead(panel):
    panel.box  # noqa: B018
    panel.active = "no_vowels"
    panel._slider.value = 0.5
    assert panel.wait(60)
    assert panel.strength == 0.5
    assert panel.after.result == "hotsw*p"
    panel.strength = 0.75
    assert panel._slider.value == 0.75
    panel.prompt = "notebook"
    assert panel._box.value == "notebook"
    panel._box.value = "widget"
    assert panel.prompt == "widget"
    panel._run_button.click()
    assert panel.wait(60)
    assert panel.after.prompt == "widget"


def test_a_click_without_running():
    panel = SwapPanel.demo(WORD, run_on_swap=False)
    click(panel, "shout")
    assert panel.active == "shout"
    assert panel.after is None


def test_the_answer_grows(panel, monkeypatch):
    monkeypatch.setattr("hotswap_lab.widgets.work.SHOW_EVERY", -1.0)
    seen = []
    panel.box  # noqa: B018
    panel._cards[1].observe(lambda change: seen.extend(re.findall(r'pre-wrap">(.*?)<', change["new"])), "value")
    panel.choose("shout")
    growing = ["HOTSWAP!"[:length] for length in range(1, 9)]
    assert [each for each in dict.fromkeys(seen) if each] == growing


def test_the_stream_says_what_ask_says():
    for name in demo.adapter_names():
        model, tokenizer = demo.load(name)
        assert list(text_stream(model, tokenizer, template="{}>")(WORD))[-1] == demo.ask(model, tokenizer, WORD)
    assert torch.is_grad_enabled()


def test_the_stream_stops_at_its_limit():
    model, tokenizer = demo.load("shout")
    assert list(text_stream(model, tokenizer, template="{}>", max_new_tokens=3)(WORD))[-1] == "HOT"


def panel_with(generate, *names, prompt=WORD):
    return SwapPanel(demo.load("reverse")[0], generate, adapters=folders(*names), prompt=prompt)


def test_a_long_run_can_be_stopped_and_does_not_block():
    started = threading.Event()

    def generate(prompt):
        for number in itertools.count():
            yield f"{prompt} {number}"
            started.set()

    panel = panel_with(generate, "reverse", "sort")
    panel.box  # noqa: B018
    panel.start()
    assert started.wait(30)
    assert panel.busy
    assert not panel.wait(timeout=0.01)
    assert panel._run_button.disabled
    assert not panel._stop_button.disabled
    assert not any(button.disabled for button in panel._buttons.children)  # a click on one of them comes next
    refused("busy", setattr, panel, "active", "sort")
    refused("busy", panel.run)
    panel._stop_button.click()
    assert panel.wait(30)
    assert panel.after.state == "stopped"
    assert panel.after.result.startswith(WORD)
    assert panel.error is None
    assert not panel._run_button.disabled
    panel.active = "sort"
    panel.generate = str.upper
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
    assert (panel.after.result, panel.after.state) == ("more" if way == "stop" else "so far", "stopped")
    assert not panel.busy


def test_errors_are_shown_in_full_and_break_nothing(either):
    either.choose("sort")
    good = either.generate

    def bad(prompt):
        raise RuntimeError("no <b>luck</b>\nsecond line")

    either.generate = bad
    either.box  # noqa: B018
    with pytest.raises(RuntimeError, match="luck"):
        either.run()
    either.start()  # as a click: shown, not raised
    assert either.wait(30)
    shown = either._status.value
    assert "RuntimeError: no &lt;b&gt;luck&lt;/b&gt;\nsecond line" in shown
    assert "in bad" in shown  # the traceback
    assert 'role="alert"' in shown
    assert "error: RuntimeError" in str(either)
    assert (either.before, either.after) == (None, None)  # no old answer next to a prompt that has none
    either.generate = good
    assert either.choose("shout") == "HOTSWAP!"
    assert either.error is None
    assert "alert" not in either._status.value


def test_a_refused_swap_leaves_model_and_panel_as_they_were():
    model, tokenizer = demo.load("pig_latin")
    adapters = folders("pig_latin") | {"a picture's": digits.path("inverted")}
    panel = SwapPanel(model, tokenizer=tokenizer, template="{}>", adapters=adapters, prompt=WORD)
    panel.choose("pig_latin")
    click(panel, "a picture's")
    assert "expected: tensors only for layers of the loaded adapter" in panel._status.value
    assert panel.active == "pig_latin"
    refused(None, setattr, panel, "active", "a picture's")
    refused("no adapter called", setattr, panel, "active", "nobody")
    assert panel.run() == "otswaphay"


def test_images():
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    panel = panel_with(lambda prompt: red, "reverse", "sort", prompt="a <red> one")
    panel.choose("sort")
    html = panel.to_html()
    assert 'src="data:image/png;base64,' in html
    assert "the image for “a &lt;red&gt; one” with sort" in html
    assert "an image (Image)" in str(panel)
    output = SimpleNamespace(images=[blue])  # as a pipeline of diffusers gives it
    drawn = Drawn(torch.ones(2, 4, 4))  # its own `images` are a tensor
    for result in (output, drawn, [blue]):
        assert "data:image/png" in Run("p", "sort", result=result, state="done").to_html("after")
    assert Run("p", "sort", result=drawn, state="done").text == "an image (Drawn)"


def test_static_form(panel):
    panel.choose("shout")
    panel.choose("sort")
    html, stored = panel.to_html(), panel._static()
    assert all(piece in html for piece in ("● sort", "○ shout", "HOTSWAP!", "ahopstw"))
    assert "<script" not in html
    assert " ms" not in stored["text/html"]  # the same from run to run
    panel.box  # noqa: B018
    panel._refresh()
    assert all(piece in panel._status.value for piece in ("for the swap; ", "run: "))
    assert stored["text/plain"] == str(panel) == repr(panel)


def test_nothing_becomes_markup():
    panel = SwapPanel(demo.load("reverse")[0], str, adapters={"<i>x</i>": demo.adapter_path("sort")}, prompt="<b>")
    panel.choose("<i>x</i>")
    panel.box  # noqa: B018
    panel._refresh()
    values = [panel.to_html(), panel._title.value, *(card.value for card in panel._cards)]
    assert not any("<b>" in each or "<i>" in each for each in values)


def test_the_pool_may_grow(panel):
    panel.box  # noqa: B018
    panel._refresh()
    count = len(panel._buttons.children)
    panel._switch.add("again", demo.adapter_path("sort"))
    panel._refresh()
    assert len(panel._buttons.children) == count + 1
    click(panel, "again")
    assert panel.active == "again"


def test_dora_has_no_strength():
    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False))
    adapter = Adapter.from_state_dict(get_peft_model_state_dict(model), model.peft_config["default"])
    panel = SwapPanel(model, str, adapters={"a": adapter}, prompt="x")
    panel.box  # noqa: B018
    panel._refresh()
    assert panel._slider.disabled
    panel.active = "a"
    assert panel.active == "a"


@pytest.mark.parametrize(("prompt", "word"), [("", "empty"), ("é", "does not know all")])
def test_a_prompt_that_cannot_be_answered(panel, prompt, word):
    panel.choose("sort")
    panel.prompt = prompt
    refused(word, panel.run)
    assert (panel.before, panel.after) == (None, None)
    panel.prompt = WORD
    assert panel.run() == "ahopstw"


def test_enter_runs_the_prompt_of_one_line(panel):
    panel.box  # noqa: B018
    panel._box.value = "widget"
    panel._box._handle_string_msg(None, {"event": "submit"}, [])
    assert panel.wait(60)
    assert panel.after.prompt == "widget"
    lines = SwapPanel.demo(WORD, multiline=True)
    lines.box  # noqa: B018
    assert type(lines._box).__name__ == "Textarea"


def test_the_map_follows(panel):
    panel.box  # noqa: B018
    panel._refresh()
    seen = [panel._picture.value]
    for name, strength in (("shout", 1), ("shout", 0.5), (None, 0)):
        panel.choose(name)
        panel.strength = strength
        seen.append(panel._picture.value)
    assert len({*seen}) == 4
    assert "shout is in the model" in seen[1]
    assert "the adapter is off" in seen[3]
    assert "model.layers.1.self_attn.q_proj: rank 8, padded to" in seen[1]
    assert "model.layers.0.self_attn.q_proj: the adapter is off here" in seen[1]
    hotswap_adapter(panel.model, demo.adapter_path("sort"), "default")
    panel._refresh()
    assert "another adapter is in the model" in panel._picture.value
