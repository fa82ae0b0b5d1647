"""Random walks: from any kind of adapter to any other, beside others, prepared or not, and never a reload in between.

What one swap leaves behind is what the next one finds, so an order of swaps is a case of its own: there are too many
to write them down. After each step the model equals a fresh load of the same adapters, or the swap was refused, for
a reason that is known here, and nothing has changed. ``TIMES=20`` makes more walks, and longer ones.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from adapters import CONFIGS, kind_for, save_random_adapter_of
from lengths import TIMES, few_of
from lora_kinds import FAMILIES, MODELS
from models import Kind, call, load
from oracle import assert_equals, assert_same_outputs, assert_same_tables, assert_untouched, snapshot
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from hotswap_lab import (
    HotswapError,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    save_adapter,
    verify_hotswap,
)

MINE, OTHER = "default", "default_0"
#: The zeros of a prepared model make other sums, and one fresh load in ten is itself 1e-5 off float64. All else is
#: the same computation.
PADDED, UNPADDED = 1e-4, 1e-5

#: the swaps that may be refused: the beginning of the message, and when that is right
RIGHT_REFUSALS: dict[str, Callable[[Walk], bool]] = {
    "This swap can't be done in a prepared model.": lambda walk: walk.is_prepared,
    "The adapter in the model came with base weights of its own": lambda walk: walk.is_prepared,
    "The layers that the loaded adapter lacks can't be added to the model.": lambda walk: walk.is_prepared,
    "The adapter can't be swapped in place at": lambda walk: walk.has_two or walk.is_prepared,
    "An adaption prompt can be swapped only while it is in the model.": lambda walk: walk.has_two,
    "This swap writes to weights of the base model": lambda walk: walk.has_two,
    "The adapter is for other layers of the base model": lambda walk: walk.has_met("layer_replication"),
    "The adapter is incomplete.": lambda walk: walk.has_met("layer_replication"),
}


class Places:
    """The adapters that can be swapped for one another on one model: saved when somebody asks for them."""

    def __init__(self, root: Path):
        self.root = root
        self.configs = {
            **{
                model: {
                    f"{name} {number}": config
                    for name, (of, configs) in FAMILIES.items()
                    for number, config in enumerate(configs)
                    if of == model
                }
                for model in MODELS
            },
            **{
                name: {f"{name} {number}": config for number, config in enumerate(configs)}
                for name, configs in CONFIGS.items()
            },
        }
        self.configs = {place: configs for place, configs in self.configs.items() if len(configs) > 1}

    def kind(self, place: str) -> Kind:
        return MODELS[place] if place in MODELS else kind_for(place)

    def folder(self, place: str, label: str) -> str:
        configs = self.configs[place]
        number = list(configs).index(label) + 1
        folder = self.root / place.replace("/", " ") / str(number)
        if not folder.exists():
            save_random_adapter_of(configs[label], folder, number, self.kind(place))
        return str(folder)


@dataclass
class Walk:
    """One model, and the adapters that were swapped into it one after another."""

    place: str
    #: the adapters that are in the model now
    now: dict[str, str]
    #: each swap that was done, the first two entries being what was loaded
    steps: list[str] = field(default_factory=list)
    is_prepared: bool = False
    reserves_embeddings: bool = False
    refused: Counter = field(default_factory=Counter)

    @property
    def has_two(self) -> bool:
        return len(self.now) > 1

    def has_met(self, family: str) -> bool:
        return any(family in step for step in self.steps)

    def refuse(self, error: HotswapError) -> None:
        """Raises the error if it is wrong."""
        message = next((each for each in RIGHT_REFUSALS if str(error).startswith(each)), None)
        if message is None or not RIGHT_REFUSALS[message](self):
            raise error
        self.refused[message] += 1

    def __str__(self) -> str:
        return f"{self.place}{', prepared' if self.is_prepared else ''}: {' > '.join(self.steps)}"


def walk_once(places: Places, place: str, seed: int, length: int) -> Walk:
    """Random swaps on one model, each compared with a fresh load; raises whatever is not as promised."""
    draw, labels = random.Random(seed), list(places.configs[place])
    walk = Walk(place, {MINE: draw.choice(labels), OTHER: draw.choice(labels)})
    try:
        _walk(places, walk, draw, labels, length)
    except Exception as error:
        error.add_note(f"seed {seed}, {walk}")
        raise
    return walk


def _walk(places: Places, walk: Walk, draw: random.Random, labels: list[str], length: int) -> None:
    kind, folders = places.kind(walk.place), {label: places.folder(walk.place, label) for label in labels}
    base_weights = kind.base().state_dict()
    model = fresh(kind, {name: folders[label] for name, label in walk.now.items()}) if draw.random() < 0.5 else None
    if model is None:
        del walk.now[OTHER]
        model = load(kind, folders[walk.now[MINE]])
    walk.steps += walk.now.values()
    if draw.random() < 0.3:
        reserved = draw.sample(labels, draw.randrange(3))
        walk.is_prepared = _prepare(model, [folders[each] for each in reserved])
        walk.reserves_embeddings = "embeddings" in "".join(reserved)
    for _ in range(length):
        name, label = draw.choice(list(walk.now)), draw.choice(labels)
        walk.steps.append(label if name == MINE else f"{label} ({name})")
        if draw.random() < 0.3:
            call(model, kind.inputs())  # whatever is cached is cached now
        before = snapshot(model)
        try:
            hotswap_adapter(model, folders[label], name, add_layers=True, base_weights=base_weights)
        except HotswapError as error:
            assert_untouched(model, before)
            walk.refuse(error)
            walk.steps.pop()
            continue
        walk.now[name] = label
        _compare(model, walk, kind, {name: folders[label] for name, label in walk.now.items()})
        if draw.random() < 0.2:
            with tempfile.TemporaryDirectory() as saved:
                save_adapter(model, saved, name)
                assert_same_outputs(load(kind, saved), load(kind, folders[label]), kind, margin=10)
                assert _keys(saved) == _keys(folders[label])
        # beside an adapter that changes the base model, no other one is as it is alone
        if draw.random() < 0.2 and not any(walk.has_met(each) for each in ("bias ", "layer_replication")):
            model.set_adapter(name)
            verdict = verify_hotswap(model, folders[label], name, inputs=kind.inputs(), base=kind.base)
            assert verdict, verdict
            model.set_adapter(MINE)


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


def _prepare(model: PeftModel, adapters: list[str]) -> bool:
    try:
        prepare_model_for_compiled_hotswap(model, target_rank=16, adapters=adapters)
    except HotswapError:
        return False
    return True


def _compare(model: PeftModel, walk: Walk, kind: Kind, folders: dict[str, str]) -> None:
    """Each adapter is as PEFT loads it, beside the others."""
    expected = fresh(kind, folders)
    if expected is None:  # after the swap there are two beside one another that PEFT doesn't put there
        assert_same_outputs(model, load(kind, folders[MINE]), kind, margin=10)
        return
    tolerance = PADDED if walk.is_prepared else UNPADDED
    for name in reversed(folders):
        for each in (model, expected):
            each.set_adapter(name)
        assert_same_outputs(model, expected, kind, tolerance, margin=10)
        if name == MINE and _can_be_saved(expected) and not walk.reserves_embeddings:
            assert_equals(model, expected, kind, name, prepared=walk.is_prepared, tolerance=tolerance, margin=10)
        elif walk.place in MODELS and not walk.is_prepared:
            # Not what is saved: that of a second adapter is another thing in a model that was begun with another
            # task. And only LoRA: a second VeRA goes by the first one's projection, if that is large enough.
            assert_same_tables(model, expected, name)


def _keys(folder: str) -> set[str]:
    return set(load_file(f"{folder}/adapter_model.safetensors"))


def _can_be_saved(model: PeftModel) -> bool:
    """PEFT 0.21 can't where another adapter has trained tokens and this one has none."""
    try:
        get_peft_model_state_dict(model, adapter_name=MINE)
    except KeyError:
        return False
    return True


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return Places(tmp_path_factory.mktemp("places"))


@pytest.mark.parametrize("place", few_of(Places(Path()).configs, ("bert", "mixtral", "LoHa", "PrefixTuning")))
def test_walks(places, place):
    walks, swaps = (4, 6) if len(places.configs[place]) > 10 else (1, 3)
    for seed in range(walks * TIMES):
        walk_once(places, place, seed, swaps if TIMES == 1 else 12)
