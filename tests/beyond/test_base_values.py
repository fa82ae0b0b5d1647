"""Base weights that adapters overwrite: under all of their names, with their gradients, and if they are trained."""

from __future__ import annotations

import socket
import warnings

import pytest
import torch
from adapters import save_all, with_base_weights, with_other_base_weights
from lengths import few_of, long
from lora_kinds import MODELS
from models import ARCHITECTURES, Kind, call, llama, load, save_family, save_random_adapter
from oracle import assert_close, assert_equals_fresh_load, assert_same_outputs
from peft import LoHaConfig, LoraConfig, PeftModel
from refusals import refused
from safetensors.torch import load_file, save_file
from torch.testing._internal.two_tensor import TwoTensor

from hotswap_lab import (
    Adapter,
    AdapterPool,
    commit,
    hotswap_adapter,
    loaded,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    verify_hotswap,
)
from hotswap_lab.beyond import base_values

BERT, TIED, LLAMA = ARCHITECTURES["bert"], MODELS["tied"], ARCHITECTURES["llama"]
EMBED = "base_model.model.model.embed_tokens.weight"
#: base weights that no config tells of: a norm, the embeddings, the base of an adapted layer, a bias, tied embeddings
ANY_WEIGHT = {
    "norm": (LLAMA, "model.norm.weight"),
    "embeddings": (LLAMA, "model.embed_tokens.weight"),
    "head": (LLAMA, "lm_head.weight"),
    "adapted": (LLAMA, "model.layers.0.self_attn.v_proj.base_layer.weight"),
    "bias": (BERT, "bert.embeddings.LayerNorm.bias"),
    "tied": (TIED, "model.embed_tokens.weight"),
}


def weights_of(kind, model=None) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in (model or kind.base()).state_dict().items()}


def test_a_bias_with_two_names(tmp_path):
    """BERT's head has one bias, which is that of its decoder, too."""
    base = BERT.base()
    assert base.cls.predictions.bias is base.cls.predictions.decoder.bias
    configs = (LoraConfig(r=4, target_modules=["key"], bias=bias) for bias in ("all", "all", "none"))
    first, second, plain = save_all(tmp_path, *configs, kind=BERT)
    model = load(BERT, first)
    for folder in (first, second, first):
        hotswap_adapter(model, folder, "default", base_weights=weights_of(BERT))
        assert_equals_fresh_load(model, BERT, folder, margin=10)
    hotswap_adapter(model, plain, "default")  # what was overwritten is remembered by now
    assert_equals_fresh_load(model, BERT, plain, margin=10)


def test_a_config_from_another_model_knows_nothing_of_this_one(tmp_path):
    """A swap notes on a config what it has overwritten, and the source. A user may load with that config again."""
    configs = (LoraConfig(r=4, target_modules=["key"], bias=bias) for bias in ("all", "none"))
    biased, plain = save_all(tmp_path, *configs, kind=BERT)
    other = load(BERT, plain)
    hotswap_adapter(other, biased)
    model = load(BERT, biased, config=other.peft_config["default"])
    assert loaded(model)[0].source == "unknown"
    refused("original values are unknown", hotswap_adapter, model, plain)
    assert_same_outputs(model, load(BERT, biased), BERT, margin=10)


def test_embeddings_that_are_the_head_too(tmp_path):
    configs = (LoraConfig(r=4, target_modules=modules) for modules in (["embed_tokens", "q_proj"], ["q_proj"]))
    same, plain = save_all(tmp_path, *configs, kind=TIED)
    model = load(TIED, with_other_base_weights(same, tmp_path / "changed"))
    assert (call(load(TIED, same), TIED.inputs()) - call(model, TIED.inputs())).abs().max() > 0.1
    for folder in (same, plain):
        hotswap_adapter(model, folder, "default", base_weights=weights_of(TIED))
        assert_same_outputs(model, load(TIED, folder), TIED, margin=10)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_what_of_a_bias_goes_with_its_adapter(tmp_path, is_trainable):
    """Its gradient says nothing about another one's values; and whether it is trained, the new config says."""
    configs = (LoraConfig(r=4, target_modules=["query"], bias=bias) for bias in ("all", "all", "none"))
    every, other, plain = save_all(tmp_path, *configs, kind=BERT)
    model = load(BERT, every, is_trainable=is_trainable)
    model(**BERT.inputs()).logits.sum().backward()
    assert any(each.grad is not None for name, each in model.named_parameters() if name.endswith("bias"))
    for folder in (other, plain, every):
        hotswap_adapter(model, folder, "default", base_weights=weights_of(BERT))
        assert all(each.grad is None for each in model.parameters())
        fresh = load(BERT, folder, is_trainable=is_trainable)
        live, expected = ({name: p.requires_grad for name, p in each.named_parameters()} for each in (model, fresh))
        assert live == expected
        model(**BERT.inputs()).logits.sum().backward() if any(live.values()) else None


def family(tmp_path, kind, *names: str) -> list[str]:
    """Three adapters; only the first has these base weights in its file."""
    layers = list(kind.modules[:3])
    first, *others = save_family(kind, tmp_path, *(dict(r=rank, target_modules=layers) for rank in (4, 6, 2)))
    changed = with_base_weights(first, tmp_path / "with base weights", kind, *names)
    outputs = [call(load(kind, each), kind.inputs()) for each in (first, changed)]
    assert (outputs[0] - outputs[1]).abs().max() > 0.05
    return [changed, *others]


@pytest.mark.parametrize("is_prepared", [long(False), True])
@pytest.mark.parametrize("case", few_of(ANY_WEIGHT, ("norm", "adapted", "tied")))
def test_any_base_weight_that_peft_overwrote_comes_back(tmp_path, monkeypatch, case, is_prepared):
    """All weights are compared, once; after that swap, what is lost is known. Names may be those of a PeftModel."""
    kind, name = ANY_WEIGHT[case]
    changed, *others = family(tmp_path, kind, name)
    weights = weights_of(kind, load(kind, others[0]) if is_prepared else None)
    model = load(kind, changed)
    if is_prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    commit(plan_hotswap(model, others[0], base_weights=weights))
    assert_equals_fresh_load(model, kind, others[0], margin=10, prepared=is_prepared)
    assert verify_hotswap(model, others[0], base=kind.base)
    seen = []
    monkeypatch.setattr(base_values, "have_same_values", lambda *values: seen.append(values))
    hotswap_adapter(model, others[1], base_weights={"no.such.weight": weights.popitem()[1]})
    assert not seen
    assert_equals_fresh_load(model, kind, others[1], margin=10, prepared=is_prepared)


@pytest.mark.long
def test_a_chain_of_adapters_that_all_have_base_weights(tmp_path):
    """The original is the one that was passed, not what was there when a swap overwrote the weight once more."""
    (first, second, plain), name = family(tmp_path, LLAMA, "model.norm.weight"), "lm_head.weight"
    second = with_base_weights(second, tmp_path / "second", LLAMA, "model.norm.weight", name)
    model = load(LLAMA, first)
    hotswap_adapter(model, second, base_weights=weights_of(LLAMA))
    for folder in (plain, first, plain, second, first, plain):
        hotswap_adapter(model, folder)
        assert_equals_fresh_load(model, LLAMA, folder, margin=10)
        assert verify_hotswap(model, folder, base=LLAMA.base)


def test_base_weights_that_are_passed_when_the_targets_are_known(tmp_path):
    """An adapter with the same config then needs no load of PEFT, but here the base model has to change, too."""
    first, second, third = save_all(tmp_path, *[LoHaConfig(r=4, target_modules=["q_proj"])] * 3)
    model = load(LLAMA, with_base_weights(first, tmp_path / "changed", LLAMA, "model.norm.weight"))
    hotswap_adapter(model, second)
    hotswap_adapter(model, third, base_weights=weights_of(LLAMA))
    assert_equals_fresh_load(model, LLAMA, third, margin=10)


def test_a_base_weight_of_another_shape(tmp_path):
    """A single value would be written to all of the weight's."""
    first, second = save_family(LLAMA, tmp_path, dict(r=4), dict(r=4))
    tensors = load_file(file := f"{second}/adapter_model.safetensors")
    save_file(tensors | {"base_model.model.model.norm.weight": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(LLAMA, second)
    refused("unexpected keys found", hotswap_adapter, load(LLAMA, first), second)


class Odd(torch.nn.Module):
    """What few models have: a saved counter, weights that are empty, elsewhere or packed, and a module that is None."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(12, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 6)
        self.empty, self.elsewhere = (torch.nn.Parameter(torch.empty(2 * n, device=("cpu", "meta")[n])) for n in (0, 1))
        self.packed = torch.nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
        self.register_module("none", None)
        self.register_buffer("unused", torch.empty(2, device="meta"))

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


def test_odd_base_weights(tmp_path):
    kind = Kind(Odd, lambda: torch.randn(2, 12), ("first", "last"))
    changed, first, second = family(tmp_path, kind, "norm.weight")
    weights = weights_of(kind) | {"elsewhere": torch.ones(2), "packed": torch.zeros(2)}
    hotswap_adapter(model := load(kind, changed), first, base_weights=weights)
    assert_same_outputs(model, load(kind, first), kind)
    assert torch.equal(model.get_base_model().packed.a, kind.base().packed.a)
    for rows in (1, 2):
        pool = AdapterPool(load(kind, changed), adapters={"a": first}, rows=rows, progress=False, base_weights=weights)
        pool.swap("a") if rows == 1 else pool.assign(["a", None])
        assert_close(call(pool.model, kind.inputs())[0], call(load(kind, first), kind.inputs())[0])
    model = load(kind, first)
    model.load_adapter(second, "other")  # nothing has to be written to the base of both
    hotswap_adapter(model, second, "default", base_weights=weights)
    assert_same_outputs(model, load(kind, second), kind)


@pytest.mark.parametrize("damage", ["own memory", "other names", "other shape", "no values"])
def test_weights_that_are_not_the_originals(tmp_path, damage):
    """The state dict of the model itself has the overwritten values; one of another wrapper has other names."""
    first, plain, _ = family(tmp_path, LLAMA, "model.norm.weight")
    base = LLAMA.base()
    weights = base.state_dict()
    if damage != "own memory":
        weights = {f"module.{key}": value for key, value in weights_of(LLAMA).items()}
    if damage == "other shape":
        weights = weights_of(LLAMA) | {"lm_head.weight": torch.ones(45, 16)}
    if damage == "no values":
        weights = {key: value.to("meta") for key, value in weights_of(LLAMA).items()}
    model = PeftModel.from_pretrained(base, first).eval()
    refused("does not fit the base model", hotswap_adapter, model, plain, base_weights=weights)
    assert not plan_hotswap(model, plain, base_weights=weights).ok


@pytest.mark.parametrize("rows", [1, 3])
def test_a_pool_that_has_the_adapter_among_its_members(tmp_path, rows):
    """Without the originals it can't know what its base is; with them, the base and the others are right."""
    first, second, third = family(tmp_path, LLAMA, "model.norm.weight", "lm_head.weight")
    model, base = load(LLAMA, first), call(LLAMA.base(), LLAMA.inputs())
    given = dict(rows=rows, progress=False)
    refused("next:     pass base_weights=", AdapterPool, model, adapters={"first": first, "second": second}, **given)
    weights, name = weights_of(LLAMA), "comes with other base weights"
    refused(name, AdapterPool, model, adapters={"second": second, "first": first}, base_weights=weights, **given)
    pool = AdapterPool(model, adapters={"second": second}, target_rank=8, base_weights=weights, **given)
    assert torch.equal(call(model, LLAMA.inputs()), base)
    refused(name, pool.add, "first", first)
    pool.add("third", third)
    for each, folder in (("second", second), ("third", third)):
        pool.swap(each)
        assert_same_outputs(model, load(LLAMA, folder), LLAMA, margin=10)
        pool.off()
        assert torch.equal(call(model, LLAMA.inputs()), base)
    if rows > 1:
        pool.assign([None, "second"])
        outputs = call(model, LLAMA.inputs())
        assert_close(outputs[0], base[0])
        assert_close(outputs[1], call(load(LLAMA, second), LLAMA.inputs())[1])
    # a swap keeps the originals of what it overwrites
    hotswap_adapter(model := load(LLAMA, third), first)
    AdapterPool(model, adapters={"second": second}, **given)
    assert torch.equal(call(model, LLAMA.inputs()), base)


def test_a_pool_on_embeddings_that_nothing_has_overwritten(tmp_path):
    """PEFT saves these with each adapter that is on them, changed or not."""
    folders = save_family(LLAMA, tmp_path, *(dict(r=4, target_modules=["embed_tokens", "q_proj"]) for _ in range(2)))
    model, adapters = load(LLAMA, folders[0]), dict(zip("ab", folders, strict=True))
    refused("found:    model.embed_tokens.weight in the file", AdapterPool, model, adapters=adapters, progress=False)
    for given in (weights_of(LLAMA), {}):
        pool = AdapterPool(load(LLAMA, folders[0]), adapters=adapters, progress=False, base_weights=given)
        assert pool.active == "a"
        for name, folder in adapters.items():
            pool.swap(name)
            assert_same_outputs(pool.model, load(LLAMA, folder), LLAMA, margin=10)


def resized(name: str, **more: str) -> Kind:
    """A model that its user gave five more tokens; ``name``: where it came from."""

    def make():
        model = llama(vocab_size=45, **more)
        model.name_or_path = name
        return model

    return Kind(make, LLAMA.make_inputs, LLAMA.modules)


@pytest.mark.long
def test_a_vocabulary_that_was_resized(tmp_path, monkeypatch):
    """PEFT saves the embeddings then. What the base was is read from its folder, and the network is never asked."""
    folder, kind = str(tmp_path / "base"), resized("")
    LLAMA.base().save_pretrained(folder)
    first = save_random_adapter(resized(folder), tmp_path / "first", 1, target_modules=["q_proj"])
    assert {"base_model.model.lm_head.weight", EMBED} <= Adapter.load(first).tensors.keys()
    changed = with_other_base_weights(first, tmp_path / "changed")
    plain = save_random_adapter(kind, tmp_path / "plain", 2, r=4, target_modules=["q_proj"])
    monkeypatch.setattr(socket, "create_connection", None)
    for name, is_told in ((folder, True), ("nobody/nothing", False), (None, False)):
        model = load(kind, changed)
        model.peft_config["default"].base_model_name_or_path = name
        notes = [each for each in plan_hotswap(model, plain).notes if "vocabulary" in each]
        assert len(notes) == is_told
        assert not plan_hotswap(model, plain, base_weights=weights_of(kind)).notes
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for each in (plain, changed, plain):
                hotswap_adapter(model, each)
        assert len([each for each in caught if "pass base_weights=" in str(each.message)]) == is_told
        assert "the base model's lm_head.weight" in str(verify_hotswap(model, plain, base=kind.base))
        for each in (changed, plain):
            hotswap_adapter(model, each, base_weights=weights_of(kind))
            assert not plan_hotswap(model, plain).notes
        assert_equals_fresh_load(model, kind, plain, margin=10)
    headless = resized(folder, head="Model")  # its output embeddings are None
    first = save_random_adapter(headless, tmp_path / "headless", 1, target_modules=["q_proj"])
    assert plan_hotswap(load(headless, first), first).ok
