"""Memory that tensors share: tied layers, tensors that the user ties, and sources that are the model's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from adapters import METHODS, save_all
from lengths import few_of, long
from lora_kinds import FAMILIES, MODELS
from models import KINDS, Kind, load, save_family
from oracle import assert_equals_fresh_load, assert_same_outputs, assert_same_tensors, untouched
from peft import LoHaConfig, LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from refusals import refused
from torch.testing._internal.two_tensor import TwoTensor

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
)
from hotswap_lab.core.memory import overlaps_in

TIED, MLP = MODELS["tied"], KINDS["linear"]
BOTH = ["q_proj", "embed_tokens", "lm_head"]
#: what can be on the two layers of a tied base that share a weight: configs of LoRA
ON_TIED = {
    "plain": {},
    "both": dict(target_modules=BOTH),
    "both, tied": dict(target_modules=BOTH, ensure_weight_tying=True),
    "embedding": dict(target_modules=BOTH[:2]),
    "embedding, tied": dict(target_modules=BOTH[:2], ensure_weight_tying=True),
    "DoRA on both": dict(target_modules=BOTH, use_dora=True),
    "tokens": dict(trainable_token_indices=[3, 4]),
    "tokens apart": dict(trainable_token_indices={"embed_tokens": [3, 4], "lm_head": [5, 6]}),
    "tokens of the head": dict(trainable_token_indices={"lm_head": [3, 4]}),
    "saved": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "saved, tied": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "saved head": dict(modules_to_save=["lm_head"]),
}
#: of those that were wrong at outputs, or in saved files, and of others
PAIRS = [
    ("both, tied", "both"),
    ("tokens", "tokens of the head"),
    ("saved, tied", "saved"),
    ("both, tied", "embedding"),
]


@pytest.fixture(scope="module")
def on_tied(tmp_path_factory) -> dict[str, list[str]]:
    """Two adapters of each config."""
    configs = [LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **each}) for each in ON_TIED.values()]
    folders = save_all(tmp_path_factory.mktemp("tied"), *configs, *configs, kind=TIED)
    return {name: [folders[n], folders[n + len(ON_TIED)]] for n, name in enumerate(ON_TIED)}


@pytest.mark.parametrize("pair", few_of(itertools.product(ON_TIED, repeat=2), PAIRS), ids=" to ".join)
def test_pairs_on_a_tied_base(on_tied, pair):
    """There, to another of that kind, and back: outputs, saved files and all else as after a fresh load."""
    old, new = pair
    model = load(TIED, on_tied[old][0])
    for folder in (*reversed(on_tied[new]), on_tied[old][0]):
        hotswap_adapter(model, folder, "default", add_layers=True, base_weights=TIED.base().state_dict())
        assert_equals_fresh_load(model, TIED, folder, margin=10)


#: of every kind, those that the short form tries
FEW_KINDS = ("LoHa", "VBLoRA", "TinyLoRA", "PromptTuning", "DoRA", "trainable tokens, tied", "modules_to_save")


def originals_for(name: str) -> dict:
    """The base weights, for kinds whose files bring some. With them, swaps don't use the targets of an earlier one."""
    is_needed = name in ("bias", "lora_only") or name.startswith("embeddings")
    return dict(base_weights=METHODS[name][0].base().state_dict()) if is_needed else {}


@pytest.mark.parametrize("name", few_of(METHODS, FEW_KINDS))
def test_the_models_own_tensors_as_sources(tmp_path, name):
    """Right as long as no swap has written to them; afterwards they are the adapter that is in the model, not A."""
    kind, (config, *_) = METHODS[name]
    originals = originals_for(name)
    folders = save_all(tmp_path, config, config, kind=kind)
    model, config = load(kind, folders[0]), Adapter.load(folders[0]).config
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert own.keys() <= Adapter.load(folders[0]).tensors.keys()
    hotswap_adapter_from_state_dict(model, own, "default", config, **originals)
    assert_same_outputs(model, load(kind, folders[0]), kind, margin=10)
    # as after `low_cpu_mem_usage=True`, the dict that adapter A was loaded from
    model = load(kind, folders[0])
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    clones = {key: tensor.clone() for key, tensor in own.items()}
    hotswap_adapter(model, folders[1], "default", **originals)
    assert_same_outputs(model, load(kind, folders[1]), kind, margin=10)
    if any(not torch.equal(own[key], clones[key]) for key in own):
        match = r"an earlier swap has overwritten them[\s\S]*read its file again"
        # to look at PEFT's MultiheadAttention is to change it
        with pytest.raises(HotswapError, match=match), untouched(*[model] * (name != "MultiheadAttention")):
            hotswap_adapter_from_state_dict(model, own, "default", config, **originals)
    hotswap_adapter_from_state_dict(model, clones, "default", config, **originals)
    assert_same_outputs(model, load(kind, folders[0]), kind, margin=10)


@pytest.mark.parametrize("swaps", [long(0), 2])
@pytest.mark.parametrize("name", few_of(METHODS, FEW_KINDS))
def test_targets_that_the_user_ties(tmp_path, name, swaps):
    """All tensors of one shape in one memory, before the first swap or after some: each gets its own values."""
    kind, (config, *_) = METHODS[name]
    folders = save_all(tmp_path, config, config, kind=kind)
    model, originals = load(kind, folders[0]), originals_for(name)
    for number in range(swaps):
        hotswap_adapter(model, folders[number], "default", **originals)
    first: dict[tuple[int, ...], torch.Tensor] = {}
    for key, parameter in model.named_parameters():
        if "default" in key.split("."):
            parameter.data = first.setdefault(tuple(parameter.shape), parameter.data)
    if name in FAMILIES and not plan_hotswap(model, folders[1], **originals).ok:
        refused("share memory", hotswap_adapter, model, folders[1], **originals)  # as plain LoRA, below
        return
    for folder in (folders[1], folders[0], folders[1]):
        hotswap_adapter(model, folder, "default", **originals)
        assert_same_outputs(model, load(kind, folder), kind, margin=10)


# ---- plain LoRA, whose swaps ask PEFT for nothing


def one_memory(model) -> None:
    """Two parameters in one memory."""
    first, second = model.get_submodule("base_model.model.blocks")
    second.lora_A["default"].weight.data = first.lora_A["default"].weight.data


def one_parameter(model) -> None:
    first, second = model.get_submodule("base_model.model.blocks")
    second.lora_A["default"].weight = first.lora_A["default"].weight


def transposed(model) -> None:
    """One is the other's transpose, as in ``ensure_weight_tying``."""
    first, second = model.get_submodule("base_model.model.blocks")
    second.lora_B["default"].weight.data = first.lora_A["default"].weight.data.t()


def strided(model, start: int, pitch: int) -> None:
    """Views of one memory that meet: one has another pitch, or reaches around the end of the other's rows."""
    memory = torch.zeros(300, dtype=torch.float64)
    for block, where in zip(model.get_submodule("base_model.model.blocks"), ((48, 0), (pitch, start)), strict=True):
        weight = block.lora_A["default"].weight
        weight.data = memory.as_strided((4, 16), (where[0], 1), where[1]).copy_(weight.data)


#: how the user ties two layers, and whether an adapter with values of its own fits if its rank is another one
TIES = {one_memory: True, one_parameter: False, transposed: True}
TIES |= {partial(strided, start=16, pitch=60): True, partial(strided, start=40, pitch=48): True}


@pytest.fixture
def family(tmp_path) -> list[str]:
    """Two of one rank, one of another, and one that is on a single layer of the two."""
    single = dict(r=4, target_modules=["blocks.0", "last"])
    return save_family(MLP, tmp_path, dict(r=4, target_modules=MLP.modules), dict(r=4), dict(r=2), single)


def tied_copy(folder: str, tie) -> Adapter:
    """An adapter with the same values in both of the tied layers."""
    model = load(MLP, folder)
    tie(model)
    tensors = {key: each.clone() for key, each in get_peft_model_state_dict(model).items()}
    return Adapter.from_state_dict(tensors, Adapter.load(folder).config)


@pytest.mark.parametrize("swaps", [0, long(1), long(2)])
@pytest.mark.parametrize("tie", TIES)
def test_layers_that_the_user_ties(family, tie, swaps):
    """Before the first swap, or after some: other values are refused, the same values and other ranks are right."""
    first, second, smaller, single = family
    model = load(MLP, first)
    for number in range(swaps):
        hotswap_adapter(model, family[1 - number], "default")
    tie(model)
    tied = tied_copy(second, tie)
    for adapter in (second, single):
        refused(r"different values for tensors that share memory[\s\S]*blocks\.0", hotswap_adapter, model, adapter)
        assert not plan_hotswap(model, adapter).ok
    hotswap_adapter(model, tied)
    fresh = load(MLP, second)
    set_peft_model_state_dict(fresh, tied.tensors)
    assert_same_outputs(model, fresh, MLP)
    a, b = (block.lora_A["default"].weight for block in model.get_submodule("base_model.model.blocks"))
    assert a.data_ptr() == b.data_ptr() or tie not in (one_memory, one_parameter)
    if not TIES[tie]:
        refused("share memory", hotswap_adapter, model, smaller)
        return
    for folder in (smaller, first):
        hotswap_adapter(model, folder)
        assert_equals_fresh_load(model, MLP, folder)


def test_one_memory_in_a_prepared_model(family):
    """A room gives each its own span; an adapter of another rank is padded into it."""
    model = load(MLP, family[0])
    one_memory(model)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    for folder in family[1:]:
        hotswap_adapter(model, folder)
        assert_equals_fresh_load(model, MLP, folder, prepared=True)


def test_views_that_a_room_has_left_do_not_overlap(family):
    """Layers that are added have no place in a room. The others stay there, next to one another in each row."""
    model = load(MLP, family[3])
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    hotswap_adapter(model, family[0], add_layers=True)
    slot = resolve_slot(model, "default")
    assert slot.room is None
    assert len({each.untyped_storage().data_ptr() for each in slot.parameters}) < len(slot.parameters)
    assert not overlaps_in(slot)
    hotswap_adapter(model, family[1])
    assert_equals_fresh_load(model, MLP, family[1], prepared=True)


class WithGraph(type(MLP.base())):
    """With memory that has no address, or several."""

    def __init__(self):
        super().__init__()
        self.register_buffer("graph", torch.eye(12).to_sparse())
        self.register_buffer("two", TwoTensor(torch.ones(2), torch.ones(2)))

    def forward(self, x):
        return super().forward((self.graph @ x.T).T)


@pytest.mark.parametrize("config", [LoHaConfig, LoraConfig])
def test_a_base_with_a_sparse_buffer(tmp_path, config):
    kind = Kind(WithGraph, MLP.make_inputs, ("first",))
    folders = save_all(tmp_path, *(config(r=rank, target_modules=["first"]) for rank in (2, 3)), kind=kind)
    model, config = load(kind, folders[0]), Adapter.load(folders[0]).config
    hotswap_adapter(model, folders[1], "default")
    assert_same_outputs(model, load(kind, folders[1]), kind, margin=10)
    hotswap_adapter_from_state_dict(model, Adapter.load(folders[0]).tensors, "default", config)
    assert_same_outputs(model, load(kind, folders[0]), kind, margin=10)


# ---- trained tokens in a model with more


@pytest.mark.parametrize("new", ["tokens apart", "tokens of the head"])
def test_a_wrapper_that_another_adapter_needs_is_not_replaced(on_tied, new):
    model = load(TIED, on_tied["tokens"][0])
    other = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[7, 8])
    model.add_adapter("other", other)
    match = "a tied TrainableTokensWrapper that stays there, where a TrainableTokensWrapper would have to be put"
    refused(match, hotswap_adapter, model, on_tied[new][0], "default")


# ---- a dict whose tensors PEFT makes the model's own


@pytest.fixture
def loaded_from(family) -> Callable:
    """Loads the first of the family from a dict whose tensors become the model's own."""

    def load_from(tensors: dict[str, torch.Tensor]):
        model = load(MLP, family[0])
        set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
        return model

    return load_from


def test_a_dict_that_was_loaded_without_a_copy(family, loaded_from):
    """Right before a swap has overwritten it, and refused afterwards, by pools too. A clone from before is right."""
    first, second, smaller, _ = family
    tensors, config = dict(Adapter.load(first).tensors), Adapter.load(first).config
    clones = {key: each.clone() for key, each in tensors.items()}
    model = loaded_from(tensors)
    hotswap_adapter_from_state_dict(model, tensors, "default", config)
    assert_equals_fresh_load(model, MLP, first)
    # another rank takes new memory
    model = loaded_from(tensors)
    hotswap_adapter(model, smaller)
    hotswap_adapter_from_state_dict(model, tensors, "default", config)
    assert_equals_fresh_load(model, MLP, first)
    model = loaded_from(tensors)
    hotswap_adapter(model, second)
    assert not any(torch.equal(tensors[key], clones[key]) for key in tensors)
    match = r"an earlier swap has overwritten them[\s\S]*found:    8 tensors"
    refused(match, hotswap_adapter_from_state_dict, model, tensors, "default", config)
    refused(match, AdapterPool, model, adapters={"first": Adapter.from_state_dict(tensors, config)}, progress=False)
    hotswap_adapter_from_state_dict(model, clones, "default", config)
    assert_equals_fresh_load(model, MLP, first)
    # a config knows of swaps in another model
    model = PeftModel(MLP.base(), model.peft_config["default"]).eval()
    set_peft_model_state_dict(model, clones, low_cpu_mem_usage=True)
    hotswap_adapter_from_state_dict(model, clones, "default", config)
    assert_same_outputs(model, load(MLP, first), MLP)
    # the model's own parameters in a room, which of rank 1 are also in its state dict
    prepare_model_for_compiled_hotswap(model := load(MLP, first), target_rank=4)
    tensors = {key: each for key, each in model.named_parameters() if "lora_" in key}
    hotswap_adapter(model, second)
    refused(match, hotswap_adapter_from_state_dict, model, tensors, "default", config)


def test_two_adapters_that_were_loaded_from_one_dict(family, loaded_from):
    """A swap of one would be a swap of both, but for another rank, which takes new memory."""
    first, second, smaller, _ = family
    model = loaded_from(tensors := dict(Adapter.load(first).tensors))
    model.load_adapter(first, "other")
    set_peft_model_state_dict(model, tensors, "other", low_cpu_mem_usage=True)
    hotswap_adapter(model, first, "default")
    refused("in that of another adapter, on", hotswap_adapter, model, second, "default")
    for folder in (smaller, second):
        hotswap_adapter(model, folder, "default")
        assert_same_outputs(model, load(MLP, folder), MLP)
    model.set_adapter("other")
    assert_same_outputs(model, load(MLP, first), MLP)


def test_the_models_own_tensors_for_other_layers(family, loaded_from):
    """Two layers exchange their tensors: all are read before the first is written, after swaps too."""
    config = Adapter.load(family[0]).config
    model = loaded_from(dict(Adapter.load(family[0]).tensors))
    for _ in range(2):
        live, exchanged = get_peft_model_state_dict(model), {}
        for key, tensor in live.items():
            one, other = key.replace("blocks.0", "blocks.1"), key.replace("blocks.1", "blocks.0")
            exchanged[one if one != key else other] = tensor if one != other else tensor.clone()
        expected = {key: tensor.clone() for key, tensor in exchanged.items()}
        hotswap_adapter_from_state_dict(model, exchanged, "default", config)
        assert_same_tensors(get_peft_model_state_dict(model), expected)
