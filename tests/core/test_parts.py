"""Tensors that are larger than the adapter's."""

from __future__ import annotations

import pytest
from models import KINDS, call, load, save_random_adapter
from oracle import assert_same_outputs
from peft.utils.hotswap import prepare_model_for_compiled_hotswap as prepared_by_peft

from hotswap_lab import hotswap_adapter, prepare_model_for_compiled_hotswap

LINEAR = KINDS["linear"]


@pytest.mark.parametrize("prepare", [prepared_by_peft, prepare_model_for_compiled_hotswap], ids=["PEFT", "we"])
def test_nothing_of_a_higher_rank_stays_in_the_padding(tmp_path, prepare):
    folders = [save_random_adapter(LINEAR, tmp_path / str(rank), seed=rank, r=rank) for rank in (8, 5, 3)]
    model = load(LINEAR, folders[0])
    prepare(model, target_rank=8)
    call(model, LINEAR.inputs())
    for folder in folders[1:]:
        hotswap_adapter(model, folder, "default")
        assert_same_outputs(model, load(LINEAR, folder), LINEAR)
