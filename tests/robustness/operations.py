"""Every public operation, each on a small model of its own: how to do it, what it may change, what must come out."""

from __future__ import annotations

import functools
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from adapters import save_random_adapter_of
from exported import bind, file_of
from models import KINDS, call, load
from oracle import assert_close, assert_equals_fresh_load, assert_same_outputs, files_in, plain, surroundings
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, PeftModel
from row_truth import Truth

import hotswap_lab
from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    RecompileWatch,
    get_strength,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    loaded,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    save_adapter,
    set_strength,
    verify_hotswap,
)
from hotswap_lab import threads as turns
from hotswap_lab.files import saving
from hotswap_lab.pools.rows import RowRoom
from hotswap_lab.threads import _patience as patience

LINEAR = KINDS["linear"]


@dataclass
class Case:
    """One operation, ready to be done."""

    action: Callable[[], object]
    models: tuple[torch.nn.Module, ...] = ()
    #: whatever else it may change, as something that can be compared
    extra: Callable[[], object] = lambda: None
    #: compares what the action has led to with a fresh load
    check: Callable[[], None] = lambda: None
    #: whether the action changes anything at all
    changes: bool = True
    #: states of its own on the way that are whole, too: made by these actions
    stations: tuple[Callable[[], object], ...] = field(default=())
    #: the way back to what the model was made with, and what compares it with a fresh load
    back: Callable[[], None] | None = None
    #: locks that nobody holds afterwards, beside those that are found by themselves
    locks: tuple = ()


# ---- what is compared


def held(locks: tuple) -> list[str]:
    """The locks that this thread still holds: whoever comes next, from another thread, would wait for ever."""
    found = [f"{lock}" for lock in locks if lock._is_owned()]
    for base, turn in list(turns._turns.items()):
        found += [f"a block of {type(base).__name__} to {each.kind}" for each in (*turn.open, *turn.queue)]
        found += [f"the lock of {type(base).__name__}"] * turn.lock._is_owned()
    return found + ["the exchange of files"] * saving._replacing.locked()


def around() -> dict:
    """What an operation must leave alone outside of its models."""
    return {**surroundings(), "patience": patience.get()}


# ---- adapters


class Shelf:
    """Adapters in folders, each made when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._made: dict[tuple, str] = {}

    def __call__(self, seed: int, config: PeftConfig | None = None, **lora) -> str:
        config = config or LoraConfig(**{"target_modules": list(LINEAR.modules), **lora})
        key = seed, repr(config)
        if key not in self._made:
            folder = self.folder / f"adapter_{len(self._made)}"
            self._made[key] = save_random_adapter_of(config, folder, seed, LINEAR)
        return self._made[key]


def _trained(folder: str, target_rank: int | None = None) -> PeftModel:
    """A model with gradients, and some of its modules in training mode; perhaps a prepared one."""
    model = load(LINEAR, folder, is_trainable=True)
    if target_rank:
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
        hotswap_adapter(model, folder, "default")  # from now on, the room knows what is zero
        with torch.no_grad():
            for each in filter(attrgetter("requires_grad"), model.parameters()):
                each.add_(0.1)  # beyond the adapter's own rank, too, as an optimizer's momentum does
    model(LINEAR.inputs()).sum().backward()
    model.base_model.model.blocks.train()
    return model


# ---- the table

OPERATIONS: dict[str, Callable[[Shelf], Callable[[], Case]]] = {}


def operation(name: str, *arguments: object):
    """Notes a function that gets a shelf and returns what makes a fresh case."""

    def note(make):
        OPERATIONS[name] = functools.partial(make, *arguments) if arguments else make
        return make

    return note


@operation("Adapter.load")
def _load(shelf):
    folder = shelf(1, r=4)
    return lambda: Case(lambda: Adapter.load(folder), extra=lambda: files_in(folder), changes=False)


def refused(action: Callable[[], object]) -> None:
    with pytest.raises(HotswapError):
        action()


def _on(make, action, check=lambda model: None, changes=True, back=None, extra=lambda model: None):
    """Something that is done to one model."""

    def case():
        model = make()
        return Case(
            lambda: action(model),
            (model,),
            check=lambda: check(model),
            extra=lambda: extra(model),
            changes=changes,
            back=back and (lambda: back(model)),
        )

    return case


@operation("plan_hotswap", lambda model, new: plan_hotswap(model, new, add_layers=True))
@operation("plan_hotswap that refuses", lambda model, new: refused(lambda: hotswap_adapter(model, new, "default")))
def _plan(action, shelf):
    old, new = shelf(1, r=4, target_modules=["first"]), shelf(2, r=6)
    return _on(lambda: _trained(old), lambda model: action(model, new), changes=False)


FIRST = dict(r=4, target_modules=["first"])


@operation("hotswap: copy", dict(r=4, lora_alpha=8), dict(r=4, lora_alpha=3, lora_dropout=0.1), {})
@operation("hotswap: resize and off", dict(r=4), dict(r=6, lora_alpha=3, target_modules=["first", "blocks.0"]), {})
@operation("hotswap: prepared", dict(r=6), dict(r=4, lora_dropout=0.1, target_modules=["first"]), dict(target_rank=8))
@operation("hotswap: add layers", FIRST, dict(r=6), dict(add_layers=True))
@operation("hotswap: DoRA", dict(r=4, use_dora=True), dict(r=3, use_dora=True, lora_alpha=5), {})
@operation("hotswap: to DoRA", dict(r=4), dict(r=3, use_dora=True), {})
@operation("hotswap: bias", dict(r=4), dict(r=4, bias="all"), {})
@operation("hotswap: modules_to_save", FIRST, FIRST | dict(modules_to_save=["last"]), {})
def _swap(old_lora, new_lora, arguments, shelf):
    return _swap_case(shelf(1, **old_lora), shelf(2, **new_lora), **arguments)


def _swap_case(old, new, other=None, way=None, target_rank=None, **arguments):
    """A swap in a model in training, perhaps beside another adapter, perhaps prepared."""
    settings = dict(is_trainable=True, prepared=bool(target_rank))

    def make():
        model = _trained(old, target_rank)
        if other:
            model.load_adapter(other, "other")
            model.set_adapter("default")
        return model

    def back(model):
        hotswap_adapter(model, old, "default")
        assert_equals_fresh_load(model.eval(), LINEAR, old, **settings)

    return _on(
        make,
        way or (lambda model: hotswap_adapter(model, new, "default", **arguments)),
        lambda model: assert_equals_fresh_load(model.eval(), LINEAR, new, **settings),
        back=back,
    )


@operation(
    "hotswap: LoHa", LoHaConfig(r=3, target_modules=["first", "last"]), LoHaConfig(r=4, target_modules=["first"])
)
@operation(
    "hotswap: IA3", *(IA3Config(target_modules=t, feedforward_modules=[]) for t in (["first", "last"], ["last"]))
)
def _swap_other(old_config, new_config, shelf):
    return _swap_case(shelf(1, old_config), shelf(2, new_config))


@operation("hotswap: add DoRA to layers of another adapter")
def _swap_beside(shelf):
    old, new = shelf(1, r=4, use_dora=True, target_modules=["first"]), shelf(2, r=6, use_dora=True)
    return _swap_case(old, new, shelf(3, r=3), add_layers=True)


@operation("hotswap: compiled ahead", 1)
@operation("hotswap: rows, compiled ahead", 3)
def _swap_ahead(rows, shelf):
    """A swap that code compiled ahead of time reads, and a check by calling this code."""
    old, new, x = shelf(1, r=4), shelf(2, r=6, lora_alpha=3, target_modules=["first"]), LINEAR.inputs()[:3]

    def make():
        model, sources = load(LINEAR, old), {"old": old, "new": new}
        if rows > 1:
            AdapterPool(model, adapters=sources, target_rank=8, rows=rows, progress=False).assign(["new", None, "old"])
        else:
            prepare_model_for_compiled_hotswap(model, target_rank=8)
        return model

    path = file_of(make(), shelf.folder, kwargs=dict(x=x))

    def check(model, folder):
        assert_close(bind(path, model)(x), call(load(LINEAR, folder), x))
        assert_equals_fresh_load(model, LINEAR, folder, prepared=True)

    def swap(model, folder):
        hotswap_adapter(model, folder, "default")

    # no parameter shows what rows compute with
    rows_now = lambda model: [each.member for each in loaded(model)[0].rows]  # noqa: E731
    return _on(make, lambda model: swap(model, new), lambda model: check(model, new), extra=rows_now)


@operation("hotswap from a state dict")
def _from_state_dict(shelf):
    new = Adapter.load(shelf(2, r=6, lora_alpha=3))
    way = lambda model: hotswap_adapter_from_state_dict(model, new.tensors, "default", new.config)  # noqa: E731
    return _swap_case(shelf(1, r=4), new.source, way=way)


@operation("prepare")
def _prepare(shelf):
    """Two adapters, one of them on a layer that the other lacks, and a family that adds a third layer."""
    first = shelf(1, r=4, target_modules=["first", "last"])
    second = shelf(2, r=6, target_modules=["last", "blocks.0"])

    def make():
        model = load(LINEAR, first, is_trainable=True)
        model.mine = LoraConfig(r=3)
        model.load_adapter(second, "second")
        model(LINEAR.inputs()).sum().backward()
        return model

    def prepare(model):
        family = [LoraConfig(r=8, target_modules=["blocks.1"]), LoraConfig.from_pretrained(second)]
        prepare_model_for_compiled_hotswap(model, target_rank=9, adapters=family, config=model.mine)

    def check(model):
        for name, folder in (("default", first), ("second", second)):
            model.set_adapter(name)
            assert_same_outputs(model, load(LINEAR, folder, name), LINEAR)
            slot = hotswap_lab.resolve_slot(model, name)
            assert {tensor.capacity for tensor in slot.tensors} == {9}

    return _on(make, prepare, check)


@operation("set_strength", None)
@operation("set_strength: prepared", 4)
def _strength(target_rank, shelf):
    def check(model):
        assert get_strength(model) == 0.5

    old = shelf(1, r=4)
    return _on(lambda: _trained(old, target_rank), lambda model: set_strength(model, 0.5), check)


@operation("verify_hotswap")
def _verify(shelf):
    new = shelf(2, r=6, lora_alpha=3)

    def verify(model):
        assert verify_hotswap(model, new, inputs=LINEAR.inputs())

    return _on(lambda: _trained(new), verify, changes=False)


@operation("RecompileWatch")
def _watch(shelf):
    from torch._dynamo.callback import callback_handler

    def watch():
        with RecompileWatch() as each:
            each.call("a call", lambda: None)

    listeners = lambda: len(callback_handler.start_callbacks)  # noqa: E731
    return lambda: Case(watch, extra=listeners, changes=False)


@operation("state_dict of a prepared model", lambda model: model.state_dict())
@operation("load_state_dict that is refused", lambda model: refused(lambda: _load_wrong(model)))
def _state_dict(action, shelf):
    old = shelf(1, r=3)

    def make():
        model = load(LINEAR, old)
        prepare_model_for_compiled_hotswap(model, target_rank=4, adapters=[shelf(2, r=4)])
        return model

    return _on(make, action, changes=False)


def _load_wrong(model):
    """What torch itself refuses it has loaded half of; what is refused here, because of the last layer, not."""
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(state | {"base_model.model.last.lora_B.default.weight": torch.ones(6, 2)})


# ---- saving


@operation("save_adapter", "new", None)
@operation("save_adapter over another", "over", "adapter_model.safetensors")
@operation("save_adapter over a .bin", "over", "adapter_model.bin")
@operation("save_adapter into new folders", "new/a/b", None)
def _save(where, previous, shelf):
    first, second = shelf(1, r=4), shelf(2, r=6, target_modules=["first"])
    expected = {"adapter_config.json", "adapter_model.safetensors"}
    expected |= {previous, "notes.txt"} if previous else set()

    def case():
        root = Path(tempfile.mkdtemp(dir=shelf.folder))
        folder = root / where
        if previous:
            shutil.copytree(first, folder)
            (folder / "adapter_model.safetensors").rename(folder / previous)
            (folder / "notes.txt").write_text("mine")
        model = _trained(second)

        def check():
            assert files_in(folder).keys() == expected
            assert_equals_fresh_load(load(LINEAR, folder), LINEAR, second)
            shutil.rmtree(root)

        return Case(lambda: save_adapter(model, folder), (model,), extra=lambda: files_in(root), check=check)

    return case


# ---- pools


def _pool_sources(shelf) -> dict[str, str]:
    return {
        "a": shelf(1, r=4, lora_alpha=3),
        "b": shelf(2, r=6, target_modules=["first"], lora_dropout=0.1),
        "dropped": shelf(3, r=2, use_rslora=True),
    }


def pool_state(pool: AdapterPool) -> dict:
    """What a pool has, in plain values. Which of its adapters are packed doesn't count: files have them, too."""

    def of(packed):
        return None if packed is None else ([plain(part) for part in packed.bands], plain(packed.scalings))

    entries = {
        name: (each.version, each.source, of(each.packed) if each.source is None else None, each.digest)
        for name, each in pool._members.items()
    }
    rows = [plain(room._rows_of(band)) for room in [pool._room] if isinstance(room, RowRoom) for band in room.bands]
    labels = [str(row) for row in pool.rows]
    return dict(
        entries=entries,
        rows=(rows, labels),
        active=pool.active,
        strength=round(pool.strength, 4),
    )


@operation("AdapterPool()", 1, 0)
@operation("AdapterPool(rows=)", 3, 0)
@operation("AdapterPool(rows=) with other rows than before", 3, 2)
def _make_pool(rows, rows_before, shelf):
    sources = _pool_sources(shelf)
    truth = Truth(LINEAR, sources, LINEAR.inputs()[:3])

    def case():
        model, made = _trained(sources["a"]) if rows == 1 else load(LINEAR, sources["a"]), []
        if rows_before:
            AdapterPool(model, adapters=sources, rows=rows_before, progress=False)
        base = model.get_base_model()

        def check():
            if rows > 1:
                made[0].assign(["b", None, "dropped"])
                truth.check(call(model, truth.inputs), ["b", None, "dropped"])
            for name in sources:
                made[0].swap(name)
                truth.check(call(model.eval(), truth.inputs), [name] * 3)

        return Case(
            lambda: made.append(AdapterPool(model, adapters=sources, target_rank=10, rows=rows, progress=False)),
            (model,),
            extra=lambda: {"rows": [each.func.__self__.rows for each in base._forward_pre_hooks.values()]},
            check=check,
        )

    return case


def _in_block(pool, block):
    with block:
        call(pool.model, LINEAR.inputs()[:3])


@functools.cache
def _learner(folder):
    return load(LINEAR, folder)


MIX = {"a": 0.5, "b": 1.0}
BEFORE, WANTED, STRENGTHS = ["a", "b", "a"], ["b", None, MIX], [1.0, 1.0, 2.0]
#: what is done, what the rows of a batch have afterwards, how strongly, and another whole state on the way
POOL: dict[str, tuple] = {
    "pool.swap": (lambda pool, new: pool.swap("b"), "b"),
    "pool.swap with strength": (lambda pool, new: pool.swap("b", 0.5), "b", 0.5),
    "pool.swap of a dropped adapter": (lambda pool, new: pool.swap("dropped"), "dropped"),
    "pool.strength": (lambda pool, new: setattr(pool, "strength", 0.5), "a", 0.5),
    "pool.off": (lambda pool, new: pool.off(), None),
    "pool.add": (lambda pool, new: pool.add("new", new.source), "a"),
    "pool.add with eviction": (lambda pool, new: pool.add("new", new.source), "a"),
    "pool.remove": (lambda pool, new: pool.remove("b"), "a"),
    "pool.update": (lambda pool, new: pool.update("b", new.tensors, new.config), "a"),
    "pool.update of the active one": (lambda pool, new: pool.update("a", new.tensors, new.config), "new"),
    "pool.update from a learner": (lambda pool, new: pool.update("a", _learner(new.source)), "new"),
    "pool.update from a learner again": (
        lambda pool, new: [pool.update("a", _learner(new.source)) for _ in range(2)],
        *("new", 1.0, lambda pool, new: pool.update("a", _learner(new.source))),
    ),
    "pool.using": (
        lambda pool, new: _in_block(pool, pool.using("b", 0.5)),
        *("a", 1.0, lambda pool, new: pool.swap("b", 0.5)),
    ),
    "pool.using of a dropped adapter": (
        lambda pool, new: _in_block(pool, pool.using("dropped", 0.5)),
        *("a", 1.0, lambda pool, new: pool.swap("dropped", 0.5)),
    ),
    "pool.table": (lambda pool, new: pool.table, "a"),
}
#: the same with rows
ROW_POOL: dict[str, tuple] = {
    "pool.assign": (lambda pool, new: pool.assign(WANTED, STRENGTHS), WANTED, STRENGTHS),
    "pool.assign of a dropped adapter": (lambda pool, new: pool.assign(["a", "dropped", None]), ["a", "dropped", None]),
    "pool.assigned": (
        lambda pool, new: _in_block(pool, pool.assigned(WANTED, STRENGTHS)),
        *(BEFORE, [1.0, 0.5, 1.0], lambda pool, new: pool.assign(WANTED, STRENGTHS)),
    ),
    "pool.off with rows": (lambda pool, new: pool.off(), None),
    "pool.swap of a mix": (lambda pool, new: pool.swap(MIX), MIX),
    "pool.update of a row": (
        lambda pool, new: pool.update("b", new.tensors, new.config),
        *(["a", "new", "a"], [1.0, 0.5, 1.0]),
    ),
    "hotswap: rows": (lambda pool, new: hotswap_adapter(pool.model, new.source, "default"), "new"),
}


def _pool(name, shelf):
    rows = 3 if name in ROW_POOL else 1
    action, wanted, *more = (POOL | ROW_POOL)[name]
    wanted = wanted if isinstance(wanted, list) else [wanted] * 3
    strengths, *stations = more or [1.0]
    strengths = strengths if isinstance(strengths, list) else [strengths] * 3
    sources, new = _pool_sources(shelf), Adapter.load(shelf(4, r=3, lora_alpha=9))
    truth = Truth(LINEAR, {**sources, "new": new.source}, LINEAR.inputs()[:3])

    def case():
        # what is called in a block draws no random numbers
        model = load(LINEAR, sources["a"]) if rows > 1 or stations else _trained(sources["a"])
        pool = AdapterPool(model, adapters=sources, target_rank=10, rows=rows, progress=False)
        pool.swap("b")
        if rows > 1:
            pool.assign(BEFORE, [1.0, 0.5, 1.0])
        else:
            pool.swap("a")
        if "dropped" in name or "eviction" in name:
            pool._members["dropped"].packed = None
        if "eviction" in name:
            pool._members.max_bytes = pool.nbytes + 64

        def check():
            truth.check(call(model.eval(), truth.inputs), wanted, strengths)
            if rows == 1 and wanted[0] and strengths == [1.0] * 3:
                folder = truth.folders[wanted[0]]
                assert_equals_fresh_load(model, LINEAR, folder, prepared=True, is_trainable=not stations)
            if "eviction" in name:
                assert pool._members["b"].packed is None
            after = ["dropped"] * 3
            if rows == 1:
                pool.swap("dropped")
            else:
                pool.assign(after := ["dropped", {"dropped": -1.0, "a": 1.0}, None])
            truth.check(call(model, truth.inputs), after)

        return Case(
            lambda: action(pool, new),
            (model,),
            extra=lambda: pool_state(pool),
            check=check,
            locks=(pool._members.lock,),
            changes=not stations and name != "pool.table",
            stations=tuple(lambda station=station: station(pool, new) for station in stations),
        )

    return case


for _name in (*POOL, *ROW_POOL):
    operation(_name, _name)(_pool)


# ---- pipelines


def _pipelines():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import test_pipeline
        from transformers.utils import logging
    logging.disable_progress_bar()
    return test_pipeline


def _small_pipelines(pipelines):
    """Pipelines with few layers, because each is many more steps; and a LoRA on four of these, and one on two."""

    def make_random():
        pipe = pipelines.stable_diffusion()
        blocks = dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
        pipe.unet = pipelines.unet(cross_attention_dim=16, block_out_channels=(8,), mid_block_type=None, **blocks)
        return pipe

    attention = "down_blocks.0.attentions.0.transformer_blocks.0.{}.to_q".format
    more = {"unet": (attention("attn1"), attention("attn2")), "text_encoder": ("q_proj",)}
    fewer = {"unet": (attention("attn1"),), "text_encoder": ("layers.1.self_attn.q_proj",)}
    kind = pipelines.Kind(make_random, more)
    return kind, pipelines.lora(kind, rank=4), pipelines.lora(kind, seed=2, rank=2, components=fewer)


@operation("hotswap_pipeline", "swap")
@operation("hotswap_pipeline: prepared", "swap in a prepared one")
@operation("prepare_pipeline", "prepare")
def _pipeline(way, shelf):
    pipelines = _pipelines()
    kind, old, new = _small_pipelines(pipelines)

    def prepare(pipe):
        hotswap_lab.prepare_pipeline_for_compiled_hotswap(pipe, [new], target_rank=7)

    def swap(pipe):
        hotswap_lab.hotswap_pipeline(pipe, new, "style")

    action, expected = (prepare, old) if way == "prepare" else (swap, new)

    def case():
        pipe = kind.loaded(dict(old))
        if "prepared" in way:
            prepare(pipe)
        return Case(
            lambda: action(pipe),
            (pipe.unet, pipe.text_encoder),
            check=lambda: pipelines.assert_like_fresh(pipe, kind.loaded(dict(expected)), kind),
        )

    return case
