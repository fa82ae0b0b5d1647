"""AdapterPool: every swap equals a fresh load, whatever else is done to the model, and nothing is ever half done.

Random orders of all operations, compiled, are in ``robustness/test_long_runs.py``; an error and Ctrl-C at every step of
each in ``robustness/test_faults.py``; threads in ``robustness/test_threads.py``.
"""

from __future__ import annotations

import asyncio
import copy
import os
import random
import shutil
import signal
import threading
import time
from collections import UserDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from lengths import few_of, long
from models import (
    ARCHITECTURES,
    KINDS,
    Kind,
    call,
    load,
    lora_layers,
    randn,
    randomize,
    save_family,
    save_random_adapter,
)
from oracle import assert_close, assert_equals_fresh_load, assert_same, assert_same_outputs, observe, untouched
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from refusals import refused
from safetensors.torch import save_file

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    RecompileWatch,
    hotswap_adapter,
    in_use,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    save_adapter,
    set_strength,
    verify_hotswap,
    waiting_at_most,
)

LLAMA, LINEAR = KINDS["llama"], KINDS["linear"]


def pool_of(model, adapters, *name: str, **options) -> AdapterPool:
    return AdapterPool(model, *name, adapters=adapters, progress=False, **options)


def assert_is(model, folder, kind=LLAMA, **options):
    assert_equals_fresh_load(model, kind, folder, prepared=True, **options)


def times(factor: float, folder: str) -> dict[str, torch.Tensor]:
    return {key: factor * tensor for key, tensor in Adapter.load(folder).tensors.items()}


@pytest.mark.parametrize("name", few_of({**KINDS, **ARCHITECTURES}, ("conv", "embedding", "gpt2")))
def test_every_kind_of_layer_and_architecture(name, tmp_path):
    kind = KINDS.get(name) or ARCHITECTURES[name]
    family = [dict(r=rank, lora_alpha=rank + 3, lora_dropout=0.1) for rank in (4, 12, 8)]
    folders = save_family(kind, tmp_path, *family, dict(r=4, target_modules=[kind.modules[0]]))
    sources = dict(zip(("4", "12", "8", "one"), folders, strict=True))
    model = load(kind, sources["12"])
    pool = pool_of(model, sources)
    addresses = resolve_slot(model, "default").data_ptrs()
    for each in ("4", "one", "12", "8", "one"):
        pool.swap(each)
        assert pool.active == each
        assert_is(model, sources[each], kind)
    assert resolve_slot(model, "default").data_ptrs() == addresses


def test_a_packed_adapter_takes_its_own_rows_only(sources):
    model = load(LLAMA, sources["b"])
    of_rank_2, of_rank_8 = (pool_of(model, {name: sources[name]}).nbytes for name in "cb")
    assert of_rank_2 < of_rank_8 / 4 + 500
    assert pool_of(model, sources).nbytes > of_rank_2 + of_rank_8


def test_the_loaded_adapter_is_recognised_and_the_only_one_needs_no_name(sources):
    model = load(LLAMA, sources["a"], "mine")
    pool = pool_of(model, sources)
    assert (pool.adapter_name, pool.active, pool.strength) == ("mine", "a", 1)
    pool.swap("b")
    set_strength(model, 0.5)
    assert pool_of(model, sources).active is None, "not at its trained strength"
    pool.swap("a")
    assert pool.active == "a"
    with model.disable_adapter():
        assert pool.active is None
    assert pool_of(model, {"b": sources["b"]}).active is None
    other = load(LLAMA, sources["a"])
    other.peft_config["default"].exclude_modules = {"none"}
    assert pool_of(other, sources).active is None, "the same weights, and another config"
    other = load(LLAMA, sources["b"])
    lora_layers(other)[0].lora_dropout["default"].p = 0.9
    assert pool_of(other, sources).active is None, "the same weights and config, and another dropout in a layer"
    model.load_adapter(sources["c"], "other")
    model.set_adapter("other")
    assert pool.active is None
    refused("the adapters 'mine', 'other'", pool_of, model, {"b": sources["b"]})


# ---- compiled


@pytest.mark.parametrize(
    "first", [dict(r=4), long(dict(r=4, target_modules=["first"]))], ids=["other rank", "fewer layers"]
)
def test_more_room_in_a_compiled_model_costs_one_recompile(tmp_path, fresh_compiler, first):
    """As the refusals say, of swaps, of preparing and of pools."""
    folders = save_family(LINEAR, tmp_path, first, dict(r=8), dict(r=16))
    family = dict(zip(("old", "new", "third"), folders, strict=True))
    advised = r"check_compiled='ignore' \(costs one recompile\)"

    def swap_in_turn(swap: Callable[[str], object], *names: str) -> None:
        for name in names:
            swap(name)
            assert_same_outputs(compiled, load(LINEAR, family[name]), LINEAR)

    model = load(LINEAR, family["old"])
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    compiled = torch.compile(model, backend="eager")
    call(compiled, LINEAR.inputs())
    refused(advised, hotswap_adapter, compiled, family["new"], "default")
    refused(advised, prepare_model_for_compiled_hotswap, compiled, adapters=[family["new"]])
    with RecompileWatch(allow=1):
        prepare_model_for_compiled_hotswap(compiled, adapters=[family["new"]], check_compiled="ignore")
        swap_in_turn(lambda name: hotswap_adapter(compiled, family[name], "default"), "new", "old", "new")
    pool = pool_of(compiled, {name: family[name] for name in ("old", "new")})
    swap_in_turn(pool.swap, "old")
    refused(advised, pool.add, "third", family["third"])
    refused(advised, pool_of, compiled, family)
    refused(r"\*before\* compiling", pool_of, compiled, {"old": family["old"]}, target_rank=32)
    with RecompileWatch(allow=1):
        swap_in_turn(pool_of(compiled, family, check_compiled="ignore").swap, "third", "old", "new", "third")


# ---- what is passed in the wrong place


@pytest.mark.long
def test_what_is_passed_in_the_wrong_place(model, pool, sources):
    refused(r"must be a string(.|\n)*as a dict(.|\n)*adapters=\{name: folder", AdapterPool, model, {"b": sources["b"]})
    for adapters, kind in ((sources["b"], "str"), ([sources["b"]], "list")):
        refused(f"no names(.|\n)*as a {kind}(.|\n)*a dict", AdapterPool, model, adapters=adapters)
    refused(r"a state dict(.|\n)*a str(.|\n)*Adapter.load\(folder\)", pool.update, "b", sources["b"])
    refused("not found", pool_of, model, sources, "nobody")
    refused("There is no adapter to read", pool_of, model, {"what": 3})
    for strength in (float("nan"), "1"):
        refused("not a number", pool.swap, "c", strength)
        refused("not a number", setattr, pool, "strength", strength)


@pytest.mark.long
def test_whoever_has_a_config_may_change_it(model, sources):
    """The one that the pool was given, and the one that is in the model."""
    given = Adapter.load(sources["c"])
    pool = pool_of(model, {"a": sources["a"], "c": (given.tensors, given.config)})
    given.config.lora_alpha, given.config.target_modules = 77, {"nothing"}
    for _ in range(2):
        pool.swap("c")
        assert_is(model, sources["c"])
        model.peft_config["default"].lora_alpha = 99
        model.peft_config["default"].target_modules.add("more")
        pool.swap("a")
        assert_is(model, sources["a"])


# ---- using, strength, off


@pytest.mark.parametrize("previous", ["in the pool, at half its strength", "in no pool", "no longer in the model"])
def test_using_gives_the_former_adapter_back(sources, previous):
    model = load(LLAMA, sources["a"])
    pool = pool_of(model, {name: sources[name] for name in "bcd"})
    if "half" in previous:
        pool.swap("b", strength=0.5)
    if "no longer" in previous:
        hotswap_adapter(model, sources["e"], "default")
    before, output, state = observe(model), call(model, LLAMA.inputs()), (pool.active, pool.strength)
    with pool.using("c") as same, pool.using("d", strength=2):
        assert same is pool
        assert (pool.active, pool.strength) == ("d", 2)
        pool.swap("b")
        pool.off()
        assert pool.active is None
    with pytest.raises(ZeroDivisionError), pool.using("c"):
        _ = 1 / 0
    assert (pool.active, pool.strength) == state
    assert_same(observe(model), before)
    assert torch.equal(call(model, LLAMA.inputs()), output)


@pytest.mark.usefixtures("python_sigint")
@pytest.mark.parametrize("way", ["AdapterPool()", "add"])
def test_ctrl_c_ends_a_long_download_at_once(model, sources, monkeypatch, way):
    def download(*_: object, **__: object) -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(60)

    action, given = (pool_of(model, {}, target_rank=8).add, ("c",)) if way == "add" else (pool_of, (model,))
    source = sources["c"] if way == "add" else sources
    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "load", download)
        with untouched(model), pytest.raises(KeyboardInterrupt):
            action(*given, source)
    assert time.monotonic() - start < 30
    action(*given, source)


def test_an_adapter_that_is_removed_while_it_is_updated(pool, sources):
    class Removing(UserDict):
        def keys(self):
            pool.remove("b")  # as another thread may
            return super().keys()

    with pytest.raises(HotswapError, match="another thread has removed or replaced it"):
        pool.update("b", Removing(times(2, sources["b"])))
    assert "b" not in pool


def test_strengths_that_are_set_by_peft(model, pool, sources):
    """Equal ones are the pool's strength; uneven ones raise an error only when it is read, and come back."""
    for layer in lora_layers(model):
        layer.set_scale("default", 0.5)
    assert pool.strength == 0.5
    pool.swap("b")
    for number, layer in enumerate(lora_layers(model)):
        layer.set_scale("default", 0.5 + number)
    assert pool.active == "b"
    assert "active" in str(pool)
    refused("different strengths", lambda: pool.strength)
    before = call(model, LLAMA.inputs())
    with pool.using("c"):
        assert_is(model, sources["c"])
    pool.update("b", Adapter.load(sources["b"]).tensors)
    assert_close(call(model, LLAMA.inputs()), before)


# ---- add, remove, update


@pytest.mark.long
def test_add_and_remove(model, sources, tmp_path):
    pool = pool_of(model, {"a": sources["a"], "b": sources["b"]})
    assert (list(pool), len(pool), "a" in pool, "c" in pool) == (["a", "b"], 2, True, False)
    pool.add("c", sources["c"])
    pool.add("from memory", (dict(Adapter.load(sources["e"]).tensors), Adapter.load(sources["e"]).config))
    pool.add("read already", Adapter.load(sources["d"]))
    for name, source in (("c", "c"), ("from memory", "e"), ("read already", "d")):
        pool.swap(name)
        assert_is(model, sources[source])
    large = save_random_adapter(LLAMA, tmp_path / "large", seed=9, r=16)
    refused("is in the model", pool.remove, "read already")
    refused("target_rank=16", pool.add, "large", large)
    refused("Can't find", pool.add, "broken", tmp_path)
    refused("already", pool.add, "a", sources["b"])
    pool.swap("a")
    pool.remove("read already")
    assert pool.names == ["a", "b", "c", "from memory"]
    refused("no adapter called 'read already'", pool.swap, "read already")


def test_an_adapter_with_the_same_config_and_other_weights_is_not_the_one_in_the_model(model, sources, tmp_path):
    save_adapter(model, tmp_path)
    (second,) = (
        each for each in model.state_dict() if each.endswith("layers.1.self_attn.q_proj.lora_B.default.weight")
    )
    with torch.no_grad():
        model.get_parameter(second).add_(1)
    assert pool_of(model, {"before": str(tmp_path)}).active is None
    save_adapter(model, tmp_path)
    assert pool_of(model, {"now": str(tmp_path)}).active == "now"


def test_update(model, pool, sources):
    pool.swap("d")
    twice = Adapter.from_state_dict(times(2, sources["d"]), Adapter.load(sources["d"]).config)
    pool.update("d", twice.tensors)
    assert verify_hotswap(model, twice, inputs=LLAMA.inputs())
    with pool.using("a"), untouched(model):  # an adapter that is not in use changes nothing
        pool.update("d", given := times(1, sources["d"]))
        refused("NaN", pool.update, "d", times(float("nan"), sources["d"]))
    for tensor in given.values():
        tensor.zero_()  # the pool has only read them
    pool.swap("a")
    pool.swap("d")
    assert_is(model, sources["d"])
    assert pool.version("d") == 3


# ---- a model that is not where it was


def replace_a_middle_part(model):
    base = model.get_base_model()
    base.model.layers[0].mlp = copy.deepcopy(base.model.layers[0].mlp)


def exchange_two_layers(model):
    """The same layers and parameters are there, but each layer has the other one's."""
    layers = [layer.self_attn.q_proj for layer in model.get_base_model().model.layers[:2]]
    one, other = (layer.lora_A["default"]._parameters for layer in layers)
    one["weight"], other["weight"] = other["weight"], one["weight"]


def give_other_memory(model):
    parameter = resolve_slot(model, "default").tensors[5].parameter
    parameter.data = torch.zeros_like(parameter)


def delete_and_load(model):
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=4, target_modules=["q_proj"]))


def assign(model):
    state = {key: value.clone() for key, value in model.state_dict().items() if "layers.0.mlp.up_proj.lora" in key}
    model.load_state_dict(state, strict=False, assign=True)


#: what is done to a model, and whether a swap from files is still a swap of what was there
MOVES = {
    "bfloat16": (lambda model: model.to(torch.bfloat16), True),
    "other memory": (give_other_memory, True),
    "assigned state of one layer": (assign, True),
    "a middle part that was replaced": (replace_a_middle_part, True),
    "two layers that have changed places": (exchange_two_layers, False),
    "deleted and loaded": (delete_and_load, False),
    "unloaded": (lambda model: model.unload(), False),
}


@pytest.mark.parametrize("move", few_of(MOVES, list(MOVES)[::3]))
def test_a_model_that_was_moved_is_noticed(model, pool, sources, move):
    change, can_be_swapped = MOVES[move]
    pool.swap("b")
    change(model)
    swaps = (pool.swap, "a"), (pool.swap, "b", 0.5), (pool.swap, {"a": 0.5, "b": 0.5})
    update = pool.update, "b", Adapter.load(sources["b"]).tensors
    for action, *arguments in (*swaps, update, (pool.off,), (setattr, pool, "strength", 0.5)):
        refused(r"no longer where the pool put it|not found|No adapter layers", action, *arguments)
    if can_be_swapped:
        precision = dict(tolerance=1e-2, margin=5) if model.dtype == torch.bfloat16 else {}
        hotswap_adapter(model, sources["a"], "default")
        assert_same_outputs(model, load(LLAMA, sources["a"]).to(model.dtype), LLAMA, **precision)
        pool_of(model, {"c": sources["c"], "b": sources["b"]}).swap("c")
        assert_same_outputs(model, load(LLAMA, sources["c"]).to(model.dtype), LLAMA, **precision)


def test_a_conversion_there_and_back_and_a_part_that_was_compiled_since(tmp_path):
    """Layers that were reserved come last in the room, wherever they are in the model."""
    late, every = save_family(LINEAR, tmp_path, dict(r=4, target_modules=["last"]), dict(r=4))
    model = load(LINEAR, late)
    pool = pool_of(model, {"late": late, "every": every})
    model.to("cpu").double()
    base = model.get_base_model()
    base.blocks[0] = torch.compile(base.blocks[0], backend="eager")
    for name, folder in (("every", every), ("late", late)):
        pool.swap(name)
        assert_same_outputs(model, load(LINEAR, folder), LINEAR)


def test_mixed_dtypes(sources):
    every = [path for path, each in load(LLAMA, sources["a"]).named_modules() if isinstance(each, LoraLayer)]

    def mixed(folder):
        model = load(LLAMA, folder)
        for path, module in model.named_modules():
            if path.rpartition(".lora_")[0] in every[::2]:
                module.float()
        return model

    model = mixed(sources["a"])
    pool = pool_of(model, sources)
    for name in ("b", "c", "a", "e"):
        pool.swap(name)
        assert_same_outputs(model, mixed(sources[name]), LLAMA)
    dtypes = {tensor.parameter.dtype for tensor in resolve_slot(model, "default").tensors}
    assert dtypes == {torch.float32, torch.float64}


def test_an_embedding_is_reserved_that_another_adapter_is_on(tmp_path):
    kind = KINDS["embedding"]
    head, embedding = save_family(kind, tmp_path, *(dict(r=4, target_modules=[each]) for each in ("head", "embed")))
    model = load(kind, head)
    model.load_adapter(embedding, "other")
    pool = pool_of(model, {"head": head, "embedding": embedding}, "default")
    for name, folder in (("embedding", embedding), ("head", head)):
        pool.swap(name)
        assert_same_outputs(model, load(kind, folder), kind)


# ---- training


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_of(model) -> torch.Tensor:
    return model(**LLAMA.inputs()).logits.square().mean()


def train(model, optimizer, steps=3):
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("way", ["pool", "hotswap_adapter"])
def test_what_an_optimizer_wrote_into_the_padding_is_gone_after_a_swap(sources, way, tmp_path):
    """Adam goes on moving rows that only the last adapter had."""
    model = load(LLAMA, sources["b"], is_trainable=True)
    pool = pool_of(model, sources)
    optimizer = torch.optim.AdamW(trainable(model), 0.1)
    train(model, optimizer)
    pool.swap("a")
    train(model, optimizer)
    refused("can't be saved as it is", save_adapter, model, tmp_path / "saved")
    with pytest.warns(UserWarning, match="Make a new optimizer after a swap"):
        model.state_dict()
    pool.swap("d") if way == "pool" else hotswap_adapter(model, sources["d"], "default")
    assert_is(model, sources["d"], is_trainable=True)


def test_trained_weights_come_back_and_gradients_do_not(sources):
    model = load(LLAMA, sources["a"], is_trainable=True)
    pool = pool_of(model, sources)
    pool.swap("a")
    train(model, torch.optim.SGD(trainable(model), 0.5))
    assert pool.active is None, "no longer what the pool has under this name"
    before = call(model, LLAMA.inputs())
    with pool.using("b"):
        assert_is(model, sources["b"], is_trainable=True)
    assert torch.equal(call(model, LLAMA.inputs()), before)
    loss = loss_of(model)
    with pool.using("c"), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert torch.equal(call(model, LLAMA.inputs()), before)
    loss_of(model).backward()
    pool.swap("c")
    assert_is(model, sources["c"], is_trainable=True)


def test_a_checkpoint_of_another_rank_or_other_layers_is_refused(sources):
    model = load(LLAMA, sources["b"])
    pool = pool_of(model, sources)
    of_rank_8 = {key: value.clone() for key, value in model.state_dict().items()}
    for name in ("a", "d"):
        pool.swap(name)
        refused("does not fit the adapter", model.load_state_dict, of_rank_8)
        pool.swap(name)
        assert_is(model, sources[name])
    own = {key: value.clone() for key, value in model.state_dict().items()}
    pool.swap("d")
    model.load_state_dict(own)
    assert_is(model, sources["d"])


# ---- how it looks


@pytest.mark.long
def test_it_is_printed_in_a_few_lines_after_a_progress_bar_unless_unwanted(model, sources, capsys):
    family = {f"user {number}": sources["e"] for number in range(200)}
    pool_of(model, sources)
    assert capsys.readouterr().err == ""
    pool = AdapterPool(model, adapters=family)
    assert "packing" in capsys.readouterr().err
    pool.swap("user 150")
    lines = str(pool).splitlines()
    assert lines[0].startswith("AdapterPool: 200 adapters, ")
    assert lines[1].split() == ["adapter", "rank", "alpha", "layers", "bytes"]
    assert (len(lines), lines[2].split()[:2], lines[2].endswith("active")) == (23, ["user", "150"], True)
    assert (lines[3].split()[1], lines[3].endswith("active"), lines[-1]) == ("0", False, "and 180 more, see `table`")
    assert (pool._repr_html_().count("<tr>"), len(pool.table)) == (21, 200)
    for text in (lines[2], pool._repr_html_()):
        assert "4 to 7" in text
    error = refused("no adapter called 'usr 77'", pool.swap, "usr 77")
    assert error.refusals[0].found == "the names 'user 77', 'user 177', 'user 7', 'user 0', 'user 1' and 195 more"


# ---- what is in use


@pytest.mark.parametrize("name", ["d", "a"], ids=["fewer layers than the family", "a loss was alive"])
def test_what_is_in_the_model_is_known_as_in_use(sources, name):
    """So an update reaches the model at once, and it can't be removed; and an optimizer's step is noticed."""
    model = load(LLAMA, sources[name], is_trainable=True)
    loss = loss_of(model)
    pool = pool_of(model, sources)
    del loss
    if name == "a":
        pool.swap("a")
        model.load_adapter(sources["b"], "other")
    assert pool.active == name
    before = call(model, LLAMA.inputs())
    pool.update(name, times(3, sources[name]), Adapter.load(sources[name]).config)
    assert (call(model, LLAMA.inputs()) - before).abs().max() > 1e-2
    refused("in use", pool.remove, name)
    with torch.no_grad():
        trainable(model)[0].add_(1)
    assert pool.active is None


def test_after_a_write_by_other_code_a_swap_is_known_again(model, pool):
    """Twice: what was noted of the first write is forgotten."""
    for name in ("a", "c"):
        with torch.no_grad():
            lora_layers(model)[0].lora_A["default"].weight.mul_(2)
        assert pool.active is None
        pool.swap(name)
        assert pool.active == name


def test_an_update_of_an_adapter_that_is_not_in_use_waits_for_nobody(pool, sources):
    adapter = Adapter.load(sources["b"])
    pool.swap("a")
    with ThreadPoolExecutor(1) as other, in_use(pool.model):
        other.submit(lambda: update_now(pool, "c", adapter)).result(60)
        with pytest.raises(HotswapError, match="in use"):
            other.submit(lambda: update_now(pool, "a", adapter)).result(60)
    assert (pool.version("a"), pool.version("c")) == (1, 2)


def update_now(pool: AdapterPool, name: str, adapter: Adapter) -> None:
    with waiting_at_most(0):
        pool.update(name, adapter)


def test_of_two_adapters_that_come_under_one_name_the_first_stays(model, pool, sources, monkeypatch):
    """The second one was asked for before, and took longer to read."""
    load_adapter, first = Adapter.load, [sources["c"]]

    def slowly(source, **arguments):
        adapter = load_adapter(source, **arguments)
        if first:
            pool.add("new", first.pop())
        return adapter

    monkeypatch.setattr(Adapter, "load", slowly)
    with pytest.raises(HotswapError, match="already"):
        pool.add("new", sources["d"])
    pool.swap("new")
    assert_is(model, sources["c"])


# ---- memory limit


def limited_pool(model, sources, *names: str) -> AdapterPool:
    """A pool of all sources with room for those of these names."""
    members = pool_of(model, sources)._members
    return pool_of(model, sources, max_bytes=sum(members[name].nbytes for name in names))


def small_pool(model, sources) -> tuple[AdapterPool, str]:
    """A pool with room for two of the adapters, and one that is in its files."""
    pool = limited_pool(model, sources, "b", "e")
    pool.swap("b")
    return pool, in_files(pool)[0]


def in_files(pool: AdapterPool) -> list[str]:
    return [row[0] for row in pool.table if row[4] == "in its files"]


def test_the_least_recently_used_adapter_is_dropped_and_read_again(model, sources):
    pool = limited_pool(model, sources, *"abe")
    generator, seen, before = random.Random(2), set(), "a"
    for _ in range(15):
        name = generator.choice(list(sources))
        pool.swap(name)
        assert_same_outputs(model, load(LLAMA, sources[name]), LLAMA)
        assert pool.nbytes <= pool._members.max_bytes
        assert {before, name}.isdisjoint(in_files(pool)), "there is always room for the last two"
        seen |= {*in_files(pool)}
        before = name
    assert seen == set(sources)


def test_an_update_that_fails_drops_no_other_adapter(model, sources, monkeypatch):
    sizes = {name: each.nbytes for name, each in pool_of(model, sources)._members.items()}
    small, *_, large = sorted(sources, key=sizes.__getitem__)
    pool = pool_of(model, sources, max_bytes=2 * sizes[large] + sizes[small])
    for name in (large, small):
        pool.swap(name)
    before = in_files(pool)
    bigger = {**Adapter.load(sources[large]).tensors}, Adapter.load(sources[large]).config

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("hotswap_lab.core.change.copy_all", fails)
    with pytest.raises(MemoryError):
        pool.update(small, *bigger)
    monkeypatch.undo()
    assert in_files(pool) == before
    pool.update(small, *bigger)
    assert in_files(pool) > before, "room was needed"


def test_an_updated_adapter_is_not_read_again_from_its_files(model, sources):
    pool = limited_pool(model, sources, *"abe")
    pool.update("b", times(3, sources["b"]))
    for name in (*sources, "b"):
        pool.swap(name)
    fresh = load(LLAMA, sources["b"])
    hotswap_adapter(fresh, Adapter(Adapter.load(sources["b"]).config, times(3, sources["b"]), "memory"), "default")
    assert_same_outputs(model, fresh, LLAMA)


def test_a_file_that_changed_since_is_refused(model, sources, tmp_path):
    pool, dropped = small_pool(model, sources)
    shutil.rmtree(sources[dropped])
    save_random_adapter(LLAMA, Path(sources[dropped]), seed=99, r=2)
    refused("have changed since it was added", pool.swap, dropped)


@pytest.mark.parametrize("is_other", [False, True])
def test_files_are_compared_by_their_content(model, sources, is_other):
    """Not by their times: a copy is no change, and a change within one tick of the clock is one."""
    pool, dropped = small_pool(model, sources)
    file = Path(sources[dropped], "adapter_model.safetensors")
    before = file.stat()
    save_file(times(2 if is_other else 1, sources[dropped]), file, {"format": "pt"})
    os.utime(file, ns=(0, before.st_mtime_ns if is_other else 0))
    assert file.stat().st_size == before.st_size
    if is_other:
        refused("have changed since it was added", pool.swap, dropped)
    else:
        pool.swap(dropped)
        assert_same_outputs(model, load(LLAMA, sources[dropped]), LLAMA)


@pytest.mark.parametrize("name", ["nul\0", "x" * 5000, "none/here"])
def test_what_can_be_no_folder_is_refused_as_such(model, sources, name):
    pool = pool_of(model, {"a": sources["a"]})
    refused("adapter_config.json", pool.add, "c", name)


def test_a_link_to_nowhere_hides_no_change(model, sources):
    pool, dropped = small_pool(model, sources)
    Path(sources[dropped], "adapter_old").symlink_to("nowhere")  # not there when the pool looked, and no file
    pool.swap(dropped)
    for name in sources:
        pool.swap(name)
    dropped = in_files(pool)[0]
    Path(sources[dropped], "adapter_older").symlink_to("nowhere")
    save_file(times(2, sources[dropped]), Path(sources[dropped], "adapter_model.safetensors"), {"format": "pt"})
    refused("have changed since it was added", pool.swap, dropped)


@pytest.mark.parametrize("how", [long("an adapter"), long("tensors and a config"), "a learner"])
def test_new_weights_for_a_dropped_adapter_need_nothing_of_its_files(model, sources, how):
    """A trainer writes its next checkpoint to the same folder."""
    pool, dropped = small_pool(model, sources)
    shutil.rmtree(sources[dropped])
    save_random_adapter(LLAMA, Path(sources[dropped]), seed=99, r=2)
    new = Adapter.load(sources[dropped])
    given = {
        "an adapter": (new,),
        "tensors and a config": (new.tensors, new.config),
        "a learner": (load(LLAMA, sources[dropped]),),
    }
    refused("have changed since it was added", pool.update, dropped, new.tensors)  # by the config that it has
    pool.update(dropped, *given[how])
    pool.swap(dropped)
    assert_same_outputs(model, load(LLAMA, sources[dropped]), LLAMA)


@pytest.mark.parametrize("subfolder", [{}, {"subfolder": "inner"}])
def test_a_file_of_the_same_size_that_changed_since_is_refused(model, sources, tmp_path, subfolder):
    for name, source in sources.items():
        shutil.copytree(source, tmp_path / "of" / name / subfolder.get("subfolder", ""))
    folders = {name: f"{tmp_path}/of/{name}" for name in sources}
    limit = limited_pool(model, sources, "b", "e")._members.max_bytes
    pool = pool_of(model, folders, max_bytes=limit, **subfolder)
    dropped = in_files(pool)[0]
    weights = Path(folders[dropped], *subfolder.values(), "adapter_model.safetensors")
    save_file(times(2, sources[dropped]), weights, {"format": "pt"})
    refused("have changed since it was added", pool.swap, dropped)


def test_using_holds_on_to_the_former_adapter(model, sources):
    pool, _ = small_pool(model, sources)
    pool.swap("e")
    others = [name for name in sources if name != "e"]
    with pool.using(others[0]):
        for name in others:
            pool.swap(name)  # "e" is dropped on the way
        shutil.rmtree(sources["e"])
        save_random_adapter(LLAMA, Path(sources["e"]), seed=99, r=2)
    assert pool.active == "e"
    assert model.peft_config["default"].r == 4


def test_adapters_from_memory_are_never_dropped(model, sources):
    pool = limited_pool(model, sources, "b", "e", "a")
    pool.add("kept", Adapter.load(sources["a"]))
    for name in ("b", "e", "c", "d", "kept"):
        pool.swap(name)
        assert pool._members["kept"].packed is not None
    refused("does not fit into the pool's memory", pool.add, "too much", Adapter.load(sources["b"]))


@pytest.mark.long
def test_an_update_that_would_leave_no_room_for_the_others_is_refused(model, sources):
    """It can't be dropped any more, unlike what is in its files."""
    pool = limited_pool(model, sources, "b")  # the largest
    for name in sources:
        refused("does not fit into the pool's memory", pool.update, name, times(2, sources[name]))
    for name in sources:
        pool.swap(name)
        assert_same_outputs(model, load(LLAMA, sources[name]), LLAMA)


def test_an_update_counts_whatever_was_read_before(model, sources):
    pool, dropped = small_pool(model, sources)
    pool.swap(dropped)
    pool._members[dropped].packed = None  # as if others had taken its place
    new = Adapter.from_state_dict(times(3, sources[dropped]), Adapter.load(sources[dropped]).config)
    pool.update(dropped, new.tensors, new.config)
    assert pool.nbytes > 0
    pool.table  # noqa: B018 - looking must not change it
    assert (pool.active, pool.version(dropped)) == (dropped, 2)
    assert verify_hotswap(model, new, inputs=LLAMA.inputs())
    assert not verify_hotswap(model, sources[dropped], inputs=LLAMA.inputs())


class WithHead(torch.nn.Module):
    """A layer for LoRA, and a head to be saved as a whole, whose BatchNorm has buffers, one of them of integers."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(12, 16)
        self.head = torch.nn.Sequential(torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 6))
        self.head.register_buffer("not_saved", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


NORMED = Kind(WithHead, lambda: torch.randn(5, 12), ("first",))


def save_with_head(folder: Path, seed: int) -> str:
    model = get_peft_model(NORMED.base(), LoraConfig(r=seed, target_modules=["first"], modules_to_save=["head"]))
    randomize(model, "default", seed)
    torch.manual_seed(seed)
    model.train()
    for _ in range(seed):  # the running statistics of other data, and how many batches that were
        model(randn(8, 12) * seed + seed)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.long
def test_a_head_with_buffers(tmp_path):
    folders = {name: save_with_head(tmp_path / name, seed) for seed, name in enumerate("abc", start=1)}
    pool = pool_of(load(NORMED, folders["a"]), folders)
    norm = pool.model.get_base_model().head.modules_to_save["default"][0]
    assert pool.active == "a"
    for name, batches in (("b", 2), ("c", 3), ("a", 1)):
        pool.swap(name)
        assert_is(pool.model, folders[name], NORMED)
        assert norm.num_batches_tracked == batches
    with torch.inference_mode():  # whose tensors don't count what is written to them
        model = load(NORMED, folders["a"])
        inferring = pool_of(model, folders)
        inferring.swap("a")
        hotswap_adapter(model, folders["c"], "default")
        inferring.swap("a")
        assert_is(model, folders["a"], NORMED)
    without = save_random_adapter(NORMED, tmp_path / "without", seed=9, r=1)
    refused(
        r"'without' has different modules_to_save from the loaded one(.|\n)*_save=\(\)(.|\n)*'head'",
        pool.add,
        "without",
        without,
    )
    two = load(NORMED, without)
    two.load_adapter(folders["a"], "other")
    pool_of(two, {"without": without}, "default").swap("without")
    assert_same_outputs(two, load(NORMED, without), NORMED)
    refused("can't be set", pool.off)
    new = Adapter.load(folders["c"])
    for share in (slice(0), slice(1)):  # none, and one number, for which PyTorch would write it to all
        some = {key: each[share] if key.endswith("running_mean") else each for key, each in new.tensors.items()}
        some = {key: each for key, each in some.items() if each.numel()}
        refused(r"does not fit the model's at \S*running_mean", pool.update, "a", some, new.config)
    pool.update("a", new.tensors, new.config)
    norm.train()(torch.ones(8, 16, dtype=torch.float64))  # what was trained since comes back after a block
    norm.eval()
    assert pool.active is None, "a head that was trained is noticed"
    trained = norm.running_mean.clone()
    with pool.using("b"):
        assert_is(pool.model, folders["b"], NORMED)
    assert torch.equal(norm.running_mean, trained)
    assert norm.num_batches_tracked == 4
    pool.swap("a")
    assert verify_hotswap(pool.model, folders["c"], inputs=NORMED.inputs(), base=NORMED.base)
    for table in (norm._buffers, norm._parameters):  # one of its tensors was replaced
        name, tensor = next(iter(table.items()))
        table[name] = copy.deepcopy(tensor)
        refused("no longer where the pool put it", pool.swap, "b")
        table[name] = tensor


def test_what_is_removed_while_it_is_dropped_comes_back_after_a_block(model, sources):
    """Though another adapter has its name by now."""
    pool, dropped = small_pool(model, sources)
    pool.swap(dropped)
    with pool.using("b"):
        pool._members[dropped].packed = None
        pool.remove(dropped)
        pool.add(dropped, sources["e"])
    assert_same_outputs(model, load(LLAMA, sources[dropped]), LLAMA)


@pytest.mark.parametrize("is_mix", [False, True])
def test_a_task_reads_a_dropped_adapter_in_another_thread(model, sources, monkeypatch, is_mix):
    pool, dropped = small_pool(model, sources)
    readers = []
    read = pool._members._read
    monkeypatch.setattr(pool._members, "_read", lambda *given: readers.append(threading.get_ident()) or read(*given))

    async def use(name):
        async with pool.using(name):
            assert_same_outputs(model, load(LLAMA, sources[dropped]), LLAMA)

    asyncio.run(use({dropped: 1.0} if is_mix else dropped))
    assert len(readers) == 1
    assert readers[0] != threading.get_ident()
    refused("nobody", lambda: asyncio.run(use("nobody")))


@pytest.mark.parametrize("read", [str, Adapter.load], ids=["folders", "memory"])
def test_adapters_that_just_fit_stay(model, sources, read):
    limit = pool_of(model, sources).nbytes
    adapters = {name: read(source) for name, source in sources.items()}
    assert pool_of(model, adapters, max_bytes=limit).nbytes == limit


def test_a_file_that_changed_while_it_was_read_is_refused_later(model, sources, monkeypatch):
    """It is not known what was read: when it has to be read again, it may be another adapter."""
    load_adapter, pool = Adapter.load, limited_pool(model, sources, "b")
    pool.remove("c")

    def and_overwritten(source, **arguments):
        adapter = load_adapter(source, **arguments)
        save_random_adapter(LLAMA, Path(source), seed=99, r=2)
        return adapter

    with monkeypatch.context() as patched:
        patched.setattr(Adapter, "load", and_overwritten)
        pool.add("c", sources["c"])
    pool.swap("b")
    refused("have changed since it was added", pool.swap, "c")
