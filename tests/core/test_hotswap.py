"""The public functions against the oracle: whatever was loaded, after the swap it is a fresh load of the new one."""

from __future__ import annotations

import inspect

import peft.utils.hotswap as peft_hotswap
import pytest
import torch
from models import KINDS, call, load, randomize, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_outputs, assert_untouched, snapshot
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

import hotswap_lab
from hotswap_lab import Adapter, HotswapError, hotswap_adapter, hotswap_adapter_from_state_dict, resolve_slot

#: what may differ between the adapter that goes and the one that comes
PAIRS = {
    "same shape": (dict(r=4, lora_alpha=8), dict(r=4, lora_alpha=8)),
    "other alpha": (dict(r=4, lora_alpha=8), dict(r=4, lora_alpha=32)),
    "growing": (dict(r=4, lora_alpha=8), dict(r=12, lora_alpha=8)),
    "shrinking": (dict(r=12, lora_alpha=8), dict(r=4, lora_alpha=8)),
    "to rsLoRA": (dict(r=4, lora_alpha=8), dict(r=8, lora_alpha=8, use_rslora=True)),
    "from rsLoRA": (dict(r=8, lora_alpha=8, use_rslora=True), dict(r=8, lora_alpha=8)),
    "other dropout": (dict(r=4, lora_dropout=0.1), dict(r=4, lora_dropout=0.5)),
    "to no dropout": (dict(r=4, lora_dropout=0.1), dict(r=4)),
    "to dropout": (dict(r=4), dict(r=4, lora_dropout=0.3)),
}


def pair(kind, tmp_path, old: dict, new: dict) -> tuple[str, str]:
    return (
        save_random_adapter(kind, tmp_path / "old", seed=1, **old),
        save_random_adapter(kind, tmp_path / "new", seed=2, **new),
    )


@pytest.mark.parametrize("difference", PAIRS)
def test_equals_fresh_load(kind, tmp_path, difference):
    old, new = pair(kind, tmp_path, *PAIRS[difference])
    model = load(kind, old)
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, kind, new)


@pytest.mark.parametrize("difference", PAIRS)
def test_from_state_dict_equals_fresh_load(kind, tmp_path, difference):
    old, new = pair(kind, tmp_path, *PAIRS[difference])
    model = load(kind, old)
    adapter = Adapter.load(new)
    hotswap_adapter_from_state_dict(model, adapter.tensors, "default", adapter.config)
    assert_equals_fresh_load(model, kind, new)


def test_there_and_back_again(kind, tmp_path):
    """A second swap finds everything as the first one left it."""
    old, new = pair(kind, tmp_path, dict(r=4, lora_alpha=8), dict(r=8, lora_alpha=4, use_rslora=True))
    model = load(kind, old)
    for folder in (new, old, new, new, old):
        hotswap_adapter(model, folder, "default")
        assert_equals_fresh_load(model, kind, folder)


PATTERNS = {
    "suffix": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5, "down_proj": 1}),
    "full name": dict(
        rank_pattern={"model.layers.1.mlp.up_proj": 7}, alpha_pattern={"model.layers.0.self_attn.v_proj": 3}
    ),
    "regular expression": dict(rank_pattern={r".*layers\.0\..*proj": 3}, alpha_pattern={r"[kv]_proj": 9}),
    "with rsLoRA": dict(rank_pattern={"o_proj": 9}, alpha_pattern={"o_proj": 2}, use_rslora=True),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rank_and_alpha_patterns(tmp_path, pattern):
    kind = KINDS["llama"]
    old, new = pair(kind, tmp_path, dict(r=4), dict(r=4, lora_alpha=6, **PATTERNS[pattern]))
    model = load(kind, old)
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, kind, new)
    hotswap_adapter(model, new, "default")  # into itself: nothing may change
    assert_equals_fresh_load(model, kind, new)
    hotswap_adapter(model, old, "default")
    assert_equals_fresh_load(model, kind, old)


TARGETS = {
    "attention only": dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "MLP only": dict(target_modules=["gate_proj", "up_proj", "down_proj"]),
    "one layer of each": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    "a pattern": dict(target_modules=r".*layers\.0\.mlp\.(up|down)_proj"),
    "excluding": dict(target_modules=["q_proj", "up_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"]),
    "all-linear": dict(target_modules="all-linear"),
    "the model's default": dict(target_modules=None),
    "one full name": dict(target_modules=["model.layers.1.self_attn.o_proj"]),
}


@pytest.mark.parametrize("target", TARGETS)
def test_fewer_layers_are_turned_off(tmp_path, target):
    kind = KINDS["llama"]
    old, new = pair(kind, tmp_path, dict(r=4), dict(r=6, **TARGETS[target]))
    model = load(kind, old)
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, kind, new)
    hotswap_adapter(model, old, "default")  # and come back to life
    assert_equals_fresh_load(model, kind, old)


def test_the_state_dict_decides_which_layers_are_targeted(tmp_path):
    """The config then names exactly these layers, so that what is saved reloads as what it is."""
    kind = KINDS["linear"]
    old, new = pair(kind, tmp_path, dict(r=4), dict(r=2, target_modules=["first"]))
    model = load(kind, old)
    tensors = Adapter.load(new).tensors
    hotswap_adapter_from_state_dict(model, tensors, "default", LoraConfig(r=2))
    assert model.peft_config["default"].target_modules == {"first"}
    assert_same_outputs(model, load(kind, new), kind)
    model.save_pretrained(tmp_path / "saved")
    assert_same_outputs(load(kind, str(tmp_path / "saved")), load(kind, new), kind)


@pytest.mark.parametrize("add_layers", [False, True])
@pytest.mark.parametrize("kind_name", ["linear", "conv", "embedding", "llama", "gpt2"])
def test_more_layers_are_refused_or_added(kind_name, tmp_path, add_layers):
    kind = KINDS[kind_name]
    old, new = pair(kind, tmp_path, dict(r=4, target_modules=[kind.modules[0]]), dict(r=8, lora_alpha=4))
    model = load(kind, old)
    before = snapshot(model)
    rng = torch.get_rng_state()
    if add_layers:
        hotswap_adapter(model, new, "default", add_layers=True)
        assert torch.equal(torch.get_rng_state(), rng)
        assert_equals_fresh_load(model, kind, new)
        assert set(model.base_model.targeted_module_names) == set(load(kind, new).base_model.targeted_module_names)
        hotswap_adapter(model, old, "default")
        assert_equals_fresh_load(model, kind, old)
    else:
        with pytest.raises(RuntimeError, match=r"did not succeed, unexpected keys found: base_model\.model\.") as error:
            hotswap_adapter(model, new, "default")
        assert "add_layers=True" in str(error.value)
        assert_untouched(model, before)


def test_layers_are_added_by_keys_with_the_adapters_name(tmp_path):
    kind = KINDS["linear"]
    old, new = pair(kind, tmp_path, dict(r=4, target_modules=["first"]), dict(r=6, lora_alpha=4))
    fresh = load(kind, new)
    named = {key: tensor for key, tensor in fresh.state_dict().items() if ".lora_" in key}
    twice = {**named, "last.lora_A.weight": named["base_model.model.last.lora_A.default.weight"] + 1}
    model = load(kind, old)
    before = snapshot(model)
    for tensors in (twice, dict(reversed(twice.items()))):
        with pytest.raises(HotswapError, match="two different values for one tensor"):
            hotswap_adapter_from_state_dict(model, tensors, "default", fresh.peft_config["default"], add_layers=True)
        assert_untouched(model, before)
    hotswap_adapter_from_state_dict(model, named, "default", fresh.peft_config["default"], add_layers=True)
    assert_equals_fresh_load(model, kind, new)


@pytest.mark.parametrize("form", [dict(), dict(lora_bias=True), dict(use_dora=True)], ids=["plain", "bias", "DoRA"])
def test_two_values_for_one_tensor_are_refused_whatever_else_changes(tmp_path, form):
    kind = KINDS["linear"]
    old, new = pair(kind, tmp_path, dict(r=4), dict(r=4, **form))
    model, adapter = load(kind, old), Adapter.load(new)
    twice = {**adapter.tensors, "last.lora_A.weight": adapter.tensors["base_model.model.last.lora_A.weight"] + 1}
    before = snapshot(model)
    for tensors in (twice, dict(reversed(twice.items()))):
        with pytest.raises(HotswapError, match="two different values"):
            hotswap_adapter_from_state_dict(model, tensors, "default", adapter.config)
        assert_untouched(model, before)


def test_added_layers_take_on_the_state_of_the_others(tmp_path):
    kind = KINDS["llama"]
    old, new = pair(kind, tmp_path, dict(r=4, target_modules=["q_proj"]), dict(r=8))
    other = save_random_adapter(kind, tmp_path / "other", seed=3, r=2, target_modules=["q_proj", "v_proj"])
    model = load(kind, old, is_trainable=True)
    model.load_adapter(other, "other")  # PEFT 0.20 freezes the first adapter here, PEFT 0.21 doesn't
    (trainable,) = {tensor.parameter.requires_grad for tensor in resolve_slot(model, "default").tensors}
    model.train()
    hotswap_adapter(model, new, "default", add_layers=True)
    status = {layer.name: layer for layer in model.get_layer_status()}
    assert {tuple(layer.active_adapters) for layer in status.values()} == {("default",)}
    assert {layer.requires_grad["default"] for layer in status.values()} == {trainable}
    assert all(module.training for name, module in model.named_modules() if "lora_A" in name)
    # v_proj was already wrapped, for the other adapter: it has both now
    assert {"default", "other"} <= set(status["model.model.layers.0.self_attn.v_proj"].available_adapters)
    model.eval()
    assert_equals_fresh_load(model, kind, new, is_trainable=True)
    model.set_adapter("other")
    assert_same_outputs(model, load(kind, other), kind)


NAMES = ["a", "lora", "1", "11", "default", "default_0", "lora_A", "weight", "q_proj"]


def test_only_the_named_adapter_is_touched(tmp_path):
    """Adapters whose names are parts of each other, or of PEFT's own keys, side by side."""
    kind = KINDS["llama"]
    folders = {
        name: save_random_adapter(kind, tmp_path / name, seed=number, r=2 + number) for number, name in enumerate(NAMES)
    }
    new = save_random_adapter(kind, tmp_path / "new", seed=99, r=5, lora_alpha=3)
    model = load(kind, folders[NAMES[0]], NAMES[0])
    for name in NAMES[1:]:
        model.load_adapter(folders[name], name)
    for name in NAMES:
        slots = {other: resolve_slot(model, other).tensors for other in NAMES if other != name}
        before = {key: [tensor.parameter.detach().clone() for tensor in slot] for key, slot in slots.items()}
        base = {key: value.clone() for key, value in model.state_dict().items() if "base_layer" in key}
        hotswap_adapter(model, new, name)
        for other, slot in slots.items():
            assert all(torch.equal(tensor.parameter, old) for tensor, old in zip(slot, before[other], strict=True))
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in base.items())
        model.set_adapter(name)
        assert_same_outputs(model, load(kind, new), kind)
        hotswap_adapter(model, folders[name], name)
        assert_same_outputs(model, load(kind, folders[name]), kind)


@pytest.mark.parametrize("state", ["active", "inactive", "one of several", "disabled"])
def test_state_of_the_replaced_adapter(tmp_path, state):
    kind = KINDS["llama"]
    old, new = pair(kind, tmp_path, dict(r=4), dict(r=6, lora_alpha=3))
    other = save_random_adapter(kind, tmp_path / "other", seed=3, r=3)
    model = load(kind, old)
    model.load_adapter(other, "other")
    fresh = load(kind, new)
    fresh.load_adapter(other, "other")
    for each in (model, fresh):
        if state == "inactive":
            each.set_adapter("other")
        elif state == "one of several":
            each.base_model.set_adapter(["default", "other"])
        elif state == "disabled":
            each.base_model.disable_adapter_layers()
    hotswap_adapter(model, new, "default")
    torch.testing.assert_close(call(model, kind.inputs()), call(fresh, kind.inputs()))
    flags = [parameter.requires_grad for parameter in fresh.parameters()]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for each in (model, fresh):
        if state == "disabled":
            each.base_model.enable_adapter_layers()
        each.set_adapter("default")
    assert_same_outputs(model, fresh, kind)


def test_compatibility_is_judged_against_the_named_adapter(tmp_path):
    """PEFT judges against the active one: here that is a LoHa adapter, and the swapped one is not active."""
    from peft import LoHaConfig, PeftMixedModel

    kind = KINDS["linear"]
    _, new = pair(kind, tmp_path, dict(r=4), dict(r=6))
    model = PeftMixedModel(kind.base(), LoraConfig(target_modules=list(kind.modules), r=4), "lora")
    model.add_adapter("loha", LoHaConfig(target_modules=["first"], r=2))
    model.set_adapter("loha")
    hotswap_adapter(model, new, "lora")
    model.set_adapter("lora")
    assert_same_outputs(model, load(kind, new), kind)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LOHA and LORA"):
        hotswap_adapter(model, new, "loha")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("add_layers", [False, True])
def test_the_models_dtype_stays(tmp_path, dtype, autocast, add_layers):
    kind = KINDS["linear"]
    targets = ["first"] if add_layers else list(kind.modules)
    old, new = pair(kind, tmp_path, dict(r=4, target_modules=targets), dict(r=6))
    model = PeftModel.from_pretrained(kind.base().to(dtype), old, autocast_adapter_dtype=autocast)
    fresh = PeftModel.from_pretrained(kind.base().to(dtype), new, autocast_adapter_dtype=autocast)
    hotswap_adapter(model, new, "default", add_layers=add_layers)
    expected = fresh.state_dict()
    assert {key: value.dtype for key, value in model.state_dict().items()} == {
        key: value.dtype for key, value in expected.items()
    }
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("new_rank", [4, 6, 2])
def test_parameters_stay_the_same_objects(tmp_path, new_rank):
    """Optimizers and hooks hold on to parameters; equal ranks even keep the addresses."""
    kind = KINDS["llama"]
    old, new = pair(kind, tmp_path, dict(r=4), dict(r=new_rank))
    model = load(kind, old, is_trainable=True)
    slot = resolve_slot(model, "default")
    parameters, addresses = [tensor.parameter for tensor in slot.tensors], slot.data_ptrs()
    hotswap_adapter(model, new, "default")
    now = [tensor.parameter for tensor in resolve_slot(model, "default").tensors]
    assert all(before is after for before, after in zip(parameters, now, strict=True))
    assert all(type(parameter) is torch.nn.Parameter and parameter.requires_grad for parameter in now)
    assert (slot.data_ptrs() == addresses) == (new_rank == 4)
    assert_equals_fresh_load(model, kind, new, is_trainable=True)


def test_training_goes_on_after_a_swap(tmp_path):
    """Old gradients are gone, autograd notices the write, and new gradients are those of a fresh load."""
    kind = KINDS["linear"]
    old, new = pair(kind, tmp_path, dict(r=4), dict(r=6))
    model, fresh = load(kind, old, is_trainable=True), load(kind, new, is_trainable=True)
    loss = model(kind.inputs()).square().sum()
    loss.backward()
    pending = model(kind.inputs()).square().sum()
    hotswap_adapter(model, new, "default")
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|but got|shape"):
        pending.backward()
    for each in (model, fresh):
        each.zero_grad()
        each(kind.inputs()).square().sum().backward()
    expected = dict(fresh.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad)


def test_the_state_dict_is_only_read(tmp_path):
    """PEFT's own hotswap takes over the caller's tensors when the rank grows."""
    kind = KINDS["linear"]
    old, new = pair(kind, tmp_path, dict(r=4), dict(r=8))
    model = load(kind, old)
    adapter = Adapter.load(new)
    copies = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
    hotswap_adapter_from_state_dict(model, adapter.tensors, "default", adapter.config)
    for parameter in model.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(tensor, copies[key]) for key, tensor in adapter.tensors.items())
    config = adapter.config.to_dict()
    model.peft_config["default"].r = 77
    assert adapter.config.to_dict() == config


KEY_FORMS = {
    "as in a file": lambda key: key,
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "without PEFT's prefix": lambda key: key.removeprefix("base_model.model."),
    "from a compiled model": lambda key: f"_orig_mod.{key}",
}


@pytest.mark.parametrize("form", KEY_FORMS)
def test_key_forms(tmp_path, form):
    kind = KINDS["llama"]
    old, new = pair(kind, tmp_path, dict(r=4), dict(r=6))
    model = load(kind, old)
    adapter = Adapter.load(new)
    tensors = {KEY_FORMS[form](key): tensor for key, tensor in adapter.tensors.items()}
    hotswap_adapter_from_state_dict(model, tensors, "default", adapter.config)
    assert_equals_fresh_load(model, kind, new)


def test_what_peft_makes_of_the_keys_is_accepted(tmp_path):
    """The way PEFT's documentation goes: load, insert the adapter's name, swap."""
    from peft.utils.save_and_load import _insert_adapter_name_into_state_dict, load_peft_weights

    kind = KINDS["embedding"]
    old, new = pair(kind, tmp_path, dict(r=4), dict(r=6))
    model = load(kind, old)
    named = _insert_adapter_name_into_state_dict(load_peft_weights(new, device="cpu"), "default", "lora_")
    hotswap_adapter_from_state_dict(model, named, "default", LoraConfig.from_pretrained(new), "lora_")
    assert_equals_fresh_load(model, kind, new)


@pytest.mark.parametrize("wrapping", ["tuner", "injected", "inside another module", "compiled"])
def test_models_that_carry_adapters(tmp_path, wrapping):
    kind = KINDS["linear"]
    old, new = pair(kind, tmp_path, dict(r=4, lora_alpha=8), dict(r=6, lora_alpha=3))
    fresh = load(kind, new)
    if wrapping == "injected":
        adapter = Adapter.load(old)
        model = inject_adapter_in_model(adapter.config, kind.base())
        randomize(model, "default", seed=1)
    else:
        peft_model = load(kind, old)
        model = {
            "tuner": lambda: peft_model.base_model,
            "inside another module": lambda: torch.nn.Sequential(torch.nn.Identity(), peft_model),
            "compiled": lambda: torch.compile(peft_model, backend="eager"),
        }[wrapping]()
    hotswap_adapter(model, new, "default")
    assert_same_outputs(model, fresh, kind)


def test_scale_set_before_a_swap_is_gone_after_it(tmp_path):
    """The one documented way: a swap ends in the state of a fresh load, scale included."""
    kind = KINDS["linear"]
    old, new = pair(kind, tmp_path, dict(r=4, lora_alpha=8), dict(r=6, lora_alpha=3))
    model = load(kind, old)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, kind, new)


@pytest.mark.parametrize("operation", ["set_scale", "scale_layer", "unscale_layer", "merge", "merge and unmerge"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_operations_after_a_swap(tmp_path, operation, rslora):
    kind = KINDS["llama"]
    old, new = pair(
        kind,
        tmp_path,
        dict(r=4, lora_alpha=8),
        dict(r=6, lora_alpha=3, use_rslora=rslora, target_modules=["q_proj", "up_proj"], alpha_pattern={"up_proj": 9}),
    )
    model, fresh = load(kind, old), load(kind, new)
    hotswap_adapter(model, new, "default")
    for each in (model, fresh):
        for module in each.modules():
            if operation == "set_scale" and hasattr(module, "set_scale"):
                module.set_scale("default", 0.5)
            elif operation == "scale_layer" and hasattr(module, "scale_layer"):
                module.scale_layer(0.25)
            elif operation == "unscale_layer" and hasattr(module, "unscale_layer"):
                module.scale_layer(7.0)
                module.unscale_layer()
        if operation.startswith("merge"):
            each.merge_adapter()
        if operation == "merge and unmerge":
            each.unmerge_adapter()
    assert_same_outputs(model, fresh, kind)
    if operation == "merge":
        with pytest.raises(ValueError, match="currently merged into the base weights"):
            hotswap_adapter(model, old, "default")
        for each in (model, fresh):
            each.unmerge_adapter()
    hotswap_adapter(model, old, "default")
    assert_same_outputs(model, load(kind, old), kind)


# PEFT does not merge grouped convolutions, so that kind is not among these
@pytest.mark.parametrize(
    "kind", [KINDS[name] for name in KINDS if name != "conv"], ids=[name for name in KINDS if name != "conv"]
)
def test_merge_and_unload_after_a_swap(kind, tmp_path):
    old, new = pair(kind, tmp_path, dict(r=4), dict(r=6))
    model = load(kind, old)
    hotswap_adapter(model, new, "default")
    merged, expected = model.merge_and_unload(), load(kind, new).merge_and_unload()
    torch.testing.assert_close(call(merged, kind.inputs()), call(expected, kind.inputs()))


def test_merging_after_a_swap_that_gives_grouped_convolutions_up(tmp_path):
    """PEFT would refuse to merge these although nothing is in them, and after it has merged others."""
    kind = KINDS["conv"]
    full = save_random_adapter(kind, tmp_path / "full", 1, r=4)
    few = save_random_adapter(kind, tmp_path / "few", 2, r=4, target_modules=["conv1d", "conv2d"])
    model, fresh = load(kind, full), load(kind, few)
    hotswap_adapter(model, few, "default")
    assert_equals_fresh_load(model, kind, few, margin=10)
    for each in (model, fresh):
        each.merge_adapter()
    torch.testing.assert_close(call(model, kind.inputs()), call(fresh, kind.inputs()))
    model.unmerge_adapter()
    hotswap_adapter(model, full, "default")
    assert_equals_fresh_load(model, kind, full)


@pytest.mark.parametrize("form", [dict(lora_bias=True), dict()], ids=["lora_bias", "plain"])
def test_merging_where_a_layer_that_is_off_has_no_place_for_a_bias(tmp_path, form):
    """PEFT refuses to merge an adapter with lora_bias into a layer without bias, and would in the midst of it."""
    kind = KINDS["linear"]
    full = save_random_adapter(kind, tmp_path / "full", 1, r=4, lora_bias=True)
    few = save_random_adapter(kind, tmp_path / "few", 2, r=4, target_modules=["first", "last"], **form)
    model = load(kind, full)
    hotswap_adapter(model, few, "default")
    model.merge_adapter()
    torch.testing.assert_close(call(model, kind.inputs()), call(load(kind, few), kind.inputs()))
    model.unmerge_adapter()
    hotswap_adapter(model, full, "default")
    assert_equals_fresh_load(model, kind, full)


def test_a_layer_that_was_off_comes_back_in_another_form(tmp_path):
    """PEFT's ``lora_bias`` table says then that it has a bias no more."""
    kind = KINDS["linear"]
    full = save_random_adapter(kind, tmp_path / "full", 1, r=4, lora_bias=True)
    few = save_random_adapter(kind, tmp_path / "few", 2, r=4, lora_bias=True, target_modules=["first"])
    plain = save_random_adapter(kind, tmp_path / "plain", 3, r=4)
    model = load(kind, full)
    for folder in (few, plain, few, full):
        hotswap_adapter(model, folder, "default", add_layers=True)
        assert_equals_fresh_load(model, kind, folder)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_adapters_are_added_up_after_a_swap(tmp_path, combination):
    """PEFT does that on layers that are off, too, and by the rank of the config."""
    kind = KINDS["linear"]
    full = save_random_adapter(kind, tmp_path / "full", 1, r=8)
    few = save_random_adapter(kind, tmp_path / "few", 2, r=4, target_modules=["first"])
    other = save_random_adapter(kind, tmp_path / "other", 3, r=4)
    model, fresh = load(kind, full), load(kind, few)
    hotswap_adapter(model, few, "default")
    for each in (model, fresh):
        each.load_adapter(other, "other")
        each.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type=combination)
        each.set_adapter("both")
    torch.testing.assert_close(call(model.eval(), kind.inputs()), call(fresh.eval(), kind.inputs()))
    model.set_adapter("default")
    hotswap_adapter(model, full, "default")
    assert_equals_fresh_load(model, kind, full)


def test_models_loaded_in_inference_mode(tmp_path):
    kind = KINDS["linear"]
    for rank in (4, 6):
        old, new = pair(kind, tmp_path, dict(r=4), dict(r=rank))
        with torch.inference_mode():
            model = load(kind, old)
        hotswap_adapter(model, new, "default")
        with torch.inference_mode():
            assert_same_outputs(model, load(kind, new), kind)


@pytest.mark.parametrize("rank", [4, 6])
def test_a_swap_inside_inference_mode_leaves_the_model_trainable(tmp_path, rank):
    kind = KINDS["linear"]
    old, new = pair(kind, tmp_path, dict(r=4, target_modules=["first"]), dict(r=rank))
    model = load(kind, old, is_trainable=True)
    with torch.inference_mode():
        hotswap_adapter(model, new, "default", add_layers=True)
    assert_equals_fresh_load(model, kind, new, is_trainable=True)
    model(kind.inputs()).square().sum().backward()
    assert all(tensor.parameter.grad is not None for tensor in resolve_slot(model, "default").tensors)


@pytest.mark.parametrize("name", ["hotswap_adapter", "hotswap_adapter_from_state_dict"])
def test_drop_in_for_peft(name):
    """PEFT's parameters, in PEFT's order, with PEFT's defaults: changing the import is all a user does."""
    theirs = inspect.signature(getattr(peft_hotswap, name)).parameters.values()
    ours = list(inspect.signature(getattr(hotswap_lab, name)).parameters.values())
    for position, parameter in enumerate(theirs):
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        assert (ours[position].name, ours[position].default) == (parameter.name, parameter.default)
        assert ours[position].kind == parameter.kind


def test_the_engine_never_calls_pefts_hotswap():
    import pathlib

    package = pathlib.Path(hotswap_lab.__file__).parent
    comparisons = {"bench"}  # measure PEFT's beside ours
    users = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        if "peft.utils.hotswap import" in path.read_text() or "import peft.utils.hotswap" in path.read_text()
    }
    assert users <= comparisons


def test_refusal_says_found_expected_next():
    kind = KINDS["linear"]
    model = get_peft_model(kind.base(), LoraConfig(target_modules=["first"]))
    with pytest.raises(HotswapError) as error:
        hotswap_adapter(model, "no/such/folder/at/all", "default")
    for word in ("Can't find 'adapter_config.json'", "found:", "expected:", "next:"):
        assert word in str(error.value)
