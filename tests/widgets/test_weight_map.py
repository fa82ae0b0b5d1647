"""WeightMap: its tiles against the weights that PEFT computes, its counts against the model's own numbers."""

from __future__ import annotations

import itertools
import re
import threading
import time

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shown import folders, live

from hotswap_lab import AdapterPool, demo, hotswap_adapter, in_use, prepare_model_for_compiled_hotswap, set_strength
from hotswap_lab.demo import digits
from hotswap_lab.figures.palette import adapter_color
from hotswap_lab.figures.tiles import CELLS, Counts, split
from hotswap_lab.widgets import WeightMap


def fresh_load(name):
    return PeftModel.from_pretrained(demo.load_base(), demo.adapter_path(name))


def expected(fresh, path, n):
    """The root mean square of a fresh load's change of a weight, in n x n parts."""
    layer = fresh.get_submodule(f"base_model.model.{path}")
    if not hasattr(layer, "get_delta_weight"):
        return torch.zeros(n, n)
    delta = layer.get_delta_weight("default").detach().flatten(1)
    parts = [rows.tensor_split(n, 1) for rows in delta.tensor_split(n, 0)]
    return torch.tensor([[part.square().mean().sqrt() for part in row] for row in parts])


@pytest.mark.parametrize(("name", "prepared"), [("pig_latin", False), ("shout", True), ("bold", False)])
def test_tiles_are_what_a_fresh_load_adds(name, prepared):
    of_digits = name in digits.names()  # convolutions, in too many blocks for large tiles
    model, fresh = [digits.load(name)] * 2 if of_digits else (demo.load("reverse")[0], fresh_load(name))
    if prepared:
        prepare_model_for_compiled_hotswap(model, adapters=[demo.adapter_path(each) for each in demo.adapter_names()])
    if not of_digits:
        hotswap_adapter(model, demo.adapter_path(name), "default")
    map, n = WeightMap(model), 1 if of_digits else CELLS
    before = [tile.cells for tile in map.tiles]
    for tile in map.tiles:
        torch.testing.assert_close(tile.cells, expected(fresh, tile.path, n), rtol=1e-4, atol=1e-7)
    assert sum(bool(cells.any()) for cells in before) > 9
    set_strength(model, 0.25)
    map.look()
    torch.testing.assert_close([4 * tile.cells for tile in map.tiles], before, rtol=1e-5, atol=1e-7)
    assert map.strength == 0.25


def test_hover_names_layer_rank_and_what_was_done():
    pool = AdapterPool(demo.load("reverse")[0], adapters=folders("sort", "shout"), progress=False)
    pool.swap("shout")
    says = {tile.path: tile.says for tile in WeightMap(pool).tiles}
    assert says["model.layers.1.mlp.gate_proj"] == "model.layers.1.mlp.gate_proj: rank 8, padded to 16"
    assert says["model.layers.0.mlp.gate_proj"] == "model.layers.0.mlp.gate_proj: the adapter is off here"
    says = {tile.path: tile.says for tile in WeightMap(fresh_load("shout")).tiles}
    assert says["model.layers.1.mlp.gate_proj"] == "model.layers.1.mlp.gate_proj: rank 8"
    assert says["model.layers.0.mlp.gate_proj"] == "model.layers.0.mlp.gate_proj: the base model alone"


def numbers(model):
    own = sum(each.numel() for name, each in model.named_parameters() if "lora_" in name)
    return sum(each.numel() for each in model.parameters()) - own, own


def new_numbers(model, name: str, former: str) -> int:
    """How many numbers of a fresh load differ from the former adapter's; all where that has not as many components."""
    now, then = (dict(fresh_load(each).named_parameters()) for each in (name, former))
    count = 0
    for key, weight in ((key, weight) for key, weight in now.items() if "lora_" in key):
        before = then.get(key, torch.empty(0))
        # one that fills the room is compared component by component
        if before.shape == model.get_parameter(key).shape:
            before = before[: weight.shape[0], : weight.shape[1]]
        count += weight.numel() if before.shape != weight.shape else int((weight != before).sum())
    return count


def test_counts():
    model, _ = demo.load("reverse")
    before = {key: each.clone() for key, each in model.state_dict().items()}
    base, own = numbers(model)
    assert WeightMap(model).counts == Counts(base, own, 0)
    assert WeightMap(model, before=before).counts == Counts(base, own, 0, (0, 0))
    hotswap_adapter(model, demo.adapter_path("vowels_up"), "default")
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight[:2, :3] += 1
        model.get_base_model().model.norm.weight[0] += 1
    new = new_numbers(model, "vowels_up", former="reverse")
    assert WeightMap(model, before=before).counts == Counts(base, own, 0, (7, new))
    hotswap_adapter(model, demo.adapter_path("sort"), "default")  # another rank
    own = numbers(fresh_load("sort"))[1]
    assert WeightMap(model, before=before).counts == Counts(base, own, 0, (7, own))


def test_padding_is_counted_apart():
    map = WeightMap.demo()
    assert map.counts.changed == (0, 0)
    for former, name in itertools.pairwise((map.name, "double", "pig_latin", "reverse")):
        map.swap(name)
        base, own = numbers(fresh_load(name))
        assert map.counts == Counts(base, own, numbers(map.model)[1] - own, (0, new_numbers(map.model, name, former)))
    assert "padding" in map.counts.lines[1]


def test_the_button_swaps_the_next_one_in_and_each_picture_is_of_one_adapter():
    """Its name, color, tiles and answer change at once, also while a swap goes on."""
    map, names, tiles_of = live(WeightMap.demo("kernel")), demo.adapter_names(), {}
    painted = []
    map._body.observe(lambda change: painted.append((map._title.value, change["new"])), "value")
    shown = [*names[names.index("reverse") + 1 :], names[0]]
    for name in shown:
        map.box.children[2].click()
        assert map.wait(60)
        assert map.name == name
    map.swap("shout")
    assert (map.swap_seconds or 0) > 0
    map._switch.swap("double")  # elsewhere: painted at the next look
    map._changed()
    for name, (title, picture) in zip([*shown, "shout"], painted, strict=True):
        assert f"{name} is in" in title
        assert f"{name} is in the model" in picture
        assert adapter_color(name) in picture
        assert f"kernel → {demo.TASKS[name]('kernel')}" in picture
        assert tiles_of.setdefault(name, re.findall("<image.*?>", picture)) == re.findall("<image.*?>", picture)
    assert len({str(each) for each in tiles_of.values()}) == len(shown)
    map.look()
    assert "double is in the model" in painted[-1][1]


def test_a_model_alone_has_no_button():
    model, _ = demo.load("reverse")
    map = WeightMap(model, "an answer <b>")
    assert [type(each).__name__ for each in map.box.children] == ["HTML"] * 4
    assert "an answer &lt;b&gt;" in map.figure().svg
    assert "default is in the model" in map.figure().svg
    set_strength(model, 0)
    map.look()
    assert map.summary == "default is in 0 of 28 layers"


METHODS = {
    "lora on embeddings": LoraConfig(r=3, target_modules=["embed_tokens"], init_lora_weights=False),
    "dora": LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
    "loha": peft.LoHaConfig(r=3, target_modules=["q_proj"], init_weights=False),
    "lokr": peft.LoKrConfig(r=3, target_modules=["q_proj"], init_weights=False),
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "vera": peft.VeraConfig(r=3, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods(method):
    torch.manual_seed(0)
    model = get_peft_model(demo.load_base(), METHODS[method])
    for each in (each for name, each in model.named_parameters() if "vera_lambda" in name):
        torch.nn.init.normal_(each)  # PEFT begins with zeros
    map = WeightMap(model)
    assert sum(bool(tile.cells.any()) for tile in map.tiles) == (1 if "embeddings" in method else 4)
    assert map.counts.base == 963_968
    assert map.figure().svg.count("<title>") == len(map.tiles) + 1
    if method in ("dora", "loha", "lokr"):
        whole = model.get_base_model().model.layers[0].self_attn.q_proj.get_delta_weight("default")
        torch.testing.assert_close(map.tiles[0].cells.square().mean(), whole.square().mean(), rtol=0.05, atol=0)


def test_a_click_between_two_jobs_counts():
    """It begins at once, while the thread of the last job has not quite ended."""
    map, entered, leave = WeightMap.demo(), threading.Event(), threading.Event()
    names, lock, good = demo.adapter_names(), map._lock, map.answer
    button, at = map.box.children[2], demo.adapter_names().index("reverse")

    class ClickAtTheEnd:
        acquire, locked = lock.acquire, lock.locked

        def release(self):
            map._lock = lock
            lock.release()
            button.click()
            while map._present != names[(at + 2) % 8]:
                time.sleep(0.01)

    map._lock, map.answer = ClickAtTheEnd(), lambda: (entered.set(), leave.wait(60)) and good()
    button.click()
    assert entered.wait(60)
    first = map._thread
    with in_use(map.model):
        leave.set()
        first.join(60)
        button.click()
    assert map.wait(60)
    assert map.name == names[(at + 3) % 8]


@pytest.mark.parametrize(("layers", "rows"), [(30, 30), (100, 34)])
def test_large_models_are_small_pictures(layers, rows):
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(
        torch.nn.ModuleDict({name: torch.nn.Linear(16, 16, bias=False) for name in "qkvogud"}) for _ in range(layers)
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[*"qkv"], init_lora_weights=False))
    map = WeightMap(model)
    svg = map.figure().svg
    assert len(svg) < 50_000
    assert len(map.tiles) == 7 * layers
    assert svg.count("<rect") - 4 == 7 * rows  # the card, and three parts of the bar
    assert len({*re.findall(r"<rect x='[^']*' y='([^']*)'[^>]*pointer", svg)}) == rows


def test_blocks_and_columns():
    assert split("lm_head") == ("", "lm_head")
    assert split("encoder.block.0.layer.1.DenseReluDense.wi_0") == ("encoder.block.0.layer.1", "DenseReluDense.wi_0")
    assert split("down.0.attn.1.to_out.0") == ("down.0.attn.1", "to_out.0")


def test_no_click_is_lost():
    """Each goes one adapter further; the status says which one comes next, and those on the way are skipped."""
    map, entered, leave = WeightMap.demo(), threading.Event(), threading.Event()
    names, good, asked = demo.adapter_names(), map.answer, []

    def answer():
        asked.append(map._switch.active)
        entered.set()
        assert leave.wait(60)
        return good()

    map.answer = answer
    button = map.box.children[2]
    at, count = names.index("reverse"), 10
    button.click()
    assert entered.wait(60)
    for number in range(2, count + 1):
        button.click()
        waits = names[(at + number) % 8]
        assert (f"then {waits}" in map._status.value) == (waits != asked[0])
    assert not button.disabled
    leave.set()
    assert map.wait(60)
    assert asked == [names[(at + 1) % 8], names[(at + count) % 8]]
    assert map.name == names[(at + count) % 8]
