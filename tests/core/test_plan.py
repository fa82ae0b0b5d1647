"""The dry run: what it says, and that everything it refuses leaves the model alone, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from models import KINDS, load, save_random_adapter
from oracle import assert_equals_fresh_load, assert_untouched, snapshot
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hotswap_lab import (
    Adapter,
    HotswapError,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
)

LLAMA = KINDS["llama"]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(tmp_path):
    return load(LLAMA, save_random_adapter(LLAMA, tmp_path / "old", seed=1, r=4))


@pytest.fixture
def new(tmp_path):
    return save_random_adapter(LLAMA, tmp_path / "new", seed=2, r=6, lora_alpha=3)


def edit_tensors(folder: str, change) -> None:
    file = f"{folder}/adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_config(folder: str, **changes) -> None:
    file = f"{folder}/adapter_config.json"
    with open(file) as stream:
        config = json.load(stream)
    with open(file, "w") as stream:
        json.dump({**config, **changes}, stream)


def test_the_dry_run_writes_nothing_and_says_what_the_swap_will_do(model, new):
    before = snapshot(model)
    plan = plan_hotswap(model, new)
    assert plan.ok
    assert plan.counts == {"copy": 0, "pad": 0, "resize": 14, "off": 0, "add": 0}
    assert plan.layers[0].path == "model.layers.0.self_attn.q_proj"
    assert {(layer.rank_before, layer.rank_after, layer.settings.scaling) for layer in plan.layers} == {(4, 6, 0.5)}
    assert plan.nbytes == sum(tensor.nbytes for tensor in Adapter.load(new).tensors.values())
    assert "resize      14  4 -> 6        0.5" in str(plan)
    assert "possible" in plan._repr_html_()
    assert "4 -&gt; 6" in plan._repr_html_()
    assert_untouched(model, before)


def test_rows_sum_up_layers_that_are_alike(model, tmp_path):
    new = save_random_adapter(
        LLAMA, tmp_path / "mixed", seed=2, r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}
    )
    assert plan_hotswap(model, new).rows == [
        ("copy", 2, "4", "2"),
        ("resize", 2, "4 -> 2", "4"),
        ("off", 10, "4 -> off", "-"),
    ]


def _drop_b(tensors):
    del tensors[f"{Q}.lora_B.weight"]


def _transpose(tensors):
    tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"].T.contiguous()


def _cut(side, axis):
    def change(tensors):
        key = f"{Q}.{side}.weight"
        tensors[key] = tensors[key].narrow(axis, 0, 3).contiguous()

    return change


def _integers(tensors):
    tensors[f"{Q}.lora_A.weight"] = torch.ones(6, 16, dtype=torch.int64)


def _nan(tensors):
    tensors[f"{Q}.lora_A.weight"][0, 0] = float("nan")


def _infinity(tensors):
    tensors[f"{Q}.lora_B.weight"][-1, -1] = float("-inf")


def _unknown(tensors):
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.ones(6, 16)
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight"] = torch.ones(16, 6)


def _twice(tensors):
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"] + 1


def _one_dimension(tensors):
    tensors[f"{Q}.lora_A.weight"] = torch.ones(6)


def _nothing(tensors):
    tensors.clear()


DAMAGE = {
    "missing lora_B": (_drop_b, r"incomplete at model.layers.0.self_attn.q_proj"),
    "transposed": (_transpose, r"does not fit the base model at model.layers.0.self_attn.q_proj"),
    "input dimension": (_cut("lora_A", 1), r"found: .*\(6, 3\)\n  expected: shape \(6, 16\), 6 being the rank"),
    "output dimension": (_cut("lora_B", 0), r"found: .*\(3, 6\)\n  expected: shape \(16, 6\), 6 being the rank"),
    "rank of A": (_cut("lora_A", 0), r"disagree about the rank"),
    "rank of B": (_cut("lora_B", 1), r"disagree about the rank"),
    "integers": (_integers, r"is damaged"),
    "NaN": (_nan, r"NaN or infinity in 'base_model"),
    "infinity": (_infinity, r"NaN or infinity in 'base_model"),
    "unknown layer": (
        _unknown,
        r"unexpected keys found: base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight",
    ),
    # of a file, a fresh load ignores the second name
    "named twice": (_twice, r"two different values for one tensor|without the prefix"),
    "one dimension": (_one_dimension, r"does not fit"),
    "no tensors": (_nothing, r"no tensors at all"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_refused_before_any_write(model, new, damage):
    change, message = DAMAGE[damage]
    edit_tensors(new, change)
    before = snapshot(model)
    with pytest.raises(HotswapError, match=message) as error:
        hotswap_adapter(model, new, "default")
    for word in ("found:", "expected:", "next:"):
        assert word in str(error.value)
    assert_untouched(model, before)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_state_dicts_too(model, new, damage):
    change, message = DAMAGE[damage]
    adapter = Adapter.load(new)
    tensors = dict(adapter.tensors)
    change(tensors)
    before = snapshot(model)
    with pytest.raises(HotswapError, match=message):
        hotswap_adapter_from_state_dict(model, tensors, "default", adapter.config)
    assert_untouched(model, before)


def test_nonfinite_weights_can_be_let_through(model, new):
    edit_tensors(new, _nan)
    hotswap_adapter(model, new, "default", allow_nonfinite=True)
    assert model.get_submodule(Q).lora_A["default"].weight.isnan().sum() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(r=5), "disagree about the rank"),
        (dict(rank_pattern={"q_proj": 3}), "disagree about the rank"),
        (dict(target_modules=["k_proj"]), "does not target model.layers.0.self_attn.q_proj"),
        (dict(use_dora=True), "incomplete"),
        (dict(lora_bias=True), "incomplete"),
        (dict(modules_to_save=["lm_head"]), "PEFT can't load this adapter on the base model"),
        (dict(trainable_token_indices=[1, 2]), "PEFT can't load this adapter on the base model"),
        (dict(target_parameters=["down_proj.weight"]), "PEFT can't load this adapter on the base model"),
        (dict(layer_replication=[[0, 2], [0, 2]]), "for other layers of the base model"),
        (dict(init_lora_weights="pissa"), "changes the base model's own weights"),
        (dict(init_lora_weights="pissa_niter_4"), "changes the base model's own weights"),
        (dict(init_lora_weights="olora"), "changes the base model's own weights"),
        (dict(peft_type="NEW_METHOD"), "unknown kind"),
    ],
)
def test_configs_that_can_not_be_right_are_refused(model, new, changes, message):
    edit_config(new, **changes)
    before = snapshot(model)
    with pytest.raises(HotswapError, match=message):
        hotswap_adapter(model, new, "default")
    assert_untouched(model, before)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_inits_that_leave_the_base_alone_are_fine(model, new, init):
    edit_config(new, init_lora_weights=init)
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, LLAMA, new)


@pytest.mark.parametrize("lora", [dict(init_lora_weights="pissa"), dict(init_lora_weights="olora")])
def test_what_is_loaded_is_judged_too(new, lora):
    """A model whose base was changed can't be turned into a fresh load."""
    model = get_peft_model(LLAMA.base(), LoraConfig(r=4, target_modules=["q_proj"], **lora))
    before = snapshot(model)
    with pytest.raises(HotswapError, match="The loaded adapter changes the base model's own weights"):
        hotswap_adapter(model, new, "default")
    assert_untouched(model, before)


def test_another_peft_type_is_refused_in_pefts_words(model, tmp_path):
    other = get_peft_model(LLAMA.base(), LoHaConfig(r=4, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "loha")
    before = snapshot(model)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and LOHA"):
        hotswap_adapter(model, tmp_path / "loha", "default")
    assert_untouched(model, before)


def test_another_base_model_is_refused(new):
    """An adapter for GPT-2 has nothing to say to a Llama, and one for a wider Llama does not fit."""
    gpt2 = KINDS["gpt2"]
    model = get_peft_model(gpt2.base(), LoraConfig(r=4, target_modules=list(gpt2.modules), fan_in_fan_out=True))
    before = snapshot(model)
    with pytest.raises(HotswapError, match="made for the same base model"):
        hotswap_adapter(model, new, "default")
    assert_untouched(model, before)


def test_a_merged_adapter_is_refused_in_pefts_words(model, new):
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match="Cannot hot-swap adapter 'default' because it is currently merged into"):
        hotswap_adapter(model, new, "default")
    assert_untouched(model, before)


def test_grouped_convolutions_need_ranks_that_their_groups_divide(tmp_path):
    kind = KINDS["conv"]
    model = load(kind, save_random_adapter(kind, tmp_path / "old", seed=1, r=4))
    adapter = Adapter.load(save_random_adapter(kind, tmp_path / "new", seed=2, r=8))
    tensors = dict(adapter.tensors)
    key = "base_model.model.grouped2d.lora_{}.weight"
    tensors[key.format("A")] = tensors[key.format("A")][:6].clone()
    tensors[key.format("B")] = torch.ones(8, 1, 1, 1)
    config = LoraConfig(r=8, rank_pattern={"grouped2d": 6})
    before = snapshot(model)
    with pytest.raises(HotswapError, match=r"rank 6|rank does not fit the grouped convolution grouped2d"):
        hotswap_adapter_from_state_dict(model, tensors, "default", config)
    assert_untouched(model, before)


def test_meta_tensors_are_refused(new):
    model = get_peft_model(LLAMA.base(), LoraConfig(r=4, target_modules=["q_proj"]), low_cpu_mem_usage=True)
    with pytest.raises(HotswapError, match="on the meta device"):
        hotswap_adapter(model, new, "default", add_layers=True)


def test_layers_are_not_added_to_a_compiled_model(tmp_path, new):
    old = save_random_adapter(LLAMA, tmp_path / "few", seed=1, r=4, target_modules=["q_proj"])
    wrapped = torch.compile(load(LLAMA, old), backend="eager")
    in_place = load(LLAMA, old)
    in_place.compile(backend="eager")
    partly = load(LLAMA, old)
    partly.get_base_model().model.layers[0].compile(backend="eager")
    for compiled in (wrapped, in_place, partly):
        with pytest.raises(HotswapError, match="can't be added to a compiled model"):
            hotswap_adapter(compiled, new, "default", add_layers=True)


def test_base_weights_saved_beside_an_embedding_adapter(tmp_path):
    """PEFT saves the embedding's own weights too, and a fresh load takes them over; the next swap gives them back."""
    import re

    from models import Kind

    kind = Kind(KINDS["llama"].make_random, KINDS["llama"].make_inputs, ("embed_tokens", "q_proj"))
    old = save_random_adapter(kind, tmp_path / "old", seed=1, r=4)
    new = save_random_adapter(kind, tmp_path / "new", seed=2, r=6)
    keys = load_file(f"{new}/adapter_model.safetensors").keys()
    assert any(re.search(r"embed_tokens\.base_layer\.weight$", key) for key in keys)
    model = load(kind, old)
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, kind, new)

    def change(tensors):
        tensors["base_model.model.model.embed_tokens.base_layer.weight"][0, 0] += 1

    edit_tensors(old, change)
    for folder in (old, new, old, old, new):
        hotswap_adapter(model, folder, "default")
        assert_equals_fresh_load(model, kind, folder)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = snapshot(model)
    with pytest.raises(HotswapError, match="comes with other base weights"):
        hotswap_adapter(model, old, "default")
    assert_untouched(model, before)


def test_layers_the_config_targets_but_the_file_lacks_are_noted(model, new):
    def drop(tensors):
        for key in [key for key in tensors if "v_proj" in key]:
            del tensors[key]

    edit_tensors(new, drop)
    plan = plan_hotswap(model, new)
    assert plan.ok
    assert plan.notes[0].startswith("the config targets 2 layers that the file has no tensors for")


def test_shared_blocks_must_agree(tmp_path):
    kind = KINDS["shared"]
    old = save_random_adapter(kind, tmp_path / "old", seed=1, r=4)
    new = save_random_adapter(kind, tmp_path / "new", seed=2, r=4)
    model = load(kind, old)
    key = "base_model.model.{}.0.lora_A.weight"
    edit_tensors(new, lambda tensors: tensors.update({key.format("late"): tensors[key.format("early")].clone()}))
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, kind, new)


@pytest.mark.parametrize("change", [torch.Tensor.half, lambda tensor: tensor + 1], ids=["dtype", "values"])
def test_shared_blocks_that_disagree_are_refused(tmp_path, change):
    """Which of the two a fresh load takes would make a difference."""
    kind = KINDS["shared"]
    model = load(kind, save_random_adapter(kind, tmp_path / "old", seed=1, r=4))
    new = save_random_adapter(kind, tmp_path / "new", seed=2, r=4)
    early, late = (f"base_model.model.{block}.0.lora_A.weight" for block in ("early", "late"))
    edit_tensors(new, lambda tensors: tensors.update({late: change(tensors[early])}))
    before = snapshot(model)
    with pytest.raises(HotswapError, match="two different values for one tensor"):
        hotswap_adapter(model, new, "default")
    assert_untouched(model, before)


def test_a_refusal_lists_everything_that_is_wrong(model, new):
    def change(tensors):
        for key in list(tensors):
            if key.endswith("lora_B.weight"):
                del tensors[key]

    edit_tensors(new, change)
    plan = plan_hotswap(model, new)
    assert len(plan.refusals) == 14
    assert not plan.ok
    assert "refused, 14 reasons; nothing is written" in str(plan)
    with pytest.raises(HotswapError, match="and 11 more"):
        plan.raise_if_refused()


@pytest.mark.parametrize("target_modules", [".*", ["self_attn", "q_proj"]])
def test_a_config_that_names_more_than_layers(tmp_path, target_modules):
    """The file's layers are right, but no fresh load takes its config, nor what would be saved with it."""
    kind = KINDS["llama"]
    old = save_random_adapter(kind, tmp_path / "old", seed=1, r=4, target_modules=["q_proj"])
    new = save_random_adapter(kind, tmp_path / "new", seed=2, r=4, target_modules=["q_proj"])
    path = tmp_path / "new" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": target_modules}))
    with pytest.raises(ValueError, match=r"^Target module Llama"):
        load(kind, new)
    for prepared in (False, True):
        model = load(kind, old)
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=8)
        before = snapshot(model)
        with pytest.raises(HotswapError, match=r"^Target module model"):
            hotswap_adapter(model, new, "default")
        assert_untouched(model, before)


@pytest.mark.parametrize("prepared", [False, True])
def test_bytes_are_counted_where_zeros_are_written(model, tmp_path, prepared):
    """Layers that are turned off, and the padding of a prepared model: all that is there is written."""
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    few = save_random_adapter(LLAMA, tmp_path / "few", seed=2, r=4, target_modules=["q_proj"])
    tensors = [each for name, each in model.named_parameters() if ".lora_" in name]
    assert plan_hotswap(model, few).nbytes == sum(each.nbytes for each in tensors)


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
    config, (other, compiles_again) = dict(r=4, lora_alpha=8, lora_dropout=0.1), CHANGES[change]
    old = save_random_adapter(LLAMA, tmp_path / "old", seed=1, **config)
    new = save_random_adapter(LLAMA, tmp_path / "new", seed=2, **config | other)
    assert plan_hotswap(torch.compile(load(LLAMA, old), backend="eager"), new).will_recompile == compiles_again
