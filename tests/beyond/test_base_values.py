"""Base weights that adapters overwrite: under all of their names, with their gradients, and if they are trained."""

from __future__ import annotations

import pytest
import torch
from adapters import save_all, with_other_base_weights
from lora_kinds import MODELS
from models import ARCHITECTURES, call, load
from oracle import assert_equals_fresh_load, assert_same_outputs
from peft import LoraConfig
from refusals import refused

from hotswap_lab import hotswap_adapter, loaded

BERT, TIED = ARCHITECTURES["bert"], MODELS["tied"]


def weights_of(kind) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in kind.base().state_dict().items()}


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
    refused("base weights of its own", hotswap_adapter, model, plain)
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
