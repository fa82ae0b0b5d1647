"""Random walks: from any kind of adapter to any other, beside others, prepared or not, and never a reload in between.

What one swap leaves behind is what the next one finds, so an order of swaps is a case of its own: there are too many
to write them down. After each step the model equals a fresh load of the same adapters, or the swap was refused, for
a reason that is known here, and nothing has changed. ``TIMES=20`` makes more walks, and longer ones.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import CONFIGS, kind_for, save_random_adapter_of
from architectures import Case
from lengths import TIMES, few_of
from lora_kinds import FAMILIES, MODELS
from models import Kind, call, load
from oracle import assert_equals, assert_same_outputs, assert_same_tables
from peft import PeftModel

from hotswap_lab import HotswapError, hotswap_adapter, prepare_model_for_compiled_hotswap

MINE, OTHER = "default", "default_0"

#: by the model or the method: configs that are swapped for one another, and their names
FAMILIES_OF = {model: {} for model in MODELS} | {name: {name: configs} for name, configs in CONFIGS.items()}
for _name, (_model, _configs) in FAMILIES.items():
    FAMILIES_OF[_model][_name] = _configs
PLACES = {
    place: {f"{name} {number}": each for name, configs in families.items() for number, each in enumerate(configs)}
    for place, families in FAMILIES_OF.items()
}
PLACES = {place: configs for place, configs in PLACES.items() if len(configs) > 1}
#: the beginning of each message that a swap may be refused with, and when that is right
RIGHT_REFUSALS: dict[str, Callable[[Walk], bool]] = {
    "This swap can't be done in a prepared model.": lambda walk: walk.is_prepared,
    "The new adapter needs base weights whose original values are unknown": lambda walk: walk.is_prepared,
    "The layers that the loaded adapter lacks can't be added to the model.": lambda walk: walk.is_prepared,
    "The adapter can't be swapped in place at": lambda walk: walk.has_two or walk.is_prepared,
    "An adaption prompt can be swapped only while it is in the model.": lambda walk: walk.has_two,
    "This swap writes to weights of the base model": lambda walk: walk.has_two,
    "The adapter is for other layers of the base model": lambda walk: walk.has_met("layer_replication"),
    "The adapter is incomplete.": lambda walk: walk.has_met("layer_replication"),
}


class Walk(Case):
    """One model, and the adapters that were swapped into it one after another."""

    refusals = RIGHT_REFUSALS

    def __init__(self, root: Path, place: str, seed: int):
        self.root, self.place, self.seed = root / place.replace("/", " "), place, seed
        self.draw, self.labels = random.Random(seed), list(PLACES[place])
        self.kind: Kind = MODELS[place] if place in MODELS else kind_for(place)
        #: the adapters that are in the model now
        self.now = {MINE: self.draw.choice(self.labels), OTHER: self.draw.choice(self.labels)}
        #: all that were swapped in, the first entries being what was loaded
        self.steps: list[str] = []
        self.is_prepared = self.reserves_embeddings = False

    def folder(self, label: str) -> str:
        """Saved when it is first asked for."""
        number = self.labels.index(label) + 1
        folder = self.root / str(number)
        if not folder.exists():
            save_random_adapter_of(PLACES[self.place][label], folder, number, self.kind)
        return str(folder)

    @property
    def folders(self) -> dict[str, str]:
        return {name: self.folder(label) for name, label in self.now.items()}

    @property
    def has_two(self) -> bool:
        return len(self.now) > 1

    def has_met(self, family: str) -> bool:
        return any(family in step for step in self.steps)

    def go(self, length: int) -> None:
        """Random swaps, each compared with a fresh load; raises whatever is not as promised."""
        try:
            self.begin()
            for _ in range(length):
                self.step()
        except Exception as error:
            prepared = ", prepared" if self.is_prepared else ""
            error.add_note(f"seed {self.seed}, {self.place}{prepared}: {' > '.join(self.steps)}")
            raise

    def begin(self) -> None:
        model = fresh(self.kind, self.folders) if self.draw.random() < 0.5 else None
        if model is None:
            del self.now[OTHER]
            model = load(self.kind, self.folders[MINE])
        self.model = model
        if self.draw.random() < 0.3:
            reserved = self.draw.sample(self.labels, self.draw.randrange(3))
            adapters = [self.folder(each) for each in reserved]
            with contextlib.suppress(HotswapError):  # it is walked as it is
                prepare_model_for_compiled_hotswap(model, target_rank=16, adapters=adapters)
                self.is_prepared = True
            self.reserves_embeddings = "embeddings" in "".join(reserved)
        self.steps += self.now.values()

    def step(self) -> None:
        name, label = self.draw.choice(list(self.now)), self.draw.choice(self.labels)
        folder, base_weights = self.folder(label), self.kind.base().state_dict()
        if self.place == "attention" and self.has_two:
            # which PEFT merges for each call: its last bits are others afterwards, and so is its place in memory
            base_weights = None
        if self.draw.random() < 0.3:
            call(self.model, self.kind.inputs())  # whatever is cached is cached now
        self.steps.append(label if name == MINE else f"{label} ({name})")
        options = dict(add_layers=True, base_weights=base_weights)
        if not self.done("a swap", hotswap_adapter, self.model, folder, name, **options):
            self.steps.pop()
            return
        self.now[name] = label
        self.compare_all()

    def compare_all(self) -> None:
        """Each adapter is as PEFT loads it, beside the others."""
        model, kind, folders = self.model, self.kind, self.folders
        expected = fresh(kind, folders)
        if expected is None:  # after the swap there are two beside one another that PEFT doesn't put there
            assert_same_outputs(model, load(kind, folders[MINE]), kind, margin=10)
            return
        for name in reversed(folders):
            for each in (model, expected):
                each.set_adapter(name)
            assert_same_outputs(model, expected, kind, margin=10)
            if self.has_two and self.place in MODELS and not self.is_prepared:
                # Not all, as test_neighbours.py does: what is saved of a second adapter is another thing in a model
                # that was begun with another task. And only LoRA: a second VeRA uses the first one's projection.
                assert_same_tables(model, expected, name)
        if not self.has_two and not self.reserves_embeddings:
            assert_equals(model, expected, kind, prepared=self.is_prepared, margin=10)


def fresh(kind: Kind, folders: dict[str, str]) -> PeftModel | None:
    """What PEFT makes of them, one after the other; None where it can't have them beside one another."""
    (first, folder), *others = folders.items()
    model = load(kind, folder, first)
    try:
        for name, folder in others:
            model.load_adapter(folder, name)
        for name in reversed(folders):
            model.set_adapter(name)
            call(model, kind.inputs())
    except Exception:
        return None
    return model.eval()


@pytest.mark.parametrize("place", few_of(PLACES, ("bert", "LoHa", "PrefixTuning")))
def test_walks(tmp_path, place):
    walks, swaps = (4, 6) if len(PLACES[place]) > 10 else (1, 3)
    for seed in range(walks * TIMES):
        Walk(tmp_path, place, seed).go(swaps if TIMES == 1 else 12)
