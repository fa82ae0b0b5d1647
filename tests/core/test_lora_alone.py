"""An engine is what its composition names: here, LoRA alone."""

from __future__ import annotations

import pickle

import pytest
from models import KINDS, load, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_outputs
from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights

from hotswap_lab import HotswapError
from hotswap_lab.core import planner, prepare, swap
from hotswap_lab.core.adapter import Adapter
from hotswap_lab.core.engine import Engine
from hotswap_lab.core.lora import Lora
from hotswap_lab.engine import ENGINE


def read(folder, only_config=False, **_):
    tensors = {} if only_config else load_peft_weights(folder)
    return Adapter(PeftConfig.from_pretrained(folder), tensors, folder)


LORA_ALONE = Engine(
    methods=(Lora(),),
    passes=(
        (planner.complete_config, planner.check_slot),
        (planner.plan_layers, planner.plan_leftovers, planner.check_capacity, planner.check_compiled),
    ),
    read=read,
)


@pytest.mark.parametrize("prepared", [False, True])
def test_an_engine_of_lora_alone_swaps(prepared, tmp_path):
    kind = KINDS["llama"]
    old, new = (save_random_adapter(kind, tmp_path / str(rank), rank, r=rank) for rank in (4, 2))
    model = load(kind, old)
    if not prepared:
        swap.hotswap_adapter(LORA_ALONE, model, new, "default")
        assert_equals_fresh_load(model, kind, new)
        return
    prepare.prepare_model_for_compiled_hotswap(LORA_ALONE, model, adapters=[old, new])
    swap.hotswap_adapter(LORA_ALONE, model, new, "default")
    assert_same_outputs(model, load(kind, new), kind)  # state dicts are looked after by another part of the package


def test_it_knows_nothing_else(tmp_path):
    kind = KINDS["llama"]
    old = save_random_adapter(kind, tmp_path / "old", 1, r=4)
    dora = save_random_adapter(kind, tmp_path / "dora", 2, r=4, use_dora=True)
    model = load(kind, old)
    with pytest.raises(HotswapError, match="lora_magnitude_vector"):
        swap.hotswap_adapter(LORA_ALONE, model, dora, "default")
    assert_equals_fresh_load(model, kind, old)


def test_each_engine_finds_its_own_slots(tmp_path):
    kind = KINDS["llama"]
    folders = [save_random_adapter(kind, tmp_path / str(seed), seed, r=4) for seed in (1, 2, 3)]
    model = load(kind, folders[0])
    for engine, folder in ((LORA_ALONE, folders[1]), (ENGINE, folders[2])):
        swap.hotswap_adapter(engine, model, folder, "default")
        assert swap.plan_hotswap(engine, model, folder).slot.engine is engine
    assert_equals_fresh_load(model, kind, folders[2])


def test_the_public_functions_can_be_sent_to_another_process():
    again = pickle.loads(pickle.dumps(ENGINE.hotswap_adapter))
    assert again.__func__ is ENGINE.hotswap_adapter.__func__
    assert [type(each) for each in again.__self__.methods] == [type(each) for each in ENGINE.methods]


def test_no_pass_is_there_twice():
    passes = [each for group in ENGINE.passes for each in group]
    assert len(set(passes)) == len(passes)
