"""Models that are compiled ahead of time: swaps reach them, in this process and in one without a compiler.

What does not depend on a compiler is tested with exported graphs (:mod:`exported`); what is refused, in
``test_ahead_checks.py``. In the short form, chapter 10 is what compiles.
"""

from __future__ import annotations

import doctest
import inspect
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from exported import FEW, assert_computes, bind, file_of, ids, not_compiled, prepared
from lengths import few_of, long
from models import KINDS, Kind, answer, call, gpt2, load, randn, save_family, save_random_adapter
from oracle import assert_close, rounding, rounding_of_inductor, untouched
from refusals import refused
from row_truth import family
from torch import nn

import hotswap_lab
from hotswap_lab import AdapterPool, HotswapError, aoti_compile, aoti_load, hotswap_adapter
from hotswap_lab import prepare_model_for_compiled_hotswap as prepare
from hotswap_lab.ahead import loading
from hotswap_lab.ahead.file import read
from hotswap_lab.generating import Reader

LLAMA, LINEAR = KINDS["llama"], KINDS["linear"]
AUTO = torch.export.Dim.AUTO
LENGTH = torch.export.Dim("length", min=2, max=9)


@pytest.mark.long
def test_the_example_runs(tmp_path, monkeypatch):
    """The lines that compile are left out of the other examples' run, because they take long and need a compiler."""
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(aoti_compile).replace("# doctest: +SKIP", "")
    test = doctest.DocTestParser().get_doctest(text, {}, "aoti_compile", None, None)
    assert doctest.DocTestRunner().run(test) == (0, len(test.examples))
    assert (tmp_path / "demo.pt2").exists()


def inputs_of(kind: str, rows: int = 2, tokens: int = 9) -> dict:
    return ids(rows, tokens) if kind == "llama" else dict(x=randn(rows, 12))


@pytest.fixture(scope="module", params=("linear", "llama"))
def package(request, tmp_path_factory):
    """A tiny model, prepared for adapters that have little in common: its kind, its file, and the adapters."""
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp("ahead")
    folders = [*family(kind, folder).values()]
    model, given = load(kind, folders[0]), inputs_of(request.param)
    prepare(model, adapters=folders)
    shapes = {name: dict.fromkeys(range(1 if name == "x" else 2), AUTO) for name in given if name != "use_cache"}
    with untouched(model):
        options = dict(kwargs=given, dynamic_shapes=shapes, progress=False)
        return request.param, str(aoti_compile(model, folder / "model.pt2", **options)), folders


def assert_reached(ahead, model, fresh, *inputs: dict) -> None:
    """That the compiled code computes what a fresh load does, and that this is not what the base model does."""
    for each in inputs:
        expected = call(fresh, each)
        with fresh.disable_adapter():
            change = (call(fresh, each) - expected).abs().max()
        assert change > 1e-3
        assert_close(answer(ahead, each), expected, rounding_of_inductor(fresh, each))


def swap_in_turn(kind: str, package: str, folders: list[str], swaps: int) -> None:
    """What :func:`test_a_process_without_a_compiler` runs there: the model has one adapter, and is not prepared."""
    model, draw = load(KINDS[kind], folders[3]), random.Random(0)
    ahead, fresh = aoti_load(package, model), [load(KINDS[kind], folder) for folder in folders]
    for number in [*range(len(folders)), *draw.choices(range(len(folders)), k=swaps)]:
        hotswap_adapter(model, folders[number], "default")
        assert_reached(ahead, model, fresh[number], inputs_of(kind, draw.randint(2, 5), draw.randint(2, 12)))
    print("all reached")


def in_a_process_without_a_compiler(code: str) -> str:
    paths = [*sys.path, str(Path(__file__).parent), str(Path(hotswap_lab.__file__).parent.parent)]
    env = {**os.environ, "PATH": "", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.long
def test_a_process_without_a_compiler(package):
    """Unlike adapters, and 50 swaps, into a model that the file itself says how to prepare. Chapter 10 does so, too."""
    code = f"import test_ahead\ntest_ahead.swap_in_turn(*{package!r}, 50)"
    assert in_a_process_without_a_compiler(code) == "all reached"


@pytest.mark.long
def test_inputs_that_lie_otherwise_in_memory(package):
    kind, path, folders = package
    ahead, given = aoti_load(path, load(KINDS[kind], folders[0])), inputs_of(kind)
    (turned,) = (each.t().contiguous().t() for each in given.values() if isinstance(each, torch.Tensor))
    assert not turned.is_contiguous()
    assert torch.equal(answer(ahead, {**given, next(iter(given)): turned}), answer(ahead, given))


# ---- conditions on sizes


class Sized(nn.Module):
    """A linear layer, and then what depends on sizes."""

    def __init__(self, then: Callable):
        super().__init__()
        self.first, self.then = nn.Linear(12, 12), then

    def forward(self, x):
        return self.then(self.first(x), *x.shape[:2])


def windows(x, rows, length):
    if length % 4:
        x = nn.functional.pad(x, (0, 0, 0, 4 - length % 4))
    return x.view(rows, -1, 4, 12).sum(1)


CONDITIONS = {
    "windows": windows,
    "a product": lambda x, rows, length: x + 1 if rows * length > 20 else x,
    "one size": lambda x, rows, length: x + 1 if length == 9 else x,
    "compared": lambda x, rows, length: x + 1 if rows < length - 4 else x,
    "divided": lambda x, rows, length: x + 1 if length // 4 == 2 else x,
    "none": lambda x, rows, length: x.softmax(1),
}


@pytest.mark.parametrize("which", few_of(CONDITIONS, ["windows", "divided"]))
def test_conditions_on_sizes(tmp_path, which):
    """Each size is computed as the model does, or refused."""
    kind = Kind(partial(Sized, CONDITIONS[which]), lambda: torch.randn(3, 8, 12), ("first",))
    model = prepared(kind, tmp_path)
    options = dict(kwargs=dict(x=kind.inputs()), dynamic_shapes={"x": {0: AUTO, 1: AUTO}})
    ahead = bind(file_of(model, tmp_path, **options), model)
    answers = {"right": 0, "refused": 0}
    for rows, length in itertools.product(range(2, 6), range(5, 14)):
        x = randn(rows, length, 12)
        try:
            assert_close(ahead(x), call(model, x))
            answers["right"] += 1
        except HotswapError:
            answers["refused"] += 1
    assert answers["right"] > 3
    assert bool(answers["refused"]) is (which != "none")


def test_convolutions(tmp_path):
    """Their views of the memory have other strides."""
    kind = KINDS["conv"]
    model, x = prepared(kind, tmp_path), kind.inputs()
    ahead = bind(file_of(model, tmp_path, args=(x,), kwargs=None), model)
    before = ahead(x)
    new = save_random_adapter(kind, tmp_path / "new", seed=5, r=8)
    hotswap_adapter(model, new, "default")
    assert_close(ahead(x), call(load(kind, new), x))
    assert (ahead(x) - before).abs().max() > 0.01


@pytest.mark.long
def test_a_diffusion_model(tmp_path):
    digits = pytest.importorskip("hotswap_lab.demo.digits")
    names = digits.names()[:2]
    pool = AdapterPool(digits.load("bold"), adapters={name: digits.path(name) for name in names}, progress=False)
    given = dict(sample=digits.noise(4)[:2], timestep=torch.tensor(500))
    ahead = aoti_load(aoti_compile(pool, tmp_path / "unet.pt2", kwargs=given, progress=False), pool)
    models = [digits.load(name) for name in names]
    expected = [call(each, given) for each in models]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    for name, model, each in zip(names, models, expected, strict=True):
        pool.swap(name)
        assert_close(ahead(**given).sample, each, rounding(model, given))


class Pair(nn.Module):
    """Two inputs; one is twice as long as the other."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)

    def forward(self, x, y, *more):
        return self.first(x) + y.unflatten(0, (-1, 2)).sum(1)


def test_sizes_that_depend_on_one_another(tmp_path):
    def given(first: int, second: int) -> dict:
        return dict(x=randn(first, 12), y=randn(second, 12))

    model = prepared(Kind(Pair, lambda: given(3, 6), ("first",)), tmp_path)
    shapes = {"x": {0: LENGTH}, "y": {0: 2 * LENGTH}}
    ahead = bind(file_of(model, tmp_path, kwargs=given(3, 6), dynamic_shapes=shapes), model)
    for inputs in (given(3, 6), given(5, 10)):
        assert_close(ahead(**inputs), call(model, inputs))
    refused("size|shape", lambda _: ahead(**given(3, 8)), model)
    refused("<= 9", lambda _: ahead(**given(10, 20)), model)


def test_what_a_call_may_be_is_said_when_it_is_compiled(tmp_path, capsys):
    model, given = prepared(LINEAR, tmp_path), dict(x=randn(2, 12))
    path = file_of(model, tmp_path, kwargs=given, dynamic_shapes={"x": {0: AUTO}}, progress=True)
    assert "x.shape[0] >= 2" in capsys.readouterr().out
    assert "can't be 1 later" in aoti_compile.__doc__
    refused(r"x.shape\[0\] >= 2", lambda model: bind(path, model)(randn(1, 12)), model)


@pytest.mark.parametrize("repeated", [long(False), True])
def test_rows_and_an_adapter_on_embeddings(tmp_path, repeated, monkeypatch):
    """The number of rows stays dynamic, and each row has its own embeddings."""
    kind = Kind(LLAMA.make_random, LLAMA.make_inputs, ("embed_tokens", "q_proj"))
    folders = {name: save_random_adapter(kind, tmp_path / name, seed) for seed, name in enumerate("ab", 1)}
    other, pool = (
        AdapterPool(load(kind, folders["a"]), adapters=folders, rows=4, base_weights={}, progress=False)
        for _ in range(2)
    )
    options = dict(dynamic_shapes={"input_ids": {0: AUTO}}, repeated_blocks=repeated)
    path = file_of(other, tmp_path, **options)
    other.assign(["a"])  # which the code doesn't look at: it has another model's rows now
    ahead = bind(path, pool)
    for rows in ("ab", "bab", "abba"):
        pool.assign([*rows])
        actual = ahead(**ids(len(rows))).logits
        for name, given, row in zip(rows, ids(len(rows))["input_ids"], actual, strict=True):
            fresh, alone = load(kind, folders[name]), dict(input_ids=given[None])
            assert_close(row, call(fresh, alone)[0], rounding_of_inductor(fresh, alone))
    refused("not made of the rows", lambda _: ahead(**ids(3)), pool)
    notes, values = loading.read(path)  # as an older release has written them
    monkeypatch.setattr(loading, "read", lambda _: (notes | {"rows": [4, 1]}, values))
    pool.swap("a")
    older = bind(path, pool)
    pool.assign([*"abba"])
    assert torch.equal(older(**ids(4)).logits, actual)
    refused("AdapterPool", lambda model: bind(path, model), load(kind, folders["a"]))
    two = AdapterPool(load(kind, folders["a"]), adapters=folders, rows=2, base_weights={}, progress=False)
    refused(r"2 rows\n.*rows=4", lambda pool: bind(path, pool), two)
    with pytest.raises(HotswapError, match="exported by aoti_compile only"):
        torch.export.export(pool.model, (), ids())


@pytest.mark.long
def test_reading_in_rows(tmp_path):
    """Three texts at once, each with an adapter of its own: chunks, then token by token. As servers do it."""
    folders = {name: save_random_adapter(LLAMA, tmp_path / name, seed) for seed, name in enumerate("abc")}

    def reader(**config: object) -> tuple[AdapterPool, Reader]:
        kind = Kind(partial(LLAMA.make_random, **config), LLAMA.make_inputs, LLAMA.modules)
        pool = AdapterPool(load(kind, folders["a"]), adapters=folders, rows=3, progress=False)
        pool.assign([*folders])
        return pool, Reader(pool.model, rows=3, chunk=4, longest=12)

    (pool, compiled), (_, plain), (_, other) = reader(), reader(), reader(rms_norm_eps=0.1)
    with not_compiled():
        compiled.use_ahead(tmp_path / "new", progress=False)
        assert not any(each.any() for name, each in compiled.named_buffers() if "keys_" in name)
        refused("config.rms_norm_eps = 0.1", lambda _: other.use_ahead(tmp_path / "new"), other)
    parts = [[number + 1] * (1 + number) for number in range(3)]
    tolerance = max(rounding_of_inductor(load(LLAMA, each), ids()) for each in folders.values())
    for _ in range(4):
        expected = plain.read(parts)
        assert_close(compiled.read(parts), expected, tolerance)
        parts = [[token] for token in expected.argmax(-1).tolist()]
    tokens = torch.ones((2, 1), dtype=torch.long)
    refused("not made of the rows", lambda _: compiled.ahead[1](tokens, tokens), pool)


# ---- layers that are alike


def smollm3() -> nn.Module:
    config = transformers.SmolLM3Config(**FEW, no_rope_layers=[1, 0])
    return transformers.SmolLM3ForCausalLM(config)


def cohere2() -> nn.Module:
    layers = ["sliding_attention", "full_attention"]
    return transformers.Cohere2ForCausalLM(transformers.Cohere2Config(**FEW, sliding_window=4, layer_types=layers))


def gpt2_scaled() -> nn.Module:
    # older sdpa has no scale there
    model = gpt2(scale_attn_by_inverse_layer_idx=True, attn_implementation="eager")
    for block in model.transformer.h:
        block.attn.c_attn.weight.data *= 20  # so that attention looks somewhere
    return model


BLOCKS = {
    "layers without positions": (smollm3, ("q_proj",), 2),
    "sliding windows": (cohere2, ("q_proj",), 2),
    "scaled by their number": (gpt2_scaled, ("c_attn",), 2),
    "all alike": (LLAMA.make_random, ("q_proj",), 1),
}


@pytest.mark.parametrize("which", few_of(BLOCKS, ["scaled by their number", "all alike"]))
@pytest.mark.parametrize("dynamic", [None, long({"input_ids": {0: AUTO, 1: AUTO}})], ids=["fixed", "dynamic"])
def test_layers_that_look_alike(tmp_path, which, dynamic):
    """Of a model that could be trained further: neither a call nor the proof of its blocks computes gradients."""
    make, modules, kinds = BLOCKS[which]
    kind = Kind(make, LLAMA.make_inputs, modules)
    model = prepared(kind, tmp_path).requires_grad_(True)
    path = file_of(model, tmp_path, dynamic_shapes=dynamic, repeated_blocks=True)
    assert len(read(path)[0]["graphs"]) == kinds
    ahead = bind(path, model)
    for given in [ids(), *([ids(3, 12)] if dynamic else [])]:
        assert not ahead(**given).logits.requires_grad
        assert_computes(ahead, model, given)


@pytest.mark.long
def test_repeated_layers_in_repeated_layers(tmp_path):
    model = prepared(LLAMA, tmp_path)
    for name, kinds in (("_no_split_modules", ["LlamaMLP", "LlamaDecoderLayer"]), ("_repeated_blocks", ["LlamaMLP"])):
        setattr(model.get_base_model(), name, kinds)  # diffusers has the second name, and both
        path, last = file_of(model, tmp_path, repeated_blocks=True), ".mlp" * (len(kinds) == 1)
        assert [each["paths"] for each in read(path)[0]["graphs"]] == [[f"model.layers.{n}{last}" for n in (0, 1)]]
        assert_computes(bind(path, model), model, ids())


def test_a_wrong_block_is_not_compiled(tmp_path, monkeypatch):
    """If two kinds of layers were ever taken for one, the proof refuses to write the file."""
    monkeypatch.setattr("hotswap_lab.ahead.compiling._likeness", lambda *_: "the same")
    model = prepared(Kind(gpt2_scaled, LLAMA.make_inputs, ("c_attn",)), tmp_path)
    refused(r"transformer.h.1: off by", lambda model: file_of(model, tmp_path, repeated_blocks=True), model)


# ---- in the long form


class Odd(torch.nn.Module):
    """Small tensors, which AOTInductor likes to write into the code, and one that no table has."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(12, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) * torch.tensor([1.0, -2.0, 0.5, 3.0]))


@pytest.mark.long
def test_small_tensors_are_read_from_memory(tmp_path):
    kind = type(LINEAR)(Odd, LINEAR.make_inputs, ("first", "last"))
    model = load(kind, *save_family(kind, tmp_path, dict(r=1, lora_alpha=4)))
    prepare(model, target_rank=3)
    path = aoti_compile(model, tmp_path / "odd.pt2", (kind.inputs(),), progress=False)
    with torch.no_grad():
        model.get_base_model().last.base_layer.bias += 5  # of the base model, not of the adapter
    ahead = aoti_load(path, model)
    assert_close(ahead(kind.inputs()), call(model, kind.inputs()))


@pytest.mark.long
def test_layers_one_by_one(tmp_path):
    """Each kind of repeated layer is compiled once. Here there are two kinds: the family's ranks differ by layer.

    Only the length may differ; a block's other sizes are found to be fixed while it is exported.
    """
    second = save_random_adapter(LLAMA, tmp_path / "second", 9, r=9, layers_to_transform=[1])
    folders = [*family(LLAMA, tmp_path).values(), second]
    model = load(LLAMA, folders[0])
    prepare(model, adapters=folders)
    options = dict(dynamic_shapes={"input_ids": {1: AUTO}}, repeated_blocks=True, progress=False)
    ahead = aoti_load(aoti_compile(model, tmp_path / "x.pt2", kwargs=ids(), **options), model)
    for folder in folders:
        hotswap_adapter(model, folder, "default")
        assert_reached(ahead, model, load(LLAMA, folder), ids(), ids(2, 4))
