"""Swaps that copy from a fresh load: nothing is half done, left behind, or copied needlessly."""

from __future__ import annotations

import gc

import pytest
import torch
from adapters import METHODS, save_all, save_random_adapter_of
from lora_kinds import ATTENTION, LLAMA
from models import call, load
from oracle import assert_close, assert_equals_fresh_load, assert_same_outputs
from peft import LoHaConfig, LoraConfig, PeftModel, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from refusals import refused
from safetensors.torch import load_file

from hotswap_lab import (
    Adapter,
    AdapterPool,
    RecompileWatch,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
)

HEAD = LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"])


def test_nothing_is_copied_and_nothing_stays(method_folders):
    """The base's parameters are the same objects in the same memory; what PEFT loaded beside them is gone."""
    old, new, *_ = method_folders("VBLoRA")
    base = METHODS["VBLoRA"][0].base()
    own = {name: (id(each), each.data_ptr()) for name, each in base.named_parameters()}
    model = PeftModel.from_pretrained(base, old).eval()
    flags = {name: each.requires_grad for name, each in model.named_parameters()}

    def models() -> int:
        gc.collect()
        return sum(type(each) is type(base) for each in gc.get_objects())

    before = models()
    hotswap_adapter(model, new, "default", add_layers=True)
    assert models() == before
    after = {name.replace("base_layer.", ""): each for name, each in model.get_base_model().named_parameters()}
    assert {name: (id(after[name]), after[name].data_ptr()) for name in own} == own
    assert flags == {name: each.requires_grad for name, each in model.named_parameters()}


@pytest.mark.long
@pytest.mark.parametrize("name", ["LoHa", "OFT", "IA3", "VeRA", "LNTuning", "HRA", "SEQ_CLS"])
def test_in_a_compiled_model_values_change_and_nothing_else(method_folders, tmp_path, name):
    """The same config: no recompile. Another one: refused, untouched, because the graph would have to change."""
    (kind, configs), (first, *_, other) = METHODS[name], method_folders(name)
    same = save_random_adapter_of(configs[0], tmp_path / "same", 9, kind)
    torch._dynamo.reset()
    model = torch.compile(load(kind, first), backend="eager")
    call(model, kind.inputs())
    with RecompileWatch(allow=0):
        for folder in (same, first, same):
            hotswap_adapter(model, folder, "default")
            assert_same_outputs(model, load(kind, folder), kind, margin=10)
    refused("can't be done in a compiled model", hotswap_adapter, model, other, "default", add_layers=True)


def test_a_plan_says_the_ranks_of_other_methods(method_folders):
    old, new, _ = method_folders("LoHa")
    (action, _, rank, scaling), *_ = plan_hotswap(load(LLAMA, old), new).rows
    assert (action, rank, scaling) == ("resize", "4 -> 2", "4.5")


def test_injected_adapters(method_folders):
    """Without a PeftModel: in the model itself, as transformers' and diffusers' own loading leaves it."""
    first, second, few = method_folders("LoHa")

    def inject(folder: str):
        model = LLAMA.base()
        inject_adapter_in_model(LoHaConfig.from_pretrained(folder), model, "default")
        tensors = load_file(f"{folder}/adapter_model.safetensors")
        tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
        set_peft_model_state_dict(model, tensors, "default")
        return model.eval()

    model = inject(few)
    hotswap_adapter(model, first, "default", add_layers=True)
    hotswap_adapter(model, second, "default")
    assert_same_outputs(model, load(LLAMA, second), LLAMA)
    assert_same_outputs(model, inject(second), LLAMA)
    assert model.peft_config["default"].r == 6


def test_names_of_a_state_dict(method_folders):
    """They end with the adapter's name. A tensor may come under both of its names, with one value."""
    first, second, _ = method_folders("LoHa")
    named = {key: each for key, each in load(LLAMA, first).state_dict().items() if ".hada_" in key}
    for tensors in (named, named | Adapter.load(first).tensors):
        hotswap_adapter_from_state_dict(model := load(LLAMA, second), tensors, "default", Adapter.load(first).config)
        assert_equals_fresh_load(model, LLAMA, first, margin=10)
    tensors, match = named | Adapter.load(second).tensors, "two different values"
    refused(match, hotswap_adapter_from_state_dict, model, tensors, "default", Adapter.load(first).config)


def test_tensors_that_the_user_replaces(tmp_path):
    """They are no longer where a swap has found them."""
    first, second, third = save_all(tmp_path, *[LoHaConfig(r=4, target_modules=ATTENTION)] * 3)
    hotswap_adapter(model := load(LLAMA, first), second)
    for table in (each for each in model.modules() if isinstance(each, torch.nn.ParameterDict)):
        table.update({key: torch.nn.Parameter(each.detach().clone(), False) for key, each in table.items()})
    hotswap_adapter(model, third)
    assert_equals_fresh_load(model, LLAMA, third, margin=10)


def test_layers_that_the_config_does_not_name(method_folders):
    """PEFT then takes those that it knows for the model, and leaves the tensors of all others where they are."""
    first, second, _ = method_folders("LoHa")
    (adapter := Adapter.load(second)).config.target_modules = None
    refused("tensors that a fresh load would ignore", hotswap_adapter, load(LLAMA, first), adapter)


@pytest.mark.parametrize("more", [dict(modules_to_save=["embed_tokens"]), dict(trainable_token_indices=[1, 2])])
def test_inactive_adapters_stay_inactive(tmp_path, more):
    """The wrappers of modules and of tokens have their own ideas of what is active."""
    few = LoraConfig(r=6, target_modules=["q_proj"], use_dora=True, **more)
    old, new, active = save_all(tmp_path, HEAD, few, LoraConfig(r=4, target_modules=["v_proj"]))
    model = load(LLAMA, active, "active")
    model.load_adapter(old, "default")
    hotswap_adapter(model, new, "default", add_layers=True)
    assert model.active_adapters == ["active"]
    assert_same_outputs(model, load(LLAMA, active), LLAMA)
    model.set_adapter("default")
    assert_equals_fresh_load(model, LLAMA, new, margin=10, activated=True)
    with model.disable_adapter():
        assert_close(call(model, LLAMA.inputs()), call(LLAMA.base(), LLAMA.inputs()))


@pytest.mark.parametrize("way", ["plain", "prepared", "pool", "with a head"])
def test_what_dora_has_cached_is_forgotten(tmp_path, monkeypatch, way):
    """PEFT can keep a weight's norm between forwards; after a swap it is another one's."""
    monkeypatch.setattr("peft.tuners.lora.dora.ENABLE_DORA_CACHING", True)
    head = dict(modules_to_save=["lm_head"]) if way == "with a head" else {}
    config = LoraConfig(r=4, target_modules=ATTENTION, use_dora=True, **head)
    folders = dict(zip("ab", save_all(tmp_path, config, config), strict=True))
    model = load(LLAMA, folders["a"])
    if way == "prepared":
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    pool = AdapterPool(model, adapters=folders, progress=False) if way == "pool" else None
    for name in "bab":
        call(model, LLAMA.inputs())
        pool.swap(name) if pool else hotswap_adapter(model, folders[name], "default")
        assert_same_outputs(model, load(LLAMA, folders[name]), LLAMA)
