"""StrengthLattice: its answers are a fresh load's, a click swaps, and a run leaves the model as it was."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from lengths import few_of
from oracle import observe
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from refusals import refused
from shown import WORD, folders, live

from hotswap_lab import Adapter, AdapterPool, demo, get_strength, hotswap_adapter, set_strength, verify_hotswap
from hotswap_lab.figures.palette import light
from hotswap_lab.widgets import StrengthLattice, SwapPanel

NAMES = ("no_vowels", "pig_latin")
STRENGTHS = (0, 0.5, 1)
FOLDERS = folders(*NAMES)


def expected(name, strength):
    """What a model answers that has loaded only this adapter."""
    model, tokenizer = demo.load(name)
    set_strength(model, strength)
    return demo.ask(model, tokenizer, WORD)


def lattice_of(kind, generate=None, loaded="reverse"):
    """With a pool or a model in which ``loaded`` is, which is none of these."""
    model, tokenizer = demo.load(loaded)
    ask = generate or (lambda word: demo.ask(model, tokenizer, word))
    if kind == "pool":
        pool = AdapterPool(model, adapters=FOLDERS, target_rank=32, progress=False)
        return StrengthLattice(pool, ask, strengths=STRENGTHS)
    return StrengthLattice(model, ask, adapters=FOLDERS, strengths=STRENGTHS)


@pytest.fixture(params=["pool", "model"])
def kind(request):
    return request.param


class OddError(Exception):
    pass


LOADED, ENDS = {"reverse": 0.3, "no_vowels": 1, "pig_latin": 0}, ("done", "error", "stop", "interrupt")
#: in the short form, each end with another adapter loaded
SOME = [*zip([*LOADED, "reverse"], ENDS, strict=True)]


@pytest.mark.parametrize("case", few_of(itertools.product(LOADED, ENDS), SOME), ids=", ".join)
def test_the_model_has_afterwards_what_it_had(kind, case):
    (loaded, end), strength = case, LOADED[case[0]]

    def generate(word):
        if next(calls) == 4:
            if end == "error":
                raise OddError
            if end == "interrupt":
                raise KeyboardInterrupt
            if end == "stop":
                lattice.stop()
        return word

    lattice, calls = lattice_of(kind, generate, loaded), itertools.count(5)
    model = lattice.model
    if kind == "model":  # has its layers from now on, turned off where the adapter lacks them
        lattice.run()
        if loaded in NAMES:
            lattice.choose(loaded)
        with torch.no_grad():  # as if it had been trained since
            next(each for name, each in model.named_parameters() if "lora_B" in name and each.any()).mul_(2)
    set_strength(model, strength)
    before, cell = state_of(model), lattice.cell
    calls = itertools.count()
    if end in ("error", "interrupt"):
        with pytest.raises(OddError if end == "error" else KeyboardInterrupt):
            lattice.run()
    else:
        assert (lattice.run() is None) is (end == "stop")
    after = state_of(model)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert (lattice.cell, get_strength(model)) == (cell, strength)
    assert len(lattice.answers["pig_latin"]) == (3 if end == "done" else 1)
    assert not lattice.busy
    set_strength(model, 1)
    assert bool(verify_hotswap(model, demo.adapter_path(loaded))) is (kind == "pool")


def state_of(model):
    """All tensors, and the scalings of layers that do something."""
    scalings = {
        f"{path}.scaling": torch.as_tensor(layer.scaling["default"]).clone()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and layer.lora_B["default"].weight.any()
    }
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | scalings


def click(lattice, name, strength):
    """As ``live.js`` does."""
    box = live(lattice).box.children[3]
    box.value = f"{len(lattice.swaps)} {name}@{strength}"


def marked(lattice):
    return re.findall(">●\xa0(.*?)<", live(lattice)._body.value)


#: what is clicked, one after the other; then the active adapter, the chosen cell, and the answers in cells like it
CLICKS = [
    (("pig_latin", 0.5), "pig_latin", ("pig_latin", 0.5), ["-"]),
    (None, "pig_latin", ("pig_latin", 0.5), ["otswap"]),
    (("no_vowels", 0), None, (None, 0), ["hotswap"] * 2),
    (("no_vowels", 1), "no_vowels", ("no_vowels", 1), ["h*tsw*p"]),
    (("no_vowels", 1), "no_vowels", ("no_vowels", 1), ["h*tsw*p"]),
]


def test_clicks_and_answers_which_are_those_of_a_fresh_load(kind):
    lattice = lattice_of(kind)
    assert str(lattice).splitlines()[1:] == ["hotswap    0  0.5  1", "no_vowels  -  -    -", "pig_latin  -  -    -"]
    for where, active, cell, answers in CLICKS:
        count = len(lattice.swaps)
        click(lattice, *where) if where else live(lattice)._run_button.click()
        assert lattice.wait(60)
        assert (lattice.active, lattice.cell, lattice.strength) == (active, cell, cell[1])
        assert marked(lattice) == answers
        assert len(lattice.swaps) > count
    assert verify_hotswap(lattice.model, FOLDERS["no_vowels"])
    assert lattice.run() == {name: {strength: expected(name, strength) for strength in STRENGTHS} for name in NAMES}
    assert lattice.runs[NAMES[0]][0.0].result == WORD
    lattice.choose("no_vowels", 0.5)
    assert str(lattice).splitlines() == [
        "StrengthLattice: 2 adapters, no_vowels is active at strength 0.5",
        "hotswap    0        0.5        1",
        "no_vowels  hotswap  ● hotsw*p  h*tsw*p",
        "pig_latin  hotswap  otswap     otswaphay",
    ]
    assert re.findall(">●\xa0(.*?)<", lattice.to_html()) == ["hotsw*p"]
    assert lattice.choose("pig_latin", 1) == "otswaphay"
    hotswap_adapter(lattice.model, demo.adapter_path("reverse"), "default")
    assert (lattice.cell[0], marked(lattice)) == (None, [])
    lattice.generate = lambda word: f"<i>\n{word}" * 9
    lattice.run()
    assert "<i> hotswap<i> hotswap<…" in str(lattice)


def test_a_click_while_it_fills_comes_next():
    def generate(word):
        if lattice.answers == {"no_vowels": {}}:
            click(lattice, "pig_latin", 0.5)
        return word

    lattice = lattice_of("model", generate)
    lattice.start()
    assert lattice.wait(60)
    assert len(lattice.answers["pig_latin"]) == 3
    assert lattice.cell == ("pig_latin", 0.5)


def test_one_prompt_for_all_and_colors_where_it_differs():
    def generate(word):
        lattice.prompt = "typed"  # meanwhile
        return word.upper() if lattice.cell == ("pig_latin", 1) else word

    lattice = lattice_of("model", generate)
    lattice.run()
    assert lattice.answers["pig_latin"] == {0: WORD, 0.5: WORD, 1: WORD.upper()}
    cells = re.findall('data-choose="(.*?)" style=".*?background:(.*?)">(.*?)<', live(lattice)._body.value)
    colored = [(name, color, answer) for name, color, answer in cells if color != "none"]
    assert (len(cells), colored) == (6, [("pig_latin@1.0", light("pig_latin"), WORD.upper())])


def test_strengths():
    lattice = StrengthLattice(demo.load("reverse")[0], str, adapters=FOLDERS, strengths=[1.5, 1 / 3, -1])
    assert lattice.strengths == [-1, 0, 0.333333, 1.5]
    assert [*lattice.run()["pig_latin"]] == lattice.strengths
    with pytest.raises(ValueError, match="could not convert"):
        StrengthLattice(demo.load("reverse")[0], str, adapters=FOLDERS, strengths=["high"])


def test_dora_has_one_answer_and_no_strength():
    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    options = dict(r=2, target_modules=["0"], init_lora_weights=False)
    lora, dora = (get_peft_model(copy.deepcopy(base), LoraConfig(use_dora=each, **options)) for each in (False, True))
    adapters = {
        name: Adapter.from_state_dict(get_peft_model_state_dict(model), model.peft_config["default"])
        for name, model in (("lora", lora), ("dora", dora))
    }
    assert live(SwapPanel(dora, str, adapters=adapters))._slider.disabled
    lattice = StrengthLattice(lora, str, adapters=adapters, strengths=STRENGTHS, prompt="x")
    lattice.choose("dora")
    assert lattice.run() == {"lora": {0: "x", 0.5: "x", 1: "x"}, "dora": {1: "x"}}
    assert str(lattice).splitlines()[-1] == "dora  -  -    ● x"
    assert lattice.cell == ("dora", 1)  # put back
    lattice.choose("lora")
    before = observe(lattice.model)
    refused("full strength", lattice.choose, "dora", 0.5)
    assert lattice.cell == ("lora", 1)
    assert observe(lattice.model).keys() == before.keys()
