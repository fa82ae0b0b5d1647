"""The public functions against the oracle: whatever was loaded, after the swap it is a fresh load of the new one.

An error leaves the old adapter or the new one, whole; faults at every step are in ``robustness/test_faults.py``.

A test is a way to get there and one comparison. The tables say what is loaded, in which state the model is, what comes
in and how, and what is done afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import peft.utils.hotswap as peft_hotswap
import pytest
import torch
from adapters import save_random_adapter_of
from lengths import few_of, long
from models import ARCHITECTURES, KINDS, call, load, lora_layers, randomize, save_family
from mutations import KEY, odd, with_config, with_tensors
from oracle import (
    assert_close,
    assert_equals,
    assert_equals_fresh_load,
    assert_same,
    assert_same_outputs,
    assert_same_tensors,
    nothing_else_changes,
    observe,
    untouched,
)
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import nn

import hotswap_lab
from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    commit,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    set_strength,
)
from hotswap_lab.core.change import apply
from hotswap_lab.core.journal import Journal

LINEAR, LLAMA = KINDS["linear"], KINDS["llama"]


def from_state_dict(model, folder: str) -> None:
    adapter = Adapter.load(folder)
    with nothing_else_changes(adapter.tensors, adapter.config):
        hotswap_adapter_from_state_dict(model, adapter.tensors, "default", adapter.config)


def from_folder(model, folder: str) -> None:
    with nothing_else_changes(Path(folder)):
        hotswap_adapter(model, folder, "default")


# ---- from any adapter to any other

#: ranks, scalings, dropouts and layers that differ; the first two differ in values and alpha alone
FAMILY = (
    dict(r=4, lora_alpha=8, lora_dropout=0.1),
    dict(r=4, lora_alpha=32, lora_dropout=0.1),
    dict(r=12, lora_alpha=8, use_rslora=True, lora_dropout=0.5),
)


#: each of these, and of the first three, comes right after each other one
EVERY_PAIR = (0, 0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0)


@pytest.mark.parametrize("name", few_of(KINDS, ("linear", "conv", "embedding")))
def test_every_kind_of_layer(name, tmp_path):
    """With layers that come and go; into itself, nothing changes."""
    kind = KINDS[name]
    one = dict(r=8, lora_alpha=6, target_modules=[kind.modules[0]])
    folders = save_family(kind, tmp_path, *FAMILY, *([one] if len(kind.modules) > 1 else []))
    model = load(kind, folders[0])
    for step, number in enumerate(each for each in EVERY_PAIR if each < len(folders)):
        (from_folder, from_state_dict)[step % 2](model, folders[number])
        assert_equals_fresh_load(model, kind, folders[number], margin=10)


#: configs of all forms, on a model with names of three levels
CONFIGS = (
    dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5, "down_proj": 1}),
    dict(rank_pattern={"model.layers.1.mlp.up_proj": 7}, alpha_pattern={"model.layers.0.self_attn.v_proj": 3}),
    dict(rank_pattern={"[kq]_proj": 3, "q_proj": 5}),  # the first pattern wins
    dict(rank_pattern={r".*layers\.0\..*proj": 3}, alpha_pattern={r"[kv]_proj": 9}),
    dict(rank_pattern={"o_proj": 9}, alpha_pattern={"o_proj": 2}, use_rslora=True),
    dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    dict(target_modules=r".*layers\.0\.mlp\.(up|down)_proj"),
    dict(target_modules=["q_proj", "up_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"]),
    dict(target_modules=["q_proj", "up_proj"], exclude_modules=r".*layers\.1\..*"),
    dict(target_modules="all-linear"),
    dict(target_modules=None),  # the model's default
    dict(target_modules=["model.layers.1.self_attn.o_proj"]),
)
ONE_FIELD = (
    *(
        dict(r=2),
        dict(lora_alpha=3),
        dict(use_rslora=True),
        dict(use_rslora=None),
        dict(lora_dropout=0.3),
        dict(rank_pattern={"q_proj": 2}),
    ),
    *(dict(alpha_pattern={"q_proj": 2}), dict(target_modules=["q_proj"]), dict(exclude_modules=["k_proj"])),
    dict(layers_to_transform=[1]),
)


@pytest.mark.long
def test_configs_of_all_forms(tmp_path):
    every, *forms = save_family(LLAMA, tmp_path, dict(r=4), *(dict(r=6, lora_alpha=5) | each for each in CONFIGS))
    model = load(LLAMA, every)
    for folder in (*forms, every):
        hotswap_adapter(model, folder, "default", add_layers=True)
        assert_equals_fresh_load(model, LLAMA, folder)


@pytest.mark.long
@pytest.mark.parametrize("field", ONE_FIELD, ids=str)
def test_a_change_of_one_field_is_noticed(tmp_path, field):
    """What is known of one config's layers is kept for the next adapter, unless it depends on a field that differs."""
    config = dict(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj"])
    every = dict(r=4, target_modules=["q_proj", "k_proj", "v_proj"])
    every, one, other = save_family(LLAMA, tmp_path, every, config, config | field)
    model = load(LLAMA, every)
    for folder in (other, one, other):
        hotswap_adapter(model, folder, "default")
        assert_equals_fresh_load(model, LLAMA, folder)


# ---- from any state of the model


@dataclass(frozen=True)
class Start:
    """A state of the model; a fresh load is brought into it, too."""

    both: Callable = lambda model, other: None
    #: what is gone after a swap
    before: Callable = lambda model: None
    load: dict = field(default_factory=dict)
    #: around the swap
    around: Callable = contextlib.nullcontext
    #: by how much the adapter changes the outputs: not at all if it is inactive
    margin: float = 1000


def with_gradients(model) -> None:
    model(LINEAR.inputs()).sum().backward()


def beside(*active: str) -> Callable:
    def both(model, other: str) -> None:
        model.load_adapter(other, "other")
        model.base_model.set_adapter(list(active))
        model.eval()

    return both


def disabled(model, other: str) -> None:
    beside("default")(model, other)
    model.base_model.disable_adapter_layers()


def in_training(model, other: str) -> None:
    beside("default")(model, other)
    model.train()


STARTS = {
    "as it was loaded": Start(),
    "a swap in inference mode": Start(load=dict(is_trainable=True), around=torch.inference_mode),
    "with gradients": Start(before=with_gradients, load=dict(is_trainable=True)),
    "in training beside another adapter": Start(in_training, load=dict(is_trainable=True), margin=0),
    "inactive": Start(beside("other"), margin=0),
    "one of several": Start(beside("default", "other")),
    "disabled": Start(disabled, margin=0),
}
#: what comes, from an adapter of rank 4 on the first layer and on block 1
NEWS = {
    "values": dict(r=4, target_modules=["first", "blocks.1"]),
    "another rank": dict(r=6, lora_alpha=3, target_modules=["first", "blocks.1"]),
    "fewer layers": dict(r=2, target_modules=["first"]),
    "more layers": dict(r=6, lora_dropout=0.3),
}


@pytest.mark.parametrize("new", few_of(NEWS, ("another rank", "fewer layers")))
@pytest.mark.parametrize("start", STARTS)
def test_from_any_state_of_the_model(tmp_path, start, new):
    given, family = STARTS[start], (NEWS["values"], NEWS[new], dict(r=3, target_modules=["first", "blocks.0"]))
    old, new, other = save_family(LINEAR, tmp_path, *family)
    model, fresh = load(LINEAR, old, **given.load), load(LINEAR, new, **given.load)
    for each in (model, fresh):
        given.both(each, other)
    given.before(model)
    with nothing_else_changes(), given.around():
        hotswap_adapter(model, new, "default", add_layers=True)
    if model.training:  # its outputs are random
        for each in (model, fresh):
            assert all(module.training for module in each.modules())
            each.eval()
    assert_equals(model, fresh, LINEAR, margin=given.margin)
    assert {*fresh.base_model.targeted_module_names} <= {*model.base_model.targeted_module_names}
    if not given.margin:
        for each in (model, fresh):
            each.base_model.enable_adapter_layers()
            each.set_adapter("default")
        assert_equals(model, fresh, LINEAR, margin=100)


def with_compiled_base(model: PeftModel) -> PeftModel:
    model.base_model.model = torch.compile(model.base_model.model, backend="eager")
    return model


#: ways to a model that has an adapter inside
WRAPPINGS = {
    "tuner": lambda model: model.base_model,
    "base": lambda model: model.get_base_model(),
    "inside other modules": lambda model: nn.Sequential(nn.Identity(), nn.ModuleDict({"inner": model})),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled inside another module": lambda model: nn.Sequential(torch.compile(model, backend="eager")),
    "around a compiled base": with_compiled_base,
    "tuner around a compiled base": lambda model: with_compiled_base(model).base_model,
}


@pytest.mark.parametrize("wrapping", ["injected", *WRAPPINGS])
def test_models_that_carry_adapters(tmp_path, wrapping):
    old, new = save_family(LINEAR, tmp_path, dict(r=4, lora_alpha=8), dict(r=6, lora_alpha=3))
    if wrapping == "injected":
        model = given = inject_adapter_in_model(Adapter.load(old).config, LINEAR.base())
        randomize(model, "default", seed=1)
    else:
        model = load(LINEAR, old)
        given = WRAPPINGS[wrapping](model)
    hotswap_adapter(given, new, "default")
    assert_same_outputs(model, load(LINEAR, new), LINEAR)


def test_a_config_that_was_in_another_model(tmp_path):
    """A swap notes on its config what it need not ask again: that holds in the model that it was in."""
    old, new = save_family(LINEAR, tmp_path, NEWS["more layers"], NEWS["fewer layers"])
    first = load(LINEAR, old)
    hotswap_adapter(first, old, "default")
    model = get_peft_model(LINEAR.base(), first.peft_config["default"]).eval()
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, LINEAR, new)


def test_a_model_with_another_method_is_judged_by_the_named_adapter(tmp_path):
    """PEFT judges by the active one: here that is a LoHa adapter, and the swapped one is not active."""
    (new,) = save_family(LINEAR, tmp_path, dict(r=6))
    model = PeftMixedModel(LINEAR.base(), LoraConfig(target_modules=list(LINEAR.modules), r=4), "lora")
    model.add_adapter("loha", LoHaConfig(target_modules=["first"], r=2))
    model.set_adapter("loha")
    hotswap_adapter(model, new, "lora")
    model.set_adapter("lora")
    assert_same_outputs(model, load(LINEAR, new), LINEAR)
    refused("^Incompatible PEFT types found: LOHA and LORA", hotswap_adapter, model, new, "loha")
    get_peft_model(LINEAR.base(), LoKrConfig(target_modules=["first"], r=2)).save_pretrained(lokr := tmp_path / "lokr")
    refused("^Incompatible PEFT types found: LOHA and LOKR", hotswap_adapter, model, lokr, "loha", add_layers=True)


NAMES = ["1", "11", "default", "default_0", "lora_A", "weight"]


def test_only_the_named_adapter_is_touched(tmp_path):
    """Adapters whose names are parts of each other, or of PEFT's own keys, side by side."""
    *folders, new = save_family(LINEAR, tmp_path, *(dict(r=2 + number) for number in range(len(NAMES))), dict(r=5))

    def loaded(**changed: str) -> PeftModel:
        family = {**dict(zip(NAMES, folders, strict=True)), **changed}
        model = load(LINEAR, family[NAMES[0]], NAMES[0])
        for name in NAMES[1:]:
            model.load_adapter(family[name], name)
        return model.eval()

    model, changed = loaded(), {}
    for name in NAMES:
        hotswap_adapter(model, new, name)
        fresh = loaded(**changed, **{name: new})
        changed[name] = new
        for each in (model, fresh):
            each.set_adapter(name)
        assert_same(observe(model, name), observe(fresh, name))
        assert_same_outputs(model, fresh, LINEAR)
    assert_equals(model, fresh, LINEAR, name)


@pytest.mark.parametrize("name", ["base_layer", "lora_A"])
def test_an_adapter_called_like_a_part_of_the_layers_that_it_is_added_to(tmp_path, name):
    few, own, other = save_family(LINEAR, tmp_path, NEWS["fewer layers"], dict(r=2), dict(r=3))
    model = load(LINEAR, other)
    model.load_adapter(few, name)
    hotswap_adapter(model, own, name, add_layers=True)
    for each, folder in (("default", other), (name, own)):
        model.set_adapter(each)
        assert_same_outputs(model, load(LINEAR, folder), LINEAR)


@pytest.mark.parametrize("rank", [4, 6])
def test_parameters_stay_the_same_objects(tmp_path, rank):
    """Optimizers and hooks hold on to parameters; equal ranks even keep the addresses."""
    old, new = save_family(LLAMA, tmp_path, dict(r=4), dict(r=rank))
    model = load(LLAMA, old, is_trainable=True)
    slot = resolve_slot(model, "default")
    parameters, addresses = [tensor.parameter for tensor in slot.tensors], slot.data_ptrs()
    hotswap_adapter(model, new, "default")
    now = [tensor.parameter for tensor in resolve_slot(model, "default").tensors]
    assert all(before is after for before, after in zip(parameters, now, strict=True))
    assert all(type(parameter) is torch.nn.Parameter for parameter in now)
    assert (slot.data_ptrs() == addresses) == (rank == 4)


def test_a_subfolder(tmp_path):
    old, new = save_family(LINEAR, tmp_path, dict(r=4), dict(r=2))
    model = load(LINEAR, old)
    hotswap_adapter(model, tmp_path, "default", subfolder=Path(new).name)
    assert_equals_fresh_load(model, LINEAR, new)
    with pytest.raises(TypeError, match="revison"):
        hotswap_adapter(model, new, "default", revison="main")


@pytest.mark.parametrize("of_the_model", [False, True])
def test_key_mapping(tmp_path, of_the_model):
    """An adapter for older code of the model, whose layers had other names; some transformers models know these."""
    old, new = save_family(LINEAR, tmp_path, dict(r=4), dict(r=6))
    model, mapping = load(LINEAR, old), {r"old_blocks\.layer_": "blocks."}

    def rename(tensors: dict) -> None:
        for key in list(tensors):
            tensors[key.replace("blocks.", "old_blocks.layer_")] = tensors.pop(key)

    with_tensors(rename)(Path(new), Random())
    refused("unexpected keys found", hotswap_adapter, model, new, "default")
    if of_the_model:
        model.get_base_model()._checkpoint_conversion_mapping = mapping
    hotswap_adapter(model, new, "default", **({} if of_the_model else {"key_mapping": mapping}))
    assert_equals_fresh_load(model, LINEAR, new, key_mapping=mapping)


def test_an_adapter_read_once_can_be_swapped_often(tmp_path):
    old, new = save_family(LINEAR, tmp_path, dict(r=4), dict(r=6))
    model, read, tensors = load(LINEAR, old), Adapter.load(new), dict(Adapter.load(old).tensors)
    second = Adapter.from_state_dict(tensors, Adapter.load(old).config)
    tensors.popitem()  # which changes nothing of the adapter that was made of them
    for adapter, source in ((read, new), (second, old), (read, new)):
        hotswap_adapter(model, adapter, "default")
        assert_equals_fresh_load(model, LINEAR, source)
    with pytest.raises(TypeError, match="already read"):
        hotswap_adapter(model, read, "default", revision="main")
    refused("config is missing", Adapter.from_state_dict, tensors, None)
    assert repr(read) == f"<LORA from {new}: {len(read.tensors)} tensors, {read.nbytes:,} bytes>"


def test_the_default_device_makes_no_difference(tmp_path):
    """Tensors of ours are on the CPU, or where the model is."""
    old, dora, new = save_family(LINEAR, tmp_path, dict(r=4), dict(r=3, use_dora=True), dict(r=6))
    model = load(LINEAR, old)
    with torch.device("meta"):
        hotswap_adapter(model, dora, "default")
        hotswap_adapter(model, new, "default")
        set_strength(model, 0.5, "default")
        set_strength(model, 1.0, "default")
        AdapterPool(model, adapters={"new": new}, progress=False).swap("new")
    assert_equals_fresh_load(model, LINEAR, new, prepared=True)


# ---- state dicts

KEY_FORMS = {
    "as in a file": lambda key: key,
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "without PEFT's prefix": lambda key: key.removeprefix("base_model.model."),
    "from a compiled model": lambda key: f"_orig_mod.{key}",
    "from a compiled part": lambda key: key.replace("blocks.", "blocks._orig_mod."),
}


@pytest.mark.parametrize("form", KEY_FORMS)
def test_key_forms(tmp_path, form):
    (new,) = save_family(LINEAR, tmp_path, dict(r=6, lora_alpha=4))
    adapter = Adapter.load(new)
    tensors = {KEY_FORMS[form](key): tensor for key, tensor in adapter.tensors.items()}
    for old in save_family(LINEAR, tmp_path / "old", NEWS["values"], NEWS["more layers"]):
        model = load(LINEAR, old)
        hotswap_adapter_from_state_dict(model, tensors, "default", adapter.config, add_layers=True)
        assert_equals_fresh_load(model, LINEAR, new)


@pytest.mark.parametrize("form", [{}, dict(lora_bias=True), dict(use_dora=True)], ids=["plain", "bias", "DoRA"])
@pytest.mark.parametrize("old", ["values", "more layers"])
def test_two_values_for_one_tensor_are_refused_whatever_else_changes(tmp_path, form, old):
    old, new = save_family(LINEAR, tmp_path, NEWS[old], dict(r=4, **form))
    model, adapter, swap = load(LINEAR, old), Adapter.load(new), hotswap_adapter_from_state_dict
    twice = {**adapter.tensors, "last.lora_A.weight": adapter.tensors["base_model.model.last.lora_A.weight"] + 1}
    for tensors in (twice, dict(reversed(twice.items()))):
        refused("two different values for", swap, model, tensors, "default", adapter.config, add_layers=True)


#: the same values in memory that is laid out in other ways
VIEWS = {
    "as in a file": torch.Tensor.contiguous,
    "transposed": lambda each: each.t().contiguous().t(),
    "every second": lambda each: torch.stack([each, each], 2)[..., 0],
    "part of something": lambda each: torch.cat([each, each])[: len(each)],
    "a parameter": nn.Parameter,
    "not a leaf": lambda each: each.clone().requires_grad_() * 1.0,
    "double": torch.Tensor.double,
    "a negative view": lambda each: torch._neg_view(-each),
    "of inference mode": torch.inference_mode()(torch.Tensor.clone),
}


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("view", few_of(VIEWS, ("transposed", "not a leaf", "a negative view")))
def test_a_state_dict_is_read_and_not_kept(tmp_path, view, rank):
    """PEFT's own hotswap takes over the caller's tensors when the rank grows."""
    kind = dataclasses.replace(LINEAR, dtype=torch.float32) if view == "double" else LINEAR
    old, new = save_family(kind, tmp_path, dict(r=4), dict(r=rank))
    model, adapter = load(kind, old), Adapter.load(new)
    tensors = {key: VIEWS[view](each) for key, each in adapter.tensors.items()}
    hotswap_adapter_from_state_dict(model, tensors, "default", adapter.config)
    assert_equals_fresh_load(model, kind, new)
    for parameter in model.parameters():
        parameter.data.add_(1)
    model.peft_config["default"].r = 77
    assert adapter.config.r == rank
    assert all(torch.equal(tensors[key].to(each.dtype), each) for key, each in adapter.tensors.items())


OTHER_BLOCK = str.maketrans({"0": "1", "1": "0"})
#: state dicts made of the model's own parameters, which are read while they are written
OWN = {
    "the other block's": lambda key, each: (key.translate(OTHER_BLOCK), each),
    "one row, repeated": lambda key, each: (key, each[:1].expand(each.shape)),
}


@pytest.mark.parametrize("own", OWN)
def test_the_models_own_parameters(tmp_path, own):
    model = load(LINEAR, *save_family(LINEAR, tmp_path, dict(r=4)))
    live = {key: each for key, each in model.state_dict(keep_vars=True).items() if "lora_" in key}
    tensors = dict(OWN[own](key, each) for key, each in live.items())
    expected = {key: value.detach().clone() for key, value in tensors.items()}
    hotswap_adapter_from_state_dict(model, tensors, "default", model.peft_config["default"])
    assert_same_tensors({key: model.state_dict()[key] for key in expected}, expected)


#: entries that no state dict may have
ODD = [{KEY: value} for value in odd(torch.ones(4, 12)).values()]
ODD += [{key: torch.ones(4, 12)} for key in (5, None, ("a", "b"), b"a", "", ".", ".lora_A.weight", "...")]


@pytest.fixture(scope="module")
def loaded_adapter(tmp_path_factory):
    """A model, and the adapter that is loaded in it."""
    (folder,) = save_family(LINEAR, tmp_path_factory.mktemp("loaded"), dict(r=4))
    return load(LINEAR, folder), Adapter.load(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("entry", ODD)
def test_odd_entries(loaded_adapter, entry):
    model, adapter = loaded_adapter
    tensors = {**adapter.tensors, **entry}
    refused("found:", hotswap_adapter_from_state_dict, model, tensors, "default", adapter.config)


def test_a_list_in_place_of_a_tensor_is_named(loaded_adapter):
    model, adapter = loaded_adapter
    tensors = {**adapter.tensors, KEY: [1.0]}
    refused(f"list under '{KEY}'", hotswap_adapter_from_state_dict, model, tensors, "default", adapter.config)


@pytest.mark.parametrize("table", [None, 5, [], "weights", [("a", torch.ones(2))], torch.ones(2)], ids=repr)
def test_only_a_dict_is_a_state_dict(loaded_adapter, table):
    model, adapter = loaded_adapter
    with untouched(model), pytest.raises((TypeError, ValueError)):
        hotswap_adapter_from_state_dict(model, table, "default", adapter.config)


# ---- what PEFT does afterwards


def add_weighted(combination: str) -> Callable:
    def operation(model, other: str):
        model.load_adapter(other, "other")
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type=combination)
        model.set_adapter("both")
        return model.eval()

    return operation


def on_each_layer(change: Callable) -> Callable:
    def operation(model, other: str):
        for layer in lora_layers(model):
            change(layer)
        return model

    return operation


def merged(model, other: str):
    model.merge_adapter()
    return model


OPERATIONS = {
    "set_scale": on_each_layer(lambda module: module.set_scale("default", 0.5)),
    "scale_layer": on_each_layer(lambda module: (module.scale_layer(7), module.unscale_layer(), module.scale_layer(2))),
    "merge": merged,
    "merge and unload": lambda model, other: model.merge_and_unload(),
    **{f"add {each}": add_weighted(each) for each in ("linear", "cat", "svd")},
}
#: what makes a difference to these: the model, what is loaded, and what comes. PEFT would refuse to merge grouped
#: convolutions that are off, and lora_bias into a layer without a bias, and only after it has merged others
COMING = {
    "patterns": ("llama", dict(r=4), dict(r=6, target_modules=["q_proj", "up_proj"], alpha_pattern={"up_proj": 9})),
    "rsLoRA": ("linear", dict(r=8), dict(r=4, lora_alpha=3, use_rslora=True, target_modules=["first"])),
    "embeddings": ("embedding", dict(r=4), dict(r=6)),
    "shared": ("shared", dict(r=4), dict(r=6)),
    "transposed": ("gpt2", dict(r=4), dict(r=6)),
    "same layers": ("linear", dict(r=8), dict(r=4, lora_alpha=3)),
    "biases": ("linear", dict(r=4, lora_bias=True), dict(r=4, lora_bias=True, target_modules=["first", "last"])),
    "biases given up": ("linear", dict(r=4, lora_bias=True), dict(r=4, target_modules=["first", "last"])),
}


#: PEFT adds up plain LoRA on linear layers, with the rank of the config on each of them
AFTER_A_SWAP = [
    (coming, operation)
    for coming in COMING
    for operation in OPERATIONS
    if coming == "same layers" or not operation.startswith("add")
]


@pytest.mark.parametrize(
    ("coming", "operation"),
    [case if case[0] in list(COMING)[::2] else long(*case) for case in AFTER_A_SWAP],
)
def test_pefts_operations_after_a_swap(tmp_path, coming, operation):
    name, old, new = COMING[coming]
    kind, change = KINDS[name], OPERATIONS[operation]
    full, few, other = save_family(kind, tmp_path, old, new, dict(r=4))
    model, fresh = load(kind, full), load(kind, few)
    hotswap_adapter(model, few, "default")
    live, expected = (change(each, other) for each in (model, fresh))
    assert_close(call(live, kind.inputs()), call(expected, kind.inputs()))
    if operation == "merge":
        match = "Cannot hot-swap adapter 'default' because it is currently merged into"
        refused(match, hotswap_adapter, model, full, "default")
        model.unmerge_adapter()
        one = resolve_slot(model, "default").layers[0].module
        one.merge(adapter_names=["default"])
        refused(match, hotswap_adapter, model, full, "default")
        one.unmerge()
    if operation != "merge and unload":
        model.set_adapter("default")
        hotswap_adapter(model, full, "default")
        assert_same_outputs(model, load(kind, full), kind)


def test_a_layer_that_was_off_comes_back_in_another_form(tmp_path):
    """PEFT's ``lora_bias`` table says then that it has a bias no more."""
    few = dict(r=4, lora_bias=True, target_modules=["first"])
    full, few, plain = save_family(LINEAR, tmp_path, dict(r=4, lora_bias=True), few, dict(r=4))
    model = load(LINEAR, full)
    for folder in (few, plain, few, full):
        hotswap_adapter(model, folder, "default", add_layers=True)
        assert_equals_fresh_load(model, LINEAR, folder)


# ---- in PEFT's place


@pytest.mark.parametrize("name", ["hotswap_adapter", "hotswap_adapter_from_state_dict"])
def test_drop_in_for_peft(name):
    """PEFT's parameters, in PEFT's order, with PEFT's defaults: changing the import is all a user does."""
    theirs = inspect.signature(getattr(peft_hotswap, name)).parameters.values()
    ours = list(inspect.signature(getattr(hotswap_lab, name)).parameters.values())
    for position, parameter in enumerate(theirs):
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        assert ours[position].name == parameter.name
        assert parameter.default in (parameter.empty, ours[position].default)  # ours may have one more
        assert ours[position].kind == parameter.kind


def test_the_engine_never_calls_pefts_hotswap():
    package = Path(hotswap_lab.__file__).parent
    use = re.compile(r"from peft\.utils(\.hotswap)? import .*hotswap|import peft\.utils\.h|spec\(.peft\.utils\.hotswap")
    users = {path.relative_to(package).parts[0] for path in package.rglob("*.py") if use.search(path.read_text())}
    assert users == {"bench.py", "pipelines"}  # which measures PEFT's, and which replaces it (pipelines.patching)


# ---- all or nothing


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers as Unix has them")
def test_a_regular_expression_that_takes_for_ever_can_be_ended(tmp_path):
    """It holds the interpreter, so that no other thread could press anything; the signal comes all the same."""
    old, new = save_family(KINDS["llama"], tmp_path, dict(r=4), dict(r=4))
    with_config(rank_pattern={r"([\w.]+)+!": 2})(Path(new), Random())
    model = load(KINDS["llama"], old)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with untouched(model), pytest.raises(KeyboardInterrupt):
            hotswap_adapter(model, new, "default")
    finally:
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.usefixtures("python_sigint")
def test_an_interrupted_roll_back_is_completed():
    table = {"a": 1, "b": 2}
    journal = Journal()
    journal.set_item(table, "a", 10)
    journal.record(lambda: signal.raise_signal(signal.SIGINT))
    journal.set_item(table, "b", 20)
    with pytest.raises(KeyboardInterrupt):
        journal.roll_back()
    assert table == {"a": 1, "b": 2}


def train(model) -> None:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model(LINEAR.inputs()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_fused_optimizer_with_the_state_of_another_rank_is_stopped(tmp_path):
    """It would read and write beyond the end of its state, and crash, or not crash. Others notice by themselves."""
    folders = save_family(LINEAR, tmp_path, dict(r=2), dict(r=64))
    model = load(LINEAR, folders[0], is_trainable=True)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)

    def step() -> None:
        model(LINEAR.inputs()).sum().backward()
        optimizer.step()

    step()
    hotswap_adapter(model, folders[1], "default")
    before = [each.clone() for each in trained]
    with pytest.raises(HotswapError, match=r"optimizer\.state\.clear\(\)"):
        step()
    assert all(map(torch.equal, before, trained))
    optimizer.zero_grad()
    optimizer.state.clear()
    step()
    assert not any(map(torch.equal, before, trained))


#: ways to swap the second adapter into a model that has the first, made before a region of autocast
AUTOCAST = {
    "as it is": lambda model, folder: lambda: hotswap_adapter(model, folder, "default"),
    "prepared": lambda model, folder: (
        prepare_model_for_compiled_hotswap(model, target_rank=8) or (lambda: hotswap_adapter(model, folder, "default"))
    ),
    "a pool": lambda model, folder: partial(AdapterPool(model, adapters={"new": folder}, progress=False).swap, "new"),
}


@pytest.mark.parametrize("way", AUTOCAST)
@pytest.mark.parametrize("form", [{}, dict(modules_to_save=["last"], target_modules=["first"])], ids=["LoRA", "saved"])
def test_a_swap_in_a_region_of_autocast(tmp_path, way, form):
    """It keeps the casts of trainable weights until the outermost region ends, whatever is written meanwhile."""
    folders = save_family(LINEAR, tmp_path, dict(r=4) | form, dict(r=4, lora_alpha=16) | form)
    if form:
        file = f"{folders[1]}/adapter_model.safetensors"
        save_file({key: -each if ".last." in key else each for key, each in load_file(file).items()}, file)
    model, fresh = (load(LINEAR, folder, is_trainable=True) for folder in folders)
    swap, inputs = AUTOCAST[way](model, folders[1]), LINEAR.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before, expected = model(inputs), fresh(inputs)
        swap()
        torch.testing.assert_close(model(inputs), expected, rtol=0, atol=0.05)
    assert (expected - before).abs().max() > 0.5


def test_a_swap_that_is_taken_back_in_a_region_of_autocast(tmp_path):
    """Each weight is cast for the first time while it is another one, as by a forward in another thread."""
    folders = save_family(LINEAR, tmp_path, dict(r=4), dict(r=8))
    model, inputs = load(LINEAR, folders[0], is_trainable=True), LINEAR.inputs()

    def fail(journal) -> None:
        model(inputs)
        raise OSError

    region = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    with region():
        before = model(inputs)
    with region():
        planned = plan_hotswap(model, folders[1]).change()
        planned.last_steps.append(fail)
        with pytest.raises(OSError):  # noqa: PT011
            apply([planned])
        assert torch.equal(model(inputs), before)


def merge(model) -> None:
    model.merge_adapter()


def convert_where_it_is_prepared(model) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [train, merge, convert_where_it_is_prepared])
def test_a_kept_plan_notices_what_was_done_since(tmp_path, change):
    folders = save_family(LINEAR, tmp_path, dict(r=4), dict(r=4))
    model = load(LINEAR, folders[0], is_trainable=True)
    if change is convert_where_it_is_prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    plan = plan_hotswap(model, folders[1])
    change(model)
    refused("has changed since this swap was planned", commit, plan)
    if change is train:
        commit(plan_hotswap(model, folders[1]))
        assert_equals_fresh_load(model, LINEAR, folders[1], is_trainable=True)


def test_a_plan_that_was_refused_can_not_be_committed(tmp_path):
    """Layers that were not asked for are refused."""
    old, new = save_family(LINEAR, tmp_path, dict(r=4, target_modules=["first"]), dict(r=6))
    plan = plan_hotswap(load(LINEAR, old), new)
    assert not plan.ok
    refused(r"(?s)unexpected keys found: the old one lacks \d+ layers\.\n.*add_layers=True", commit, plan)


@pytest.mark.parametrize("order", [1, -1])
def test_one_commit_of_a_model_that_was_loaded_in_inference_mode_and_one_that_was_not(tmp_path, order):
    old, new = save_family(LINEAR, tmp_path, dict(r=4), dict(r=4))
    with torch.inference_mode():
        models = [load(LINEAR, old)]
    models += [load(LINEAR, old)]
    commit(*[plan_hotswap(each, new) for each in models[::order]])
    for each in models:
        assert_same_outputs(each, load(LINEAR, new), LINEAR)


def test_a_plan_keeps_the_base_weights_that_it_was_given(tmp_path):
    """The loaded adapter has overwritten biases of the base model, whose own ones only the caller has."""
    bert = ARCHITECTURES["bert"]
    configs = (LoraConfig(target_modules=["query"], bias="all"), LoraConfig(target_modules=["query"]))
    biased, plain = (save_random_adapter_of(each, tmp_path / f"{n}", n, bert) for n, each in enumerate(configs))
    model = load(bert, biased)
    commit(plan_hotswap(model, plain, base_weights=bert.base().state_dict()))
    assert_equals_fresh_load(model, bert, plain)


def test_what_is_no_plan_is_named():
    with pytest.raises(TypeError, match="got a str"):
        commit("an/adapter")
