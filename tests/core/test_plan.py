"""The dry run: what it says, and that everything it refuses leaves the model alone, bit for bit."""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from pathlib import Path
from random import Random

import pytest
import torch
from lora_kinds import Attention
from models import KINDS, Kind, load, randomize, save_family, save_random_adapter
from mutations import CONFIG, WEIGHTS, Mutation, with_config, with_tensors
from oracle import assert_equals, assert_equals_fresh_load, assert_same_outputs, assert_same_tensors, untouched
from peft import LoHaConfig, LoraConfig, PeftMixedModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from refusals import refused
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from hotswap_lab import (
    Adapter,
    commit,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    save_adapter,
)

LLAMA, LINEAR, CONV, SHARED = (KINDS[name] for name in ("llama", "linear", "conv", "shared"))
EMBED = ("embed_tokens",)
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(tmp_path):
    return load(LLAMA, save_random_adapter(LLAMA, tmp_path / "old", seed=1, r=4))


@pytest.fixture
def new(tmp_path):
    return save_random_adapter(LLAMA, tmp_path / "new", seed=2, r=6, lora_alpha=3)


def edit(folder: str, mutation: Mutation) -> None:
    mutation(Path(folder), Random())


def cut(name: str, size: int) -> Mutation:
    return lambda folder, _: os.truncate(folder / name, size)


def test_the_dry_run_writes_nothing_and_says_what_the_swap_will_do(model, new, tmp_path):
    with untouched(model):
        plan = plan_hotswap(model, new)
        assert plan.ok
        assert plan.counts == {"copy": 0, "pad": 0, "resize": 14, "off": 0, "add": 0}
        assert plan.layers[0].path == "model.layers.0.self_attn.q_proj"
        assert {(each.rank_before, each.rank_after, each.settings.scaling) for each in plan.layers} == {(4, 6, 0.5)}
        assert plan.nbytes == sum(tensor.nbytes for tensor in Adapter.load(new).tensors.values())
        assert "action  layers  rank          scaling\n  resize      14  4 -> 6        0.5" in str(plan)
        assert "4 -&gt; 6" in plan._repr_html_()
        mixed = dict(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})
        mixed = save_random_adapter(LLAMA, tmp_path / "mixed", 2, **mixed)
        assert plan_hotswap(model, mixed).rows == [
            ("copy", 2, "4", "2"),
            ("resize", 2, "4 -> 2", "4"),
            ("off", 10, "4 -> off", "-"),
        ]


def _set(side: str, change):
    """Changes one tensor of one layer."""
    key = f"{Q}.{side}.weight"
    return lambda tensors: tensors.update({key: change(tensors[key])})


def _fill(position: tuple, value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[position] = value
        return tensor

    return change


def _unknown(tensors):
    tensors[f"{Q.replace('0', '7')}.lora_A.default.weight"] = torch.ones(6, 16)
    tensors[f"{Q.replace('0', '7')}.lora_B.weight"] = torch.ones(16, 6)


_nan = _set("lora_A", _fill((0, 0), float("nan")))
DAMAGE = {
    "missing lora_B": (lambda tensors: tensors.pop(f"{Q}.lora_B.weight"), r"incomplete at model.layers.0.self_attn.q"),
    "transposed": (
        _set("lora_A", lambda each: each.T.contiguous()),
        r"does not fit the base model at model.layers.0.self_attn.q_proj",
    ),
    "input dimension": (
        _set("lora_A", lambda each: each[:, :3].clone()),
        r"found: .*\(6, 3\)\n  expected: shape \(6, 16\), 6 being the rank",
    ),
    "output dimension": (
        _set("lora_B", lambda each: each[:3].clone()),
        r"found: .*\(3, 6\)\n  expected: shape \(16, 6\), 6 being the rank",
    ),
    "rank of A": (_set("lora_A", lambda each: each[:3].clone()), r"disagree about the rank[\s\S]*shape \(6, 16\)"),
    "rank of B": (_set("lora_B", lambda each: each[:, :3].clone()), r"disagree about the rank"),
    "integers": (_set("lora_A", torch.Tensor.long), r"is damaged"),
    "NaN": (_nan, r"NaN or infinity in 'base_model"),
    "infinity": (_set("lora_B", _fill((-1, -1), float("-inf"))), r"NaN or infinity in 'base_model"),
    "unknown layer": (_unknown, rf"unexpected keys found: 2(?s:.*){Q.replace('0', '7')}.lora_A.default.weight"),
    # of a file, a fresh load ignores the second name
    "named twice": (
        lambda tensors: tensors.update(
            {f"{Q}.lora_A.weight".removeprefix("base_model.model."): tensors[f"{Q}.lora_A.weight"] + 1}
        ),
        r"two different values for one tensor|without the prefix",
    ),
    "one dimension": (_set("lora_A", lambda each: torch.ones(6)), r"does not fit"),
    "no tensors": (dict.clear, r"no tensors at all"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_refused_before_any_write(model, new, damage):
    change, message = DAMAGE[damage]
    adapter = Adapter.load(new)
    tensors = dict(adapter.tensors)
    change(tensors)
    edit(new, with_tensors(change))
    refused(message, hotswap_adapter, model, new, "default")
    refused(message, hotswap_adapter_from_state_dict, model, tensors, "default", adapter.config)


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_plan_for_an_adapter_that_is_trained_names_its_optimizer(model, new, is_trained):
    model.requires_grad_(is_trained)
    plan = plan_hotswap(model, new)
    assert ["optimizer.state.clear()" in note for note in plan.notes] == [True] * is_trained
    commit(plan)


def test_nonfinite_weights_can_be_let_through(model, new):
    edit(new, with_tensors(_nan))
    refused("NaN", Adapter.load, new)
    hotswap_adapter(model, new, "default", allow_nonfinite=True)
    assert model.get_submodule(Q).lora_A["default"].weight.isnan().sum() == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_config(r=5), "disagree about the rank"),
        (with_config(rank_pattern={"q_proj": 3}), "disagree about the rank"),
        (with_config(target_modules=["k_proj"]), "does not target model.layers.0.self_attn.q_proj"),
        (with_config(use_dora=True), "incomplete"),
        (with_config(lora_bias=True), "incomplete"),
        (with_config(modules_to_save=["lm_head"]), "PEFT can't load this adapter on the base model"),
        (with_config(trainable_token_indices=[1, 2]), "PEFT can't load this adapter on the base model"),
        (with_config(target_parameters=["down_proj.weight"]), "PEFT can't load this adapter on the base model"),
        (with_config(layer_replication=[[0, 2], [0, 2]]), "for other layers of the base model"),
        (with_config(init_lora_weights="pissa_niter_4"), "changes the base model's own weights"),
        (with_config(init_lora_weights="olora"), "changes the base model's own weights"),
        (with_config(peft_type="NEW"), r"^The adapter from .* is of an unknown kind\.\n.*peft_type='NEW'"),
        *((with_config(**each), None) for each in (dict(r=-1), dict(r=4.5), dict(r=None), dict(rank_pattern=[1]))),
        *((cut(WEIGHTS, size), "can't be read") for size in (0, 4, 8, 100, 10_000)),
        *((cut(CONFIG, size), "can't be read") for size in (0, 1, 100)),
        (lambda folder, _: (folder / CONFIG).write_text('{"r": 4}'), "can't be read"),
        (lambda folder, _: os.remove(folder / WEIGHTS), "Can't find weights for"),
        (lambda folder, _: os.remove(folder / CONFIG), r"Can't find 'adapter_config\.json' at"),
        (lambda folder, _: shutil.rmtree(folder), r"Can't find 'adapter_config\.json' at"),
    ],
)
def test_a_damaged_folder_is_refused(model, new, damage, message):
    edit(new, damage)
    refused(message, hotswap_adapter, model, new, "default")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_inits_that_leave_the_base_alone_are_fine(model, new, init):
    edit(new, with_config(init_lora_weights=init))
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, LLAMA, new)


class TwoForms(nn.Module):
    """Layers that store their weights in either way; a config says which of them its layers have."""

    def __init__(self):
        super().__init__()
        self.first, self.last = Conv1D(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.first(x))


@pytest.mark.parametrize(("targets", "fan_in_fan_out"), [(["first"], True), (["last"], False)])
def test_a_layer_that_is_off_does_not_say_how_weights_are_stored(tmp_path, targets, fan_in_fan_out):
    kind = Kind(TwoForms, lambda: torch.randn(3, 8), ("first", "last"))
    options = dict(r=2, target_modules=targets, fan_in_fan_out=fan_in_fan_out)
    new, whole = save_family(kind, tmp_path, options, dict(r=2))
    hotswap_adapter(model := load(kind, whole), new)
    assert model.peft_config["default"].fan_in_fan_out == load(kind, new).peft_config["default"].fan_in_fan_out
    assert_same_outputs(load(kind, new), model, kind)


#: PiSSA is not for float64
SINGLE = dataclasses.replace(LLAMA, dtype=torch.float32)
LOADED = {
    "a base that was changed": (
        lambda: get_peft_model(SINGLE.base(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")),
        "The loaded adapter changes the base model's own weights",
    ),
    "another base": (
        lambda: get_peft_model(KINDS["gpt2"].base(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)),
        "made for the same base model",
    ),
    "meta tensors": (
        lambda: get_peft_model(LLAMA.base(), LoraConfig(r=4, target_modules=["q_proj"]), low_cpu_mem_usage=True),
        "on the meta device",
    ),
}


@pytest.mark.parametrize("loaded", LOADED)
def test_what_is_loaded_is_judged_too(new, loaded):
    make, message = LOADED[loaded]
    model = make()
    refused(message, hotswap_adapter, model, new, "default", add_layers=loaded != "another base")


def test_grouped_convolutions_need_ranks_that_their_groups_divide(tmp_path):
    model = load(CONV, save_random_adapter(CONV, tmp_path / "old", seed=1, r=4))
    tensors = dict(Adapter.load(save_random_adapter(CONV, tmp_path / "new", seed=2, r=8)).tensors)
    key = "base_model.model.grouped2d.lora_{}.weight"
    tensors[key.format("A")] = tensors[key.format("A")][:6].clone()
    tensors[key.format("B")] = torch.ones(8, 1, 1, 1)
    config = LoraConfig(r=8, rank_pattern={"grouped2d": 6})
    message = r"rank 6|rank does not fit the grouped convolution grouped2d"
    refused(message, hotswap_adapter_from_state_dict, model, tensors, "default", config)


def test_base_weights_saved_beside_an_embedding_adapter(tmp_path):
    """PEFT saves the embedding's own weights too, and a fresh load takes them over; the next swap gives them back."""
    kind = Kind(LLAMA.make_random, LLAMA.make_inputs, ("embed_tokens", "q_proj"))
    old = save_random_adapter(kind, tmp_path / "old", seed=1, r=4)
    new = save_random_adapter(kind, tmp_path / "new", seed=2, r=6)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(f"{new}/adapter_model.safetensors")
    model = load(kind, old)
    edit(old, with_tensors(lambda tensors: tensors[key][0, 0].add_(1)))
    for folder in (new, old, new, old, old, new):
        hotswap_adapter(model, folder, "default")
        assert_equals_fresh_load(model, kind, folder)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    refused("comes with other base weights", hotswap_adapter, model, old, "default")


@pytest.mark.parametrize(
    "change", [torch.clone, torch.Tensor.half, lambda tensor: tensor + 1], ids=["equal", "dtype", "values"]
)
def test_shared_blocks_must_agree(tmp_path, change):
    """Which of the two a fresh load takes would make a difference."""
    model = load(SHARED, save_random_adapter(SHARED, tmp_path / "old", seed=1, r=4))
    new = save_random_adapter(SHARED, tmp_path / "new", seed=2, r=4)
    early, late = (f"base_model.model.{block}.0.lora_A.weight" for block in ("early", "late"))
    edit(new, with_tensors(lambda tensors: tensors.update({late: change(tensors[early])})))
    if change is torch.clone:
        hotswap_adapter(model, new, "default")
        assert_equals_fresh_load(model, SHARED, new)
        edit(new, with_config(target_modules=["late.0"]))  # which PEFT looks for by its first name alone
        with pytest.raises(ValueError, match="not found"):
            load(SHARED, new)
        refused(r"does not target early\.0", hotswap_adapter, model, new, "default")
    else:
        refused("two different values for one tensor", hotswap_adapter, model, new, "default")


def test_a_plan_lists_everything(model, new):
    """Layers that the config targets and the file lacks are noted; a refusal has all reasons, and prints three."""
    edit(new, with_tensors(lambda tensors: [tensors.pop(key) for key in list(tensors) if "v_proj" in key]))
    plan = plan_hotswap(model, new)
    assert plan.ok
    assert plan.notes[0].startswith("the config targets 2 layers that the file has no tensors for")
    edit(new, with_tensors(lambda tensors: [tensors.pop(key) for key in list(tensors) if "lora_B" in key]))
    plan = plan_hotswap(model, new)
    assert (len(plan.refusals), plan.ok) == (12, False)
    assert "refused, 12 reasons; nothing is written" in str(plan)
    # one reason in front, in red, before the table
    assert str(plan).splitlines()[1:6] == [*str(plan.refusals[0]).splitlines(), plan._reasons[1]]
    html = plan._repr_html_()
    assert (
        html.index("border-left")
        < html.index("... and 11 more")
        < html.index("<table")
        < html.index("the config targets")
    )
    refused("and 11 more", plan.raise_if_refused)
    edit(new, with_tensors(lambda tensors: [tensors.pop(key) for key in list(tensors)[1:]]))
    assert "refused, 1 reason; nothing is written" in str(plan_hotswap(model, new))


@pytest.mark.parametrize("target_modules", [".*", ["self_attn", "q_proj"]])
def test_a_config_that_names_more_than_layers(model, tmp_path, target_modules):
    """The file's layers are right, but no fresh load takes its config, nor what would be saved with it."""
    new = save_random_adapter(LLAMA, tmp_path / "new", seed=2, r=4, target_modules=["q_proj"])
    edit(new, with_config(target_modules=target_modules))
    with pytest.raises(ValueError, match=r"^Target module Llama"):
        load(LLAMA, new)
    refused(r"^Target module model", hotswap_adapter, model, new, "default")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    refused(r"^Target module model", hotswap_adapter, model, new, "default")


#: what a swap changes, and whether a model that was compiled before has to compile again
CHANGES = {
    "weights": ({}, False),
    "fewer layers": (dict(target_modules=["q_proj"]), False),
    "rank": (dict(r=2, lora_alpha=4), True),
    "scaling": (dict(lora_alpha=3), True),
    "dropout": (dict(lora_dropout=0.3), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_compiles_again(tmp_path, change):
    """As the plan says, and a warning."""
    config, (other, compiles_again) = dict(r=4, lora_alpha=8, lora_dropout=0.1), CHANGES[change]
    if change == "weights":
        del config["lora_dropout"]  # then PEFT has another module in its place
    old, new = save_family(LLAMA, tmp_path, config, config | other)
    model = load(LLAMA, old)
    compiled = torch.compile(model, backend="eager")
    assert plan_hotswap(compiled, new).will_recompile == compiles_again
    for each, warns in ((compiled, compiles_again), (model, False)):
        with warnings.catch_warnings(record=True) as caught:
            hotswap_adapter(each, new, "default")
        assert ["prepare_model" in str(warning.message) for warning in caught] == [True] * warns


def test_what_is_known_of_a_model_is_asked_anew_when_its_modules_change(tmp_path):
    """A fresh load would take the new head for the adapter's, and miss its tensors."""
    kind = KINDS["linear"]
    plain, classifies = (save_random_adapter(kind, tmp_path / name, seed=1, r=4) for name in "ab")
    edit(classifies, with_config(task_type="SEQ_CLS"))
    base = kind.base()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=list(kind.modules))).eval()
    for _ in range(3):
        hotswap_adapter(model, plain, "default")
    assert plan_hotswap(model, classifies, "default").ok
    base.score, base.blocks = torch.nn.Linear(6, 2), torch.nn.ModuleList(base.blocks)
    refused("score", hotswap_adapter, model, classifies, "default")


Q_AND_K = {"target_modules": ["q_proj", "k_proj"]}
#: each leaves out a layer that the tensors are for
SELECTIONS = {
    "targets": dict(target_modules=["q_proj"]),
    "no targets": dict(target_modules=None),
    "excluded": dict(Q_AND_K, exclude_modules=["k_proj"]),
    "one layer": dict(Q_AND_K, layers_to_transform=[0]),
    "one layer by its pattern": dict(Q_AND_K, layers_to_transform=[0], layers_pattern="layers"),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_is_saved_is_loaded_as_what_it_is(model, tmp_path, selection):
    new = save_random_adapter(LLAMA, tmp_path / "new", seed=2, r=4, **Q_AND_K)
    config = LoraConfig(r=4, **SELECTIONS[selection])
    hotswap_adapter_from_state_dict(model, Adapter.load(new).tensors, "default", config)
    save_adapter(model, tmp_path / "saved")
    assert_same_outputs(load(LLAMA, str(tmp_path / "saved")), load(LLAMA, new), LLAMA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_base_weights_of_higher_precision_that_are_the_models_own(tmp_path, dtype):
    """They are what the model has, rounded: nothing speaks against a swap to an adapter without them, and back."""
    half = Kind(lambda: LLAMA.make_random().to(dtype), LLAMA.make_inputs, LLAMA.modules)
    embedded, plain = save_family(
        LLAMA, tmp_path, *(dict(target_modules=[*more, "q_proj", "up_proj"]) for more in (EMBED, ()))
    )
    model = load(half, plain)
    model.load_adapter(plain, "neighbor")  # whose base weights must stay as they are
    for folder in (embedded, plain, embedded):
        hotswap_adapter(model, folder, "default", add_layers=True)
        fresh = load(half, folder).requires_grad_(False)  # PEFT leaves an embedding that it converts trainable
        assert_equals(model, fresh, half, margin=1)


# ---- what a config says of layers

NAMES = [name for name, each in LLAMA.base().named_modules() if isinstance(each, nn.Linear) and "head" not in name]


MANY = [name.removeprefix(prefix) for name in NAMES for prefix in ("model.", "model.layers.")]


@pytest.mark.parametrize("targets", ["all-linear", None, MANY], ids=["all-linear", "PEFT's default", "many names"])
def test_the_config_says_what_peft_makes_of_it(targets):
    """Above twenty names, PEFT looks for shorter ones that mean the same. The caller's config stays as it is."""
    fresh = get_peft_model(LLAMA.base(), LoraConfig(target_modules=targets))
    model = get_peft_model(LLAMA.base(), LoraConfig(target_modules=list(LLAMA.modules)))
    config = LoraConfig(target_modules=targets)
    given = config.target_modules
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(fresh), "default", config)
    assert model.peft_config["default"].target_modules == fresh.peft_config["default"].target_modules
    assert config.target_modules == given


def ones(**layers: tuple[int, int]) -> dict[str, torch.Tensor]:
    """An adapter of rank 2 for linear layers of these sizes."""
    a = {f"{name}.lora_A.weight": torch.ones(2, inputs) for name, (inputs, _) in layers.items()}
    return a | {f"{name}.lora_B.weight": torch.ones(outputs, 2) for name, (_, outputs) in layers.items()}


def test_multihead_attention_is_not_added_either():
    model = get_peft_model(Attention(), LoraConfig(r=2, target_modules=["head"]))
    tensors = ones(head=(8, 4), attention=(8, 24))
    swap = hotswap_adapter_from_state_dict
    refused("a MultiheadAttention", swap, model, tensors, "default", LoraConfig(r=2), add_layers=True)


def test_layers_of_another_peft_method_are_not_added_to():
    model = PeftMixedModel(LINEAR.base(), LoraConfig(r=2, target_modules=["first"]), "lora")
    model.add_adapter("loha", LoHaConfig(target_modules=["last"]))
    match, tensors = "already adapted by another PEFT method", ones(first=(12, 16), last=(16, 6))
    refused(match, hotswap_adapter_from_state_dict, model, tensors, "lora", LoraConfig(r=2), add_layers=True)


def test_multihead_attention_from_a_state_dict():
    """Its config may leave out which layers it is for: those of the loaded one."""
    other = get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attention"]))
    randomize(other, "default", seed=1)
    tensors = get_peft_model_state_dict(other)
    model = get_peft_model(Attention(), LoraConfig(r=4, target_modules=["attention"]))
    hotswap_adapter_from_state_dict(model, tensors, "default", LoraConfig(r=2))
    assert_same_tensors(get_peft_model_state_dict(model), tensors)
    assert model.get_base_model().attention.scaling["default"] == 4


class OfALibrary(nn.Parameter):
    """Its values are not all that it has."""


#: what is done to a layer, and why it can't be written to; None if it can
ODD_LAYERS = {
    "expanded": (lambda layer, a: setattr(a.weight, "data", torch.zeros(1, 1).expand(2, 12)), "share memory"),
    "whole numbers": (
        lambda layer, a: setattr(a.requires_grad_(False).weight, "data", torch.ones(2, 12).char()),
        "torch.int8",
    ),
    "one row": (lambda layer, a: setattr(a.weight, "data", torch.zeros(50).as_strided((1, 12), (0, 3))), None),
    "a parameter of a library": (
        lambda layer, a: setattr(a, "weight", OfALibrary(a.weight.data)),
        "of type OfALibrary",
    ),
    "a variant": (lambda layer, a: layer.lora_variant.update(default=OfALibrary()), None),
}


@pytest.mark.parametrize("odd", ODD_LAYERS)
def test_layers_that_are_not_plain(odd):
    change, match = ODD_LAYERS[odd]
    model = get_peft_model(LINEAR.base(), LoraConfig(r=2, target_modules=["first"]))
    layer = model.get_base_model().first
    change(layer, layer.lora_A["default"])
    swap, tensors = hotswap_adapter_from_state_dict, ones(first=(12, 16))
    if match:
        refused(match, swap, model, tensors, "default", LoraConfig(r=2))
    else:
        swap(model, tensors, "default", LoraConfig(r=2))
        assert torch.equal(layer.lora_A["default"].weight, torch.ones(2, 12))
        assert not layer.lora_variant
