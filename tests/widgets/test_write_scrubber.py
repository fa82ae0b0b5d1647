"""WriteScrubber: at both ends the model is the adapter, in between it is neither; nothing moves."""

from __future__ import annotations

import pytest
import torch
from lengths import long
from shown import live

from hotswap_lab import demo, in_use, verify_hotswap
from hotswap_lab.figures.palette import OFF, adapter_color
from hotswap_lab.widgets import WriteScrubber


@pytest.mark.parametrize(("before", "after"), [("pig_latin", "double"), long("double", "caesar")])
def test_at_both_ends_it_is_the_adapter_and_in_between_it_is_neither_at_the_same_addresses(before, after):
    view = WriteScrubber(before, after)
    addresses, found = view._slot.data_ptrs(), {}
    for step in (0, 1, view.steps - 1, view.steps):
        view.step = step
        found[step] = [bool(verify_hotswap(view.model, demo.adapter_path(name))) for name in (before, after)]
        assert view._slot.data_ptrs() == addresses
    # all rows are right before the last step, but not the scalings
    assert found == {0: [True, False], 1: [False] * 2, view.steps - 1: [False] * 2, view.steps: [False, True]}
    assert view.answer == demo.TASKS[after]("hotswap")


def test_each_step_writes_one_row_of_every_layer():
    view = WriteScrubber("reverse", "vowels_up")
    view.step = 3
    for tensor, old, new in zip(view._slot.tensors, *view._ends, strict=True):
        rows = tensor.parameter.movedim(tensor.rank_axis, 0)
        assert torch.equal(rows[:3], new[:3])
        assert torch.equal(rows[3:], old[3:])
    assert "3 rows copied · 0 zeroed · 24 zero already · 5 to write" in str(view)
    colors = [view.figure().svg.count(f"fill='{color}'/>") for color in (*map(adapter_color, view.names[::-1]), OFF)]
    assert colors == [2 * 3, 2 * 5, 2 * 24]  # a bar for each row of lora_A and of lora_B


def test_the_slider_writes_in_its_turn_and_shows_what_the_model_answers():
    view = live(WriteScrubber())
    with in_use(view.model):  # a thread that computes with the model
        view._slider.value = 33
        assert not view.wait(0.3)
        view._changed()
        assert view._slider.value == 33  # where the user has moved it, and not back
    assert view.wait(60)
    assert "hotswaphotswap" in view._body.value
    view.step = 0
    assert view._slider.value == 0
    assert hex(view._slot.tensors[0].parameter.data_ptr()) in view._address.value
    assert "hotswap → otswaphay" in view._static()["image/svg+xml"]
    for step in (-1, 34, 1.5):
        with pytest.raises(ValueError, match="0 to 33"):
            view.step = step
