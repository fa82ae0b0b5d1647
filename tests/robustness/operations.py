"""Every public operation, each on a small model of its own: how to do it, what it may change, what must come out."""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from models import KINDS, call, load, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_outputs, files_in, plain, surroundings
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
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
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    save_adapter,
    set_strength,
    verify_hotswap,
    waiting_at_most,
)
from hotswap_lab import threads as turns
from hotswap_lab.files import saving
from hotswap_lab.pools.mixes import Mix
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
    #: locks that nobody holds afterwards, beside those that are found by themselves
    locks: tuple = ()


# ---- what is compared


def held(locks: tuple) -> list[str]:
    """The locks that this thread still holds: whoever comes next, from another thread, would wait for ever."""
    found = [f"{lock}" for lock in locks if lock._is_owned()]
    for base, turn in list(turns._turns.items()):
        named = {"swap": turn.swap, "gate": turn.gate, **turn.locks}
        found += [f"{name} of {type(base).__name__}" for name, lock in named.items() if lock._is_owned()]
    return found + ["the exchange of files"] * saving._exchanging.locked()


def around() -> dict:
    """What an operation must leave alone outside of its models."""
    return {**surroundings(), "patience": patience.get()}


# ---- adapters


class Shelf:
    """Adapters in folders, each made when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._made: dict[tuple, str] = {}

    def __call__(self, seed: int, **lora) -> str:
        return self._get(("lora", seed, repr(lora)), lambda path: save_random_adapter(LINEAR, path, seed, **lora))

    def other(self, seed: int, config: object) -> str:
        """An adapter of any method, all of its tensors random."""

        def make(path: str) -> None:
            model = get_peft_model(LINEAR.base(), config)
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
            model.save_pretrained(path)

        return self._get(("other", seed, repr(config)), make)

    def _get(self, key: tuple, make: Callable[[str], object]) -> str:
        if key not in self._made:
            path = str(self.folder / f"adapter_{len(self._made)}")
            make(path)
            self._made[key] = path
        return self._made[key]


def _trained(folder: str) -> PeftModel:
    """A model with gradients, and some of its modules in training mode."""
    model = load(LINEAR, folder, is_trainable=True)
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


@operation("Adapter.load of a .bin")
def _load_bin(shelf):
    adapter, folder = Adapter.load(shelf(1, r=4)), shelf.folder / "bin"
    if not folder.exists():
        folder.mkdir()
        shutil.copy(Path(adapter.source, "adapter_config.json"), folder)
        torch.save(dict(adapter.tensors), folder / "adapter_model.bin")
    return lambda: Case(lambda: Adapter.load(folder), extra=lambda: files_in(folder), changes=False)


def refused(action: Callable[[], object]) -> None:
    try:
        action()
    except HotswapError:
        return
    raise AssertionError("not refused")


@operation("plan_hotswap", True)
@operation("plan_hotswap that refuses", False)
def _plan(add_layers, shelf):
    old, new = shelf(1, r=4, target_modules=["first"]), shelf(2, r=6)

    def case():
        model = _trained(old)
        if add_layers:
            return Case(lambda: plan_hotswap(model, new, add_layers=True), (model,), changes=False)
        return Case(lambda: refused(lambda: hotswap_adapter(model, new, "default")), (model,), changes=False)

    return case


@operation("hotswap: copy", dict(r=4, lora_alpha=8), dict(r=4, lora_alpha=3, lora_dropout=0.1), {})
@operation(
    "hotswap: resize and off",
    dict(r=4),
    dict(r=6, lora_alpha=3, target_modules=["first", "blocks.0"]),
    {},
)
@operation("hotswap: add layers", dict(r=4, target_modules=["first"]), dict(r=6), dict(add_layers=True))
@operation("hotswap: DoRA", dict(r=4, use_dora=True), dict(r=3, use_dora=True, lora_alpha=5), {})
@operation("hotswap: to DoRA", dict(r=4), dict(r=3, use_dora=True), {})
@operation("hotswap: bias", dict(r=4), dict(r=4, bias="all"), {})
@operation(
    "hotswap: modules_to_save",
    dict(r=4, target_modules=["first"]),
    dict(r=4, target_modules=["first"], modules_to_save=["last"]),
    {},
)
def _swap(old_lora, new_lora, arguments, shelf):
    return _swap_case(shelf(1, **old_lora), shelf(2, **new_lora), **arguments)


def _swap_case(old, new, other=None, way=None, **arguments):
    """A swap in a model in training, perhaps beside another adapter."""
    way = way or (lambda model: hotswap_adapter(model, new, "default", **arguments))

    def case():
        model = _trained(old)
        if other:
            model.load_adapter(other, "other")
            model.set_adapter("default")
        return Case(
            lambda: way(model),
            (model,),
            check=lambda: assert_equals_fresh_load(model.eval(), LINEAR, new, is_trainable=True),
        )

    return case


@operation(
    "hotswap: LoHa", LoHaConfig(r=3, target_modules=["first", "last"]), LoHaConfig(r=4, target_modules=["first"])
)
@operation(
    "hotswap: IA3", *(IA3Config(target_modules=t, feedforward_modules=[]) for t in (["first", "last"], ["last"]))
)
def _swap_other(old_config, new_config, shelf):
    return _swap_case(shelf.other(1, old_config), shelf.other(2, new_config))


@operation("hotswap: add DoRA to layers of another adapter")
def _swap_beside(shelf):
    old, new = shelf(1, r=4, use_dora=True, target_modules=["first"]), shelf(2, r=6, use_dora=True)
    return _swap_case(old, new, shelf(3, r=3), add_layers=True)


@operation("hotswap from a state dict")
def _from_state_dict(shelf):
    new = Adapter.load(shelf(2, r=6, lora_alpha=3))
    way = lambda model: hotswap_adapter_from_state_dict(model, new.tensors, "default", new.config)  # noqa: E731
    return _swap_case(shelf(1, r=4), new.source, way=way)


@operation("hotswap: prepared")
def _swap_prepared(shelf):
    old = shelf(1, r=6, lora_alpha=3)
    new = shelf(2, r=4, lora_dropout=0.1, target_modules=["first", "blocks.0"])

    def case():
        model = load(LINEAR, old, is_trainable=True)
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        model(LINEAR.inputs()).sum().backward()
        return Case(
            lambda: hotswap_adapter(model, new, "default"),
            (model,),
            check=lambda: assert_equals_fresh_load(model, LINEAR, new, is_trainable=True, prepared=True),
        )

    return case


@operation("prepare")
def _prepare(shelf):
    """Two adapters, one of them on a layer that the other lacks, and a family that adds a third layer."""
    first = shelf(1, r=4, target_modules=["first", "last"])
    second = shelf(2, r=6, target_modules=["last", "blocks.0"])

    def case():
        model, mine = load(LINEAR, first, is_trainable=True), LoraConfig(r=3)
        model.load_adapter(second, "second")
        model(LINEAR.inputs()).sum().backward()
        family = [LoraConfig(r=8, target_modules=["blocks.1"]), LoraConfig.from_pretrained(second)]

        def check():
            for name, folder in (("default", first), ("second", second)):
                model.set_adapter(name)
                assert_same_outputs(model, load(LINEAR, folder, name), LINEAR)
                slot = hotswap_lab.resolve_slot(model, name)
                assert {tensor.capacity for tensor in slot.tensors} == {9}

        return Case(
            lambda: prepare_model_for_compiled_hotswap(model, target_rank=9, adapters=family, config=mine),
            (model,),
            extra=lambda: (mine.r, mine.rank_pattern),
            check=check,
        )

    return case


@operation("prepare: LoHa")
def _prepare_loha(shelf):
    old = shelf.other(1, LoHaConfig(r=3, target_modules=["first", "last"], module_dropout=0.1))

    def case():
        model = _trained(old)
        return Case(
            lambda: prepare_model_for_compiled_hotswap(model, target_rank=5),
            (model,),
            check=lambda: assert_same_outputs(model.eval(), load(LINEAR, old), LINEAR),
        )

    return case


@operation("set_strength", False)
@operation("set_strength: prepared", True)
def _strength(prepared, shelf):
    folder = shelf(1, r=4)

    def case():
        model = load(LINEAR, folder)
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=4)

        def check():
            assert get_strength(model) == 0.5

        return Case(lambda: set_strength(model, 0.5), (model,), check=check)

    return case


@operation("verify_hotswap", True)
@operation("verify_hotswap of an Adapter", False)
def _verify(from_folder, shelf):
    new = shelf(2, r=6, lora_alpha=3)
    adapter = new if from_folder else Adapter.load(new)

    def case():
        model = _trained(new)

        def verify():
            assert verify_hotswap(model, adapter, inputs=LINEAR.inputs())

        return Case(verify, (model,), changes=False)

    return case


@operation("RecompileWatch")
def _watch(shelf):
    from torch._dynamo.callback import callback_handler

    def watch():
        with RecompileWatch() as each:
            each.call("a call", lambda: None)

    listeners = lambda: len(callback_handler.start_callbacks)  # noqa: E731
    return lambda: Case(watch, extra=listeners, changes=False)


@operation("waiting_at_most")
def _waiting(shelf):
    def wait():
        with waiting_at_most(1):
            pass

    return lambda: Case(wait, changes=False)


@operation("state_dict of a prepared model")
def _state_dict(shelf):
    folder = shelf(1, r=3, target_modules=["first", "last"])

    def case():
        model = load(LINEAR, folder)
        prepare_model_for_compiled_hotswap(model, target_rank=4, adapters=[shelf(2, r=4)])
        return Case(model.state_dict, (model,), changes=False)

    return case


@operation("load_state_dict that is refused")
def _load_state_dict(shelf):
    """What torch itself refuses it has loaded half of; what is refused here, because of the last layer, not."""
    folder = shelf(1, r=3)

    def case():
        model = load(LINEAR, folder)
        prepare_model_for_compiled_hotswap(model, target_rank=4)
        state = {key: value + 1 for key, value in model.state_dict().items()}
        state["base_model.model.last.lora_B.default.weight"] = torch.ones(6, 2)
        return Case(lambda: refused(lambda: model.load_state_dict(state)), (model,), changes=False)

    return case


# ---- saving


@operation("save_adapter", "new")
@operation("save_adapter over another", "over")
@operation("save_adapter over a .bin", "bin")
@operation("save_adapter into new folders", "deep")
def _save(where, shelf):
    first, second = shelf(1, r=4), shelf(2, r=6, target_modules=["first"])
    shelf.saves = getattr(shelf, "saves", 0)

    def case():
        shelf.saves += 1
        root = shelf.folder / f"save_{shelf.saves}"
        folder = root / "a" / "b" if where == "deep" else root
        if where != "deep":
            root.parent.mkdir(exist_ok=True)
        if where in ("over", "bin"):
            shutil.copytree(first, root)
            (root / "notes.txt").write_text("mine")
            (root / "another").mkdir()
        if where == "bin":
            torch.save(dict(Adapter.load(first).tensors), root / "adapter_model.bin")
            (root / "adapter_model.safetensors").unlink()
        model = _trained(second)

        def check():
            expected = {"adapter_config.json", "adapter_model.safetensors"}
            expected |= {"notes.txt", "another"} if where in ("over", "bin") else set()
            expected |= {"adapter_model.bin"} if where == "bin" else set()
            assert files_in(folder).keys() == expected
            assert_equals_fresh_load(load(LINEAR, folder), LINEAR, second)
            shutil.rmtree(root)

        return Case(
            lambda: save_adapter(model, folder),
            (model,),
            extra=lambda: (root.exists(), files_in(root) if root.exists() else {}),
            check=check,
        )

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
        return None if packed is None else ([plain(part) for part in packed.parts], plain(packed.scalings))

    entries = {
        name: (each.version, each.source, of(each.packed) if each.source is None else None, each.stamp)
        for name, each in pool._members.items()
    }
    history = [(_owner(state), of(state), [*map(_owner, getattr(state, "rows", ()))]) for state in pool._history]
    rows = [plain(room._all(band.memory)) for room in [pool._room] if isinstance(room, RowRoom) for band in room.bands]
    labels = [str(row) for row in pool.rows]
    return dict(
        entries=entries,
        history=history,
        rows=(rows, labels),
        active=pool.active,
        strength=round(pool.strength, 4),
    )


def _owner(packed) -> str | None:
    """Whose weights these are: those of an adapter, or of a mix of them."""
    owner = packed and packed.content.owner
    return str(owner.weights) if isinstance(owner, Mix) else getattr(owner, "name", None)


@operation("AdapterPool()")
def _make_pool(shelf):
    sources = _pool_sources(shelf)

    def case():
        model, made = _trained(sources["a"]), []

        def check():
            for name in sources:
                made[0].swap(name)
                assert_equals_fresh_load(model.eval(), LINEAR, sources[name], prepared=True, is_trainable=True)

        return Case(
            lambda: made.append(AdapterPool(model, adapters=sources, target_rank=7, progress=False)),
            (model,),
            check=check,
        )

    return case


def _using(pool, name):
    with pool.using(name, 0.5):
        call(pool.model, LINEAR.inputs())


POOL: dict[str, tuple] = {
    # what is done, what is in the model afterwards, and other whole states on the way
    "pool.swap": (lambda pool, new: pool.swap("b"), "b"),
    "pool.swap with strength": (lambda pool, new: pool.swap("b", 0.5), "b"),
    "pool.swap of a dropped adapter": (lambda pool, new: pool.swap("dropped"), "dropped"),
    "pool.strength": (lambda pool, new: setattr(pool, "strength", 0.5), "a"),
    "pool.off": (lambda pool, new: pool.off(), "a"),
    "pool.undo": (lambda pool, new: pool.undo(), "b"),
    "pool.add": (lambda pool, new: pool.add("new", new.source), "a"),
    "pool.add with eviction": (lambda pool, new: pool.add("new", new.source), "a"),
    "pool.remove": (lambda pool, new: pool.remove("b"), "a"),
    "pool.update": (lambda pool, new: pool.update("b", new.tensors, new.config), "a"),
    "pool.update of the active one": (lambda pool, new: pool.update("a", new.tensors, new.config), None),
    "pool.using": (lambda pool, new: _using(pool, "b"), "a", lambda pool, new: pool.swap("b", 0.5)),
    "pool.using of a dropped adapter": (
        lambda pool, new: _using(pool, "dropped"),
        "a",
        lambda pool, new: pool.swap("dropped", 0.5),
    ),
    "pool.table": (lambda pool, new: pool.table, "a"),
}


def _pool(name, shelf):
    action, result, *stations = POOL[name]
    sources, new = _pool_sources(shelf), Adapter.load(shelf(4, r=3, lora_alpha=9))

    def case():
        model = _trained(sources["a"])
        if stations:
            model.eval()  # what is called in the block draws no random numbers
        pool = AdapterPool(model, adapters=sources, target_rank=7, progress=False)
        pool.swap("b")
        pool.swap("a")
        if "dropped" in name or "eviction" in name:
            pool._members["dropped"].packed = None
        if "eviction" in name:
            pool.max_bytes = pool.nbytes + 64

        def check():
            if result is None:
                assert_equals_fresh_load(model.eval(), LINEAR, new.source, prepared=True, is_trainable=True)
            elif pool.strength == 1:
                assert_equals_fresh_load(model.eval(), LINEAR, sources[result], prepared=True, is_trainable=True)
            if "eviction" in name:
                assert pool._members["b"].packed is None
            pool.swap("dropped")
            assert_equals_fresh_load(model.eval(), LINEAR, sources["dropped"], prepared=True, is_trainable=True)

        return Case(
            lambda: action(pool, new),
            (model,),
            extra=lambda: pool_state(pool),
            check=check,
            locks=(pool._lock,),
            changes=not stations and name != "pool.table",
            stations=tuple(lambda station=station: station(pool, new) for station in stations),
        )

    return case


for _name in POOL:
    operation(_name, _name)(_pool)


# ---- pools with rows

WANTED, STRENGTHS = ["b", None, {"a": 0.5, "b": 1.0}], [1.0, 1.0, 2.0]


@operation("AdapterPool(rows=) with other rows than before")
def _make_row_pool_anew(shelf):
    return _make_row_pool(shelf, rows_before=2)


@operation("AdapterPool(rows=)")
def _make_row_pool(shelf, rows_before=0):
    sources = _pool_sources(shelf)

    def case():
        model, made = load(LINEAR, sources["a"]), []
        if rows_before:
            AdapterPool(model, adapters=sources, rows=rows_before, progress=False)
        base = model.get_base_model()

        def check():
            made[0].assign(["b", None, "dropped"])
            rows = LINEAR.inputs()[:3]
            Truth(LINEAR, sources, rows).check(call(model, rows), ["b", None, "dropped"])

        return Case(
            lambda: made.append(AdapterPool(model, adapters=sources, target_rank=10, rows=3, progress=False)),
            (model,),
            extra=lambda: {"rows": [each.func.__self__.rows for each in base._forward_pre_hooks.values()]},
            check=check,
        )

    return case


def _assigned(pool):
    with pool.assigned(WANTED, STRENGTHS):
        call(pool.model, LINEAR.inputs()[:3])


ROW_POOL: dict[str, tuple] = {
    # what is done, what the rows have afterwards, how strongly, and another whole state on the way
    "pool.assign": (lambda pool, new: pool.assign(WANTED, STRENGTHS), WANTED, STRENGTHS),
    "pool.assign of a dropped adapter": (
        lambda pool, new: pool.assign([None, "a", "dropped"]),
        [None, "a", "dropped"],
        [1.0] * 3,
    ),
    "pool.assigned": (
        lambda pool, new: _assigned(pool),
        ["a", "b", "a"],
        [1.0, 0.5, 1.0],
        lambda pool, new: pool.assign(WANTED, STRENGTHS),
    ),
    "pool.undo of rows": (lambda pool, new: pool.undo(), ["b"] * 3, [1.0] * 3),
    "pool.off with rows": (lambda pool, new: pool.off(), [None] * 3, [1.0] * 3),
    "pool.swap of a mix": (lambda pool, new: pool.swap({"a": 0.5, "b": 1.0}), [{"a": 0.5, "b": 1.0}] * 3, [1.0] * 3),
    "pool.update of a row": (
        lambda pool, new: pool.update("b", new.tensors, new.config),
        ["a", "new", "a"],
        [1.0, 0.5, 1.0],
    ),
    "hotswap: rows": (lambda pool, new: hotswap_adapter(pool.model, new.source, "default"), ["new"] * 3, [1.0] * 3),
}


def _row_pool(name, shelf):
    action, rows, strengths, *stations = ROW_POOL[name]
    sources, new = _pool_sources(shelf), Adapter.load(shelf(4, r=3, lora_alpha=9))
    batch = LINEAR.inputs()[:3]
    truth = Truth(LINEAR, {**sources, "new": new.source}, batch)

    def case():
        model = load(LINEAR, sources["a"])
        pool = AdapterPool(model, adapters=sources, target_rank=10, rows=3, progress=False)
        pool.swap("b")
        pool.assign(["a", "b", "a"], [1.0, 0.5, 1.0])
        if "dropped" in name:
            pool._members["dropped"].packed = None

        def check():
            truth.check(call(model, batch), rows, strengths)
            pool.assign(["dropped", {"dropped": -1.0, "a": 1.0}])
            truth.check(call(model, batch[:2]), ["dropped", {"dropped": -1.0, "a": 1.0}])

        return Case(
            lambda: action(pool, new),
            (model,),
            extra=lambda: pool_state(pool),
            check=check,
            locks=(pool._lock,),
            changes=not stations,
            stations=tuple(lambda station=station: station(pool, new) for station in stations),
        )

    return case


for _name in ROW_POOL:
    operation(_name, _name)(_row_pool)


# ---- pipelines


def _pipelines():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import test_pipeline
        from transformers.utils import logging
    logging.disable_progress_bar()
    return test_pipeline


def _small_pipelines(pipelines):
    """Pipelines with few layers, since each of them is many more steps; and a LoRA on four of these, and one on two."""

    def make_random():
        pipe = pipelines.stable_diffusion()
        blocks = dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
        pipe.unet = pipelines.unet(cross_attention_dim=16, block_out_channels=(8,), mid_block_type=None, **blocks)
        return pipe

    attention = "down_blocks.0.attentions.0.transformer_blocks.0.{}.to_q".format
    more = {"unet": (attention("attn1"), attention("attn2")), "text_encoder": ("q_proj",)}
    fewer = {"unet": (attention("attn1"),), "text_encoder": ("layers.1.self_attn.q_proj",)}
    kind = pipelines.Kind(make_random, more)
    return kind, pipelines.lora(kind, rank=4), pipelines.lora(kind, seed=2, rank=2, parts=fewer)


@operation("hotswap_pipeline", False)
@operation("hotswap_pipeline: prepared", True)
def _swap_pipeline(prepared, shelf):
    pipelines = _pipelines()
    kind, old, new = _small_pipelines(pipelines)

    def case():
        pipe = kind.loaded(dict(old))
        if prepared:
            hotswap_lab.prepare_pipeline_for_compiled_hotswap(pipe, [new])
        return Case(
            lambda: hotswap_lab.hotswap_pipeline(pipe, new, "style"),
            (pipe.unet, pipe.text_encoder),
            check=lambda: pipelines.assert_like_fresh(pipe, kind.loaded(dict(new)), kind),
        )

    return case


@operation("prepare_pipeline")
def _prepare_pipeline(shelf):
    pipelines = _pipelines()
    kind, old, new = _small_pipelines(pipelines)

    def case():
        pipe = kind.loaded(dict(old))
        return Case(
            lambda: hotswap_lab.prepare_pipeline_for_compiled_hotswap(pipe, [new], target_rank=7),
            (pipe.unet, pipe.text_encoder),
            check=lambda: pipelines.assert_like_fresh(pipe, kind.loaded(dict(old)), kind),
        )

    return case
