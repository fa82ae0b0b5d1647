"""Chapter 03: how it judges swaps."""

from __future__ import annotations

import pytest
import torch

from hotswap_lab import demo, hotswap_adapter
from hotswap_lab.lessons import compiling

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.long
def test_a_fresh_load_judges_swaps_in_a_compiled_model():
    def compiled():
        model, _ = demo.load("reverse")
        return torch.compile(model, backend="eager", dynamic=False)

    def refuses(model, path, name):
        raise ValueError("Configs are incompatible: for use_rslora, False != True")

    assert compiling.judged(hotswap_adapter, compiled(), ["vowels_up", "shout"]) == (
        "right: vowels_up, shout\n1 recompile"
    )
    assert compiling.judged(lambda *_: None, compiled(), ["vowels_up", "reverse"]) == (
        "wrong, no error: vowels_up\nright: reverse\n0 recompiles"
    )
    assert compiling.judged(refuses, compiled(), ["vowels_up"]) == "refused (use_rslora): vowels_up\n0 recompiles"


@pytest.mark.long
def test_the_scenarios_have_both_answers_and_are_independent_of_each_other():
    config = compiling._config
    answers = [compiling.recompiles(config(compiling.OLD_CONFIG), config(new)) for new in compiling.SCENARIOS.values()]
    assert answers == [0, 1, 1, 0, 1, 0]
    # a graph that is left over from one try would hide the recompile of the next
    assert compiling.recompiles(config(compiling.OLD_CONFIG), config(compiling.SCENARIOS["r=4 alpha=16"])) == 1
