"""What is noted about code that is compiled ahead of time, and refused, since AOTInductor checks nothing.

The graphs are exported, and not compiled (:mod:`exported`): no check depends on that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from exported import not_compiled
from lengths import few_of, long
from models import KINDS, TINY, Kind, call, load, save_random_adapter
from refusals import refused
from torch import nn

from hotswap_lab import AdapterPool, HotswapError, aoti_compile, aoti_load
from hotswap_lab import prepare_model_for_compiled_hotswap as prepare
from hotswap_lab.ahead.file import read
from hotswap_lab.generating import Reader

AUTO = torch.export.Dim.AUTO
LLAMA = KINDS["llama"]
FEW = TINY | dict(num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def ids(rows: int = 2, tokens: int = 9) -> dict:
    return dict(input_ids=torch.arange(rows * tokens).view(rows, tokens) % 37 + 3, use_cache=False)


def prepared(kind: Kind, folder, seed: int = 1) -> nn.Module:
    model = load(kind, save_random_adapter(kind, folder / f"adapter {seed}", seed))
    prepare(model, target_rank=8)
    return model


def file_of(model: object, folder, **options: object):
    options = dict(kwargs=ids(), progress=False) | options
    with not_compiled():
        return aoti_compile(model, folder / "model.pt2", **options)


def bind(path: object, model: object, **options: object):
    with not_compiled():
        return aoti_load(path, model, **options)


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
    ahead = bind(
        file_of(model, tmp_path, kwargs=dict(x=kind.inputs()), dynamic_shapes={"x": {0: AUTO, 1: AUTO}}), model
    )
    answers = {"right": 0, "refused": 0}
    for rows, length in itertools.product(range(2, 6), range(5, 14)):
        x = torch.randn(rows, length, 12)
        try:
            torch.testing.assert_close(ahead(x), call(model, x))
            answers["right"] += 1
        except HotswapError:
            answers["refused"] += 1
    assert answers["right"] > 3
    assert bool(answers["refused"]) is (which != "none")


def test_what_a_call_may_be_is_said_when_it_is_compiled(tmp_path, capsys):
    model = prepared(LLAMA, tmp_path)
    path = file_of(model, tmp_path, dynamic_shapes={"input_ids": {0: AUTO, 1: AUTO}}, progress=True)
    assert "input_ids.shape[0] >= 2, input_ids.shape[1] >= 2" in capsys.readouterr().out
    assert "can't be 1 later" in aoti_compile.__doc__
    refused(r"input_ids.shape\[0\] >= 2", lambda model: bind(path, model)(**ids(1)), model)


def test_rows_and_an_adapter_on_embeddings(tmp_path):
    """The number of rows stays dynamic, and each row has its own embeddings."""
    kind = Kind(LLAMA.make_random, LLAMA.make_inputs, ("embed_tokens", "q_proj"))
    folders = {name: save_random_adapter(kind, tmp_path / name, seed) for seed, name in enumerate("ab", 1)}
    pool = AdapterPool(load(kind, folders["a"]), adapters=folders, rows=4, progress=False)
    ahead = bind(file_of(pool, tmp_path, dynamic_shapes={"input_ids": {0: AUTO}}), pool)
    for rows in ("ab", "bab", "abba"):
        pool.assign([*rows])
        actual = ahead(**ids(len(rows))).logits
        for name, given, row in zip(rows, ids(len(rows))["input_ids"], actual, strict=True):
            expected = call(load(kind, folders[name]), dict(input_ids=given[None]))[0]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


# ---- layers that are alike


def smollm3() -> nn.Module:
    config = transformers.SmolLM3Config(**FEW, no_rope_layers=[1, 0])
    return transformers.SmolLM3ForCausalLM(config)


def cohere2() -> nn.Module:
    layers = ["sliding_attention", "full_attention"]
    return transformers.Cohere2ForCausalLM(transformers.Cohere2Config(**FEW, sliding_window=4, layer_types=layers))


def gpt2_scaled() -> nn.Module:
    sizes = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    scaled = dict(scale_attn_by_inverse_layer_idx=True, attn_implementation="eager")  # older sdpa has no scale there
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **scaled))
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
    make, modules, kinds = BLOCKS[which]
    kind = Kind(make, LLAMA.make_inputs, modules)
    model = prepared(kind, tmp_path)
    path = file_of(model, tmp_path, dynamic_shapes=dynamic, repeated_blocks=True)
    assert len(read(path)[0]["graphs"]) == kinds
    ahead = bind(path, model)
    for given in [ids(), *([ids(3, 12)] if dynamic else [])]:
        torch.testing.assert_close(ahead(**given).logits, call(model, given), rtol=1e-4, atol=1e-5)


def test_a_model_that_requires_gradients(tmp_path):
    """One that could be trained further: neither a call nor the proof of its blocks computes gradients."""
    model = prepared(LLAMA, tmp_path)
    model.requires_grad_(True)
    ahead = bind(file_of(model, tmp_path, repeated_blocks=True), model)
    output = ahead(**ids()).logits
    assert not output.requires_grad
    torch.testing.assert_close(output, call(model, ids()), rtol=1e-4, atol=1e-5)


class Part(nn.Linear):
    pass


class Whole(nn.Module):
    """A repeated layer that has repeated layers in it."""

    _no_split_modules = ("Part", "Half")

    def __init__(self):
        super().__init__()
        self.halves = nn.ModuleList([Half(), Half()])

    def forward(self, x):
        for each in self.halves:
            x = each(x)
        return x


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.part = nn.Linear(12, 12), Part(12, 12)

    def forward(self, x):
        return self.part(self.first(x).tanh())


def test_repeated_layers_in_repeated_layers(tmp_path):
    kind = Kind(Whole, lambda: torch.randn(3, 12), ("first",))
    model = prepared(kind, tmp_path)
    path = file_of(model, tmp_path, kwargs=dict(x=kind.inputs()), repeated_blocks=True)
    assert [each["paths"] for each in read(path)[0]["graphs"]] == [["halves.0", "halves.1"]]
    torch.testing.assert_close(bind(path, model)(kind.inputs()), call(model, kind.inputs()))


# ---- models with other settings


def granite(**settings: object) -> nn.Module:
    settings = dict(logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3) | settings
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**FEW | settings))


SETTINGS = [
    dict(logits_scaling=4.0),
    dict(residual_multiplier=0.25),
    dict(attention_multiplier=0.5),
    dict(hidden_act="gelu"),
    dict(rms_norm_eps=1e-3),
]


@pytest.fixture(scope="module")
def granites(tmp_path_factory):
    """A function that loads one with other settings, and the file of one."""
    folder = tmp_path_factory.mktemp("granite")
    kind = Kind(granite, LLAMA.make_inputs, LLAMA.modules)
    adapter = save_random_adapter(kind, folder / "adapter", seed=1)

    def make(**settings: object) -> nn.Module:
        return load(Kind(partial(granite, **settings), LLAMA.make_inputs, LLAMA.modules), adapter)

    model = make()
    prepare(model, target_rank=8)
    return make, file_of(model, folder)


@pytest.mark.parametrize("settings", few_of(SETTINGS, SETTINGS[:1]), ids=str)
@pytest.mark.parametrize("prove", [True, long(False)])
def test_a_model_with_other_settings(granites, settings, prove):
    make, path = granites
    ((name, value),) = settings.items()
    match = rf"config.{name} = {value!r}\n  expected: "
    refused(match, lambda model: bind(path, model, prove=prove), make(**settings))


def test_settings_that_are_no_arithmetic(granites):
    make, path = granites
    model = make(pad_token_id=5, eos_token_id=[3, 4], name_or_path="other", id2label={0: "a"}, architectures=["x"])
    with torch.no_grad():
        model.get_base_model().lm_head.weight *= 2  # other weights
    torch.testing.assert_close(bind(path, model)(**ids()).logits, call(model, ids()), rtol=1e-4, atol=1e-5)


def set_eps(model):
    model.get_base_model().model.norm.variance_epsilon = 0.1


def other_function(model):
    model.get_base_model().model.layers[1].mlp.act_fn = nn.Tanh()


@pytest.mark.parametrize(
    ("change", "match"), [(set_eps, r"model.norm.variance_epsilon = 0.1"), (other_function, "act_fn.type = Tanh")]
)
def test_a_module_with_other_settings(granites, change, match):
    make, path = granites
    model = make()
    change(model)
    refused(match, lambda model: bind(path, model, prove=False), model)


def test_the_code_is_proven_when_it_is_bound(granites, monkeypatch):
    """Nothing but the code of a forward differs; the model, its buffers and random numbers are left alone."""
    make, path = granites
    mlp = transformers.models.granite.modeling_granite.GraniteMLP
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: 1.01 * forward(self, x))
    model = make()
    state = torch.get_rng_state()
    error = refused("does not compute what the model does", lambda model: bind(path, model), model)
    assert "prove=False" in str(error)
    bind(path, model, prove=False)
    monkeypatch.undo()
    bind(path, model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_block_is_not_compiled(tmp_path, monkeypatch):
    """If two kinds of layers were ever taken for one, the proof refuses to write the file."""
    monkeypatch.setattr("hotswap_lab.ahead.compiling._likeness", lambda *_: "the same")
    model = prepared(Kind(gpt2_scaled, LLAMA.make_inputs, ("c_attn",)), tmp_path)
    refused(r"transformer.h.1: off by", lambda model: file_of(model, tmp_path, repeated_blocks=True), model)
    assert not (tmp_path / "model.pt2").exists()


def test_a_server_s_folder_of_another_model(tmp_path):
    """:class:`Reader` is what ``package=`` compiles."""

    def reader(**config: object) -> Reader:
        kind = Kind(partial(granite, **config), LLAMA.make_inputs, LLAMA.modules)
        return Reader(prepared(kind, tmp_path), rows=2, chunk=3, room=6)

    with not_compiled():
        mine = reader()
        mine.compile_ahead(tmp_path, progress=False)
        mine.load_ahead(tmp_path)
        assert not any(each.any() for name, each in mine.named_buffers() if "keys_" in name)
        refused("config.rms_norm_eps = 0.1", lambda model: reader(rms_norm_eps=0.1).load_ahead(tmp_path), mine)


# ---- changes after binding


def add_hook(model):
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda module, given, output: 2 * output)


def add_hook_before(model):
    model.get_base_model().model.norm.register_forward_pre_hook(lambda module, given: (given[0] + 1,))


def add_hook_in_an_adapter(model):
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.lora_A["default"].register_forward_hook(lambda module, given, output: 2 * output)


def replace_forward(model):
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)


def replace_weight(model):
    model.get_base_model().model.norm.weight = nn.Parameter(torch.full((16,), 2.0))


CHANGES = {
    "a hook": (add_hook, "a forward or a hook"),
    "a hook before": (add_hook_before, "a forward or a hook"),
    "a hook in an adapter": (add_hook_in_an_adapter, "a forward or a hook"),
    "a forward": (replace_forward, "a forward or a hook"),
    "a weight": (replace_weight, "tensors or modules"),
    "a module": (other_function, "modules that were moved, replaced"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_since(granites, change):
    make, path = granites
    model = make()
    ahead, before = bind(path, model), call(model, ids())
    ahead(**ids())
    action, match = CHANGES[change]
    action(model)
    assert (call(model, ids()) - before).abs().max() > 1e-3
    refused(match, lambda _: ahead(**ids()), model)


def test_a_scaling_of_the_same_value_elsewhere(granites):
    """Two tensors of one element can be equal; one of them is not the one that the code reads."""
    make, path = granites
    model = make()
    ahead = bind(path, model)
    buffers = model.get_base_model().model.layers[0].mlp.up_proj._buffers
    (name,) = [name for name, each in buffers.items() if each is not None]
    buffers[name] = buffers[name].clone()
    refused("moved, replaced", lambda _: ahead(**ids()), model)


def test_a_file_is_made_and_bound_before_hidden_states_are_asked_for(tmp_path):
    """transformers adds its hooks the first time, and must know later whether it did."""
    model, given = prepared(LLAMA, tmp_path), ids() | dict(output_hidden_states=True)
    for by_blocks in (False, True):
        bind(file_of(model, tmp_path, kwargs=given, repeated_blocks=by_blocks), model)
    assert len(model(**given).hidden_states) == 3


def test_a_forward_that_is_its_class_s(granites):
    """Older transformers leave it in a module's table; a later one that is not is noticed all the same."""
    make, path = granites
    model = make()
    ahead, mlp = bind(path, model), model.get_base_model().model.layers[0].mlp
    mlp.forward = mlp.forward
    torch.testing.assert_close(ahead(**ids()).logits, call(model, ids()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bind(path, model)(**ids()).logits, call(model, ids()), rtol=1e-4, atol=1e-5)
    replace_forward(model)
    refused("a forward or a hook", lambda _: ahead(**ids()), model)


def test_float64_that_is_rounded_on_the_way(tmp_path, monkeypatch):
    """As in norms that compute in float32; compiled code rounds otherwise."""
    kind = Kind(Rounded, lambda: torch.randn(3, 12), ("first",))
    model = load(kind, save_random_adapter(kind, tmp_path / "adapter", 1)).double()
    prepare(model, target_rank=8)
    given = dict(x=torch.randn(3, 12, dtype=torch.float64))
    path = file_of(model, tmp_path, kwargs=given)
    monkeypatch.setattr(Rounded, "forward", lambda self, x: self.first(x).float().tanh().double())
    bind(path, model)
    monkeypatch.setattr(Rounded, "forward", lambda self, x: 1.01 * self.first(x).tanh())
    refused("does not compute", lambda model: bind(path, model), model)


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)

    def forward(self, x):
        return self.first(x).tanh()


def test_hooks_of_transformers_do_nothing(granites):
    make, path = granites
    model = make()
    ahead, before = bind(path, model), torch.utils.hooks.RemovableHandle.next_id
    model(**ids(), output_hidden_states=True, output_attentions=True)
    nn.Linear(1, 1).register_forward_hook(lambda *_: None)  # of another model
    assert torch.utils.hooks.RemovableHandle.next_id > before
    torch.testing.assert_close(ahead(**ids()).logits, call(model, ids()), rtol=1e-4, atol=1e-5)
