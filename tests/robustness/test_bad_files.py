"""Damaged adapters: each loads as a fresh load does, or is refused in words and leaves everything as it was.

Each mutation in turn on each seed, some with more on top, by each of the ways in (``TIMES=35`` tries 4,200); and one
case for each defect that this has found. All adapters are tried in another process (see trials.py), so that a crash,
a hang or something executed is seen, and the rest of the tests go on.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from random import Random

import pytest
import torch
from lengths import TIMES, few_of, long
from mutations import (
    CANARY,
    CONFIG,
    FORMS,
    KEY,
    TEXT,
    WEIGHTS,
    Attack,
    M,
    Mutation,
    as_bin,
    deflated,
    expanded,
    mutations_for,
    nested,
    nothing,
    replaced,
    with_config,
    with_tensors,
)
from trials import SEEDS, Laboratory, Trial


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    return Laboratory(tmp_path_factory.mktemp("laboratory"))


def run_trials(laboratory: Laboratory, count: int, seed: int) -> list[Trial]:
    """Tries ``count`` mutations; the same for the same numbers."""
    pairs = [(name, mutation) for name, each in SEEDS.items() for mutation in mutations_for(name)]
    trials = []
    # one pair after another would be one seed only
    Random(0).shuffle(pairs)
    for number, (name, mutation) in enumerate(itertools.islice(itertools.cycle(pairs), count)):
        draw = Random(f"{seed}/{number}")
        more = draw.sample(mutations_for(name), draw.choice([0, 0, 0, 0, 1, 2]))
        mutations = [(each, Random(f"{seed}/{number}/{rank}")) for rank, each in enumerate((mutation, *more))]
        trials.append(laboratory.attempt(name, mutations, draw.choice(SEEDS[name].ways)))
    return trials


@pytest.mark.parametrize(("count", "seed"), [(8, 5), long(120 * TIMES, 2)])
def test_mutations_in_turn(laboratory, count, seed):
    trials = run_trials(laboratory, count, seed)
    failures = [str(each) for each in trials if each.problems]
    assert not failures, "\n".join(failures)
    outcomes = [each.ours["outcome"] for each in trials]
    assert outcomes.count("refused") > count // 4
    assert outcomes.count("accepted") > count // 8, "a fuzzer that only ever sees refusals tests little"


@pytest.mark.parametrize(
    ("ours", "fresh", "problem"),
    [
        ({"outcome": "hung"}, {}, "hung"),
        ({"outcome": "died"}, {}, "died"),
        ({"outcome": "raised", "text": "KeyError: 1"}, {}, "KeyError"),
        ({"outcome": "accepted"}, {"peft": "loads", "differs": "outputs"}, "differs"),
        ({"outcome": "accepted"}, {"peft": "ValueError: x"}, "PEFT refuses it"),
        ({"outcome": "refused", "text": "no"}, {"peft": "ValueError: x"}, "no found, expected and next"),
        ({"outcome": "refused", "text": "x\n found: a\n expected: b\n next: c"}, {"peft": "loads"}, "PEFT loads it"),
        ({"outcome": "accepted", "executed": True}, {"peft": "loads"}, "executed"),
        ({"outcome": "accepted", "memory": 10**9}, {"peft": "loads"}, "bytes for files of"),
        ({"outcome": "accepted", "touched": "x"}, {"peft": "loads"}, "changed"),
    ],
)
def test_what_is_not_as_promised_is_noticed(ours, fresh, problem):
    (found,) = Trial(Path(), "hotswap", [], ours, fresh, size=2000).problems
    assert problem in found


# ---- found by the long form: each of these was no HotswapError, or did worse


GOOD = [(name, way) for name, each in SEEDS.items() for way in each.ways]


@pytest.mark.parametrize(
    ("seed", "way"), [each if each[1] != "plan" or each[0] == "bin" else long(*each) for each in GOOD]
)
def test_good_folders(laboratory, seed, way):
    """A file that was shortened between plan and commit ended the process; one with other content was swapped in."""
    for number in range(4 if way == "plan" else 1):  # CHANGES
        trial = laboratory.attempt(seed, [(nothing, Random(number))], way)
        assert (trial.ours["outcome"], trial.problems) == ("accepted", []), str(trial)


@pytest.mark.parametrize(
    ("seed", "damage"),
    [
        ("linear", replaced(WEIGHTS, "link")),
        # what a config names is not read
        ("linear", with_config(auto_mapping={"base_model_class": "run", "parent_library": CANARY})),
        ("linear", with_config(base_model_name_or_path="/etc", revision="../../x")),
        ("PromptTuning", with_config(**TEXT, tokenizer_name_or_path="/dev/zero")),
        # only the safetensors file is read
        ("linear", as_bin(None, "pickle")),
        # RuntimeError, from looking for NaN in nothing
        ("IA3", with_tensors(lambda tensors: tensors.update({key: each.int() for key, each in tensors.items()}))),
    ],
)
def test_swapped_in(laboratory, seed, damage):
    trial = laboratory.attempt(seed, [(damage, Random(0))])
    assert (trial.ours["outcome"], trial.problems) == ("accepted", []), str(trial)


def without_prefix(tensors: dict) -> None:
    key = sorted(tensors)[1]
    tensors[key.removeprefix(M)] = tensors.pop(key)


def long_name(tensors: dict) -> None:
    tensors["\u202ea" * 50_000 + "\x1b[2J"] = tensors.popitem()[1]


def in_header(pattern: bytes, new: bytes) -> Mutation:
    """Other text in the header of a safetensors file."""

    def change(folder: Path, pick: Random) -> None:
        content = (folder / WEIGHTS).read_bytes()
        stop = 8 + int.from_bytes(content[:8], "little")
        header = re.sub(pattern, new, content[8:stop], count=1)
        (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[stop:])

    return change


def attack(form: str) -> Mutation:
    return lambda folder, pick: as_bin({KEY: Attack(os.mkdir, str(folder / CANARY))}, form)(folder, pick)


HUGE = 10**9
PATTERNS = ("(" * 5000, "a{99999999999999}")
NO_FILE = "can't be read|Can't find"
#: the seed, what is damaged, in what words it is refused, and by which way
REFUSED: dict[str, tuple[str, Mutation, str] | tuple[str, Mutation, str, str]] = {
    # opening a pipe waited for ever
    **{
        f"weights: {kind}": ("linear", replaced(WEIGHTS, kind), NO_FILE) for kind in ("pipe", "zero", "null", "nowhere")
    },
    **{
        f"config: {kind}": ("linear", replaced(CONFIG, kind), NO_FILE)
        for kind in ("pipe", "folder", "passwd", "itself")
    },
    # FileNotFoundError
    "a link to nowhere, in a pool": ("linear", replaced(CONFIG, "nowhere"), "Can't find", "pool"),
    # RecursionError, OverflowError
    **{
        f"{each[:9]} as expression": ("linear", with_config(rank_pattern={each: 2}), "regular expression")
        for each in PATTERNS
    },
    "a reference to no group": ("DoRA", with_config(layers_pattern=[r"\1"], layers_to_transform=[0]), "expression"),
    # OverflowError
    **{
        f"{name} larger than any float": ("linear", with_config(**{name: 10**400}), name)
        for name in ("lora_alpha", "lora_dropout")
    },
    # RecursionError: such a config can be read but not copied
    **{
        f"{kind} {depth} deep": ("linear", with_config(revision=nested(depth, kind)), "deep")
        for kind, depth in (("list", 300), ("list", 900), ("dict", 300))
    },
    # the memory was taken, or at least asked for
    **{
        f"a billion ranks, {seed} by {way}": (seed, with_config(r=HUGE), "", way)
        for seed, way in (("LoHa", "hotswap"), ("linear", "hotswap"), ("linear", "pool"), ("linear", "prepare"))
    },
    "a million ranks, in a pool": ("linear", with_config(r=10**6), "", "pool"),
    "a billion virtual tokens": ("PromptTuning", with_config(num_virtual_tokens=HUGE), ""),
    # Python takes the second one
    "a field twice": ("linear", in_header(b'"dtype"', b'"dtype":"F16","dtype"'), "can't be read"),
    "a wrong offset": ("linear", in_header(rb'"data_offsets":\[0,', b'"data_offsets":[4,'), "can't be read"),
    # a text of 100,000 characters, and a name that upsets a terminal
    "a long name": ("linear", with_tensors(long_name), r"\A[^\u202e\x1b]+\Z"),
    # a fresh load ignores the tensor; it was swapped in
    **{f"no prefix, {seed}": (seed, with_tensors(without_prefix), "prefix") for seed in ("linear", "DoRA", "IA3")},
    **{f"an attack by {form}": ("bin", attack(form), "can't be read") for form in FORMS},
    "a small archive of much": ("bin", deflated, "compressed"),
    # a tensor of a trillion times the same number, which was looked through for NaN
    "few bytes that say they are many": ("bin", as_bin({KEY: expanded(10**6, 10**6)}), "in a file of"),
    # AttributeError, NotImplementedError, ...
    **{
        f"no table of tensors: {str(content)[:20]}": ("bin", as_bin(content), "")
        for content in ([torch.ones(2)], None, {}, {5: torch.ones(2)}, {KEY: torch.ones(6, 12).to_sparse()})
    },
    "a module to import": (
        "linear",
        with_config(megatron_config={"a": 1}, megatron_core=f"megatron.{CANARY}"),
        "imported",
    ),
}


#: what takes a second each
SLOW = {"a million ranks, in a pool", "a small archive of much"}


@pytest.mark.parametrize("case", few_of(REFUSED, REFUSED.keys() - SLOW))
def test_refused(laboratory, case):
    case = REFUSED[case]
    seed, damage, match, *way = case
    trial = laboratory.attempt(seed, [(damage, Random(0))], *way)
    assert (trial.ours["outcome"], trial.problems) == ("refused", []), str(trial)
    assert re.search(match, trial.ours["text"]), trial.ours["text"]
