"""AdapterPool: every swap equals a fresh load, whatever else is done to the model, and nothing is ever half done."""

from __future__ import annotations

import collections
import copy
import itertools
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from faults import run_with_fault
from lengths import few_of
from models import ARCHITECTURES, KINDS, call, load, save_random_adapter
from operations import held
from oracle import assert_equals_fresh_load, assert_same_outputs, assert_untouched, snapshot
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    RecompileWatch,
    get_strength,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    save_adapter,
    set_strength,
    verify_hotswap,
)
from hotswap_lab.core.slot import SLOTS, room_of

LLAMA, LINEAR, CONV = KINDS["llama"], KINDS["linear"], KINDS["conv"]


def assert_is(model, folder, kind=LLAMA):
    assert_equals_fresh_load(model, kind, folder, prepared=True)


def test_the_loaded_adapter_is_recognised(model, sources):
    pool = AdapterPool(model, adapters=sources, progress=False)
    assert (pool.active, pool.strength) == ("a", 1)
    pool.swap("b")
    set_strength(model, 0.5)
    again = AdapterPool(model, adapters=sources, progress=False)
    assert again.active is None, "not at its trained strength"
    pool.undo()
    assert pool.active == "a"
    assert AdapterPool(model, adapters={"b": sources["b"]}, progress=False).active is None


@pytest.mark.long
def test_every_order_of_swaps(model, pool, sources):
    slot = resolve_slot(model, "default")
    addresses = slot.data_ptrs()
    for first, second in itertools.permutations(sources, 2):
        for name in (first, second):
            pool.swap(name)
            assert pool.active == name
            assert_is(model, sources[name])
    assert slot.data_ptrs() == addresses


@pytest.mark.parametrize("name", few_of({**KINDS, **ARCHITECTURES}, ("linear", "conv", "embedding", "gpt2")))
def test_every_kind_of_layer_and_architecture(name, tmp_path):
    kind = KINDS.get(name) or ARCHITECTURES[name]
    sources = {
        str(rank): save_random_adapter(kind, tmp_path / str(rank), seed=rank, r=rank, lora_alpha=rank + 3)
        for rank in (4, 12, 8)
    }
    sources["one"] = save_random_adapter(kind, tmp_path / "one", seed=9, r=4, target_modules=[kind.modules[0]])
    model = load(kind, sources["12"])
    pool = AdapterPool(model, adapters=sources, progress=False)
    for each in ("4", "one", "12", "8", "one", "8", "4", "12", "one"):
        pool.swap(each)
        assert_is(model, sources[each], kind)


def test_a_packed_adapter_takes_its_own_rows_only(model, pool, sources):
    room = room_of(model.get_base_model(), "default")
    row = sum(band.memory.stride(0) for band in room.bands) * 4
    rest = pool._members["a"].packed.scalings.nbytes
    assert pool._members["c"].packed.nbytes <= 2 * row + rest
    assert pool._members["b"].packed.nbytes <= 8 * row + rest
    assert room.nbytes < 9 * row + 1000
    assert pool.nbytes == sum(entry.packed.nbytes for entry in pool._members.values())


@pytest.mark.long
def test_mixed_with_hotswap_adapter_and_peft(model, pool, sources, tmp_path):
    generator = random.Random(0)
    names = list(sources)
    for step in range(40):
        name = generator.choice(names)
        way = step % 5
        if way == 0:
            hotswap_adapter(model, sources[name], "default")
            assert pool.active is None
        elif way == 1:
            hotswap_adapter(model, Adapter.load(sources[name]), "default")
        elif way == 2:
            pool.swap(name)
            model.merge_adapter()
            with pytest.raises(HotswapError, match="currently merged"):
                pool.swap(generator.choice(names))
            with pytest.raises(HotswapError, match="currently merged"):
                hotswap_adapter(model, sources[name], "default")
            model.unmerge_adapter()
            # merging and unmerging rounds the base weights
            pool.swap(name)
            assert_same_outputs(model, load(LLAMA, sources[name]), LLAMA)
            continue
        elif way == 3:
            pool.swap(name)
            model.save_pretrained(tmp_path / "saved")
            assert_same_outputs(model, load(LLAMA, str(tmp_path / "saved")), LLAMA)
            save_adapter(model, tmp_path / "saved too")
            assert_same_outputs(model, load(LLAMA, str(tmp_path / "saved too")), LLAMA)
        else:
            model.load_adapter(sources[name], "other")
            model.set_adapter("other")
            assert_same_outputs(model, load(LLAMA, sources[name], "other"), LLAMA)
            model.delete_adapter("other")
            model.set_adapter("default")
            pool.swap(name)
        assert_same_outputs(model, load(LLAMA, sources[name]), LLAMA)
        assert model.peft_config["default"].r == load(LLAMA, sources[name]).peft_config["default"].r


@pytest.mark.long
def test_compiled(model, pool, sources):
    torch.compiler.reset()
    expected = {name: call(load(LLAMA, folder), LLAMA.inputs()) for name, folder in sources.items()}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    call(compiled, LLAMA.inputs())
    generator = random.Random(1)
    with RecompileWatch(allow=0):
        for _ in range(60):
            name = generator.choice(list(sources))
            pool.swap(name)
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(call(compiled, LLAMA.inputs()), expected[name], rtol=0, atol=1e-5 * scale)
        pool.off()
        torch.testing.assert_close(call(compiled, LLAMA.inputs()), call(LLAMA.base(), LLAMA.inputs()))
        hotswap_adapter(compiled, sources["b"], "default")
        torch.testing.assert_close(call(compiled, LLAMA.inputs()), expected["b"], rtol=1e-4, atol=1e-4)


def test_a_pool_for_a_compiled_model_that_was_prepared(model, sources):
    prepare_model_for_compiled_hotswap(model, adapters=sources)
    compiled = torch.compile(model, backend="eager")
    pool = AdapterPool(compiled, adapters=sources, progress=False)
    pool.swap("d")
    assert_is(model, sources["d"])
    with pytest.raises(HotswapError, match=r"\*before\* compiling"):
        AdapterPool(compiled, adapters=sources, target_rank=16, progress=False)


def _advised(action) -> None:
    with pytest.raises(HotswapError, match="check_compiled='ignore', at the price of one recompile"):
        action()


@pytest.mark.parametrize("first", [dict(r=4), dict(r=4, target_modules=["q_proj"])], ids=["other rank", "fewer layers"])
def test_more_room_in_a_compiled_model_costs_one_recompile(tmp_path, first):
    """As the refusals say, of swaps, of preparing and of pools."""
    old = save_random_adapter(LLAMA, tmp_path / "old", seed=1, **first)
    new = save_random_adapter(LLAMA, tmp_path / "new", seed=2, r=8)
    third = save_random_adapter(LLAMA, tmp_path / "third", seed=3, r=16)
    expected = {folder: call(load(LLAMA, folder), LLAMA.inputs()) for folder in (old, new, third)}
    torch.compiler.reset()
    model = load(LLAMA, old)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    compiled = torch.compile(model, backend="eager")
    call(compiled, LLAMA.inputs())
    _advised(lambda: hotswap_adapter(compiled, new, "default"))
    _advised(lambda: prepare_model_for_compiled_hotswap(compiled, adapters=[new]))
    with RecompileWatch(allow=1):
        prepare_model_for_compiled_hotswap(compiled, adapters=[new], check_compiled="ignore")
        for folder in (new, old, new):
            hotswap_adapter(compiled, folder, "default")
            torch.testing.assert_close(call(compiled, LLAMA.inputs()), expected[folder], rtol=1e-4, atol=1e-4)
    pool = AdapterPool(compiled, adapters={"old": old, "new": new}, progress=False)
    _advised(lambda: pool.add("third", third))
    family = {"old": old, "new": new, "third": third}
    _advised(lambda: AdapterPool(compiled, adapters=family, progress=False))
    with RecompileWatch(allow=1):
        pool = AdapterPool(compiled, adapters=family, check_compiled="ignore", progress=False)
        for name in ("third", "old", "new", "third"):
            pool.swap(name)
            torch.testing.assert_close(call(compiled, LLAMA.inputs()), expected[family[name]], rtol=1e-4, atol=1e-4)


# ---- what is passed in the wrong place


def test_names_in_the_wrong_place(model, sources):
    before = snapshot(model)
    with pytest.raises(HotswapError, match=r"not a name(.|\n)*as a dict(.|\n)*adapters=\{name: folder"):
        AdapterPool(model, {"b": sources["b"]})
    for adapters, kind in ((sources["b"], "str"), ([sources["b"]], "list")):
        with pytest.raises(HotswapError, match=f"no names(.|\n)*as a {kind}(.|\n)*a dict"):
            AdapterPool(model, adapters=adapters)
    assert_untouched(model, before)


def test_the_only_adapter_needs_no_name(sources):
    model = load(LLAMA, sources["a"], "mine")
    pool = AdapterPool(model, adapters={"b": sources["b"]}, progress=False)
    pool.swap("b")
    assert pool.adapter_name == "mine"
    assert_same_outputs(model, load(LLAMA, sources["b"], "mine"), LLAMA)
    model.load_adapter(sources["c"], "other")
    with pytest.raises(HotswapError, match="the adapters 'mine', 'other'"):
        AdapterPool(model, adapters={"b": sources["b"]}, progress=False)


def test_a_folder_in_place_of_tensors(pool, sources):
    with pytest.raises(HotswapError, match=r"a state dict(.|\n)*a str(.|\n)*Adapter.load\(folder\)"):
        pool.update("b", sources["b"])
    assert pool.version("b") == 1


def test_whoever_has_a_config_may_change_it(model, sources):
    """The one that the pool was given, and the one that is in the model."""
    given = Adapter.load(sources["c"])
    pool = AdapterPool(model, adapters={"a": sources["a"], "c": (given.tensors, given.config)}, progress=False)
    given.config.lora_alpha, given.config.target_modules = 77, {"nothing"}
    for _ in range(2):
        pool.swap("c")
        assert_is(model, sources["c"])
        model.peft_config["default"].lora_alpha = 99
        model.peft_config["default"].target_modules.add("more")
        pool.swap("a")
        assert_is(model, sources["a"])


# ---- using, strength, off


def test_using_gives_the_former_adapter_back(model, pool, sources):
    pool.swap("b", strength=0.5)
    before = call(model, LLAMA.inputs())
    with pool.using("c") as same:
        assert same is pool
        assert_is(model, sources["c"])
        with pool.using("d", strength=2):
            assert pool.active == "d"
            assert pool.strength == 2
        assert_is(model, sources["c"])
    assert (pool.active, pool.strength) == ("b", 0.5)
    assert torch.equal(call(model, LLAMA.inputs()), before)
    with pytest.raises(ZeroDivisionError), pool.using("c"):
        _ = 1 / 0
    assert torch.equal(call(model, LLAMA.inputs()), before)


@pytest.mark.usefixtures("python_sigint")
@pytest.mark.parametrize("way", ["AdapterPool()", "add", "swap"])
def test_ctrl_c_ends_a_long_download_at_once(model, sources, monkeypatch, way):
    def download(*_: object, **__: object) -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(60)

    pool = None
    if way != "AdapterPool()":
        pool = AdapterPool(model, adapters={"b": sources["b"]}, target_rank=8, progress=False)
        pool._members["b"].packed = None
    actions = {
        "AdapterPool()": lambda: AdapterPool(model, adapters=sources, progress=False),
        "add": lambda: pool.add("c", sources["c"]),
        "swap": lambda: pool.swap("b"),
    }
    before, start = snapshot(model), time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "load", download)
        with pytest.raises(KeyboardInterrupt):
            actions[way]()
    assert time.monotonic() - start < 30
    assert_untouched(model, before)
    actions[way]()


@pytest.mark.long
@pytest.mark.usefixtures("python_sigint")
def test_ctrl_c_in_using_leaves_the_former_adapter(model, pool, sources):
    def block() -> None:
        with pool.using("c"):
            reached.append(pool.active)

    pool.swap("b", strength=0.5)
    before, ends = call(model, LLAMA.inputs()), collections.Counter()
    while True:
        reached = []
        outcome = run_with_fault(block, ends.total() + 1, unit="signal")
        if not outcome:
            break
        assert isinstance(outcome.error, KeyboardInterrupt), outcome
        assert not held((pool._lock,)), outcome.where
        assert (pool.active, pool.strength) == ("b", 0.5), outcome.where
        assert torch.equal(call(model, LLAMA.inputs()), before), outcome.where
        ends[bool(reached)] += 1
    assert min(ends[True], ends[False]) > 30, ends


def test_using_gives_back_what_was_never_in_the_pool(model, sources):
    pool = AdapterPool(model, adapters={name: sources[name] for name in "bc"}, progress=False)
    before = call(model, LLAMA.inputs())
    with pool.using("b"):
        pass
    assert torch.equal(call(model, LLAMA.inputs()), before)
    assert_is(model, sources["a"])
    hotswap_adapter(model, sources["c"], "default")
    with pool.using("b"):
        pass
    assert_is(model, sources["c"])


def test_using_sees_an_update_of_the_former_adapter(model, pool, sources):
    pool.swap("a")
    twice = {key: 2 * tensor for key, tensor in Adapter.load(sources["a"]).tensors.items()}
    with pool.using("b"):
        pool.update("a", twice)
    slot = resolve_slot(model, "default")
    tensor = slot.layers[0].tensors[0]
    assert torch.equal(tensor.own(tensor.parameter, 4), twice[f"base_model.model.{slot.layers[0].path}.lora_A.weight"])


def test_strength_and_off(model, pool, sources):
    base = call(LLAMA.base(), LLAMA.inputs())
    pool.swap("b")
    full = call(model, LLAMA.inputs())
    pool.strength = 0.25
    assert pool.strength == get_strength(model) == 0.25
    assert not torch.allclose(call(model, LLAMA.inputs()), full)
    pool.off()
    assert torch.equal(call(model, LLAMA.inputs()), base)
    pool.swap("b")
    assert pool.strength == 1
    assert torch.equal(call(model, LLAMA.inputs()), full)
    set_strength(model, 0.5)  # behind the pool's back
    pool.swap("c")
    pool.undo()
    assert (pool.active, pool.strength) == ("b", 0.5)


@pytest.mark.parametrize("strength", [float("nan"), "1"])
def test_what_is_no_strength(model, pool, strength):
    pool.swap("b")
    before = snapshot(model)
    for refused in (lambda: pool.swap("c", strength), lambda: setattr(pool, "strength", strength)):
        with pytest.raises(HotswapError, match="not a number"):
            refused()
    assert_untouched(model, before)


def test_uneven_strengths_do_not_stand_in_the_way(model, pool, sources):
    pool.swap("b")
    for number, layer in enumerate(module for module in model.modules() if isinstance(module, LoraLayer)):
        layer.set_scale("default", 0.5 + number)
    before = call(model, LLAMA.inputs())
    pool.swap("a")
    assert_is(model, sources["a"])
    pool.undo()
    assert torch.equal(call(model, LLAMA.inputs()), before)
    with pool.using("c"):
        assert_is(model, sources["c"])
    assert torch.equal(call(model, LLAMA.inputs()), before)
    with pytest.raises(HotswapError, match="different strengths"):
        _ = pool.strength
    pool.update("b", Adapter.load(sources["b"]).tensors)
    torch.testing.assert_close(call(model, LLAMA.inputs()), before)


def test_pefts_ways_to_scale_work_on(model, pool, sources):
    pool.swap("e")
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        layer.set_scale("default", 0.5)
    fresh = load(LLAMA, sources["e"])
    for layer in (module for module in fresh.modules() if isinstance(module, LoraLayer)):
        layer.set_scale("default", 0.5)
    assert_same_outputs(model, fresh, LLAMA)
    assert pool.strength == 0.5
    pool.swap("e")
    assert_is(model, sources["e"])


# ---- add, remove, update


def test_add_and_remove(model, sources):
    pool = AdapterPool(model, adapters={"a": sources["a"], "b": sources["b"]}, progress=False)
    assert (list(pool), len(pool), "a" in pool, "c" in pool) == (["a", "b"], 2, True, False)
    pool.add("c", sources["c"])
    pool.add("from memory", (dict(Adapter.load(sources["e"]).tensors), Adapter.load(sources["e"]).config))
    pool.add("read already", Adapter.load(sources["d"]))
    for name, source in (("c", "c"), ("from memory", "e"), ("read already", "d")):
        pool.swap(name)
        assert_same_outputs(model, load(LLAMA, sources[source]), LLAMA)
    with pytest.raises(HotswapError, match="is in the model"):
        pool.remove("read already")
    pool.swap("a")
    pool.remove("read already")
    assert pool.names == ["a", "b", "c", "from memory"]
    with pytest.raises(HotswapError, match="no adapter called 'read already'"):
        pool.swap("read already")
    with pytest.raises(HotswapError, match="already"):
        pool.add("a", sources["b"])


def test_what_does_not_fit_is_refused_and_the_model_untouched(model, sources, tmp_path):
    pool = AdapterPool(model, adapters={"a": sources["a"], "c": sources["c"]}, progress=False)
    pool.swap("c")
    large = save_random_adapter(LLAMA, tmp_path / "large", seed=9, r=16)
    before = snapshot(model)
    with pytest.raises(HotswapError, match="target_rank=16"):
        pool.add("large", large)
    (tmp_path / "broken").mkdir()
    with pytest.raises(HotswapError, match="Can't find"):
        pool.add("broken", tmp_path / "broken")
    with pytest.raises(HotswapError, match="There is no adapter to read"):
        AdapterPool(model, adapters={"what": 3}, progress=False)
    assert_untouched(model, before)
    assert pool.names == ["a", "c"]


def test_a_pool_that_can_not_be_made_leaves_the_model_as_it_was(model, sources, tmp_path):
    broken = Path(shutil.copytree(sources["b"], tmp_path / "broken"))
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = snapshot(model)
    with pytest.raises(HotswapError, match="can't be read"):
        AdapterPool(model, adapters={"a": sources["a"], "b": broken}, progress=False)
    assert_untouched(model, before)
    assert not model.get_base_model().__dict__.get(SLOTS)
    hotswap_adapter(model, sources["b"], "default")
    assert_equals_fresh_load(model, LLAMA, sources["b"])


def test_update(model, pool, sources):
    new = dict(Adapter.load(sources["d"]).tensors)
    config = Adapter.load(sources["d"]).config
    assert pool.version("d") == 1
    pool.swap("d")
    for version in range(2, 6):
        new = {key: tensor * 1.5 for key, tensor in new.items()}
        pool.update("d", new)
        assert pool.version("d") == version
        assert verify_hotswap(model, Adapter.from_state_dict(new, config), inputs=LLAMA.inputs())
    pool.swap("a")
    before = call(model, LLAMA.inputs())
    pool.update("d", Adapter.load(sources["d"]).tensors)
    assert torch.equal(call(model, LLAMA.inputs()), before), "an adapter that is not in use changes nothing"
    pool.swap("d")
    assert_same_outputs(model, load(LLAMA, sources["d"]), LLAMA)
    with pytest.raises(HotswapError, match="NaN"):
        pool.update("d", {key: tensor * float("nan") for key, tensor in new.items()})
    assert pool.version("d") == 6
    assert_same_outputs(model, load(LLAMA, sources["d"]), LLAMA)


def test_an_update_only_reads_what_it_is_given(model, pool, sources):
    new = {key: tensor.clone() for key, tensor in Adapter.load(sources["a"]).tensors.items()}
    pool.update("a", new)
    pool.swap("a")
    before = call(model, LLAMA.inputs())
    for tensor in new.values():
        tensor.zero_()
    pool.swap("b")
    pool.swap("a")
    assert torch.equal(call(model, LLAMA.inputs()), before)


# ---- a model that is not where it was


def give_other_memory(model):
    parameter = resolve_slot(model, "default").tensors[5].parameter
    parameter.data = torch.zeros_like(parameter)


def delete_and_load(model):
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=4, target_modules=["q_proj"]))


MOVES = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "other memory": give_other_memory,
    "assigned state": lambda model: model.load_state_dict(
        {key: value.clone() for key, value in model.state_dict().items()}, assign=True
    ),
    "deleted and loaded": delete_and_load,
    "unloaded": lambda model: model.unload(),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_model_that_was_moved_is_noticed(model, pool, sources, move):
    pool.swap("b")
    MOVES[move](model)
    with pytest.raises(HotswapError, match=r"no longer where the pool put it|not found|No adapter layers"):
        pool.swap("a")
    with pytest.raises(HotswapError, match=r"no longer where the pool put it|not found|No adapter layers"):
        pool.swap("a")
    if move in ("bfloat16", "half", "other memory", "assigned state"):
        hotswap_adapter(model, sources["a"], "default")
        fresh = load(LLAMA, sources["a"]).to(model.dtype)
        precision = {} if model.dtype == torch.float32 else dict(tolerance=1e-2, margin=5)
        assert_same_outputs(model, fresh, LLAMA, **precision)
        again = AdapterPool(model, adapters={"c": sources["c"], "b": sources["b"]}, progress=False)
        again.swap("c")
        fresh = load(LLAMA, sources["c"]).to(model.dtype)
        assert_same_outputs(model, fresh, LLAMA, **precision)


def test_moving_there_and_back_is_fine_if_nothing_moved(model, pool, sources):
    pool.swap("b")
    model.to("cpu").float()
    pool.swap("a")
    assert_is(model, sources["a"])


def test_mixed_dtypes(tmp_path, sources):
    model = load(LLAMA, sources["a"])
    for number, tensor in enumerate(resolve_slot(model, "default").tensors):
        if number % 3 == 0:
            tensor.parameter.data = tensor.parameter.data.bfloat16().float().double()
    model.double()
    for tensor in resolve_slot(model, "default").tensors[::2]:
        tensor.parameter.data = tensor.parameter.data.float()
    pool = AdapterPool(model, adapters=sources, progress=False)
    bands = room_of(model.get_base_model(), "default").bands
    assert {band.memory.dtype for band in bands} == {torch.float32, torch.float64}
    for name in ("b", "c", "a", "e"):
        pool.swap(name)
        slot = resolve_slot(model, "default")
        assert {tensor.parameter.dtype for tensor in slot.tensors} == {torch.float32, torch.float64}
        tensors = Adapter.load(sources[name]).tensors
        for layer in slot.layers:
            for tensor in layer.tensors:
                source = tensors.get(f"base_model.model.{layer.path}.{tensor.key}")
                if source is None:
                    assert not tensor.parameter.any()
                else:
                    rank = tensor.rank_of(source.shape)
                    assert torch.equal(tensor.own(tensor.parameter, rank).float(), source)
                    assert not tensor.padding(tensor.parameter, rank).any()


def test_a_middle_part_that_was_replaced_is_noticed(model, pool, sources):
    base = model.get_base_model()
    base.model.layers[0].mlp = copy.deepcopy(base.model.layers[0].mlp)
    with pytest.raises(HotswapError, match="no longer where the pool put it"):
        pool.swap("b")
    hotswap_adapter(model, sources["b"], "default")
    assert_same_outputs(model, load(LLAMA, sources["b"]), LLAMA)


def test_a_part_that_was_compiled_since_is_still_the_same(model, pool, sources):
    base = model.get_base_model()
    base.model.layers[1] = torch.compile(base.model.layers[1], backend="eager")
    pool.swap("b")
    assert_same_outputs(model, load(LLAMA, sources["b"]), LLAMA)


def test_a_part_that_was_compiled_since_where_layers_lie_in_another_order(tmp_path):
    """Layers that were reserved come last in the room, wherever they are in the model."""
    late = save_random_adapter(LLAMA, tmp_path / "late", seed=1, r=4, target_modules=["down_proj"])
    every = save_random_adapter(LLAMA, tmp_path / "every", seed=2, r=4)
    model = load(LLAMA, late)
    pool = AdapterPool(model, adapters={"late": late, "every": every}, progress=False)
    base = model.get_base_model()
    base.model.layers[0] = torch.compile(base.model.layers[0], backend="eager")
    for name, folder in (("every", every), ("late", late)):
        pool.swap(name)
        assert_same_outputs(model, load(LLAMA, folder), LLAMA)


def test_an_embedding_is_reserved_that_another_adapter_is_on(tmp_path):
    kind = KINDS["embedding"]
    head = save_random_adapter(kind, tmp_path / "head", seed=1, r=4, target_modules=["head"])
    embedding = save_random_adapter(kind, tmp_path / "embedding", seed=2, r=4, target_modules=["embed"])
    model = load(kind, head)
    model.load_adapter(embedding, "other")
    pool = AdapterPool(model, "default", adapters={"head": head, "embedding": embedding}, progress=False)
    for name, folder in (("embedding", embedding), ("head", head)):
        pool.swap(name)
        assert_same_outputs(model, load(kind, folder), kind)


def test_two_layers_that_have_changed_places_are_noticed(model, pool, sources):
    """Where the same layers and parameters are, but each layer has the other one's."""
    layers = [layer.self_attn.q_proj for layer in model.get_base_model().model.layers[:2]]
    one, other = (layer.lora_A["default"]._parameters for layer in layers)
    one["weight"], other["weight"] = other["weight"], one["weight"]
    before = snapshot(model)
    with pytest.raises(HotswapError, match="no longer where the pool put it"):
        pool.swap("b")
    assert_untouched(model, before)


def test_assigned_tensors_of_one_layer_are_noticed(model, pool, sources):
    state = {key: value.clone() for key, value in model.state_dict().items() if "layers.0.mlp.up_proj.lora" in key}
    model.load_state_dict(state, strict=False, assign=True)
    with pytest.raises(HotswapError, match="no longer where the pool put it"):
        pool.swap("b")
    hotswap_adapter(model, sources["b"], "default")
    assert_same_outputs(model, load(LLAMA, sources["b"]), LLAMA)


def test_layers_that_were_added_since_are_noticed(sources):
    model = load(LLAMA, sources["c"])
    pool = AdapterPool(model, adapters={"c": sources["c"]}, target_rank=8, progress=False)
    hotswap_adapter(model, sources["a"], "default", add_layers=True)
    assert_same_outputs(model, load(LLAMA, sources["a"]), LLAMA)
    with pytest.raises(HotswapError, match="no longer where the pool put it"):
        pool.swap("c")


# ---- training


def train(model, optimizer, steps=3):
    for _ in range(steps):
        model(**LLAMA.inputs()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("way", ["pool", "hotswap_adapter"])
def test_what_an_optimizer_wrote_into_the_padding_is_gone_after_a_swap(sources, way, tmp_path):
    """Adam goes on moving rows that only the last adapter had."""
    model = load(LLAMA, sources["b"], is_trainable=True)
    pool = AdapterPool(model, adapters=sources, progress=False)
    optimizer = torch.optim.AdamW(trainable(model), 0.1)
    train(model, optimizer)
    pool.swap("a")
    train(model, optimizer)
    with pytest.raises(HotswapError, match="can't be saved as it is"):
        save_adapter(model, tmp_path / "saved")
    with pytest.warns(UserWarning, match="make a new one after a swap"):
        model.state_dict()
    if way == "pool":
        pool.swap("d")
    else:
        hotswap_adapter(model, sources["d"], "default")
    assert_same_outputs(model, load(LLAMA, sources["d"]), LLAMA)


def test_using_gives_trained_weights_back(sources):
    model = load(LLAMA, sources["a"], is_trainable=True)
    pool = AdapterPool(model, adapters=sources, progress=False)
    pool.swap("a")
    train(model, torch.optim.SGD(trainable(model), 0.5))
    assert pool.active is None, "no longer what the pool has under this name"
    before = call(model, LLAMA.inputs())
    with pool.using("b"):
        assert_same_outputs(model, load(LLAMA, sources["b"]), LLAMA)
    assert torch.equal(call(model, LLAMA.inputs()), before)
    pool.swap("c")
    pool.undo()
    assert torch.equal(call(model, LLAMA.inputs()), before)


def test_a_checkpoint_of_another_rank_or_other_layers_is_refused(sources):
    model = load(LLAMA, sources["b"])
    pool = AdapterPool(model, adapters=sources, progress=False)
    of_rank_8 = {key: value.clone() for key, value in model.state_dict().items()}
    for name in ("a", "d"):
        pool.swap(name)
        with pytest.raises(HotswapError, match="of another adapter"):
            model.load_state_dict(of_rank_8)
        pool.swap(name)
        assert_same_outputs(model, load(LLAMA, sources[name]), LLAMA)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    pool.swap("d")
    model.load_state_dict(own)
    assert_same_outputs(model, load(LLAMA, sources["d"]), LLAMA)


def test_gradients_are_cleared_and_autograd_notices_a_swap(sources):
    model = load(LLAMA, sources["a"], is_trainable=True)
    pool = AdapterPool(model, adapters=sources, progress=False)
    pool.swap("b")
    outputs = model(**LLAMA.inputs()).logits.sum()
    pool.swap("a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.backward()
    model(**LLAMA.inputs()).logits.sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    pool.swap("c")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inference_models(sources):
    with torch.inference_mode():
        model = load(LLAMA, sources["a"])
    pool = AdapterPool(model, adapters=sources, progress=False)
    with torch.inference_mode():
        pool.swap("b")
    pool.swap("c")
    assert_same_outputs(model, load(LLAMA, sources["c"]), LLAMA)


# ---- several places, copies, threads


def test_two_pools_on_two_adapters_of_one_model(sources):
    model = load(LLAMA, sources["a"], "one")
    model.load_adapter(sources["c"], "two")
    pools = {name: AdapterPool(model, name, sources, progress=False) for name in ("one", "two")}
    for first, second in itertools.permutations(sources, 2):
        pools["one"].swap(first)
        pools["two"].swap(second)
        for name, source in (("one", first), ("two", second)):
            model.set_adapter(name)
            assert_same_outputs(model, load(LLAMA, sources[source], name), LLAMA)
    assert pools["one"].active == "e"
    assert (pools["one"].strength, pools["two"].strength) == (1, 1)


def test_copies_of_a_model_with_a_pool_live_on_their_own(model, pool, sources):
    pool.swap("b")
    twin = copy.deepcopy(model)
    pool.swap("a")
    assert_same_outputs(twin, load(LLAMA, sources["b"]), LLAMA)
    hotswap_adapter(twin, sources["c"], "default")
    assert_is(twin, sources["c"])
    assert_is(model, sources["a"])
    AdapterPool(twin, adapters=sources, progress=False).swap("e")
    assert_is(twin, sources["e"])
    assert_is(model, sources["a"])


def test_two_threads_that_swap_never_leave_a_mixture(model, pool, sources):
    errors = []

    def swap_often(names):
        try:
            for _ in range(200):
                for name in names:
                    pool.swap(name)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=swap_often, args=(names,)) for names in ("ab", "cd")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_is(model, sources[pool.active])


# ---- how it looks


def test_text_and_html(pool):
    pool.swap("e")
    lines = str(pool).splitlines()
    assert lines[0].startswith("AdapterPool: 5 adapters, ")
    assert lines[1].split() == ["adapter", "rank", "alpha", "layers", "bytes"]
    assert [line.split()[0] for line in lines[2:]] == list("abcde")
    assert "4 to 7" in lines[6]
    assert lines[6].endswith("active")
    assert sum(line.endswith("active") for line in lines) == 1
    html = pool._repr_html_()
    assert "<table" in html
    assert "4 to 7" in html


def test_a_progress_bar_is_shown_unless_unwanted(sources, capsys):
    AdapterPool(load(LLAMA, sources["a"]), adapters=sources)
    assert "packing" in capsys.readouterr().err
    AdapterPool(load(LLAMA, sources["a"]), adapters=sources, progress=False)
    assert capsys.readouterr().err == ""


def test_an_adapter_name_that_is_not_there(model, sources):
    with pytest.raises(HotswapError, match="not found"):
        AdapterPool(model, "nobody", sources, progress=False)


def test_a_model_without_adapters(sources):
    with pytest.raises(HotswapError, match="No adapter layers found"):
        AdapterPool(LLAMA.base(), adapters=sources, progress=False)


def _triple(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {key: 3 * tensor for key, tensor in adapter.tensors.items()}


@pytest.mark.parametrize("what", ["fewer layers than the family", "another adapter beside it", "a loss was alive"])
def test_what_is_in_the_model_is_known_as_in_use(sources, what):
    """So an update reaches the model at once, and it can't be removed."""
    name, trainable = ("d" if what == "fewer layers than the family" else "a"), what == "a loss was alive"
    model = load(LLAMA, sources[name], is_trainable=trainable)
    loss = call_with_gradients(model) if trainable else None
    pool = AdapterPool(model, adapters=sources, progress=False)
    del loss
    if what == "another adapter beside it":
        pool.swap("a")
        model.load_adapter(sources["b"], "other")
    elif trainable:
        pool.swap("a")
    assert pool.active == name
    before = call(model, LLAMA.inputs())
    adapter = Adapter.load(sources[name])
    pool.update(name, _triple(adapter), adapter.config)
    assert (call(model, LLAMA.inputs()) - before).abs().max() > 1e-2
    with pytest.raises(HotswapError, match="in use"):
        pool.remove(name)


def call_with_gradients(model) -> torch.Tensor:
    return model(**LLAMA.inputs()).logits.sum()


def test_an_optimizer_is_noticed_where_a_loss_was_alive(sources):
    model = load(LLAMA, sources["a"], is_trainable=True)
    loss = call_with_gradients(model)
    pool = AdapterPool(model, adapters=sources, progress=False)
    del loss
    pool.swap("a")
    assert pool.active == "a"
    with torch.no_grad():
        next(each for each in model.parameters() if each.requires_grad).add_(1)
    assert pool.active is None


def test_one_layer_scaled_by_hand_is_no_error(model, pool):
    pool.swap("b")
    next(each for each in model.modules() if isinstance(each, LoraLayer)).scale_layer(0.5)
    assert pool.active == "b"
    assert "active" in str(pool)
    with pytest.raises(HotswapError, match="different strengths"):
        _ = pool.strength


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
