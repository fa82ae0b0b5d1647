"""WeightMap: its tiles against the weights that PEFT computes, its counts against the model's own numbers."""

from __future__ import annotations

import base64
import io
import re

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from shown import folders, live

from hotswap_lab import AdapterPool, demo, hotswap_adapter, prepare_model_for_compiled_hotswap, set_strength
from hotswap_lab.demo import digits
from hotswap_lab.figures.palette import BASE, adapter_color, ramp
from hotswap_lab.figures.tiles import CELLS, SMALL, Tile, drawn
from hotswap_lab.widgets import SwapPanel, WeightMap


def fresh_load(name):
    return PeftModel.from_pretrained(demo.load_base(), demo.adapter_path(name))


def expected(fresh, path, n):
    """The root mean square of a fresh load's change of a weight, in n x n parts, as a share of the weight's own."""
    layer = fresh.get_submodule(f"base_model.model.{path}")
    if not hasattr(layer, "get_delta_weight"):
        return torch.zeros(n, n)
    delta = layer.get_delta_weight("default").detach().flatten(1)
    parts = [rows.tensor_split(n, 1) for rows in delta.tensor_split(n, 0)]
    size = layer.base_layer.weight.detach().square().mean().sqrt()
    return torch.tensor([[part.square().mean().sqrt() / size for part in row] for row in parts])


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


def test_a_tile_says_its_numbers():
    pool = AdapterPool(demo.load("reverse")[0], adapters=folders("sort", "shout"), progress=False)
    pool.swap("shout")
    map = WeightMap(pool)
    gate, share = "model.layers.1.mlp.gate_proj", expected(fresh_load("shout"), "model.layers.1.mlp.gate_proj", 1)
    labels = {tile.path: tile.label for tile in map.tiles}
    assert labels[gate] == f"{100 * share.item():.3g} % of the weight's size, rank 8, padded to 16"
    assert labels[gate.replace("1", "0")] == "the adapter is off here"
    assert f"<title>{gate}: {labels[gate]}".replace("'", "&#x27;") in map.figure().svg
    labels = {tile.path: tile.label for tile in WeightMap(fresh_load("shout")).tiles}
    assert labels[gate].endswith("size, rank 8")
    assert labels[gate.replace("1", "0")] == "the base model alone"


def test_one_scale_for_all_adapters():
    """A cell has one of seven tints, the same for the same share of the weight in whichever adapter."""
    tiles = [Tile(f"layers.{number}.q", torch.full((1, 1), share), "") for number, share in enumerate(SHARES)]
    others = [Tile(f"layers.{number}.q", torch.full((1, 1), share), "") for number, share in enumerate(SHARES[:3])]
    pixels = [pixels_of(drawn(each, "sort", "", {"base": 1, "adapter": 1, "padding": 1})) for each in (tiles, others)]
    color = adapter_color("sort")
    tints = [BASE, *(ramp(color)[step] for step in (0, 0, 1, 2, 3, 4, 6))]
    assert pixels == [tints, tints[:3]]


SHARES = (0.0, 0.001, 0.02, 0.05, 0.15, 0.4, 0.7, 3.0)


def pixels_of(figure):
    image = Image.open(io.BytesIO(base64.b64decode(re.search("png;base64,([^']*)", figure.svg)[1]))).convert("RGB")
    return ["#" + bytes(image.getpixel((0, row))).hex() for row in range(0, image.height, SMALL[1])]


def test_the_former_adapter_is_outlined_and_padding_hatched():
    pool = AdapterPool(demo.load("reverse")[0], adapters=folders("double", "pig_latin"), target_rank=32, progress=False)
    pool.swap("double")
    map = WeightMap(pool)
    assert "dashed:" not in map.figure().svg
    assert "url(#hatch)" in map.figure().svg
    pool.swap("pig_latin")
    map.look()
    assert map.figure().svg.count(f"stroke='{adapter_color('double')}'") == 16
    assert "dashed: double" in map.figure().svg


def test_an_answer_keeps_its_lines_up_to_the_eighth():
    def lines(answer):
        svg = drawn(
            [], "haiku", "", {"base": 1, "adapter": 1, "padding": 1}, answers=[("asked", "haiku", answer, None)]
        ).svg
        return re.findall("font-size='18'[^>]*>(.*?)<", svg)

    assert lines("The sun is down,\nthe light\n\nis low.") == ["The sun is down,", "the light", "is low."]
    assert lines("") == [""]
    assert lines("\n".join("abcdefghij")) == [*"abcdefg", "[...]"]


def numbers(model):
    own = sum(each.numel() for name, each in model.named_parameters() if "lora_" in name)
    return sum(each.numel() for each in model.parameters()) - own, own


def test_numbers_are_counted_and_padding_apart():
    panel = SwapPanel.demo()
    for name in ("double", "pig_latin", "reverse"):
        panel.choose(name)
        base, own = numbers(fresh_load(name))
        assert [*panel.map.counts.values()] == [base, own, numbers(panel.model)[1] - own]
    assert f">padding: {numbers(panel.model)[1] - own:,} zeros<" in panel.map.figure().svg
    model = fresh_load("reverse")
    map = live(WeightMap(model))
    assert [*map.counts.values()] == [*numbers(model), 0]
    assert map.summary == "default is in 28 of 28 layers"
    set_strength(model, 0)
    map.look()
    assert map.summary == "default is in 0 of 28 layers"
    assert map.summary in map._body.value
    set_strength(model, 1)
    assert map.summary == "default is in 28 of 28 layers"  # which looks
    model.base_model.disable_adapter_layers()
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
    assert map.counts["base"] == 963_968
    assert map.figure().svg.count("<title>") >= 1
    if method in ("dora", "loha", "lokr"):
        whole = model.get_base_model().model.layers[0].self_attn.q_proj.get_delta_weight("default")
        own = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.square().mean()
        torch.testing.assert_close(map.tiles[0].cells.square().mean(), whole.square().mean() / own, rtol=0.05, atol=0)


def test_large_models_are_small_pictures():
    model, layers = torch.nn.Module(), 100
    model.blocks = torch.nn.ModuleList(
        torch.nn.ModuleDict({name: torch.nn.Linear(16, 16, bias=False) for name in "qkvogud"}) for _ in range(layers)
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[*"qkv"], init_lora_weights=False))
    map = WeightMap(model)
    svg = map.figure().svg
    assert len(svg) < 12_000
    assert len(map.tiles) == 7 * layers
    assert len(pixels_of(map.figure())) == layers
