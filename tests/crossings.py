"""The features of the table of crossings: how each is set up, how it is disturbed, and what must come of it.

:class:`Cell` is the program of one cell of the table: a small model with some of the features, in three steps. The
table itself is in ``test_crossings.py``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import COPIES, Kind, Mlp, call, converted, copied, load, save_random_adapter
from oracle import active, assert_equals, rounding
from peft import LoHaConfig, get_peft_model
from row_truth import Truth, assert_close

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    RecompileWatch,
    aoti_compile,
    aoti_load,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    save_adapter,
    set_strength,
)

ROWS, TARGET_RANK, STRENGTH = 4, 16, 0.5


class Shifted(Mlp):
    """A second input, whose first size is that of the first input."""

    def forward(self, x, shift):
        return super().forward(x) + shift


def _inputs() -> dict[str, torch.Tensor]:
    return dict(x=torch.randn(ROWS, 12), shift=0.1 * torch.randn(ROWS, 6))


KIND = Kind(Shifted, _inputs, ("first", "blocks.0", "blocks.1", "last"))
#: other ranks, scalings and layers: ``abc`` and ``big`` have all, ``bc`` fewer, ``a`` and ``c`` one each
FAMILY = {
    "abc": dict(r=4, lora_alpha=6),
    "bc": dict(r=6, lora_alpha=5, use_rslora=True, target_modules=["blocks.0", "blocks.1", "last"]),
    "c": dict(r=2, lora_alpha=4, target_modules=["last"]),
    "a": dict(r=2, lora_alpha=12, target_modules=["first"]),
    "big": dict(r=5, lora_alpha=9, rank_pattern={"blocks.1": 3}, alpha_pattern={"last": 20}, lora_dropout=0.1),
}


def save(method: str, folder: Path, seed: int, r: int, lora_alpha: int, target_modules=KIND.modules, **lora) -> str:
    targets = list(target_modules)
    if method != "LoHa":
        is_dora = method == "DoRA"  # whose magnitudes leave less to the weights
        own = dict(r=r, lora_alpha=lora_alpha * (5 if is_dora else 1), target_modules=targets, use_dora=is_dora)
        return save_random_adapter(KIND, folder, seed, **own, **lora)
    # PEFT rounds its scaling to float32
    model = get_peft_model(KIND.base(), LoHaConfig(r=r, alpha=r * max(1, lora_alpha // r), target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)


class World:
    """Adapters of one method in one precision: their folders, fresh loads, and files that are compiled ahead."""

    def __init__(self, folder: Path, features: Sequence[str]):
        is_half, self.folder = "half" in features, folder
        self.options = dict(autocast_adapter_dtype=False) if is_half else {}
        method = next((each for each in METHODS if each in features), "")
        self.inputs = converted(KIND.inputs(), torch.bfloat16) if is_half else KIND.inputs()
        self.kind = replace(KIND, make_inputs=lambda: self.inputs, dtype=torch.bfloat16 if is_half else torch.float64)
        self.folders = {name: save(method, folder / name, n, **each) for n, (name, each) in enumerate(FAMILY.items())}
        self.truth = Truth(self.kind, self.folders, self.inputs, **self.options)
        self.tolerance = max(rounding(self.load(name), self.inputs) for name in FAMILY)
        outputs = [self.truth.base, *map(self.truth.of, self.folders)]
        for number, one in enumerate(outputs):
            for other in outputs[:number]:
                assert (one - other).abs().max() > 5 * self.tolerance * one.abs().max()

    def load(self, name: str = "abc", trained: bool = False) -> torch.nn.Module:
        return load(self.kind, self.folders[name], is_trainable=trained, **self.options)

    def load_other(self, model) -> None:
        model.load_adapter(self.folders["abc"], "other", **self.options)

    def prepare(self, model) -> None:
        options = dict(target_rank=TARGET_RANK, adapter_name="default")
        prepare_model_for_compiled_hotswap(model, adapters=self.folders.values(), **options)

    def pool(self, model, rows: int) -> AdapterPool:
        return AdapterPool(model, "default", self.folders, target_rank=TARGET_RANK, rows=rows, progress=False)

    @functools.cache  # noqa: B019
    def ahead(self, rows: int, copies: int) -> Path:
        """A file of a model of the same form. Each takes seconds to compile."""
        auto, path = torch.export.Dim.AUTO, self.folder / f"{rows} {copies}.pt2"
        inputs = {name: each.repeat_interleave(copies, 0) for name, each in self.inputs.items()}
        with torch.inference_mode(False):
            self.prepare(model := self.load())
            if rows > 1:
                model = self.pool(model, rows)
                model.assign(["abc"] * rows, copies=copies, order="interleave")
            options = dict(dynamic_shapes={name: {0: auto} for name in inputs}, progress=False)
            return aoti_compile(model, path, kwargs=inputs, **options)


class Cell:
    """One model with some features, and what fresh loads of its adapters compute at each moment."""

    def __init__(self, features: Sequence[str], world: World, folder: Path):
        self.features, self.world, self.folder, self.tolerance = features, world, folder, world.tolerance
        #: the model, and what swaps are asked of
        self.model = self.live = world.load(trained=self.has("trained"))
        self.pool: AdapterPool | None = None
        self.computes: dict[str, Callable] = {"eager": lambda inputs: call(self.model, inputs)}
        #: the adapter of each row, its strength, how often a batch has each row, and the ways that refuse to compute
        self.wanted: list = ["abc"] * ROWS
        self.strength, self.copies = 1.0, 1
        self.refusing: tuple[str, ...] = ()

    def has(self, *names: str) -> bool:
        return any(name in self.features for name in names)

    def run(self) -> None:
        """Do, disturb, do again with other sizes."""
        features = [FEATURES[name] for name in self.features]
        for feature in features:
            feature.begin(self)
        self.put("bc")
        for feature in features:
            feature.disturb(self)
            self.check()
        with RecompileWatch(allow=0 if self.has("compiled") else None):
            for name in ("a", "big", "abc", "c"):
                self.put(name)
        if self.has("merged"):  # which has rounded the base weights
            return
        self.pool.swap("a") if self.pool else hotswap_adapter(self.live, self.world.folders["a"], "default")
        prepared = self.has("prepared", "pool")
        fresh = self.world.load("a", self.has("trained"))
        if self.has("several"):
            self.world.load_other(fresh)
        assert_equals(self.model, fresh, self.world.kind, prepared=prepared, tolerance=self.tolerance, margin=3)

    def put(self, name: str) -> None:
        """Swap an adapter in, in the way of this cell, and look at it."""
        mine = {"abc": -0.5, name: 0.7} if self.has("mixes") else name
        self.wanted = [mine, None, "c", name] if self.has("rows") else [mine] * ROWS
        if self.has("rows"):
            self.pool.assign(self.wanted, copies=self.copies, order="interleave")
        elif self.pool:
            self.pool.swap(mine)
        else:
            hotswap_adapter(self.live, self.world.folders[name], "default")
        self.set_strength(STRENGTH)
        self.check()

    def set_strength(self, value: float) -> None:
        if self.has("strength"):
            set_strength(self.live, value, adapter_name="default")
            self.strength = value

    # ---- what must come of it

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: each.repeat_interleave(self.copies, 0) for name, each in self.world.inputs.items()}

    def check(self) -> None:
        """All ways to compute give each row what a fresh load gives it, or refuse."""
        expected = self.world.truth.rows(self.wanted, [self.strength] * ROWS).repeat_interleave(self.copies, 0)
        for name, compute in self.computes.items():
            if name in self.refusing:
                with pytest.raises(HotswapError):
                    compute(self.inputs)
            else:
                assert_close(compute(self.inputs), expected, self.tolerance)

    @contextlib.contextmanager
    def now(self, **state: object) -> Iterator[None]:
        """Change attributes of the cell for a block; the model is looked at when it begins."""
        before = {name: getattr(self, name) for name in state}
        vars(self).update(state)
        try:
            self.check()
            yield
        finally:
            vars(self).update(before)

    def now_for(self, *wanted: str | None, strength: float = 1.0) -> AbstractContextManager[None]:
        """A block in which a batch has each row once, which a file for batches with each row twice refuses."""
        refusing = ("ahead",) if self.copies > 1 else ()
        return self.now(wanted=wanted * (ROWS // len(wanted)), strength=strength, copies=1, refusing=refusing)


# ---- the features


class Feature:
    """What a feature does when the model is made, and between the swaps."""

    def begin(self, cell: Cell) -> None: ...
    def disturb(self, cell: Cell) -> None: ...


class Half(Feature):
    """Model and adapters are in bfloat16."""

    def disturb(self, cell):
        cell.model.to(torch.bfloat16)


class Trained(Feature):
    """Weights that are trained between two swaps: nothing of that outlives the next one."""

    def disturb(self, cell):
        parameters = [each for each in cell.model.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(parameters, 1.0)
        cell.model(**cell.inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        cell.put("bc")


class Several(Feature):
    """Another adapter in the same model."""

    def begin(self, cell):
        cell.world.load_other(cell.model)

    def disturb(self, cell):
        with active(cell.model, "other"), cell.now(wanted=["abc"] * ROWS, strength=1.0, refusing=("ahead",)):
            pass


class Prepared(Feature):
    def begin(self, cell):
        cell.world.prepare(cell.model)

    def disturb(self, cell):
        self.begin(cell)
        if cell.has("rows", "LoHa"):
            return
        cell.put("abc")
        # an old optimizer writes behind the components of a layer that was off and is on again
        padding = cell.model.get_submodule("base_model.model.first").lora_B["default"].weight.data[:, -1]
        padding.fill_(1)
        with pytest.warns(UserWarning, match="padding .* is not zero"):
            cell.model.state_dict()
        padding.zero_()
        cell.put("bc")


class Pool(Feature):
    def begin(self, cell):
        cell.pool = cell.world.pool(cell.model, ROWS if cell.has("rows") else 1)

    def disturb(self, cell):
        strength = 1.0 if cell.has("DoRA") else 0.5
        with cell.pool.using("c", strength), cell.now_for("c", strength=strength):
            pass
        cell.check()
        if not cell.has("rows"):
            self.others_write(cell)
        cell.put("bc")

    def others_write(self, cell):
        """What other code has written comes back after a block."""
        before = call(cell.model, cell.inputs)
        twice = {key: 2 * each for key, each in cell.model.state_dict().items() if "lora_B.default" in key}
        cell.model.load_state_dict(twice, strict=False)
        written = call(cell.model, cell.inputs)
        assert (written - before).abs().max() > 3 * cell.tolerance * before.abs().max()
        with cell.pool.using("c"), cell.now_for("c"):
            pass
        assert_close(call(cell.model, cell.inputs), written, cell.tolerance)


class Rows(Feature):
    def disturb(self, cell):
        wanted = ["c", "abc", None, "big"]
        with cell.pool.assigned(wanted), cell.now_for(*wanted):
            pass
        cell.check()
        # other code writes to one row only, which is noticed; and the next arrangement writes it again
        twice = {key: 2 * each for key, each in cell.model.state_dict().items() if "lora_B.default" in key}
        cell.model.load_state_dict(twice, strict=False)
        with cell.now(refusing=(*cell.computes,)):
            cell.pool.assign(cell.wanted, copies=cell.copies, order="interleave")
        cell.set_strength(STRENGTH)


class Copies(Feature):
    """A batch that has each row twice."""

    def begin(self, cell):
        cell.copies = 2

    def disturb(self, cell):
        """Without a compiler, a batch may also have each row once."""
        with cell.now(copies=1, refusing=tuple(each for each in cell.computes if each != "eager")):
            pass


class Mixes(Feature):
    def disturb(self, cell):
        """An update of a share reaches the mix."""
        tensors, rows = Adapter.load(cell.world.folders["abc"]).tensors, []
        cell.pool.update("abc", {key: each * (2 if "lora_B" in key else 1) for key, each in tensors.items()})
        for each in cell.wanted:
            rows.append({**each, "abc": 2 * each["abc"]} if isinstance(each, dict) else each)
        with cell.now(wanted=rows):
            cell.pool.update("abc", tensors)


class Compiled(Feature):
    def begin(self, cell):
        cell.live = compiled = torch.compile(cell.model, backend="eager")
        cell.computes["compiled"] = lambda inputs: call(compiled, inputs)


class Ahead(Feature):
    def begin(self, cell):
        path = cell.world.ahead(ROWS if cell.has("rows") else 1, cell.copies)
        ahead = aoti_load(path, cell.pool or cell.model)
        cell.computes["ahead"] = lambda inputs: ahead(**inputs)

    def disturb(self, cell):
        """Two sizes that were one in the export: the code would read beyond the smaller input."""
        with pytest.raises(HotswapError, match="not compiled for such inputs"):
            cell.computes["ahead"]({**cell.inputs, "shift": cell.inputs["shift"][:-1]})


class Strength(Feature):
    def begin(self, cell):
        cell.set_strength(STRENGTH)

    def disturb(self, cell):
        for value in (0.0, 2.0, STRENGTH):
            cell.set_strength(value)
            cell.check()


class Disabled(Feature):
    def disturb(self, cell):
        with cell.model.disable_adapter(), cell.now(wanted=[None] * ROWS, refusing=("ahead",)):
            hotswap_adapter(cell.live, cell.world.folders["c"], "default")
        if not cell.has("trained"):
            cell.model.requires_grad_(False)  # PEFT lets be trained what it enables
        with cell.now_for("c"):
            pass
        cell.put("bc")


class Merged(Feature):
    def disturb(self, cell):
        if cell.has("rows"):
            for merge in (cell.model.merge_adapter, cell.model.merge_and_unload):
                with pytest.raises(HotswapError, match="can't be merged"):
                    merge()
            return
        cell.tolerance *= 5 if cell.has("half") else 10  # for the base weights are rounded
        cell.model.merge_adapter()
        with cell.now(refusing=("ahead",), wanted=cell.wanted), pytest.raises(HotswapError, match="merged"):
            cell.put("c")
        cell.model.unmerge_adapter()
        twin = copied(cell.model, "deepcopy").merge_and_unload()
        expected = cell.world.truth.of(cell.wanted[0], cell.strength)
        assert_close(call(twin, cell.inputs), expected, cell.tolerance)


class Saved(Feature):
    """Saved, loaded, and swapped in from the saved files."""

    def disturb(self, cell):
        folder = cell.folder / "saved"
        if cell.has("rows"):
            with pytest.raises(HotswapError, match="may have different adapters"):
                save_adapter(cell.model, folder)
            return
        save_adapter(cell.model, folder, "default")
        fresh = load(cell.world.kind, str(folder), **cell.world.options)
        assert_close(call(fresh, cell.inputs), cell.world.truth.of(cell.wanted[0]), cell.tolerance)
        with cell.now(wanted=cell.wanted):
            cell.put("c")
        hotswap_adapter(cell.live, folder, "default")
        cell.set_strength(STRENGTH)


class Copied(Feature):
    """A copy of the model goes its own way; rows that are assigned can't be copied."""

    def disturb(self, cell):
        if cell.pool is not None and cell.pool._room.assigned:
            for way in COPIES:
                with pytest.raises(HotswapError, match="may have different adapters"):
                    copied(cell.model, way)
            return
        twins, truth = [copied(cell.model, way) for way in COPIES], cell.world.truth
        expected = truth.of(cell.wanted[0], cell.strength)
        cell.put("c")
        for twin in twins:
            assert_close(call(twin, truth.inputs), expected, cell.tolerance)
            hotswap_adapter(twin, cell.world.folders["big"], "default")
            assert_close(call(twin, truth.inputs), truth.of("big"), cell.tolerance)


#: in the order of their setup
FEATURES: dict[str, Feature] = {
    "half": Half(),
    "DoRA": Feature(),
    "LoHa": Feature(),
    "trained": Trained(),
    "several": Several(),
    "prepared": Prepared(),
    "pool": Pool(),
    "rows": Rows(),
    "copies": Copies(),
    "mixes": Mixes(),
    "compiled": Compiled(),
    "ahead": Ahead(),
    "strength": Strength(),
    "inference": Feature(),
    "disabled": Disabled(),
    "merged": Merged(),
    "saved": Saved(),
    "copied": Copied(),
}
METHODS = ("DoRA", "LoHa")
NEEDS = {"copies": ("rows", "pool"), "rows": ("pool",), "mixes": ("pool",)}


def closed(*features: str) -> tuple[str, ...]:
    """These features, and those that they need, in their order."""
    found = {*features, *(need for each in features for need in NEEDS.get(each, ()))}
    if found & {"compiled", "ahead"} and "pool" not in found:
        found.add("prepared")
    return tuple(each for each in FEATURES if each in found)
