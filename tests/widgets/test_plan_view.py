"""PlanView: every layer, searchable, with the reasons of a refusal."""

from __future__ import annotations

import pytest
from peft import IA3Config, get_peft_model
from peft.utils import get_peft_model_state_dict

from hotswap_lab import Adapter, demo, plan_hotswap, prepare_model_for_compiled_hotswap
from hotswap_lab.lessons import beyond
from hotswap_lab.widgets import PlanView


@pytest.fixture(scope="module")
def view():
    model, _ = demo.load("reverse")
    return PlanView(model, demo.adapter_path("double"))


@pytest.fixture(autouse=True)
def _everything(view):
    view.search, view.action = "", "all"


def test_it_shows_what_the_plan_says(view):
    assert len(view.rows) == len(view.plan.layers) == 28
    assert view.counts == {action: count for action, count in view.plan.counts.items() if count}
    assert sum(row.nbytes for row in view.rows) == view.plan.nbytes
    assert view.summary.startswith(str(view.plan).splitlines()[0])


def test_sizes_have_a_unit(view):
    view.search = "layers.0 down"
    assert view.rows[0].cells[-1] == "4.61 kB"
    assert "written" in view.to_html()


def test_search_and_action(view):
    view.search = "LAYERS.0 proj"
    assert len(view.rows) == 7
    view.action = "off"
    assert {row.action for row in view.rows} == {"off"}
    assert len(view.rows) == 3
    view.search = "nothing of the kind"
    assert view.rows == []
    for form in (str(view), view.to_html().replace("&#x27;", "'")):
        assert "no layer matches 'nothing of the kind' and has the action off" in form
        assert "scaling" not in form  # no table
    view.action = "all"
    assert str(view).endswith("no layer matches 'nothing of the kind'")
    with pytest.raises(ValueError, match="must be one of all, resize, off"):
        view.action = "explode"


def test_the_controls_follow_and_lead(view):
    view.box  # noqa: B018
    view._refresh()
    view._box.value = "layers.3 q_proj"
    assert view.search == "layers.3 q_proj"
    assert view._status.value == "1 of 28 layers"
    assert "layers.3.self_attn.q_proj" in view._body.value
    assert "layers.2" not in view._body.value
    view.search = ""
    assert view._box.value == ""
    view._menu.value = "off"
    assert view._status.value == "12 of 28 layers"
    view.action = "all"
    assert view._menu.value == "all"


def test_layers_that_are_refused():
    model, _ = demo.load("pig_latin")
    view = PlanView(model, demo.adapter_path("caesar"))
    assert view.counts == {"off": 16, "refused": 12}
    view.action = "refused"
    assert all(".mlp." in row.layer for row in view.rows)
    for form in (str(view), view.to_html()):
        assert "pass add_layers=True" in form
        assert "nothing is written" in form


def test_ranks_that_are_refused():
    model, _ = demo.load("double")
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    view = PlanView(plan_hotswap(model, demo.adapter_path("pig_latin")))
    assert view.counts == {"refused": 16}
    assert view.rows[0].rank == "2 -> 32, room for 16"
    padded = PlanView(model, demo.adapter_path("sort"))
    assert padded.counts == {"copy": 12, "refused": 16}  # 4 of rank 24, and 12 that the model lacks


def test_a_method_that_copies_from_a_fresh_load():
    """An adapter that PEFT loads onto a twin of the base model is shown as far as its plan goes."""
    config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(demo.load_base(), config)
    view = PlanView(model, Adapter.from_state_dict(get_peft_model_state_dict(model), config))
    assert "possible" in view.summary
    assert {(row.rank, row.nbytes) for row in view.rows} == {("-", None)}


def test_layers_that_peft_would_have_to_add():
    pair = beyond.PAIRS["LayerNorm tuning"]
    model, new = beyond.load(pair.old), beyond.adapter(pair.new)
    assert PlanView(model, new).counts == {"copy": 5, "refused": 4}
    view = PlanView(model, new, add_layers=True)
    assert view.counts == {"copy": 5, "add": 4}


def test_static_form_is_limited(view, monkeypatch):
    monkeypatch.setattr("hotswap_lab.widgets.plan_view.SHOWN", 5)
    assert "... and 23 more layers: search for them" in str(view)
    assert view.to_html().count("<tr>") == 6
    assert len(view.rows) == 28
