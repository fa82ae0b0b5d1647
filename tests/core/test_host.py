"""Finding the adapters in whatever a user passes."""

from __future__ import annotations

import pytest
import torch
from models import KINDS, load, save_random_adapter
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
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
from hotswap_lab.core.compiled import compiled_parts, unwrap_compiled
from hotswap_lab.core.host import canonical_path, find_host

KIND = KINDS["linear"]
CONFIG = dict(r=2, target_modules=["first"])


@pytest.fixture
def peft_model():
    return get_peft_model(KIND.base(), LoraConfig(**CONFIG))


def test_every_wrapping_leads_to_the_same_base(peft_model):
    base = peft_model.get_base_model()
    wrappings = [
        peft_model,
        peft_model.base_model,
        base,
        torch.compile(peft_model, backend="eager"),
        nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"inner": peft_model})),
        nn.Sequential(torch.compile(peft_model, backend="eager")),
    ]
    for model in wrappings:
        assert find_host(model, "default").base is base
        assert [layer.path for layer in resolve_slot(model, "default").layers] == ["first"]


def test_a_compiled_model_inside_leads_to_the_same_base(peft_model):
    base = peft_model.get_base_model()
    peft_model.base_model.model = torch.compile(base, backend="eager")
    assert find_host(peft_model, "default").base is base
    assert find_host(peft_model.base_model, "default").base is base
    assert compiled_parts(find_host(peft_model, "default").root)


def test_injected_models():
    model = inject_adapter_in_model(LoraConfig(**CONFIG), KIND.base())
    assert find_host(model, "default").base is model


def test_a_base_that_was_compiled_before_peft_wrapped_it():
    """hasattr(model, "_orig_mod") is True for such a model although it is not a compiled wrapper."""
    compiled = torch.compile(KIND.base(), backend="eager")
    model = get_peft_model(compiled, LoraConfig(**CONFIG))
    assert hasattr(model, "_orig_mod")
    assert unwrap_compiled(model) is model
    assert [layer.path for layer in resolve_slot(model, "default").layers] == ["first"]


def test_compiled_in_all_its_forms(peft_model):
    assert not compiled_parts(peft_model)
    assert compiled_parts(torch.compile(peft_model, backend="eager"))
    in_place = get_peft_model(KIND.base(), LoraConfig(**CONFIG))
    in_place.compile(backend="eager")
    assert compiled_parts(in_place)
    part = get_peft_model(KIND.base(), LoraConfig(**CONFIG))
    part.get_base_model().blocks[0] = torch.compile(part.get_base_model().blocks[0], backend="eager")
    assert compiled_parts(part)
    assert compiled_parts(get_peft_model(torch.compile(KIND.base(), backend="eager"), LoraConfig(**CONFIG)))


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("base_model.model.a.b.lora_A.weight", "a.b.lora_A.weight"),
        ("_orig_mod.base_model.model.a.lora_A.weight", "a.lora_A.weight"),
        ("base_model.model._orig_mod.a._orig_mod.lora_A.weight", "a.lora_A.weight"),
        ("a.lora_A.weight", "a.lora_A.weight"),
        ("a.base_model.model.b.weight", "a.base_model.model.b.weight"),
    ],
)
def test_canonical_paths(key, path):
    assert canonical_path(key) == path


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="No adapter layers found on the model"):
        find_host(KIND.base(), "default")


def test_an_unknown_name_is_refused_with_the_names_there_are(peft_model):
    refused(r"Adapter nobody not found[\s\S]*the adapters 'default'", find_host, peft_model, "nobody")


#: all that takes a model and the name of an adapter in it
FUNCTIONS = [
    lambda model: resolve_slot(model, "default"),
    lambda model: hotswap_adapter(model, "folder", "default"),
    lambda model: plan_hotswap(model, "folder"),
    lambda model: set_strength(model, 0.5),
    lambda model: save_adapter(model, "folder"),
    lambda model: AdapterPool(model),
    lambda model: prepare_model_for_compiled_hotswap(model, target_rank=4),
]


@pytest.mark.parametrize("function", FUNCTIONS[:5])
def test_a_model_whose_only_adapter_was_deleted_has_none_of_that_name(peft_model, function):
    peft_model.delete_adapter("default")
    refused(r"Adapter default not found[\s\S]*no adapter that is left", function, peft_model)
    refused("No adapter layers found on the model", in_use, peft_model)


def test_two_models_with_the_same_adapter_name_are_refused(peft_model, tmp_path):
    other = load(KIND, save_random_adapter(KIND, tmp_path / "other", seed=1, r=2), "default")
    refused("More than one part of the model", find_host, nn.ModuleList([peft_model, other]), "default")
    renamed = load(KIND, str(tmp_path / "other"), "mine")
    assert find_host(nn.ModuleList([peft_model, renamed]), "mine").base is renamed.get_base_model()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_model_is_refused(function):
    """A diffusers pipeline, say: it has several models in it."""

    class Pipeline:
        unet = nn.Linear(2, 2)

    refused(r"call hotswap_lab.hotswap_pipeline", function, Pipeline())
