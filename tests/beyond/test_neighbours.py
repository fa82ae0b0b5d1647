"""Swaps where something else goes by the same things: other adapters, the model's class, whoever made a plan."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from adapters import ALL, CONFIGS, LLAMA, kind_for, save_all, with_other_base_weights
from lengths import few_of, long
from lora_kinds import ATTENTION, MODELS
from models import ARCHITECTURES, KINDS, Kind, call, load
from oracle import (
    assert_close,
    assert_equals,
    assert_equals_fresh_load,
    assert_same_outputs,
    assert_untouched,
    snapshot,
)
from peft import AdaLoraConfig, AdaptionPromptConfig, IA3Config, LoHaConfig, LoraConfig, PeftMixedModel, RandLoraConfig
from refusals import refused
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from hotswap_lab import (
    AdapterPool,
    HotswapError,
    commit,
    hotswap_adapter,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    save_adapter,
    verify_hotswap,
)
from hotswap_lab.beyond import shards


def _lora(**arguments) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ATTENTION, **arguments})


def _two(kind: Kind, folder: str, other: str, name: str = "other"):
    """A model with another adapter next to the one that computes."""
    model = load(kind, folder)
    model.load_adapter(other, name)
    model.set_adapter("default")
    return model.requires_grad_(False)


def _refused(model, new: str, match: str, name: str = "default", **arguments) -> None:
    refused(match, hotswap_adapter, model, new, name, **arguments)


@pytest.mark.parametrize("mine", [dict(use_dora=True, modules_to_save=["lm_head"]), dict(bias="lora_only")])
def test_saving_beside_trained_tokens_of_another_adapter(tmp_path, mine):
    """PEFT 0.21 looks for tokens of this one, too, and fails; ours has none."""
    first, tokens, new = save_all(tmp_path, _lora(r=2), _lora(trainable_token_indices=[1, 2]), _lora(**mine))
    model = _two(LLAMA, first, tokens)
    hotswap_adapter(model, new, "default")
    save_adapter(model, tmp_path / "saved")
    assert_equals_fresh_load(load(LLAMA, str(tmp_path / "saved")), LLAMA, new)
    assert verify_hotswap(model, new, inputs=LLAMA.inputs(), base=LLAMA.base)


def test_buffers_that_are_not_saved(tmp_path):
    """Also on layers where another adapter was and this one was not."""
    everywhere, _, few = CONFIGS["PSOFT"]
    kind = kind_for("PSOFT")
    first, other, new = save_all(tmp_path, few, everywhere, everywhere, kind=kind)
    model = _two(kind, first, other)
    hotswap_adapter(model, new, "default", add_layers=True)
    assert_equals_fresh_load(model, kind, new, margin=10)


@pytest.mark.skipif("Lily" not in CONFIGS, reason="this version of PEFT has no Lily")
def test_what_layers_share_where_at_first_only_another_adapter_is(tmp_path):
    """The first of them gets what the second has, which stays the same object."""
    everywhere = CONFIGS["Lily"][0]
    one_layer = dataclasses.replace(everywhere, layers_to_transform=[1])
    model = _two(LLAMA, *save_all(tmp_path, one_layer, everywhere))
    (new,), before = save_all(tmp_path, everywhere), dict(model.named_parameters(remove_duplicate=False))
    hotswap_adapter(model, new, "default", add_layers=True)
    assert_equals_fresh_load(model, LLAMA, new, margin=10)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert [name for name in before if after[name] is not before[name]] == []


@pytest.mark.parametrize(("mine", "other", "new"), [(1, 1, 0), (0, 0, 1)])
def test_layers_that_fail_without_the_active_adapter(tmp_path, mine, other, new):
    """LN tuning looks for the active adapter wherever any adapter is; after the swap one would be missing there."""
    folders = save_all(tmp_path, *CONFIGS["LNTuning"][:2])
    model = _two(LLAMA, folders[mine], folders[other])
    match = "a layer that fails, unlike a fresh one, where the active adapter is not on it"
    _refused(model, folders[new], match, add_layers=True)
    model.delete_adapter("other")
    hotswap_adapter(model, folders[new], "default", add_layers=True)
    assert_equals_fresh_load(model, LLAMA, folders[new], margin=10)


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("more", [dict(use_dora=True), long(dict(lora_bias=True))])
def test_layers_are_added_where_a_plain_adapter_is(tmp_path, more, is_prepared):
    """DoRA and biases are more than tensors: what makes the layer compute them comes with them."""
    bert = MODELS["bert"]
    first, other, new = save_all(
        tmp_path,
        _lora(target_modules=["query"], **more),
        _lora(target_modules=["query", "value"]),
        _lora(r=8, target_modules=["query", "value"], **more),
        kind=bert,
    )
    model, fresh = _two(bert, first, other), _two(bert, new, other)
    if is_prepared:
        prepare_model_for_compiled_hotswap(model, adapters=[new], adapter_name="default")
    hotswap_adapter(model, new, "default", add_layers=True)
    for name in ("other", "default"):
        for each in (model, fresh):
            each.set_adapter(name)
        assert_equals(model, fresh, bert, name, prepared=is_prepared, margin=10)
    for layer, expected in zip(model.modules(), fresh.modules(), strict=True):
        if hasattr(expected, "adapter_layer_names"):
            assert set(layer.adapter_layer_names) == set(expected.adapter_layer_names)


EMBEDDED = [_lora(target_modules=["q_proj"]), _lora(target_modules=["embed_tokens", "q_proj"])]


def test_embeddings_that_peft_overwrote_at_the_first_load(tmp_path):
    """They are turned off only where the adapter that PEFT loaded was not on them."""
    plain, embedded = save_all(tmp_path, *EMBEDDED)
    changed, match = with_other_base_weights(embedded, tmp_path / "changed"), "original values are unknown"
    model = load(LLAMA, changed)
    prepare_model_for_compiled_hotswap(model, adapters=[plain, embedded])
    _refused(model, plain, match)
    hotswap_adapter(model, plain, "default", base_weights=LLAMA.base().state_dict())
    assert_equals_fresh_load(model, LLAMA, plain, margin=10, prepared=True)
    model = load(LLAMA, changed)
    refused(match, AdapterPool(load(LLAMA, changed), progress=False).add, "plain", plain)
    _refused(model, plain, match, add_layers=True)
    hotswap_adapter(model, plain, "default", add_layers=True, base_weights=LLAMA.base().state_dict())
    assert_equals_fresh_load(model, LLAMA, plain, margin=10)
    hotswap_adapter(model, changed, "default", add_layers=True)
    assert_equals_fresh_load(model, LLAMA, changed, margin=10)
    save_adapter(model, tmp_path / "again")
    assert_same_outputs(model, load(LLAMA, str(tmp_path / "again")), LLAMA)


def test_embeddings_that_only_another_adapter_is_on(tmp_path):
    """What PEFT has overwritten there is not this one's to give back."""
    plain, embedded, new = save_all(tmp_path, *EMBEDDED, _lora(use_dora=True))
    model = _two(LLAMA, plain, embedded)
    hotswap_adapter(model, new, "default", add_layers=True)
    assert_equals_fresh_load(model, LLAMA, new, margin=10)


@pytest.mark.parametrize("is_prepared", [long(False), True])
def test_embeddings_that_no_file_has_overwritten(tmp_path, is_prepared):
    """An adapter on embeddings was swapped in, with the base's own weights: nothing is lost when it goes."""
    plain, embedded, more = save_all(tmp_path, *EMBEDDED, _lora(r=2, target_modules=["embed_tokens", "q_proj"]))
    model = load(LLAMA, plain)
    if is_prepared:
        prepare_model_for_compiled_hotswap(model, adapters=[plain, embedded])
    for folder in (embedded, more, plain, embedded, plain):
        hotswap_adapter(model, folder, "default", add_layers=True)
        assert_equals_fresh_load(model, LLAMA, folder, margin=10, prepared=is_prepared)


DAMAGES = {"shape": lambda value: value[:1], "integers": torch.Tensor.int, "a list": torch.Tensor.tolist}


@pytest.mark.parametrize("damage", DAMAGES)
def test_base_weights_are_checked(tmp_path, damage):
    bert, configs = MODELS["bert"], [_lora(target_modules=["query"], bias=bias) for bias in ("all", "none")]
    everything, plain = save_all(tmp_path, *configs, kind=bert)
    weights = {key: DAMAGES[damage](value) for key, value in bert.base().state_dict().items()}
    _refused(load(bert, everything), plain, "does not fit the base model", base_weights=weights)


def _ia3(feedforward: list) -> IA3Config:
    return IA3Config(target_modules=["down_proj"], feedforward_modules=feedforward)


PROMPT = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
RANDLORA = [RandLoraConfig(r=rank, target_modules=ALL) for rank in (4, 4, 8)]


MIXTRAL = ARCHITECTURES["mixtral"]
EXPERTS = _lora(target_parameters=["experts.gate_up_proj"]), _lora(), _lora(target_parameters=["experts.down_proj"])
QUERY, VALUE = (_lora(target_modules=[module]) for module in ("query", "value"))
#: the model, its two adapters, the one that is swapped in, and why it is refused
SHARED = {
    "IA3": (LLAMA, _ia3(["down_proj"]), _ia3(["down_proj"]), _ia3([]), "found: "),
    "RandLora": (LLAMA, *RANDLORA, "found: "),
    "AdaptionPrompt": (LLAMA, *[PROMPT] * 3, "found: "),
    "a parameter": (MIXTRAL, *EXPERTS, "a ParamWrapper that stays there, where a ParamWrapper would have to be put"),
    "biases": (MODELS["bert"], QUERY, VALUE, _lora(target_modules=["query"], bias="all"), "other adapters use, too"),
}


@pytest.mark.parametrize("what", SHARED)
def test_what_other_adapters_use_is_not_changed(tmp_path, what):
    """Some methods keep a flag or a table on the layer for all adapters; biases of the base are for all of them."""
    kind, *configs, match = SHARED[what]
    first, second, new = save_all(tmp_path, *configs, kind=kind)
    model = load(kind, first, "x")
    model.load_adapter(second, "y")
    expected = call(model, kind.inputs())
    _refused(model, new, match, "y", add_layers=True)
    assert torch.equal(call(model, kind.inputs()), expected)


def test_adaption_prompts_that_are_disabled(tmp_path):
    """PEFT has taken them out of the model."""
    old, new = save_all(tmp_path, *CONFIGS["AdaptionPrompt"])
    (model := load(LLAMA, old)).base_model.disable_adapter_layers()
    _refused(model, new, "can be swapped only while it is in the model")


def _merged(model):
    """The base weights contain the other adapter."""
    model.set_adapter("other")
    model.merge_adapter(["other"])
    return model


def _without(model):
    model.unmerge_adapter()
    model.set_adapter("default")
    return model


MERGED = "Cannot hot-swap adapter 'default' while 'other' is merged"
#: swaps that start from the base weights
FROM_BASE = {name: (*CONFIGS[name][:2], CONFIGS[name][0]) for name in ("PSOFT", "Adamss") if name in CONFIGS}


@pytest.mark.parametrize("name", few_of(FROM_BASE, ("PSOFT",)))
def test_the_base_weights_contain_another_adapter(tmp_path, name):
    """Merged before the swap, or between a plan and its commit."""
    kind = kind_for(name)
    old, new, other = save_all(tmp_path, *FROM_BASE[name], kind=kind)
    model = _merged(_two(kind, old, other))
    refused(MERGED, hotswap_adapter, model, new, "default")
    plan = plan_hotswap(_without(model), new)
    _merged(model)
    refused(MERGED, commit, plan)
    hotswap_adapter(_without(model), new, "default")
    # in float32, what was merged and taken out again leaves the base weights rounded
    tolerance = 1e-5 if kind.dtype == torch.float32 else None
    assert_same_outputs(model, load(kind, new), kind, tolerance, margin=10)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (_lora(), _lora(r=2, target_modules=["q_proj"])),
        (_lora(), _lora(modules_to_save=["lm_head"])),
        (_lora(use_dora=True), _lora(target_modules=["q_proj"])),
        (_lora(use_dora=True), _lora(use_dora=True, target_modules=["q_proj"])),
        (_lora(use_dora=True), _lora(lora_bias=True)),  # as many tensors in a layer, and other ones
        (_lora(use_dora=True), _lora(use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    ],
)
def test_what_needs_no_base_weight_is_swapped_beside_a_merged_adapter(tmp_path, old, new):
    old, new, other = save_all(tmp_path, old, new, _lora())
    model = _merged(_two(LLAMA, old, other))
    hotswap_adapter(model, new, "default")
    assert_close(call(_without(model), LLAMA.inputs()), call(load(LLAMA, new), LLAMA.inputs()))


def test_a_room_while_another_adapter_is_merged(tmp_path):
    everywhere, fewer = _lora(use_dora=True), _lora(use_dora=True, target_modules=["q_proj"])
    old, few, same, other = save_all(tmp_path, everywhere, fewer, _lora(r=2, use_dora=True), _lora())
    model = _merged(_two(LLAMA, few, other))
    pool = AdapterPool(model, adapters={"few": few, "old": old}, progress=False)
    for number, folder in enumerate((old, few, same)):
        pool.add(f"another {number}", folder)
        pool.swap(f"another {number}")
        assert_close(call(_without(model), LLAMA.inputs()), call(load(LLAMA, folder), LLAMA.inputs()))
        _merged(model)


LOHA = [LoHaConfig(r=rank, target_modules=ATTENTION) for rank in (4, 6)]
#: by what a swap does: the loaded adapter and the new one
SWAPS = {
    "values": (_lora(), _lora()),
    "ranks": (_lora(), _lora(r=6)),
    "ranks of DoRA": (_lora(use_dora=True), _lora(r=6, use_dora=True)),
    "ranks of LoHa": LOHA,
    "wraps": (_lora(), _lora(modules_to_save=["lm_head"])),
    "unwraps": (_lora(modules_to_save=["lm_head"]), _lora()),
    "adds tables": (_lora(target_modules=["q_proj"]), _lora(use_dora=True)),
    "adds layers": (_lora(target_modules=["q_proj"]), _lora(r=2)),
    "adds other layers": (LoHaConfig(r=4, target_modules=["q_proj"]), LOHA[0]),
}


def _load_again(model, folder: str) -> None:
    model.delete_adapter("second")
    model.load_adapter(folder, "second")


#: what is done between a plan and its commit, to the model, with the folder of its second adapter or with the plan
NEIGHBOURS = {
    "another is loaded": lambda model, folder: model.load_adapter(folder, "other"),
    "another is deleted": lambda model, folder: model.delete_adapter("second"),
    "another is loaded anew": _load_again,
    "another is active": lambda model, folder: model.set_adapter("second"),
}
STALE = {
    "committed already": lambda model, plan: commit(plan),
    "merged": lambda model, plan: model.merge_adapter(),
    "unloaded": lambda model, plan: model.unload(),
    "prepared": lambda model, plan: prepare_model_for_compiled_hotswap(model, target_rank=8),
}


@pytest.mark.parametrize("change", [*NEIGHBOURS, *STALE])
@pytest.mark.parametrize("swap", few_of(SWAPS, ("wraps",)))
def test_a_plan_is_for_the_model_as_it_was(tmp_path, swap, change):
    """A plan that changes wrappers is for the adapters that were there, too."""
    loaded, new = SWAPS[swap]
    other = copy.deepcopy(loaded)
    other.target_modules = ["k_proj"]
    folders = save_all(tmp_path, loaded, new, other)
    model = _two(LLAMA, folders[0], folders[2], "second")
    plan = plan_hotswap(model, folders[1], add_layers=True)
    assert plan.ok
    (NEIGHBOURS | STALE)[change](model, folders[2] if change in NEIGHBOURS else plan)
    before = snapshot(model)
    try:
        commit(plan)
        assert change not in STALE
    except HotswapError:
        assert_untouched(model, before)
        refused("The model has changed since this swap was planned", commit, plan)
        return
    model.set_adapter("default")
    assert_equals_fresh_load(model, LLAMA, folders[1], margin=10, activated=True)


def test_a_plan_of_another_method_compares_with_what_is_there_now(tmp_path):
    folders = save_all(tmp_path, *LOHA)
    model = load(LLAMA, folders[0], is_trainable=True)
    plan = plan_hotswap(model, folders[1])
    for each in model.parameters():
        each.data.add_(0.1) if each.requires_grad else None
    commit(plan)
    assert_equals_fresh_load(model, LLAMA, folders[1], margin=10, is_trainable=True)


def test_a_plan_for_values_and_ranks_does_not_mind_other_adapters(tmp_path):
    folders = save_all(tmp_path, _lora(), _lora(r=2), _lora(r=6))
    model = load(LLAMA, folders[0])
    plan = plan_hotswap(model, folders[1])
    model.load_adapter(folders[2], "other")
    commit(plan)
    assert_equals_fresh_load(model, LLAMA, folders[1], margin=10)
    model.set_adapter("other")
    assert_same_outputs(model, load(LLAMA, folders[2], "other"), LLAMA, margin=10)


@pytest.mark.parametrize(
    ("loaded", "new"), [LOHA, (_lora(), _lora(modules_to_save=["lm_head"])), (_lora(), _lora(r=8))]
)
def test_models_that_are_trained_in_parallel(tmp_path, loaded, new):
    """New parameters, or new shapes, would not be averaged any more."""
    old, new = save_all(tmp_path, loaded, new)
    model = load(LLAMA, old, is_trainable=True)
    hotswap_adapter(model, old, "default")  # while there is one process, which is not remembered
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        refused("would no longer average the gradients", hotswap_adapter, parallel, new, "default")
        parallel.requires_grad_(False)
        hotswap_adapter(parallel, new, "default")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("more", [{}, dict(use_dora=True)])
def test_what_each_of_several_processes_may_do_alone(tmp_path, more):
    """Where nothing is spread over them: other values, layers off and on. Other code has hooks of its own there."""
    old, new, few = save_all(tmp_path, _lora(**more), _lora(**more), _lora(target_modules=["q_proj"], **more))
    model = load(LLAMA, old, is_trainable=not more)
    for hook in (lambda *_: None, lambda *_: old):
        [each.register_load_state_dict_post_hook(hook) for each in model.modules()]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = model if more else DistributedDataParallel(model)
        for folder in (new, few, new):
            hotswap_adapter(parallel, folder, "default")
            assert_same_outputs(model, load(LLAMA, folder), LLAMA, margin=10)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("config", [_lora(), LOHA[0]])
def test_a_pytorch_without_processes(tmp_path, monkeypatch, config):
    old, new = save_all(tmp_path, config, config)
    model = load(LLAMA, old)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    monkeypatch.setattr(shards, "DTensor", None)
    hotswap_adapter(model, new)
    monkeypatch.undo()
    assert_equals_fresh_load(model, LLAMA, new, margin=10)


def test_the_budget_of_adalora_follows(tmp_path):
    configs = (AdaLoraConfig(init_r=6, target_r=each, total_step=20, target_modules=ALL) for each in (2, 4))
    folders = save_all(tmp_path, *configs)
    model, fresh = (load(LLAMA, folder, is_trainable=True) for folder in folders)
    hotswap_adapter(model, folders[1], "default")
    live, expected = model.base_model.rankallocator, fresh.base_model.rankallocator
    for name in ("init_bgt", "target_bgt", "name_set"):
        assert getattr(live, name) == getattr(expected, name)
    assert live.peft_config is model.peft_config["default"]


def test_a_prepared_model_takes_its_own_state_dict(tmp_path):
    folders = save_all(tmp_path, _lora(use_dora=True), _lora(use_dora=True, target_modules=["q_proj"]))
    model = load(LLAMA, folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, folders[1], "default")
    model.load_state_dict(model.state_dict())
    assert_equals_fresh_load(model, LLAMA, folders[1], prepared=True, margin=10)
    model.load_adapter(folders[0], "other")
    assert_equals_fresh_load(model, LLAMA, folders[1], prepared=True, margin=10)


@pytest.mark.parametrize("name", ["LoHa", long("HiRA"), long("AdaLoRA"), "SEQ_CLS"])
def test_an_adapter_that_is_loaded_where_a_prepared_one_was_deleted(tmp_path, name):
    kind = MODELS["classifier"] if name == "SEQ_CLS" else LLAMA
    configs = CONFIGS[name][::2] if name in CONFIGS else [_lora(task_type="SEQ_CLS"), _lora(r=2, task_type="SEQ_CLS")]
    folders = save_all(tmp_path, *copy.deepcopy(configs), kind=kind)
    model = load(kind, folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, folders[1], "default")
    model.load_adapter(folders[0], "other")
    model.set_adapter("other")
    model.delete_adapter("default")
    model.load_adapter(folders[0], "default")
    model.set_adapter("default")
    assert_same_outputs(model, load(kind, folders[0]), kind, margin=10)
    hotswap_adapter(model, folders[1], "default")
    assert_same_outputs(model, load(kind, folders[1]), kind, margin=10)


@pytest.mark.parametrize("name", ["PromptTuning", "PTuning", "AdaptionPrompt"])
def test_models_loaded_in_inference_mode(tmp_path, name):
    old, new = save_all(tmp_path, *CONFIGS[name][:2])
    with torch.inference_mode():
        model = load(LLAMA, old)
        hotswap_adapter(model, new, "default", add_layers=True)
        assert_same_outputs(model, load(LLAMA, new), LLAMA, margin=10)


def test_mixed_models(tmp_path):
    """A layer of another method may be put around one that is there, as PEFT does it."""
    kind = KINDS["linear"]
    configs = [LoHaConfig(r=4, target_modules=list(kind.modules)), LoHaConfig(r=2, target_modules=["last"])]
    many, few = save_all(tmp_path, *configs, kind=kind)
    model = PeftMixedModel(kind.base(), LoraConfig(target_modules=["first"], r=2), "lora")
    model.load_adapter(many, "loha")
    for folder in (few, many, few):
        hotswap_adapter(model, folder, "loha", add_layers=True)
        model.set_adapter("loha")
        assert_same_outputs(model.eval(), load(kind, folder), kind)


def test_a_mixed_model_that_saves_a_module(tmp_path):
    """PEFT puts no layer around that."""
    kind = KINDS["linear"]
    one, more = save_all(tmp_path, *(LoHaConfig(r=4, target_modules=each) for each in (["first"], ["last"])), kind=kind)
    model = PeftMixedModel(kind.base(), LoraConfig(target_modules=["first"], modules_to_save=["last"]), "lora")
    model.load_adapter(one, "loha")
    _refused(model, more, "a ModulesToSaveWrapper that stays there", "loha", add_layers=True)


def _older_mixtral(folder, seed: int, rank: int) -> str:
    """A file from before transformers 5: a layer for each matrix of each expert, where there is one parameter now."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, (rows, columns) in {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}.items():
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{path}.lora_A.weight"] = 0.3 * torch.randn(rank, columns, generator=generator)
                tensors[f"{path}.lora_B.weight"] = 0.3 * torch.randn(rows, rank, generator=generator).abs()
    LoraConfig(r=rank, target_modules=["w1", "w2", "w3"], inference_mode=True).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_adapters_of_older_versions_of_transformers(tmp_path):
    """PEFT converts their names and shapes at a load, and so at a swap."""
    kind = ARCHITECTURES["mixtral"]
    first, second = (_older_mixtral(tmp_path / f"rank{rank}", rank, rank) for rank in (4, 8))
    (plain,) = save_all(tmp_path, _lora(), kind=kind)
    model = load(kind, plain)
    plan = plan_hotswap(model, first)
    assert (plan.ok, plan.add_layers) == (False, False)
    for folder in (first, second, plain, second, first):
        hotswap_adapter(model, folder, "default", add_layers=True)
        assert_equals_fresh_load(model, kind, folder, margin=10)


def test_several_active_adapters(tmp_path):
    """Each is swapped while both compute."""
    configs = _lora(use_dora=True), _lora(r=2, target_modules=["v_proj", "o_proj"]), _lora(r=8), _lora(r=3)
    folders = save_all(tmp_path, *configs)
    model, fresh = (load(LLAMA, folders[first], "a") for first in (0, 2))
    model.load_adapter(folders[1], "b")
    fresh.load_adapter(folders[3], "b")
    for each in (model, fresh):
        each.base_model.set_adapter(["a", "b"])
        each.eval()
    hotswap_adapter(model, folders[2], "a")
    hotswap_adapter(model, folders[3], "b", add_layers=True)
    assert_equals(model, fresh, LLAMA, "a")


@pytest.mark.parametrize("config", [_lora(), LoHaConfig(r=4, target_modules=ATTENTION)])
def test_autograd_notices_a_swap(tmp_path, config):
    """Between a forward and its backward: the weights that were saved for it are gone."""
    folders = save_all(tmp_path, config, config)
    model = load(LLAMA, folders[0], is_trainable=True)
    loss = model(**LLAMA.inputs()).logits.square().sum()
    hotswap_adapter(model, folders[1], "default")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
