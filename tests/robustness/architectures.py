"""Tiny models of many architectures, random families of adapters, and everything that swaps, pools and rows can do.

Every result is compared with a fresh load in float64, where the tolerance can be tiny. It equals that, or it was
refused for a reason that is known to be right here, and nothing was changed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from models import call, load
from oracle import assert_equals, assert_same_outputs, assert_untouched, snapshot
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from row_truth import Truth
from tiny_models import ARCHITECTURES, STRUCTURES, WAYS, Architecture, draw_lora, draw_structure, save_random
from torch import nn
from transformers.pytorch_utils import Conv1D

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    set_strength,
)
from hotswap_lab import prepare_model_for_compiled_hotswap as prepare

#: of the largest output, what sums in another order may change
TOLERANCE = 1e-10
ROWS = 4


class Reference(Truth):
    """Fresh loads of mixes, each kept as a model."""

    def __init__(self, kind: Architecture, folders: dict[str, str]):
        self.kind, self.folders, self.options = kind, folders, {}
        self.models: dict[tuple, nn.Module] = {}

    def loaded(self, row: Row, strength: float = 1.0) -> nn.Module:
        key = row.weights, row.strength * strength
        if key not in self.models:
            self.models[key] = self.model(*key) if row.weights else self.kind.base()
        return self.models[key]


# ---- what a model should have


@dataclass(eq=False)
class Member:
    """An adapter of a pool, and whose weights it has now."""

    label: str


@dataclass(frozen=True)
class Row:
    """How much of which, all of it at a strength."""

    shares: tuple[tuple[Member, float], ...] = ()
    strength: float = 1.0

    @property
    def weights(self) -> tuple[tuple[str, float], ...]:
        found: defaultdict[str, float] = defaultdict(float)
        for member, weight in self.shares:
            found[member.label] += weight
        return tuple(sorted(found.items()))


@dataclass(frozen=True)
class Now:
    """One row for all of a batch, whatever its size, or one for each if they are assigned."""

    rows: tuple[Row, ...]
    strength: float = 1.0
    assigned: bool = False

    @property
    def differs(self) -> bool:
        return len({(row.weights, row.strength) for row in self.rows}) > 1

    @property
    def members(self) -> list[Member]:
        return [member for row in self.rows for member, _ in row.shares]

    def __str__(self) -> str:
        return "rows that differ" if self.differs else "equal rows" if self.assigned else "any size"


#: the beginning of each message with which something may be refused, and when that is right
RIGHT_REFUSALS: dict[str, Callable[[Case], bool]] = {
    r"The layer .* can't have another adapter in each row": lambda case: case.has_no_rows,
    r"The rows of a batch can't have different adapters at": lambda case: case.has_no_rows,
    r"The adapter .* can't vary between rows": lambda case: case.structure != "plain",
    r"A pool is for LoRA alone": lambda case: case.structure in ("bias", "tokens", "any"),
    r"The adapter .* is in the model": lambda case: case.removed in case.now.members,
    r"The adapter .* does not fit into the pool's memory": lambda case: "max_bytes" in case.options,
    r"The mix of .* needs more rank": lambda case: case.options["target_rank"] is None,
    r"The adapters .* can't be mixed": lambda case: case.structure == "dora",
    r"The strength of .* can't be set": lambda case: case.structure != "plain",
    r"(The model's adapter is no longer where|The weights of .* are not where)": lambda case: case.was_moved,
    r"A model can't be prepared for the loaded adapter": lambda case: case.structure in ("bias", "tokens", "any"),
    # no room is made for layers and ranks of what is more than LoRA
    r"This swap can't be done in a prepared model": lambda case: case.structure not in ("plain", "dora"),
    r"Hot swapping .* is on layers that the loaded adapter lacks": lambda case: case.structure not in ("plain", "dora"),
    r"Adapters with and without DoRA": lambda case: case.structure == "any",
    r"The model can't be prepared for an adapter that is of another kind": lambda case: case.structure == "any",
    # whose saved head has one bias by two names
    r"The adapter comes with other base weights": lambda case: case.name == "roberta" and case.structure == "saved",
    r"The adapter .* has other whole modules": lambda case: case.structure == "any",
    r"The file of .* has base weights": lambda case: case.base_weights is None and case.has_base_weights,
    r"The new adapter needs base weights whose original values are unknown": lambda case: (
        # in a prepared model, embeddings that are turned off stay wrapped
        (case.base_weights is None or case.check == "prepared") and case.has_base_weights
    ),
}


class Case:
    """One check of one architecture with one random family."""

    #: the beginning of each message that something may be refused with, and when that is right
    refusals = RIGHT_REFUSALS
    model: nn.Module
    #: the model, perhaps compiled
    computing: nn.Module
    pool: AdapterPool
    now: Now

    def __init__(self, name: str, check: str, seed: int, folder: Path):
        self.name, self.check, self.seed, self.folder = name, check, seed, folder
        self.draw = random.Random(f"{seed}/{name}/{check}")
        self.kind = ARCHITECTURES[name]
        self.options: dict = {}
        self.removed = self.base_weights = self.result = None
        self.was_moved, self.foreign = False, 0
        folder.mkdir(exist_ok=True)

    def run(self) -> None:
        try:
            CHECKS[self.check](self)
        except Exception as error:
            error.add_note(f"({self.name!r}, {self.check!r}, {self.seed})")
            raise

    def load_family(self, structures: tuple[str, ...], count: int = 3) -> None:
        """Makes random adapters, and loads the first one."""
        self.structure, modules = self.draw.choice(structures), self.kind.modules
        common = draw_structure(self.draw, self.kind, self.structure)
        if self.draw.random() < 0.4:  # all of them on the same few layers
            modules = modules[(first := self.draw.randrange(len(modules))) : first + 2]
        self.folders: dict[str, str] = {}
        for number in range(40):
            if number == 20 and not self.folders:  # PEFT can't have it here
                self.structure, common, modules = "plain", {}, self.kind.modules
            own = draw_structure(self.draw, self.kind, self.draw.choice(STRUCTURES)) if self.structure == "any" else {}
            settings, folder = draw_lora(self.draw, modules) | common | own, f"{self.folder}/{number}"
            if len(self.folders) < count and save_random(self.kind, settings, folder, number):
                self.folders["abcd"[len(self.folders)]] = folder
        # where PEFT makes target_parameters of "all-linear", in mixtures of experts
        if any(LoraConfig.from_pretrained(each).target_parameters for each in self.folders.values()):
            self.structure = "any"
        self.reference = Reference(self.kind, self.folders)
        self.computing = self.model = load(self.kind, self.folders["a"]).requires_grad_(False)
        self.members = {name: Member(name) for name in self.folders}
        self.now = self.all_have("a")

    def all_have(self, name: str) -> Now:
        return Now((Row(((self.members[name], 1.0),)),))

    # ---- what is right

    @functools.cached_property
    def layers(self) -> dict[str, nn.Module]:
        """Those that any adapter of the family is on."""
        found = {}
        for folder in self.folders.values():
            modules = load(self.kind, folder).named_modules()
            found |= {path: each.get_base_layer() for path, each in modules if isinstance(each, LoraLayer)}
        return found

    @property
    def has_base_weights(self) -> bool:
        is_embedded = any("embed" in path for path in self.layers)
        return is_embedded or self.structure in ("bias", "any")

    @property
    def has_no_rows(self) -> bool:
        """Whether the family is on layers that can't have another adapter in each row, of these rows or of any."""
        plain = (nn.Linear, nn.Embedding, nn.Conv2d, Conv1D)
        if any(not isinstance(each, plain) or getattr(each, "groups", 1) > 1 for each in self.layers.values()):
            return True
        # two adapters may have the same weights, which a pool doesn't compare
        differ = len({(row.shares, row.strength) for row in self.now.rows}) > 1
        return differ and any(re.search(self.kind.mixed, path) for path in self.layers)

    def done(self, what: str, action: Callable, *arguments: object, **options: object) -> bool:
        """Whether it was done; otherwise it was refused, and the model is untouched."""
        before = snapshot(self.model)
        try:
            self.result = action(*arguments, **options)
            return True
        except HotswapError as error:
            summary = str(error).partition("\n")[0]
        right = next((each for each in self.refusals if re.match(each, summary)), None)
        assert right, f"{what} refused: {summary}"
        assert self.refusals[right](self), f"{what} refused: {summary}"
        assert_untouched(self.model, before)
        return False

    def same(self, what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
        assert actual.shape == expected.shape, what
        off = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        assert off <= tolerance, f"{what} is off by {off}"

    def equals(self, name: str, prepared: bool) -> None:
        """Outputs, config, scalars, tensors and files are those of a fresh load."""
        fresh = load(self.kind, self.folders[name])
        settings = dict(tolerance=TOLERANCE, margin=1, training=False)
        adapted = {path for path, each in fresh.named_modules() if isinstance(each, LoraLayer)}
        if prepared and any("embed" in path for path in self.layers.keys() - adapted):
            # which stays wrapped, though it is off, so that PEFT saves its base weights, too
            assert_same_outputs(self.model, fresh, self.kind, TOLERANCE, margin=1)
            return
        assert_equals(self.model, fresh, self.kind, prepared=prepared, **settings)

    # ---- swaps

    def swaps(self) -> None:
        """From any adapter to any other, with add_layers and mostly with base_weights."""
        self.load_family(STRUCTURES, 4)
        self.swap_all()

    def prepared(self) -> None:
        self.load_family(STRUCTURES)
        rank = self.draw.choice([None, 12])
        if self.done("preparing", prepare, self.model, target_rank=rank, adapters=self.folders.values()):
            self.swap_all(prepared=True)

    def swap_all(self, prepared: bool = False) -> None:
        for name in self.draw.choices([*self.folders], k=3):
            self.base_weights = self.kind.base().state_dict() if self.draw.random() < 0.7 else None
            options = dict(base_weights=self.base_weights, add_layers=not prepared)
            new, swap, arguments = Adapter.load(self.folders[name]), hotswap_adapter, [self.folders[name], "default"]
            if self.draw.random() < 0.3:
                swap, arguments = hotswap_adapter_from_state_dict, [new.tensors, "default", new.config]
            if self.done("a swap", swap, self.model, *arguments, **options):
                self.now = self.all_have(name)
                self.equals(name, prepared)
            strength = self.draw.choice([0.5, -2.0, 0.0])
            if self.structure == "plain" and self.done("a strength", set_strength, self.model, strength):
                expected = call(self.reference.loaded(self.now.rows[0], strength), self.kind.inputs())
                self.same("a strength", call(self.model, self.kind.inputs()), expected)

    # ---- pools and rows

    def pools(self) -> None:
        self.load_family(("plain", "plain", "plain", "dora", "saved", "bias"))
        self.walk(1)

    def rows(self) -> None:
        self.load_family(("plain",) * 9 + ("dora",))
        self.walk(ROWS)

    def generate(self) -> None:
        if not self.kind.ways:
            return
        self.load_family(("plain",))
        made = self.make_pool(ROWS)
        for _ in range(2 if made else 0):
            way, count = self.draw.choice(self.kind.ways), self.draw.choice([1, ROWS])
            now, wanted = self.draw_rows(count)
            if not self.done("assign", self.pool.assign, wanted):
                continue
            self.now = now
            inputs = {key: each for key, each in self.kind.of(count, 4).inputs().items() if "decoder" not in key}
            inputs |= dict(max_new_tokens=5, min_new_tokens=5, pad_token_id=0, **WAYS[way])
            if self.done(f"{way} generate", self.model.generate, **inputs):
                copies = len(self.result) // count
                for start, row in zip(itertools.count(0, copies), now.rows, strict=False):
                    expected = self.reference.loaded(row).generate(**inputs)
                    assert torch.equal(self.result[start : start + copies], expected[start : start + copies]), way

    def make_pool(self, rows: int) -> bool:
        self.options = dict(target_rank=self.draw.choice([None, 40]), rows=rows, progress=False)
        if rows == 1 and self.draw.random() < 0.5:
            with contextlib.suppress(HotswapError):
                whole = AdapterPool(load(self.kind, self.folders["a"]), adapters=self.folders, **self.options)
                self.options["max_bytes"] = whole.nbytes * 2 // 3
        self.base_weights = self.kind.base().state_dict() if self.draw.random() < 0.7 else None
        options = self.options | dict(adapters=self.folders, base_weights=self.base_weights)
        made = self.done("a pool", AdapterPool, self.model, **options)
        self.pool = self.result
        return made

    def walk(self, rows: int) -> None:
        """What the pool is told to do, in random order."""
        if not self.make_pool(rows):
            return
        self.compare("of a new pool")
        # of all mistakes, that of an update to what was loaded is the quietest
        first = [self.update] if self.draw.random() < 0.3 else []
        for operation in first + self.draw.choices(self.operations(rows), k=8):
            operation()
            self.compare(f"after {operation.__name__}")
        if self.draw.random() < 0.3:
            self.move()

    def operations(self, rows: int) -> list[Callable[[], None]]:
        found = [self.swap, self.swap, self.strength, self.off, self.update, self.update]
        found += [self.using, self.remove, self.add, self.hotswap, self.hotswap]
        return found + ([self.assign, self.assign, self.assign, self.assigned] if rows > 1 else [])

    def compare(self, what: str) -> None:
        """Each row with its own fresh load."""
        now, (count, tokens) = self.now, self.draw_size()
        kind = self.kind.of(count, tokens)
        if now.assigned and now.differs and self.draw.random() < 0.5:
            wrong = self.draw.choice([1, *[each for each in range(1, count + 2) if each % count]])
            with pytest.raises(HotswapError):  # as many tokens as there are rows
                call(self.model, self.kind.of(wrong, count).inputs())
        if not self.done(f"a batch, {now},", call, self.computing, kind.inputs()):
            return
        for number, actual in enumerate(self.result):
            row = now.rows[number if now.assigned else 0]
            truth = call(self.reference.loaded(row, now.strength), kind.inputs())
            self.same(f"a batch, {now}, {what}", actual, truth[number])

    def draw_size(self) -> tuple[int, int]:
        """How many rows and tokens the next batch has."""
        return len(self.now.rows) if self.now.assigned else self.draw.randint(1, ROWS), self.draw.choice([4, 5])

    def move(self) -> None:
        """Both are accepted, the swap and what follows, or both are refused."""
        name = self.draw.choice([*self.folders])
        self.model.to(torch.bfloat16)
        self.was_moved, self.kind = True, replace(self.kind, dtype=torch.bfloat16)
        if self.done("moved: a swap", hotswap_adapter, self.model, self.folders[name], "default"):
            self.was_moved, kind = False, self.kind.of(2, 4)
            if self.done("moved: a batch", call, self.model, kind.inputs()):
                expected = call(load(kind, self.folders[name]).to(torch.bfloat16), kind.inputs())
                self.same("moved: a batch", self.result.double(), expected.double(), 0.1)

    # ---- operations

    def draw_wanted(self) -> tuple[Row, str | dict[str, float]]:
        names = [*self.members]
        if self.structure != "plain" or self.draw.random() < 0.75:
            names = [self.draw.choice(names)]
            return Row(((self.members[names[0]], 1.0),)), names[0]
        mix = {each: self.draw.choice([0.7, 0.3, -1.0, 2.0]) for each in names[: self.draw.randint(1, len(names))]}
        return Row(tuple((self.members[each], weight) for each, weight in mix.items())), mix

    def draw_rows(self, count: int) -> tuple[Now, list]:
        drawn = [self.draw_wanted() if self.draw.random() < 0.8 else (Row(), None) for _ in range(count)]
        drawn = drawn[:1] * count if self.draw.random() < 0.25 else drawn
        return Now(tuple(row for row, _ in drawn), assigned=True), [each for _, each in drawn]

    def draw_strength(self) -> float:
        return self.draw.choice([1.0, 1.0, 0.5, -2.0]) if self.structure == "plain" else 1.0

    def swap(self) -> None:
        (row, wanted), strength = self.draw_wanted(), self.draw_strength()
        if self.done("swap", self.pool.swap, wanted, strength):
            self.now = Now((row,), strength)

    def strength(self) -> None:
        strength = self.draw.choice([0.5, 1.0, -2.0, 0.0])
        if self.done("strength", setattr, self.pool, "strength", strength):
            self.now = replace(self.now, strength=strength)

    def off(self) -> None:
        if self.done("off", self.pool.off):
            self.now = replace(self.now, strength=0.0)

    def update(self) -> None:
        """New weights, mostly of one that is in use."""
        names, label = [*self.members], self.draw.choice([*self.folders])
        used = [name for name in names if self.members[name] in self.now.members]
        name = self.draw.choice(used if used and self.draw.random() < 0.7 else names)
        new = Adapter.load(self.folders[label])
        if self.done("update", self.pool.update, name, new.tensors, new.config):
            self.members[name].label = label

    def assign(self) -> None:
        now, wanted = self.draw_rows(self.draw.randint(1, ROWS))
        strengths = [self.draw_strength()] * len(wanted)
        if now.differs:
            strengths = [self.draw_strength() for _ in wanted]
        if self.done("assign", self.pool.assign, wanted, strengths):
            rows = tuple(replace(row, strength=by) for row, by in zip(now.rows, strengths, strict=True))
            self.now = replace(now, rows=rows)

    def using(self) -> None:
        (row, wanted), strength = self.draw_wanted(), self.draw_strength()
        self.done("using", self.in_a_block, partial(self.pool.using, wanted, strength), Now((row,), strength))

    def assigned(self) -> None:
        now, wanted = self.draw_rows(self.draw.randint(1, ROWS))
        self.done("assigned", self.in_a_block, partial(self.pool.assigned, wanted), now)

    def in_a_block(self, block: Callable, now: Now) -> None:
        with block():
            before, self.now = self.now, now
            self.compare("in a block")
            self.now = before

    def remove(self) -> None:
        name = self.draw.choice([*self.members])
        self.removed = self.members[name]
        if len(self.members) > 1 and self.done("remove", self.pool.remove, name):
            del self.members[name]
            assert self.removed not in self.now.members

    def add(self) -> None:
        name, label = self.draw.choice("abce"), self.draw.choice([*self.folders])
        if name not in self.members and self.done("add", self.pool.add, name, self.folders[label]):
            self.members[name] = Member(label)

    def hotswap(self) -> None:
        """A swap that the pool knows nothing of."""
        label, self.foreign = self.draw.choice([*self.folders]), self.foreign + 1
        if self.foreign < 4 and self.done("hotswap", hotswap_adapter, self.model, self.folders[label], "default"):
            self.now = Now((Row(((Member(label), 1.0),)),))


CHECKS: dict[str, Callable[[Case], None]] = {
    each.__name__: each for each in (Case.swaps, Case.prepared, Case.pools, Case.rows, Case.generate)
}
