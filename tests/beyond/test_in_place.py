"""What a swap by a donor promises beside being right: nothing half done, nothing left behind, nothing copied."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from adapters import CONFIGS, kind_for, save_random_adapter_of
from faults import list_steps, run_with_fault
from lengths import few_of, long
from lora_kinds import ATTENTION, LLAMA, MODELS
from models import call, load
from oracle import assert_equals_fresh_load, assert_same_outputs, assert_untouched, snapshot
from peft import LoHaConfig, LoraConfig, PeftModel, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from refusals import refused
from safetensors.torch import load_file

from hotswap_lab import (
    AdapterPool,
    RecompileWatch,
    commit,
    get_strength,
    hotswap_adapter,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    set_strength,
)


def _pair(name: str, tmp_path, first: int = 0, second: int = 1) -> tuple[str, str]:
    kind = kind_for(name)
    return tuple(
        save_random_adapter_of(CONFIGS[name][number], tmp_path / f"{name}{number}", number + 1, kind)
        for number in (first, second)
    )


HEADS = [
    LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"]),
    LoraConfig(r=6, target_modules=["q_proj"], use_dora=True, modules_to_save=["embed_tokens"]),
]

#: the module whose first line says that what was decided is being written from here on
WRITING = "core/journal.py"
#: a commit of VeRA has ten thousand lines
FAULTY = ("VeRA", "LNTuning", "IA3", "heads")


@pytest.mark.parametrize(
    ("name", "every"), [("LNTuning", 11), *(long(name, 31 if name == "VeRA" else 3) for name in FAULTY)]
)
def test_a_fault_at_every_line_of_a_commit(tmp_path, name, every):
    """Shapes, tables, wrappers that come and go: all of it is undone."""
    if name == "heads":
        old, new = (save_random_adapter_of(each, tmp_path / str(number), number) for number, each in enumerate(HEADS))
    else:
        old, new = _pair(name, tmp_path)
    planned = plan_hotswap(load(LLAMA, old, is_trainable=True), new, add_layers=True)
    places = list_steps(lambda: commit(planned), "line")
    writing = next(number for number, place in enumerate(places, 1) if place.startswith(WRITING))
    model = load(LLAMA, old, is_trainable=True)
    model(**LLAMA.inputs()).logits.sum().backward()
    before, faults = snapshot(model), 0
    # what a commit decides once more, before it writes, is looked through by the next test
    for step in (*range(1, writing, 30 * every), *range(writing, len(places) + 1, every)):
        plan = plan_hotswap(model, new, add_layers=True)
        assert plan.ok
        run_with_fault(lambda plan=plan: commit(plan), step)
        if model.peft_config["default"] is plan.config:
            break  # everything was written before this line
        assert_untouched(model, before)
        faults += 1
    else:
        commit(plan_hotswap(model, new, add_layers=True))
    assert faults > 60 // every
    assert_equals_fresh_load(model, LLAMA, new, margin=10, is_trainable=True)


def test_the_base_model_is_neither_copied_nor_kept_twice(tmp_path):
    """The stand-in is gone after the swap, and the base's parameters are the same objects in the same memory."""
    old, new = _pair("VBLoRA", tmp_path)
    base = LLAMA.base()
    own = {name: (id(each), each.data_ptr(), each.requires_grad) for name, each in base.named_parameters()}
    model = PeftModel.from_pretrained(base, old).eval()
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    plan = plan_hotswap(model, new, add_layers=True)
    hotswap_adapter(model, new, "default", add_layers=True)
    del plan
    after = {name.replace("base_layer.", ""): each for name, each in model.get_base_model().named_parameters()}
    for name, (identity, address, _) in own.items():
        assert (id(after[name]), after[name].data_ptr()) == (identity, address), name
    assert flags == {name: each.requires_grad for name, each in model.named_parameters()}


def test_nothing_of_the_donor_stays(tmp_path):
    """Only what is in the model now, and none of the modules that stood in for its base."""
    from hotswap_lab.beyond import donor

    old, new = _pair("LNTuning", tmp_path, 1, 0)
    model, made = load(LLAMA, old), []
    original = donor.make_stand_in

    def watched(base):
        stand_in = original(base)
        made.extend(weakref.ref(module) for module in stand_in.model.modules())
        return stand_in

    donor.make_stand_in = watched
    try:
        hotswap_adapter(model, new, "default")
    finally:
        donor.make_stand_in = original
    gc.collect()
    assert len(made) > 20
    assert not [each() for each in made if each() is not None]


@pytest.mark.parametrize("name", few_of(["LoHa", "OFT", "IA3", "VeRA", "LNTuning", "HRA"], ["IA3"]))
def test_in_a_compiled_model_values_change_and_nothing_else(tmp_path, name):
    """The same config: no recompile. Another one: refused, untouched, since the graph would have to change."""
    kind = kind_for(name)
    first, other = _pair(name, tmp_path)
    same = save_random_adapter_of(CONFIGS[name][0], tmp_path / "same", 9, kind)
    torch._dynamo.reset()
    model = torch.compile(load(kind, first), backend="aot_eager")
    call(model, kind.inputs())
    with RecompileWatch(allow=0):
        for folder in (same, first, same):
            hotswap_adapter(model, folder, "default")
            assert_same_outputs(model, load(kind, folder), kind, margin=10)
    refused("can't be done in a compiled model", hotswap_adapter, model, other, "default", add_layers=True)


@pytest.mark.long
def test_saved_modules_in_a_compiled_model(tmp_path):
    """A classifier beside the LoRA: both are swapped without a recompile."""
    kind = MODELS["classifier"]
    config = LoraConfig(r=4, target_modules=ATTENTION, task_type="SEQ_CLS")
    folders = [save_random_adapter_of(config, tmp_path / str(seed), seed, kind) for seed in (1, 2, 3)]
    torch._dynamo.reset()
    model = torch.compile(load(kind, folders[0]), backend="aot_eager")
    call(model, kind.inputs())
    with RecompileWatch(allow=0):
        for number in (1, 2, 0, 2):
            hotswap_adapter(model, folders[number], "default")
            assert_same_outputs(model, load(kind, folders[number]), kind)


def test_what_a_prepared_model_was_not_prepared_for_is_refused(tmp_path):
    plain = save_random_adapter_of(LoraConfig(r=4, target_modules=ATTENTION), tmp_path / "plain", 1)
    model = load(LLAMA, plain)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = snapshot(model)
    for number, config in enumerate((HEADS[0], LoraConfig(r=4, target_modules=ATTENTION, use_dora=True))):
        new = save_random_adapter_of(config, tmp_path / str(number), 2)
        refused("can't be done in a prepared model", hotswap_adapter, model, new, "default")
        assert_untouched(model, before)


def test_a_merged_adapter_is_refused(tmp_path):
    old, new = _pair("LoHa", tmp_path)
    model = load(LLAMA, old)
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match="Cannot hot-swap adapter 'default' because it is currently merged into"):
        hotswap_adapter(model, new, "default")
    assert_untouched(model, before)


def test_strengths_are_for_lora(tmp_path):
    old, _ = _pair("LoHa", tmp_path)
    dora = save_random_adapter_of(LoraConfig(r=4, target_modules=ATTENTION, use_dora=True), tmp_path / "dora", 1)
    for folder in (old, dora):
        model = load(LLAMA, folder)
        refused("strength of 'default' can't be set", set_strength, model, 0.5)
    assert get_strength(model) == 1
    pool = AdapterPool(model, adapters={"dora": dora}, progress=False)
    for change in (pool.off, lambda: pool.swap("dora", strength=0.5)):
        refused("strength of 'default' can't be set", change)


def test_pools_are_for_lora(tmp_path):
    old, new = _pair("LoHa", tmp_path)
    model = load(LLAMA, old)
    refused("A pool is for adapters of type LORA", AdapterPool, model, adapters={"new": new}, progress=False)


def test_a_pool_does_not_take_another_method(tmp_path):
    plain = save_random_adapter_of(LoraConfig(r=4, target_modules=ATTENTION), tmp_path / "plain", 1)
    loha, _ = _pair("LoHa", tmp_path)
    model = load(LLAMA, plain)
    pool = AdapterPool(model, adapters={"plain": plain}, progress=False)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and LOHA"):
        pool.add("loha", loha)


def test_injected_adapters(tmp_path):
    """Without a PeftModel: in the model itself, as transformers' and diffusers' own loading leaves it."""
    folders = _pair("LoHa", tmp_path)

    def inject(folder: str):
        model = LLAMA.base()
        inject_adapter_in_model(LoHaConfig.from_pretrained(folder), model, "default")
        tensors = load_file(f"{folder}/adapter_model.safetensors")
        tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
        set_peft_model_state_dict(model, tensors, "default")
        return model.eval()

    model = inject(folders[0])
    hotswap_adapter(model, folders[1], "default")
    assert_same_outputs(model, load(LLAMA, folders[1]), LLAMA)
    assert_same_outputs(model, inject(folders[1]), LLAMA)
    assert model.peft_config["default"].r == 6


def test_inactive_adapters_stay_inactive(tmp_path):
    old, new = (save_random_adapter_of(each, tmp_path / str(number), number) for number, each in enumerate(HEADS))
    active = save_random_adapter_of(LoraConfig(r=4, target_modules=["v_proj"]), tmp_path / "active", 5)
    model = load(LLAMA, active, "active")
    model.load_adapter(old, "default")
    hotswap_adapter(model, new, "default", add_layers=True)
    assert model.active_adapters == ["active"]
    assert_same_outputs(model, load(LLAMA, active), LLAMA)
    model.set_adapter("default")
    assert_equals_fresh_load(model, LLAMA, new, margin=10, activated=True)
    with model.disable_adapter():
        torch.testing.assert_close(call(model, LLAMA.inputs()), call(LLAMA.base(), LLAMA.inputs()))


@pytest.mark.parametrize("way", ["plain", "prepared", "pool", "with a head"])
def test_what_dora_has_cached_is_forgotten(tmp_path, monkeypatch, way):
    """PEFT can keep a weight's norm between forwards; after a swap it is another one's."""
    monkeypatch.setattr("peft.tuners.lora.dora.ENABLE_DORA_CACHING", True)
    head = dict(modules_to_save=["lm_head"]) if way == "with a head" else {}
    config = LoraConfig(r=4, target_modules=ATTENTION, use_dora=True, **head)
    folders = [save_random_adapter_of(config, tmp_path / str(seed), seed) for seed in (1, 2)]
    model = load(LLAMA, folders[0])
    if way == "prepared":
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    if way == "pool":
        pool = AdapterPool(model, adapters={"0": folders[0], "1": folders[1]}, progress=False)
    for number in (1, 0, 1):
        call(model, LLAMA.inputs())
        if way == "pool":
            pool.swap(str(number))
        else:
            hotswap_adapter(model, folders[number], "default")
        assert_same_outputs(model, load(LLAMA, folders[number]), LLAMA)
