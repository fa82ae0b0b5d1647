"""LoRA alone: a shorter list of passes, and core's own method."""

from __future__ import annotations

import pytest
from models import KINDS, load, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_outputs

from hotswap_lab import Adapter, HotswapError, hotswap_adapter, prepare_model_for_compiled_hotswap
from hotswap_lab.beyond.passes import METHODS, make_plan
from hotswap_lab.core import planner
from hotswap_lab.core.change import apply
from hotswap_lab.core.host import find_host
from hotswap_lab.core.lora import Lora
from hotswap_lab.core.prepare import changes_to_prepare
from hotswap_lab.core.slot import slot_for
from hotswap_lab.swap import carry_out

KIND = KINDS["llama"]
LORA = (Lora(),)
PASSES = (
    planner.complete_config,
    planner.check_slot,
    planner.stop_if_refused,
    *(planner.plan_layers, planner.plan_leftovers, planner.check_capacity, planner.check_compiled),
)


def swap(model, folder):
    slot = slot_for(LORA, find_host(model, "default"), "default")
    carry_out([make_plan(slot, Adapter.load(folder), passes=PASSES)])


def test_it_swaps_and_prepares_and_knows_nothing_else(tmp_path):
    folders = [save_random_adapter(KIND, tmp_path / str(rank), rank, r=rank) for rank in (4, 2)]
    dora = save_random_adapter(KIND, tmp_path / "dora", 2, r=4, use_dora=True)
    model = load(KIND, folders[0])
    with pytest.raises(HotswapError, match="lora_magnitude_vector"):
        swap(model, dora)
    assert_equals_fresh_load(model, KIND, folders[0])
    swap(model, folders[1])
    assert_equals_fresh_load(model, KIND, folders[1])
    hotswap_adapter(model, folders[0], "default")
    assert slot_for(METHODS, find_host(model, "default"), "default").methods is METHODS
    assert_equals_fresh_load(model, KIND, folders[0])
    apply(changes_to_prepare(LORA, model, [*map(Adapter.load, folders)]))
    swap(model, folders[1])
    assert_same_outputs(model, load(KIND, folders[1]), KIND)  # state dicts are looked after by another part
    prepare_model_for_compiled_hotswap(model, adapters=folders)
