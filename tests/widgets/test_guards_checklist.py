"""Guards: the checklist is that of the real graph, red where a swap breaks it, and red exactly if it compiled again."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shown import live

from hotswap_lab import prepare_model_for_compiled_hotswap, resolve_slot
from hotswap_lab.widgets import Guards

CONFIGS = {
    "a": dict(r=4, lora_alpha=8),
    "same": dict(r=4, lora_alpha=8),
    "scaling": dict(r=4, lora_alpha=16),
    "rank": dict(r=8, lora_alpha=16),
    "dropout": dict(r=4, lora_alpha=8, lora_dropout=0.1),
}
INPUTS = {"input": torch.ones(2, 6)}


def a_base() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6)).eval()


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, str]:
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in CONFIGS}
    for name, options in CONFIGS.items():
        config = LoraConfig(target_modules=["0", "2"], init_lora_weights=False, **options)
        get_peft_model(a_base(), config).save_pretrained(folders[name])
    return folders


@pytest.fixture
def guards(family) -> Guards:
    models = {title: PeftModel.from_pretrained(a_base(), family["a"]).eval() for title in ("not prepared", "prepared")}
    prepare_model_for_compiled_hotswap(models["prepared"], adapters=[*family.values()])
    return Guards(models, family, INPUTS)


#: what is swapped in, one after the other, the verdict on the model that isn't prepared, and what is red
TOUR = {
    "same": ("every guard holds", []),
    "scaling": ("compiled again", ["✗ scaling was 2, is 4: 2 layers"]),
    "rank": (
        "compiled again",
        [
            *("✗ lora_A was 4 × 6, is 8 × 6: 1 layer", "✗ lora_A was 4 × 8, is 8 × 8: 1 layer"),
            *("✗ lora_B was 6 × 4, is 6 × 8: 1 layer", "✗ lora_B was 8 × 4, is 8 × 8: 1 layer"),
            "✗ scaling was 4, is 2: 2 layers",
        ],
    ),
    "a": ("an earlier graph fits", ["✗ lora_A was 8 × 6, is 4 × 6: 1 layer"]),
    "dropout": ("compiled again", ["✗ "]),
}


def test_what_a_swap_breaks_is_red_and_a_prepared_model_stays_green(guards):
    free, ready = guards.columns.values()
    for column in (free, ready):  # the checklist is that of the graph
        slot = resolve_slot(column.switch.model, "default")
        shapes = sorted(" × ".join(map(str, tensor.parameter.shape)) for tensor in slot.tensors)
        assert sorted(size for kind, size in column.guards.values() if kind != "scaling") == shapes
        assert sum(kind == "scaling" for kind, _ in column.guards.values()) == len(slot.layers)
    for name, (verdict, red) in TOUR.items():
        before = free.watch.recompiles
        guards.choose(name)
        (first, _), *lines = free.checklist()
        assert first == verdict, name
        assert (verdict == "compiled again") == (free.watch.recompiles > before), name
        found = [text for text, holds in lines if not holds]
        assert all(any(text.startswith(each) for text in found) for each in red), (name, found)
        assert bool(found) == bool(red), (name, found)
        assert all(holds for _, holds in ready.checklist()), name
    assert (ready.watch.compiles, ready.watch.recompiles) == (1, 0)
    assert len(free.watch.calls) <= 40


@pytest.mark.long
def test_clicks_and_the_picture(guards):
    live(guards)._choices.value = "rank"
    assert guards.wait(60)
    assert guards.active == guards._choices.value == "rank"
    svg = guards._static()["image/svg+xml"]
    assert "✗ scaling was" not in svg  # alpha / rank is what it was
    assert "✗ lora_A was 4 × 8, is 8 × 8: 1 layer" in svg
    assert "compiled again: " in svg  # with the time, which the text has not
    assert "calls, in order" in svg
    assert "compiled again\n" in str(guards)
    assert svg.count("class='recompile'") == 1 + 1  # and one in the legend
    columns = guards.columns.values()
    guards.stop()
    calls = [len(column.watch.calls) for column in columns]
    for column in columns:
        column._call = guards.stop
    guards.choose("a")
    assert [len(column.watch.calls) - before for column, before in zip(columns, calls, strict=True)] == [1, 0]


def test_it_says_that_it_compiles_again_from_the_moment_a_guard_fails(guards):
    """And is not green meanwhile, nor after a swap by others, nor where a stop has left it halfway."""
    free, seen = guards.columns["not prepared"], []

    def note(change):
        if what := re.search("data-note='(.*?)'", change["new"])[1]:
            seen.append((what, len(free.watch.calls) - before))

    live(guards)._body.observe(note, "value")
    for name, again in (("rank", True), ("a", False), ("rank", False)):
        before, recompiles = len(free.watch.calls), free.watch.recompiles
        guards._choices.value = name
        assert guards.wait(60)
        assert seen[0][0] == "calling the model that is not prepared"
        assert ("compiling again: not prepared", 0) in seen if again else "compiling" not in str(seen)  # its first call
        assert "compiling again: prepared" not in str(seen)
        assert free.watch.recompiles == recompiles + again
        assert "data-note=''" in guards._body.value
        seen.clear()
    free.switch.swap("a")
    live(guards)
    assert "data-note='changed since: run again'" in guards._body.value
    assert str(guards).endswith("changed since: run again")
    assert guards._choices.value is None  # so that each of them can be chosen
    guards.choose("a")
    assert "changed since" not in str(guards)
    free._call = guards.stop
    guards.choose("same")
    assert str(guards).endswith("changed since: run again")


def test_it_is_not_green_where_no_graph_ran(guards, family):
    with torch.compiler.set_stance("force_eager"):
        guards.choose("same")
        assert [column.checklist() for column in guards.columns.values()] == [[("nothing compiled ran", False)]] * 2
        guards.choose("rank")
        model = PeftModel.from_pretrained(a_base(), family["a"]).eval()
        assert "  nothing compiled ran" in str(Guards({"first": model}, family, INPUTS))
    guards.choose("a")
    assert all(column.checklist()[0] == ("every guard holds", True) for column in guards.columns.values())


@pytest.mark.long
def test_a_model_that_could_not_be_compiled_again_is_not_shown_as_it_was(family):
    """The adapter is in, and the call failed: what is shown is of the swap before, and says so."""
    model = PeftModel.from_pretrained(a_base(), family["a"]).eval()
    with torch._dynamo.config.patch(recompile_limit=1):
        guards = Guards({"model": model}, family, INPUTS)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            guards.choose("rank")
        assert "changed since: run again" in str(guards)
        assert "nothing compiled ran" in str(guards)
        guards.choose("same")
        assert str(guards).startswith("Guards: same is in")
        assert "changed since" not in str(guards)


def test_swaps_by_others_wait_while_it_calls(guards):
    column, threads = guards.columns["prepared"], []

    def probe():
        if not threads:
            threads.append(threading.Thread(target=column.switch.swap, args=("rank",)))
            threads[0].start()
            threads[0].join(0.3)
            assert threads[0].is_alive()

    column._call = probe
    guards.choose("a")
    threads[0].join(60)
    assert column.switch.active == "rank"
