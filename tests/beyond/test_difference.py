"""What a swap by comparison keeps: state that belongs to no adapter, and parameters as objects."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools

import pytest
import torch
from adapters import CONFIGS, LLAMA, save_all, save_random_adapter_of
from lengths import few_of, long
from lora_kinds import ATTENTION
from models import KINDS, Kind, call, load, save_family
from oracle import assert_equals_fresh_load, assert_same_outputs
from partial import some_of
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from refusals import refused

from hotswap_lab import Adapter, commit, hotswap_adapter, plan_hotswap
from hotswap_lab.core.wrappers import NOT_COMPARED

#: of these, an adapter on few layers, and one that needs more of them, or a module of its own
GROWING = {"LoHa": (2, 0), "modules_to_save": (2, 0), "trainable tokens": (3, 0)}


@pytest.fixture(params=GROWING)
def growing(request, method_folders):
    return [method_folders(request.param)[number] for number in GROWING[request.param]]


def test_what_is_added_while_adapters_are_disabled_is_disabled(growing):
    few, more = growing
    model = load(LLAMA, few)
    model.base_model.disable_adapter_layers()
    hotswap_adapter(model, more, "default", add_layers=True)
    assert torch.equal(call(model, LLAMA.inputs()), call(LLAMA.base(), LLAMA.inputs()))
    model.base_model.enable_adapter_layers()
    assert_same_outputs(model, load(LLAMA, more), LLAMA)


def test_what_is_added_to_an_inactive_adapter_is_frozen(growing):
    few, more = growing
    model = load(LLAMA, few, is_trainable=True)
    model.load_adapter(few, "other")
    model.set_adapter("other")
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    hotswap_adapter(model, more, "default", add_layers=True)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before


LINEAR = KINDS["linear"]
HAD = ("first", "blocks.0")
METHODS_WITH_LAYERS = {
    "LoRA": lambda targets: LoraConfig(r=3, target_modules=targets),
    "DoRA": lambda targets: LoraConfig(r=3, target_modules=targets, use_dora=True),
    # such a swap takes the adapter out of layers, and does not just turn it off there
    "LoRA, and DoRA on one layer": lambda targets: LoraConfig(r=3, target_modules=targets, use_dora=len(targets) == 1),
    "LoHa": lambda targets: LoHaConfig(r=3, target_modules=targets),
    "IA3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[]),
}


@pytest.mark.parametrize("method", few_of(METHODS_WITH_LAYERS, ("LoRA", "LoHa")))
def test_layers_that_had_the_adapter_get_it_again(tmp_path, method):
    """All of an adapter's layers must have had it, or ``add_layers`` is needed."""
    make, numbers = METHODS_WITH_LAYERS[method], itertools.count()

    def save(targets):
        return save_random_adapter_of(make([*targets]), tmp_path / str(n := next(numbers)), n, LINEAR)

    model, one = load(LINEAR, save(HAD)), save(HAD[:1])
    for targets in some_of(LINEAR.modules) + some_of(HAD):
        hotswap_adapter(model, one, "default")
        if {*targets} <= {*HAD}:
            hotswap_adapter(model, folder := save(targets), "default")
            assert_same_outputs(model, load(LINEAR, folder), LINEAR)
        else:
            refused("add_layers=True", hotswap_adapter, model, save(targets), "default")


#: by what must stay the same objects: the config of the loaded adapter, and of one that differs in the shapes alone
RESHAPED = {
    "DoRA with a head": [
        LoraConfig(r=rank, target_modules=ATTENTION, use_dora=True, modules_to_save=["lm_head"]) for rank in (4, 6)
    ],
    "OFT": [OFTConfig(oft_block_size=size, target_modules=ATTENTION) for size in (4, 8)],
}


@pytest.mark.parametrize("name", RESHAPED)
def test_parameters_of_other_shapes_are_the_same_objects(tmp_path, name):
    """So an optimizer that was made before the swap trains the new adapter."""
    old, new = save_all(tmp_path, *RESHAPED[name])
    model = load(LLAMA, old, is_trainable=True)
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD([each for each in before.values() if each.requires_grad], lr=0.1)
    hotswap_adapter(model, new, "default")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert [key for key in before if after[key] is not before[key]] == []
    assert_equals_fresh_load(model, LLAMA, new, is_trainable=True)
    values = {key: each.detach().clone() for key, each in after.items() if each.requires_grad}
    model(**LLAMA.inputs()).logits.square().mean().backward()
    optimizer.step()
    assert [key for key, value in values.items() if torch.equal(value, after[key])] == []


class Head(torch.nn.Linear):
    """A head with a module that is optional."""

    def __init__(self):
        super().__init__(16, 6)
        self.register_module("activation", None)


def test_a_saved_module_without_one_of_its_parts(tmp_path):
    kind = Kind(lambda: torch.nn.Sequential(torch.nn.Linear(12, 16), Head()), LINEAR.make_inputs, ("0",))
    folders = save_family(kind, tmp_path, *[dict(r=4, modules_to_save=["1"])] * 2)
    hotswap_adapter(model := load(kind, folders[0]), folders[1])
    assert_equals_fresh_load(model, kind, folders[1], margin=10)


# ---- what belongs to no adapter stays as it was


def _a_forward_fails(model, **inputs) -> None:
    """It fails after the last block, so the state of a forward is still there."""
    handle = model.get_base_model().model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError, ValueError):
        model(**inputs)
    handle.remove()


def _another_is_active(model) -> None:
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")


def _disabled_in_a_block(model) -> None:
    model.block = model.disable_adapter()  # kept, because the block ends with it
    model.block.__enter__()


HEAD = LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"])
# older versions of PEFT have no Shadow
LOHA, PROMPT, SHADOW = (CONFIGS.get(name, [None])[0] for name in ("LoHa", "PromptTuning", "Shadow"))
#: by attribute: the config of two adapters, and what happens between the load of one and the swap to the other
LEFT = {
    "training": (HEAD, lambda model: model.train()),
    "active_adapter": (HEAD, _another_is_active),
    "_active_adapter": (HEAD, _another_is_active),
    "_adapters_disabled": (HEAD, _disabled_in_a_block),
    "_disable_adapters": (HEAD, lambda model: model.base_model.disable_adapter_layers()),
    "peft_config": (LOHA, lambda model: None),
    "_peft_config": (PROMPT, lambda model: None),
    "_deferred_shadow_seed": (SHADOW, _a_forward_fails),
    "_seed_shadow_state": (SHADOW, lambda model: call(model, LLAMA.inputs())),
    "_shadow_past_out": (SHADOW, lambda model: _a_forward_fails(model, **LLAMA.inputs(), use_cache=True)),
    "_should_pack_shadow_cache": (SHADOW, lambda model: _a_forward_fails(model, **LLAMA.inputs(), use_cache=True)),
}


def test_each_attribute_that_is_not_compared_is_here():
    assert {*LEFT, "kwargs"} == (NOT_COMPARED - vars(torch.nn.Module()).keys()) | {"training"}


@pytest.mark.parametrize("attribute", LEFT)
def test_state_of_no_adapter_stays_and_is_no_difference(tmp_path, attribute):
    config, happen = LEFT[attribute]
    if config is None:
        pytest.skip("this version of PEFT has no such method")
    old, new = save_all(tmp_path, config, dataclasses.replace(config, revision="later"))
    model = load(LLAMA, old)
    happen(model)
    before = [(each, vars(each)[attribute]) for each in model.modules() if attribute in vars(each)]
    assert any(value is not None and value is not False for _, value in before)
    plan = plan_hotswap(model, new)
    assert plan.graft.writes_values_only
    commit(plan)
    assert all(vars(each)[attribute] is value for each, value in before)


class Remembering(torch.nn.Module):
    """It computes twice with one layer, and keeps what it has seen."""

    def __init__(self):
        super().__init__()
        self.first = self.second = torch.nn.Linear(12, 12)
        self.by_name = self.in_order = None

    def forward(self, x):
        self.by_name, self.in_order = {"x": x}, [x]
        return self.second(torch.tanh(self.first(x)))


def test_a_saved_module_that_has_changed(tmp_path):
    """The state that it has seen is gone, and what it shares is shared again."""
    kind = Kind(lambda: torch.nn.Sequential(Remembering(), torch.nn.Linear(12, 6)), lambda: torch.randn(5, 12), ())
    old, new = save_all(tmp_path, *[LoraConfig(target_modules=["1"], modules_to_save=["0"])] * 2, kind=kind)
    call(model := load(kind, old), kind.inputs())
    saved = model.get_base_model()[0].modules_to_save["default"]
    saved.second = copy.deepcopy(saved.first)
    hotswap_adapter(model, new)
    assert saved.by_name is saved.in_order is None
    assert_same_outputs(model, load(kind, new), kind)


class Instead(torch.nn.Module):
    """None of PEFT's layers."""

    def __init__(self, target, *_, **__):
        super().__init__()
        self.weight, self.bias = target.weight, target.bias


class Adding(LoraLinear):
    def __init__(self, target, *arguments, **named):
        target.more = torch.nn.Linear(2, 2)
        super().__init__(target, *arguments, **named)


@pytest.mark.parametrize("cls", [Instead, Adding])
def test_layers_of_the_users_own_that_change_the_base_model(tmp_path, cls):
    first, new = save_all(tmp_path, *[LoraConfig(target_modules=["first"], modules_to_save=["last"])] * 2, kind=LINEAR)
    adapter = Adapter.load(new)
    adapter.config.target_modules = {"first", "blocks.0"}
    adapter.config._register_custom_module({torch.nn.Linear: cls})
    refused("other modules of the base model there", hotswap_adapter, load(LINEAR, first), adapter, add_layers=True)


def test_arguments_of_layers_stay_where_one_has_the_name_of_the_adapter(tmp_path):
    old, new = save_all(tmp_path, *CONFIGS["VeRA"][::2])
    model = load(LLAMA, old, "bias")
    model.load_adapter(old, "other")
    layers = [each for each in model.modules() if "bias" in getattr(each, "kwargs", ())]
    assert layers
    hotswap_adapter(model, new, "bias")
    assert all(each.kwargs["bias"] is False for each in layers)
    assert_same_outputs(model, load(LLAMA, new), LLAMA)


@pytest.mark.skipif("Adamss" not in CONFIGS, reason="this version of PEFT has no AdaMSS")
@pytest.mark.parametrize("dtype", [long(torch.float64), torch.bfloat16])
def test_a_layer_that_notes_its_dtype_has_that_of_the_model(method_folders, dtype):
    """AdaMSS casts to it."""
    old, new = method_folders("Adamss")[:2]
    model = load(LLAMA, old).to(dtype)
    hotswap_adapter(model, new, "default")
    fresh = PeftModel.from_pretrained(LLAMA.base().to(dtype), new).eval()
    layers = [[each for each in one.modules() if hasattr(each, "adamss_A")] for one in (model, fresh)]
    assert [each.dtype for each in layers[0]] == [each.dtype for each in layers[1]]
    torch.testing.assert_close(call(model, LLAMA.inputs()), call(fresh, LLAMA.inputs()))
