"""Plans of plain LoRA from memory: what is decided for each layer, and all reasons against a swap together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import KINDS, load, randn, save_random_adapter
from oracle import untouched
from peft import IA3Config, LoraConfig

from hotswap_lab.core.adapter import Adapter
from hotswap_lab.core.host import find_host
from hotswap_lab.core.plan import Action, Plan
from hotswap_lab.core.planner import LORA, LORA_PASSES, make_plan, only_for, stop_if_refused
from hotswap_lab.core.slot import slot_in

KIND = KINDS["linear"]
#: the sizes of the layers: inputs and outputs
SIZES = {"first": (12, 16), "blocks.0": (16, 16), "blocks.1": (16, 16), "last": (16, 6)}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def slot(tmp_path_factory):
    model = load(KIND, save_random_adapter(KIND, tmp_path_factory.mktemp("adapter"), 1, r=4))
    return slot_in(LORA, find_host(model, "default"), "default")


def tensors_of(rank: int = 4, paths: tuple[str, ...] = KIND.modules) -> Tensors:
    shapes = {path: {"lora_A": (rank, SIZES[path][0]), "lora_B": (SIZES[path][1], rank)} for path in paths}
    return {f"{path}.{key}.weight": randn(shape) for path in paths for key, shape in shapes[path].items()}


def plan_of(slot, tensors: Tensors, config=None, **how: object) -> Plan:
    config = config or LoraConfig(r=4, target_modules=[*KIND.modules])
    with untouched(slot.host.root):
        return make_plan(slot, Adapter(config, tensors, "memory"), passes=LORA_PASSES, **how)


def test_the_same_ranks_are_copied(slot):
    plan = plan_of(slot, tensors_of())
    assert plan.ok
    assert plan.writes_values_only
    assert {layer.action for layer in plan.layers} == {Action.COPY}


def test_each_layer_has_its_own_action(slot):
    paths = "first", "blocks.0", "last"
    tensors = tensors_of(4, paths[:2]) | tensors_of(2, paths[2:])
    plan = plan_of(slot, tensors, LoraConfig(r=4, target_modules=[*paths], rank_pattern={"last": 2}))
    assert plan.ok
    expected = {"first": Action.COPY, "blocks.0": Action.COPY, "blocks.1": Action.OFF, "last": Action.RESIZE}
    assert {layer.path: layer.action for layer in plan.layers} == expected
    assert {layer.path: (layer.rank_before, layer.rank_after) for layer in plan.layers}["last"] == (4, 2)


def test_no_tensors_turn_all_layers_off(slot):
    plan = plan_of(slot, {})
    assert plan.ok
    assert {layer.action for layer in plan.layers} == {Action.OFF}


def test_a_config_that_need_not_name_the_layers_names_them_afterwards(slot):
    plan = plan_of(slot, tensors_of(4, ("first",)), LoraConfig(r=4, target_modules=["last"]), check_targets=False)
    assert plan.ok
    assert {*plan.config.target_modules} == {"first"}


def without_b(tensors: Tensors) -> None:
    del tensors["first.lora_B.weight"]


def of_another_rank(tensors: Tensors) -> None:
    tensors["first.lora_A.weight"], tensors["first.lora_B.weight"] = randn(3, 12), randn(16, 3)


def of_another_size(tensors: Tensors) -> None:
    tensors["first.lora_A.weight"] = randn(4, 13)


def of_a_layer_that_is_not_there(tensors: Tensors) -> None:
    tensors["second.lora_A.weight"] = randn(4, 12)


def with_two_values(tensors: Tensors) -> None:
    tensors["base_model.model.first.lora_A.weight"] = randn(4, 12)


WRONG: dict[Callable[[Tensors], None], str] = {
    without_b: "lora_B.weight",
    of_another_rank: "(3, 12)",
    of_another_size: "(4, 13)",
    of_a_layer_that_is_not_there: "second.lora_A.weight",
    with_two_values: "base_model.model.first.lora_A.weight",
}


@pytest.mark.parametrize("damage", WRONG)
def test_tensors_that_do_not_fit_are_named(slot, damage):
    damage(tensors := tensors_of())
    plan = plan_of(slot, tensors)
    assert not plan.ok
    assert WRONG[damage] in str(plan)


def test_all_that_is_wrong_with_the_layers_is_refused_together(slot):
    tensors = tensors_of()
    for damage in (without_b, of_a_layer_that_is_not_there):
        damage(tensors)
    assert len(plan_of(slot, tensors).refusals) == 2


def test_another_method_is_refused_before_any_tensor_is_compared(slot):
    plan = plan_of(slot, {"no such": torch.ones(1)}, IA3Config(target_modules=["first"], feedforward_modules=[]))
    assert len(plan.refusals) == 1
    assert "IA3" in str(plan.refusals[0])
    assert not plan.layers


def test_passes_run_in_order_up_to_the_first_that_decides_and_only_where_they_apply(slot):
    asked = []

    def note(name: str) -> Callable[[Plan], None]:
        return lambda plan: asked.append(name)

    @only_for(lambda slot, is_distributed: False)
    def never(plan: Plan) -> None:
        asked.append("never")

    def refuse(plan: Plan) -> None:
        plan.refuse("no_target_modules")

    passes = (note("first"), never, stop_if_refused, note("second"), refuse, stop_if_refused, note("third"))
    plan = make_plan(slot, Adapter(LoraConfig(), {}, "memory"), passes=passes)
    assert asked == ["first", "second"]
    assert not plan.ok
