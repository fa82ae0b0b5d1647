"""Core alone: plain LoRA with core's own method and passes, from memory; everything else is refused."""

from __future__ import annotations

import dataclasses

import pytest
from models import KINDS, load, save_random_adapter
from oracle import assert_equals_fresh_load, untouched
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.lora import LoraModel

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    get_strength,
    hotswap_adapter,
    loaded,
    prepare_model_for_compiled_hotswap,
)
from hotswap_lab.beyond.configs import KNOWN
from hotswap_lab.beyond.passes import METHODS
from hotswap_lab.core.change import apply
from hotswap_lab.core.host import find_host
from hotswap_lab.core.planner import LORA, LORA_PASSES, make_plan
from hotswap_lab.core.prepare import changes_to_prepare
from hotswap_lab.core.settings import NO_EFFECT, RULES
from hotswap_lab.core.slot import slot_for
from hotswap_lab.swap import carry_out

KIND = KINDS["llama"]
#: configs that are more than plain LoRA, by the field that says so
MORE = {
    "use_dora": dict(use_dora=True),
    "lora_bias": dict(lora_bias=True),
    "bias": dict(bias="all"),
    "modules_to_save": dict(modules_to_save=["lm_head"]),
    "trainable_token_indices": dict(trainable_token_indices=[3, 4]),
    "alora_invocation_tokens": dict(alora_invocation_tokens=[1], task_type=TaskType.CAUSAL_LM),
    "target_parameters": dict(target_parameters=["mlp.gate_proj.weight"]),
    "task_type": dict(task_type=TaskType.SEQ_CLS),
}


def slot_of(model):
    return slot_for(LORA, find_host(model, "default"), "default")


def swap(model, source, **config):
    adapter = Adapter.load(source)
    adapter = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, **config))
    carry_out([make_plan(slot_of(model), adapter, passes=LORA_PASSES)])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("plain")
    return [save_random_adapter(KIND, folder / str(rank), rank, r=rank, use_rslora=rank == 2) for rank in (4, 2)]


def test_it_swaps_prepares_and_saves(plain):
    model = load(KIND, plain[0])
    swap(model, plain[1])
    assert_equals_fresh_load(model, KIND, plain[1])
    hotswap_adapter(model, plain[0], "default")
    assert slot_for(METHODS, find_host(model, "default"), "default").methods is METHODS
    assert_equals_fresh_load(model, KIND, plain[0])
    apply(changes_to_prepare(LORA, model, [*map(Adapter.load, plain)]))
    swap(model, plain[1])
    assert_equals_fresh_load(model, KIND, plain[1], prepared=True)  # state dicts and saved files among them
    prepare_model_for_compiled_hotswap(model, adapters=plain)


@pytest.mark.parametrize("role", ["new", "loaded"])
@pytest.mark.parametrize("field", MORE)
def test_more_than_plain_lora_is_refused_before_and_after(plain, tmp_path, field, role):
    """A swap from such an adapter would leave its magnitudes, tokens or modules."""
    more = save_random_adapter(KIND, tmp_path / "more", 1, **{"r": 4, "target_modules": ["q_proj"], **MORE[field]})
    now, new = (plain[0], more) if role == "new" else (more, plain[0])
    model = load(KIND, now) if field != "task_type" else PeftModel.from_pretrained(KIND.base(), now)
    with untouched(model), pytest.raises(HotswapError, match=field):
        swap(model, new)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(lora_alpha=float("nan")), "lora_alpha=nan"),
        (dict(init_lora_weights="pissa"), "init_lora_weights"),
        (dict(bias=None), "bias"),
        (dict(trainable_token_indices=0), "trainable_token_indices"),
        (dict(rank_pattern={"(": 2}), "regular expression"),
    ],
)
def test_damaged_configs_are_refused(plain, change, match):
    with pytest.raises(HotswapError, match=match):
        swap(load(KIND, plain[0]), plain[1], **change)


@pytest.mark.parametrize(("kind", "found"), [("embedding", "an embedding"), ("conv", "a convolution in groups")])
def test_layers_of_which_it_does_not_know_enough_are_refused(tmp_path, kind, found, monkeypatch):
    kind = KINDS[kind]
    folder = save_random_adapter(kind, tmp_path, 1, r=4)
    model = load(kind, folder)
    if found == "an embedding":  # as transformers' models have it
        monkeypatch.setattr(type(kind.base()), "get_input_embeddings", lambda self: self.embed, raising=False)
    with pytest.raises(HotswapError, match=found):
        swap(model, folder)


# ---- fields of a config


def test_every_field_of_a_config_is_declared():
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names - RULES.keys() - NO_EFFECT - KNOWN == set()
    assert not RULES.keys() & NO_EFFECT
    assert not NO_EFFECT & KNOWN


@dataclasses.dataclass
class LaterConfig(LoraConfig):
    """The config of a later PEFT, with a field that multiplies the scaling."""

    lora_gain_of_a_later_peft: float = 1.0


@pytest.fixture
def later(monkeypatch):
    """A later PEFT, whose fresh loads multiply the scaling by a field of the config that today's doesn't have."""
    make = LoraModel._create_and_replace

    def boosted(self, config, adapter_name, target, *args, **kwargs):
        make(self, config, adapter_name, target, *args, **kwargs)
        for layer in (each for each in self.model.modules() if hasattr(each, "lora_A")):
            if adapter_name in layer.scaling and not getattr(layer, "is_boosted", False):
                layer.is_boosted = True
                layer.scaling[adapter_name] *= getattr(config, "lora_gain_of_a_later_peft", 1.0)

    monkeypatch.setattr(LoraModel, "_create_and_replace", boosted)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_field_of_a_later_peft_goes_the_way_of_a_fresh_load(later, plain, is_prepared):
    adapter = Adapter.load(plain[1])
    values = {each.name: getattr(adapter.config, each.name) for each in dataclasses.fields(adapter.config)}
    boosted = dataclasses.replace(adapter, config=LaterConfig(**values, lora_gain_of_a_later_peft=3.0))
    model = load(KIND, plain[0])
    if is_prepared:
        prepare_model_for_compiled_hotswap(model, adapters=plain)
    hotswap_adapter(model, boosted)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert float(layer.scaling["default"]) == pytest.approx(3 * layer.lora_alpha["default"] / 2**0.5)
    with pytest.raises(HotswapError, match="lora_gain_of_a_later_peft"):
        get_strength(model)
    assert loaded(model)[0].strength is None
    with pytest.raises(HotswapError, match="lora_gain_of_a_later_peft"):
        AdapterPool(model, "default", {})
    hotswap_adapter(model, plain[0])
    assert_equals_fresh_load(model, KIND, plain[0], prepared=is_prepared)
