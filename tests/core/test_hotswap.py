"""The public functions against the oracle: whatever was loaded, after the swap it is a fresh load of the new one.

A test is a way to get there and one comparison. The tables say what is loaded, in which state the model is, what comes
in and how, and what is done afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import peft.utils.hotswap as peft_hotswap
import pytest
import torch
from lengths import few_of
from models import KINDS, Kind, call, load, randomize, save_random_adapter
from oracle import (
    assert_equals,
    assert_equals_fresh_load,
    assert_same,
    assert_same_outputs,
    nothing_else_changes,
    observe,
    untouched,
)
from peft import LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.save_and_load import _insert_adapter_name_into_state_dict, load_peft_weights

import hotswap_lab
from hotswap_lab import Adapter, HotswapError, hotswap_adapter, hotswap_adapter_from_state_dict, resolve_slot

LINEAR, LLAMA = KINDS["linear"], KINDS["llama"]


def save(kind: Kind, tmp_path: Path, *family: dict) -> list[str]:
    return [
        save_random_adapter(kind, tmp_path / f"{kind.modules[0]} {seed}", seed, **lora)
        for seed, lora in enumerate(family, 1)
    ]


def from_state_dict(model, folder: str) -> None:
    adapter = Adapter.load(folder)
    with nothing_else_changes(adapter.tensors, adapter.config):
        hotswap_adapter_from_state_dict(model, adapter.tensors, "default", adapter.config)


def from_folder(model, folder: str) -> None:
    with nothing_else_changes(Path(folder)):
        hotswap_adapter(model, folder, "default")


def every_pair(count: int) -> Iterator[int]:
    """Numbers below ``count`` in an order in which each comes right after each other one."""
    for first in range(count):
        yield first
        for other in range(first + 1, count):
            yield from (other, first)


# ---- from any adapter to any other

#: ranks, scalings, dropouts and layers that differ; the first two differ in values and alpha alone
FAMILY = (
    dict(r=4, lora_alpha=8, lora_dropout=0.1),
    dict(r=4, lora_alpha=32, lora_dropout=0.1),
    dict(r=12, lora_alpha=8, use_rslora=True, lora_dropout=0.5),
)


def test_every_kind_of_layer(kind, tmp_path):
    """With layers that come and go; into itself, nothing changes."""
    one = dict(r=8, lora_alpha=6, target_modules=[kind.modules[0]])
    folders = save(kind, tmp_path, *FAMILY, *([one] if len(kind.modules) > 1 else []))
    model = load(kind, folders[0])
    for step, number in enumerate((0, *every_pair(len(folders)), 0)):
        (from_folder, from_state_dict)[step % 2](model, folders[number])
        assert_equals_fresh_load(model, kind, folders[number], margin=10)


#: configs of all forms, on a model with names of three levels
CONFIGS = {
    "suffixes": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5, "down_proj": 1}),
    "full names": dict(
        rank_pattern={"model.layers.1.mlp.up_proj": 7}, alpha_pattern={"model.layers.0.self_attn.v_proj": 3}
    ),
    "regular expressions": dict(rank_pattern={r".*layers\.0\..*proj": 3}, alpha_pattern={r"[kv]_proj": 9}),
    "patterns and rsLoRA": dict(rank_pattern={"o_proj": 9}, alpha_pattern={"o_proj": 2}, use_rslora=True),
    "attention only": dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "one layer of each": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    "a pattern": dict(target_modules=r".*layers\.0\.mlp\.(up|down)_proj"),
    "excluding": dict(target_modules=["q_proj", "up_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"]),
    "all-linear": dict(target_modules="all-linear"),
    "the model's default": dict(target_modules=None),
    "one full name": dict(target_modules=["model.layers.1.self_attn.o_proj"]),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_of_all_forms(tmp_path, config):
    old, new = save(LLAMA, tmp_path, dict(r=4), dict(r=6, lora_alpha=5, **CONFIGS[config]))
    model = load(LLAMA, old)
    for folder in (new, old):
        hotswap_adapter(model, folder, "default")
        assert_equals_fresh_load(model, LLAMA, folder)


def test_the_state_dict_decides_which_layers_are_targeted(tmp_path):
    """The config then names exactly these layers, so that what is saved reloads as what it is."""
    old, new = save(LINEAR, tmp_path, dict(r=4), dict(r=2, target_modules=["first"]))
    model = load(LINEAR, old)
    hotswap_adapter_from_state_dict(model, Adapter.load(new).tensors, "default", LoraConfig(r=2))
    assert model.peft_config["default"].target_modules == {"first"}
    model.save_pretrained(tmp_path / "saved")
    for each in (model, load(LINEAR, str(tmp_path / "saved"))):
        assert_same_outputs(each, load(LINEAR, new), LINEAR)


#: those with more than one layer
SEVERAL = {name: each for name, each in KINDS.items() if len(each.modules) > 1}


@pytest.mark.parametrize("name", few_of(SEVERAL, ("linear", "conv", "embedding", "gpt2")))
def test_layers_that_are_not_asked_for_are_refused(name, tmp_path):
    kind = KINDS[name]
    few, all_layers = save(kind, tmp_path, dict(r=4, target_modules=[kind.modules[0]]), dict(r=8))
    model = load(kind, few)
    with (
        untouched(model),
        pytest.raises(RuntimeError, match=r"(?s)unexpected keys found: base_model\.model\..*add_layers=True"),
    ):
        hotswap_adapter(model, all_layers, "default")


# ---- from any state of the model


@dataclass(frozen=True)
class Start:
    """A state of the model; a fresh load is brought into it, too."""

    both: Callable = lambda model, other: None
    #: what is gone after a swap
    before: Callable = lambda model: None
    load: dict = field(default_factory=dict)
    #: around the swap
    around: Callable = torch.inference_mode


def with_gradients(model) -> None:
    model(LINEAR.inputs()).sum().backward()


def scaled(model) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


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


def no_mode() -> torch.inference_mode:
    return torch.inference_mode(False)


STARTS = {
    "as it was loaded": Start(around=no_mode),
    "a swap in inference mode": Start(load=dict(is_trainable=True)),
    "with gradients": Start(before=with_gradients, load=dict(is_trainable=True), around=no_mode),
    "with another scale": Start(before=scaled, around=no_mode),
    "beside another adapter": Start(beside("default"), around=no_mode),
    "in training beside another adapter": Start(in_training, load=dict(is_trainable=True), around=no_mode),
    "inactive": Start(beside("other"), around=no_mode),
    "one of several": Start(beside("default", "other"), around=no_mode),
    "disabled": Start(disabled, around=no_mode),
}
#: what comes, from an adapter of rank 4 on the first layer and on block 1
NEWS = {
    "values": dict(r=4, target_modules=["first", "blocks.1"]),
    "another rank": dict(r=6, lora_alpha=3, target_modules=["first", "blocks.1"]),
    "fewer layers": dict(r=2, target_modules=["first"]),
    "more layers": dict(r=6, lora_dropout=0.3),
}


@pytest.mark.parametrize("new", NEWS)
@pytest.mark.parametrize("start", STARTS)
def test_from_any_state_of_the_model(tmp_path, start, new):
    given = STARTS[start]
    old, new, other = save(LINEAR, tmp_path, NEWS["values"], NEWS[new], dict(r=3, target_modules=["first", "blocks.0"]))
    model, fresh = load(LINEAR, old, **given.load), load(LINEAR, new, **given.load)
    for each in (model, fresh):
        given.both(each, other)
    given.before(model)
    with nothing_else_changes(), given.around():
        hotswap_adapter(model, new, "default", add_layers=True)
    compared = dict(margin=0) if start in ("inactive", "disabled", "in training beside another adapter") else {}
    if model.training:  # its outputs are random
        for each in (model, fresh):
            assert all(module.training for module in each.modules())
            each.eval()
    assert_equals(model, fresh, LINEAR, **compared)
    for each in (model, fresh):
        each.base_model.enable_adapter_layers()
        each.set_adapter("default")
    assert_equals(model, fresh, LINEAR, margin=100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("new", ["another rank", "more layers"])
def test_the_models_dtype_stays(tmp_path, dtype, autocast, new):
    kind = Kind(lambda: LINEAR.make_random().to(dtype), lambda: LINEAR.make_inputs().to(dtype), LINEAR.modules)
    old, new = save(LINEAR, tmp_path, NEWS["values"], NEWS[new])
    model = load(kind, old, autocast_adapter_dtype=autocast)
    hotswap_adapter(model, new, "default", add_layers=True)
    assert_equals_fresh_load(model, kind, new, margin=1, autocast_adapter_dtype=autocast)


@pytest.mark.parametrize("rank", [4, 6])
def test_models_loaded_in_inference_mode(tmp_path, rank):
    old, new = save(LINEAR, tmp_path, dict(r=4), dict(r=rank))
    with torch.inference_mode():
        model = load(LINEAR, old)
    hotswap_adapter(model, new, "default")
    with torch.inference_mode():
        assert_same_outputs(model, load(LINEAR, new), LINEAR)


@pytest.mark.parametrize("wrapping", ["tuner", "injected", "inside another module", "compiled"])
def test_models_that_carry_adapters(tmp_path, wrapping):
    old, new = save(LINEAR, tmp_path, dict(r=4, lora_alpha=8), dict(r=6, lora_alpha=3))
    if wrapping == "injected":
        model = inject_adapter_in_model(Adapter.load(old).config, LINEAR.base())
        randomize(model, "default", seed=1)
    else:
        peft_model = load(LINEAR, old)
        model = {
            "tuner": lambda: peft_model.base_model,
            "inside another module": lambda: torch.nn.Sequential(torch.nn.Identity(), peft_model),
            "compiled": lambda: torch.compile(peft_model, backend="eager"),
        }[wrapping]()
    hotswap_adapter(model, new, "default")
    assert_same_outputs(model, load(LINEAR, new), LINEAR)


def test_a_model_with_another_method_is_judged_by_the_named_adapter(tmp_path):
    """PEFT judges by the active one: here that is a LoHa adapter, and the swapped one is not active."""
    (new,) = save(LINEAR, tmp_path, dict(r=6))
    model = PeftMixedModel(LINEAR.base(), LoraConfig(target_modules=list(LINEAR.modules), r=4), "lora")
    model.add_adapter("loha", LoHaConfig(target_modules=["first"], r=2))
    model.set_adapter("loha")
    hotswap_adapter(model, new, "lora")
    model.set_adapter("lora")
    assert_same_outputs(model, load(LINEAR, new), LINEAR)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LOHA and LORA"):
        hotswap_adapter(model, new, "loha")


NAMES = ["a", "lora", "1", "11", "default", "default_0", "lora_A", "weight", "first"]


def test_only_the_named_adapter_is_touched(tmp_path):
    """Adapters whose names are parts of each other, or of PEFT's own keys, side by side."""
    *folders, new = save(LINEAR, tmp_path, *(dict(r=2 + number) for number in range(len(NAMES))), dict(r=5))

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


@pytest.mark.parametrize("rank", [4, 6, 2])
def test_parameters_stay_the_same_objects(tmp_path, rank):
    """Optimizers and hooks hold on to parameters; equal ranks even keep the addresses."""
    old, new = save(LLAMA, tmp_path, dict(r=4), dict(r=rank))
    model = load(LLAMA, old, is_trainable=True)
    slot = resolve_slot(model, "default")
    parameters, addresses = [tensor.parameter for tensor in slot.tensors], slot.data_ptrs()
    hotswap_adapter(model, new, "default")
    now = [tensor.parameter for tensor in resolve_slot(model, "default").tensors]
    assert all(before is after for before, after in zip(parameters, now, strict=True))
    assert all(type(parameter) is torch.nn.Parameter for parameter in now)
    assert (slot.data_ptrs() == addresses) == (rank == 4)


# ---- state dicts

KEY_FORMS = {
    "as in a file": lambda key: key,
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "without PEFT's prefix": lambda key: key.removeprefix("base_model.model."),
    "from a compiled model": lambda key: f"_orig_mod.{key}",
}


@pytest.mark.parametrize("old", ["values", "more layers"])
@pytest.mark.parametrize("form", KEY_FORMS)
def test_key_forms(tmp_path, form, old):
    old, new = save(LINEAR, tmp_path, NEWS[old], dict(r=6, lora_alpha=4))
    model, adapter = load(LINEAR, old), Adapter.load(new)
    tensors = {KEY_FORMS[form](key): tensor for key, tensor in adapter.tensors.items()}
    hotswap_adapter_from_state_dict(model, tensors, "default", adapter.config, add_layers=True)
    assert_equals_fresh_load(model, LINEAR, new)


def test_what_peft_makes_of_the_keys_is_accepted(tmp_path):
    """The way PEFT's documentation goes: load, insert the adapter's name, swap."""
    kind = KINDS["embedding"]
    old, new = save(kind, tmp_path, dict(r=4), dict(r=6))
    model = load(kind, old)
    named = _insert_adapter_name_into_state_dict(load_peft_weights(new, device="cpu"), "default", "lora_")
    hotswap_adapter_from_state_dict(model, named, "default", LoraConfig.from_pretrained(new), "lora_")
    assert_equals_fresh_load(model, kind, new)


@pytest.mark.parametrize("form", [{}, dict(lora_bias=True), dict(use_dora=True)], ids=["plain", "bias", "DoRA"])
@pytest.mark.parametrize("old", ["values", "more layers"])
def test_two_values_for_one_tensor_are_refused_whatever_else_changes(tmp_path, form, old):
    old, new = save(LINEAR, tmp_path, NEWS[old], dict(r=4, **form))
    model, adapter = load(LINEAR, old), Adapter.load(new)
    twice = {**adapter.tensors, "last.lora_A.weight": adapter.tensors["base_model.model.last.lora_A.weight"] + 1}
    for tensors in (twice, dict(reversed(twice.items()))):
        with untouched(model), pytest.raises(HotswapError, match="two different values for"):
            hotswap_adapter_from_state_dict(model, tensors, "default", adapter.config, add_layers=True)


def test_the_state_dict_is_not_kept(tmp_path):
    """PEFT's own hotswap takes over the caller's tensors when the rank grows."""
    old, new = save(LINEAR, tmp_path, dict(r=4), dict(r=8))
    model, adapter = load(LINEAR, old), Adapter.load(new)
    hotswap_adapter_from_state_dict(model, adapter.tensors, "default", adapter.config)
    with nothing_else_changes(adapter.tensors, adapter.config):
        for parameter in model.parameters():
            parameter.data.add_(1)
        model.peft_config["default"].r = 77


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
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                change(module)
        return model

    return operation


def merged(model, other: str):
    model.merge_adapter()
    return model


def merged_and_unmerged(model, other: str):
    model.merge_adapter()
    model.unmerge_adapter()
    return model


OPERATIONS = {
    "set_scale": on_each_layer(lambda module: module.set_scale("default", 0.5)),
    "scale_layer": on_each_layer(lambda module: module.scale_layer(0.25)),
    "unscale_layer": on_each_layer(lambda module: (module.scale_layer(7.0), module.unscale_layer())),
    "merge": merged,
    "merge and unmerge": merged_and_unmerged,
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
    "groups given up": ("conv", dict(r=4), dict(r=4, target_modules=["conv1d", "conv2d"])),
    "biases": ("linear", dict(r=4, lora_bias=True), dict(r=4, lora_bias=True, target_modules=["first", "last"])),
    "biases given up": ("linear", dict(r=4, lora_bias=True), dict(r=4, target_modules=["first", "last"])),
}


def applies(operation: str, coming: str) -> bool:
    """PEFT adds up adapters of plain LoRA on linear layers, and here one on all layers with one on few."""
    return not operation.startswith("add") or coming == "rsLoRA"


@pytest.mark.parametrize(
    ("coming", "operation"),
    [(each, operation) for each in COMING for operation in OPERATIONS if applies(operation, each)],
)
def test_pefts_operations_after_a_swap(tmp_path, coming, operation):
    name, old, new = COMING[coming]
    kind = KINDS[name]
    full, few, other = save(kind, tmp_path, old, new, dict(r=4))
    model, fresh = load(kind, full), load(kind, few)
    hotswap_adapter(model, few, "default")
    live, expected = (OPERATIONS[operation](each, other) for each in (model, fresh))
    torch.testing.assert_close(call(live, kind.inputs()), call(expected, kind.inputs()), rtol=1e-4, atol=1e-5)
    if operation == "merge":
        with pytest.raises(ValueError, match="currently merged into the base weights"):
            hotswap_adapter(model, full, "default")
        model.unmerge_adapter()
    if operation != "merge and unload":
        model.set_adapter("default")
        hotswap_adapter(model, full, "default")
        assert_same_outputs(model, load(kind, full), kind)


def test_a_layer_that_was_off_comes_back_in_another_form(tmp_path):
    """PEFT's ``lora_bias`` table says then that it has a bias no more."""
    few = dict(r=4, lora_bias=True, target_modules=["first"])
    full, few, plain = save(LINEAR, tmp_path, dict(r=4, lora_bias=True), few, dict(r=4))
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
        assert (ours[position].name, ours[position].default) == (parameter.name, parameter.default)
        assert ours[position].kind == parameter.kind


def test_the_engine_never_calls_pefts_hotswap():
    package = Path(hotswap_lab.__file__).parent
    users = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        if "peft.utils.hotswap import" in path.read_text() or "import peft.utils.hotswap" in path.read_text()
    }
    assert users <= {"bench"}  # measures PEFT's beside ours


def test_refusal_says_found_expected_next():
    model = get_peft_model(LINEAR.base(), LoraConfig(target_modules=["first"]))
    with pytest.raises(HotswapError) as error:
        hotswap_adapter(model, "no/such/folder/at/all", "default")
    for word in ("Can't find 'adapter_config.json'", "found:", "expected:", "next:"):
        assert word in str(error.value)
