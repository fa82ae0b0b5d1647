"""Every kind of LoRA: variants, whole modules, biases, embeddings, tokens, parameters; and from each to the others."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from adapters import save_all
from lengths import few_of, long
from lora_kinds import ATTENTION, FAMILIES, LLAMA, MODELS, variant
from models import Kind, call, load
from oracle import assert_equals_fresh_load, assert_same_outputs
from peft import LoraConfig, PromptTuningConfig
from refusals import refused

from hotswap_lab import hotswap_adapter, verify_hotswap

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def test_parameters_whose_order_a_forward_has_changed(tmp_path):
    """A forward puts the parameter that it adapts behind the others; PEFT nests and names its layers by their order."""
    kind = MODELS["mixtral"]
    configs = [LoraConfig(r=rank, target_parameters=EXPERTS[:rank], target_modules=["q_proj"]) for rank in (1, 2)]
    first, both = save_all(tmp_path, *configs, kind=kind)
    model = load(kind, first)
    call(model, kind.inputs())
    experts = model.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    assert next(iter(experts._parameters)) == "down_proj"
    for folder in (both, first, both):
        hotswap_adapter(model, folder, "default", add_layers=True)
        call(model, kind.inputs())
        assert_equals_fresh_load(model, kind, folder, margin=10)
        assert verify_hotswap(model, folder, inputs=kind.inputs())


@pytest.mark.parametrize("modules", [long(["embed_tokens"]), ["q_proj", "embed_tokens"]])
def test_an_adapter_that_is_tied_to_another_in_a_trainable_model(tmp_path, modules):
    """PEFT keeps tensors of the tied one, with their graphs, which Python can't copy."""
    kind = MODELS["tied"]
    configs = [LoraConfig(target_modules=["q_proj"]), LoraConfig(target_modules=modules, ensure_weight_tying=True)]
    plain, tied = save_all(tmp_path, *configs, kind=kind)
    model = load(kind, plain, is_trainable=True)
    for folder in (tied, plain, tied):
        hotswap_adapter(model, folder, "default", add_layers=True)
        assert_equals_fresh_load(model, kind, folder, margin=10, is_trainable=True)
        assert verify_hotswap(model, folder, inputs=kind.inputs())
    base = model.get_base_model()
    memory = [
        each.untyped_storage().data_ptr()
        for each in (base.lm_head.lora_A.default.weight, base.get_input_embeddings().lora_embedding_B.default)
    ]
    assert memory[0] == memory[1]


class Unordered(torch.nn.Module):
    """Two parameters whose order only running the constructor shows."""

    def __init__(self):
        super().__init__()
        self.last = torch.nn.Linear(12, 12)
        for number in (1, 2):
            setattr(self, f"weight{number}", torch.nn.Parameter(torch.randn(12, 12)))

    def forward(self, x):
        return self.last(torch.tanh(x @ self.weight1) @ self.weight2)


def test_parameters_whose_order_nobody_knows_are_refused(tmp_path):
    kind = Kind(lambda: torch.nn.Sequential(Unordered()), lambda: torch.randn(5, 12), ())
    names = ["0.weight1", "0.weight2"]
    configs = [LoraConfig(r=rank, target_parameters=names[:rank], target_modules=[]) for rank in (1, 1, 2)]
    first, one, both, none = save_all(tmp_path, *configs, LoraConfig(target_modules=["last"]), kind=kind)
    for folder in (one, none):  # fewer than two have no order
        hotswap_adapter(model := load(kind, first), folder, add_layers=True)
        assert_equals_fresh_load(model, kind, folder, margin=10)
    match = "an order of parameters that the base model may have lost"
    refused(match, hotswap_adapter, load(kind, first), both, "default", add_layers=True)


@pytest.mark.long
def test_biases_that_nobody_knows_any_more_are_refused(method_folders):
    """What PEFT overwrote at a load is gone, unless the caller has it: whatever was swapped before and since."""
    kind, (everything, some, other), (*_, plain) = MODELS["bert"], method_folders("bias"), method_folders("lora_bias")
    just_loaded, swapped, loaded_again = (load(kind, each) for each in (everything, everything, plain))
    for folder in (other, everything, other):
        hotswap_adapter(swapped, folder, "default", add_layers=True)
    for folder in (everything, plain):
        hotswap_adapter(loaded_again, folder, "default")
    loaded_again.delete_adapter("default")
    loaded_again.load_adapter(everything, "default")
    loaded_again.set_adapter("default")
    for model, new in ((just_loaded, some), (swapped, plain), (loaded_again.eval(), plain)):
        error = refused("pass base_weights=", hotswap_adapter, model, new, "default")
        assert re.search(r"found:    1\d base weights", str(error)) or model is not just_loaded
        hotswap_adapter(model, new, "default", base_weights=kind.base().state_dict())
        assert_equals_fresh_load(model, kind, new, margin=10, activated=model is loaded_again)


#: which layers of the base model an adapter has it made of: repeated, in another order, as they are, unsaid
REPLICATIONS = {
    "two ends": [[0, 2], [1, 2]],
    "two beginnings": [[0, 1], [0, 2]],
    "backwards": [[1, 2], [0, 1]],
    "once": [[0, 2]],
    "unsaid": None,
}


def _replicated(tmp_path, name: str, **lora) -> str:
    config = LoraConfig(**{"r": 4, "target_modules": ATTENTION, "layer_replication": REPLICATIONS[name], **lora})
    return save_all(tmp_path, config)[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("two ends", "backwards"),
        ("two ends", "unsaid"),
        ("once", "two beginnings"),
        *itertools.starmap(long, itertools.permutations(REPLICATIONS, 2)),
    ],
)
def test_other_layers_of_the_base_are_refused(tmp_path, old, new):
    """Some of these have as many layers as the others, with the same names: the live ones would stay silently."""
    model, match = load(LLAMA, _replicated(tmp_path, old)), "for other layers of the base model than the model has"
    for targets in (ATTENTION, ["lm_head"]):  # which is none of the layers that are repeated
        folder = _replicated(tmp_path, new, target_modules=targets)
        refused(match, hotswap_adapter, model, folder, "default", add_layers=True)


@pytest.mark.parametrize("name", few_of(REPLICATIONS, ("two ends", "unsaid")))
def test_the_same_layers_of_the_base(tmp_path, name):
    """Also where the live config has tuples, as somebody writes them, and the file lists; or nothing, and none."""
    new = _replicated(tmp_path, name, r=6, modules_to_save=["lm_head"])
    for ranges in (REPLICATIONS[name], tuple(map(tuple, REPLICATIONS[name] or ()))):
        model = load(LLAMA, _replicated(tmp_path, name))
        model.peft_config["default"].layer_replication = ranges
        hotswap_adapter(model, new, "default")
        assert_equals_fresh_load(model, LLAMA, new, margin=10)


PROMPTS = [PromptTuningConfig(task_type=task, num_virtual_tokens=4) for task in ("CAUSAL_LM", "FEATURE_EXTRACTION")]
KASA = variant("KasaConfig")
#: the loaded adapter, the new one, and why it is refused
REFUSED = {
    "layers unasked for": (dict(target_modules=["q_proj"], use_dora=True), {}, "add_layers=True"),
    # aLoRA, like prompts, works by the class that PEFT puts around the model for a task
    "another task": ({}, dict(task_type="CAUSAL_LM", alora_invocation_tokens=[5]), "for another task than the model"),
    "prompts for another task": (*PROMPTS, "for another task than the model"),
    "to KaSA": ({}, dict(kasa_config=KASA), "changes the base model's own weights"),
    "from KaSA": (dict(kasa_config=KASA), {}, "changes the base model's own weights"),
}


@pytest.mark.parametrize("what", [name for name in REFUSED if KASA is not None or "KaSA" not in name])
def test_what_is_refused(tmp_path, what):
    *configs, match = REFUSED[what]
    plain = {"r": 4, "target_modules": ATTENTION}
    configs = [LoraConfig(**plain | each) if isinstance(each, dict) else each for each in configs]
    old, new = save_all(tmp_path, *configs)
    refused(match, hotswap_adapter, load(LLAMA, old), new, "default")


def test_a_task_that_changes_nothing(tmp_path):
    """PEFT has another class for it, which computes the same here; so does a tuner alone, whatever the task was."""
    kind, head = MODELS["invoked"], dict(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"])
    plain, task = save_all(tmp_path, LoraConfig(**head), LoraConfig(**head, task_type="CAUSAL_LM"))
    hotswap_adapter(model := load(LLAMA, plain), task)
    assert_same_outputs(model, load(LLAMA, task), LLAMA)
    first, second = save_all(tmp_path, *FAMILIES["aLoRA"][1][:2])
    hotswap_adapter((model := load(kind, first)).base_model, second)
    assert_same_outputs(model, load(kind, second), kind)
