"""What is noted about code that is compiled ahead of time, and refused, because AOTInductor checks nothing.

The graphs are exported, and not compiled (:mod:`exported`): no check depends on that.
"""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from exported import FEW, assert_computes, bind, file_of, ids, prepared
from lengths import few_of
from models import KINDS, Kind, call, load, lora_layers, randn, save_family, save_random_adapter
from oracle import assert_close
from refusals import refused
from torch import nn
from torch.utils._sympy import functions

from hotswap_lab import HotswapError, demo, hotswap_adapter
from hotswap_lab import prepare_model_for_compiled_hotswap as prepare
from hotswap_lab.ahead.file import seal
from hotswap_lab.ahead.sizes import Sizes

AUTO = torch.export.Dim.AUTO
LLAMA, LINEAR = KINDS["llama"], KINDS["linear"]


#: functions of sizes that a condition may have, with numbers that divide and that don't
FUNCTIONS = ("CeilDiv({0}, 4)", "FloorDiv({0}, 4)", "Mod({0}, 4)", "ModularIndexing({0}, 2, 3)", "PythonMod({0}, 4)")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_of_a_size_is_what_it_is_to_pytorch(function):
    name, rest = function.split("(", 1)
    for size in range(1, 14):
        value = int(getattr(functions, name)(*eval(f"({rest.format(size)}")))
        for other in (value - 1, value, value + 1):
            fits = Sizes({"s0": "x.shape[0]"}, [f"Eq({function.format('s0')}, {other})"]).fit(size)
            assert fits == (other == value), (size, other)


@pytest.mark.parametrize("condition", ["~Eq(s0, 3)", "s0 > 9", "Unknown(s0)"])
def test_a_condition_that_can_not_be_checked_later(condition):
    refused("can't be checked later", Sizes({"s0": "x.shape[0]"}, [condition]).check, 4)


def granite(**settings: object) -> nn.Module:
    settings = dict(logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3) | settings
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**FEW | settings))


@pytest.fixture(scope="module")
def granites(tmp_path_factory):
    """A function that loads one with another adapter name, rank or settings, and the file of one."""
    folder = tmp_path_factory.mktemp("granite")
    kind = Kind(granite, LLAMA.make_inputs, LLAMA.modules)
    adapters = {rank: save_random_adapter(kind, folder / f"rank {rank}", seed=1, r=rank) for rank in (8, 40)}

    def make(name: str = "default", rank: int = 8, **settings: object) -> nn.Module:
        return load(Kind(partial(granite, **settings), LLAMA.make_inputs, LLAMA.modules), adapters[rank], name)

    model = make()
    prepare(model, target_rank=8)
    return make, file_of(model, folder, dynamic_shapes={"input_ids": {0: AUTO, 1: AUTO}})


# ---- calls


@pytest.mark.long
def test_arguments_by_position_and_by_default(granites):
    make, path = granites
    two = SimpleNamespace(first=make("other"), second=(model := make()))  # the second one has the name
    ahead, given = bind(path, two), ids()
    expected = ahead(**given)
    assert type(expected) is type(model(**given))
    for other in (ahead(given["input_ids"], use_cache=False), ahead(**given, attention_mask=None)):
        assert torch.equal(other.logits, expected.logits)


CALLS = [
    ("None", dict(input_ids=ids()["input_ids"])),
    ("int32", {**ids(), "input_ids": ids()["input_ids"].int()}),
    ("[9]", {**ids(), "input_ids": ids()["input_ids"][0]}),
    ("input_ids.shape[1] = 1", {**ids(), "input_ids": ids()["input_ids"][:, :1]}),
    ("attention_mask: [[2, 9]", {**ids(), "attention_mask": torch.ones(2, 9)}),
    ("the inputs input_ids", {**ids(), "color": 1}),
    ("None", dict(use_cache=False)),
    ("True", {**ids(), "use_cache": True}),
    ("logits_to_keep: 1", {**ids(), "logits_to_keep": 1}),
]


@pytest.mark.long
@pytest.mark.parametrize(("words", "inputs"), CALLS, ids=[words for words, _ in CALLS])
def test_inputs_of_another_form(granites, words, inputs):
    """Compiled code takes what it gets for what it was compiled for, and would compute anything."""
    make, path = granites
    ahead = bind(path, model := make())
    error = refused("not compiled for such inputs", lambda _: ahead(**inputs), model)
    assert words in str(error)


UNFIT = [
    (lambda folder: load(LLAMA, save_random_adapter(LLAMA, folder / "a", 1)), {}, "Only a prepared model"),
    (lambda folder: prepared_for(8, add_another(prepared(LLAMA, folder)), "other"), {}, "adapters: 'default', 'other'"),
    (lambda folder: prepared(LLAMA, folder).train(), {}, "training mode"),
    (partial(prepared, LLAMA), dict(dynamic_shapes={"ids": {0: AUTO}}), "dynamic_shapes for ids"),
    (partial(prepared, LLAMA), dict(kwargs=dict(input_ids="text")), "can't be exported"),
    (
        partial(prepared, LINEAR),
        dict(kwargs=dict(x=randn(5, 12)), repeated_blocks=True),
        "no layers that are known to be repeated",
    ),
]


@pytest.mark.parametrize(("make", "options", "match"), UNFIT, ids=[match for *_, match in UNFIT])
def test_what_can_not_be_compiled(tmp_path, make, options, match):
    refused(match, lambda model: file_of(model, tmp_path, **options), make(tmp_path))


# ---- other models, other files


def with_norm(model, **attributes):
    for name, value in attributes.items():
        setattr(model.get_base_model().model.norm, name, value)
    return model


def other_ropes(model):
    """As models with layers of several types have them."""
    model.get_base_model().config.rope_parameters |= {"full_attention": {"rope_theta": 5.0}}
    return model


def other_function(model):
    model.get_base_model().model.layers[1].mlp.act_fn = nn.Tanh().eval()
    return model


def prepared_for(rank, model, name=None):
    prepare(model, adapter_name=name, target_rank=rank)
    return model


SETTINGS = dict(logits_scaling=4.0, residual_multiplier=0.25, attention_multiplier=0.5, rms_norm_eps=1e-3)
SETTINGS |= dict(hidden_act="gelu")
OTHER_SHAPES = "was compiled for a model with different tensor shapes, strides, dtypes or devices"
#: by what it is: how it is made, and what it is refused with
OTHERS = {
    "another model": (lambda make: prepared_for(8, demo.load("reverse")[0]), "GraniteForCausalLM with 'default'"),
    "another name": (lambda make: make("other"), "GraniteForCausalLM with other"),
    "other ranks": (lambda make: prepared_for(32, make()), OTHER_SHAPES),
    "a larger rank": (lambda make: make(rank=40), OTHER_SHAPES),
    "another dtype": (lambda make: prepared_for(8, make().float()), "torch.float32"),
    "no adapter": (lambda make: LLAMA.base(), "no adapter"),
    "another number": (lambda make: with_norm(make(), variance_epsilon=0.1), "model.norm.variance_epsilon = 0.1"),
    "a class": (lambda make: with_norm(make(), kind=nn.Tanh), "model.norm.kind = Tanh"),
    "no weight": (lambda make: with_norm(make(), weight=None), "model.norm.weight: no such tensor"),
    "ropes by the type of a layer": (lambda make: other_ropes(make()), "full_attention.rope_theta = 5.0"),
    "another function": (lambda make: other_function(make()), "act_fn.type = Tanh"),
    "another forward": (lambda make: replace_forward(make()), "mlp.forward = replace_forward"),
    **{
        name: (lambda make, name=name, value=value: make(**{name: value}), rf"config.{name} = {value!r}\n  expected: ")
        for name, value in SETTINGS.items()
    },
}


@pytest.mark.parametrize("other", few_of(OTHERS, OTHERS.keys() - {*SETTINGS} | {"hidden_act"}))
def test_a_model_of_another_form(granites, other):
    (make, path), (make_other, match) = granites, OTHERS[other]
    model = make_other(make)
    for prove in (True, False):
        refused(match, lambda model, prove=prove: bind(path, model, prove=prove), model)


def test_settings_that_are_no_arithmetic(granites):
    make, path = granites
    model = make(pad_token_id=5, eos_token_id=[3, 4], name_or_path="other", id2label={0: "a"}, architectures=["x"])
    with torch.no_grad():
        model.get_base_model().lm_head.weight *= 2  # other weights
    assert_computes(bind(path, model), model, ids())


def rewritten(package: Path, target: Path, change: Callable[[str, bytes], bytes], sealed: bool = True) -> Path:
    """A file with other records."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name.rpartition("/")[2], old.read(name)))
    if sealed:
        seal(target)
    return target


LACKING = getattr(torch.cpu, "get_capabilities", dict)().get("sse4a") is False
NOTES = {
    "torch 1.0": ("notes.json", dict(torch="1.0")),
    r"AdapterPool\(..., rows=4\)": ("notes.json", dict(rows=[4, 1])),
    **({"sse4a": ("_metadata.json", dict(AOTI_CPU_ISA="AVX2 SSE4A"))} if LACKING else {}),
}


@pytest.mark.parametrize("match", NOTES)
def test_files_that_are_not_for_here(granites, tmp_path, match):
    (make, package), (record, more) = granites, NOTES[match]

    def change(name: str, content: bytes) -> bytes:
        return json.dumps(json.loads(content) | more).encode() if name == record else content

    path = rewritten(package, tmp_path / "other.pt2", change)
    refused(match, lambda model: bind(path, model), make())


def test_a_damaged_file(granites, tmp_path):
    """One byte anywhere: in a constant it would change an output, in machine code it would end the process."""
    make, package = granites
    content, damaged, model = package.read_bytes(), tmp_path / "damaged.pt2", make()
    draw = random.Random(0)
    with zipfile.ZipFile(package) as archive:  # in each record, in its header, and anywhere
        starts = [each.header_offset for each in archive.infolist()]
    wheres = [each + at for each in starts for at in (0, 20, 90)] + draw.choices(range(len(content)), k=60)
    for where in wheres:
        damaged.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
        with pytest.raises(HotswapError, match="a file of aoti_compile, or it is corrupt"):
            bind(damaged, model)
    for record in ("notes.json", "values.safetensors", "_metadata.json"):
        rewritten(package, damaged, lambda name, old, record=record: b"{}" if name == record else old, sealed=False)
        refused("it is corrupt", partial(bind, damaged), model)
    for part in (content[: len(content) // 2], b"PK\x03\x04 and nothing else"):
        damaged.write_bytes(part)
        refused("it is corrupt", partial(bind, damaged), model)
    refused("a file of aoti_compile", partial(bind, tmp_path / "none.pt2"), model)


def test_the_code_is_proven_when_it_is_bound(granites, monkeypatch):
    """Nothing but the code of a forward differs; the model, its buffers and random numbers are left alone."""
    make, path = granites
    mlp = transformers.models.granite.modeling_granite.GraniteMLP
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: 1.01 * forward(self, x))
    model = make()
    state = torch.get_rng_state()
    error = refused("outputs of the compiled code differ from the model", lambda model: bind(path, model), model)
    assert "prove=False" in str(error)
    bind(path, model, prove=False)
    monkeypatch.undo()
    bind(path, model)
    assert torch.equal(torch.get_rng_state(), state)


# ---- changes after binding


def parts(model) -> tuple:
    base = model.get_base_model().model
    return base.layers[0].mlp, base.layers[1].self_attn.q_proj, base.norm


def replace_forward(model):
    mlp, *_ = parts(model)
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
    return model


def double(module, given, output):
    return 2 * output


def move(model):
    base_layer = parts(model)[1].base_layer
    base_layer.weight.data = base_layer.weight.data.clone()


def transpose(model):
    """The same memory, read in another order."""
    weight = parts(model)[1].base_layer.weight
    weight.data = weight.data.t()


def narrow(model):
    weight = parts(model)[1].base_layer.weight
    weight.data = weight.data[:4]


def move_scaling(model):
    """Two tensors of one element can be equal; one of them is not the one that the code reads."""
    buffers = parts(model)[1]._buffers
    (name,) = [name for name, each in buffers.items() if each is not None]
    buffers[name] = buffers[name].clone()


def add_another(model):
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    return model


def load_again(model):
    config = model.peft_config["default"]
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")


CHANGES = {
    "training": (lambda model: model.train(), "training mode"),
    "a layer in training": (lambda model: parts(model)[0].train(), r"training mode in model.layers.0.mlp"),
    "a base layer in training": (
        lambda model: parts(model)[1].base_layer.train(),
        r"training mode in model.layers.1.self_attn.q_proj.base_layer",
    ),
    "transposed": (transpose, "moved, replaced or resized"),
    "narrowed": (narrow, "moved, replaced or resized"),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), "adapters that are disabled"),
    "merged": (lambda model: model.merge_adapter(), "an adapter that is merged, 'default'"),
    "another adapter": (add_another, r"the active adapters \['other'\]"),
    "loaded again": (load_again, "moved, replaced or resized"),
    "moved": (move, "moved, replaced or resized"),
    "a scaling": (move_scaling, "moved, replaced"),
    "half precision": (lambda model: model.half(), "moved, replaced or resized"),
    "unloaded": (lambda model: model.unload(), "modules that were moved, replaced"),
    "a weight": (lambda model: setattr(parts(model)[2], "weight", nn.Parameter(torch.ones(16))), "tensors or modules"),
    "a module": (other_function, "modules that were moved, replaced"),
    "a forward": (replace_forward, "a forward or a hook"),
    "a hook": (lambda model: parts(model)[0].register_forward_hook(double), "a forward or a hook"),
    "a hook before": (lambda model: parts(model)[2].register_forward_pre_hook(lambda *_: None), "a forward or a hook"),
    "a hook in an adapter": (
        lambda model: parts(model)[1].lora_A["default"].register_forward_hook(double),
        "a forward or a hook",
    ),
}


#: the others are for the long command
OFTEN = {*list(CHANGES)[::3], "a layer in training", "a base layer in training", "transposed", "narrowed"}


@pytest.mark.parametrize("change", few_of(CHANGES, OFTEN))
def test_a_model_that_has_changed_since(granites, change):
    (make, path), (action, match) = granites, CHANGES[change]
    ahead = bind(path, model := make())
    ahead(**ids())
    action(model)
    refused(match, lambda _: ahead(**ids()), model)


@pytest.mark.parametrize("is_off_first", [False, True])
def test_layers_that_are_off_are_no_other_setting(tmp_path, is_off_first):
    """Neither where the file is made, nor where it is bound."""
    kind = Kind(granite, LLAMA.make_inputs, ("q_proj", "up_proj"))
    both, *some = save_family(kind, tmp_path, {}, *(dict(target_modules=[each]) for each in kind.modules))
    model, other = load(kind, both), load(kind, both)
    prepare(model, target_rank=8)
    prepare(other, target_rank=8)
    hotswap_adapter(model if is_off_first else other, some[0], "default")
    ahead = bind(file_of(model, tmp_path), other)
    for folder in (*some, both):
        hotswap_adapter(other, folder, "default")
        assert_close(ahead(**ids()).logits, call(load(kind, folder), ids()))


@pytest.mark.parametrize("number", [0, -1])
def test_one_layer_that_is_merged(granites, number):
    make, path = granites
    ahead, given = bind(path, model := make()), ids()
    layer = lora_layers(model)[number]
    layer.merge()
    for action in (lambda _: ahead(**given), lambda _: bind(path, model)):
        refused("merged", action, model)
    layer.unmerge()
    assert_computes(ahead, model, given)


@pytest.mark.long
@pytest.mark.parametrize("by_blocks", [False, True])
def test_a_file_is_made_and_bound_before_hidden_states_are_asked_for(tmp_path, by_blocks):
    """transformers adds its hooks the first time, and must know later whether it did."""
    model, given = prepared(LLAMA, tmp_path), ids() | dict(output_hidden_states=True)
    bind(file_of(model, tmp_path, kwargs=given, repeated_blocks=by_blocks), model)
    assert len(model(**given).hidden_states) == 3


def test_a_forward_that_is_its_class_s(granites):
    """Older transformers leave it in a module's table; a later one that is not is noticed all the same."""
    make, path = granites
    model = make()
    ahead, (mlp, *_) = bind(path, model), parts(model)
    mlp.forward = mlp.forward
    for code in (ahead, bind(path, model)):
        assert_computes(code, model, ids())
    replace_forward(model)
    refused("a forward or a hook", lambda _: ahead(**ids()), model)


def test_float64_that_is_rounded_on_the_way(tmp_path, monkeypatch):
    """As in norms that compute in float32; compiled code rounds otherwise."""
    kind = Kind(Rounded, lambda: torch.randn(3, 12), ("first",))
    model = load(kind, save_random_adapter(kind, tmp_path / "adapter", 1))
    prepare(model, target_rank=8)
    given = dict(x=randn(3, 12))
    path = file_of(model, tmp_path, kwargs=given)
    monkeypatch.setattr(Rounded, "forward", lambda self, x: self.first(x).float().tanh().double())
    bind(path, model)
    monkeypatch.setattr(Rounded, "forward", lambda self, x: 1.01 * self.first(x).tanh())
    refused("outputs of the compiled code differ", lambda model: bind(path, model), model)


#: what is compiled; what the model computes when it is bound; what that is refused with
UNLIKE = [
    (lambda y: (y, y), lambda y: (y, None), "a Tensor where the model has a NoneType"),
    (lambda y: (y, None), lambda y: (y, y), "a NoneType where the model has a Tensor"),
    (lambda y: 0 * y, lambda y: 0 * y[:1], r"\[3, 12\] where the model has torch.float64 \[1, 12\]"),
    (lambda y: y, lambda y: y.float(), r"torch.float64 \[3, 12\] where the model has torch.float32"),
    (lambda y: torch.complex(y, y), lambda y: torch.complex(y, y) * (1 + 1e-6), None),
]


@pytest.mark.parametrize(("compiled", "bound", "match"), UNLIKE)
def test_what_differs_in_its_outputs(tmp_path, monkeypatch, compiled, bound, match):
    kind = Kind(Rounded, lambda: torch.randn(3, 12), ("first",))
    model = prepared(kind, tmp_path)
    monkeypatch.setattr(Rounded, "forward", lambda self, x: compiled(self.first(x)))
    path = file_of(model, tmp_path, kwargs=dict(x=kind.inputs()))
    monkeypatch.setattr(Rounded, "forward", lambda self, x: bound(self.first(x)))
    refused(match, lambda model: bind(path, model), model) if match else bind(path, model)


def test_what_a_forward_writes_to(tmp_path, monkeypatch):
    """Its inputs, which may lie otherwise in memory, and its buffers; both may be of inference mode."""
    monkeypatch.setattr(Rounded, "forward", lambda self, x: self.first(x.mul_(0.5)) + self.calls.add_(1))
    kind = Kind(Rounded, lambda: torch.randn(3, 12), ("first",))
    model = prepared(kind, tmp_path)
    model.get_base_model().register_buffer("calls", torch.zeros(()))
    path = file_of(model, tmp_path, kwargs=dict(x=kind.inputs()))
    ones = partial(torch.ones, dtype=torch.float64)
    wide = ones(1, 3, 24)[:, :, :12].as_strided((3, 12), (24, 1))
    for given in (ones(3, 12), ones(12, 3).t(), wide):
        bind(path, model)(given)
        assert torch.equal(given, 0.5 * ones(3, 12))
    with pytest.raises(RuntimeError, match="single memory location"):
        bind(path, model)(ones(12).expand(3, 12))
    with torch.inference_mode():
        bind(path, model)
        model.get_base_model().calls = torch.zeros(())
    bind(path, model)


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
    for code in (ahead, bind(path, model)):
        assert_computes(code, model, ids())
