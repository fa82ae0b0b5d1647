"""Finding the adapters in whatever a user passes."""

from __future__ import annotations

import pytest
from models import KINDS
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from refusals import refused
from torch import nn

from hotswap_lab import (
    AdapterPool,
    hotswap_adapter,
    in_use,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    save_adapter,
    set_strength,
)

KIND = KINDS["linear"]
CONFIG = dict(r=2, target_modules=["first"])


#: all that takes a model and the name of an adapter in it
FUNCTIONS = [
    lambda model: resolve_slot(model, "default"),
    lambda model: hotswap_adapter(model, "folder", "default"),
    lambda model: plan_hotswap(model, "folder", "default"),
    lambda model: set_strength(model, 0.5, "default"),
    lambda model: save_adapter(model, "folder", "default"),
    lambda model: AdapterPool(model),
    lambda model: prepare_model_for_compiled_hotswap(model, target_rank=4),
]


@pytest.mark.parametrize("function", FUNCTIONS[:5])
def test_a_model_that_has_no_adapter_of_that_name(function):
    refused(rf"No adapter layers found on the model[\s\S]*a {KIND.make_random.__name__} without", function, KIND.base())
    model = get_peft_model(KIND.base(), LoraConfig(**CONFIG), "mine")
    refused(r"Adapter default not found[\s\S]*the adapters 'mine'", function, model)
    model.delete_adapter("mine")
    refused(r"Adapter default not found[\s\S]*no adapter that is left", function, model)
    refused("No adapter layers found on the model", in_use, model)


def test_two_models_with_the_same_adapter_name_are_refused():
    models = [get_peft_model(KIND.base(), LoraConfig(**CONFIG), name) for name in ("one", "one", "other")]
    refused("More than one part of the model", resolve_slot, nn.ModuleList(models), "one")
    assert resolve_slot(nn.ModuleList(models), "other").host.base is models[2].get_base_model()


def test_an_adapter_inside_that_has_the_same_name_is_refused():
    """PEFT has both under that name in the base's layers: a swap of the prompts would take LoRA out of the model."""
    inner = get_peft_model(KINDS["llama"].base(), LoraConfig(r=2, target_modules=["q_proj"]))
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    refused("More than one part of the model", resolve_slot, PeftModel(inner, prompts), "default")
    assert len(resolve_slot(inner, "default").layers) == 2
    assert not resolve_slot(PeftModel(inner, prompts, "other"), "other").layers
    inner.peft_config = dict(inner.peft_config)  # another table of the same configs
    assert len(resolve_slot(inner, "default").layers) == 2


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_model_is_refused(function):
    """A diffusers pipeline, say: it has several models in it."""

    class Pipeline:
        unet = nn.Linear(2, 2)

    refused(r"call hotswap_lab.hotswap_pipeline", function, Pipeline())
