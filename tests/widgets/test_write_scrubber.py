"""WriteScrubber: at both ends the model is the adapter, in between it is neither; nothing moves; requests get that."""

from __future__ import annotations

import base64
import io
import re

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from shown import live

from hotswap_lab import Adapter, demo, in_use, verify_hotswap
from hotswap_lab.figures.palette import MUTED, WHITE, adapter_color, mix
from hotswap_lab.widgets import WriteScrubber
from hotswap_lab.widgets.write_scrubber import CELL, COLUMNS, SHADES


@pytest.fixture(scope="module")
def view():
    return live(WriteScrubber())


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [("reverse", "pig_latin"), ("double", "caesar")])
def test_at_both_ends_it_is_the_adapter_and_in_between_it_is_neither_at_the_same_addresses(before, after):
    view = WriteScrubber(before, after)
    base = {name: each.clone() for name, each in view.model.named_parameters() if "lora_" not in name}
    addresses, found = view._slot.data_ptrs(), {}
    for step in (0, 1, view.steps - 1, view.steps):
        view.go(step)
        found[step] = [bool(verify_hotswap(view.model, demo.adapter_path(name))) for name in (before, after)]
        assert view._slot.data_ptrs() == addresses
    # all rows are right before the last step, but not the scalings
    assert found == {0: [True, False], 1: [False] * 2, view.steps - 1: [False] * 2, view.steps: [False, True]}
    assert [view.answers[step] for step in (0, view.steps)] == [demo.TASKS[name]("hotswap") for name in (before, after)]
    assert all(torch.equal(base[name], each) for name, each in view.model.named_parameters() if name in base)


def halfway(step: int) -> str:
    """What a base answers to whose weights the first rows of pig_latin and the others of reverse are added."""
    old, new = (Adapter.load(demo.adapter_path(name)).tensors for name in ("reverse", "pig_latin"))
    base, tokenizer = demo.load_base(), demo.load_tokenizer()
    for key in [each for each in old if "lora_A" in each]:
        a, b = torch.zeros(32, old[key].shape[1]), torch.zeros(32, len(old[key.replace("lora_A", "lora_B")]))
        for rows, name, axis in ((a, key, 0), (b, key.replace("lora_A", "lora_B"), 1)):
            for tensors, some in ((old, slice(step, 32)), (new, slice(0, step))):
                if name in tensors:
                    own = tensors[name].movedim(axis, 0)[some]
                    rows[some][: len(own)] = own
        base.get_parameter(key[17:].replace("lora_A.", "")).data += 2.0 * b.T @ a  # reverse's scaling, up to the end
    return demo.ask(base, tokenizer, "hotswap")


@pytest.mark.long
def test_every_answer_on_the_way_is_that_of_such_a_model(view):
    assert [view.answers[step] for step in range(33)] == [halfway(step) for step in range(33)]
    assert "gray: neither, 31 of 34 answers<" in view._picture(True)
    colors = [adapter_color("reverse"), *[MUTED] * 31, *[adapter_color("pig_latin")] * 2]
    assert re.findall(r"<rect x='[^>]*fill='(.*?)'", view._picture(True)) == colors
    assert demo.ask(demo.load_base(), demo.load_tokenizer(), "hotswap") == "hotswap"  # as the picture says of step 6


@pytest.mark.long
def test_the_layer_that_is_drawn_is_one_that_both_have():
    """The first layer of the model is none of shout's; reverse has eight rows in all, shout in those of the middle."""
    assert "reverse has 8 rows (its rank), shout 8<" in WriteScrubber("reverse", "shout")._picture(True)


@pytest.mark.long
def test_the_base_is_named_where_it_answers_on_the_way(view):
    named = "hotswap: what the base answers without an adapter<"
    assert named in view._picture(True)
    other = WriteScrubber("reverse", "shout")
    assert "hotswap" not in other.answers.values()
    assert named not in other._picture(True)


def test_a_word_that_both_answer_alike_is_refused():
    """With these, the picture would call sort, at step 0, what reverse answers."""
    with pytest.raises(ValueError, match="sort and reverse answer 'fed' alike, 'def'"):
        WriteScrubber("sort", "reverse", "fed")


def cells(view):
    """The colors of a row of cells for each rank component; the middle of a cell has a dot if there is none."""
    data = re.search('png;base64,([^"]*)', view._picture(True))[1]
    image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    middles = range(CELL // 2 - 1, image.width, CELL), range(CELL // 2 - 1, image.height, CELL)
    return [["#" + bytes(image.getpixel((x, y))).hex() for x in middles[0]] for y in middles[1]]


def owners(view):
    """For each row of cells, the adapter whose tints it has; "" for dots."""
    tints = {
        name: {mix(adapter_color(name), (n + 1) / SHADES, WHITE) for n in range(SHADES)} for name in view.names
    } | {"": {MUTED}}
    rows = [{*row[:COLUMNS], *row[-COLUMNS:]} for row in cells(view)]
    return [next(name for name, colors in tints.items() if row <= colors) for row in rows]


@pytest.mark.long
def test_each_step_writes_one_row_of_every_layer():
    view = WriteScrubber("reverse", "vowels_up")
    addresses = [tensor.parameter.data_ptr() for tensor in view._slot.tensors]
    view.go(3)
    ranks = [LoraConfig.from_pretrained(demo.adapter_path(name)).r for name in view.names]
    assert f"reverse has {ranks[0]} rows (its rank), vowels_up {ranks[1]}<" in view._picture(True)
    assert [tensor.parameter.data_ptr() for tensor in view._slot.tensors] == addresses  # as the picture says
    for tensor, old, new in zip(view._slot.tensors, *view._ends, strict=True):
        rows = tensor.parameter.movedim(tensor.rank_axis, 0)
        assert torch.equal(rows[:3], new[:3])
        assert torch.equal(rows[3:], old[3:])
    assert owners(view) == ["vowels_up"] * 3 + ["reverse"] * 5 + [""] * 24
    layer = view._slot.layers[view._layer]
    strongest = layer.tensors[0].parameter[0, :COLUMNS].abs().argmax().item()
    assert cells(view)[0][strongest] == adapter_color("vowels_up")
    view.go(view.steps)
    assert owners(view) == ["vowels_up"] * 8 + [""] * 24


def test_the_answers_on_the_way_are_hidden_until_the_reader_has_guessed():
    view = live(WriteScrubber())
    shown, question = '<g visibility="{}">', '<text x="10" y="170" visibility="{}">'
    assert shown.format("hidden") in view._body.value
    assert question.format("visible") in view._body.value
    assert shown.format("visible") in view._static()["image/svg+xml"]  # where nobody can guess
    view._run(lambda: view._guess("otswaphay"))
    view._changed()
    assert shown.format("visible") in view._body.value
    assert question.format("hidden") in view._body.value


@pytest.mark.long
def test_a_request_gets_what_it_is_said_to_get_and_the_line_is_held_meanwhile(view):
    view.go(6)
    before = [each.parameter.clone() for each in view._slot.tensors]
    for how in ("no lock", "demo.load", "pool.using"):
        view._enqueue(how, lambda how=how: view._request(how))
        assert view.wait(60)
        assert how in view.arrived
    seconds = r"it waits [\d.]+ m?s, then gets otswaphay"
    assert view.arrived["no lock"] == "it gets hotswap"
    assert re.fullmatch(seconds, view.arrived["demo.load"])
    assert re.fullmatch(seconds, view.arrived["pool.using"])
    assert "with pool.using(&#x27;pig_latin&#x27;): demo.ask(" in view._results["pool.using"].value
    assert view.arrived["pool.using"] in view._results["pool.using"].value
    assert all(map(torch.equal, before, [each.parameter for each in view._slot.tensors]))  # half a swap, as before
    view.go(7)  # where they have not arrived
    assert "it " not in "".join(each.value for each in view._results.values())


@pytest.mark.long
def test_the_slider_writes_in_its_turn_and_shows_what_the_model_answers(view):
    with in_use(view.model):  # a thread that computes with the model
        view._slider.value = 33
        assert not view.wait(0.3)
        view._changed()
        assert view._slider.value == 33  # where the user has moved it, and not back
    assert view.wait(60)
    assert "what pig_latin answers" in view._body.value
    view.go(0)
    assert view._slider.value == 0
    assert "what reverse answers" in view._static()["image/svg+xml"]
    view._enqueue("a guess", lambda: view._guess("otswaphay"))
    assert view.wait(60)
    assert view._slider.value == view.step == 6
    assert view._said.value == "&nbsp;You said otswaphay. It is hotswap."
    for step in (-1, 34, 1.5):
        with pytest.raises(ValueError, match="0 to 33"):
            view.go(step)


def test_a_swap_by_other_code_makes_it_gray(view):
    view.go(6)
    assert not view._note
    assert "changed since" not in view.to_html()
    view.pool.swap("pig_latin")
    assert "changed since" in view.to_html()
    view.go(6)
    assert not view._note
